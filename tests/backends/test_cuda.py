"""The cuda backend on a machine without a device: it says what is missing, and other routes are taken. Copies: tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async import Agent, MissingDependency, RegistrationError, load_backend
from nixl_async.cuda import DeviceBytes, device_count
from tests.agents import TOKEN

pytestmark = pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")


@pytest.mark.parametrize("name", ["cuda", "gds"])
async def test_it_is_not_loaded(name: str) -> None:
    with pytest.raises(MissingDependency, match="libcuda"):
        load_backend(name)
    with pytest.raises(MissingDependency, match=f"the {name} backend needs a CUDA driver"):
        async with Agent("a", token=TOKEN, backends=[name, "memory"]):
            pass


async def test_explain_says_why_it_is_not_there() -> None:
    async with Agent("a", token=TOKEN) as agent:
        here = await agent.register(np.zeros(100, np.uint8))
        explained = agent.explain(here[:50], here[50:])
        assert explained.route == "memory"
        assert "libcuda" in explained.refusals["cuda"]
        assert "cuda: no: the cuda backend needs a CUDA driver (libcuda.so.1) and a device; there is none here" in str(
            explained
        )


async def test_device_memory_is_refused_with_the_reason() -> None:
    async with Agent("a", token=TOKEN) as agent:
        with pytest.raises(RegistrationError, match=r"VRAM.*cuda: the cuda backend needs a CUDA driver"):
            await agent.register(DeviceBytes(0x7000, 4096))
        assert agent.statistics().regions == 0
