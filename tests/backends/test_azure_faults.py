"""What servers and networks do to Azure's requests: nothing is lost or damaged, and what cannot succeed fails as what it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from azure.storage.blob import BlobBlock, BlobClient

from nixl_async import AccessError, Agent, BackendError, IntegrityError, TransferError
from nixl_async.backends.azure import AzureBackend
from nixl_async.stores import Store
from nixl_async.testing.patterns import CANARY, POISON, Canary, assert_same, pattern
from nixl_async.testing.proxy import Answer, Fault, FaultProxy
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix

NBYTES = 300_000
RANGE_NBYTES = 100_000
BLOCKS = {"block_threshold_nbytes": 100_000, "block_nbytes": 100_000}
PATIENCE_SECONDS = 30.0


def refusal(status: int, code: str, *, early: bool = False, retry_after: str = "") -> Fault:
    """Answer as Azure does when it refuses."""
    headers = (("x-ms-error-code", code), ("Retry-After", retry_after)) if retry_after else (("x-ms-error-code", code),)
    body = f'<?xml version="1.0"?>\n<Error><Code>{code}</Code><Message>The test says so.\nTime: now</Message></Error>'
    return Fault(answer=Answer(status, code, headers, body.encode()), early=early)


@pytest.fixture
async def proxy(azure_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", azure_server.port) as proxy:
        yield proxy


@pytest.fixture
def backend(proxy: FaultProxy, azure_server: Server) -> AzureBackend:
    text = azure_server.connection_string.replace(f":{azure_server.port}/", f":{proxy.port}/")
    return AzureBackend(connection_string=text, range_nbytes=RANGE_NBYTES)


@pytest.fixture
async def agent(backend: AzureBackend) -> AsyncIterator[Agent]:
    async with Agent("faults", backends=[backend, "memory"]) as agent:
        yield agent


@pytest.fixture
def url() -> str:
    return f"az://bench/{fresh_prefix()}"


def blob(server: Server, store: Store, key: str) -> BlobClient:
    """Return the SDK's client of a blob, which goes to the server directly."""
    return BlobClient.from_connection_string(server.connection_string, "bench", store.address.prefix + key)


def download(server: Server, store: Store, key: str) -> bytes:
    with blob(server, store, key) as client:
        return bytes(client.download_blob().readall())


def upload(server: Server, store: Store, key: str, data: bytes) -> None:
    with blob(server, store, key) as client:
        client.upload_blob(data, overwrite=True)


def gets(method: str, path: str) -> bool:
    return method == "GET"


def puts(method: str, path: str) -> bool:
    return method == "PUT"


def commits(method: str, path: str) -> bool:
    return "comp=blocklist" in path


# The server has done what was asked, and its answer never arrives whole.
LOST = Fault(length_off=100)

# Faults that an attempt survives, and those that cost one.
HARMLESS = {
    "latency": Fault(latency=0.05),
    "chunked": Fault(chunked=7_000),
    "closing": Fault(connection_close=True),
    "continue": Fault(extra_continue=True),
    "slow": Fault(bytes_per_second=400_000),
}
COSTLY = {
    "reset mid-body": Fault(reset_after=40_000),
    "truncated": Fault(close_after=40_000),
    "truncated at once": Fault(close_after=0),
    "half-closed": Fault(half_close_after=40_000),
    "truncated chunks": Fault(chunked=7_000, close_after=40_000),
    "reset": Fault(drop="reset"),
    "closed": Fault(drop="close"),
    "too long": Fault(length_off=100),
    "too short": Fault(length_off=-100),
    "500": refusal(500, "InternalError"),
    "503": refusal(503, "ServerBusy"),
    "503 with a time": refusal(503, "ServerBusy", retry_after="0"),
    "503 early": refusal(503, "ServerBusy", early=True),
    "408": refusal(408, "RequestTimeout"),
    "silent": Fault(stall_after=40_000),
    "silent at once": Fault(stall_after=0),
}


