"""Requests, responses, and how a response's head and chunks are read. Pure: no sockets, no loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from nixl_async.native import ffi

if TYPE_CHECKING:
    from nixl_async.http.connection import Connection

MAX_HEAD_NBYTES = 64 << 10
MAX_KEPT_NBYTES = 1 << 20
"""How much of a body that has no place in memory (an error's) is kept."""
MAX_NUMBER = 15
"""Digits of a length: more are no length, and Python would take time to read them."""
LINE_NBYTES = 256


class HTTPError(Exception):
    """A request that got no usable response; `retryable` says whether sending it again makes sense."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class DamagedError(HTTPError):
    """A response whose bytes are not those that their checksum stands for."""


class Receiver(Protocol):
    """Takes the responses of many requests, one call for each; it is called by the pool and must not call it back."""

    def arrived(self, request: Request, status: int, span: tuple[int, int, int]) -> None:
        """The body is in its place: a 200 or 206. `span` is what Content-Range tells: first, last, total; -1: nothing."""

    def ended(self, request: Request, outcome: Response | HTTPError) -> None:
        """The response is another, or came another way, or there is none."""


@dataclass(slots=True, eq=False)
class Request:
    """What is asked: `head` is everything up to the empty line, inclusive; `body` follows it.

    `sink` is where the body of a successful response goes; its bytes must be as many as the response has. `place` may stand for
    it: C arrays of addresses and of lengths, and how many there are. The response goes to `receiver`, if there is one.
    """

    method: str
    head: bytes
    body: Sequence[memoryview] = ()
    sink: Sequence[memoryview] = ()
    sink_nbytes: int = 0
    body_nbytes: int = 0
    future: asyncio.Future[Response] | None = None
    connection: Connection | None = None
    resent: bool = False
    place: tuple[Any, Any, int] | None = None
    receiver: Receiver | None = None

    @property
    def over(self) -> bool:
        """Whether nobody waits for a response."""
        return self.receiver is None and (self.future is None or self.future.done())

    def answer(self, outcome: Response | HTTPError) -> None:
        """Tell whoever waits."""
        if self.receiver is not None:
            receiver, self.receiver = self.receiver, None
            receiver.ended(self, outcome)
        elif self.future is not None and not self.future.done():
            if isinstance(outcome, HTTPError):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)

    def locate(self) -> tuple[Any, Any, int]:
        """Return where the body goes, as `place`; memory that cannot be written to is refused with an exception."""
        if self.place is None:
            pieces = [ffi.from_buffer("char[]", piece, require_writable=True) for piece in self.sink if len(piece)]
            addresses = ffi.new("int64_t[]", [int(ffi.cast("intptr_t", piece)) for piece in pieces])
            self.place = (addresses, ffi.new("int64_t[]", [len(piece) for piece in pieces]), len(pieces))
        return self.place

    def make_sink(self) -> None:
        """Make views of `place`, where there is no `sink` yet."""
        if not self.sink and self.place is not None:
            addresses, lengths, n = self.place
            self.sink = [view(addresses[i], lengths[i]) for i in range(n) if lengths[i]]

    @property
    def nbytes(self) -> int:
        """The bytes it moves, both ways."""
        return self.sink_nbytes + self.body_nbytes


@dataclass(slots=True, eq=False)
class Response:
    """What was answered. `headers` has lower-case names; `body` what did not go into the request's sink, in bytes."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    sunk: bool = False
    """Whether the body went into the sink, whole."""


@dataclass(slots=True)
class Head:
    """A response's status line and headers, and what they say about its body."""

    status: int
    headers: dict[str, str]
    keep_alive: bool
    nbytes: int | None = None
    """The body's length; `None` if the end of the connection ends it, or if it is chunked."""
    chunked: bool = False


def parse_head(data: bytes | bytearray, method: str) -> Head:
    """Read a head, without the empty line (RFC 9112 §4, §5, §6.3).

    Raises:
        HTTPError: it is malformed, or its body comes in a form that nobody asked for.
    """
    first, *lines = data.decode("latin-1").split("\r\n")
    version, code = first[:9], first[9:12]
    if version not in ("HTTP/1.1 ", "HTTP/1.0 ") or len(code) != 3 or not code.isdecimal() or first[12:13] not in ("", " "):
        raise HTTPError(f"no HTTP response: {first[:80]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name[-1] in " \t" or name[0] in " \t":
            raise HTTPError(f"malformed header {line[:80]!r}")
        name = name.lower()
        value = value.strip(" \t")
        if name in headers:
            if name == "content-length":
                if headers[name] != value:
                    raise HTTPError(f"two Content-Lengths, {headers[name][:20]!r} and {value[:20]!r}")
                continue
            value = f"{headers[name]}, {value}"
        headers[name] = value
    status = int(code)
    if status < 100 or status == 101:
        raise HTTPError(f"no HTTP response that was asked for: {first[:80]!r}")
    connection = headers.get("connection", "").lower()
    head = Head(status, headers, "close" not in connection and (version == "HTTP/1.1 " or "keep-alive" in connection))
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if method == "HEAD" or status in (204, 304) or status < 200:
        head.nbytes = 0
    elif coding is not None:
        if coding.lower() != "chunked":
            raise HTTPError(f"Transfer-Encoding is {coding[:40]!r}; only chunked is known", retryable=False)
        head.chunked = True
        if length is not None:
            # RFC 9112 §6.3: whoever sends both may be two servers that disagree about where a response ends.
            head.keep_alive = False
    elif length is not None:
        if not length.isdecimal() or len(length) > MAX_NUMBER:
            raise HTTPError(f"Content-Length is {length[:40]!r}")
        head.nbytes = int(length)
    else:
        head.keep_alive = False
    return head


@dataclass(slots=True)
class ChunkReader:
    """Takes a chunked body apart (RFC 9112 §7.1): `feed` returns the payload in a piece of the stream."""

    left: int = 0
    done: bool = False
    _line: bytearray = field(default_factory=bytearray)
    _state: str = "size"
    _trailer_nbytes: int = 0

    def feed(self, data: memoryview) -> list[memoryview]:
        """Return the pieces of payload in `data`.

        Raises:
            HTTPError: it is no chunked body, or goes on behind its end.
        """
        found = []
        at = 0
        while at < len(data):
            if self.done:
                raise HTTPError("bytes behind the last chunk")
            if self._state == "data":
                n = min(self.left, len(data) - at)
                found.append(data[at : at + n])
                at += n
                self.left -= n
                if self.left == 0:
                    self._state = "end"
                continue
            # Lines are short: most are found in a small copy.
            piece = bytes(data[at : at + LINE_NBYTES])
            stop = piece.find(b"\n")
            self._line += piece if stop < 0 else piece[:stop]
            at += len(piece) if stop < 0 else stop + 1
            if len(self._line) > MAX_HEAD_NBYTES:
                raise HTTPError("a chunk's head is too long")
            if stop >= 0:
                line = bytes(self._line).removesuffix(b"\r")
                self._line.clear()
                self._take_line(line)
        return found

    def _take_line(self, line: bytes) -> None:
        if self._state == "end":
            if line:
                raise HTTPError("a chunk is longer than it says")
            self._state = "size"
        elif self._state == "size":
            size = line.partition(b";")[0].rstrip(b" \t")
            if not size or len(size) > MAX_NUMBER or size.strip(b"0123456789abcdefABCDEF"):
                raise HTTPError(f"a chunk's size is {size[:20]!r}")
            self.left = int(size, 16)
            self._state = "data" if self.left else "trailer"
        elif line:
            self._trailer_nbytes += len(line)
            if self._trailer_nbytes > MAX_HEAD_NBYTES:
                raise HTTPError("the trailers are too long")
        else:
            self.done = True


def view(address: int, nbytes: int) -> memoryview:
    """Return the memory at an address; whoever holds the region keeps it alive."""
    return memoryview(ffi.buffer(ffi.cast("char *", address), nbytes))
