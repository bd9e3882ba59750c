"""Peers as values, and the form in which an agent's own metadata travels (the `NIXL_ASYNC` record of NIXL's blob)."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nixl_async.descriptors import Descriptor, MemoryKind
from nixl_async.errors import DescriptorError, NotFoundError, ProtocolError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.metadata import Metadata, Section, decode, encode

if TYPE_CHECKING:
    from nixl_async.backend import Backend
    from nixl_async.link import Link

RECORD = "NIXL_ASYNC"
NIXL_NAMES = {"ucx": "UCX"}
"""Our backends that a stock NIXL agent shares, with NIXL's names for them."""
_KIND_NUMBERS = {MemoryKind.DRAM: 0, MemoryKind.VRAM: 1}


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

    `refusals` maps each backend that cannot reach it to the reason.
    """

    name: str
    incarnation: str
    regions: dict[str, RemoteRegion] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)
    link: Link | None = None
    gone: str = ""

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
            known = ", ".join(sorted(self.regions)) or "none"
            raise NotFoundError(f"peer {self.name!r} has no region {name!r}; it has: {known}", peer=self.name) from None

    def at(self, address: int, nbytes: int) -> Descriptor:
        """Describe `nbytes` bytes at the peer's own address, as agents that exchange raw addresses do.

        Raises:
            DescriptorError: no single region of the peer holds them.
        """
        for region in self.regions.values():
            if region.address <= address and address + nbytes <= region.address + region.nbytes:
                return region[address - region.address : address - region.address + nbytes]
        raise DescriptorError(f"no region of peer {self.name!r} holds the {nbytes} bytes at {address:#x}")

    def __repr__(self) -> str:
        return f"<Peer {self.name!r} {self.gone or ('suspect' if self.suspect else 'connected')}: {len(self.regions)} regions>"


def describe_regions(regions: Iterable[MemoryRegion]) -> list[dict[str, Any]]:
    """Return what peers need to know of `regions`, as JSON values."""
    return [
        {
            "name": region.name,
            "address": region.address,
            "nbytes": region.nbytes,
            "kind": region.kind.value,
            "device": region.device,
            "readonly": region.readonly,
            "keys": {backend: key.hex() for backend, key in region.keys.items()},
        }
        for region in regions
    ]


def read_regions(peer: str, incarnation: str, listed: object) -> list[RemoteRegion]:
    """Read what `describe_regions` wrote.

    Raises:
        ProtocolError: it is malformed.
    """
    if not isinstance(listed, list):
        raise ProtocolError("a peer's regions are not a list")
    try:
        return [
            RemoteRegion(
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
            for item in listed
        ]
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


def encode_announcement(
    name: str,
    incarnation: str,
    control: tuple[str, int] | None,
    backends: Iterable[Backend],
    regions: Iterable[MemoryRegion],
) -> bytes:
    """Return the agent's metadata blob: NIXL's own form, with our record beside those of the backends NIXL knows."""
    regions = list(regions)
    descriptions = {b.name: b.describe() for b in backends if b.remote}
    record = {
        "version": 1,
        "incarnation": incarnation,
        "control": control,
        "backends": {backend: text.hex() for backend, text in descriptions.items()},
        "regions": describe_regions(regions),
    }
    connections = {NIXL_NAMES[b]: text for b, text in descriptions.items() if b in NIXL_NAMES}
    connections[RECORD] = json.dumps(record, separators=(",", ":")).encode()
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
        record = json.loads(text)
        incarnation = _typed(record["incarnation"], str)
        control = record["control"]
        address = None if control is None else (_typed(control[0], str), _typed(control[1], int))
        descriptions = {_typed(n, str): bytes.fromhex(d) for n, d in _typed(record["backends"], dict).items()}
        listed = record["regions"]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise ProtocolError(f"the {RECORD} record of {metadata.agent!r} is malformed: {error!r}") from None
    return Announcement(metadata.agent, incarnation, address, descriptions, read_regions(metadata.agent, incarnation, listed))


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
