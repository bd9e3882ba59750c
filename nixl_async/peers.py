"""Peers as values, and the form in which an agent's own metadata travels (the `NIXL_ASYNC` record of NIXL's blob)."""

from __future__ import annotations

import asyncio
import json
import sys
import weakref
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from nixl_async.checksums import available
from nixl_async.descriptors import Descriptor, MemoryKind
from nixl_async.errors import DescriptorError, NotFoundError, ProtocolError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.metadata import Metadata, Section, decode, encode

if TYPE_CHECKING:
    from nixl_async.backend import Backend, PeerInfo
    from nixl_async.link import Link

RegionT = TypeVar("RegionT", bound=RemoteRegion)
RECORD = "NIXL_ASYNC"
NIXL_NAMES = {"ucx": "UCX"}
"""Our backends that a stock NIXL agent shares, with NIXL's names for them."""
PIECE_REGIONS = 64
PIECE_NBYTES = 16 << 10
"""At most so much of the list of regions is read or written at once; a region that is larger goes alone."""
PIECE_PREFIX = b'{"piece":'
LARGE_NBYTES = 128 << 10
"""Metadata above this size is read on a thread."""
_KIND_NUMBERS = {MemoryKind.DRAM: 0, MemoryKind.VRAM: 1}
_LISTED = 20
_AFTER_ALL = chr(sys.maxunicode)


@dataclass(frozen=True, slots=True)
class MembershipEvent:
    """Something that happened to a peer: `kind` is joined, regions, suspect, recovered, lost or left.

    `reason` says why it is suspect, lost or left. A suspect peer is used as before; it recovers, or is lost (see `Liveness`).

    Of an agent in the discovery store, connected or not, `kind` is discovered or withdrawn.
    """

    kind: str
    peer: str
    reason: str = ""


class MembershipEvents:
    """An async iterator over membership events from its creation on; it ends when the agent closes."""

    def __init__(self, listeners: list[asyncio.Queue[MembershipEvent | None]]) -> None:
        queue: asyncio.Queue[MembershipEvent | None] = asyncio.Queue()
        self._queue = queue
        listeners.append(queue)
        finalizer = weakref.finalize(self, _remove, listeners, queue)
        finalizer.atexit = False

    def __aiter__(self) -> MembershipEvents:
        return self

    async def __anext__(self) -> MembershipEvent:
        event = await self._queue.get()
        if event is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return event


def _remove(listeners: list[asyncio.Queue[MembershipEvent | None]], queue: asyncio.Queue[MembershipEvent | None]) -> None:
    if queue in listeners:
        listeners.remove(queue)


@dataclass(slots=True, eq=False)
class Peer:
    """A remote agent, from joining to leaving. A peer that restarts is another `Peer` under the same name.

    `refusals` maps each backend that cannot reach it to the reason, `infos` each remote backend to what it was told of the peer,
    `revision` is the last change of its regions that was heard of.
    """

    name: str
    incarnation: str
    regions: dict[str, RemoteRegion] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    infos: dict[str, PeerInfo] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)
    link: Link | None = None
    gone: str = ""
    checksums: frozenset[str] = frozenset()
    """The checksums that it computes for `verify`."""
    traces: bool = False
    """Whether it takes trace contexts with notifications."""
    revision: int = -1
    _places: list[tuple[int, str]] | None = field(default=None, repr=False)

    @property
    def connected(self) -> bool:
        """Whether the peer can be used."""
        return not self.gone

    @property
    def suspect(self) -> bool:
        """Whether nothing has been heard of it for some time: it may be stopped, stuck, or out of reach."""
        return not self.gone and self.link is not None and self.link.vigil.suspect

    def region(self, name: str) -> RemoteRegion:
        """Return the region that the peer registered as `name`.

        Raises:
            NotFoundError: it has none of that name; the message lists those it has.
        """
        try:
            return self.regions[name]
        except KeyError:
            listed = sorted(self.regions)
            known = ", ".join(listed[:_LISTED]) or "none"
            if len(listed) > _LISTED:
                known += f" and {len(listed) - _LISTED} more"
            raise NotFoundError(f"peer {self.name!r} has no region {name!r}; it has: {known}", peer=self.name) from None

    def at(self, address: int, nbytes: int) -> Descriptor:
        """Describe `nbytes` bytes at the peer's own address, as agents that exchange raw addresses do.

        Raises:
            DescriptorError: no single region of the peer holds them.
        """
        if self._places is None:
            self._places = sorted((region.address, region.name) for region in self.regions.values())
        # Regions may overlap: the one that begins last before the address is the likeliest, not the only one.
        for number in range(bisect_right(self._places, (address, _AFTER_ALL)) - 1, -1, -1):
            region = self.regions[self._places[number][1]]
            if address + nbytes <= region.address + region.nbytes:
                return region[address - region.address : address - region.address + nbytes]
        raise DescriptorError(f"no region of peer {self.name!r} holds the {nbytes} bytes at {address:#x}")

    def add(self, region: RemoteRegion) -> None:
        """Take note of a region, in the place of one of its name."""
        self.take(region.name)
        self.regions[region.name] = region
        if self._places is not None:
            insort(self._places, (region.address, region.name))

    def take(self, name: str) -> RemoteRegion | None:
        """Forget a region, and return it."""
        region = self.regions.pop(name, None)
        if region is not None and self._places is not None:
            del self._places[bisect_left(self._places, (region.address, name))]
        return region

    def __repr__(self) -> str:
        return f"<Peer {self.name!r} {self.gone or ('suspect' if self.suspect else 'connected')}: {len(self.regions)} regions>"


