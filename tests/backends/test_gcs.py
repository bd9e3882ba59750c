"""Google Cloud Storage against its emulator, through a proxy that breaks things: what is lost, damaged, refused or cancelled.

The emulator closes every connection, knows no conditions and tells no generations; what those do, the proxy answers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from nixl_async import (
    AccessError,
    Agent,
    BackendError,
    ConfigurationError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    TransferError,
)
from nixl_async.backends import gcs
from nixl_async.backends.gcs import GCSBackend
from nixl_async.backends.gcs_data import BucketData, digest
from nixl_async.backends.gcs_upload import QUANTUM_NBYTES, PieceUpload
from nixl_async.testing.patterns import CANARY, Canary, assert_same, pattern
from nixl_async.testing.proxy import Answer, Fault, FaultProxy
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix

SMALL_NBYTES = 100_000
LARGE_NBYTES = 3 * QUANTUM_NBYTES + 77
PIECES = {"piece_nbytes": QUANTUM_NBYTES}
PATIENCE_SECONDS = 30.0
# The server has done what was asked, and its answer never arrives whole.
LOST = Fault(length_off=100)


def refusal(status: int, words: str = "The test says so") -> Fault:
    return Fault(answer=Answer(status, "Refused", body=f'{{"error": {{"message": "{words}"}}}}'.encode()))


@pytest.fixture
async def proxy(gcs_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", gcs_server.port) as proxy:
        yield proxy


@pytest.fixture
def backend(proxy: FaultProxy) -> GCSBackend:
    return GCSBackend(api_root=proxy.url)


@pytest.fixture
async def agent(backend: GCSBackend) -> AsyncIterator[Agent]:
    async with Agent("gcs", backends=[backend, "memory"]) as agent:
        yield agent


@pytest.fixture
def url() -> str:
    return f"gs://bench/{fresh_prefix()}"


def gets(method: str, path: str) -> bool:
    return method == "GET"


def pieces(method: str, path: str) -> bool:
    return method == "PUT"


def posts(method: str, path: str) -> bool:
    return method == "POST"


READ_FAULTS = {
    "latency": Fault(latency=0.05),
    "chunked": Fault(chunked=7_000),
    "continue": Fault(extra_continue=True),
    "slow": Fault(bytes_per_second=400_000),
    "reset mid-body": Fault(reset_after=40_000),
    "truncated": Fault(close_after=40_000),
    "truncated chunks": Fault(chunked=7_000, close_after=40_000),
    "reset": Fault(drop="reset"),
    "closed": Fault(drop="close"),
    "too long": LOST,
    "500": refusal(500),
    "503": refusal(503),
    "429": refusal(429),
}
HARMLESS = ("latency", "chunked", "continue", "slow")


@pytest.mark.parametrize("name", READ_FAULTS)
async def test_reads_outlast(name: str, agent: Agent, backend: GCSBackend, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    sent, got = pattern(SMALL_NBYTES), np.full(SMALL_NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    proxy.inject(READ_FAULTS[name], times=2, match=gets)
    one = store.object("o", SMALL_NBYTES)[:] if name in ("chunked", "truncated chunks") else store.object("o")
    await agent.transfer(one, await agent.register(got))
    assert_same(got, sent)
    # What a connection that was used before does not take, aiohttp sends again by itself.
    expected = {0} if name in HARMLESS else {1, 2} if name in ("reset", "closed") else {2}
    assert backend.counts["retries"] in expected


async def test_a_large_read_is_cut(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, **PIECES)
    sent, got = pattern(LARGE_NBYTES), np.full(LARGE_NBYTES + 10, CANARY, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    before = proxy.requests
    proxy.inject(Fault(reset_after=100_000), times=3, match=gets)
    await agent.transfer(store.object("o"), (await agent.register(got))[:LARGE_NBYTES])
    assert_same(got[:-10], sent)
    assert (got[-10:] == CANARY).all()
    # Four pieces, of which the last is too short to be cut off.
    assert proxy.requests - before in (6, 7)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(reset_after=40_000), BackendError, "Client"),
        (Fault(close_after=40_000), BackendError, "Client"),
        (refusal(503), BackendError, "503"),
        (refusal(401), AccessError, "401.*The test says so"),
        (refusal(403), AccessError, "403"),
        (refusal(404), NotFoundError, "404"),
        (Fault(corrupt_response=50_000), IntegrityError, "CRC32C"),
    ],
    ids=["reset", "truncated", "busy", "nobody", "forbidden", "missing", "damaged"],
)
async def test_reads_that_cannot_succeed(
    fault: Fault, kind: type[TransferError], words: str, agent: Agent, proxy: FaultProxy, url: str
) -> None:
    store = await agent.store(url, attempts=2, checksum="crc32c" if fault.corrupt_response else None)
    got = np.full(SMALL_NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(SMALL_NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(fault, times=None, match=gets)
    with pytest.raises(TransferError, match=words) as caught:
        await agent.transfer(store.object("o"), target)
    assert isinstance(caught.value, kind)
    assert caught.value.backend == "gcs"
    await Canary(got).watch()
    proxy.clear()
    await agent.transfer(store.object("o"), target)
    assert_same(got, pattern(SMALL_NBYTES))


@pytest.mark.parametrize("fault", [refusal(503), Fault(drop="reset"), LOST], ids=["busy", "reset", "lost"])
@pytest.mark.parametrize("match", [posts, pieces], ids=["first", "pieces"])
async def test_large_writes_outlast(fault: Fault, match: Any, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, **PIECES)
    sent, got = pattern(LARGE_NBYTES), np.zeros(LARGE_NBYTES, np.uint8)
    proxy.inject(fault, match=match)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert proxy.faulted == 1
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)


@pytest.mark.parametrize("fault", [refusal(503), Fault(drop="reset"), LOST], ids=["busy", "reset", "lost"])
async def test_small_writes_outlast(fault: Fault, agent: Agent, backend: GCSBackend, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    sent, got = pattern(SMALL_NBYTES), np.zeros(SMALL_NBYTES, np.uint8)
    proxy.inject(fault, times=2, match=posts)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert backend.counts["retries"] == 2
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)


@pytest.mark.parametrize("nbytes", [SMALL_NBYTES, LARGE_NBYTES])
async def test_what_is_damaged_on_its_way_is_sent_again(nbytes: int, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, checksum="crc32c", **PIECES)
    sent, got = pattern(nbytes), np.zeros(nbytes, np.uint8)
    proxy.inject(Fault(corrupt_request=50_000), match=posts if nbytes == SMALL_NBYTES else pieces)
    await agent.transfer(await agent.register(sent), store.object("o"))
    if nbytes == SMALL_NBYTES:
        proxy.inject(Fault(corrupt_response=50_000), match=gets)
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)
    assert not proxy._injections


@pytest.mark.parametrize("nbytes", [SMALL_NBYTES, LARGE_NBYTES])
async def test_what_is_always_damaged_is_refused(nbytes: int, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, checksum="crc32c", attempts=2, **PIECES)
    proxy.inject(Fault(corrupt_request=50_000), times=None, match=posts if nbytes == SMALL_NBYTES else pieces)
    with pytest.raises(IntegrityError, match="doesn't match"):
        await agent.transfer(await agent.register(pattern(nbytes)), store.object("o"))
    proxy.clear()
    assert await store.exists(["o"]) == [False]


@pytest.mark.parametrize("nbytes", [SMALL_NBYTES, LARGE_NBYTES])
async def test_a_conditional_put(nbytes: int, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, **PIECES)
    memory = await agent.register(pattern(nbytes))
    await agent.transfer(memory, store.object("o", if_none_match=True))
    assert any("ifGenerationMatch=0" in path for _, path in proxy.seen)
    proxy.inject(refusal(412, "conditionNotMet"), match=posts)
    with pytest.raises(ConflictError, match="412"):
        await agent.transfer(memory, store.object("o", if_none_match=True))


async def test_a_conditional_put_whose_answer_is_lost_is_no_conflict(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    memory = await agent.register(pattern(SMALL_NBYTES))
    # The second attempt finds the first one's object, or somebody else's.
    proxy.inject(LOST, match=posts)
    proxy.inject(refusal(412), match=posts)
    await agent.transfer(memory, store.object("o", if_none_match=True))
    proxy.inject(refusal(503), match=posts)
    proxy.inject(refusal(412), match=posts)
    with pytest.raises(ConflictError):
        await agent.transfer(memory, store.object("o", if_none_match=True))
    assert not proxy._injections


# Cancelling, and uploads by pieces.


@pytest.mark.parametrize("fault", [Fault(stall_after=40_000), Fault(latency=20.0)], ids=["stalls", "late"])
async def test_a_cancelled_read_leaves_memory_alone(fault: Fault, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    got = np.full(SMALL_NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(SMALL_NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(fault, match=gets)
    task = asyncio.create_task(agent.transfer(store.object("o"), target))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not proxy.faulted or (not fault.latency and (got == CANARY).all()):
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await Canary(got).watch()


async def test_a_cancelled_large_write_shows_nothing_and_ends_its_session(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, **PIECES)
    memory = await agent.register(pattern(LARGE_NBYTES))
    arrived = asyncio.Event()
    proxy.inject(Fault(latency=20.0), match=lambda method, path: pieces(method, path) and bool(arrived.set() or True))
    task = asyncio.create_task(agent.transfer(memory, store.object("o")))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.exists(["o"]) == [False]
    assert "DELETE" in [method for method, _ in proxy.seen]


async def test_pieces_that_come_out_of_order(agent: Agent, backend: GCSBackend, url: str) -> None:
    store = await agent.store(url, **PIECES)
    sent, got = pattern(LARGE_NBYTES), np.zeros(LARGE_NBYTES, np.uint8)
    (bucket,) = backend._buckets.values()
    upload = PieceUpload(bucket, f"{store.address.prefix}o", LARGE_NBYTES, False)
    cuts = [memoryview(sent)[at : at + QUANTUM_NBYTES] for at in range(0, LARGE_NBYTES, QUANTUM_NBYTES)]
    await asyncio.gather(*(upload.put_views(number, [cuts[number]]) for number in (2, 3, 1, 0)))
    assert await store.exists(["o"]) == [False]
    await upload.finish()
    await upload.abort()
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)


async def test_sizes_of_pieces(agent: Agent, backend: GCSBackend, url: str) -> None:
    store = await agent.store(url)
    for asked, found in ((None, 8 << 20), (1, QUANTUM_NBYTES), (600_000, 2 * QUANTUM_NBYTES), (1 << 30, 8 << 20)):
        assert (await backend.upload(store.address, "o", 1 << 30, max_piece_nbytes=asked)).piece_nbytes == found


# Questions and options.


async def test_questions_outlast_a_busy_server(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    await agent.transfer(await agent.register(pattern(100)), store.object("o"))
    for fault in (refusal(503), Fault(drop="reset"), Fault(close_after=20)):
        proxy.inject(fault)
        assert await store.exists(["o", "p"]) == [True, False]
        proxy.inject(fault)
        assert [found.key async for found in store.list()] == ["o"]
    proxy.inject(LOST)
    await store.delete(["o"])
    assert await store.exists(["o"]) == [False]
    proxy.inject(refusal(403), times=None)
    for asking in (store.exists(["o"]), store.delete(["o"]), anext(aiter(store.list()))):
        with pytest.raises(AccessError, match="403"):
            await asking


async def test_long_listings(agent: Agent, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "LISTED_AT_ONCE", 8)
    store = await agent.store(url)
    names = [f"{i:03d}" for i in range(20)]
    await agent.transfer(await agent.register(pattern(200)), store.objects(names, 10))
    assert [found.key async for found in store.list()] == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checksum": "md5"}, "checksum='md5'; it must be None or 'crc32c'"),
        ({"attempts": 0}, "attempts=0; it must be a positive integer"),
        ({"piece_nbytes": 1.5}, "piece_nbytes=1.5"),
        ({"api_root": None, "service_file": "/nowhere/key.json"}, "/nowhere/key.json"),
    ],
)
async def test_options_that_make_no_sense(options: dict[str, Any], words: str, agent: Agent, url: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        await agent.store(url, **options)


async def test_a_bucket_that_does_not_exist(agent: Agent) -> None:
    store = await agent.store("gs://nowhere/")
    memory = await agent.register(np.zeros(10, np.uint8))
    for asking in (agent.transfer(memory, store.object("o")), agent.transfer(store.object("o"), memory)):
        with pytest.raises(NotFoundError):
            await asking


async def test_where_the_bytes_go_is_told(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    told = str(agent.explain(await agent.register(np.zeros(10, np.uint8)), store.object("o", 10)))
    assert f"gcloud-aio-storage to {proxy.url}" in told


@pytest.mark.parametrize("n_changes", [1, 5])
async def test_a_read_by_several_requests_is_of_one_version(
    n_changes: int, agent: Agent, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await agent.store(url, **PIECES)
    region = await agent.register(pattern(LARGE_NBYTES))
    await agent.transfer(region, store.object("o"))
    # The emulator tells no generations: of each four answers, the last is of a newer one for a while.
    get, n_got = BucketData.get, 0

    async def told(self: BucketData, *arguments: Any) -> str:
        nonlocal n_got
        await get(self, *arguments)
        n_got += 1
        return f"{n_got // 4}" if n_got <= 4 * n_changes else "the last"

    monkeypatch.setattr(BucketData, "get", told)
    if n_changes == 1:
        await agent.transfer(store.object("o"), region)
        assert n_got == 8
    else:
        with pytest.raises(BackendError, match="was put again"):
            await agent.transfer(store.object("o"), region)


def test_the_checksum_is_googles() -> None:
    # The check value of CRC-32C is 0xE3069283.
    assert digest([memoryview(b"1234"), memoryview(b"56789")]) == "4waSgw=="


# Credentials: a service account's key, for which a server of ours gives out tokens.


@pytest.fixture(scope="module")
def private_key() -> str:
    # Made by the library that signs with it; not on the loop: it takes a while.
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    pem: bytes = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem.decode()


class Tokens:
    """Gives out tokens; `status` is what it answers with."""

    def __init__(self) -> None:
        self.given = 0
        self.status = 200

    async def __call__(self, request: web.Request) -> web.Response:
        await request.read()
        self.given += 1
        return web.json_response({"access_token": f"token {self.given}", "expires_in": 3600}, status=self.status)


@pytest.fixture
async def tokens(private_key: str, tmp_path: Path, proxy: FaultProxy) -> AsyncIterator[tuple[Tokens, GCSBackend]]:
    """The tokens, and a backend that needs them."""
    tokens = Tokens()
    runner = web.ServerRunner(web.Server(tokens))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    account = {
        "type": "service_account",
        "client_email": "test@example.com",
        "private_key": private_key,
        "private_key_id": "1",
        "token_uri": f"http://{host}:{port}/token",
    }
    path = tmp_path / "account.json"
    path.write_text(json.dumps(account))
    yield tokens, GCSBackend(api_root=proxy.url, authenticate=True, service_file=str(path), **PIECES)
    await runner.cleanup()


async def test_a_refused_token_is_renewed_once_for_all(tokens: tuple[Tokens, GCSBackend], proxy: FaultProxy, url: str) -> None:
    given, backend = tokens
    async with Agent("gcs", backends=[backend, "memory"]) as agent:
        source, target = pattern(8 * SMALL_NBYTES, 3), np.zeros(8 * SMALL_NBYTES, np.uint8)
        region, other = await agent.register(source), await agent.register(target)
        store = await agent.store(url)
        keys = [f"{number}" for number in range(8)]
        pages = np.arange(8)
        await agent.transfer(region.pages(pages, SMALL_NBYTES), store.objects(keys, SMALL_NBYTES))
        assert given.given == 1
        proxy.inject(refusal(401), times=8, match=gets)
        await agent.transfer(store.objects(keys, SMALL_NBYTES), other.pages(pages, SMALL_NBYTES))
        assert_same(target, source)
        assert given.given == 2
        assert backend.counts["retries"] == 8
        proxy.inject(refusal(401), match=pieces)
        large = await agent.register(pattern(LARGE_NBYTES, 4))
        await agent.transfer(large, store.objects(["large"], LARGE_NBYTES))
        assert given.given == 3


async def test_a_token_that_stays_refused_is_an_error(tokens: tuple[Tokens, GCSBackend], proxy: FaultProxy, url: str) -> None:
    given, backend = tokens
    async with Agent("gcs", backends=[backend, "memory"]) as agent:
        region = await agent.register(pattern(SMALL_NBYTES, 3))
        store = await agent.store(url)
        proxy.inject(refusal(401), times=None)
        with pytest.raises(AccessError, match="401"):
            await agent.transfer(region, store.objects(["a"], SMALL_NBYTES))
        # It was got for this very transfer, and another would be no better.
        assert given.given == 1
