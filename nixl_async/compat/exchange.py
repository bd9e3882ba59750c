"""Metadata: what a drop-in agent knows of others, whole or in parts, and its own, to be given away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nixl_async.compat import blobs
from nixl_async.compat.enums import nixl_mem_t
from nixl_async.compat.errors import (
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlRemoteDisconnectError,
    refusal,
)
from nixl_async.compat.lane import Lane, quiet, vram_on_host
from nixl_async.compat.lists import nixlRegDList, nixlXferDList
from nixl_async.compat.log import get_logger
from nixl_async.compat.places import from_list
from nixl_async.compat.polled import Gate
from nixl_async.compat.ranges import Range, Ranges
from nixl_async.errors import NixlError, PeerLost, ProtocolError
from nixl_async.memory import RemoteRegion
from nixl_async.peers import Peer

T = TypeVar("T")
logger = get_logger(__name__)

LATE_SECONDS = 1.0
"""How long to wait for a region that a peer's metadata names and its connection has not told of yet."""


@dataclass(slots=True, eq=False)
class Remote:
    """A remote agent whose metadata was loaded: what may be used of it is what was in there."""

    name: str
    incarnation: str
    blob: bytes
    peer: Peer
    ranges: Ranges = field(default_factory=Ranges)
    targets: dict[str, Any] = field(default_factory=dict)
    """The process that each of our backends copies to and from, as far as it was asked for."""


