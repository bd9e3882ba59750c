"""A proxy between an HTTP client and its server that breaks the exchanges a test names, and passes on all others.

It speaks plain HTTP/1.1 and keeps one connection to the server for each of the client's, so an exchange without a fault
reaches either side byte for byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeAlias

HOST = "127.0.0.1"
HEAD_BYTES = 1 << 20
PIECE_BYTES = 1 << 18
# How long a closing connection waits for the client to take what was sent, or to stop sending.
LINGER_SECONDS = 2.0
BODILESS = (204, 304)

Match: TypeAlias = Callable[[str, str], bool]
Headers: TypeAlias = list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """A response that does not come from the server. `Content-Length` is added."""

    status: int
    reason: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with one exchange. Everything named happens; offsets count the bytes of the body without chunk headers.

    Instead of asking the server:
        answer: send this. The request's body is read first, unless `early` or unless the client waits for `100 Continue`:
            then the answer comes at once and the connection ends.
        drop: end the connection when the request's head is there, with a FIN ("close") or a RST ("reset").
        reused: wait for a request on a connection that has answered one before; with `drop` this is the server that gives up
            an idle connection just as the next request comes.
    To the request:
        corrupt_request: invert the byte at this offset, if the body has one.
        withhold_continue: keep every `100 Continue` of the server from the client.
    To the response's head:
        latency: hold it back for this many seconds.
        hold: hold it back until what this returns has been awaited; the server has answered when it is called.
        extra_continue: send a `100 Continue` before it.
        connection_close: send `Connection: close` with it, and end the connection after it.
        length_off: declare a body this much longer than it is (the connection ends after it) or shorter (it does not end,
            and the surplus comes ahead of the next response).
        chunked: send the body in chunks of this many bytes.
    To the response's body:
        corrupt_response: invert the byte at this offset, if the body has one.
        bytes_per_second: let it dribble, byte by byte as long as that can be timed.
        reset_after, close_after, half_close_after, stall_after: after this many bytes, or at the body's end if that comes
            first, send a RST, a FIN, a FIN while what the client sends is still taken, or nothing ever again.
    """

    answer: Answer | None = None
    early: bool = False
    drop: Literal["close", "reset"] | None = None
    reused: bool = False
    corrupt_request: int | None = None
    withhold_continue: bool = False
    latency: float = 0.0
    hold: Callable[[], Awaitable[object]] | None = None
    extra_continue: bool = False
    connection_close: bool = False
    length_off: int = 0
    chunked: int = 0
    corrupt_response: int | None = None
    bytes_per_second: float = 0.0
    reset_after: int | None = None
    close_after: int | None = None
    half_close_after: int | None = None
    stall_after: int | None = None

    def __post_init__(self) -> None:
        if len(self._ends()) > 1:
            raise ValueError("a response ends in one way: give one of reset_after, close_after, half_close_after, stall_after")
        if self.chunked and self.length_off:
            raise ValueError("a chunked response declares no length: give chunked or length_off")

    def _ends(self) -> dict[str, int]:
        ends = {
            "reset": self.reset_after,
            "close": self.close_after,
            "half-close": self.half_close_after,
            "stall": self.stall_after,
        }
        return {how: offset for how, offset in ends.items() if offset is not None}


