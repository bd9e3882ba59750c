"""Many requests on few connections: who waits, what is sent again, and what the loop's time is spent on."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from nixl_async.http import HTTPError, Pool, PoolOptions, Request
from nixl_async.http import pool as module
from nixl_async.http.pool import BUDGET_SECONDS
from tests.loops import every_loop
from tests.sockets import HOST, listening, pool_of

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"


class Echo:
    """Answers each request with the four bytes of its path; `limit` connections at most, each for `most` requests."""

    def __init__(self, most: int = 1 << 30, limit: int = 1 << 30) -> None:
        self.most, self.limit = most, limit
        self.open = self.peak = self.requests = 0
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            if self.open > self.limit:
                return
            for _ in range(self.most):
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                await self.hold.wait()
                writer.write(OK + head[5:9])
                await writer.drain()
        finally:
            self.open -= 1


async def get(pool: Pool, number: int, **fields: Any) -> bytes:
    memory = bytearray(4)
    head = b"GET /%04d HTTP/1.1\r\nhost: x\r\n\r\n" % number
    await pool.request(Request("GET", head, sink=[memoryview(memory)], sink_nbytes=4, **fields))
    return bytes(memory)


@every_loop
async def test_many_requests_on_few_connections() -> None:
    echo = Echo()
    async with pool_of(echo, max_connections=5) as pool:
        answers = await asyncio.gather(*(get(pool, n) for n in range(300)))
        assert answers == [b"%04d" % n for n in range(300)]
        assert pool.opened <= 5
    assert echo.peak <= 5


async def test_connections_that_end_after_some_requests() -> None:
    async with pool_of(Echo(most=3), max_connections=4) as pool:
        for start in range(0, 60, 10):
            assert await asyncio.gather(*(get(pool, n) for n in range(start, start + 10))) == [
                b"%04d" % n for n in range(start, start + 10)
            ]


async def test_requests_wait_in_order() -> None:
    echo = Echo()
    done: list[int] = []

    async def one(number: int) -> None:
        await get(pool, number)
        done.append(number)

    async with pool_of(echo, max_connections=1) as pool:
        await asyncio.gather(*(one(n) for n in range(20)))
    assert done == list(range(20))


async def test_those_that_wait_may_be_cancelled() -> None:
    echo = Echo()
    async with pool_of(echo, max_connections=1) as pool:
        echo.hold.clear()
        tasks = [asyncio.create_task(get(pool, n)) for n in range(5)]
        async with asyncio.timeout(5):
            while not echo.requests:
                await asyncio.sleep(0.001)
        tasks[3].cancel()
        tasks[0].cancel()
        await asyncio.wait([tasks[0], tasks[3]])
        echo.hold.set()
        assert [await tasks[n] for n in (1, 2, 4)] == [b"0001", b"0002", b"0004"]
        assert echo.requests == 4


async def test_a_server_that_takes_few_connections_serves_all() -> None:
    """What is refused while others are open does not fail whoever waits."""
    echo = Echo()
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(listening(echo))
        loop = asyncio.get_running_loop()
        pool = Pool(PoolOptions(HOST, port, max_connections=8), loop)
        stack.push_async_callback(pool.aclose)
        await get(pool, 0)
        real, refused = module.connect, 0

        async def connect(*arguments: Any) -> Any:
            nonlocal refused
            refused += 1
            raise ConnectionRefusedError("no more")

        module.connect = connect
        try:
            assert len(await asyncio.gather(*(get(pool, n) for n in range(100)))) == 100
        finally:
            module.connect = real
        assert 0 < refused <= 8


async def test_nobody_listens() -> None:
    async with listening(Echo()) as port:
        pass
    pool = Pool(PoolOptions(HOST, port, max_connections=2), asyncio.get_running_loop())
    failed = await asyncio.gather(*(get(pool, n) for n in range(5)), return_exceptions=True)
    assert all(isinstance(error, HTTPError) and "cannot connect" in str(error) and error.retryable for error in failed)
    await pool.aclose()


async def test_connecting_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*arguments: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(module, "connect", connect)
    pool = Pool(PoolOptions(HOST, 9, connect_timeout=0.05), asyncio.get_running_loop())
    with pytest.raises(HTTPError, match=r"no answer within 0\.05 s"):
        await get(pool, 1)
    await pool.aclose()


async def test_bytes_on_their_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NBYTES", 100)
    echo = Echo()
    async with pool_of(echo, max_connections=50) as pool:
        await asyncio.gather(*(get(pool, n, body_nbytes=26) for n in range(40)))
    assert echo.requests == 40
    assert echo.peak <= 50


async def test_how_many_requests_are_of_use() -> None:
    loop = asyncio.get_running_loop()
    pool, narrow = Pool(PoolOptions(HOST, 9), loop), Pool(PoolOptions(HOST, 9, max_connections=2), loop)
    for near in (0.0, 0.0001):
        assert [pool.useful(nbytes) for nbytes in (1, 4 << 20, 1 << 30)] == [8, 4, 4]
        pool.answered(near)
    assert [narrow.useful(nbytes) for nbytes in (1, 1 << 30)] == [2, 2]
    far = Pool(PoolOptions(HOST, 9), loop)
    far.answered(0.05)
    assert [far.useful(nbytes) for nbytes in (1, 8 << 20, 32 << 20, 1 << 30)] == [64, 59, 14, 4]
    for one in (pool, narrow, far):
        await one.aclose()


async def test_silence_ends_while_others_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NBYTES", 4)
    echo = Echo()
    async with pool_of(echo, max_connections=4, read_timeout=0.2) as pool:
        await asyncio.gather(*(get(pool, n) for n in range(4)))
        echo.hold.clear()
        async with asyncio.timeout(10):
            failed = await asyncio.gather(*(get(pool, n) for n in range(4)), return_exceptions=True)
        assert ["timed out" in str(error) for error in failed] == [True] * 4


async def test_idle_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Echo()
    async with pool_of(echo, read_timeout=0.2, idle_timeout=0.05) as pool:
        await get(pool, 1)
        assert echo.open == 1
        async with asyncio.timeout(5):
            while echo.open:
                await asyncio.sleep(0.005)
        assert await get(pool, 2) == b"0002"
        assert pool.opened == 2


async def test_closing_fails_what_is_under_way() -> None:
    echo = Echo()
    async with pool_of(echo, max_connections=2) as pool:
        await get(pool, 0)
        echo.hold.clear()
        tasks = [asyncio.create_task(get(pool, n)) for n in range(5)]
        await asyncio.sleep(0.01)
        await pool.aclose()
        for task in tasks:
            with pytest.raises(HTTPError, match="pool is closed"):
                await task
        with pytest.raises(HTTPError, match="pool is closed") as caught:
            await get(pool, 9)
        assert not caught.value.retryable


async def test_what_is_sent_again_is_sent_again_once() -> None:
    """A server that hangs up on every second request of a connection, and one that always does."""
    requests = 0

    async def fickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        head = await reader.readuntil(b"\r\n\r\n")
        requests += 1
        if requests == 1:
            writer.write(OK + head[5:9])
            await reader.readuntil(b"\r\n\r\n")
            requests += 1

    async with pool_of(fickle, max_connections=1) as pool:
        await get(pool, 1)
        with pytest.raises(HTTPError, match="closed the connection before the response"):
            await get(pool, 2)
    assert requests == 3


async def test_the_loops_time_is_rationed() -> None:
    pool = Pool(PoolOptions(HOST, 9), asyncio.get_running_loop())
    assert pool.may_work()
    pool.worked(time.perf_counter() - BUDGET_SECONDS)
    assert not pool.may_work()
    # The next iteration may work again.
    assert await pool.turn()
    assert pool.may_work()
    started = time.perf_counter()
    assert pool.may_go_on(started)
    assert not pool.may_go_on(started - BUDGET_SECONDS)
    await pool.aclose()
