"""Compares both sides of transfers, each page summed by the process that owns it; and sums pages for peers that ask.

What travels is in `checksums`. Sums are made on a few threads. A peer has one request worked on at a time, so that many cannot be
asked for at the expense of others, and `MAX_ASKED` waiting ones; who sends more breaks the protocol.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from nixl_async.backend import quiesce
from nixl_async.checksums import (
    ALGORITHMS,
    MAX_PIECES,
    MAX_REQUEST_NBYTES,
    PAGE_NBYTES,
    Pieces,
    Request,
    cut_pages,
    decode_answer,
    decode_request,
    encode_refusal,
    encode_sums,
    load,
    requests,
    sums,
)
from nixl_async.descriptors import MemoryKind
from nixl_async.errors import AccessError, ConfigurationError, IntegrityError, PeerLost, ProtocolError
from nixl_async.storage import ObjectRegion
from nixl_async.wire import FrameType, encode_frame

if TYPE_CHECKING:
    from nixl_async.backend import Backend
    from nixl_async.checksums import Sums
    from nixl_async.descriptors import Array, Places, Plan, Side
    from nixl_async.link import Link
    from nixl_async.membership import Membership
    from nixl_async.memory import MemoryRegion
    from nixl_async.peers import Peer
    from nixl_async.staging import StagingBackend

T = TypeVar("T")

MAX_ASKED = 8
"""How many requests to one peer wait for an answer at most, those of all transfers together."""
MAX_LISTED = 64
"""How many differing pages an `IntegrityError` lists."""
MAX_SHOWN = 4
SMALL_NBYTES = 256 << 10
"""Transfers up to this size are cut into pages on the loop: that takes less than it takes to ask a thread."""
N_THREADS = max(1, min(4, (os.cpu_count() or 2) // 2))


@dataclass(slots=True, eq=False)
class Check:
    """How a transfer is verified: by which algorithm, and the places whose ranges are its pages."""

    algorithm: str
    places: tuple[Places, Places] | None


@dataclass(slots=True, eq=False)
class _Line:
    """What goes on with one peer on one link: what was asked there, and what it asked here."""

    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_ASKED))
    # By request number: how many sums are expected, and who waits for them, even if he does no longer.
    asked: dict[int, tuple[int, asyncio.Future[Sums | str | None]]] = field(default_factory=dict)
    queue: deque[tuple[int, Request, list[MemoryRegion]]] = field(default_factory=deque)
    worker: asyncio.Task[None] | None = None
    ended: bool = False


class Verifier:
    """Verifies the transfers of one agent, and serves its peers."""

    def __init__(
        self, name: str, loop: asyncio.AbstractEventLoop, membership: Membership, backends: Mapping[str, Backend]
    ) -> None:
        self._name = name
        self._loop = loop
        self._membership = membership
        self._backends = backends
        self._pool: ThreadPoolExecutor | None = None
        self._lines: dict[Link, _Line] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._next_number = 0
        membership.verifier = self

    async def aclose(self) -> None:
        """End the threads. The peers are gone, and nothing is verified any more."""
        if self._workers:
            await asyncio.wait(self._workers)
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def check(self, plan: Plan, places: tuple[Places, Places] | None, algorithm: str | bool) -> Check:
        """Return how a transfer is to be verified.

        Raises:
            ConfigurationError: it cannot be: the algorithm is unknown here or at the peer, or a side is no host memory.
            MissingDependency: the algorithm's library is not installed.
            PeerLost: the peer is not connected.
        """
        load(algorithm)
        assert isinstance(algorithm, str)
        for what, side in (("src", plan.src), ("dst", plan.dst)):
            if side.kind is MemoryKind.VRAM:
                raise ConfigurationError(
                    f"verify={algorithm!r} does not read a device's memory, and {what} is {side.regions[0]!r}; copy it to"
                    " registered host memory and verify that, or pass verify=False"
                )
            if side.kind is not MemoryKind.DRAM and (why := self._why_not_read(side)):
                raise ConfigurationError(f"verify={algorithm!r} must read {what} back, and {why}; pass verify=False")
        peer_name = plan.dst.peer if plan.dst.peer is not None else plan.src.peer
        if peer_name is not None:
            peer = self._membership.get(peer_name)
            if peer.link is None:
                raise ConfigurationError(
                    f"verify={algorithm!r}: peer {peer_name!r} is a stock NIXL agent and computes no checksums; pass verify=False"
                )
            if algorithm not in peer.checksums:
                has = ", ".join(one for one in ALGORITHMS if one in peer.checksums) or "none"
                raise ConfigurationError(
                    f"verify={algorithm!r}: peer {peer_name!r} does not know it; it has: {has}"
                    " (pip install 'nixl-async[verify]' there)"
                )
        return Check(algorithm, places)

    async def verify(self, plan: Plan, check: Check) -> None:
        """Compare the pages of both sides; when this returns or raises, none of ours is read any more.

        Raises:
            IntegrityError: pages differ.
            PeerLost: the peer is gone.
            AccessError: it refuses.
        """
        stop = _Stop()
        if plan.nbytes <= SMALL_NBYTES and len(plan.lengths) <= MAX_PIECES:
            pieces = cut_pages(plan, check.places)
        else:
            pieces = await self._on_thread(stop, cut_pages, plan, check.places)
        found = [np.zeros(len(pieces.lengths), np.uint64) for _ in range(2)]
        await self._together(
            self._sum(side, pieces, check.algorithm, into, stop)
            for side, into in zip((pieces.src, pieces.dst), found, strict=True)
        )
        differing = np.flatnonzero(found[0] != found[1])
        if len(differing):
            raise await self._on_thread(stop, _error, pieces, differing, check.algorithm)

    async def _sum(self, side: Side, pieces: Pieces, algorithm: str, into: Sums, stop: _Stop) -> None:
        if side.kind is not MemoryKind.DRAM:
            await self._sum_stored(side, pieces, algorithm, into, stop)
            return
        chunks = await self._chunks(stop, pieces, side, MAX_REQUEST_NBYTES)
        if side.peer is None:
            for chunk in chunks:
                into[chunk] = await self._on_thread(
                    stop, sums, algorithm, side.addresses[chunk], pieces.lengths[chunk], stop.is_set
                )
            return
        peer = self._membership.get(side.peer)
        questions = (one for chunk in chunks for one in requests(algorithm, side, pieces.lengths, chunk))

        async def ask() -> None:
            for part, request in questions:
                into[part] = await self._ask(peer, request)

        await self._together(ask() for _ in range(min(MAX_ASKED, len(chunks))))

    async def _sum_stored(self, side: Side, pieces: Pieces, algorithm: str, into: Sums, stop: _Stop) -> None:
        staging = cast("StagingBackend", self._backends["staging"])
        step = min(MAX_REQUEST_NBYTES, max(PAGE_NBYTES, staging.buffer_nbytes))
        for chunk in await self._chunks(stop, pieces, side, step):
            lengths = pieces.lengths[chunk]
            async with staging.read(side.choose(chunk), lengths) as addresses:
                into[chunk] = await self._on_thread(stop, sums, algorithm, addresses, lengths, stop.is_set)

    async def _chunks(self, stop: _Stop, pieces: Pieces, side: Side, max_nbytes: int) -> list[Array]:
        found = pieces.chunks(side, max_nbytes)
        if len(pieces.lengths) <= MAX_PIECES:
            return list(found)
        listed: list[Array] = await self._on_thread(stop, list, found)
        return listed

    def _why_not_read(self, side: Side) -> str | None:
        if (staging := self._backends.get("staging")) is None:
            return "this agent has no staging backend to do that with; add it to backends=[…]"
        return cast("StagingBackend", staging).why_not_read(side)

    async def _together(self, coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run all; when one fails, or this is cancelled, end the others before it is raised."""
        tasks = [self._loop.create_task(one) for one in coroutines]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await quiesce(asyncio.gather(*tasks, return_exceptions=True))

    async def _on_thread(self, stop: _Stop, function: Callable[..., T], *arguments: Any) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(N_THREADS, thread_name_prefix=f"nixl-verify-{self._name}")
        work = self._pool.submit(function, *arguments)

        def end() -> None:
            stop.set()
            # Not the future that is awaited: that would count as done while the thread still reads.
            work.cancel()

        return await quiesce(asyncio.wrap_future(work, loop=self._loop), end)

    # Asking.

    async def _ask(self, peer: Peer, request: Request) -> Sums:
        while True:
            link = await self._membership.current_link(peer)
            answer = await self._ask_by(link, request)
            if isinstance(answer, str):
                raise AccessError(f"peer {peer.name!r} refuses to verify: {answer}", peer=peer.name)
            if answer is not None:
                return answer
            if link is peer.link and not link.superseded:
                raise PeerLost(peer.gone or f"peer {peer.name!r} is gone", peer=peer.name)

    async def _ask_by(self, link: Link, request: Request) -> Sums | str | None:
        """Ask by one link; return `None` if it ended before it brought an answer."""
        line = self._line(link)
        await line.room.acquire()
        if link.closed or line.ended:
            line.room.release()
            return None
        self._next_number += 1
        future: asyncio.Future[Sums | str | None] = self._loop.create_future()
        line.asked[self._next_number] = len(request.ranges), future
        link.send(encode_frame(FrameType.VERIFY, request.encode(self._next_number)))
        return await future

    def _line(self, link: Link) -> _Line:
        line = self._lines.get(link)
        if line is None:
            line = _Line(ended=link.closed)
            if not link.closed:
                self._lines[link] = line
        return line

    # What the membership reports.

    def link_frame(self, link: Link, peer: Peer, kind: FrameType, payload: bytes) -> None:
        """Take a VERIFY or VERIFIED frame.

        Raises:
            ProtocolError: it is malformed, answers nothing, or is one too many.
        """
        line = self._line(link)
        if kind is FrameType.VERIFIED:
            number, answer = decode_answer(payload)
            count, future = line.asked.pop(number, (0, None))
            if future is None or (not isinstance(answer, str) and len(answer) != count):
                raise ProtocolError(f"{peer.name!r} answers a VERIFY that was not sent")
            line.room.release()
            if not future.done():
                future.set_result(answer)
            return
        number, request = decode_request(payload)
        if len(line.queue) + (line.worker is not None) > MAX_ASKED:
            raise ProtocolError(f"{peer.name!r} has more than {MAX_ASKED} VERIFY frames waiting")
        regions, why = self._offered(peer, request)
        if why:
            link.send(encode_frame(FrameType.VERIFIED, encode_refusal(number, why)))
            return
        for region in regions:
            region.hold()
        line.queue.append((number, request, regions))
        if line.worker is None:
            line.worker = self._loop.create_task(self._serve(link, line))
            self._workers.add(line.worker)
            line.worker.add_done_callback(self._workers.discard)

    def link_closed(self, link: Link) -> None:
        """Answer who waits for this link; forget what came by it."""
        line = self._lines.pop(link, None)
        if line is None:
            return
        line.ended = True
        for _, future in line.asked.values():
            line.room.release()
            if not future.done():
                future.set_result(None)
        line.asked.clear()
        while line.queue:
            _release(line.queue.popleft()[2])

    # Serving.

    def _offered(self, peer: Peer, request: Request) -> tuple[list[MemoryRegion], str]:
        """Return the regions that a request names, and why it is refused if it is."""
        found: list[MemoryRegion] = []
        for address, name in request.regions:
            region = self._membership.offered(peer, name, address)
            if region is None or region.quarantined:
                return [], f"it has no region {name[:80]!r} at {address:#x}"
            if region.kind is not MemoryKind.DRAM:
                return [], f"region {name[:80]!r} is {region.kind.value}"
            found.append(region)
        which, ranges = request.ranges["region"], request.ranges
        room = np.array([region.nbytes for region in found], np.uint64)[which]
        if bool(np.any((ranges["offset"] > room) | (ranges["nbytes"] > room - np.minimum(ranges["offset"], room)))):
            return [], "a range does not lie within its region"
        return found, ""

    async def _serve(self, link: Link, line: _Line) -> None:
        try:
            while line.queue:
                number, request, regions = line.queue.popleft()
                try:
                    answer = await self._sum_for_peer(number, request, regions, line)
                finally:
                    _release(regions)
                link.send(encode_frame(FrameType.VERIFIED, answer))
        finally:
            line.worker = None

    async def _sum_for_peer(self, number: int, request: Request, regions: list[MemoryRegion], line: _Line) -> bytes:
        bases = np.array([region.address for region in regions], np.int64)
        addresses = bases[request.ranges["region"]] + request.ranges["offset"].astype(np.int64)
        lengths = request.ranges["nbytes"].astype(np.int64)
        try:
            found = await self._on_thread(_Stop(), sums, request.algorithm, addresses, lengths, lambda: line.ended)
        except ConfigurationError as error:
            return encode_refusal(number, str(error))
        return encode_sums(number, found)


