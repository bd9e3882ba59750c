"""NIXL's agent metadata blob, read and written. Pure: bytes in, values out.

Format: nixlSerDes, facts from ai-dynamo/nixl (src/utils/serdes, src/core/nixl_agent.cpp): the text `nixlSerDes|`, then records of a
tag, a u64 little-endian byte count, that many bytes, and `|`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from nixl_async.errors import ProtocolError

MAGIC = b"nixlSerDes|"
MAX_RECORDS = 1 << 20
_U64 = struct.Struct("<Q")
_ENTRY = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class Section:
    """The regions of one memory kind that one backend has: entries of (address, nbytes, device, key)."""

    backend: str
    kind: int
    entries: list[tuple[int, int, int, bytes]]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What an agent publishes: its name, each backend's connection bytes, its regions by backend and kind."""

    agent: str
    connections: dict[str, bytes] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)


def _record(tag: bytes, body: bytes) -> bytes:
    return tag + _U64.pack(len(body)) + body + b"|"


def encode(metadata: Metadata) -> bytes:
    """Return the blob that NIXL's `add_remote_agent` takes."""
    out = [MAGIC, _record(b"Agent", metadata.agent.encode()), _record(b"Conns", _U64.pack(len(metadata.connections)))]
    for name, connection in metadata.connections.items():
        out += [_record(b"t", name.encode()), _record(b"c", connection)]
    out += [_record(b"", b"MemSection"), _record(b"nixlSecElms", _U64.pack(len(metadata.sections)))]
    for section in metadata.sections:
        out += [
            _record(b"bknd", section.backend.encode()),
            _record(b"nixlDList", b"nixlSDList"),
            _record(b"t", struct.pack("<I", section.kind)),
            _record(b"n", _U64.pack(len(section.entries))),
        ]
        out += [_record(b"", _ENTRY.pack(*entry[:3]) + entry[3]) for entry in section.entries]
    return b"".join(out)


class _Reader:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        if not blob.startswith(MAGIC):
            raise ProtocolError("malformed metadata: it does not begin with nixlSerDes")
        self.at = len(MAGIC)

    def record(self, tag: bytes) -> bytes:
        start = self.at + len(tag) + _U64.size
        if self.blob[self.at : self.at + len(tag)] != tag or start > len(self.blob):
            raise ProtocolError(f"malformed metadata: no record {tag.decode()!r} at byte {self.at}")
        (nbytes,) = _U64.unpack_from(self.blob, self.at + len(tag))
        end = start + nbytes
        if end >= len(self.blob) or self.blob[end : end + 1] != b"|":
            raise ProtocolError(f"malformed metadata: record {tag.decode()!r} at byte {self.at} is cut short")
        self.at = end + 1
        return self.blob[start:end]

    def number(self, tag: bytes) -> int:
        body = self.record(tag)
        if len(body) not in (4, 8):
            raise ProtocolError(f"malformed metadata: record {tag.decode()!r} has {len(body)} bytes; it must be a number")
        value = int.from_bytes(body, "little")
        if value > MAX_RECORDS:
            raise ProtocolError(f"malformed metadata: record {tag.decode()!r} is {value}; at most {MAX_RECORDS} are read")
        return value

    def text(self, tag: bytes) -> str:
        try:
            return self.record(tag).decode()
        except UnicodeDecodeError:
            raise ProtocolError(f"malformed metadata: record {tag.decode()!r} is not UTF-8") from None

    def word(self, tag: bytes, wanted: bytes) -> None:
        if self.record(tag) != wanted:
            raise ProtocolError(f"malformed metadata: {wanted.decode()!r} is missing before byte {self.at}")


def decode(blob: bytes) -> Metadata:
    """Read a blob.

    Raises:
        ProtocolError: it is malformed or truncated.
    """
    reader = _Reader(bytes(blob))
    agent = reader.text(b"Agent")
    connections = {}
    for _ in range(reader.number(b"Conns")):
        name = reader.text(b"t")
        connections[name] = reader.record(b"c")
    reader.word(b"", b"MemSection")
    sections = []
    for _ in range(reader.number(b"nixlSecElms")):
        backend = reader.text(b"bknd")
        reader.word(b"nixlDList", b"nixlSDList")
        kind = reader.number(b"t")
        entries = []
        for _ in range(reader.number(b"n")):
            body = reader.record(b"")
            if len(body) < _ENTRY.size:
                raise ProtocolError(f"malformed metadata: a region has {len(body)} bytes; it must have at least {_ENTRY.size}")
            address, nbytes, device = _ENTRY.unpack_from(body)
            entries.append((address, nbytes, device, body[_ENTRY.size :]))
        sections.append(Section(backend, kind, entries))
    if not agent or reader.at != len(reader.blob):
        raise ProtocolError("malformed metadata: it has no agent name, or bytes follow its end")
    return Metadata(agent, connections, sections)


def encode_notification(sender: str, payload: bytes) -> bytes:
    """Return a notification as NIXL's UCX backend sends it (src/plugins/ucx/ucx_backend.cpp): the records `name` and `msg`."""
    return MAGIC + _record(b"name", sender.encode()) + _record(b"msg", payload)


def decode_notification(message: bytes) -> tuple[str, bytes]:
    """Read a notification; return its sender and payload.

    Raises:
        ProtocolError: it is malformed or truncated.
    """
    reader = _Reader(message)
    sender, payload = reader.text(b"name"), reader.record(b"msg")
    if not sender or reader.at != len(message):
        raise ProtocolError("malformed notification: it has no sender, or bytes follow its end")
    return sender, payload
