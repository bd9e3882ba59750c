"""The memory backend: what only it does."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async import Agent, NoRoute
from nixl_async.testing import assert_same, pattern
from tests.agents import TOKEN, agent_process, two_agents


async def test_two_agents_of_one_process_reach_each_other_by_it() -> None:
    async with two_agents(backends=["memory"]) as (a, b, peer):
        got = np.zeros(4096, np.uint8)
        await b.register(got, name="kv")
        here = await a.register(pattern(4096, 1))
        b_again = await a.connect(b.address)  # type: ignore[arg-type]
        assert b_again is peer
        while "kv" not in peer.regions:
            await anext(a.membership())
        assert (await a.transfer(here, peer.region("kv"))).route == "memory"
        assert_same(got, pattern(4096, 1))


async def test_another_process_is_refused_with_the_reason() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, backends=["memory"]) as near:
        here = await near.register(np.zeros(1 << 20, np.uint8))
        remote = (await near.connect(far.address)).region("memory")
        with pytest.raises(NoRoute, match="another process"):
            await near.transfer(remote, here)
        explanation = near.explain(remote, here)
        assert explanation.route is None
        assert "another process" in explanation.refusals["memory"]