class _Stop:
    """Whether work on threads is to end early; a plain attribute, as reading it costs a thread nothing."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set


def _release(regions: list[MemoryRegion]) -> None:
    for region in regions:
        region.release()


def _error(pieces: Pieces, differing: Array, algorithm: str) -> IntegrityError:
    pages, firsts = np.unique(pieces.pages[differing], return_index=True)
    shown = [
        f"page {page}: {_where(pieces.src, piece, pieces.lengths)} and {_where(pieces.dst, piece, pieces.lengths)}"
        for page, piece in zip(pages[:MAX_SHOWN].tolist(), differing[firsts[:MAX_SHOWN]].tolist(), strict=True)
    ]
    more = "" if len(pages) <= MAX_SHOWN else f"; and {len(pages) - MAX_SHOWN} more"
    return IntegrityError(
        f"{len(pages)} of {pieces.n_pages} pages differ after the copy ({algorithm}): {'; '.join(shown)}{more}."
        " Either the bytes went astray or somebody wrote to one side meanwhile",
        pages=tuple(pages[:MAX_LISTED].tolist()),
        count=len(pages),
        algorithm=algorithm,
    )


def _where(side: Side, piece: int, lengths: Array) -> str:
    region = side.regions[0 if side.index is None else int(side.index[piece])]
    first = int(side.addresses[piece]) - region.address
    name = region.name
    if isinstance(region, ObjectRegion):
        number = int(region.starts.searchsorted(first, "right")) - 1
        name, first = region.objects[number], first - int(region.starts[number])
    owner = "" if region.peer is None else f" of {region.peer!r}"
    return f"{name!r}{owner} [{first}:{first + int(lengths[piece])}]"