class Exchange:
    """The part of an agent that loads and writes metadata."""

    name: str
    lanes: dict[int, Lane]
    remotes: dict[str, Remote]
    requests: dict[int, Any]
    gate: Gate
    _held: dict[str, set[RemoteRegion]]
    """Peers' regions that callers' threads may copy to and from: their owners wait until we let go of them."""
    _token: bytes
    _given_token: bool

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait."""
        raise NotImplementedError

    def remote_lane(self) -> Lane:
        """Return the backend that reaches other agents."""
        raise NotImplementedError

    def metadata(self) -> bytes:
        """Return what other agents need to reach this one and its memory."""
        return self._written(None)

    def partial_metadata(self, descs: nixlRegDList, connections: bool, handles: Sequence[int]) -> bytes:
        """Return the part of the metadata that is about these registrations; with none, what it takes to connect."""
        memory, rows = read_rows(descs)
        if not rows:
            return self._written([])
        lane = self.remote_lane()
        regions = []
        for address, nbytes, device in rows:
            entry = lane.entries.get((memory, device, address, nbytes))
            if entry is None:
                raise refusal(nixlNotFoundError, f"{address:#x}, {nbytes} bytes, of {memory.name} are not registered")
            if entry.region is not None:
                regions.append(entry.region)
        return self._written(regions, connections)

    def _written(self, regions: list[Any] | None, connections: bool = True) -> bytes:
        async def work() -> bytes:
            return self.write_metadata(regions, connections)

        return self.run(work())

    def write_metadata(self, regions: list[Any] | None, connections: bool = True) -> bytes:
        """Return metadata, on the loop: of all registrations, or of `regions`."""
        lanes = [lane for lane in self.lanes.values() if lane.plugin.remote]
        if not lanes:
            raise refusal(
                nixlInvalidParamError, f"agent {self.name!r} has no backend that reaches other agents: it has no metadata"
            )
        blob = lanes[0].agent.metadata(regions)
        return blobs.write(blob, None if self._given_token else self._token, connections=connections)

    def load(self, blob: bytes) -> str:
        """Load another agent's metadata, or a part; return its name."""
        return self.run(self.load_soon(blob))

    async def load_soon(self, blob: bytes) -> str:
        """Load metadata, on the loop."""
        try:
            read = blobs.read(blob)
        except (ProtocolError, UnicodeDecodeError) as error:
            raise refusal(nixlMismatchError, f"this is no agent's metadata: {error}") from error
        if read.name == self.name:
            raise refusal(nixlInvalidParamError, f"the metadata is this agent's own ({self.name!r})")
        lane = self.remote_lane()
        known = self.remotes.get(read.name)
        announced = read.announcement
        if announced is None:
            if known is None:
                raise refusal(nixlNotFoundError, f"descriptors of {read.name!r} came before what it takes to connect to it")
            if known.peer.link is None:
                await lane.agent.add_peer(blobs.with_connections(blob, known.blob))
        else:
            if known is not None and known.incarnation != announced.incarnation:
                raise refusal(
                    nixlNotAllowedError,
                    f"agent {read.name!r} is another one than the one that was loaded; remove that first",
                )
            if known is None or known.peer.gone:
                peer = await self._reach(lane, read)
                known = Remote(read.name, announced.incarnation, blob, peer)
            elif announced.stock:
                await lane.agent.add_peer(blob)
        had = {(one.memory, one.device, one.address, one.nbytes): one for one in known.ranges.all}
        fresh = [place for place in read.places if (nixl_mem_t(place[0]), *place[1:4]) not in had]
        ranges = [*known.ranges.all, *await self._regions(lane, known.peer, fresh)]
        known.ranges = Ranges(ranges)
        if self.remotes.get(read.name) is not known:
            self.remotes[read.name] = known
            self.gate.bump()
        self._hold(read.name, ranges)
        return read.name

    def _hold(self, agent: str, ranges: list[Range]) -> None:
        held = self._held.setdefault(agent, set())
        for one in ranges:
            if one.region not in held and not one.region.withdrawn:
                one.region.hold()
                held.add(one.region)

    async def follow(self, lane: Lane) -> None:
        """Let go of regions whose owners withdraw them, once nobody copies to or from them on a thread of its own."""
        async for event in lane.agent.membership():
            held = self._held.get(event.peer, set())
            gone = {region for region in held if region.withdrawn}
            if gone:
                await quiet(self.gate)
                # Those that were forgotten meanwhile are released.
                gone &= held
                held -= gone
                for region in gone:
                    region.release()

    async def _reach(self, lane: Lane, read: blobs.Blob) -> Peer:
        try:
            return await lane.agent.add_peer(read.raw, token=read.token)
        except PeerLost as error:
            raise refusal(nixlRemoteDisconnectError, f"agent {read.name!r} cannot be reached: {error}") from error

    async def _regions(self, lane: Lane, peer: Peer, places: list[tuple[int, int, int, int, bytes]]) -> list[Range]:
        """Find a peer's regions by where they are; those that its connection has yet to tell of are waited for a moment."""
        wanted = {(address, nbytes): (kind, device) for kind, device, address, nbytes, _ in places}
        found: dict[tuple[int, int], RemoteRegion] = {}
        events = lane.agent.membership()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_SECONDS):
                while True:
                    found.update({(r.address, r.nbytes): r for r in peer.regions.values() if (r.address, r.nbytes) in wanted})
                    if len(found) == len(wanted) or peer.gone:
                        break
                    await anext(events)
        if len(found) < len(wanted):
            logger.warning(
                "agent %s: %d regions in the metadata of %s are there no more", self.name, len(wanted) - len(found), peer.name
            )
        return [
            Range(nixl_mem_t(wanted[place][0]), wanted[place][1], place[0], place[1], region)
            for place, region in found.items()
        ]

    def forget(self, agent: str) -> bool:
        """Forget a remote agent: transfers with it fail. Return whether it was known."""
        return self.run(self.forget_soon(agent))

    async def forget_soon(self, agent: str) -> bool:
        """Forget a remote agent, on the loop.

        The connection stays where both sides are of this library: the other one may use it.
        """
        remote = self.remotes.pop(agent, None)
        if remote is None:
            return False
        await quiet(self.gate)
        held = self._held.pop(agent, set())
        while held:
            held.pop().release()
        for request in list(self.requests.values()):
            if request.remote is remote:
                request.cancel()
        if remote.peer.link is None and not remote.peer.gone:
            with contextlib.suppress(NixlError):
                await self.remote_lane().agent.disconnect(agent)
        return True

    def covers(self, agent: str, descs: nixlXferDList) -> bool:
        """Tell whether a remote agent is known, and, if places are given, whether it has registered them."""
        remote = self.remotes.get(agent)
        if remote is None:
            return False
        if descs.isEmpty():
            return True
        try:
            places = from_list(descs)
        except NixlError:
            return False
        if places.memory is nixl_mem_t.VRAM_SEG and vram_on_host():
            places.memory = nixl_mem_t.DRAM_SEG
        return places.find(remote.ranges) is not None


def read_rows(descs: nixlRegDList) -> tuple[nixl_mem_t, list[tuple[int, int, int]]]:
    """Return the memory's kind, and (address, length, device) of each place."""
    memory = descs.getType()
    if memory is nixl_mem_t.VRAM_SEG and vram_on_host():
        memory = nixl_mem_t.DRAM_SEG
    return memory, [(address, nbytes, device) for address, nbytes, device in descs.rows.tolist()]
