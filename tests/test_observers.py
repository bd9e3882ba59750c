"""Who listens is told each step of a transfer, in order; who has stopped listening is not."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from nixl_async import CPUStream, TransferState
from nixl_async.observers import EVENTS, Observers
from tests.agents import known, two_agents


class Recorder:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in EVENTS:
            raise AttributeError(name)
        return lambda *arguments: self.seen.append((name, *arguments))

    @property
    def names(self) -> list[str]:
        return [one[0] for one in self.seen]


def test_nobody_is_called_where_nobody_listens() -> None:
    observers = Observers()
    assert all(getattr(observers, event) is None for event in EVENTS)
    assert observers.trace is None


def test_all_who_have_the_method_are_called_until_they_are_removed() -> None:
    class Ends:
        def finished(self, record: object) -> None:
            told.append(record)

    told: list[object] = []
    observers, ends, recorder = Observers(), Ends(), Recorder()
    observers.add(ends)
    assert observers.submitted is None
    observers.add(recorder)
    assert observers.finished is not None
    observers.finished("a transfer")
    assert told == ["a transfer"]
    assert recorder.seen == [("finished", "a transfer")]
    observers.remove(ends)
    observers.remove(ends)
    observers.finished("another")
    assert told == ["a transfer"]
    observers.remove(recorder)
    assert observers.finished is None


@pytest.mark.parametrize("backend", ["tcp", "samehost"])
async def test_the_steps_of_a_transfer(backend: str) -> None:
    async with two_agents(backends=[backend]) as (a, b, peer):
        source, target = np.arange(1 << 20, dtype=np.uint8), np.zeros(1 << 20, np.uint8)
        mine = await a.register(source, name="mine")
        await b.register(target, name="theirs")
        events = a.membership()
        while "theirs" not in peer.regions:
            await anext(events)
        recorder = Recorder()
        a._observers.add(recorder)
        with CPUStream() as stream:
            transfer = a.submit(mine, peer.region("theirs"), after=stream, notify=b"there")
            await transfer
        assert recorder.names[0] == "submitted"
        assert recorder.names[1] == "reached"
        assert recorder.names[-2:] == ["finished", "resolved"]
        middle = recorder.names[2:-2]
        assert middle.count("started") == middle.count("ended") >= 1
        record = recorder.seen[0][1]
        assert record.id == transfer.id
        assert record.state is TransferState.DONE
        assert all(one[1] == backend for one in recorder.seen if one[0] in ("started", "ended"))
        assert all(one[3] is None for one in recorder.seen if one[0] == "ended")
        recorder.seen.clear()
        await a.transfer(mine[:4096], peer.region("theirs")[:4096])
        assert recorder.names == ["copied"]
        _, plan, to, route, traffic_class, seconds = recorder.seen[0]
        assert (plan.nbytes, to, route, traffic_class.value) == (4096, "b", backend, "normal")
        assert seconds > 0
        a._observers.remove(recorder)
        recorder.seen.clear()
        await a.transfer(mine, peer.region("theirs"))
        assert recorder.seen == []


async def test_an_observer_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            if name not in EVENTS:
                raise AttributeError(name)
            raises = RuntimeError(f"{name} failed")

            def fail(*arguments: Any) -> None:
                raise raises

            return fail

    async with two_agents(backends=["tcp"]) as (a, b, peer):
        source, target = np.arange(4 << 20, dtype=np.uint8), np.zeros(4 << 20, np.uint8)
        mine = await a.register(source, name="mine")
        await b.register(target, name="theirs")
        await known(a, peer, "theirs")
        recorder = Recorder()
        a._observers.add(Failing())
        a._observers.add(recorder)
        await a.transfer(mine, peer.region("theirs"))
        await a.transfer(mine[:64], peer.region("theirs")[:64])
        assert np.array_equal(source, target)
        assert recorder.names[-1] == "copied"
        assert "resolved" in recorder.names
    assert "an observer failed" in caplog.text


async def test_a_transfer_that_is_cancelled_while_it_waits_is_told_of() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        await b.register(np.zeros(4 << 20, np.uint8), name="theirs")
        mine = await a.register(np.zeros(4 << 20, np.uint8), name="mine")
        events = a.membership()
        while "theirs" not in peer.regions:
            await anext(events)
        recorder = Recorder()
        a._observers.add(recorder)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transfer = a.submit(mine, peer.region("theirs"), after=never)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        assert recorder.names == ["submitted", "finished", "resolved"]