def describe_regions(regions: Iterable[MemoryRegion]) -> list[dict[str, Any]]:
    """Return what peers need to know of `regions`, as JSON values."""
    return [describe_region(region) for region in regions]


def describe_region(region: MemoryRegion | RemoteRegion) -> dict[str, Any]:
    """Return what peers need to know of a region, as JSON values."""
    return {
        "name": region.name,
        "address": region.address,
        "nbytes": region.nbytes,
        "kind": region.kind.value,
        "device": region.device,
        "readonly": region.readonly,
        "keys": {backend: key.hex() for backend, key in region.keys.items()},
    }


def region_record(region: MemoryRegion) -> bytes:
    """Return what peers need to know of a region, as JSON."""
    return json.dumps(describe_region(region), separators=(",", ":")).encode()


def pieces(records: Iterable[bytes]) -> Iterator[bytes]:
    """Yield JSON lists of `records`, each short enough to be read at once; at least one."""
    piece: list[bytes] = []
    nbytes = 0
    for record in records:
        if piece and (len(piece) == PIECE_REGIONS or nbytes + len(record) > PIECE_NBYTES):
            yield b"[%b]" % b",".join(piece)
            piece, nbytes = [], 0
        piece.append(record)
        nbytes += len(record)
    yield b"[%b]" % b",".join(piece)


def read_regions(peer: str, incarnation: str, listed: object) -> list[RemoteRegion]:
    """Read what `describe_regions` wrote.

    Raises:
        ProtocolError: it is malformed.
    """
    if not isinstance(listed, list):
        raise ProtocolError("a peer's regions are not a list")
    return [read_region(peer, incarnation, item, RemoteRegion) for item in listed]


