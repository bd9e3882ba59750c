"""The proxy breaks what it was told to break, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from nixl_async.testing import proxy as proxy_module
from nixl_async.testing.proxy import (
    Answer,
    Fault,
    FaultProxy,
    close_idle,
    expired_token,
    internal_error,
    redirect,
    s3_error,
    slow_down,
)
from tests.loops import every_loop

pytestmark = every_loop

BODY = bytes(range(256)) * 40


# A server and a client, as small as they can be.


@dataclass
class Upstream:
    """Answers GET with BODY, PUT with the number of bytes; `/chunked`, `/eof`, `/close`, `/early`, `/reset` as they say."""

    port: int = 0
    connections: int = 0
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    broken: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self.serve(reader, writer))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.broken += isinstance(error, ConnectionError) or bool(error.partial)
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        method, path = head.decode().split(" ")[:2]
        fields = parse(head)
        if path == "/early":
            writer.write(b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
            writer.write_eof()
            await reader.read()
            return False
        if path == "/reset":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.")
            await writer.drain()
            proxy_module._Stream(reader, writer).reset()
            return False
        if "expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fields.get("transfer-encoding") == "chunked":
            self.bodies.append(await read_chunks(reader))
        else:
            self.bodies.append(await reader.readexactly(int(fields.get("content-length", 0))))
        body = BODY if method in ("GET", "HEAD") else str(len(self.bodies[-1])).encode()
        if path == "/chunked":
            halves = b"%x;x=y\r\n%b\r\n%x\r\n%b\r\n" % (100, body[:100], len(body) - 100, body[100:])
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"" if method == "HEAD" else halves + b"0\r\nX-Trailer: 1\r\n\r\n")
        elif path == "/eof":
            writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
        elif path == "/gone":
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            close = b"Connection: close\r\n" if path == "/close" else b""
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx-Odd:  Case\r\n%b\r\n" % (len(body), close))
            writer.write(b"" if method == "HEAD" else body)
        await writer.drain()
        return path not in ("/eof", "/close") and fields.get("connection") != "close"


def parse(head: bytes) -> dict[str, str]:
    lines = head.decode().split("\r\n")[1:-2]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return body


@dataclass
class Got:
    status: int
    fields: dict[str, str]
    body: bytes
    head: bytes


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, method: str, path: str, body: bytes = b"", **fields: str) -> None:
        sent = {"Host": "it", **fields}
        if body and "Transfer_Encoding" not in fields:
            sent.setdefault("Content_Length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in sent.items())]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())
        if "Expect" not in fields:
            self.writer.write(body)

    async def head(self) -> Got:
        head = await self.reader.readuntil(b"\r\n\r\n")
        return Got(int(head.split(b" ")[1]), parse(head), b"", head)

    async def receive(self, *, bodiless: bool = False) -> Got:
        got = await self.head()
        if bodiless or got.status == 204 or got.status < 200:
            return got
        if got.fields.get("transfer-encoding") == "chunked":
            got.body = await read_chunks(self.reader)
        elif "content-length" in got.fields:
            got.body = await self.reader.readexactly(int(got.fields["content-length"]))
        else:
            got.body = await self.reader.read()
        return got

    async def ask(self, method: str, path: str, body: bytes = b"", **fields: str) -> Got:
        self.send(method, path, body, **fields)
        return await self.receive(bodiless=method == "HEAD")

    async def ended(self) -> bool:
        """Tell whether the connection ends, and has nothing more to say."""
        async with asyncio.timeout(5):
            return await self.reader.read() == b""


@asynccontextmanager
async def client_of(proxy: FaultProxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.connected, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    yield upstream
    server.close()
    async with asyncio.timeout(5):
        while upstream.tasks:
            await asyncio.wait(upstream.tasks)
    await server.wait_closed()


@pytest.fixture
async def proxy(upstream: Upstream) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", upstream.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: FaultProxy) -> AsyncIterator[Client]:
    async with client_of(proxy) as client:
        yield client


# Without a fault.


async def test_exchanges_pass_on_one_connection(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    direct = Client(*await asyncio.open_connection("127.0.0.1", upstream.port))
    for method, path in [("GET", "/a"), ("HEAD", "/a"), ("GET", "/chunked"), ("GET", "/gone")]:
        got, expected = await client.ask(method, path), await direct.ask(method, path)
        assert (got.head, got.body) == (expected.head, expected.body)
        assert upstream.heads[-1] == upstream.heads[-2]
    direct.writer.close()
    assert proxy.url == f"http://127.0.0.1:{proxy.port}"
    assert (proxy.connections, proxy.requests, proxy.upstream_connections, proxy.faulted) == (1, 4, 1, 0)
    assert proxy.seen == [("GET", "/a"), ("HEAD", "/a"), ("GET", "/chunked"), ("GET", "/gone")]


async def test_uploads_pass(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    large = BODY * 300
    assert (await client.ask("PUT", "/a", large)).body == str(len(large)).encode()
    chunks = b"5;x=y\r\nhello\r\n3\r\nyou\r\n0\r\nX-Trailer: 1\r\n\r\n"
    assert (await client.ask("PUT", "/a", chunks, Transfer_Encoding="chunked")).body == b"8"
    assert upstream.bodies == [large, b"helloyou"]
    assert upstream.connections == 1


async def test_continue_passes(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    client.send("PUT", "/a", BODY, Expect="100-continue")
    assert (await client.head()).status == 100
    client.writer.write(BODY)
    assert (await client.receive()).status == 200
    assert upstream.bodies == [BODY]


@pytest.mark.parametrize("path", ["/close", "/eof"])
async def test_a_server_that_ends_the_connection(path: str, proxy: FaultProxy, client: Client) -> None:
    got = await client.ask("GET", path)
    assert got.body == BODY
    assert await client.ended()


async def test_a_client_that_ends_the_connection(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    assert (await client.ask("GET", "/a", Connection="close")).body == BODY
    assert await client.ended()


async def test_an_early_answer_reaches_a_client_that_still_sends(proxy: FaultProxy, client: Client) -> None:
    client.send("PUT", "/early", Content_Length="100000")
    got = await client.receive()
    assert (got.status, got.body) == (403, b"no")
    client.writer.write(bytes(50_000))
    assert await client.ended()


async def test_a_server_that_resets(proxy: FaultProxy, client: Client) -> None:
    client.send("GET", "/reset")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await client.receive()


async def test_a_client_that_goes_away_in_its_upload(proxy: FaultProxy, upstream: Upstream) -> None:
    async with client_of(proxy) as client:
        client.send("PUT", "/a", b"few", Content_Length="100000")
        await client.writer.drain()
        while not upstream.heads:
            await asyncio.sleep(0.005)
    while not upstream.broken:
        await asyncio.sleep(0.005)
    assert upstream.bodies == []


async def test_a_server_that_is_not_there(unused_tcp_port: int) -> None:
    async with FaultProxy("127.0.0.1", unused_tcp_port) as proxy, client_of(proxy) as client:
        client.send("GET", "/a")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.receive()


async def test_an_idle_connection_that_the_server_has_closed_is_made_again(upstream: Upstream) -> None:
    async with FaultProxy("127.0.0.1", upstream.port) as proxy, client_of(proxy) as client:
        assert (await client.ask("GET", "/a")).status == 200
        for task in list(upstream.tasks):
            task.cancel()
        await asyncio.sleep(0.02)
        assert (await client.ask("GET", "/a")).status == 200
        assert (proxy.connections, proxy.upstream_connections) == (1, 2)


@pytest.mark.parametrize("garbage", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"x" * (3 << 20)])
async def test_garbage_ends_the_connection(garbage: bytes, proxy: FaultProxy, client: Client) -> None:
    client.writer.write(garbage)
    try:
        assert await client.ended()
    except ConnectionError:
        pass


async def test_nothing_is_left_of_what_is_under_way(upstream: Upstream) -> None:
    async with FaultProxy("127.0.0.1", upstream.port) as proxy:
        proxy.inject(Fault(latency=60), match=lambda method, path: path == "/late")
        proxy.inject(Fault(stall_after=3))
        async with client_of(proxy) as idle, client_of(proxy) as late, client_of(proxy) as stalled, client_of(proxy) as deaf:
            await idle.ask("PUT", "/a", b"x")
            late.send("GET", "/late")
            stalled.send("GET", "/a")
            # More than the kernel takes for a client that does not read.
            deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(1000):
                deaf.send("GET", "/a")
            await asyncio.sleep(0.1)
            assert proxy.open_connections == 4
            began = time.monotonic()
            await proxy.__aexit__(None, None, None)
            assert time.monotonic() - began < 1
            assert proxy.open_connections == 0
            with pytest.raises(ConnectionResetError):
                await idle.reader.read()
            await proxy.__aenter__()


# Which requests.


async def test_faults_are_taken_in_order_by_what_they_match(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(slow_down(), times=2, match=lambda method, path: method == "PUT" and path.startswith("/b"))
    proxy.inject(internal_error())
    asked = [("PUT", "/a"), ("PUT", "/b1"), ("GET", "/b1"), ("PUT", "/b2"), ("PUT", "/b3")]
    statuses = [(await client.ask(method, path)).status for method, path in asked]
    assert statuses == [500, 503, 200, 503, 200]
    assert proxy.faulted == 3
    proxy.inject(slow_down(), times=None)
    assert [(await client.ask("GET", "/a")).status for _ in range(3)] == [503, 503, 503]
    proxy.clear()
    assert (await client.ask("GET", "/a")).status == 200
    assert proxy.connections == 1


async def test_faults_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="one way"):
        Fault(reset_after=1, close_after=0)
    with pytest.raises(ValueError, match="chunked"):
        Fault(chunked=10, length_off=1)
    with pytest.raises(ValueError, match="at least one"):
        FaultProxy("127.0.0.1", 1).inject(Fault(), times=0)


# Instead of the server.


async def test_slow_down(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    proxy.inject(slow_down(retry_after=2))
    got = await client.ask("PUT", "/a", BODY)
    assert (got.status, got.fields["retry-after"]) == (503, "2")
    assert b"<Error><Code>SlowDown</Code>" in got.body
    proxy.inject(slow_down())
    assert "retry-after" not in (await client.ask("GET", "/a")).fields
    assert upstream.heads == []
    assert (await client.ask("GET", "/a")).status == 200


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (internal_error(), 500, b"InternalError"),
        (expired_token(), 403, b"ExpiredToken"),
        (s3_error(404, "NoSuchKey"), 404, b"Key"),
    ],
)
async def test_errors_of_s3(fault: Fault, status: int, code: bytes, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(fault)
    got = await client.ask("GET", "/a")
    assert (got.status, got.fields["content-type"]) == (status, "application/xml")
    assert code in got.body
    proxy.inject(fault)
    got = await client.ask("HEAD", "/a")
    assert (got.status, got.body) == (status, b"")
    assert (await client.ask("GET", "/a")).body == BODY


async def test_redirect(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(redirect("http://elsewhere/a"))
    got = await client.ask("PUT", "/a", BODY)
    assert (got.status, got.fields["location"]) == (307, "http://elsewhere/a")


async def test_any_other_answer(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(answer=Answer(418, "Teapot", (("X-A", "b"),), b"tea")))
    got = await client.ask("GET", "/a")
    assert (got.status, got.fields["x-a"], got.body) == (418, "b", b"tea")


async def test_an_answer_ahead_of_the_upload(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(slow_down(early=True))
    client.send("PUT", "/a", b"few", Content_Length="1000000")
    got = await client.receive()
    assert (got.status, got.fields["connection"]) == (503, "close")
    client.writer.write(bytes(500_000))
    assert await client.ended()


async def test_an_answer_instead_of_continue(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(expired_token())
    client.send("PUT", "/a", BODY, Expect="100-continue")
    got = await client.receive()
    assert (got.status, got.fields["connection"]) == (403, "close")
    assert await client.ended()


async def test_an_idle_connection_that_ends_as_the_next_request_comes(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.inject(close_idle())
    async with client_of(proxy) as client:
        assert (await client.ask("GET", "/a")).status == 200
        client.send("GET", "/a")
        assert await client.ended()
    proxy.inject(close_idle("reset"))
    async with client_of(proxy) as client:
        assert (await client.ask("GET", "/a")).status == 200
        client.send("GET", "/a")
        with pytest.raises(ConnectionResetError):
            await client.receive()
    assert (proxy.connections, proxy.requests, len(upstream.heads)) == (2, 4, 2)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_first_request_that_is_dropped(how: str, proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    proxy.inject(Fault(drop="close") if how == "close" else Fault(drop="reset"))
    client.send("GET", "/a")
    if how == "close":
        assert await client.ended()
    else:
        with pytest.raises(ConnectionResetError):
            await client.receive()
    assert upstream.heads == []


# To the request.


@pytest.mark.parametrize("offset", [0, 5000, len(BODY) - 1])
async def test_a_corrupt_upload(offset: int, proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    proxy.inject(Fault(corrupt_request=offset))
    assert (await client.ask("PUT", "/a", BODY)).status == 200
    assert [i for i, byte in enumerate(upstream.bodies[0]) if byte != BODY[i]] == [offset]


async def test_a_continue_that_never_comes(proxy: FaultProxy, upstream: Upstream, client: Client) -> None:
    proxy.inject(Fault(withhold_continue=True))
    client.send("PUT", "/a", BODY, Expect="100-continue")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await client.reader.read(1)
    client.writer.write(BODY)
    assert (await client.receive()).status == 200


# To the response's head.


async def test_latency(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(latency=0.1))
    began = time.monotonic()
    assert (await client.ask("GET", "/a")).body == BODY
    assert time.monotonic() - began >= 0.09


async def test_an_answer_is_held_back_for_as_long_as_the_test_wants(proxy: FaultProxy, client: Client) -> None:
    answered, go = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        answered.set()
        await go.wait()

    proxy.inject(Fault(hold=hold))
    asking = asyncio.create_task(client.ask("GET", "/a"))
    await answered.wait()
    assert not asking.done()
    go.set()
    assert (await asking).body == BODY


async def test_a_continue_nobody_asked_for(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(extra_continue=True))
    assert (await client.ask("GET", "/a", Content_Length="0")).status == 100
    assert (await client.receive()).body == BODY


async def test_connection_close(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(connection_close=True))
    got = await client.ask("GET", "/a")
    assert (got.body, got.fields["connection"], got.fields["x-odd"]) == (BODY, "close", "Case")
    assert await client.ended()


@pytest.mark.parametrize("path", ["/a", "/chunked"])
async def test_a_declared_length_that_is_too_large(path: str, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(length_off=10))
    client.send("GET", path)
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await client.receive()
    assert caught.value.partial == BODY


@pytest.mark.parametrize("path", ["/a", "/chunked"])
async def test_a_declared_length_that_is_too_small(path: str, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(length_off=-10))
    assert (await client.ask("GET", path)).body == BODY[:-10]
    client.send("GET", "/a")
    assert await client.reader.readexactly(10) == BODY[-10:]
    assert (await client.receive()).body == BODY


async def test_a_declared_length_of_no_body(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(length_off=10))
    assert (await client.ask("HEAD", "/a")).fields["content-length"] == str(len(BODY) + 10)
    assert (await client.ask("GET", "/a")).body == BODY


@pytest.mark.parametrize("path", ["/a", "/chunked"])
async def test_chunks(path: str, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(chunked=1000))
    client.send("GET", path)
    got = await client.head()
    assert got.fields["transfer-encoding"] == "chunked"
    assert "content-length" not in got.fields
    assert await client.reader.readuntil(b"\r\n") == (b"3e8\r\n" if path == "/a" else b"64\r\n")
    assert await client.reader.readexactly(100) == BODY[:100]
    proxy.inject(Fault(chunked=7), times=2)
    async with client_of(proxy) as other:
        assert (await other.ask("GET", path)).body == BODY
        assert (await other.ask("HEAD", path)).body == b""
        assert (await other.ask("GET", "/a")).body == BODY


# To the response's body.


@pytest.mark.parametrize("path", ["/a", "/chunked"])
@pytest.mark.parametrize("offset", [0, 100, len(BODY) - 1])
async def test_a_corrupt_download(path: str, offset: int, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(corrupt_response=offset))
    got = await client.ask("GET", path)
    assert len(got.body) == len(BODY)
    assert [i for i, byte in enumerate(got.body) if byte != BODY[i]] == [offset]
    assert (await client.ask("GET", path)).body == BODY


@pytest.mark.parametrize(("rate", "seconds"), [(200, 0.1), (51_200, 0.2)])
async def test_a_body_that_dribbles(rate: float, seconds: float, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(bytes_per_second=rate))
    client.send("GET", "/a")
    await client.head()
    began = time.monotonic()
    n_bytes = int(rate * seconds)
    assert await client.reader.readexactly(n_bytes) == BODY[:n_bytes]
    assert time.monotonic() - began > seconds * 0.7


async def until_broken(client: Client, n_bytes: int) -> BaseException | None:
    """Read a response that breaks after `n_bytes` bytes of the body; return how."""
    got = await client.head()
    assert got.fields["content-length"] == str(len(BODY))
    assert await client.reader.readexactly(n_bytes) == BODY[:n_bytes]
    try:
        assert await client.reader.read() == b""
    except ConnectionResetError as error:
        return error
    return None


@pytest.mark.parametrize("n_bytes", [0, 1000, len(BODY)])
async def test_a_reset(n_bytes: int, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(reset_after=n_bytes))
    client.send("GET", "/a")
    # Every byte came, though a stream reader that has met a RST hands out no more of them.
    with pytest.raises(ConnectionResetError):
        await until_broken(client, n_bytes)
        raise ConnectionResetError
    assert proxy.faulted == 1


async def test_a_reset_does_not_overtake_what_was_sent(proxy: FaultProxy) -> None:
    proxy.inject(Fault(reset_after=1000))
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1 << 20)
    client = Client(reader, writer)
    client.send("GET", "/a")
    got = await client.head()
    assert got.status == 200
    came = b""
    with pytest.raises(ConnectionResetError):
        while piece := await reader.read(100):
            came += piece
    assert BODY[:1000].startswith(came)
    writer.close()
    with pytest.raises(ConnectionResetError):
        await writer.wait_closed()


@pytest.mark.parametrize("n_bytes", [0, 1000, len(BODY)])
async def test_a_close(n_bytes: int, proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(close_after=n_bytes))
    client.send("GET", "/a")
    assert await until_broken(client, n_bytes) is None


async def test_a_close_among_chunks(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(close_after=1000))
    client.send("GET", "/chunked")
    with pytest.raises(asyncio.IncompleteReadError):
        await client.receive()


async def test_a_half_close(proxy: FaultProxy, client: Client) -> None:
    proxy.inject(Fault(half_close_after=1000))
    client.send("GET", "/a")
    assert await until_broken(client, 1000) is None
    # What the client sends is still taken.
    for _ in range(3):
        client.writer.write(bytes(1000))
        await client.writer.drain()
        await asyncio.sleep(0.01)
    assert proxy.open_connections == 1
    assert proxy.requests == 1


async def test_a_stall(proxy: FaultProxy) -> None:
    proxy.inject(Fault(stall_after=1000))
    async with client_of(proxy) as client:
        client.send("GET", "/a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await until_broken(client, 1000)
        assert proxy.open_connections == 1
    while proxy.open_connections:
        await asyncio.sleep(0.005)


async def test_faults_of_an_answer_that_is_not_the_servers(proxy: FaultProxy, client: Client) -> None:
    answer = Answer(200, "OK", (), b"0123456789")
    proxy.inject(Fault(answer=answer, corrupt_response=3, chunked=4))
    assert (await client.ask("GET", "/a")).body == b"012\xcc456789"
    proxy.inject(Fault(answer=answer, close_after=4))
    client.send("GET", "/a")
    await client.head()
    assert await client.reader.read() == b"0123"
