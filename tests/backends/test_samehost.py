"""The samehost backend: it must never mistake one process for another."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from nixl_async import Agent, BackendError, PeerLost
from nixl_async.backend import Host, PeerInfo
from nixl_async.backends.samehost import SameHostBackend
from nixl_async.testing import pattern
from tests.agents import TOKEN, agent_process


async def _opened() -> SameHostBackend:
    backend = SameHostBackend()
    await backend.open(Host("a", "1", asyncio.get_running_loop()))
    return backend


def _changed(backend: SameHostBackend, **changes: object) -> PeerInfo:
    return PeerInfo("b", "1", json.dumps(json.loads(backend.describe()) | changes).encode())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nonce": "00" * 16}, "is not peer 'b'"),
        ({"nonce": "00"}, "described itself wrongly"),
        ({"pid": -1}, "described itself wrongly"),
        ({"pid": "x"}, "described itself wrongly"),
        ({"address": 0}, "described itself wrongly"),
        ({"address": 4096}, "cannot read from"),
        ({"pid": 1 << 22}, "not on this host"),
    ],
)
async def test_who_is_not_the_peer_is_refused(changes: dict[str, object], text: str) -> None:
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match=text):
            await backend.connect(_changed(backend, **changes))
    finally:
        await backend.aclose()


async def test_a_description_that_is_no_json_is_refused() -> None:
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match="wrongly"):
            await backend.connect(PeerInfo("b", "1", b"\xff"))
    finally:
        await backend.aclose()


async def test_a_process_that_ended_is_told_at_once() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, backends=["samehost"]) as near:
        here = await near.register(pattern(1 << 20, 1))
        remote = (await near.connect(far.address)).region("memory")
        ready = await near.prepare(here[0:4096], remote[0:4096])
        far.kill()
        await far.process.wait()
        # Before the loop has heard of it: the pidfd is asked before each copy.
        with pytest.raises(PeerLost):
            await ready.transfer()


async def test_a_number_of_nobody_is_refused() -> None:
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await ended.wait()
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match="not on this host"):
            await backend.connect(_changed(backend, pid=ended.pid))
    finally:
        await backend.aclose()
