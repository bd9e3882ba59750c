"""What the compiled engine takes, and what it leaves to the connection: against servers that are scripted byte by byte."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from nixl_async.http import HTTPError, Pool, Request, Response
from nixl_async.testing.patterns import CANARY, pattern
from tests.loops import every_loop
from tests.sockets import Handler, pool_of

BODY = pattern(3_000_000).tobytes()
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
PATIENCE_SECONDS = 10.0


def head_of(nbytes: int | None, *more: str, status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    lines = [f"{version} {status}", *more] + ([] if nbytes is None else [f"Content-Length: {nbytes}"])
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def answering(*pieces: bytes, stay: bool = True) -> Handler:
    """Answer each request with these pieces, each of which arrives by itself; hang up after the first unless told to `stay`."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                # A turn of the loop for each end: the client takes it before the next is there.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            if not stay:
                return

    return handler


def scattered(sizes: Sequence[int]) -> tuple[bytearray, list[memoryview]]:
    """Return memory, and views of these sizes that lie in it from its end to its beginning, with a byte between them."""
    memory = bytearray([CANARY]) * (sum(sizes) + len(sizes) + 1)
    whole, end, found = memoryview(memory), len(memory) - 1, []
    for size in sizes:
        found.append(whole[end - size : end])
        end -= size + 1
    return memory, found


def untouched(memory: bytearray, sink: Sequence[memoryview]) -> bool:
    """Tell whether what lies around the views is as it was."""
    return memory.count(CANARY) == len(sink) + 1 + sum(bytes(view).count(CANARY) for view in sink)


async def get(pool: Pool, sizes: Sequence[int], head: bytes = GET) -> tuple[Response, bytes]:
    memory, sink = scattered(sizes)
    try:
        response = await pool.request(Request("GET", head, sink=sink, sink_nbytes=sum(sizes)))
    finally:
        assert untouched(memory, sink)
    return response, b"".join(sink)


def in_engine(pool: Pool) -> list[bool]:
    """Tell of each idle connection whether the engine has it."""
    return [connection.slot >= 0 for connection in pool._idle]


# What the engine takes.


@every_loop
@pytest.mark.parametrize("sizes", [(1000,), (300, 0, 700), (1, 998, 1), (10,) * 200, (700_000, 1, 2_000_000, 299_999)])
@pytest.mark.parametrize("status", ["200 OK", "206 Partial Content"])
async def test_a_body_goes_into_scattered_memory(sizes: tuple[int, ...], status: str) -> None:
    nbytes = sum(sizes)
    head = head_of(nbytes, f"Content-Range: bytes 0-{nbytes - 1}/{nbytes}", "ETag:  x ", status=status)
    async with pool_of(answering(head + BODY[:nbytes])) as pool:
        for _ in range(3):
            response, found = await get(pool, sizes)
            assert found == BODY[:nbytes]
            assert (response.status, response.sunk, response.body) == (int(status[:3]), True, b"")
            assert response.headers["etag"] == "x"
            assert in_engine(pool) == [True]
        assert pool.opened == 1


@pytest.mark.parametrize(
    "head",
    [
        head_of(9),
        head_of(9, "Connection: keep-alive"),
        head_of(9, "content-RANGE: bytes 0-8/9"),
        head_of(9, "x: " + "y" * (4096 - 43)),
        b"HTTP/1.1 200\r\nx:\r\nCONTENT-LENGTH:\t9 \r\n\r\n",
    ],
)
async def test_responses_byte_by_byte(head: bytes) -> None:
    message = head + b"123456789"
    async with pool_of(answering(*[message[n : n + 1] for n in range(len(message))])) as pool:
        for _ in range(2):
            assert (await get(pool, (4, 5)))[1] == b"123456789"
            assert in_engine(pool) == [True]
        assert pool.opened == 1


async def test_a_body_cut_at_every_byte() -> None:
    message = head_of(10, "Content-Range: bytes 0-9/10", status="206 Partial Content") + BODY[:10]
    for cut in range(1, len(message)):
        async with pool_of(answering(message[:cut], message[cut:])) as pool:
            assert (await get(pool, (4, 0, 6)))[1] == BODY[:10]
            assert in_engine(pool) == [True]


# What it leaves to the connection.

CHUNKED = head_of(None, "Transfer-Encoding: chunked") + b"4\r\n1234\r\n6\r\n567890\r\n0\r\n\r\n"
NUMBERS = b"1234567890"