def s3_error(
    status: int,
    code: str,
    message: str = "the test says so",
    *,
    headers: tuple[tuple[str, str], ...] = (),
    early: bool = False,
) -> Fault:
    """Answer as S3 does when it refuses: a status and a short document in XML."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    kind = ("Content-Type", "application/xml")
    return Fault(answer=Answer(status, code, (kind, *headers), body.encode()), early=early)


def slow_down(retry_after: float | str | None = None, *, early: bool = False) -> Fault:
    """Answer 503 SlowDown, with `Retry-After` if it is given."""
    headers = () if retry_after is None else (("Retry-After", f"{retry_after}"),)
    return s3_error(503, "SlowDown", "Please reduce your request rate.", headers=headers, early=early)


def internal_error(*, early: bool = False) -> Fault:
    """Answer 500 InternalError."""
    return s3_error(500, "InternalError", "We encountered an internal error. Please try again.", early=early)


def expired_token(*, early: bool = False) -> Fault:
    """Answer 403 ExpiredToken."""
    return s3_error(403, "ExpiredToken", "The provided token has expired.", early=early)


def redirect(url: str, *, early: bool = False) -> Fault:
    """Answer 307 with `url` as it is."""
    return s3_error(307, "TemporaryRedirect", "Please re-send this request.", headers=(("Location", url),), early=early)


def close_idle(how: Literal["close", "reset"] = "close") -> Fault:
    """End a connection that was kept open, just as its next request comes."""
    return Fault(drop=how, reused=True)


@dataclass(eq=False)
class _Injection:
    fault: Fault
    left: int | None
    match: Match | None


class FaultProxy:
    """Stands between a client that is given `url` and the server at `upstream_host` and `upstream_port`.

    `connections` counts those that clients made, `upstream_connections` those made to the server, `requests` the requests
    that came, `faulted` those with a fault; `seen` has each request's method and path. Nothing of it is left when the
    `async with` block has ended: open connections are reset.
    """

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self.upstream_host, self.upstream_port = upstream_host, upstream_port
        self.port = 0
        self.connections = self.upstream_connections = self.faulted = 0
        self.seen: list[tuple[str, str]] = []
        self._injections: list[_Injection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Return what a client takes for the server's address."""
        return f"http://{HOST}:{self.port}"

    @property
    def requests(self) -> int:
        """Return how many requests came."""
        return len(self.seen)

    @property
    def open_connections(self) -> int:
        """Return how many connections of clients have not ended."""
        return len(self._tasks)

    def inject(self, fault: Fault, times: int | None = 1, match: Match | None = None) -> None:
        """Apply `fault` to the next `times` requests (None: all) whose method and path `match` accepts.

        A request takes the first fault in the queue that fits it, and only that one.
        """
        if times is not None and times < 1:
            raise ValueError(f"times is {times}: it is at least one, or None for all")
        self._injections.append(_Injection(fault, times, match))

    def clear(self) -> None:
        """Forget the faults that no request has taken."""
        self._injections.clear()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, HOST, 0, limit=HEAD_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        server, self._server = self._server, None
        server.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        # What was accepted meanwhile is refused in `_connected`, a step later.
        for _ in range(3):
            await asyncio.sleep(0)
        await server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()
            return
        self.connections += 1
        task = asyncio.create_task(_Connection(self, _Stream(reader, writer)).serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take(self, method: str, path: str, *, reused: bool) -> Fault | None:
        self.seen.append((method, path))
        for injection in self._injections:
            if injection.fault.reused and not reused:
                continue
            if injection.match is None or injection.match(method, path):
                self.faulted += 1
                if injection.left is not None:
                    injection.left -= 1
                    if injection.left <= 0:
                        self._injections.remove(injection)
                return injection.fault
        return None


# Streams.


class _Over(Exception):
    """Ends a connection; the way is in its argument: "close", "linger" or "reset"."""


class _Stream:
    """One side's reader and writer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        # A drained writer has given everything to the kernel: what is sent before a RST depends on it.
        writer.transport.set_write_buffer_limits(0)

    async def send(self, data: bytes | bytearray) -> None:
        if data:
            self.writer.write(data)
        await self.writer.drain()

    async def taken(self) -> None:
        """Wait until the other side's kernel has everything, for a while at most."""
        sock = self.writer.get_extra_info("socket")
        if sock is None:
            # uvloop has none of a connection that is closed.
            return
        with contextlib.suppress(OSError, ValueError):
            for _ in range(int(LINGER_SECONDS * 1000)):
                unsent = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
                if not unsent and not self.writer.transport.get_write_buffer_size():
                    break
                await asyncio.sleep(0.001)

    async def discard(self) -> None:
        """Read until the other side ends."""
        while await self.reader.read(PIECE_BYTES):
            pass

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def closed(self) -> None:
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


# Messages.


@dataclass
class _Head:
    """A request's or response's first line and headers; `raw` is what came."""

    raw: bytes
    first: str
    headers: Headers = field(default_factory=list)

    def get(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key.lower() == name]
        return ", ".join(found) if found else None

    def has(self, name: str, token: str) -> bool:
        return token in [word.strip().lower() for word in (self.get(name) or "").split(",")]

    def set(self, name: str, value: str | None) -> None:
        self.headers = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        if value is not None:
            self.headers.append((name, value))
        self.raw = "\r\n".join([self.first, *(f"{key}: {old}" for key, old in self.headers), "", ""]).encode("latin-1")

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    @property
    def ends(self) -> bool:
        """Tell whether the connection ends after this message."""
        return self.has("connection", "close") or ("HTTP/1.0" in self.first and not self.has("connection", "keep-alive"))


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    pairs = [line.partition(":") for line in lines]
    return _Head(raw, first, [(name.strip(), value.strip()) for name, _, value in pairs])


class _Body:
    """A body as it comes. `length` is None where only the end of the chunks or of the connection tells it."""

    def __init__(self, reader: asyncio.StreamReader | None, length: int | None, *, chunked: bool = False) -> None:
        self.reader, self.length, self.chunked = reader, length, chunked
        self.left = 0 if chunked else length
        self.content = b""
        self.trailers = b""

    @classmethod
    def of_request(cls, head: _Head, reader: asyncio.StreamReader) -> _Body:
        if head.has("transfer-encoding", "chunked"):
            return cls(reader, None, chunked=True)
        return cls(reader, int(head.get("content-length") or 0))

    @classmethod
    def of_response(cls, head: _Head, reader: asyncio.StreamReader, method: str) -> _Body:
        if method == "HEAD" or head.status in BODILESS:
            return cls(None, 0)
        if head.has("transfer-encoding", "chunked"):
            return cls(reader, None, chunked=True)
        length = head.get("content-length")
        return cls(reader, None if length is None else int(length))

    @classmethod
    def of_bytes(cls, content: bytes) -> _Body:
        body = cls(None, len(content))
        body.content = content
        return body

    async def read(self) -> bytearray:
        """Read some of it; nothing is its end."""
        if self.reader is None:
            content, self.content = self.content, b""
            return bytearray(content)
        if self.chunked and self.left == 0 and not self.trailers:
            self.left = int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16)
            if self.left == 0:
                line = b""
                while line != b"\r\n":
                    line = await self.reader.readuntil(b"\r\n")
                    self.trailers += line
        if self.left == 0:
            return bytearray()
        piece = await self.reader.read(PIECE_BYTES if self.left is None else min(self.left, PIECE_BYTES))
        if self.left is not None:
            if not piece:
                raise asyncio.IncompleteReadError(b"", self.left)
            self.left -= len(piece)
            if self.chunked and self.left == 0:
                await self.reader.readexactly(2)
        return bytearray(piece)


