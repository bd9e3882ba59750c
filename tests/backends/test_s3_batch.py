"""Many objects in one transfer: each has its own outcome, nothing is asked for twice, and nothing moves once it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from nixl_async import Agent, BackendError, IntegrityError, NixlError, NotFoundError
from nixl_async.backends import s3
from nixl_async.backends.s3_batch import Batch
from nixl_async.errors import AccessError
from nixl_async.http import HTTPError, Pool, Request, Response
from nixl_async.stores import Store
from nixl_async.testing.patterns import CANARY, Canary, assert_same, pattern
from nixl_async.testing.proxy import Fault, FaultProxy, Match, expired_token, internal_error, s3_error, slow_down
from nixl_async.testing.servers import Server
from tests.loops import every_loop
from tests.sockets import certificate, relay
from tests.stores import fresh_prefix, s3_options

N = 20_000
"""The size of each object, in bytes."""
PATIENCE_SECONDS = 20.0


class Watched(Batch):
    """Counts what comes at the first attempt and what does not."""

    all: list[Watched]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.n_arrived = self.n_ended = 0
        self.all.append(self)

    def arrived(self, request: Request, status: int, span: tuple[int, int, int]) -> None:
        self.n_arrived += 1
        super().arrived(request, status, span)

    def ended(self, request: Request, outcome: Response | HTTPError) -> None:
        self.n_ended += 1
        super().ended(request, outcome)


class Stage:
    """An agent, a proxy before the server, and the batches that were made."""

    def __init__(self, agent: Agent, server: Server, proxy: FaultProxy, batches: list[Watched]) -> None:
        self.agent, self.server, self.proxy, self.batches = agent, server, proxy, batches
        self.prefix = fresh_prefix()

    async def store(self, **options: Any) -> Store:
        """Open the store through the proxy."""
        given = {**s3_options(self.server), "endpoint_url": self.proxy.url, **options}
        return await self.agent.store(f"s3://bench/{self.prefix}", **given)

    async def fill(self, n: int) -> tuple[list[str], np.ndarray[Any, Any]]:
        """Put `n` objects past the proxy; return their keys and bytes, a row each."""
        names, sent = [f"n-{i:03d}" for i in range(n)], pattern(n * N)
        direct = await self.store(endpoint_url=self.server.endpoint)
        await self.agent.transfer(await self.agent.register(sent), direct.objects(names, N))
        return names, sent.reshape(n, N)

    async def outcomes(self, source: Any, target: Any) -> dict[int, BaseException | None]:
        """Transfer; return what became of each part, and check that the transfer fails if one did."""
        transfer = self.agent.submit(source, target)
        found: dict[int, BaseException | None] = {}
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for part in transfer.parts():
                assert part.index not in found
                found[part.index] = part.error
            try:
                await transfer
            except NixlError:
                assert any(found.values())
            else:
                assert not any(found.values())
        return found

    @property
    def pool(self) -> Pool:
        """Return the pool of the last batch."""
        return self.batches[-1]._data.endpoint.pool

    def assert_idle(self) -> None:
        """Raise `AssertionError` if anything is on its way or waits."""
        assert not self.pool._waiting
        assert not self.pool._busy
        assert self.pool._nbytes == 0
        for batch in self.batches:
            assert not batch._singles


@pytest.fixture
async def stage(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    batches: list[Watched] = []
    monkeypatch.setattr(Watched, "all", batches, raising=False)
    monkeypatch.setattr(s3, "Batch", Watched)
    parts = urlsplit(seaweed.endpoint)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(FaultProxy(str(parts.hostname), int(parts.port or 0)))
        agent = await stack.enter_async_context(Agent("batch", backends=["s3", "memory"]))
        yield Stage(agent, seaweed, proxy, batches)


def named(*names: str) -> Match:
    """Match GETs of these objects."""
    return lambda method, path: method == "GET" and path.endswith(names)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():
            await asyncio.sleep(0.001)


# All is well.


@every_loop
@pytest.mark.parametrize("concurrency", [1, 3, 64])
async def test_many_objects_each_at_the_first_attempt(stage: Stage, concurrency: int) -> None:
    n = 150
    names, sent = await stage.fill(n)
    store = await stage.store(concurrency=concurrency)
    got = np.full(n * N, CANARY, np.uint8)
    target = await stage.agent.register(got)
    before = dict(store._backend.counts)
    for _ in range(2):
        got[:] = CANARY
        found = await stage.outcomes(store.objects(names, N), target)
        assert found == dict.fromkeys(range(n))
        assert_same(got, sent.ravel())
    assert stage.proxy.requests == 2 * n
    assert stage.proxy.connections == stage.pool.opened <= concurrency
    assert [(batch.n_arrived, batch.n_ended) for batch in stage.batches] == [(n, 0)] * 2
    told = store._backend.counts
    assert {name: told[name] - before[name] for name in ("requests", "retries", "failed")} == {
        "requests": 2 * n,
        "retries": 0,
        "failed": 0,
    }
    stage.assert_idle()


async def test_ranges_whose_pages_lie_anywhere(stage: Stage) -> None:
    n, page = 40, 200
    names, sent = await stage.fill(n)
    store = await stage.store()
    got = np.full(2 * n * N, CANARY, np.uint8)
    target = await stage.agent.register(got)
    random = np.random.default_rng(5)
    # From each object some pages in the middle, to every second page of memory, in any order.
    first, n_pages = 7 * page, 70
    order = random.permutation(n)
    slots = 2 * random.permutation(n * N // page)[: n * n_pages]
    source = store.objects(names, N).select(order, first, n_pages * page)
    found = await stage.outcomes(source, target.pages(slots, page))
    assert list(found.values()) == [None] * len(found)
    rows = got.reshape(-1, page)
    assert_same(rows[slots].ravel(), sent[order, first : first + n_pages * page].ravel())
    untouched = np.ones(len(rows), bool)
    untouched[slots] = False
    assert (rows[untouched] == CANARY).all()
    assert stage.proxy.requests == n
    assert stage.batches[0].n_arrived == n


async def test_keys_that_must_be_quoted(stage: Stage) -> None:
    names = ["a b", "a+b", "a%20b", "ü/~x", "q?x=1&y", "#", "a'(b)*!"]
    sent, got = pattern(len(names) * 100), np.zeros(len(names) * 100, np.uint8)
    store = await stage.store()
    await stage.agent.transfer(await stage.agent.register(sent), store.objects(names, 100))
    await stage.agent.transfer(store.objects(names, 100), await stage.agent.register(got))
    assert_same(got, sent)
    assert stage.batches[0].n_arrived == len(names)


async def test_tls(stage: Stage, tmp_path: Path) -> None:
    names, sent = await stage.fill(30)
    context, trusted = certificate(tmp_path, "127.0.0.1", "localhost")
    got = np.full(30 * N, CANARY, np.uint8)
    target = await stage.agent.register(got)
    async with relay(stage.proxy.port, context) as tls:
        store = await stage.store(endpoint_url=f"https://127.0.0.1:{tls.port}", verify=trusted)
        stage.proxy.inject(Fault(reset_after=5000), match=named(names[3]))
        stage.proxy.inject(internal_error(), match=named(names[4]))
        stage.proxy.inject(s3_error(403, "AccessDenied"), match=named(names[5]))
        found = await stage.outcomes(store.objects(names, N), target)
        assert {index: type(error) for index, error in found.items() if error} == {5: AccessError}
        keep = np.arange(30) != 5
        assert_same(got.reshape(30, N)[keep].ravel(), sent[keep].ravel())
        stage.assert_idle()


# Some fail, and others do not.


@every_loop
async def test_every_object_has_its_own_outcome(stage: Stage) -> None:
    n = 90
    names, sent = await stage.fill(n)
    store = await stage.store(attempts=3)
    asked = list(names)
    missing, hopeless, refused, longer = {4, 50, 89}, {20}, {33}, {70}
    for index in missing:
        asked[index] = f"missing-{index:03d}"
    recovered = {
        0: Fault(reset_after=N // 2),
        7: slow_down(retry_after=0),
        8: Fault(close_after=N - 1),
        15: Fault(drop="reset"),
        16: Fault(drop="close"),
        40: Fault(chunked=777),
        41: Fault(connection_close=True),
        42: Fault(extra_continue=True),
        60: internal_error(),
        61: Fault(chunked=500, reset_after=3000),
        88: Fault(half_close_after=100),
    }
    for index, fault in recovered.items():
        stage.proxy.inject(fault, match=named(names[index]))
    stage.proxy.inject(internal_error(), None, named(*(names[index] for index in hopeless)))
    stage.proxy.inject(s3_error(403, "AccessDenied"), None, named(*(names[index] for index in refused)))
    stage.proxy.inject(Fault(length_off=5), None, named(*(names[index] for index in longer)))
    got = np.full(n * N, CANARY, np.uint8)
    failed = await stage.outcomes(store.objects(asked, N), await stage.agent.register(got))
    assert set(failed) == set(range(n))
    kinds = {index: type(error) for index, error in failed.items() if error is not None}
    expected = {
        **dict.fromkeys(missing, NotFoundError),
        **dict.fromkeys(hopeless, BackendError),
        **dict.fromkeys(longer, IntegrityError),
    }
    assert kinds == {**expected, **dict.fromkeys(refused, AccessError)}
    for index, error in failed.items():
        assert error is None or asked[index] in str(error)
    rows = got.reshape(n, N)
    for index in range(n):
        expected_row = np.full(N, CANARY, np.uint8) if index in kinds else sent[index]
        assert_same(rows[index], expected_row, asked[index])
    # The attempt of the batch counts as the first.
    gets = [path for method, path in stage.proxy.seen if method == "GET"]
    assert sum(path.endswith(names[20]) for path in gets) == 3
    assert sum(path.endswith(asked[4]) for path in gets) == 1
    assert sum(path.endswith(names[7]) for path in gets) == 2
    stage.assert_idle()


async def test_objects_that_are_too_short_are_told_and_nothing_of_them_arrives(stage: Stage) -> None:
    names, sent = await stage.fill(5)
    await stage.agent.transfer(await stage.agent.register(pattern(300)), (await stage.store()).object(names[2]))
    store = await stage.store()
    got = np.full(5 * N, CANARY, np.uint8)
    found = await stage.outcomes(store.objects(names, N), await stage.agent.register(got))
    assert {index: type(error) for index, error in found.items() if error} == {2: IntegrityError}
    keep = [0, 1, 3, 4]
    assert_same(got.reshape(5, N)[keep].ravel(), sent[keep].ravel())
    assert (got.reshape(5, N)[2] == CANARY).all()


async def test_all_are_told_that_there_is_no_server(stage: Stage) -> None:
    store = await stage.store(endpoint_url="http://127.0.0.1:9", attempts=1)
    target = await stage.agent.register(np.zeros(1000, np.uint8))
    found = await stage.outcomes(store.objects([f"x-{i}" for i in range(100)], 10), target)
    assert len(found) == 100
    assert all(isinstance(error, BackendError) for error in found.values())
    stage.assert_idle()


async def test_idle_connections_that_were_closed_fail_nothing(stage: Stage) -> None:
    n = 60
    names, sent = await stage.fill(n)
    store = await stage.store()
    got = np.zeros(n * N, np.uint8)
    target = await stage.agent.register(got)
    await stage.agent.transfer(store.objects(names, N), target)
    got[:] = CANARY
    stage.proxy.inject(Fault(drop="close", reused=True), 3)
    await stage.agent.transfer(store.objects(names, N), target)
    assert_same(got, sent.ravel())
    assert stage.proxy.faulted == 3


async def test_expired_credentials_fail_only_what_was_refused(stage: Stage) -> None:
    names, sent = await stage.fill(30)
    store = await stage.store()
    got = np.full(30 * N, CANARY, np.uint8)
    stage.proxy.inject(expired_token(), None, named(names[9]))
    found = await stage.outcomes(store.objects(names, N), await stage.agent.register(got))
    assert {index: type(error) for index, error in found.items() if error} == {9: AccessError}
    keep = np.arange(30) != 9
    assert_same(got.reshape(30, N)[keep].ravel(), sent[keep].ravel())


# Cancelling.


@pytest.mark.parametrize(
    "fault", [Fault(stall_after=0), Fault(stall_after=N // 2), Fault(latency=30), slow_down(retry_after=20)]
)
async def test_cancelled_in_the_middle(stage: Stage, fault: Fault) -> None:
    n, n_stuck = 200, 3
    names, sent = await stage.fill(n)
    store = await stage.store()
    got = np.zeros(n * N, np.uint8)
    target = await stage.agent.register(got)
    stuck = names[50 : 50 + n_stuck]
    stage.proxy.inject(fault, n_stuck, named(*stuck))
    task = asyncio.create_task(stage.agent.transfer(store.objects(names, N), target))
    await until(lambda: stage.proxy.faulted == n_stuck and stage.batches[0].n_arrived > 40)
    connections = stage.pool.opened + len(stage.pool._connecting)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stage.assert_idle()
    asked = stage.proxy.requests
    await Canary(got).watch()
    stage.assert_idle()
    assert not stage.pool._connecting
    # No connection is made on account of what is cancelled, and each had one request on its way at most.
    assert stage.pool.opened <= connections
    assert stage.proxy.requests <= asked + connections
    await stage.agent.transfer(store.objects(names, N), target)
    assert_same(got, sent.ravel())
    stage.assert_idle()


async def test_cancelled_at_any_time(stage: Stage) -> None:
    n = 60
    names, sent = await stage.fill(n)
    store = await stage.store()
    got = np.zeros(n * N, np.uint8)
    target = await stage.agent.register(got)
    for n_arrived in range(0, n, 4):
        task = asyncio.create_task(stage.agent.transfer(store.objects(names, N), target))
        n_before = len(stage.batches)
        await until(
            lambda n_before=n_before, least=n_arrived: len(stage.batches) > n_before and stage.batches[-1].n_arrived >= least
        )
        task.cancel()
        await asyncio.wait([task])
        stage.assert_idle()
        canary = Canary(got)
        for _ in range(20):
            await asyncio.sleep(0)
        canary.check()
    await stage.agent.transfer(store.objects(names, N), target)
    assert_same(got, sent.ravel())
    stage.assert_idle()


async def test_one_of_two_batches_is_cancelled(stage: Stage) -> None:
    n = 100
    names, sent = await stage.fill(n)
    store = await stage.store()
    one, other = np.zeros(n * N, np.uint8), np.zeros(n * N, np.uint8)
    first, second = await stage.agent.register(one), await stage.agent.register(other)
    doomed = asyncio.create_task(stage.agent.transfer(store.objects(names, N), first))
    kept = asyncio.create_task(stage.agent.transfer(store.objects(names[::-1], N), second))
    await until(lambda: len(stage.batches) == 2 and all(batch.n_arrived for batch in stage.batches))
    doomed.cancel()
    await asyncio.wait([doomed])
    assert doomed.cancelled()
    canary = Canary(one)
    await kept
    canary.check()
    assert_same(other, sent[::-1].ravel())
    stage.assert_idle()