@pytest.mark.parametrize(
    ("message", "stays"),
    [
        (CHUNKED, True),
        (head_of(10, "Connection: close") + NUMBERS, False),
        (head_of(10, "Connection: Keep-Alive, x") + NUMBERS, True),
        (head_of(10, version="HTTP/1.0") + NUMBERS, False),
        (head_of(10, "Content-Length: 10") + NUMBERS, True),
        (head_of(10, status="203 Other") + NUMBERS, True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + head_of(10) + NUMBERS, True),
        (head_of(10, "Content-Range: bytes */10") + NUMBERS, True),
        (head_of(10, "x: " + "y" * 5000) + NUMBERS, True),
        (head_of(10, "x: " + "y" * (4097 - 44)) + NUMBERS, True),
    ],
)
async def test_unusual_responses_are_taken_all_the_same(message: bytes, stays: bool) -> None:
    for pieces in ([message], [message[:15], message[15:]], [message[:-12], message[-12:]], [message[:-3], message[-3:]]):
        async with pool_of(answering(*pieces, stay=stays)) as pool:
            for n in (1, 2):
                response, found = await get(pool, (3, 0, 7))
                assert found == NUMBERS
                assert response.sunk
                assert in_engine(pool) == [False] * stays
                assert pool.opened == (1 if stays else n)


async def test_an_unusual_response_cut_at_every_byte() -> None:
    for cut in range(1, len(CHUNKED)):
        async with pool_of(answering(CHUNKED[:cut], CHUNKED[cut:])) as pool:
            assert (await get(pool, (4, 6)))[1] == NUMBERS
            assert in_engine(pool) == [False]


async def test_after_an_unusual_response_the_engine_goes_on() -> None:
    messages = [CHUNKED, head_of(10) + NUMBERS] * 3

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for message in messages:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(message)
        await reader.read()

    async with pool_of(handler) as pool:
        for message in messages:
            assert (await get(pool, (4, 6)))[1] == NUMBERS
            assert in_engine(pool) == [message is not CHUNKED]
        assert pool.opened == 1


@pytest.mark.parametrize("status", ["404 Not Found", "503 Slow Down", "301 Moved"])
async def test_bodies_of_errors_stay_out_of_memory(status: str) -> None:
    message = head_of(9, status=status) + b"<Error/>\n"
    for cut in (len(message), 20, len(message) - 9, len(message) - 2):
        async with pool_of(answering(message[:cut], message[cut:])) as pool:
            response, found = await get(pool, (4, 5))
            assert (response.body, response.sunk) == (b"<Error/>\n", False)
            assert found == bytes([CANARY]) * 9


@pytest.mark.parametrize("nbytes", [0, 9, 11, 1 << 40])
async def test_bodies_of_another_size_stay_out_of_memory(nbytes: int) -> None:
    async with pool_of(answering(head_of(nbytes) + BODY[: min(nbytes, 5)])) as pool:
        response, found = await get(pool, (10,))
        assert not response.sunk
        assert found == bytes([CANARY]) * 10
        assert in_engine(pool) == []


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ((b"",), "closed the connection before the response"),
        ((b"HTTP/1.1 200 OK\r\nContent-Le",), "closed the connection before the response"),
        ((head_of(10),), "closed the connection after 0 bytes"),
        ((head_of(10) + b"12345",), "closed the connection after 5 bytes"),
        ((head_of(10), b"12345", b"6789"), "closed the connection after 9 bytes"),
        ((head_of(10) + NUMBERS + head_of(10) + NUMBERS,), "longer than its Content-Length"),
        ((b"SSH-2.0\r\n\r\n",), "no HTTP response"),
        ((head_of(10, "Content-Length: 11") + NUMBERS,), "two Content-Lengths"),
        ((head_of(None, "Content-Length: +10") + NUMBERS,), "Content-Length is"),
        ((head_of(None, "Content-Length: 0000000000000010") + NUMBERS,), "Content-Length is"),
        ((head_of(10, " folded: y") + NUMBERS,), "malformed header"),
        ((head_of(10, "no colon") + NUMBERS,), "malformed header"),
        ((head_of(10, "Transfer-Encoding: gzip") + NUMBERS,), "Transfer-Encoding"),
        ((CHUNKED[:-20],), "closed the connection after"),
    ],
)
async def test_answers_that_are_refused(pieces: tuple[bytes, ...], match: str) -> None:
    async with pool_of(answering(*pieces, stay=False)) as pool:
        with pytest.raises(HTTPError, match=match):
            await get(pool, (4, 6))
        assert in_engine(pool) == []


