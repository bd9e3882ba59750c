"""One connection: sends a request and receives its response straight into memory.

It reads and writes its non-blocking socket itself when the loop says it is ready. So a page list is one gathering or scattering
system call, TLS decrypts into the caller's memory, and closing the socket is all it takes to know that nothing moves any more.
What is most common, a GET without TLS, is left to the pool's `Engine`, and taken over where the response is an unusual one.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

from nixl_async.http.messages import (
    MAX_HEAD_NBYTES,
    MAX_KEPT_NBYTES,
    ChunkReader,
    Head,
    HTTPError,
    Request,
    Response,
    parse_head,
)

if TYPE_CHECKING:
    from nixl_async.http.engine import Engine
    from nixl_async.http.pool import Pool

STEP_NBYTES = 1 << 20
"""How much one system call moves at most: about a tenth of a millisecond of the loop's time."""
MAX_BUFFERS = 64
PROGRESS_NBYTES = 4096
"""Bytes that count as a sign of life: a server that sends fewer in `read_timeout` is as good as silent."""
_AGAIN = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """A connected socket of `pool`; `used` tells whether it has answered a request already.

    `slot` is its place in the engine, -1 while it reads and writes by itself.
    """

    __slots__ = (
        "_broken",
        "_chunks",
        "_engine",
        "_fd",
        "_got",
        "_head",
        "_kept",
        "_moved",
        "_out",
        "_out_at",
        "_pending",
        "_sink_at",
        "_sink_index",
        "_socket",
        "_started",
        "_stream",
        "_tls",
        "_writing",
        "active_at",
        "closed",
        "pool",
        "request",
        "slot",
        "used",
    )

    def __init__(self, pool: Pool, connected: socket.socket, engine: Engine | None = None) -> None:
        self.pool = pool
        self.closed = False
        self.used = False
        self.request: Request | None = None
        self.active_at = self._started = 0.0
        self._socket = connected
        self._tls = isinstance(connected, ssl.SSLSocket)
        self._fd = connected.fileno()
        self._engine = engine
        self.slot = -1
        self._out: list[memoryview | bytes] = []
        self._out_at = 0
        self._writing = False
        self._broken = False
        self._moved = 0
        self._reset()
        pool.loop.add_reader(self._fd, self._readable)

    def _reset(self) -> None:
        self._head: Head | None = None
        self._pending = b""
        self._chunks: ChunkReader | None = None
        self._kept: bytearray | None = None
        self._stream = False
        self._got = 0
        self._sink_index = self._sink_at = 0

    def start(self, request: Request) -> None:
        """Send a request; the connection must be idle."""
        self.request = request
        request.connection = self
        self.active_at = self._started = self.pool.loop.time()
        self._moved = 0
        if request.sink_nbytes and not request.body and request.method == "GET" and self._enter_engine():
            assert self._engine is not None
            if not self._engine.get(self.slot, request):
                self.take_over()
            return
        self._leave_engine()
        request.make_sink()
        self._out = [request.head, *request.body]
        self._out_at = 0
        self._write()

    def _enter_engine(self) -> bool:
        if self.slot < 0 and self._engine is not None:
            self.slot = self._engine.adopt(self, self._fd)
            if self.slot >= 0:
                self.pool.loop.remove_reader(self._fd)
        return self.slot >= 0

    def _leave_engine(self) -> None:
        if self.slot >= 0 and self._engine is not None:
            self._engine.release(self.slot)
            self.slot = -1
            self.pool.loop.add_reader(self._fd, self._readable)

    def arrived(self, status: int, span: tuple[int, int, int], waited: float) -> None:
        """The engine has put a response in its place."""
        request, self.request = self.request, None
        assert request is not None
        assert self._engine is not None
        self.pool.answered(waited)
        self.used = True
        request.connection = None
        if request.receiver is not None:
            receiver, request.receiver = request.receiver, None
            receiver.arrived(request, status, span)
        else:
            head = parse_head(self._engine.head_of(self.slot), request.method)
            request.answer(Response(status, head.headers, sunk=True))
        self.pool.finished(self, request, pump=False)

    def take_over(self) -> None:
        """Go on from where the engine has stopped."""
        request, engine = self.request, self._engine
        assert request is not None
        assert engine is not None
        done = engine.progress(self.slot)
        self._leave_engine()
        self.active_at = self.pool.loop.time() - done.silence
        request.make_sink()
        self._out = [request.head] if done.sent < len(request.head) else []
        self._out_at = done.sent
        try:
            if done.head_nbytes:
                self._head = parse_head(done.kept[: done.head_nbytes - 4], request.method)
                self._advance(request, done.got)
            elif done.kept:
                self.pool.scratch[: len(done.kept)] = done.kept
                self._take(request, len(done.kept))
        except HTTPError as error:
            self._fail(error)
            return
        if done.error and self.request is request:
            self._lost(f"the connection broke: {OSError(done.error, os.strerror(done.error))}")
        elif self._out:
            self._write()

    def silence(self, now: float) -> float:
        """Return for how many seconds the server has sent and taken nothing."""
        if self.slot >= 0 and self.request is not None and self._engine is not None:
            return self._engine.progress(self.slot).silence
        return now - self.active_at

    def close(self) -> None:
        """Close at once: from here on nothing is read into memory or sent from it."""
        if self.closed:
            return
        self.closed = True
        if self.slot >= 0 and self._engine is not None:
            self._engine.release(self.slot)
            self.slot = -1
        else:
            self.pool.loop.remove_reader(self._fd)
        if self._writing:
            self.pool.loop.remove_writer(self._fd)
        self._out = []
        self._socket.close()

    def abort(self) -> None:
        """Close, and let the kernel forget what it has not sent yet."""
        if not self.closed:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    # Sending.

    def _write(self) -> None:
        if self.closed:
            return
        started = self.pool.may_work()
        if started:
            try:
                self._send()
            except _AGAIN:
                pass
            except OSError as error:
                # The server may have answered before it hung up.
                self._out = []
                self._broken = True
                if not isinstance(error, BrokenPipeError | ConnectionResetError):
                    self._fail(HTTPError(f"sending failed: {error}"))
            self.pool.worked(started)
        if self._out and not self._writing:
            self._writing = True
            self.pool.loop.add_writer(self._fd, self._write)
        elif not self._out:
            self._stop_writing()

    def _send(self) -> None:
        out, sent = self._out, 0
        while out and sent < STEP_NBYTES:
            # TLS wants one buffer at a time.
            if self._tls or len(out) == 1:
                n = self._socket.send(memoryview(out[0])[self._out_at : self._out_at + STEP_NBYTES])
            else:
                n = self._socket.sendmsg([memoryview(out[0])[self._out_at :], *out[1:MAX_BUFFERS]])
            sent += n
            self._progress(n)
            n += self._out_at
            done = 0
            while done < len(out) and n >= len(out[done]):
                n -= len(out[done])
                done += 1
            del out[:done]
            self._out_at = n

    def _progress(self, n: int) -> None:
        self._moved += n
        if self._moved >= PROGRESS_NBYTES:
            self._moved = 0
            self.active_at = self.pool.loop.time()

    def _stop_writing(self) -> None:
        if self._writing and not self.closed:
            self.pool.loop.remove_writer(self._fd)
        self._writing = False

    # Receiving.

    def _readable(self) -> None:
        pool = self.pool
        if self.closed:
            return
        started = pool.may_work()
        if started:
            try:
                while self._read() and self._tls and not self.closed and pool.may_go_on(started):
                    pass
            except _AGAIN:
                pass
            except HTTPError as error:
                self._fail(error)
            except OSError as error:
                self._lost(f"the connection broke: {error}")
            pool.worked(started)
        # What TLS has decrypted already does not make the socket readable again.
        if self._tls and not self.closed and self._socket.pending():  # type: ignore[attr-defined]
            pool.loop.call_soon(self._readable)

    def _read(self) -> bool:
        request = self.request
        if request is None:
            # TLS tickets may come on an idle connection; else the server closes it, or says what nobody asked.
            if self._tls:
                self._socket.recv_into(self.pool.scratch[:1])
            self.drop()
            return False
        if self._head is not None and self._kept is None and self._chunks is None and not self._stream:
            n = self._read_into_sink(request)
        else:
            scratch = self.pool.scratch
            small = self._head is None and request.sink_nbytes > len(scratch)
            n = self._socket.recv_into(scratch[: 16 << 10] if small else scratch)
            if n:
                self._take(request, n)
        if n == 0:
            self._ended(request)
            return False
        self._progress(n)
        return True

    def _read_into_sink(self, request: Request) -> int:
        sink, index = request.sink, self._sink_index
        first = sink[index][self._sink_at :]
        if len(first) >= 64 << 10 or index + 1 == len(sink) or self._tls:
            n = self._socket.recv_into(first[:STEP_NBYTES])
        else:
            n, *_ = self._socket.recvmsg_into([first, *sink[index + 1 : index + MAX_BUFFERS]])
        self._advance(request, n)
        return n

    def _advance(self, request: Request, n: int) -> None:
        self._got += n
        n += self._sink_at
        sink, index = request.sink, self._sink_index
        while index < len(sink) and n >= len(sink[index]):
            n -= len(sink[index])
            index += 1
        self._sink_index, self._sink_at = index, n
        head = self._head
        if head is not None and head.nbytes is not None and self._got == head.nbytes:
            self._complete(request, sunk=True)

    def _copy_into_sink(self, request: Request, data: memoryview) -> None:
        at = 0
        while at < len(data):
            if self._sink_index == len(request.sink):
                raise HTTPError(f"the response has more than the {request.sink_nbytes} bytes that were asked for")
            room = request.sink[self._sink_index][self._sink_at :]
            n = min(len(room), len(data) - at)
            room[:n] = data[at : at + n]
            at += n
            self._got += n
            self._sink_at += n
            if self._sink_at == len(request.sink[self._sink_index]):
                self._sink_index += 1
                self._sink_at = 0

    def _take(self, request: Request, n: int) -> None:
        """Take what has been received into the scratch memory."""
        scratch, at = self.pool.scratch, 0
        while self._head is None:
            kept = len(self._pending)
            if kept:
                data: bytes | bytearray = self._pending + scratch[at : min(n, at + MAX_HEAD_NBYTES)]
                end = data.find(b"\r\n\r\n", max(0, kept - 3))
                raw = data[:end]
            else:
                end = self.pool.scratch_bytes.find(b"\r\n\r\n", at, n)
                data = raw = bytes(scratch[at : n if end < 0 else end])
            if end < 0 or len(raw) > MAX_HEAD_NBYTES:
                if len(data) >= MAX_HEAD_NBYTES:
                    raise HTTPError("the response's head is too long")
                self._pending = bytes(data)
                return
            head = parse_head(raw, request.method)
            at += len(raw) + 4 - kept
            self._pending = b""
            # 100 Continue and other words before the answer.
            if head.status >= 200:
                self._begin(request, head)
                break
            if at == n:
                return
        self._take_body(request, scratch[at:n])

    def _begin(self, request: Request, head: Head) -> None:
        self._head = head
        if not request.body:
            self.pool.answered(self.pool.loop.time() - self._started)
        if self._out and head.status < 300:
            raise HTTPError(f"the server said {head.status} before it had the request")
        if head.chunked:
            self._chunks = ChunkReader()
        if not request.sink or not 200 <= head.status < 300:
            self._kept = bytearray()
        elif head.nbytes is not None and head.nbytes != request.sink_nbytes:
            # Nothing of a wrong body is let into memory.
            response = Response(head.status, head.headers)
            self._finish(request, response, reuse=False)
        elif head.nbytes is None and not head.chunked:
            self._stream = True

    def _take_body(self, request: Request, data: memoryview) -> None:
        head = self._head
        if head is None or self.request is not request:
            return
        if head.nbytes is not None and self._got + len(data) > head.nbytes:
            raise HTTPError("the response is longer than its Content-Length")
        pieces = self._chunks.feed(data) if self._chunks is not None else [data]
        for piece in pieces:
            if self._kept is None:
                self._copy_into_sink(request, piece)
            else:
                self._got += len(piece)
                if self._got > MAX_KEPT_NBYTES:
                    raise HTTPError(f"the answer {head.status} has more than {MAX_KEPT_NBYTES} bytes that nobody asked for")
                self._kept += piece
        if (self._chunks is not None and self._chunks.done) or (head.nbytes is not None and self._got == head.nbytes):
            self._complete(request, sunk=self._kept is None)

    def _ended(self, request: Request) -> None:
        """The server has closed its side."""
        head = self._head
        if head is not None and head.nbytes is None and self._chunks is None:
            self._complete(request, sunk=self._kept is None)
        else:
            what = "before the response" if head is None else f"after {self._got} bytes of the response"
            self._lost(f"the server closed the connection {what}")

    def _complete(self, request: Request, *, sunk: bool) -> None:
        head = self._head
        assert head is not None
        if sunk and self._got != request.sink_nbytes:
            self._fail(HTTPError(f"the response has {self._got} bytes, not the {request.sink_nbytes} that were asked for"))
            return
        response = Response(head.status, head.headers, bytes(self._kept or b""), sunk)
        # A response that comes before the request is sent ends the connection: nobody wants the rest.
        self._finish(request, response, reuse=head.keep_alive and not self._out and not self._broken)

    def _finish(self, request: Request, response: Response, *, reuse: bool) -> None:
        self.request = None
        request.connection = None
        self.used = True
        self._reset()
        if not reuse:
            self.close()
        request.answer(response)
        self.pool.finished(self, request)

    def _lost(self, what: str) -> None:
        """The connection is gone."""
        request = self.request
        if request is None:
            self.drop()
        elif self.used and self._head is None and not self._pending:
            # The server closed an idle connection just as it was used: RFC 9112 §9.3.1 lets us send again. That ends: a
            # connection that has answered nothing is no such one.
            self.request = None
            self.close()
            self.pool.resend(self, request)
        else:
            self._fail(HTTPError(what))

    def drop(self) -> None:
        """End an idle connection."""
        self.pool.dropped(self)
        self.close()

    def _fail(self, error: HTTPError) -> None:
        request, self.request = self.request, None
        if request is None:
            self.drop()
            return
        self.close()
        request.connection = None
        request.answer(error)
        self.pool.finished(self, request)

    def expire(self, seconds: float) -> None:
        """Give up on a server that has been silent for `seconds`."""
        self._fail(HTTPError(f"the server was silent for {seconds:g} s: timed out"))


