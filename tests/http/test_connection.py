"""One connection against servers that are scripted byte by byte."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nixl_async.http import HTTPError, Pool, PoolOptions, Request, Response
from nixl_async.http.connection import connect
from nixl_async.http.messages import MAX_HEAD_NBYTES, MAX_KEPT_NBYTES
from nixl_async.testing.patterns import pattern
from tests.loops import every_loop
from tests.sockets import HOST, Handler, certificate, listening

BODY = pattern(200_000).tobytes()
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def pool_of(handler: Handler, context: Any = None, trusted: str = "", **options: Any) -> AsyncIterator[Pool]:
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(listening(handler, context))
        client = ssl.create_default_context(cafile=trusted) if trusted else None
        pool = Pool(PoolOptions(HOST, port, client, HOST, **options), asyncio.get_running_loop())
        stack.push_async_callback(pool.aclose)
        yield pool


def answering(*pieces: bytes, close: bool = True, times: int = 1) -> Handler:
    """Answer each request with these pieces, each of which arrives by itself."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if len(pieces) > 1:
                    await asyncio.sleep(0)
        if not close:
            await reader.read()

    return handler


def sink_of(*sizes: int) -> tuple[bytearray, list[memoryview]]:
    """Return memory, and views that cover it in pieces of these sizes."""
    memory = bytearray(sum(sizes))
    whole, at, found = memoryview(memory), 0, []
    for size in sizes:
        found.append(whole[at : at + size])
        at += size
    return memory, found


async def get(pool: Pool, *sizes: int) -> tuple[Response, bytearray]:
    memory, sink = sink_of(*sizes)
    response = await pool.request(Request("GET", GET, sink=sink, sink_nbytes=len(memory)))
    return response, memory


def head_of(nbytes: int | None = None, status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *more] + ([] if nbytes is None else [f"Content-Length: {nbytes}"])
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# Bodies.


@pytest.mark.parametrize("sizes", [(1000,), (300, 700), (1, 998, 1), (10,) * 100])
async def test_a_body_goes_into_its_place(sizes: tuple[int, ...]) -> None:
    async with pool_of(answering(head_of(1000), BODY[:1000])) as pool:
        response, memory = await get(pool, *sizes)
    assert response.sunk
    assert (response.status, response.body) == (200, b"")
    assert bytes(memory) == BODY[:1000]


async def test_a_head_cut_at_every_byte() -> None:
    message = head_of(10, "206 Partial Content", "ETag: x") + BODY[:10]
    for cut in range(1, len(message)):
        async with pool_of(answering(message[:cut], message[cut:])) as pool:
            response, memory = await get(pool, 4, 6)
        assert bytes(memory) == BODY[:10]
        assert response.headers["etag"] == "x"


async def test_a_message_byte_by_byte() -> None:
    message = b"HTTP/1.1 100 Continue\r\n\r\n" + head_of(5) + b"12345"
    async with pool_of(answering(*[message[n : n + 1] for n in range(len(message))])) as pool:
        assert bytes((await get(pool, 5))[1]) == b"12345"


@pytest.mark.parametrize("nbytes", [1, 100, 70_000, 73_728, 73_729, 200_000])
async def test_bodies_that_come_with_their_head(nbytes: int) -> None:
    async with pool_of(answering(head_of(nbytes) + BODY[:nbytes])) as pool:
        assert bytes((await get(pool, nbytes))[1]) == BODY[:nbytes]