def read_region(peer: str, incarnation: str, item: Any, make: type[RegionT]) -> RegionT:
    """Read one of them, as a region of the class `make`.

    Raises:
        ProtocolError: it is malformed.
    """
    try:
        return make(
            peer,
            incarnation,
            _typed(item["name"], str),
            _typed(item["address"], int),
            _typed(item["nbytes"], int),
            kind=MemoryKind(item["kind"]),
            device=_typed(item["device"], int),
            readonly=_typed(item["readonly"], bool),
            keys={_typed(name, str): bytes.fromhex(key) for name, key in _typed(item["keys"], dict).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"a peer's region is malformed: {error!r}") from None


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Announcement:
    """What an agent says of itself: who it is, where its control connection is served, how its backends are reached."""

    name: str
    incarnation: str
    control: tuple[str, int] | None
    descriptions: Mapping[str, bytes]
    regions: list[RemoteRegion]
    stock: bool = False
    """Whether it comes from a stock NIXL agent."""
    revision: int | None = None
    """How many changes of its regions the agent had told when it was written."""
    more: bool = False
    """Whether the regions follow on the connection that it came by."""
    checksums: frozenset[str] = frozenset()
    traces: bool = False


def encode_announcement(
    name: str,
    incarnation: str,
    control: tuple[str, int] | None,
    backends: Iterable[Backend],
    regions: Iterable[MemoryRegion],
    revision: int = 0,
    *,
    more: bool = False,
    to: tuple[str, str] | None = None,
) -> bytes:
    """Return the agent's metadata blob: NIXL's own form, with our record beside those of the backends NIXL knows.

    The record is JSON: one line, and where there are many regions, each line after it is a list of more. With `more` no region is
    in the blob; they follow on the connection that it is sent by. `to`: the name and incarnation of the peer that alone gets it.
    """
    regions = [] if more else list(regions)
    descriptions = {b.name: b.describe() if to is None else b.describe_to(*to) for b in backends if b.remote}
    record = {
        "version": 1,
        "incarnation": incarnation,
        "control": control,
        "backends": {backend: text.hex() for backend, text in descriptions.items()},
        "revision": revision,
        "checksums": available(),
        "traces": True,
    }
    head = json.dumps(record | ({"more": True} if more else {}), separators=(",", ":")).encode()
    first, *others = pieces(region.record or region_record(region) for region in regions)
    connections = {NIXL_NAMES[b]: text for b, text in descriptions.items() if b in NIXL_NAMES}
    connections[RECORD] = b"\n".join([b'%b,"regions":%b}' % (head[:-1], first), *others])
    sections = []
    for backend in descriptions:
        if backend in NIXL_NAMES:
            for kind, number in _KIND_NUMBERS.items():
                entries = [
                    (r.address, r.nbytes, r.device, r.keys[backend]) for r in regions if r.kind is kind and backend in r.keys
                ]
                if entries:
                    sections.append(Section(NIXL_NAMES[backend], number, entries))
    return encode(Metadata(name, connections, sections))


def decode_announcement(blob: bytes) -> Announcement:
    """Read a metadata blob, of an agent of this library or of a stock NIXL agent.

    Raises:
        ProtocolError: it is malformed.
    """
    metadata = decode(blob)
    text = metadata.connections.get(RECORD)
    if text is None:
        return _decode_stock(metadata)
    try:
        line, *lines = text.split(b"\n")
        record = json.loads(line)
        incarnation = _typed(record["incarnation"], str)
        control = record["control"]
        address = None if control is None else (_typed(control[0], str), _typed(control[1], int))
        descriptions = {_typed(n, str): bytes.fromhex(d) for n, d in _typed(record["backends"], dict).items()}
        revision = record.get("revision")
        if revision is not None:
            check_revision(revision)
        # Agents that compute none do not say so.
        checksums = frozenset(_typed(one, str) for one in _typed(record.get("checksums", []), list))
        regions = read_regions(metadata.agent, incarnation, record["regions"])
        for other in lines:
            regions += read_regions(metadata.agent, incarnation, json.loads(other))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"the {RECORD} record of {metadata.agent!r} is malformed: {error!r}") from None
    more = record.get("more") is True
    return Announcement(
        metadata.agent,
        incarnation,
        address,
        descriptions,
        regions,
        revision=revision,
        more=more,
        checksums=checksums,
        traces=record.get("traces") is True,
    )


async def read_announcement(blob: bytes) -> Announcement:
    """Read a metadata blob as `decode_announcement` does, without holding up the loop."""
    return await asyncio.to_thread(decode_announcement, blob) if len(blob) > LARGE_NBYTES else decode_announcement(blob)


def check_revision(value: object) -> int:
    """Return a revision that a peer has sent.

    Raises:
        ProtocolError: it is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ProtocolError(f"a revision is {repr(value)[:40]}; it must be a number")
    return value


def _decode_stock(metadata: Metadata) -> Announcement:
    ours = {nixl: backend for backend, nixl in NIXL_NAMES.items()}
    descriptions = {ours[name]: text for name, text in metadata.connections.items() if name in ours}
    if not descriptions:
        raise ProtocolError(
            f"the metadata of {metadata.agent!r} names the backends {sorted(metadata.connections)}; one of"
            f" {sorted(ours)} is needed"
        )
    kinds = {number: kind for kind, number in _KIND_NUMBERS.items()}
    # A stock agent has no incarnation; its worker address is as good: it changes when the agent restarts.
    incarnation = b"".join(descriptions.values()).hex()
    regions = []
    for section in metadata.sections:
        kind = kinds.get(section.kind)
        if section.backend not in ours or kind is None:
            continue
        for address, nbytes, device, key in section.entries:
            try:
                regions.append(
                    RemoteRegion(
                        metadata.agent,
                        incarnation,
                        f"{kind.value}:{device}:{address:#x}+{nbytes}",
                        address,
                        nbytes,
                        kind=kind,
                        device=device,
                        keys={ours[section.backend]: key},
                    )
                )
            except DescriptorError as error:
                raise ProtocolError(f"the metadata of {metadata.agent!r} is malformed: {error}") from None
    return Announcement(metadata.agent, incarnation, None, descriptions, regions, stock=True)