@pytest.mark.parametrize("message", [b"", b"HTTP/1.1 2", head_of(10), head_of(10) + b"123"])
async def test_a_reset(message: bytes) -> None:
    begun: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(message)
        begun.append(writer)
        await reader.read()

    async with pool_of(handler) as pool:
        task = asyncio.create_task(get(pool, (4, 6)))
        await until(lambda: bool(begun))
        await until_taken(pool, len(message))
        begun[0].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        begun[0].transport.abort()
        with pytest.raises(HTTPError, match="broke: .*reset"):
            await task


async def until(true: Any) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.001)


async def until_taken(pool: Pool, nbytes: int) -> None:
    """Wait until the engine has taken so many bytes of the one response."""
    assert pool._engine is not None
    engine = pool._engine
    (connection,) = pool._busy

    def taken() -> bool:
        done = engine.progress(connection.slot)
        return len(done.kept) + done.got >= nbytes

    await until(taken)


async def test_a_second_response_that_nobody_asked_for_ends_the_connection() -> None:
    async with pool_of(answering(head_of(10), NUMBERS + head_of(10) + NUMBERS)) as pool:
        for n in (1, 2):
            assert (await get(pool, (4, 6)))[1] == NUMBERS
            await until(lambda: in_engine(pool) == [])
            assert pool.opened == n


async def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    async with pool_of(answering(head_of(10) + NUMBERS, stay=False)) as pool:
        for _ in range(20):
            assert (await get(pool, (10,)))[1] == NUMBERS
        assert pool.opened <= 20
        assert len(pool._busy) == 0


async def test_long_requests_are_sent_by_the_connection() -> None:
    async with pool_of(answering(head_of(10) + NUMBERS)) as pool:
        for padding in (0, 2048 - len(GET) - 6, 2048 - len(GET) - 5, 50_000, 0):
            head = GET[:-2] + (b"a: %b\r\n" % (b"b" * (padding + 1)) if padding else b"") + b"\r\n"
            assert (await get(pool, (4, 6), head))[1] == NUMBERS
            assert in_engine(pool) == [len(head) <= 2048]
        assert pool.opened == 1


# Many at a time.


@every_loop
async def test_responses_of_every_kind_at_the_same_time() -> None:
    messages = [
        head_of(10) + NUMBERS,
        CHUNKED,
        head_of(10, "Connection: close") + NUMBERS,
        head_of(2, status="404 Not Found") + b"no",
        head_of(10) + b"12345",
        head_of(10, status="206 Partial Content") + NUMBERS,
        head_of(11) + NUMBERS,
        head_of(10) + NUMBERS + NUMBERS,
    ]
    waiting: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        message = messages[int(head.split()[1][1:])]
        waiting.append(writer)
        # The last one lets all go: the engine finds them in one step.
        if len(waiting) == len(messages):
            released.set()
        await released.wait()
        writer.write(message)
        if message.endswith(b"12345"):
            writer.write_eof()
        await reader.read()

    async with pool_of(handler) as pool:
        for _ in range(5):
            released = asyncio.Event()
            waiting.clear()
            for one in pool._idle:
                one.close()
            pool._idle.clear()
            heads = [GET.replace(b"/ ", b"/%d " % n, 1) for n in range(len(messages))]
            found = await asyncio.gather(*(get(pool, (4, 6), head) for head in heads), return_exceptions=True)
            for n in (0, 1, 2, 5):
                assert not isinstance(found[n], BaseException), found[n]
                assert found[n][1] == NUMBERS
            assert not isinstance(found[3], BaseException)
            assert (found[3][0].status, found[3][0].body) == (404, b"no")
            assert not isinstance(found[6], BaseException)
            assert not found[6][0].sunk
            assert "after 5 bytes" in str(found[4])
            assert "longer" in str(found[7])
            assert not pool._busy
            assert not pool._waiting


# Cancelling and silence.


@every_loop
@pytest.mark.parametrize("message", [b"", b"HTTP/1.1 2", head_of(1000), head_of(1000) + BODY[:500]])
async def test_cancelled_requests_write_no_more(message: bytes) -> None:
    begun: list[asyncio.StreamWriter] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(message)
        begun.append(writer)
        await reader.read()

    async with pool_of(handler) as pool:
        memory, sink = scattered((300, 700))
        task = asyncio.create_task(pool.request(Request("GET", GET, sink=sink, sink_nbytes=1000)))
        await until(lambda: bool(begun))
        await until_taken(pool, len(message))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        memory[:] = bytes([CANARY]) * len(memory)
        begun[0].write(bytes(2000))
        await asyncio.sleep(0.03)
        assert memory.count(CANARY) == len(memory)
        assert not pool._busy
        assert in_engine(pool) == []