@pytest.mark.parametrize("name", [*HARMLESS, *COSTLY])
async def test_reads_outlast(name: str, agent: Agent, backend: AzureBackend, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url, read_timeout=0.5)
    sent, got = pattern(NBYTES), np.full(NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    proxy.inject({**HARMLESS, **COSTLY}[name], times=2, match=gets)
    before = backend.counts["retries"]
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)
    assert proxy.faulted == 2
    # An idle connection that ends is no attempt.
    if name in COSTLY and "closed" != name != "reset":
        assert backend.counts["retries"] - before == 2
    if name in HARMLESS:
        assert backend.counts["retries"] == before


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Fault(reset_after=40_000), BackendError, "broke"),
        (Fault(close_after=40_000), BackendError, "after 40000 bytes"),
        (Fault(length_off=100), BackendError, "Content-Length 100100"),
        (Fault(length_off=-100), BackendError, "Content-Length 99900"),
        (Fault(stall_after=40_000), BackendError, "silent"),
        (refusal(503, "ServerBusy"), BackendError, "503 ServerBusy"),
        (refusal(500, "InternalError"), BackendError, "500 InternalError The test says so"),
        (refusal(403, "AuthenticationFailed"), AccessError, "403 AuthenticationFailed"),
        (refusal(403, "AuthorizationPermissionMismatch"), AccessError, "AuthorizationPermissionMismatch"),
        (refusal(409, "BlobIsArchived"), BackendError, "409 BlobIsArchived"),
        (Fault(corrupt_response=70_000), IntegrityError, "MD5|md5"),
    ],
    ids=["reset", "truncated", "long", "short", "silent", "busy", "error", "expired", "forbidden", "archived", "damaged"],
)
async def test_reads_that_cannot_succeed(
    fault: Fault, kind: type[TransferError], words: str, agent: Agent, proxy: FaultProxy, url: str
) -> None:
    store = await agent.store(url, read_timeout=0.5, attempts=2, checksum="md5" if fault.corrupt_response else None)
    got = np.full(NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(fault, times=None, match=gets)
    with pytest.raises(TransferError, match=words) as caught:
        await agent.transfer(store.object("o"), target)
    assert type(caught.value) is kind
    assert caught.value.backend == "azure"
    await Canary(got).watch()
    proxy.clear()
    await agent.transfer(store.object("o"), target)
    assert_same(got, pattern(NBYTES))


WRITE_FAULTS = {
    "latency": Fault(latency=0.05),
    "closing": Fault(connection_close=True),
    "continue": Fault(extra_continue=True),
    "chunked": Fault(chunked=100),
    "reset": Fault(drop="reset"),
    "closed": Fault(drop="close"),
    "answer lost": LOST,
    "no answer": Fault(latency=5.0),
    "500": refusal(500, "OperationTimedOut"),
    "503": refusal(503, "ServerBusy"),
    "503 early": refusal(503, "ServerBusy", early=True),
    "expired": refusal(403, "AuthenticationFailed"),
    "expired early": refusal(403, "AuthenticationFailed", early=True),
}


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", WRITE_FAULTS)
async def test_writes_outlast(
    name: str, blocks: bool, agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, read_timeout=0.5, **BLOCKS if blocks else {})
    sent = pattern(NBYTES)
    proxy.inject(WRITE_FAULTS[name], match=puts)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert proxy.faulted == 1
    assert download(azure_server, store, "o") == sent.tobytes()


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("checksum", ["md5", "crc64"])
async def test_what_is_damaged_on_its_way_is_sent_again(
    checksum: str, blocks: bool, agent: Agent, backend: AzureBackend, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, checksum=checksum, **BLOCKS if blocks else {})
    sent, got = pattern(NBYTES), np.zeros(NBYTES, np.uint8)
    proxy.inject(Fault(corrupt_request=50_000), times=2, match=puts)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert backend.counts["retries"] == 2
    assert download(azure_server, store, "o") == sent.tobytes()
    proxy.inject(Fault(corrupt_response=50_000), times=2, match=gets)
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)
    got[:] = 0
    await agent.transfer(store.object("o", NBYTES)[70_001:80_002], (await agent.register(got))[:10_001])
    assert_same(got[:10_001], sent[70_001:80_002])


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
async def test_what_is_always_damaged_is_refused(
    blocks: bool, agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, checksum="md5", attempts=2, **BLOCKS if blocks else {})
    upload(azure_server, store, "o", b"old")
    proxy.inject(Fault(corrupt_request=50_000), times=None, match=puts)
    with pytest.raises(TransferError, match="Md5Mismatch") as caught:
        await agent.transfer(await agent.register(pattern(NBYTES)), store.object("o"))
    assert type(caught.value) is IntegrityError
    assert download(azure_server, store, "o") == b"old"


