"""What servers and networks do to Google's requests, beyond test_gcs: silence, dribbles, bursts, wrong lengths, and cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

from nixl_async import AccessError, Agent, BackendError, IntegrityError, TransferError
from nixl_async.backends.gcs import GCSBackend
from nixl_async.backends.gcs_upload import QUANTUM_NBYTES
from nixl_async.testing.patterns import CANARY, POISON, Canary, assert_same, pattern
from nixl_async.testing.proxy import Answer, Fault, FaultProxy
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix

SMALL_NBYTES = 100_000
LARGE_NBYTES = 2 * QUANTUM_NBYTES + 50_077
PIECES = {"piece_nbytes": QUANTUM_NBYTES}
PATIENCE_SECONDS = 30.0


def refusal(status: int, *, early: bool = False) -> Fault:
    return Fault(answer=Answer(status, "Refused", body=b'{"error": {"message": "The test says so"}}'), early=early)


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


def puts(method: str, path: str) -> bool:
    return method in ("POST", "PUT")


def pieces(method: str, path: str) -> bool:
    return method == "PUT"


READ_FAULTS = {
    "too short": Fault(length_off=-100),
    "half-closed": Fault(half_close_after=40_000),
    "truncated at once": Fault(close_after=0),
    "closing": Fault(connection_close=True),
    "408": refusal(408),
    "502": refusal(502),
    "504": refusal(504),
    "503 early": refusal(503, early=True),
    "silent": Fault(stall_after=40_000),
    "silent at once": Fault(stall_after=0),
    "dribbling": Fault(bytes_per_second=20_000),
}


@pytest.mark.parametrize("large", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", READ_FAULTS)
async def test_reads_outlast(name: str, large: bool, agent: Agent, backend: GCSBackend, proxy: FaultProxy, url: str) -> None:
    nbytes = LARGE_NBYTES if large else SMALL_NBYTES
    # What is silent is waited for so long; a busy machine's emulator must not seem to be.
    silent = name in ("silent", "silent at once", "dribbling")
    store = await agent.store(url, timeout=2 if silent else 5, **PIECES)
    sent, got = pattern(nbytes), np.full(nbytes + 10, CANARY, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    one = store.object("o", nbytes)[:]
    proxy.inject(READ_FAULTS[name], match=gets)
    await agent.transfer(one, (await agent.register(got))[:nbytes])
    assert_same(got[:nbytes], sent)
    assert (got[nbytes:] == CANARY).all()
    assert proxy.faulted == 1
    assert backend.counts["retries"] == (0 if name == "closing" else 1)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(length_off=100), BackendError, "Client"),
        (Fault(length_off=-100), BackendError, "malformed|more than|ends early"),
        (Fault(stall_after=40_000), BackendError, "Timeout"),
        (Fault(bytes_per_second=20_000), BackendError, "Timeout"),
        (refusal(500), BackendError, "500"),
        (refusal(401), AccessError, "401.*The test says so"),
    ],
    ids=["long", "short", "silent", "dribbling", "error", "expired"],
)
async def test_reads_that_cannot_succeed(
    fault: Fault, kind: type[TransferError], words: str, agent: Agent, proxy: FaultProxy, url: str
) -> None:
    store = await agent.store(url, attempts=2, timeout=1)
    got = np.full(SMALL_NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(SMALL_NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(fault, times=None, match=gets)
    with pytest.raises(kind, match=words) as caught:
        await agent.transfer(store.object("o", SMALL_NBYTES)[:], target)
    assert caught.value.backend == "gcs"
    await Canary(got).watch()
    proxy.clear()
    await agent.transfer(store.object("o"), target)
    assert_same(got, pattern(SMALL_NBYTES))


WRITE_FAULTS = {
    "latency": Fault(latency=0.05),
    "closing": Fault(connection_close=True),
    "continue": Fault(extra_continue=True),
    "chunked": Fault(chunked=100),
    "reset": Fault(drop="reset"),
    "closed": Fault(drop="close"),
    "answer lost": Fault(length_off=100),
    "no answer": Fault(latency=5.0),
    "silent": Fault(stall_after=0),
    "408": refusal(408),
    "500": refusal(500),
    "503 early": refusal(503, early=True),
}


@pytest.mark.parametrize("large", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", WRITE_FAULTS)
async def test_writes_outlast(name: str, large: bool, agent: Agent, proxy: FaultProxy, url: str) -> None:
    nbytes = LARGE_NBYTES if large else SMALL_NBYTES
    store = await agent.store(url, timeout=1, **PIECES)
    sent, got = pattern(nbytes), np.zeros(nbytes, np.uint8)
    proxy.inject(WRITE_FAULTS[name], match=pieces if large else puts)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert proxy.faulted == 1
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)


async def test_bursts_of_errors(agent: Agent, backend: GCSBackend, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    names = [f"o{number}" for number in range(20)]
    sent, got = pattern(20 * 5000), np.zeros(20 * 5000, np.uint8)
    for fault in (refusal(503), refusal(500)):
        proxy.inject(fault, times=20, match=puts)
    await agent.transfer(await agent.register(sent), store.objects(names, 5000))
    for fault in (refusal(500), refusal(503)):
        proxy.inject(fault, times=20, match=gets)
    await agent.transfer(store.objects(names, 5000), await agent.register(got))
    assert_same(got, sent)
    assert proxy.faulted == backend.counts["retries"] == 80


@pytest.mark.parametrize("large", [False, True], ids=["whole", "pieces"])
async def test_writes_that_cannot_succeed_leave_what_was_there(large: bool, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, attempts=2, **PIECES)
    old, got = pattern(100, 3), np.zeros(100, np.uint8)
    await agent.transfer(await agent.register(old), store.object("o"))
    proxy.inject(refusal(401), times=None, match=puts)
    with pytest.raises(AccessError, match="401"):
        await agent.transfer(await agent.register(pattern(LARGE_NBYTES if large else SMALL_NBYTES)), store.object("o"))
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, old)


async def test_damage_in_a_page_read_of_a_whole_object_is_noticed(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, checksum="crc32c", attempts=2)
    sent, got = pattern(SMALL_NBYTES), np.zeros(SMALL_NBYTES, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    target = await agent.register(got)
    proxy.inject(Fault(corrupt_response=50_000), match=gets)
    await agent.transfer(store.object("o"), target)
    assert_same(got, sent)
    proxy.inject(Fault(corrupt_response=50_000), times=None, match=gets)
    with pytest.raises(IntegrityError, match="CRC32C"):
        await agent.transfer(store.object("o"), target)


@pytest.mark.parametrize("large", [False, True], ids=["whole", "pieces"])
async def test_a_cancelled_write_sends_nothing_that_comes_later(
    large: bool, agent: Agent, proxy: FaultProxy, url: str
) -> None:
    nbytes = LARGE_NBYTES if large else SMALL_NBYTES
    store = await agent.store(url, **PIECES)
    sent, again, got = pattern(nbytes), pattern(nbytes, 7), np.zeros(nbytes, np.uint8)
    arrived = asyncio.Event()
    match = pieces if large else puts
    proxy.inject(Fault(latency=20.0), match=lambda method, path: match(method, path) and bool(arrived.set() or True))
    task = asyncio.create_task(agent.transfer(await agent.register(sent), store.object("o")))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sent[:] = POISON
    if large:
        assert await store.exists(["o"]) == [False]
    await agent.transfer(await agent.register(again), store.object("o"))
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, again)


async def test_a_dribbling_read_is_cancelled_at_once(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, **PIECES)
    got = np.full(LARGE_NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(LARGE_NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(Fault(bytes_per_second=20_000), times=3, match=gets)
    task = asyncio.create_task(agent.transfer(store.object("o"), target))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (got == CANARY).all():
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await Canary(got).watch()
    await agent.transfer(store.object("o"), target)
    assert_same(got, pattern(LARGE_NBYTES))