@pytest.mark.parametrize("step", [1, 7, 1000, 65_536, 150_000])
async def test_chunked_bodies(step: int) -> None:
    nbytes = 300 if step < 10 else 200_000
    stream = b"".join(
        b"%x\r\n%b\r\n" % (len(BODY[n : n + step][: nbytes - n]), BODY[n : n + step][: nbytes - n])
        for n in range(0, nbytes, step)
    )
    async with pool_of(
        answering(head_of(None, "200 OK", "Transfer-Encoding: chunked") + stream + b"0\r\n\r\n", close=False)
    ) as pool:
        response, memory = await get(pool, nbytes // 3, nbytes - nbytes // 3)
        assert bytes(memory) == BODY[:nbytes]
        assert response.sunk


async def test_a_body_that_ends_with_the_connection() -> None:
    async with pool_of(answering(head_of() + BODY[:5000], BODY[5000:])) as pool:
        assert bytes((await get(pool, 150_000, 50_000))[1]) == BODY


@pytest.mark.parametrize("status", ["404 Not Found", "503 Slow Down", "301 Moved"])
async def test_bodies_of_errors_stay_out_of_memory(status: str) -> None:
    async with pool_of(answering(head_of(9, status) + b"<Error/>\n")) as pool:
        response, memory = await get(pool, 9)
    assert response.body == b"<Error/>\n"
    assert not response.sunk
    assert bytes(memory) == bytes(9)


@pytest.mark.parametrize("nbytes", [0, 9, 11, 1 << 40])
async def test_bodies_of_another_size_stay_out_of_memory(nbytes: int) -> None:
    async with pool_of(answering(head_of(nbytes) + BODY[:5], close=False)) as pool:
        response, memory = await get(pool, 10)
    assert not response.sunk
    assert bytes(memory) == bytes(10)


# What is no answer.


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (b"", "closed the connection before the response"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed the connection before the response"),
        (head_of(10) + b"12345", "closed the connection after 5 bytes"),
        (head_of(10) + BODY[:20], "longer than its Content-Length"),
        (b"SSH-2.0\r\n\r\n", "no HTTP response"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MAX_HEAD_NBYTES + 1), "head is too long"),
        (head_of(None, "200 OK", "Transfer-Encoding: chunked") + b"zz\r\n", "chunk's size"),
        (head_of(None, "200 OK", "Transfer-Encoding: chunked") + b"14\r\n" + BODY[:20] + b"\r\n0\r\n\r\n", "more than the 10"),
        (head_of(None, "200 OK", "Transfer-Encoding: chunked") + b"5\r\n12345\r\n0\r\n\r\n", "5 bytes, not the 10"),
        (head_of() + b"12345", "5 bytes, not the 10"),
        (head_of(2 * MAX_KEPT_NBYTES, "500 Oh") + bytes(2 * MAX_KEPT_NBYTES), "more than 1048576"),
    ],
)
async def test_answers_that_are_refused(message: bytes, match: str) -> None:
    async with pool_of(answering(message)) as pool:
        with pytest.raises(HTTPError, match=match):
            await get(pool, 10)


async def test_a_reset() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(10) + b"123")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with pool_of(handler) as pool:
        with pytest.raises(HTTPError, match="broke: .*reset"):
            await get(pool, 10)


# Sending.


def taking(found: list[bytes], nbytes: int, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            found.append(await reader.readexactly(nbytes))
            writer.write(answer)

    return handler


@every_loop
@pytest.mark.parametrize("n_pieces", [1, 3, 200])
async def test_a_body_is_sent_from_its_place(n_pieces: int) -> None:
    body = pattern(6_000_000).tobytes()
    step = -(-len(body) // n_pieces)
    pieces = [memoryview(body)[n : n + step] for n in range(0, len(body), step)]
    found: list[bytes] = []
    async with pool_of(taking(found, len(body))) as pool:
        for _ in range(2):
            request = Request("PUT", GET, body=pieces, body_nbytes=len(body))
            assert (await pool.request(request)).status == 200
        assert pool.opened == 1
    assert found == [body, body]


async def test_an_early_refusal_ends_the_sending() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(4, "403 Forbidden") + b"nope")
        await reader.read()

    body = memoryview(bytes(64 << 20))
    async with pool_of(handler) as pool:
        for n in (1, 2):
            response = await pool.request(Request("PUT", GET, body=[body], body_nbytes=len(body)))
            assert (response.status, response.body) == (403, b"nope")
            assert pool.opened == n


async def test_a_success_before_the_body_was_sent_is_none() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(0))
        await asyncio.sleep(5)

    body = memoryview(bytes(64 << 20))
    async with pool_of(handler) as pool:
        with pytest.raises(HTTPError, match="before it had the request"):
            await pool.request(Request("PUT", GET, body=[body], body_nbytes=len(body)))


