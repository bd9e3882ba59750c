"""Ranges of transfers, opened and ended by NVIDIA's own package."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
import pytest

from nixl_async import MissingDependency, nvtx_ranges
from tests.agents import known, two_agents

nvtx = pytest.importorskip("nvtx")


async def test_each_range_that_is_opened_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    start, end, mark = nvtx.start_range, nvtx.end_range, nvtx.mark

    def starting(*arguments: Any, **options: Any) -> Any:
        opened = start(*arguments, **options)
        calls.append(("start", (opened, arguments[0], options["domain"], options["payload"])))
        return opened

    monkeypatch.setattr(nvtx, "start_range", starting)
    monkeypatch.setattr(nvtx, "end_range", lambda opened: (calls.append(("end", opened)), end(opened))[1])
    monkeypatch.setattr(nvtx, "mark", lambda *a, **o: (calls.append(("mark", o["payload"])), mark(*a, **o))[1])
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(4 << 20, np.uint8), name="mine")
        await b.register(np.zeros(4 << 20, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        with nvtx_ranges.mark(a):
            await a.transfer(mine, peer.region("theirs"))
            await a.transfer(mine[:64], peer.region("theirs")[:64])
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            held = a.submit(peer.region("theirs"), mine, after=never)
        assert [what for what, _ in calls] == ["start", "end", "mark", "start", "end"]
        opened = calls[0][1]
        assert opened[1:] == ("put b", "nixl_async a", 4 << 20)
        assert calls[1][1] is opened[0]
        assert calls[2][1] == 64
        assert calls[3][1][1] == "get b"
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        assert len(calls) == 5


async def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    async with two_agents(backends=["tcp"]) as (a, _, _):
        with pytest.raises(MissingDependency, match="pip install nvtx"):
            nvtx_ranges.mark(a)
        assert a._observers.submitted is None