def _corrupt(piece: bytearray, start: int, offset: int | None) -> None:
    if offset is not None and start <= offset < start + len(piece):
        piece[offset - start] ^= 0xFF


def _chunk(piece: bytearray) -> bytes | bytearray:
    return b"%x\r\n" % len(piece) + piece + b"\r\n"


# Exchanges.

NO_FAULT = Fault()


class _Connection:
    """A client's connection, and the server's that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: _Stream) -> None:
        self.proxy = proxy
        self.client = client
        self.upstream: _Stream | None = None
        self.answered = 0

    async def serve(self) -> None:
        # A cancelled connection is reset at once: nothing of it waits for its client.
        how = "abort"
        try:
            while True:
                await self._exchange()
                self.answered += 1
        except _Over as over:
            how = str(over)
        except ConnectionError:
            # Whoever reset a connection, the other side finds its own reset.
            how = "reset"
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError, IndexError):
            how = "close"
        finally:
            await self._end(how)

    async def _end(self, how: str) -> None:
        streams = [self.client] if self.upstream is None else [self.client, self.upstream]
        try:
            if how == "linger":
                # Closing with unread bytes is a RST, which could overtake the answer.
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        self.client.writer.write_eof()
                        await self.client.discard()
            if how == "reset":
                await self.client.taken()
        finally:
            if self.upstream is not None:
                self.upstream.writer.transport.abort()
            if how in ("reset", "abort"):
                self.client.reset()
            else:
                self.client.writer.close()
            try:
                for stream in streams:
                    await stream.closed()
            except asyncio.CancelledError:
                # Closing waits for a client that does not take what it was sent.
                for stream in streams:
                    stream.writer.transport.abort()
                raise

    async def _exchange(self) -> None:
        request = await _read_head(self.client.reader)
        method, path, _ = request.first.split(" ", 2)
        fault = self.proxy._take(method, path, reused=self.answered > 0) or NO_FAULT
        body = _Body.of_request(request, self.client.reader)
        if fault.drop is not None:
            raise _Over(fault.drop)
        if fault.answer is not None:
            await self._answer(fault, fault.answer, request, body, method)
        else:
            await self._forward(fault, request, body, method)
        if request.ends:
            raise _Over("close")

    async def _answer(self, fault: Fault, answer: Answer, request: _Head, body: _Body, method: str) -> None:
        early = fault.early or request.has("expect", "100-continue")
        if not early:
            while await body.read():
                pass
        head = _Head(b"", f"HTTP/1.1 {answer.status} {answer.reason}", list(answer.headers))
        head.set("Content-Length", f"{len(answer.body)}")
        if early:
            head.set("Connection", "close")
        await self._respond(fault, head, _Body.of_bytes(b"" if method == "HEAD" else answer.body), bodiless=method == "HEAD")
        if early:
            raise _Over("linger")

    async def _forward(self, fault: Fault, request: _Head, body: _Body, method: str) -> None:
        upstream = await self._upstream_stream()
        upload = asyncio.create_task(self._upload(fault, request, body, upstream))
        try:
            while (head := await _read_head(upstream.reader)).status // 100 == 1:
                if not fault.withhold_continue:
                    await self.client.send(head.raw)
            answer = _Body.of_response(head, upstream.reader, method)
            await self._respond(fault, head, answer, bodiless=answer.reader is None)
            if head.ends:
                # It answered before it had read the request: nobody takes the rest.
                raise _Over("close" if upload.done() else "linger")
            await upload
        finally:
            upload.cancel()
            await asyncio.wait([upload])
            if not upload.cancelled():
                upload.exception()

    async def _upload(self, fault: Fault, request: _Head, body: _Body, upstream: _Stream) -> None:
        try:
            await upstream.send(request.raw)
            start = 0
            while piece := await body.read():
                _corrupt(piece, start, fault.corrupt_request)
                start += len(piece)
                await upstream.send(_chunk(piece) if body.chunked else piece)
            if body.chunked:
                await upstream.send(b"0\r\n" + body.trailers)
        except (asyncio.IncompleteReadError, OSError, ValueError):
            # The client went away in the middle of its body. The server must see that, and whoever waits for its answer.
            upstream.reset()
            raise

    async def _upstream_stream(self) -> _Stream:
        if self.upstream is not None and self.upstream.reader.at_eof():
            self.upstream.writer.close()
            await self.upstream.closed()
            self.upstream = None
        if self.upstream is None:
            host, port = self.proxy.upstream_host, self.proxy.upstream_port
            self.upstream = _Stream(*await asyncio.open_connection(host, port, limit=HEAD_BYTES))
            self.proxy.upstream_connections += 1
        return self.upstream

    async def _respond(self, fault: Fault, head: _Head, body: _Body, *, bodiless: bool) -> None:
        until_eof = not bodiless and body.length is None and not body.chunked
        if fault.latency:
            await asyncio.sleep(fault.latency)
        if fault.hold is not None:
            await fault.hold()
        if fault.extra_continue:
            await self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.connection_close:
            head.set("Connection", "close")
        if fault.length_off:
            await self._declare(head, body, fault.length_off)
        chunked = body.chunked or bool(fault.chunked and not bodiless)
        if chunked and not body.chunked:
            head.set("Content-Length", None)
            head.set("Transfer-Encoding", "chunked")
        await self.client.send(head.raw)
        await self._send_body(fault, body, chunked=chunked)
        if fault.connection_close or until_eof or (fault.length_off > 0 and not bodiless):
            raise _Over("close")

    async def _declare(self, head: _Head, body: _Body, off: int) -> None:
        length = body.length if body.reader is not None or body.content else int(head.get("content-length") or 0)
        if length is None:
            content = bytearray()
            while piece := await body.read():
                content += piece
            body.reader, body.chunked, body.content, length = None, False, bytes(content), len(content)
            head.set("Transfer-Encoding", None)
        head.set("Content-Length", f"{max(0, length + off)}")

    async def _send_body(self, fault: Fault, body: _Body, *, chunked: bool) -> None:
        how, end = next(iter(fault._ends().items()), ("", None))
        start = 0
        while start != end and (piece := await body.read()):
            _corrupt(piece, start, fault.corrupt_response)
            if end is not None:
                del piece[end - start :]
            await self._send_piece(fault, piece, chunked=chunked)
            start += len(piece)
        if end is not None:
            await self._finish(how)
        if chunked:
            await self.client.send(b"0\r\n" + (body.trailers or b"\r\n"))

    async def _send_piece(self, fault: Fault, piece: bytearray, *, chunked: bool) -> None:
        size = fault.chunked or PIECE_BYTES
        for at in range(0, len(piece), size):
            part = piece[at : at + size]
            await self._dribble(_chunk(part) if chunked else part, fault.bytes_per_second)

    async def _dribble(self, data: bytes | bytearray, rate: float) -> None:
        if not rate:
            await self.client.send(data)
            return
        # The loop's clock cannot tell much less than a millisecond: faster ones come in small pieces.
        step = max(1, int(rate / 1000))
        for at in range(0, len(data), step):
            await self.client.send(data[at : at + step])
            await asyncio.sleep(step / rate)

    async def _finish(self, how: str) -> None:
        if how == "half-close":
            self.client.writer.write_eof()
        if how in ("half-close", "stall"):
            await self.client.discard()
            how = "close"
        raise _Over(how)
