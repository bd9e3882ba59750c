"""What stands for NIXL's plugins: the order of ours is that of an agent without a list, towards each peer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest

from nixl_async.compat.lane import Lane, make_lane
from nixl_async.compat.plugins import PLUGINS
from nixl_async.compat.polled import Gate
from nixl_async.routing import RANKS_VARIABLE

pytest.importorskip("ucxx")

from nixl_async.backends.ucx import UCXBackend


@asynccontextmanager
async def two_lanes() -> AsyncIterator[tuple[Lane, Lane]]:
    async with AsyncExitStack() as stack:
        made = []
        for name in ("a", "b"):
            lane = make_lane(PLUGINS["UCX"], 1, {}, name, b"a secret", Gate())
            await lane.open()
            stack.push_async_callback(lane.aclose)
            made.append(lane)
        yield made[0], made[1]


async def routes() -> tuple[str, ...]:
    async with two_lanes() as (a, b):
        await b.agent.register(np.zeros(4096, np.uint8), name="kv")
        assert b.agent.address is not None
        peer = await a.agent.connect(("127.0.0.1", b.agent.address[1]))
        here = await a.agent.register(np.zeros(4096, np.uint8))
        return a.agent.explain(here, peer.region("kv")).routes


@pytest.mark.parametrize("lanes", ["rc_mlx5 mlx5_0:1\n", "tcp eth0\n"], ids=["rdma", "tcp"])
async def test_ucx_comes_before_tcp_where_it_has_rdma(lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UCXBackend, "_ask_lanes", lambda self, pointer: lanes)
    last = ("ucx", "tcp") if lanes.startswith("rc") else ("tcp", "ucx")
    assert await routes() == ("memory", "samehost", *last)


async def test_the_environment_sets_the_order_of_the_drop_in_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANKS_VARIABLE, "ucx=-1")
    assert await routes() == ("ucx", "memory", "samehost", "tcp")
