"""What a connection of `dynamo_connect` stands on: an agent, the memory registered with it, what it exposes, whom it reaches.

An operation's passive side exposes memory under a key. The active side notifies that key when its transfer is complete; and,
where both sides are of this library, `begin KEY` when it starts and `fail KEY reason` when it gives up, so that the passive
side knows whose death or failure is its own.
"""

from __future__ import annotations

import asyncio
import base64
import bisect
import contextlib
import functools
import itertools
import logging
import os
import secrets
import socket
import uuid
import zlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from nixl_async.agent import Agent
from nixl_async.compat import blobs
from nixl_async.descriptors import Descriptor as Bytes
from nixl_async.errors import (
    Aborted,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    NixlError,
    NotFoundError,
    PeerLost,
    ProtocolError,
    TransferError,
)
from nixl_async.handle import Transfer
from nixl_async.memory import MemoryRegion
from nixl_async.peers import Peer

logger = logging.getLogger("nixl_async.integrations.dynamo_connect")

TOKEN_VARIABLE = "NIXL_ASYNC_TOKEN"
HOST_VARIABLE = "NIXL_ASYNC_HOST"
"""The address that agents serve at and tell their peers (default: that of the interface with the default route)."""
LATE_SECONDS = 1.0
"""How long to wait for a region that metadata names and the peer's connection has not told of yet."""
LEAVE_SECONDS = 3.0
"""How long the end of a loop waits for an agent that nobody closed."""
MAX_METADATA_NBYTES = 256 << 20
ENCODINGS = 256
"""How many encoded metadata strings are kept; operations on the same memory share one."""
OURS = "nixl_async:"
"""What the keys of this library begin with: their owners understand `begin` and `fail`."""
BEGIN, FAIL = b"begin ", b"fail "


class OperationTimeout(TransferError, TimeoutError):
    """Report an operation that the other side did not complete in time; its memory is withdrawn."""


@dataclass(frozen=True, slots=True)
class Place:
    """Memory to be registered: `kind` is cpu, cuda or xpu."""

    address: int
    nbytes: int
    kind: str
    device: int
    readonly: bool


@dataclass(slots=True, eq=False)
class Registration:
    """Memory registered with an endpoint's agent, or about to be; shared by the descriptors of the same bytes."""

    endpoint: Endpoint
    place: Place
    owner: object
    task: asyncio.Task[None] | None = None
    region: MemoryRegion | None = None
    users: int = 1
    exposures: int = 0
    withdrawn: bool = False

    @property
    def usable(self) -> bool:
        """Whether it is, or is going to be, registered."""
        failed = self.region is None and self.task is not None and self.task.done()
        return not self.withdrawn and not failed

    def covers(self, address: int, nbytes: int) -> bool:
        """Tell whether the bytes lie in it."""
        return self.place.address <= address and address + nbytes <= self.place.address + self.place.nbytes

    def bytes_at(self, address: int, nbytes: int) -> Bytes:
        """Return its bytes at that address; it must be registered."""
        assert self.region is not None
        return self.region[address - self.place.address : address - self.place.address + nbytes]


@dataclass(slots=True, eq=False)
class Exposure:
    """Memory that one operation of a peer is expected to read or write; `ended` is done when that is over."""

    key: bytes
    registrations: Sequence[Registration]
    ended: asyncio.Future[None]
    peer: str | None = None
    error: NixlError | None = None
    complete: bool = False
    timer: asyncio.TimerHandle | None = None
    ending: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """Another agent's metadata, read: `places` are (address, bytes, region's name), in order."""

    name: str
    blob: blobs.Blob
    incarnation: str
    stock: bool
    places: list[tuple[int, int, str]] = field(default_factory=list)

    def region_of(self, address: int, nbytes: int) -> tuple[int, int, str]:
        """Return the place that holds these bytes.

        Raises:
            DescriptorError: none does.
        """
        last = bisect.bisect_right(self.places, (address, 1 << 63, ""))
        for place in reversed(self.places[:last]):
            if address + nbytes <= place[0] + place[1]:
                return place
        raise DescriptorError(f"the metadata of {self.name!r} has no region with the {nbytes} bytes at {address:#x}")