async def connect(
    loop: asyncio.AbstractEventLoop, host: str, port: int, context: ssl.SSLContext | None, server_name: str, patience: float
) -> socket.socket:
    """Connect to the first address that answers; complete the TLS handshake. Each but the last address gets `patience` seconds.

    Raises:
        OSError: none answers, or the certificate is wrong.
    """
    failed: OSError | None = None
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(patience if number + 1 < len(found) else None):
                await loop.sock_connect(sock, address)
            if context is None:
                return sock
            return await _handshake(
                loop, context.wrap_socket(sock, server_hostname=server_name, do_handshake_on_connect=False)
            )
        except OSError as error:
            failed = error
            sock.close()
        except BaseException:
            sock.close()
            raise
    raise failed or OSError(f"{host} has no address")


async def _handshake(loop: asyncio.AbstractEventLoop, sock: ssl.SSLSocket) -> ssl.SSLSocket:
    try:
        while True:
            ready = loop.create_future()
            fd = sock.fileno()
            try:
                sock.do_handshake()
                return sock
            except ssl.SSLWantReadError:
                loop.add_reader(fd, _wake, ready)
                try:
                    await ready
                finally:
                    loop.remove_reader(fd)
            except ssl.SSLWantWriteError:
                loop.add_writer(fd, _wake, ready)
                try:
                    await ready
                finally:
                    loop.remove_writer(fd)
    except BaseException:
        sock.close()
        raise


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
