"""The queue to a lower tier: bounded, in order, and nothing it holds is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from nixl_async import InternalError, NixlError, OutOfSpace
from nixl_async.tiers.writeback import Entry, WriteBack


class _Sink:
    """Takes what is written, when the gate is open."""

    def __init__(self, *, capacity: int = 4, batch: int = 2) -> None:
        self.gate = asyncio.Event()
        self.written: list[bytes] = []
        self.released: list[int] = []
        self.error: Exception | None = None
        self.queue = WriteBack("sink", self.write, self.release, capacity=capacity, batch=batch, n_workers=1)

    async def write(self, entries: list[Entry]) -> dict[bytes, NixlError]:
        try:
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            self.written += [key for key, _ in entries]
        finally:
            self.release(entries)
        return {}

    def release(self, entries: Sequence[Entry]) -> None:
        self.released += [slot for _, slot in entries if slot is not None]


def _entries(start: int, stop: int) -> list[Entry]:
    return [(b"%d" % n, n) for n in range(start, stop)]


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_puts_waits_while_the_queue_is_full() -> None:
    sink = _Sink()
    putting = asyncio.create_task(sink.queue.put(_entries(0, 10)))
    await _settled()
    assert not putting.done()
    assert len(sink.queue) == 4
    sink.gate.set()
    await putting
    await sink.queue.drain()
    assert sink.written == [b"%d" % n for n in range(10)]
    assert sorted(sink.released) == list(range(10))
    assert len(sink.queue) == 0


async def test_a_put_that_is_given_up_releases_what_was_not_queued() -> None:
    sink = _Sink()
    putting = asyncio.create_task(sink.queue.put(_entries(0, 10)))
    await _settled()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert sorted(sink.released) == list(range(4, 10))
    assert sink.queue.dropped == 6
    sink.gate.set()
    await sink.queue.drain()
    assert sorted(sink.released) == list(range(10))


async def test_without_waiting_only_what_there_is_room_for() -> None:
    sink = _Sink()
    sink.queue.put_now(_entries(0, 6))
    assert sink.released == [4, 5]
    sink.queue.put_now(_entries(0, 1))
    assert sink.released == [4, 5, 0], "no room"
    sink.gate.set()
    await sink.queue.drain()
    assert sink.written == [b"0", b"1", b"2", b"3"]


async def test_a_block_waits_once() -> None:
    sink = _Sink()
    sink.queue.put_now([(b"a", 1), (b"a", 2)])
    assert b"a" in sink.queue
    assert sink.released == [2]
    sink.gate.set()
    await sink.queue.drain()
    assert sink.written == [b"a"]


async def test_what_fails_is_told_once_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sink = _Sink()
    sink.gate.set()
    sink.error = OutOfSpace("full")
    await sink.queue.put(_entries(0, 2))
    await sink.queue.drain()
    sink.error = ValueError("a fault of ours")
    await sink.queue.put(_entries(2, 3))
    await sink.queue.drain()
    sink.error = None
    await sink.queue.put(_entries(3, 4))
    await sink.queue.drain()
    failed = sink.queue.take_failures()
    assert [type(failed[key]) for key in (b"0", b"1", b"2")] == [OutOfSpace, OutOfSpace, InternalError]
    assert sink.queue.take_failures() == {}
    assert sink.written == [b"3"]
    assert sink.queue.dropped == 3
    assert "could not be written to tier 'sink': full" in caplog.text


async def test_closing_drops_what_waits_and_stops_what_is_written() -> None:
    sink = _Sink()
    sink.queue.put_now(_entries(0, 4))
    await _settled()
    await sink.queue.aclose()
    assert sink.written == []
    assert sorted(sink.released) == [0, 1, 2, 3]
    sink.queue.put_now(_entries(4, 5))
    assert sorted(sink.released) == [0, 1, 2, 3, 4]