@functools.lru_cache(64)
def read_metadata(text: str | bytes) -> Known:
    """Read the metadata in an `RdmaMetadata`: `b64:` and base64, or hex, of deflated bytes; or a NIXL agent's own as bytes.

    Raises:
        ProtocolError: it is malformed.
    """
    if isinstance(text, str):
        try:
            packed = base64.b64decode(text[4:], validate=True) if text.startswith("b64:") else bytes.fromhex(text)
            opened = zlib.decompressobj()
            raw = opened.decompress(packed, MAX_METADATA_NBYTES)
            if not opened.eof:
                raise ValueError(f"it is cut short, or has more than {MAX_METADATA_NBYTES} bytes")
        except (ValueError, zlib.error) as error:
            raise ProtocolError(f"nixl_metadata is malformed: {error}") from error
    else:
        raw = text
    blob = blobs.read(raw)
    if blob.announcement is None:
        raise ProtocolError(f"the metadata of {blob.name!r} does not say how to reach it")
    places = sorted((r.address, r.nbytes, r.name) for r in blob.announcement.regions)
    return Known(blob.name, blob, blob.announcement.incarnation, blob.announcement.stock, places)


class Endpoint:
    """An agent on one event loop. Only `unshare_soon`, `abandon_soon` and `close_soon` may be called elsewhere."""

    def __init__(self, name: str, *, token: str | bytes | None, host: str | None, backends: Sequence[Any] | None) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        given = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
        # Whoever has the metadata may connect, as with NIXL, unless the two sides share a secret of their own.
        self._told: bytes | None = None
        if given is None:
            given = self._told = secrets.token_bytes(16)
        self._host = host or os.environ.get(HOST_VARIABLE)
        self.agent = Agent(name, backends=backends, token=given)
        self.registrations: dict[Place, Registration] = {}
        self.exposures: dict[bytes, Exposure] = {}
        self.opened = False
        self.closed = False
        self._numbers = itertools.count(1)
        self._encoded: dict[tuple[str, ...], str] = {}
        self._reaching: dict[tuple[str, str], asyncio.Task[Peer]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._opening = self.spawn(self._open())

    # Opening and closing.

    async def ready(self) -> Endpoint:
        """Wait until the agent is open."""
        if not self.opened:
            await asyncio.shield(self._opening)
        if self.closed:
            raise ClosedError(f"connection {self.name!r} is closed")
        return self

    async def _open(self) -> None:
        await self.agent.__aenter__()
        try:
            await self.agent.serve(self._host or "0.0.0.0", 0, advertise=self._host or _own_address())
        except BaseException:
            await self.agent.aclose()
            raise
        self.spawn(self._listen())
        self.spawn(self._watch())
        self.spawn(self._guard())
        self.opened = True

    async def _guard(self) -> None:
        """Close when the loop ends: `asyncio.run` cancels every task then, and waits for them."""
        try:
            await self.loop.create_future()
        except asyncio.CancelledError:
            if not self.closed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEAVE_SECONDS):
                        await self.aclose()
            raise

    async def aclose(self) -> None:
        """Fail what is exposed, cancel what is in flight, wait until it is quiet, and close the agent. Idempotent."""
        if self.closed:
            return
        self.closed = True
        await asyncio.wait([self._opening])
        for exposure in list(self.exposures.values()):
            self.fail(exposure, ClosedError(f"connection {self.name!r} is closed"))
        await self.agent.aclose()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def close_soon(self) -> None:
        """Close from any thread, if the loop still runs."""
        self._soon(lambda: self.spawn(self.aclose()))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `work` in a task that ends with the endpoint; what it raises is for who awaits it."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("connection %s: %r", self.name, error)

    def _soon(self, function: Callable[[], object]) -> None:
        # The loop may be closed: then nothing of it is left.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function)

    # Memory.

    def share(self, place: Place, memory: Callable[[], Any], owner: object) -> Registration:
        """Return the registration of that place, beginning it if there is none; `owner` lives as long as it does."""
        held = self.registrations.get(place)
        if held is not None and held.usable:
            held.users += 1
            return held
        made = Registration(self, place, owner)
        self.registrations[place] = made
        made.task = self.spawn(self._register(made, memory))
        return made

    async def _register(self, registration: Registration, memory: Callable[[], Any]) -> None:
        try:
            await self.ready()
            if registration.place.kind == "xpu":
                raise ConfigurationError("XPU memory cannot be registered; cpu and cuda memory can")
            # A name is never used twice, so that old metadata never means other memory.
            region = await self.agent.register(memory(), name=f"dynamo-{next(self._numbers)}")
        except BaseException:
            self._forget(registration)
            raise
        registration.region = region

    async def registered(self, registration: Registration) -> Registration:
        """Wait until it is registered.

        Raises:
            RegistrationError: no backend takes the memory.
        """
        if registration.region is None:
            assert registration.task is not None
            await asyncio.shield(registration.task)
        return registration

    def unshare_soon(self, registration: Registration) -> None:
        """Count a descriptor less, from any thread; with the last one the registration ends."""
        self._soon(functools.partial(self._unshare, registration))

    def _unshare(self, registration: Registration) -> None:
        registration.users -= 1
        if registration.users == 0 and not registration.withdrawn and not self.closed:
            self.spawn(self.withdraw(registration))

    def _forget(self, registration: Registration) -> None:
        registration.withdrawn = True
        if self.registrations.get(registration.place) is registration:
            del self.registrations[registration.place]

    async def withdraw(self, registration: Registration) -> None:
        """Deregister: return when every peer has confirmed that none of its transfers touches the memory."""
        self._forget(registration)
        if registration.task is not None:
            await asyncio.wait([registration.task])
        if registration.region is not None:
            await registration.region.aclose()
        registration.owner = None

    # What peers are to read or write.

    def encode(self, registrations: Sequence[Registration]) -> str:
        """Return the agent's metadata with these registrations, as it travels in an `RdmaMetadata`."""
        regions = [one.region for one in registrations if one.region is not None]
        names = tuple(region.name for region in regions)
        text = self._encoded.get(names)
        if text is None:
            raw = blobs.write(self.agent.metadata(regions), self._told)
            text = "b64:" + base64.b64encode(zlib.compress(raw, 1)).decode()
            if len(self._encoded) >= ENCODINGS:
                del self._encoded[next(iter(self._encoded))]
            self._encoded[names] = text
        return text

    def metadata(self) -> bytes:
        """Return the agent's metadata with all that is registered."""
        return blobs.write(self.agent.metadata(), self._told)

    def expose(self, registrations: Sequence[Registration], timeout: float | None) -> Exposure:
        """Expect an operation of a peer on memory that is registered; `timeout` is in seconds."""
        exposure = Exposure(f"{OURS}{uuid.uuid4()}".encode(), registrations, self.loop.create_future())
        for registration in registrations:
            registration.exposures += 1
        self.exposures[exposure.key] = exposure
        if timeout is not None:
            error = OperationTimeout(f"no peer completed the operation within {timeout:g} s")
            exposure.timer = self.loop.call_later(timeout, self.fail, exposure, error)
        return exposure

    def _complete(self, exposure: Exposure) -> None:
        if exposure.ending:
            return
        exposure.ending = exposure.complete = True
        self._conceal(exposure)
        exposure.ended.set_result(None)

    def fail(self, exposure: Exposure, error: NixlError | None) -> None:
        """End an exposure without success (`None`: it is given up); it ends when no peer can touch the memory any more."""
        if exposure.ending:
            return
        exposure.ending = True
        exposure.error = error
        self._conceal(exposure)
        self.spawn(self._withdraw_all(exposure))

    def abandon_soon(self, exposure: Exposure) -> None:
        """Give an exposure up, from any thread."""
        self._soon(functools.partial(self.fail, exposure, None))

    def _conceal(self, exposure: Exposure) -> None:
        del self.exposures[exposure.key]
        if exposure.timer is not None:
            exposure.timer.cancel()
        for registration in exposure.registrations:
            registration.exposures -= 1

    async def _withdraw_all(self, exposure: Exposure) -> None:
        try:
            # What another operation exposes too stays: that operation's peers may be at it.
            await asyncio.gather(*(self.withdraw(one) for one in exposure.registrations if not one.exposures))
        except NixlError as error:
            logger.error("connection %s: memory is not withdrawn: %s", self.name, error)
        finally:
            if not exposure.ended.done():
                exposure.ended.set_result(None)

    async def _listen(self) -> None:
        async with self.agent.notifications() as arriving:
            async for notification in arriving:
                self._heard(notification.peer, notification.payload)

    def _heard(self, peer: str, payload: bytes) -> None:
        exposure = self.exposures.get(payload)
        if exposure is not None:
            self._complete(exposure)
        elif payload.startswith(BEGIN):
            exposure = self.exposures.get(payload[len(BEGIN) :])
            if exposure is not None:
                exposure.peer = peer
        elif payload.startswith(FAIL):
            key, _, reason = payload[len(FAIL) :].partition(b" ")
            exposure = self.exposures.get(key)
            if exposure is not None:
                why = reason.decode(errors="replace")
                self.fail(exposure, Aborted(f"peer {peer!r} gave the operation up: {why}", peer=peer))
        else:
            logger.debug("connection %s: a notification of %s is of no operation here: %r", self.name, peer, payload[:100])

    async def _watch(self) -> None:
        async for event in self.agent.membership():
            if event.kind in ("lost", "left"):
                # After what the peer said last, which is yet to be listened to.
                self.loop.call_soon(self._peer_gone, event.peer, event.reason)

    def _peer_gone(self, peer: str, reason: str) -> None:
        for exposure in [one for one in self.exposures.values() if one.peer == peer]:
            self.fail(exposure, PeerLost(f"peer {peer!r} is gone before it completed the operation: {reason}", peer=peer))

    # Peers' memory.

    def peer_now(self, known: Known) -> Peer | None:
        """Return the peer if it is connected."""
        peer = self.agent.peers.get(known.name)
        return peer if peer is not None and peer.connected and peer.incarnation == known.incarnation else None

    async def reach(self, known: Known) -> Peer:
        """Return the peer that wrote the metadata, connecting to it first if need be.

        Raises:
            PeerLost: it cannot be reached, or is no longer the one that wrote it.
        """
        peer = self.peer_now(known)
        if peer is not None:
            return peer
        key = (known.name, known.incarnation)
        task = self._reaching.get(key)
        if task is None:
            task = self._reaching[key] = self.spawn(self.agent.add_peer(known.blob.raw, token=known.blob.token))
            task.add_done_callback(lambda ended: self._reaching.pop(key, None))
        return await asyncio.shield(task)

    def places_now(self, peer: Peer, known: Known, wanted: Sequence[tuple[int, int]]) -> list[Bytes] | None:
        """Return the peer's bytes at these (address, bytes); `None` while it has not told of one of them.

        Raises:
            DescriptorError: the metadata does not have them.
        """
        found = []
        for address, nbytes in wanted:
            start, length, name = known.region_of(address, nbytes)
            region = peer.regions.get(name)
            if region is None or (region.address, region.nbytes) != (start, length):
                return None
            found.append(region[address - start : address - start + nbytes])
        return found

    async def places(self, peer: Peer, known: Known, wanted: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Return the peer's bytes at these (address, bytes), as soon as the peer has told of them.

        Raises:
            NotFoundError: it has withdrawn them.
        """
        events = self.agent.membership()
        if known.stock and self.places_now(peer, known, wanted) is None:
            # A stock agent tells of its memory by metadata alone.
            await self.agent.add_peer(known.blob.raw)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_SECONDS):
                while (found := self.places_now(peer, known, wanted)) is None and not peer.gone:
                    await anext(events)
                if found is not None:
                    return found
        if peer.gone:
            raise PeerLost(peer.gone, peer=peer.name)
        raise NotFoundError(f"peer {peer.name!r} has withdrawn the memory of the operation", peer=peer.name)

    def move(self, ours: list[Bytes], theirs: list[Bytes], *, write: bool, key: bytes) -> Transfer:
        """Start a transfer; when it is complete the peer is notified of `key`."""
        src, dst = (ours, theirs) if write else (theirs, ours)
        one = len(ours) == 1
        return self.agent.submit(src[0] if one else src, dst[0] if one else dst, notify=key)

    def tell(self, peer: str, payload: bytes) -> None:
        """Send a notification about an operation; a peer that is gone needs none."""
        self.spawn(self._tell(peer, payload))

    async def _tell(self, peer: str, payload: bytes) -> None:
        with contextlib.suppress(PeerLost, ClosedError):
            await self.agent.notify(peer, payload)


def _own_address() -> str:
    """Return this host's address on the interface with the default route; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"