async def test_a_refusal_and_a_reset_while_sending() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(4, "503 Slow Down") + b"nope")
        await writer.drain()

    body = memoryview(bytes(64 << 20))
    async with pool_of(handler) as pool:
        # Whether the kernel still has the answer when the reset comes is its choice.
        request = pool.request(Request("PUT", GET, body=[body], body_nbytes=len(body)))
        (outcome,) = await asyncio.gather(request, return_exceptions=True)
        assert isinstance(outcome, HTTPError) if isinstance(outcome, BaseException) else outcome.status == 503


# Cancelling.


@pytest.mark.parametrize("message", [b"", b"HTTP/1.1 2", head_of(1000), head_of(1000) + BODY[:500]])
async def test_cancelled_requests_write_no_more(message: bytes) -> None:
    started = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(message)
        writers.append(writer)
        started.set()
        assert await reader.read() == b""

    async with pool_of(handler) as pool:
        memory, sink = sink_of(1000)
        task = asyncio.create_task(pool.request(Request("GET", GET, sink=sink, sink_nbytes=1000)))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        memory[:] = b"\xa5" * 1000
        writers[0].write(b"\x00" * 1000)
        await asyncio.sleep(0.03)
        assert bytes(memory) == b"\xa5" * 1000


# Silence.


async def test_silence_ends() -> None:
    async with pool_of(answering(b"", close=False), read_timeout=0.1) as pool:
        with pytest.raises(HTTPError, match=r"silent for 0\.1 s: timed out"):
            await get(pool, 10)


@pytest.mark.parametrize("message", [b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000, head_of(100_000) + bytes(1000)])
async def test_dribbling_is_silence(message: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for n in range(len(message)):
            writer.write(message[n : n + 1])
            await writer.drain()
            await asyncio.sleep(0.01)

    async with pool_of(handler, read_timeout=0.3) as pool:
        with pytest.raises(HTTPError, match="timed out"):
            await get(pool, 100_000)


# TLS.


@every_loop
async def test_tls(tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, HOST)
    body = pattern(3_000_000).tobytes()
    async with pool_of(answering(head_of(len(body)) + body, close=False, times=3), context, trusted) as pool:
        for _ in range(3):
            _, memory = await get(pool, 1000, 2_000_000, 999_000)
            assert bytes(memory) == body
            # Tickets for later sessions come on the idle connection, and do not end it.
            await asyncio.sleep(0.01)
        assert pool.opened == 1
    found: list[bytes] = []
    async with pool_of(taking(found, len(body)), context, trusted) as pool:
        pieces = [memoryview(body)[:1], memoryview(body)[1:2_000_000], memoryview(body)[2_000_000:]]
        assert (await pool.request(Request("PUT", GET, body=pieces, body_nbytes=len(body)))).status == 200
    assert found == [body]


async def test_a_wrong_certificate_is_not_tried_again(tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "example.com")
    async with pool_of(answering(head_of(1) + b"x"), context, trusted) as pool:
        with pytest.raises(HTTPError, match="certificate") as caught:
            await get(pool, 1)
    assert not caught.value.retryable


async def test_a_server_without_tls(tmp_path: Path) -> None:
    _, trusted = certificate(tmp_path, HOST)

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with pool_of(handler, None, trusted) as pool:
        with pytest.raises(HTTPError, match="cannot connect"):
            await get(pool, 1)


# Addresses.


async def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    async with listening(answering(b"")) as port:
        first = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, 9))
        second = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (HOST, port))

        def look_up(found: list[Any]) -> Callable[..., Any]:
            async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
                return found

            return getaddrinfo

        monkeypatch.setattr(loop, "getaddrinfo", look_up([first, second]))
        (await connect(loop, "x", port, None, "", 1.0)).close()
        monkeypatch.setattr(loop, "getaddrinfo", look_up([first]))
        with pytest.raises(OSError, match="refused|111"):
            await connect(loop, "x", port, None, "", 1.0)
        monkeypatch.setattr(loop, "getaddrinfo", look_up([]))
        with pytest.raises(OSError, match="no address"):
            await connect(loop, "x", port, None, "", 1.0)
