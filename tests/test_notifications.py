"""The inbox, and notifications between agents: ordered, bounded, never dropped, any number of consumers."""

from __future__ import annotations

import asyncio
import gc

import pytest

from nixl_async import ClosedError, ConfigurationError, Notification
from nixl_async.notifications import MAX_NOTIFICATION_NBYTES, OVERHEAD_NBYTES, WINDOW_NBYTES, Inbox
from tests.agents import two_agents


class Box:
    """An inbox and what it reported as consumed."""

    def __init__(self) -> None:
        self.consumed: list[tuple[str, int]] = []
        self.inbox = Inbox(lambda peer, nbytes: self.consumed.append((peer, nbytes)))

    def put(self, payload: bytes, peer: str = "p") -> None:
        self.inbox.deliver(Notification(peer, payload))


async def test_what_nobody_asked_for_waits_for_the_first_who_does() -> None:
    box = Box()
    for payload in (b"a1", b"b1", b"a2"):
        box.put(payload)
    assert box.inbox.unread == 3
    a, everything = box.inbox.subscribe(None, b"a"), box.inbox.subscribe(None, b"")
    assert [(await anext(a)).payload for _ in range(2)] == [b"a1", b"a2"]
    assert (await anext(everything)).payload == b"b1"
    assert box.inbox.unread == 0


async def test_each_consumer_gets_its_own() -> None:
    box = Box()
    both = [box.inbox.subscribe(None, b"") for _ in range(2)]
    from_q = box.inbox.subscribe("q", b"")
    box.put(b"1", "p")
    box.put(b"2", "q")
    for consumer in both:
        assert [(await anext(consumer)).payload for _ in range(2)] == [b"1", b"2"]
    assert (await anext(from_q)).peer == "q"


async def test_the_sender_hears_only_when_the_last_consumer_has_taken_it() -> None:
    box = Box()
    first, second = box.inbox.subscribe(None, b""), box.inbox.subscribe(None, b"")
    box.put(b"12345")
    await anext(first)
    assert box.consumed == []
    await anext(second)
    assert box.consumed == [("p", 5 + OVERHEAD_NBYTES)]


async def test_what_a_consumer_leaves_goes_back_in_order() -> None:
    box = Box()
    consumer = box.inbox.subscribe(None, b"")
    for payload in (b"1", b"2", b"3"):
        box.put(payload)
    assert (await anext(consumer)).payload == b"1"
    consumer.close()
    consumer.close()
    with pytest.raises(StopAsyncIteration):
        await anext(consumer)
    box.put(b"4")
    async with box.inbox.subscribe(None, b"") as other:
        assert [(await anext(other)).payload for _ in range(3)] == [b"2", b"3", b"4"]


async def test_a_consumer_that_is_dropped_is_closed() -> None:
    box = Box()
    consumer = box.inbox.subscribe(None, b"")
    box.put(b"1")
    del consumer
    gc.collect()
    assert (await anext(box.inbox.subscribe(None, b""))).payload == b"1"


async def test_a_cancelled_wait_loses_nothing() -> None:
    box = Box()
    consumer = box.inbox.subscribe(None, b"")
    waits = [asyncio.ensure_future(consumer.__anext__()) for _ in range(2)]
    await asyncio.sleep(0)
    box.put(b"1")
    waits[0].cancel()
    assert (await waits[1]).payload == b"1"
    with pytest.raises(asyncio.CancelledError):
        await waits[0]


async def test_closing_ends_every_iteration() -> None:
    box = Box()
    consumer = box.inbox.subscribe(None, b"")
    wait = asyncio.ensure_future(consumer.__anext__())
    await asyncio.sleep(0)
    box.inbox.close()
    with pytest.raises(StopAsyncIteration):
        await wait
    with pytest.raises(ClosedError):
        box.inbox.subscribe(None, b"")


# Between agents.


@pytest.mark.parametrize("payload", [b"", bytes(range(256)), b"\x00" * (1 << 20), "Grüße".encode()], ids=len)
async def test_payloads_arrive_as_they_are(payload: bytes) -> None:
    async with two_agents() as (a, b, peer):
        arrivals = b.notifications(peer="a")
        await a.notify(peer, payload)
        assert await anext(arrivals) == Notification("a", payload)


async def test_bytearrays_and_views_are_taken() -> None:
    async with two_agents() as (a, b, _):
        arrivals = b.notifications()
        await a.notify("b", bytearray(b"one"))
        await a.notify("b", memoryview(b"two"))
        assert [(await anext(arrivals)).payload for _ in range(2)] == [b"one", b"two"]


async def test_a_payload_beyond_the_limit_is_refused() -> None:
    async with two_agents() as (a, _, peer):
        with pytest.raises(ConfigurationError, match=str(MAX_NOTIFICATION_NBYTES)):
            await a.notify(peer, bytes(MAX_NOTIFICATION_NBYTES + 1))


async def test_a_sender_waits_while_nobody_consumes() -> None:
    async with two_agents() as (a, b, peer):
        size, sent = WINDOW_NBYTES // 8, asyncio.Semaphore(0)

        async def send() -> None:
            for number in range(20):
                await a.notify(peer, bytes([number]) * size)
                sent.release()

        task = asyncio.create_task(send())
        arrivals = b.notifications(prefix=b"\x00")
        await anext(arrivals)
        # What one prefix does not match stays unread, and holds the sender up.
        for _ in range(7):
            await sent.acquire()
        assert not task.done()
        assert b.statistics().unread_notifications <= 8
        everything = b.notifications()
        assert [(await anext(everything)).payload[0] for _ in range(19)] == list(range(1, 20))
        await task


async def test_an_agent_may_notify_itself() -> None:
    async with two_agents() as (a, _, __):
        await a.notify("a", b"me")
        assert await anext(a.notifications()) == Notification("a", b"me")
