"""What the s3 backend does beyond the conformance suite: uploads that are not left behind, redirects, proxies, TLS, options."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from nixl_async import Agent, BackendError, ConfigurationError, ConflictError, IntegrityError
from nixl_async.backends.s3 import S3Backend
from nixl_async.backends.s3_config import S3Options, create_client, make_session
from nixl_async.errors import AccessError
from nixl_async.stores import Store
from nixl_async.testing.patterns import CANARY, Canary, assert_same, pattern
from nixl_async.testing.proxy import Fault, FaultProxy, internal_error, redirect, s3_error
from nixl_async.testing.servers import Server
from tests.sockets import certificate, relay
from tests.stores import fresh_prefix, s3_options

MIB = 1 << 20
PARTS: dict[str, Any] = {"multipart_nbytes": 6 * MIB, "part_nbytes": 5 * MIB, "range_nbytes": 3 * MIB}


class Bench:
    """An agent, a proxy before the server, and what the server says past both."""

    def __init__(self, agent: Agent, server: Server, proxy: FaultProxy, client: Any) -> None:
        self.agent, self.server, self.proxy, self.client = agent, server, proxy, client
        self.prefix = fresh_prefix()

    async def store(self, **options: Any) -> Store:
        given = {**s3_options(self.server), "endpoint_url": self.proxy.url, **options}
        return await self.agent.store(f"s3://bench/{self.prefix}", **given)

    async def write(self, store: Store, key: str, content: Any, **options: Any) -> None:
        await self.agent.transfer(await self.agent.register(content), store.object(key, **options))

    async def read(self, store: Store, key: str, nbytes: int) -> Any:
        got = np.full(nbytes, CANARY, np.uint8)
        await self.agent.transfer(store.object(key), await self.agent.register(got))
        return got

    async def uploads(self) -> list[str]:
        """Return the keys of unfinished uploads."""
        answer = await self.client.list_multipart_uploads(Bucket="bench")
        return [one["Key"] for one in answer.get("Uploads", ()) if one["Key"].startswith(self.prefix)]


@pytest.fixture
async def bench(seaweed: Server) -> AsyncIterator[Bench]:
    parts = urlsplit(seaweed.endpoint)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(str(parts.hostname), int(parts.port or 0)))
        # With the loader that the backend shares: S3's model takes a tenth of a second to load.
        options = S3Options(**s3_options(seaweed))  # type: ignore[arg-type]
        client = await stack.enter_async_context(create_client(await make_session(options), options))
        agent = await stack.enter_async_context(Agent("s3", backends=["s3", "memory"]))
        yield Bench(agent, seaweed, proxy, client)


def is_begin(method: str, path: str) -> bool:
    return method == "POST" and path.endswith("?uploads")


def is_part(method: str, path: str) -> bool:
    return method == "PUT" and "partNumber=2" in path


def is_finish(method: str, path: str) -> bool:
    return method == "POST" and "uploadId=" in path


def is_abort(method: str, path: str) -> bool:
    return method == "DELETE" and "uploadId=" in path


# Uploads in parts.


@pytest.mark.parametrize("options", [{}, {"checksum": "crc64nvme"}, {"checksum": "crc32c", "payload": "unsigned"}])
async def test_parts_with_checksums(bench: Bench, options: dict[str, Any]) -> None:
    store = await bench.store(**PARTS, **options)
    sent = pattern(12 * MIB + 5)
    await bench.write(store, "large", sent)
    assert_same(await bench.read(store, "large", len(sent)), sent)
    assert await bench.uploads() == []
    assert [path for method, path in bench.proxy.seen if "partNumber" in path][2:] != []


@pytest.mark.parametrize(
    ("at", "fault"),
    [
        (is_begin, s3_error(403, "AccessDenied")),
        (is_part, s3_error(403, "AccessDenied")),
        (is_part, internal_error()),
        (is_part, Fault(drop="reset")),
        (is_finish, s3_error(400, "InvalidPart")),
        (is_finish, internal_error()),
    ],
)
async def test_a_failed_upload_is_not_left_behind(bench: Bench, at: Any, fault: Fault) -> None:
    store = await bench.store(**PARTS, attempts=2)
    bench.proxy.inject(fault, None, at)
    with pytest.raises((AccessError, BackendError)):
        await bench.write(store, "large", pattern(12 * MIB))
    assert bench.proxy.faulted
    assert await bench.uploads() == []
    assert list(await store.exists(["large"])) == [False]
    bench.proxy.clear()
    await bench.write(store, "large", pattern(12 * MIB, 3))
    assert_same(await bench.read(store, "large", 12 * MIB), pattern(12 * MIB, 3))


@pytest.mark.parametrize("at", [is_begin, is_part, is_finish])
async def test_a_cancelled_upload_is_not_left_behind(bench: Bench, at: Any) -> None:
    store = await bench.store(**PARTS)
    sent = pattern(12 * MIB)
    source = await bench.agent.register(sent)
    reached = asyncio.Event()

    def match(method: str, path: str) -> bool:
        if at(method, path):
            reached.set()
            return True
        return False

    bench.proxy.inject(Fault(latency=0.2), None, match)
    transfer = asyncio.create_task(bench.agent.transfer(source, store.object("large")))
    await reached.wait()
    transfer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transfer
    assert await bench.uploads() == []
    # What was finishing has finished; else nothing is there.
    assert list(await store.exists(["large"])) == [at is is_finish]


async def test_uploads_cancelled_at_any_time(bench: Bench) -> None:
    store = await bench.store(**PARTS)
    source = await bench.agent.register(pattern(16 * MIB))
    for milliseconds in range(0, 120, 12):
        transfer = asyncio.create_task(bench.agent.transfer(source, store.object("large")))
        asyncio.get_running_loop().call_later(milliseconds / 1000, transfer.cancel)
        await asyncio.wait([transfer])
    assert await bench.uploads() == []


async def test_a_server_that_is_slow_to_drop_an_upload_holds_nobody_up(bench: Bench) -> None:
    store = await bench.store(**PARTS)
    source = await bench.agent.register(pattern(12 * MIB))
    bench.proxy.inject(s3_error(403, "AccessDenied"), None, is_part)
    bench.proxy.inject(Fault(latency=3.0), None, is_abort)
    with pytest.raises(AccessError):
        await bench.agent.transfer(source, store.object("large"))
    await bench.agent.aclose()
    assert await bench.uploads() == []


@pytest.mark.parametrize("only_new", [False, True])
async def test_an_upload_that_finished_unheard(bench: Bench, only_new: bool) -> None:
    store = await bench.store(**PARTS)
    sent = pattern(12 * MIB)
    bench.proxy.inject(Fault(reset_after=0), 1, is_finish)
    await bench.write(store, "large", sent, if_none_match=only_new)
    assert bench.proxy.faulted == 1
    assert_same(await bench.read(store, "large", len(sent)), sent)
    if only_new:
        with pytest.raises(ConflictError):
            await bench.write(store, "large", sent, if_none_match=True)
        assert await bench.uploads() == []


async def test_a_large_object_is_not_torn(bench: Bench) -> None:
    old, new = pattern(9 * MIB, 1), pattern(9 * MIB, 2)
    direct = await bench.store(endpoint_url=bench.server.endpoint)
    await bench.write(direct, "torn", old)
    # One piece of four ranges after the other, and the object is replaced after the first.
    store = await bench.store(range_nbytes=MIB, concurrency=1)

    async def replaced() -> None:
        await bench.write(direct, "torn", new)

    bench.proxy.inject(Fault(hold=replaced))
    assert_same(await bench.read(store, "torn", 9 * MIB), new)
    assert bench.proxy.requests == 6


async def test_large_objects_are_cut_only_where_they_are_few(bench: Bench) -> None:
    store = await bench.store(range_nbytes=MIB, concurrency=2)
    sent = pattern(16 * MIB)
    names = [f"l-{n}" for n in range(4)]
    source = await bench.agent.register(sent)
    await bench.agent.transfer(source, store.objects(names, 4 * MIB))
    got = np.zeros(16 * MIB, np.uint8)
    sink = await bench.agent.register(got)
    # Two requests are of use: each gets half of what there is, from 1 to 4 MiB.
    for count, requests in ((4, 4), (2, 2), (1, 2)):
        before = bench.proxy.requests
        got[:] = CANARY
        await bench.agent.transfer(store.objects(names[:count], 4 * MIB), sink[: count * 4 * MIB])
        assert bench.proxy.requests - before == requests
        assert_same(got[: count * 4 * MIB], sent[: count * 4 * MIB])
    before = bench.proxy.requests
    await bench.agent.transfer(source, store.object("one"))
    assert_same(await bench.read(store, "one", 16 * MIB), sent)
    # One put, and four gets: no request is for more than four ranges.
    assert bench.proxy.requests - before == 5


async def test_a_large_object_with_a_checksum_that_arrives_damaged(bench: Bench) -> None:
    store = await bench.store(**PARTS, checksum="crc64nvme")
    sent = pattern(12 * MIB)
    await bench.write(store, "large", sent)
    bench.proxy.inject(Fault(corrupt_response=70_000), 1, lambda method, path: method == "GET")
    with pytest.raises(IntegrityError, match="damaged"):
        await bench.agent.transfer(store.object("large", len(sent)), await bench.agent.register(np.zeros(len(sent), np.uint8)))


# Buckets that are elsewhere.


@pytest.mark.parametrize(
    "fault",
    [
        s3_error(301, "PermanentRedirect", headers=(("x-amz-bucket-region", "eu-west-1"),)),
        s3_error(400, "AuthorizationHeaderMalformed", "expecting</Message><Region>eu-west-1</Region><Message>"),
    ],
)
async def test_another_region_is_found(bench: Bench, fault: Fault) -> None:
    store = await bench.store()
    names = [f"r-{i}" for i in range(20)]
    # All that are on their way at once are told.
    bench.proxy.inject(fault, 20)
    await bench.agent.transfer(await bench.agent.register(pattern(20_000)), store.objects(names, 1000))
    assert bench.proxy.faulted == 20
    got = np.zeros(20_000, np.uint8)
    await bench.agent.transfer(store.objects(names, 1000), await bench.agent.register(got))
    assert_same(got, pattern(20_000))
    assert bench.proxy.requests == 60


@pytest.mark.parametrize("permanent", [False, True])
async def test_redirects_are_followed(bench: Bench, permanent: bool) -> None:
    store = await bench.store()
    location = f"{bench.server.endpoint}/bench/{bench.prefix}x"
    moved = s3_error(301, "PermanentRedirect", headers=(("Location", location),)) if permanent else redirect(location)
    bench.proxy.inject(moved, 1)
    await bench.write(store, "x", pattern(5000))
    assert bench.proxy.requests == 1
    assert_same(await bench.read(store, "x", 5000), pattern(5000))
    assert bench.proxy.requests == (1 if permanent else 2)


async def test_redirects_in_a_circle_end(bench: Bench) -> None:
    store = await bench.store(attempts=1)
    bench.proxy.inject(redirect(f"{bench.proxy.url}/bench/{bench.prefix}x"), None)
    with pytest.raises(BackendError, match="307"):
        await bench.write(store, "x", pattern(5000))
    assert bench.proxy.requests == 2


# Proxies.


@pytest.fixture
def proxied(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("HTTP_PROXY", bench.proxy.url)
    monkeypatch.setenv("http_proxy", bench.proxy.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return bench


async def test_a_proxy_is_used_and_shown(proxied: Bench) -> None:
    store = await proxied.store(endpoint_url=proxied.server.endpoint, **PARTS)
    sent = pattern(12 * MIB)
    source = await proxied.agent.register(sent)
    assert "proxy" in str(proxied.agent.explain(source[0:5000], store.object("small", 5000)))
    await proxied.agent.transfer(source[0:5000], store.object("small"))
    await proxied.agent.transfer(source, store.object("large"))
    assert_same(await proxied.read(store, "large", len(sent)), sent)
    got = np.zeros(100, np.uint8)
    await proxied.agent.transfer(store.object("small", 5000)[700:800], await proxied.agent.register(got))
    assert_same(got, sent[700:800])
    assert list(await store.exists(["small", "large", "none"])) == [True, True, False]
    with pytest.raises(ConflictError):
        await proxied.write(store, "small", pattern(10), if_none_match=True)
    with pytest.raises(IntegrityError):
        await proxied.read(store, "small", 4000)
    assert {path.partition("/bench/")[0] for _, path in proxied.proxy.seen} == {proxied.server.endpoint}
    assert await proxied.uploads() == []


async def test_through_a_proxy_what_breaks_is_sent_again_or_has_its_type(proxied: Bench) -> None:
    store = await proxied.store(endpoint_url=proxied.server.endpoint, attempts=3)
    await proxied.write(store, "x", pattern(100_000))
    proxied.proxy.inject(Fault(reset_after=50_000), 1)
    assert_same(await proxied.read(store, "x", 100_000), pattern(100_000))
    proxied.proxy.inject(Fault(close_after=50_000), None)
    got = np.zeros(100_000, np.uint8)
    target = await proxied.agent.register(got)
    with pytest.raises(BackendError):
        await proxied.agent.transfer(store.object("x"), target)
    proxied.proxy.clear()
    proxied.proxy.inject(Fault(stall_after=50_000), 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await proxied.agent.transfer(store.object("x"), target)
    await Canary(got).watch()


async def test_no_proxy_for_names_that_are_excepted(proxied: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    store = await proxied.store(endpoint_url=proxied.server.endpoint)
    await proxied.write(store, "x", pattern(1000))
    assert proxied.proxy.requests == 0
    assert "zero-copy" in str(proxied.agent.explain(store.object("x", 1000), await proxied.agent.register(pattern(1000))))


# TLS.


async def test_tls(bench: Bench, tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "127.0.0.1", "localhost")
    async with relay(bench.proxy.port, context) as tls:
        url = f"https://127.0.0.1:{tls.port}"
        store = await bench.store(endpoint_url=url, verify=trusted, **PARTS)
        sent = pattern(12 * MIB)
        await bench.write(store, "large", sent)
        assert_same(await bench.read(store, "large", len(sent)), sent)
        got = np.zeros(12 * MIB, np.uint8)
        target = await bench.agent.register(got)
        pages = np.random.default_rng(3).permutation(3072)
        await bench.agent.transfer(store.object("large"), target.pages(pages, 4096))
        assert_same(got.reshape(3072, -1)[pages].ravel(), sent)
        names = [f"n-{i}" for i in range(40)]
        await bench.agent.transfer(await bench.agent.register(sent[:200_000]), store.objects(names, 5000))
        await bench.agent.transfer(store.objects(names, 5000), target[0:200_000])
        assert_same(got[:200_000], sent[:200_000])
        # What breaks, and what is cancelled.
        for fault in (Fault(reset_after=MIB), Fault(close_after=MIB), Fault(chunked=70_000), Fault(half_close_after=MIB)):
            bench.proxy.inject(fault)
            assert_same(await bench.read(store, "large", len(sent)), sent)
        bench.proxy.inject(Fault(stall_after=MIB))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await bench.agent.transfer(store.object("large"), target)
        await Canary(got).watch()
        # Bodies are not hashed under TLS.
        assert any("x-amz-content-sha256: unsigned-payload" in head for head in tls.heads())


async def test_a_certificate_that_is_not_trusted_is_refused_at_once(bench: Bench, tmp_path: Path) -> None:
    context, trusted = certificate(tmp_path, "example.com")
    async with relay(bench.proxy.port, context) as tls:
        url = f"https://127.0.0.1:{tls.port}"
        for options in ({"verify": trusted}, {}):
            store = await bench.store(endpoint_url=url, **options)
            with pytest.raises(BackendError, match="certificate"):
                await bench.write(store, "x", pattern(100))
        assert tls.connections == 0
        store = await bench.store(endpoint_url=url, verify=False)
        await bench.write(store, "x", pattern(100))
        assert_same(await bench.read(store, "x", 100), pattern(100))
        with pytest.raises(ConfigurationError, match="cannot be read"):
            await bench.store(endpoint_url=url, verify=str(tmp_path / "missing.pem"))


async def test_authorities_that_the_environment_names(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, trusted = certificate(tmp_path, "127.0.0.1")
    monkeypatch.setenv("AWS_CA_BUNDLE", trusted)
    async with relay(bench.proxy.port, context) as tls:
        store = await bench.store(endpoint_url=f"https://127.0.0.1:{tls.port}")
        await bench.write(store, "x", pattern(100))
        assert [found.key async for found in store.list()] == ["x"]


# Options on the wire.


async def test_requester_pays_goes_with_every_request(bench: Bench) -> None:
    async with relay(bench.proxy.port) as wire:
        store = await bench.store(endpoint_url=f"http://127.0.0.1:{wire.port}", requester_pays=True, **PARTS)
        await bench.write(store, "a", pattern(100))
        await bench.write(store, "large", pattern(11 * MIB))
        await bench.read(store, "large", 11 * MIB)
        await store.exists(["a", "b"])
        assert len([found async for found in store.list()]) == 2
        await store.delete(["a", "large"])
        heads = wire.heads()
        assert {head.split()[0] for head in heads} == {"put", "post", "get", "head"}
        assert len(heads) >= 10
        assert [head for head in heads if "x-amz-request-payer: requester" not in head] == []


async def test_server_side_encryption(bench: Bench) -> None:
    store = await bench.store(sse="AES256", **PARTS)
    for key, nbytes in (("small", 5000), ("large", 11 * MIB)):
        await bench.write(store, key, pattern(nbytes))
        head = await bench.client.head_object(Bucket="bench", Key=bench.prefix + key)
        assert head["ServerSideEncryption"] == "AES256"
        assert_same(await bench.read(store, key, nbytes), pattern(nbytes))


async def test_a_key_of_the_callers(bench: Bench) -> None:
    key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    store = await bench.store(sse_customer_key=key, **PARTS)
    for name, nbytes in (("small", 5000), ("large", 11 * MIB)):
        await bench.write(store, name, pattern(nbytes))
        assert_same(await bench.read(store, name, nbytes), pattern(nbytes))
        assert list(await store.exists([name])) == [True]
    with pytest.raises((BackendError, AccessError)):
        await bench.read(await bench.store(), "small", 5000)


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({"addressing": "path"}, "localhost:1234"),
        ({"addressing": "virtual"}, "bench.localhost:1234"),
        ({"endpoint_url": None, "region": "eu-west-1"}, "bench.s3.eu-west-1.amazonaws.com"),
        ({"endpoint_url": None, "region": "eu-west-1", "addressing": "path"}, "s3.eu-west-1.amazonaws.com"),
        ({"endpoint_url": "https://storage.googleapis.com", "region": "auto", "addressing": "path"}, "storage.googleapis.com"),
        (
            {"endpoint_url": "https://x.r2.cloudflarestorage.com", "region": "auto", "addressing": "virtual"},
            "bench.x.r2.cloudflarestorage.com",
        ),
    ],
)
async def test_where_requests_go(bench: Bench, options: dict[str, Any], host: str) -> None:
    given = {"endpoint_url": "http://localhost:1234", "addressing": "auto", **options}
    store = await bench.store(**given)
    shown = str(bench.agent.explain(store.object("x", 1000), await bench.agent.register(pattern(1000))))
    assert f"zero-copy HTTP to {host}" in shown


async def test_more_keys_than_a_page_or_a_request_hold(bench: Bench) -> None:
    store = await bench.store(payload="unsigned")
    names = [f"many/{i:04d}" for i in range(1010)]
    await bench.agent.transfer(await bench.agent.register(pattern(1010)), store.objects(names, 1))
    assert [found.key async for found in store.list("many/")] == names
    assert all(await store.exists(names))
    await store.delete(names)
    assert [found async for found in store.list("many/")] == []


async def test_anonymous_requests_are_not_signed(bench: Bench) -> None:
    async with relay(bench.proxy.port) as wire:
        given = {"access_key": None, "secret_key": None, "anonymous": True, "endpoint_url": f"http://127.0.0.1:{wire.port}"}
        store = await bench.store(**given)
        with pytest.raises(AccessError, match="403"):
            await bench.write(store, "x", pattern(10))
        assert [head for head in wire.heads() if "authorization:" in head] == []


async def test_counts(bench: Bench) -> None:
    store = await bench.store()
    backend = store._backend
    assert isinstance(backend, S3Backend)
    bench.proxy.inject(internal_error(), 2)
    await bench.write(store, "x", pattern(10))
    assert backend.counts == {"requests": 3, "retries": 2, "failed": 0, "connections": 1}


async def test_closing_while_objects_are_on_their_way(bench: Bench) -> None:
    store = await bench.store()
    await bench.write(store, "x", pattern(100_000))
    got = np.zeros(100_000, np.uint8)
    bench.proxy.inject(Fault(stall_after=1000))
    transfer = bench.agent.submit(store.object("x"), await bench.agent.register(got))
    async with asyncio.timeout(10):
        while not bench.proxy.faulted:
            await asyncio.sleep(0.01)
    await bench.agent.aclose()
    await asyncio.wait([asyncio.ensure_future(_outcome(transfer))])
    await Canary(got).watch()


async def _outcome(transfer: Any) -> None:
    try:
        await transfer
    except (asyncio.CancelledError, Exception):
        return


def test_wrong_options_are_refused() -> None:
    for wrong in (
        {"addressing": "round"},
        {"checksum": "md5"},
        {"part_nbytes": 1000},
        {"multipart_nbytes": 6 << 30},
        {"attempts": 0},
        {"access_key": "a"},
        {"sse_customer_key": "short"},
        {"sse": "rot13"},
        {"nothing": 1},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            S3Backend(**wrong)


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(S3Options(access_key="id", secret_key="hidden", session_token="hidden"))
