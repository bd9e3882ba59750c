"""Plans and traffic of `nixl-async bench kv` between VRAM of several processes, every byte checked on the device.

Needs a CUDA device and cupy; it stands alone.
"""

from __future__ import annotations

import importlib.util

import pytest

from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.matrices import Pattern, Traffic
from nixl_async.benchmarks.kv.models import Model
from nixl_async.benchmarks.kv.planning import make_plan
from nixl_async.benchmarks.kv.running import profile, traffic
from nixl_async.cuda import device_count

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
]


async def test_a_plan_is_moved_between_devices_memories() -> None:
    layout = Layout(tp=2, kv_dtype="fp16", isl=100, page_size=16, num_requests=2, access="layer")
    result = await profile(
        make_plan(Model("small", "test", 3, 4, 64, 2), layout),
        layout.changed(tp=4),
        rank=0,
        ops=["write", "read"],
        modes=["prepared", "one-shot"],
        repeats=2,
        warmup=1,
        backends=None,
        memory="vram",
    )
    assert (result["memory"], len(result["cases"])) == ("vram", 4)


async def test_patterns_that_name_no_memory_take_the_device() -> None:
    matrix = ((0, 70001, 1), (0, 0, 4097), (5, 0, 0))
    patterns = (Pattern(matrix, "a"), Pattern(matrix, "b", op="READ"))
    result = await traffic(Traffic(patterns, sequential=True), iters=2, isolated_iters=2, warmup=1)
    assert (result["memory"], result["verified"]) == ("vram", True)
