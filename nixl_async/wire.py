"""The control connection between two agents: frames, handshake, authentication. Pure: bytes in, messages out.

A frame is a u32 little-endian payload length, one type byte, and the payload. The two sides greet each other with HELLO
(name, incarnation, a random nonce), prove that they know the token (HMAC-SHA256 over both greetings, compared in constant
time; RFC 2104), and exchange metadata only after that. The side that connects proves first. A proof holds for one direction of
one connection: both nonces, both names and who connected are in it. Data never travels here; see the backends.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nixl_async.errors import AuthenticationError, ProtocolError
from nixl_async.notifications import MAX_NOTIFICATION_NBYTES

PROTOCOL = "nixl-async/3"
MAX_GREETING_NBYTES = 4096
MAX_FRAME_NBYTES = 256 << 20
MAX_METADATA_NBYTES = 4 << 20
"""The largest METADATA or REGIONS frame: reading one takes a few milliseconds. Many regions travel in many."""
MAX_SMALL_NBYTES = 64 << 10
MAX_CONTEXT_NBYTES = 4096
MAX_NAME_NBYTES = 255
MAX_INCARNATION_NBYTES = 64
Secrets: TypeAlias = Callable[[str], Sequence[bytes]]
"""Returns the secrets shared with the agent of a name: the one to be shown first; every one is taken. None are refused."""
_HEADER = struct.Struct("<IB")


class FrameType(enum.IntEnum):
    """What a frame says."""

    HELLO = 1
    """JSON: protocol, name, incarnation, nonce (hex)."""
    PROOF = 2
    """The sender's HMAC, 32 bytes."""
    METADATA = 3
    """The sender's metadata blob; where its record says `more`, the regions follow in REGIONS frames."""
    REGIONS = 4
    """JSON: regions `added` to the metadata sent before, and its `revision`; or a `piece` of it, perhaps the `last`."""
    WITHDRAW = 5
    """JSON: `id`, `name` of a region that the sender deregisters, `revision`; answered by WITHDRAWN when quiet."""
    WITHDRAWN = 6
    """JSON: `id`; no transfer of the sender touches that region any more."""
    NOTIFY = 7
    """A notification's payload."""
    CREDIT = 8
    """u64: that many bytes of notifications were consumed."""
    LEAVE = 9
    """The sender goes away in an orderly manner; answered by LEFT when the receiver's transfers are quiet."""
    LEFT = 10
    """Nothing of the sender touches the leaving agent's memory any more."""
    REFUSED = 11
    """Text: why the sender closes the connection."""
    SUPERSEDED = 12
    """The two agents dialled each other at once; the sender goes on with the other connection and closes this one."""
    PING = 13
    """Up to eight bytes; answered by a PONG with the same."""
    PONG = 14
    """The sender's program is alive."""
    FENCE = 15
    """JSON: `id`, `backend` and `mark` (hex) of ops that the sender has given up; answered by FENCED."""
    FENCED = 16
    """JSON: `id`; nothing more is written for those ops. Or with `error`: why that is not certain."""
    VERIFY = 17
    """Asks for checksums of byte ranges of the receiver's regions; see `checksums`. Only to who announced that it knows it."""
    VERIFIED = 18
    """Those checksums, or why there are none."""
    LEASE = 20
    """JSON: `id`, `seconds` and `region`, which the receiver alone may use; answered by LEASED."""
    LEASED = 21
    """JSON: `id`; the sender may use that region from when it took the LEASE."""
    RENEW = 22
    """JSON: `number` and `through`: the sender goes on using what it holds of the leases up to that id; answered by RENEWED."""
    RENEWED = 23
    """JSON: `number`; the seconds of those leases count from when the RENEW of that number was sent."""
    REVOKE = 24
    """JSON: `ids` of leases that have ended; answered by a QUIET for each once no transfer of the receiver touches its region."""
    QUIET = 25
    """JSON: `ids`; no transfer of the sender touches those regions any more, and none will."""
    REJOIN = 26
    """JSON: `id` and `number`; before METADATA: the sender had given up the receiver in this life of both, as its loss of that
    number. Answered by FENCED when nothing is written any more that was sent on the connections before."""
    CONTEXT = 27
    """JSON: the trace context (W3C headers) of the NOTIFY frame that follows. Only to who announced that it knows it."""


_MAX_NBYTES = {
    FrameType.HELLO: MAX_GREETING_NBYTES,
    FrameType.PROOF: hashlib.sha256().digest_size,
    FrameType.METADATA: MAX_METADATA_NBYTES,
    FrameType.REGIONS: MAX_METADATA_NBYTES,
    FrameType.NOTIFY: MAX_NOTIFICATION_NBYTES,
    FrameType.CREDIT: 8,
    FrameType.REFUSED: MAX_GREETING_NBYTES,
    FrameType.PING: 8,
    FrameType.PONG: 8,
    FrameType.VERIFY: 256 << 10,
    FrameType.CONTEXT: MAX_CONTEXT_NBYTES,
}
"""The largest payload of each kind of frame; of the others, MAX_SMALL_NBYTES."""


def encode_frame(kind: FrameType, payload: bytes = b"") -> bytes:
    """Return the frame's bytes."""
    return _HEADER.pack(len(payload), kind) + payload


def encode_json(kind: FrameType, value: dict[str, Any]) -> bytes:
    """Return a frame that carries `value` as JSON."""
    return encode_frame(kind, json.dumps(value, separators=(",", ":")).encode())


def decode_json(payload: bytes, **fields: type) -> dict[str, Any]:
    """Return a JSON object that has every one of `fields` with its type.

    Raises:
        ProtocolError: it is no JSON object, or a field is missing or of another type.
    """
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed JSON in a frame: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError(f"a frame holds a {type(value).__name__} where an object was expected")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind) or (kind is int and isinstance(value[name], bool)):
            raise ProtocolError(
                f"a frame's field {name!r} is {repr(value.get(name))[:80]}; it must be of type {kind.__name__}"
            )
    return value