@pytest.mark.parametrize("message", [b"", b"HTTP/1.1 200 OK\r\n", head_of(10) + b"123"])
async def test_silence_ends(message: bytes) -> None:
    async with pool_of(answering(message), read_timeout=0.1) as pool:
        with pytest.raises(HTTPError, match=r"silent for 0\.1 s: timed out"):
            await get(pool, (4, 6))
        assert in_engine(pool) == []


# Long bodies, of which much is waited for at once.

LOW = 1 << 19
"""As in the engine."""


def low_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


@every_loop
@pytest.mark.parametrize("nbytes", [LOW - 1, LOW, LOW + 1, 2 * LOW - 1, 3 * LOW + 7])
async def test_long_bodies_of_every_size(nbytes: int) -> None:
    message = head_of(nbytes) + BODY[:nbytes]
    for cut in (len(message), len(message) - nbytes, len(message) - LOW, len(message) - 1):
        async with pool_of(answering(message[:cut], message[cut:])) as pool:
            for _ in range(2):
                assert (await get(pool, (1, nbytes - 1)))[1] == BODY[:nbytes]
                assert in_engine(pool) == [True]
                # The next answer may have a byte only.
                assert low_of(pool._idle[0]._socket) == 1


async def test_long_bodies_in_small_pieces() -> None:
    message = head_of(2 * LOW) + BODY[: 2 * LOW]
    async with pool_of(answering(*[message[n : n + 5000] for n in range(0, len(message), 5000)])) as pool:
        assert (await get(pool, (2 * LOW,)))[1] == BODY[: 2 * LOW]


async def begun_long(pool: Pool, nbytes: int) -> tuple[asyncio.Task[Any], socket.socket]:
    """Ask for a long body; return once the engine waits for much of it."""
    task = asyncio.create_task(get(pool, (nbytes,)))
    await until(lambda: len(pool._busy) == 1)
    (connection,) = pool._busy
    await until(lambda: low_of(connection._socket) == LOW)
    return task, connection._socket


@pytest.mark.parametrize("more", [1, 1000, LOW - 1])
async def test_what_ends_in_the_middle_of_a_long_body_ends_at_once(more: int) -> None:
    async with pool_of(answering(head_of(2 * LOW), BODY[:more], stay=False)) as pool:
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(HTTPError, match=f"closed the connection after {more} bytes"):
                await get(pool, (2 * LOW,))


async def test_a_socket_that_leaves_the_engine_is_as_it_was() -> None:
    hold = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(2 * LOW) + BODY[:10])
        await hold.wait()
        writer.write(BODY[10 : 2 * LOW])
        await reader.read()

    async with pool_of(handler) as pool:
        task, sock = await begun_long(pool, 2 * LOW)
        (connection,) = pool._busy
        connection.take_over()
        assert low_of(sock) == 1
        hold.set()
        assert (await task)[1] == BODY[: 2 * LOW]


async def test_a_slow_server_is_not_silent() -> None:
    nbytes, piece, pause = LOW + 40_000, 20_000, 0.04

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(nbytes))
        for at in range(0, nbytes, piece):
            writer.write(BODY[at : min(nbytes, at + piece)])
            # So slow is the server that is meant: it takes twice as long as silence may last.
            await asyncio.sleep(pause)
        await reader.read()

    async with pool_of(handler, read_timeout=0.5) as pool:
        assert (await get(pool, (nbytes,)))[1] == BODY[:nbytes]


async def test_silence_in_the_middle_of_a_long_body_ends() -> None:
    async with pool_of(answering(head_of(2 * LOW), BODY[:50_000]), read_timeout=0.1) as pool:
        with pytest.raises(HTTPError, match=r"silent for 0\.1 s: timed out"):
            await get(pool, (2 * LOW,))


async def test_a_cancelled_long_body_writes_no_more() -> None:
    hold = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head_of(2 * LOW) + BODY[:1000])
        await hold.wait()
        writer.write(BODY[1000 : 2 * LOW])
        await reader.read()

    async with pool_of(handler) as pool:
        memory, sink = scattered((2 * LOW,))
        task = asyncio.create_task(pool.request(Request("GET", GET, sink=sink, sink_nbytes=2 * LOW)))
        await until(lambda: len(pool._busy) == 1)
        (connection,) = pool._busy
        await until(lambda: low_of(connection._socket) == LOW)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        memory[:] = bytes([CANARY]) * len(memory)
        hold.set()
        await asyncio.sleep(0.03)
        assert memory.count(CANARY) == len(memory)
