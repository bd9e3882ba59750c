"""One control connection over real sockets: who gets in, what ends it, and what the kernel is told to watch."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from nixl_async import AuthenticationError, PeerLost, ProtocolError
from nixl_async.link import Link
from nixl_async.notifications import CREDIT_NBYTES, OVERHEAD_NBYTES, WINDOW_NBYTES
from nixl_async.security import Credentials
from nixl_async.wire import FrameType, Greeting, encode_frame


@dataclass(eq=False)
class Owner:
    """Notes what a link reports."""

    frames: list[tuple[FrameType, bytes]] = field(default_factory=list)
    authenticated: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    doubts: list[str] = field(default_factory=list)

    def link_authenticated(self, link: Link) -> None:
        self.authenticated.set()

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        self.frames.append((kind, payload))
        self.arrived.set()

    def link_closed(self, link: Link, error: Exception | None) -> None:
        self.error = error
        self.ended.set()

    def link_suspect(self, link: Link, reason: str) -> None:
        self.doubts.append(reason)

    def link_recovered(self, link: Link) -> None:
        self.doubts.append("")


@asynccontextmanager
async def two_links(
    ours: bytes | None = b"t", theirs: bytes | None = b"t", **options: Any
) -> AsyncIterator[tuple[Link, Owner, Link, Owner]]:
    loop = asyncio.get_running_loop()
    near, far = Owner(), Owner()
    left, right = socket.create_server(("127.0.0.1", 0)), socket.socket()
    accepted: asyncio.Future[Link] = loop.create_future()

    def accept() -> Link:
        made = Link(far, Greeting.create("far", "2"), Credentials(theirs), connecting=False, **options)
        accepted.set_result(made)
        return made

    server = await loop.create_server(accept, sock=left)
    right.connect(left.getsockname())
    right.setblocking(False)
    link = Link(near, Greeting.create("near", "1"), Credentials(ours), connecting=True, **options)
    await loop.create_connection(lambda: link, sock=right)
    other = await accepted
    try:
        yield link, near, other, far
    finally:
        for one in (link, other):
            one.abort()
        async with asyncio.timeout(5):
            await near.ended.wait()
            await far.ended.wait()
        server.close()
        await server.wait_closed()


async def _authenticated(*owners: Owner) -> None:
    async with asyncio.timeout(5):
        for owner in owners:
            await owner.authenticated.wait()


async def test_two_sides_with_one_token_meet_and_the_kernel_watches() -> None:
    async with two_links() as (near, owner, far, other):
        await _authenticated(owner, other)
        assert (near.other.name, far.other.name) == ("far", "near")
        assert near.host == "127.0.0.1"
        assert near._transport is not None
        sock = near._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        # It would end the connection to a process that is merely stopped.
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_wrong_token_ends_both_sides_with_a_reason() -> None:
    async with two_links(b"x", b"y") as (_, owner, __, other):
        async with asyncio.timeout(5):
            await owner.ended.wait()
            await other.ended.wait()
        assert isinstance(owner.error, AuthenticationError)
        assert isinstance(other.error, AuthenticationError)
        assert not owner.authenticated.is_set()
        assert not other.authenticated.is_set()


async def test_frames_and_their_order() -> None:
    async with two_links() as (near, owner, far, other):
        await _authenticated(owner, other)
        near.hold()
        for number in range(5):
            far.send(encode_frame(FrameType.REGIONS, b"%d" % number))
            near.send(encode_frame(FrameType.REGIONS, b"%d" % number))
        async with asyncio.timeout(5):
            while len(other.frames) < 5:
                other.arrived.clear()
                await other.arrived.wait()
        assert owner.frames == []
        near.unhold()
        async with asyncio.timeout(5):
            while len(owner.frames) < 5:
                owner.arrived.clear()
                await owner.arrived.wait()
        assert owner.frames == other.frames == [(FrameType.REGIONS, b"%d" % number) for number in range(5)]


async def test_a_connection_that_breaks_is_told_once_to_everyone_who_waits() -> None:
    async with two_links() as (near, owner, far, other):
        await _authenticated(owner, other)
        await near.notify(bytes(WINDOW_NBYTES))
        waiting = [asyncio.ensure_future(near.notify(b"x")) for _ in range(3)]
        await asyncio.sleep(0)
        far.abort()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(error, PeerLost) for error in ended)
        assert isinstance(owner.error, PeerLost)
        with pytest.raises(PeerLost):
            await near.notify(b"late")


async def test_credit_lets_waiting_notifications_go_in_order() -> None:
    async with two_links() as (near, owner, far, other):
        await _authenticated(owner, other)
        await near.notify(bytes(WINDOW_NBYTES))
        assert not near.notify_nowait(b"no room")
        waiting = [asyncio.ensure_future(near.notify(b"%d" % number)) for number in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        far.consumed(WINDOW_NBYTES + 64)
        async with asyncio.timeout(5):
            await asyncio.wait(waiting)
            while len(other.frames) < 4:
                other.arrived.clear()
                await other.arrived.wait()
        assert [payload for _, payload in other.frames[1:]] == [b"0", b"2", b"3"]


async def test_small_notifications_cost_no_answers_and_never_run_dry() -> None:
    async with two_links() as (near, owner, far, other):
        await _authenticated(owner, other)
        answers = 0
        send = far.send

        def counted(frame: bytes) -> None:
            nonlocal answers
            answers += 1
            send(frame)

        far.send = counted  # type: ignore[method-assign]
        size = CREDIT_NBYTES // 16 - OVERHEAD_NBYTES
        # Four windows full, each consumed as it comes; the last is larger than the window.
        for number in range(4 * WINDOW_NBYTES // (size + OVERHEAD_NBYTES)):
            async with asyncio.timeout(5):
                await near.notify(bytes(size))
                while len(other.frames) <= number:
                    other.arrived.clear()
                    await other.arrived.wait()
            far.consumed(size + OVERHEAD_NBYTES)
        assert answers == 4 * WINDOW_NBYTES // CREDIT_NBYTES
        far.consumed(CREDIT_NBYTES - 1)
        async with asyncio.timeout(5):
            await near.notify(bytes(WINDOW_NBYTES + 1))


async def test_bad_credit_closes_the_connection() -> None:
    async with two_links() as (_, owner, far, other):
        await _authenticated(owner, other)
        far.send(encode_frame(FrameType.CREDIT, b"short"))
        async with asyncio.timeout(5):
            await owner.ended.wait()
        assert isinstance(owner.error, ProtocolError)


async def test_a_side_that_says_nothing_is_dropped() -> None:
    loop = asyncio.get_running_loop()
    owner = Owner()

    def make() -> Link:
        return Link(owner, Greeting.create("b", "2"), Credentials(b"t"), connecting=False, deadline=loop.time() + 0.05)

    server = await loop.create_server(make, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    async with asyncio.timeout(5):
        await owner.ended.wait()
        assert b"handshake took too long" in await reader.read()
    assert isinstance(owner.error, ProtocolError)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_what_is_posted_goes_before_what_is_sent_and_at_the_latest_when_flushed() -> None:
    async with two_links() as (link, near, _, far):
        await asyncio.gather(near.authenticated.wait(), far.authenticated.wait())
        link.post(encode_frame(FrameType.REGIONS, b"1"))
        link.post(encode_frame(FrameType.REGIONS, b"2"))
        assert link.notify_nowait(b"3")
        link.flush()
        link.post(encode_frame(FrameType.REGIONS, b"4"))
        link.flush()
        while len(far.frames) < 4:
            far.arrived.clear()
            await far.arrived.wait()
        assert [payload for _, payload in far.frames] == [b"1", b"2", b"3", b"4"]


async def test_what_is_kept_is_delivered_first_and_counted_once() -> None:
    async with two_links() as (link, near, other, far):
        await asyncio.gather(near.authenticated.wait(), far.authenticated.wait())
        for number in range(3):
            await link.notify(b"%d" % number)
        while len(far.frames) < 3:
            far.arrived.clear()
            await far.arrived.wait()
        kept, far.frames = far.frames, []
        unread = other._unread
        for kind, payload in kept[:2]:
            other.keep(kind, payload)
        other.hold()
        await link.notify(b"last")
        other.unhold()
        while len(far.frames) < 3:
            far.arrived.clear()
            await far.arrived.wait()
        assert [payload for _, payload in far.frames] == [b"0", b"1", b"last"]
        assert other._unread == unread + len(b"last") + OVERHEAD_NBYTES


async def test_room_is_waited_for_while_the_other_side_does_not_read() -> None:
    async with two_links() as (link, near, other, far):
        await asyncio.gather(near.authenticated.wait(), far.authenticated.wait())
        await link.room()
        other.hold()
        for _ in range(64):
            link.send(encode_frame(FrameType.REGIONS, bytes(1 << 20)))
        waiting = asyncio.ensure_future(link.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        other.unhold()
        async with asyncio.timeout(20):
            await waiting
        # And the end of the connection ends the wait.
        other.hold()
        for _ in range(64):
            link.send(encode_frame(FrameType.REGIONS, bytes(1 << 20)))
        waiting = asyncio.ensure_future(link.room())
        await asyncio.sleep(0)
        other.abort()
        async with asyncio.timeout(20):
            await waiting