@pytest.mark.parametrize("fault", [Fault(drop="reset"), refusal(503, "ServerBusy"), LOST], ids=["reset", "busy", "lost"])
async def test_writes_that_cannot_succeed(
    fault: Fault, agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, attempts=2, **BLOCKS)
    upload(azure_server, store, "o", b"old")
    proxy.inject(fault, times=None, match=puts)
    with pytest.raises(BackendError) as caught:
        await agent.transfer(await agent.register(pattern(NBYTES)), store.object("o"))
    assert type(caught.value) is BackendError
    assert download(azure_server, store, "o") == b"old"


async def test_an_error_costs_no_more_attempts_than_it_should(
    agent: Agent, backend: AzureBackend, proxy: FaultProxy, url: str
) -> None:
    store = await agent.store(url, attempts=3)
    proxy.inject(refusal(503, "ServerBusy"), times=None)
    with pytest.raises(BackendError):
        await agent.transfer(await agent.register(pattern(100)), store.object("o"))
    assert proxy.requests == 3
    assert backend.counts == {"requests": 3, "retries": 2, "failed": 1, "connections": 1}


# Questions.


async def test_questions_outlast_a_busy_server(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    await agent.transfer(await agent.register(pattern(100)), store.object("o"))
    proxy.inject(refusal(503, "ServerBusy"))
    assert await store.exists(["o"]) == [True]
    proxy.inject(Fault(drop="reset"))
    assert [found.key async for found in store.list()] == ["o"]
    proxy.inject(Fault(close_after=100), match=gets)
    assert [found.key async for found in store.list()] == ["o"]
    # The answer is lost: the second attempt finds nothing to delete.
    proxy.inject(LOST)
    await store.delete(["o"])
    assert await store.exists(["o"]) == [False]


async def test_questions_that_are_refused(agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    proxy.inject(refusal(403, "AuthorizationFailure"), times=None)
    for asking in (store.exists(["o"]), store.delete(["o"]), anext(aiter(store.list()))):
        with pytest.raises(AccessError, match="403 AuthorizationFailure"):
            await asking


# Cancelling.


@pytest.mark.parametrize(
    "fault", [Fault(stall_after=40_000), Fault(bytes_per_second=20_000), Fault(latency=20.0)], ids=["stalls", "slow", "late"]
)
async def test_a_cancelled_read_leaves_memory_alone(fault: Fault, agent: Agent, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(url)
    got = np.full(NBYTES, CANARY, np.uint8)
    await agent.transfer(await agent.register(pattern(NBYTES)), store.object("o"))
    target = await agent.register(got)
    proxy.inject(fault, times=3, match=gets)
    task = asyncio.create_task(agent.transfer(store.object("o"), target))
    async with asyncio.timeout(PATIENCE_SECONDS):
        # Bytes have arrived, or at least all is asked for.
        while proxy.faulted < 3 or (not fault.latency and (got == CANARY).all()):
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await Canary(got).watch()
    await agent.transfer(store.object("o"), target)
    assert_same(got, pattern(NBYTES))


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
async def test_a_cancelled_write_shows_nothing(
    blocks: bool, agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, **BLOCKS if blocks else {})
    sent = pattern(NBYTES)
    memory = await agent.register(sent)
    # What is sent is held back from the server's answer on: of three blocks two are there.
    arrived = asyncio.Event()
    proxy.inject(Fault(latency=20.0), match=lambda method, path: puts(method, path) and bool(arrived.set() or True))
    task = asyncio.create_task(agent.transfer(memory, store.object("o")))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sent[:] = POISON
    if blocks:
        assert await store.exists(["o"]) == [False]
        assert [found async for found in store.list()] == []
    # The leftovers are no part of what comes next.
    again = pattern(NBYTES, 7)
    await agent.transfer(await agent.register(again), store.object("o"))
    assert download(azure_server, store, "o") == again.tobytes()
    with blob(azure_server, store, "o") as client:
        assert client.get_block_list("uncommitted")[1] == []


# What others do meanwhile, and what a lost answer may have done.


async def test_a_read_by_several_requests_is_of_one_version(
    agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, concurrency=1)
    old, new, got = pattern(NBYTES, 1), pattern(NBYTES, 2), np.zeros(NBYTES, np.uint8)
    await agent.transfer(await agent.register(old), store.object("o"))
    n_gets = 0

    def replace(method: str, path: str) -> bool:
        nonlocal n_gets
        n_gets += gets(method, path)
        if n_gets == 2:
            upload(azure_server, store, "o", new.tobytes())
        return False

    proxy.inject(Fault(), times=None, match=replace)
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, new)
    assert n_gets == 6


async def test_a_read_of_what_never_rests_fails(agent: Agent, proxy: FaultProxy, azure_server: Server, url: str) -> None:
    store = await agent.store(url, concurrency=1, attempts=2)
    await agent.transfer(await agent.register(pattern(NBYTES)), store.object("o"))

    def replace(method: str, path: str) -> bool:
        if gets(method, path):
            upload(azure_server, store, "o", pattern(NBYTES, 3).tobytes())
        return False

    proxy.inject(Fault(), times=None, match=replace)
    with pytest.raises(BackendError, match="was put again"):
        await agent.transfer(store.object("o"), await agent.register(np.zeros(NBYTES, np.uint8)))


async def test_blocks_that_another_put_drops_are_sent_again(
    agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, **BLOCKS)
    sent = pattern(NBYTES)
    others = iter([b"of somebody else"])

    def interfere(method: str, path: str) -> bool:
        if commits(method, path) and (other := next(others, None)) is not None:
            with blob(azure_server, store, "o") as client:
                # Names of one length: the service insists.
                client.stage_block("0" * 25, other)
                client.commit_block_list([BlobBlock("0" * 25)])
        return False

    proxy.inject(Fault(), times=None, match=interfere)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert download(azure_server, store, "o") == sent.tobytes()
    assert sum(commits(*one) for one in proxy.seen) == 2


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
async def test_a_conditional_put_whose_answer_is_lost_is_no_conflict(
    blocks: bool, agent: Agent, proxy: FaultProxy, azure_server: Server, url: str
) -> None:
    store = await agent.store(url, **BLOCKS if blocks else {})
    sent = pattern(NBYTES)
    memory = await agent.register(sent)
    proxy.inject(LOST, match=commits if blocks else puts)
    await agent.transfer(memory, store.object("o", if_none_match=True))
    assert download(azure_server, store, "o") == sent.tobytes()
    assert proxy.faulted == 1
    # Where the first attempt did nothing, somebody else's blob is a conflict.
    proxy.inject(refusal(503, "ServerBusy"), match=commits if blocks else puts)
    with pytest.raises(FileExistsError):
        await agent.transfer(memory, store.object("o", if_none_match=True))


async def test_a_commit_whose_answer_is_lost(agent: Agent, proxy: FaultProxy, azure_server: Server, url: str) -> None:
    store = await agent.store(url, **BLOCKS)
    sent = pattern(NBYTES)
    proxy.inject(LOST, match=commits)
    await agent.transfer(await agent.register(sent), store.object("o"))
    assert download(azure_server, store, "o") == sent.tobytes()
    assert sum(method == "PUT" for method, _ in proxy.seen) == 5


async def test_leftovers_of_another_program(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, **BLOCKS)
    with blob(azure_server, store, "o") as client:
        client.stage_block("short", b"left")
    memory = await agent.register(pattern(NBYTES))
    with pytest.raises(BackendError, match="uncommitted blocks of another program.*InvalidBlobOrBlock"):
        await agent.transfer(memory, store.object("o"))