class FrameReader:
    """Cuts a byte stream into frames.

    `limit` is the largest payload accepted of any kind, in bytes: raise it after authentication; each kind has its own besides.
    """

    def __init__(self, limit: int = MAX_GREETING_NBYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[FrameType, bytes]]:
        """Yield the frames that `data` completes.

        Raises:
            ProtocolError: a frame is oversized or of an unknown type; the connection must be closed.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            nbytes, number = _HEADER.unpack_from(self._buffer)
            try:
                kind = FrameType(number)
            except ValueError:
                raise ProtocolError(f"a frame has the unknown type {number}") from None
            limit = min(self.limit, _MAX_NBYTES.get(kind, MAX_SMALL_NBYTES))
            if nbytes > limit:
                raise ProtocolError(f"a {kind.name} frame announces {nbytes} bytes; at most {limit} are accepted here")
            end = _HEADER.size + nbytes
            if len(self._buffer) < end:
                return
            payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
            del self._buffer[:end]
            yield kind, payload


@dataclass(frozen=True, slots=True)
class Greeting:
    """Who an agent says it is: its name, the id of this life of it, and a nonce for the proofs."""

    name: str
    incarnation: str
    nonce: bytes

    @classmethod
    def create(cls, name: str, incarnation: str) -> Greeting:
        """Make a greeting with a fresh nonce."""
        return cls(name, incarnation, secrets.token_bytes(32))

    def encode(self) -> bytes:
        """Return the HELLO frame."""
        return encode_json(
            FrameType.HELLO,
            {"protocol": PROTOCOL, "name": self.name, "incarnation": self.incarnation, "nonce": self.nonce.hex()},
        )

    @classmethod
    def decode(cls, payload: bytes) -> Greeting:
        """Read a HELLO frame's payload.

        Raises:
            ProtocolError: it is malformed or of another protocol version.
        """
        value = decode_json(payload, protocol=str, name=str, incarnation=str, nonce=str)
        if value["protocol"] != PROTOCOL:
            raise ProtocolError(f"the other side speaks {value['protocol']!r}; this library speaks {PROTOCOL!r}")
        name, incarnation = value["name"], value["incarnation"]
        try:
            sizes = len(name.encode()), len(incarnation.encode())
        except UnicodeEncodeError:
            raise ProtocolError("a greeting's name or incarnation is not text") from None
        if not 0 < sizes[0] <= MAX_NAME_NBYTES or not 0 < sizes[1] <= MAX_INCARNATION_NBYTES or "\0" in name + incarnation:
            raise ProtocolError("a greeting's name or incarnation is empty or oversized, or holds a NUL")
        try:
            nonce = bytes.fromhex(value["nonce"])
        except ValueError:
            raise ProtocolError("a greeting's nonce is not hexadecimal") from None
        if len(nonce) != 32:
            raise ProtocolError(f"a greeting's nonce has {len(nonce)} bytes; it must have 32")
        return cls(name, incarnation, nonce)


class Handshake:
    """Both sides' greetings and proofs; `connecting` says which side this is.

    Call `greeted` with the other's HELLO payload, send `proof`, and `verify` the other's; the connecting side proves first.
    `token` is a secret that all share, what returns the secrets for a name, or None where nobody is authenticated.
    """

    def __init__(self, own: Greeting, token: bytes | Secrets | None, *, connecting: bool) -> None:
        self.own = own
        self.other: Greeting | None = None
        self._token = token
        self._connecting = connecting
        self._keys: list[bytes] = []

    def __repr__(self) -> str:
        return f"<Handshake of {self.own.name!r} with {self.other.name if self.other else None!r}>"

    def greeted(self, payload: bytes) -> Greeting:
        """Take the other side's greeting.

        Raises:
            ProtocolError: it is malformed, or reflects our own nonce.
        """
        other = Greeting.decode(payload)
        if hmac.compare_digest(other.nonce, self.own.nonce):
            raise ProtocolError("the other side sent our own greeting back")
        self.other = other
        if self._token is None:
            self._keys = [b"unauthenticated"]
        else:
            secret = (self._token,) if isinstance(self._token, bytes) else self._token(other.name)
            self._keys = [b"token:" + one for one in secret]
        return other

    def proof(self) -> bytes:
        """Return this side's proof of the token.

        Raises:
            AuthenticationError: there is no token for the other side's name.
        """
        assert self.other is not None
        if not self._keys:
            raise AuthenticationError(f"there is no token for {self.other.name!r} here")
        return self._digest(self._keys[0], self._connecting)

    def verify(self, proof: bytes) -> None:
        """Check the other side's proof.

        Raises:
            AuthenticationError: the other side does not know the token. Nothing tells it whether there is one for its name.
        """
        assert self.other is not None
        known = [
            key
            for key in self._keys or [secrets.token_bytes(32)]
            if hmac.compare_digest(proof, self._digest(key, not self._connecting))
        ]
        if not known or not self._keys:
            raise AuthenticationError(f"{self.other.name!r} did not prove that it knows the token; give both agents the same")
        # What the other side showed is what it takes: one of two tokens while they are being changed.
        self._keys = known

    def _digest(self, key: bytes, by_connector: bool) -> bytes:
        assert self.other is not None
        first, second = (self.own, self.other) if self._connecting else (self.other, self.own)
        message = json.dumps(
            [PROTOCOL, by_connector, *((g.name, g.incarnation, g.nonce.hex()) for g in (first, second))], separators=(",", ":")
        )
        return hmac.new(key, message.encode(), hashlib.sha256).digest()
