"""Metadata as drop-in agents give it to each other: NIXL's own form, which stock agents load, and in it the secret to connect with.

Whoever has an agent's metadata may connect to it, as with NIXL; nobody else can.
"""

from __future__ import annotations

from dataclasses import dataclass

from nixl_async.metadata import Metadata, Section, decode, encode
from nixl_async.peers import Announcement, decode_announcement

TOKEN_RECORD = "NIXL_ASYNC_TOKEN"
_BACKEND = "UCX"


@dataclass(frozen=True, slots=True)
class Blob:
    """Metadata that was received. `announcement` is `None` where it has descriptors only."""

    name: str
    raw: bytes
    announcement: Announcement | None
    token: bytes | None
    places: list[tuple[int, int, int, int, bytes]]
    """Registered memory: kind (NIXL's number), device, address, length, key."""


def write(blob: bytes, token: bytes | None, *, connections: bool = True) -> bytes:
    """Return an agent's metadata with its token in it; without `connections`, its registered memory only."""
    metadata = decode(blob)
    records = dict(metadata.connections) if connections else {}
    if token is not None and connections:
        records[TOKEN_RECORD] = token
    sections = metadata.sections
    if not connections and not sections:
        # Without UCX nothing is written that a stock agent could use; ours know the memory by its address.
        regions = decode_announcement(blob).regions
        sections = [Section(_BACKEND, 0, [(one.address, one.nbytes, one.device, b"") for one in regions])]
    return encode(Metadata(metadata.agent, records, sections))


def read(blob: bytes) -> Blob:
    """Read metadata.

    Raises:
        ProtocolError: it is malformed.
    """
    metadata = decode(blob)
    token = metadata.connections.get(TOKEN_RECORD)
    places = [
        (section.kind, device, address, nbytes, key)
        for section in metadata.sections
        for address, nbytes, device, key in section.entries
        if section.backend == _BACKEND
    ]
    if not metadata.connections:
        return Blob(metadata.agent, blob, None, token, places)
    announcement = decode_announcement(blob)
    if not announcement.stock:
        kinds = {"DRAM": 0, "VRAM": 1}
        places = [(kinds[r.kind.value], r.device, r.address, r.nbytes, b"") for r in announcement.regions]
    return Blob(metadata.agent, blob, announcement, token, places)


def with_connections(part: bytes, whole: bytes) -> bytes:
    """Complete metadata that has descriptors only with the connections of metadata that was loaded before."""
    return encode(Metadata(decode(part).agent, decode(whole).connections, decode(part).sections))
