"""What goes wrong between us and a server of objects: nothing is lost or damaged, errors have their type, memory is left alone.

Each kind of store is a `Leg`; a fault proxy stands between it and a real server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from nixl_async import Agent, BackendError, ConflictError, IntegrityError, NixlError, NotFoundError, TransferError
from nixl_async.errors import AccessError
from nixl_async.stores import Store
from nixl_async.testing.patterns import CANARY, POISON, Canary, assert_same, pattern
from nixl_async.testing.proxy import (
    Fault,
    FaultProxy,
    close_idle,
    expired_token,
    internal_error,
    redirect,
    s3_error,
    slow_down,
)
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix, s3_options

N = 300_000
MIDDLE = N // 2
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Leg:
    """One kind of store: the fixture of its server, a store's URL for a prefix, and its options when `endpoint` is the proxy."""

    backend: str
    fixture: str
    url: Callable[[str], str]
    options: Callable[[Server, str], dict[str, Any]]
    error: Callable[..., Fault]
    """What answers with an error: (status, code)."""
    slow_down: Callable[..., Fault]
    checksums: tuple[dict[str, Any], ...]
    """Options by which damage on the way is noticed."""


S3 = Leg(
    "s3",
    "seaweed",
    lambda prefix: f"s3://bench/{prefix}",
    lambda server, endpoint: {**s3_options(server), "endpoint_url": endpoint},
    s3_error,
    slow_down,
    ({"checksum": "crc32c"}, {"checksum": "crc64nvme", "payload": "unsigned"}),
)
LEGS = [pytest.param(S3, id="s3")]


class Stage:
    """An agent, the proxy, and stores behind it."""

    def __init__(self, agent: Agent, leg: Leg, server: Server, proxy: FaultProxy) -> None:
        self.agent, self.leg, self.server, self.proxy = agent, leg, server, proxy
        self.url = leg.url(fresh_prefix())

    async def store(self, **options: Any) -> Store:
        """Open the store through the proxy."""
        return await self.agent.store(self.url, **self.leg.options(self.server, self.proxy.url), **options)

    async def direct(self) -> Store:
        """Open the same store past the proxy."""
        return await self.agent.store(self.url, **self.leg.options(self.server, self.server.endpoint))

    async def fill(self, key: str, nbytes: int = N, seed: int = 0) -> np.ndarray[Any, Any]:
        """Put an object past the proxy; return its bytes."""
        sent = pattern(nbytes, seed)
        await self.agent.transfer(await self.agent.register(sent), (await self.direct()).object(key))
        return sent

    async def content(self, key: str) -> np.ndarray[Any, Any]:
        """Return an object's bytes, got past the proxy."""
        store = await self.direct()
        got = np.zeros((await store.stat(key)).nbytes, np.uint8)
        await self.agent.transfer(store.object(key), await self.agent.register(got))
        return got


@pytest.fixture(scope="session", params=LEGS)
def leg(request: pytest.FixtureRequest) -> Leg:
    found: Leg = request.param
    return found


@pytest.fixture(scope="session")
def server(leg: Leg, request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(leg.fixture)
    return found


@pytest.fixture
async def stage(leg: Leg, server: Server) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        parts = urlsplit(server.endpoint)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy = await stack.enter_async_context(FaultProxy(parts.hostname, parts.port))
        agent = await stack.enter_async_context(Agent("faults", backends=[leg.backend, "memory"]))
        yield Stage(agent, leg, server, proxy)


# What another attempt, or patience, puts right.

READ = {
    "latency": Fault(latency=0.05),
    "reset before the body": Fault(reset_after=0),
    "reset in the body": Fault(reset_after=MIDDLE),
    "truncated": Fault(close_after=MIDDLE),
    "truncated at the last byte": Fault(close_after=N - 1),
    "half-closed in the body": Fault(half_close_after=MIDDLE),
    "closed without a word": Fault(drop="close"),
    "reset without a word": Fault(drop="reset"),
    "chunked": Fault(chunked=1000),
    "chunked, large": Fault(chunked=70_001),
    "chunked and broken": Fault(chunked=1000, close_after=MIDDLE),
    "chunked and reset": Fault(chunked=77, reset_after=MIDDLE),
    "an unasked continue": Fault(extra_continue=True),
    "connection: close": Fault(connection_close=True),
    "half-closed at the end": Fault(half_close_after=N),
    "slow": Fault(bytes_per_second=2_000_000),
    "500": internal_error(),
    "503": slow_down(),
    "503 with a delay": slow_down(retry_after=0),
    "503 at once, and closed": slow_down(early=True),
}
WRITE = {
    "latency": Fault(latency=0.05),
    "the answer is reset": Fault(reset_after=0),
    "the answer never comes": Fault(close_after=0),
    "closed without a word": Fault(drop="close"),
    "reset without a word": Fault(drop="reset"),
    "an unasked continue": Fault(extra_continue=True),
    "connection: close": Fault(connection_close=True),
    "500": internal_error(),
    "500 before the body": internal_error(early=True),
    "503": slow_down(),
    "503 before the body": slow_down(early=True),
    "503 with a delay": slow_down(retry_after=0),
}


@pytest.mark.parametrize("name", READ)
async def test_reading_goes_on(stage: Stage, name: str) -> None:
    sent = await stage.fill("read")
    store = await stage.store()
    got = np.full(N + 2, CANARY, np.uint8)
    target = await stage.agent.register(got)
    stage.proxy.inject(READ[name], match=lambda method, path: method == "GET")
    await stage.agent.transfer(store.object("read"), target[1 : N + 1])
    assert_same(got[1:-1], sent)
    assert (got[0], got[-1]) == (CANARY, CANARY)
    assert stage.proxy.faulted == 1
    # The connection, or its successor, is in order.
    got[1:-1] = CANARY
    await stage.agent.transfer(store.object("read", N)[1000:2000], target[1:1001])
    assert_same(got[1:1001], sent[1000:2000])
    assert (got[1001:] == CANARY).all()


@pytest.mark.parametrize(
    "fault", [Fault(reset_after=MIDDLE), Fault(chunked=5000), Fault(close_after=MIDDLE), internal_error()]
)
async def test_pages_go_on(stage: Stage, fault: Fault) -> None:
    sent = await stage.fill("pages", 300_000)
    store = await stage.store()
    got = np.full(300_000, CANARY, np.uint8)
    pages = np.random.default_rng(1).permutation(100)
    stage.proxy.inject(fault)
    await stage.agent.transfer(store.object("pages"), (await stage.agent.register(got)).pages(pages, 3000))
    assert_same(got.reshape(100, -1)[pages].ravel(), sent)
    assert stage.proxy.faulted == 1


@pytest.mark.parametrize("name", WRITE)
async def test_writing_goes_on(stage: Stage, name: str) -> None:
    store = await stage.store()
    sent = pattern(N)
    stage.proxy.inject(WRITE[name], match=lambda method, path: method == "PUT")
    await stage.agent.transfer(await stage.agent.register(sent), store.object("written"))
    assert_same(await stage.content("written"), sent)
    assert stage.proxy.faulted == 1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_idle_connections_that_the_server_closes(stage: Stage, how: Any) -> None:
    sent = await stage.fill("idle")
    store = await stage.store(attempts=1)
    got = np.zeros(N, np.uint8)
    target = await stage.agent.register(got)
    await stage.agent.transfer(store.object("idle"), target)
    for direction in ("read", "write"):
        got[:] = 0
        stage.proxy.inject(close_idle(how))
        if direction == "read":
            await stage.agent.transfer(store.object("idle"), target)
            assert_same(got, sent)
        else:
            await stage.agent.transfer(await stage.agent.register(sent), store.object("other"))
            assert_same(await stage.content("other"), sent)
    assert stage.proxy.faulted == 2


async def test_bursts_of_errors(stage: Stage) -> None:
    names = [f"burst-{i}" for i in range(30)]
    store = await stage.store(attempts=8)
    sent, got = pattern(30 * 1000), np.zeros(30 * 1000, np.uint8)
    for fault in (internal_error(), slow_down()):
        stage.proxy.inject(fault, 20)
        await stage.agent.transfer(await stage.agent.register(sent), store.objects(names, 1000))
        stage.proxy.inject(fault, 20)
        got[:] = 0
        await stage.agent.transfer(store.objects(names, 1000), await stage.agent.register(got))
        assert_same(got, sent)
    assert stage.proxy.faulted == 80


async def test_a_storm(stage: Stage) -> None:
    """Every kind of fault, on many objects both ways."""
    n, nbytes = 60, 40_000
    names = [f"storm-{i}" for i in range(n)]
    store = await stage.store(attempts=12)
    sent, got = pattern(n * nbytes), np.zeros(n * nbytes, np.uint8)
    dice = random.Random(7)
    faults = [
        Fault(reset_after=nbytes // 3),
        Fault(close_after=nbytes // 2),
        Fault(drop="reset"),
        Fault(drop="close"),
        Fault(chunked=3000),
        Fault(connection_close=True),
        Fault(extra_continue=True),
        Fault(half_close_after=10),
        internal_error(),
        slow_down(early=True),
        close_idle(),
    ]
    for _ in range(60):
        stage.proxy.inject(dice.choice(faults))
    await stage.agent.transfer(await stage.agent.register(sent), store.objects(names, nbytes))
    for _ in range(60):
        stage.proxy.inject(dice.choice(faults))
    await stage.agent.transfer(store.objects(names, nbytes), await stage.agent.register(got))
    assert_same(got, sent)
    assert stage.proxy.faulted > 60


@pytest.mark.parametrize("how", range(2))
async def test_damage_on_the_way_in_is_noticed(stage: Stage, how: int) -> None:
    checked = await stage.store(**stage.leg.checksums[how])
    sent, got = pattern(N), np.zeros(N, np.uint8)
    await stage.agent.transfer(await stage.agent.register(sent), checked.object("checked"))
    stage.proxy.inject(Fault(corrupt_response=MIDDLE), match=lambda method, path: method == "GET")
    await stage.agent.transfer(checked.object("checked", N), await stage.agent.register(got))
    assert stage.proxy.faulted == 1
    assert_same(got, sent)


@pytest.mark.parametrize("how", range(2))
async def test_damage_on_the_way_out_is_noticed(stage: Stage, how: int) -> None:
    checked = await stage.store(**stage.leg.checksums[how])
    sent = pattern(N)
    stage.proxy.inject(Fault(corrupt_request=MIDDLE), match=lambda method, path: method == "PUT")
    await stage.agent.transfer(await stage.agent.register(sent), checked.object("checked"))
    assert stage.proxy.faulted == 1
    assert_same(await stage.content("checked"), sent)


# What no attempt puts right.

HOPELESS: dict[str, tuple[Fault, type[TransferError], str]] = {
    "reset": (Fault(reset_after=MIDDLE), BackendError, "broke|closed"),
    "truncated": (Fault(close_after=MIDDLE), BackendError, f"closed the connection after {MIDDLE} bytes"),
    "dropped": (Fault(drop="close"), BackendError, "closed the connection before the response|reset"),
    "too long": (Fault(length_off=10), IntegrityError, "asked for"),
    "too short": (Fault(length_off=-10), IntegrityError, "asked for"),
    "silent": (Fault(stall_after=MIDDLE), BackendError, "timed out"),
    "silent before the body": (Fault(stall_after=0), BackendError, "timed out"),
    "late": (Fault(latency=30), BackendError, "timed out"),
    "dribbling": (Fault(bytes_per_second=500), BackendError, "timed out"),
    "500": (internal_error(), BackendError, "500"),
    "503": (slow_down(), BackendError, "503"),
    "no access": (s3_error(403, "AccessDenied"), AccessError, "403"),
    "expired": (expired_token(), AccessError, "403"),
    "gone": (s3_error(404, "NoSuchKey"), NotFoundError, "404"),
    "elsewhere": (redirect("ftp://nowhere"), BackendError, "307"),
}


# What needs a body in the answer.
READ_ONLY = ("reset", "truncated", "too long", "too short", "silent", "silent before the body", "dribbling")


@pytest.mark.parametrize("name", HOPELESS)
async def test_reading_fails_with_its_type(stage: Stage, name: str) -> None:
    fault, kind, match = HOPELESS[name]
    sent = await stage.fill("hopeless")
    store = await stage.store(attempts=2, read_timeout=0.4)
    got = np.zeros(N, np.uint8)
    target = await stage.agent.register(got)
    stage.proxy.inject(fault, None, match=lambda method, path: method == "GET")
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(kind, match=match) as caught:
            await stage.agent.transfer(store.object("hopeless"), target)
    assert type(caught.value) is kind
    assert caught.value.backend == stage.leg.backend
    await Canary(got).watch()
    # Other objects, and this one later, are not concerned.
    stage.proxy.clear()
    await stage.agent.transfer(store.object("hopeless"), target)
    assert_same(got, sent)


@pytest.mark.parametrize("name", [n for n in HOPELESS if n not in READ_ONLY])
async def test_writing_fails_with_its_type(stage: Stage, name: str) -> None:
    fault, kind, match = HOPELESS[name]
    store = await stage.store(attempts=2, read_timeout=0.4)
    sent = pattern(N)
    source = await stage.agent.register(sent)
    stage.proxy.inject(fault, None, match=lambda method, path: method == "PUT")
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(kind, match=match) as caught:
            await stage.agent.transfer(source, store.object("hopeless"))
    assert type(caught.value) is kind
    stage.proxy.clear()
    await stage.agent.transfer(source, store.object("hopeless"))
    assert_same(await stage.content("hopeless"), sent)


@pytest.mark.parametrize("how", range(2))
async def test_damage_that_stays_is_an_integrity_error(stage: Stage, how: int) -> None:
    checked = await stage.store(attempts=2, **stage.leg.checksums[how])
    sent, got = pattern(N), np.zeros(N, np.uint8)
    source, target = await stage.agent.register(sent), await stage.agent.register(got)
    await stage.agent.transfer(source, checked.object("checked"))
    stage.proxy.inject(Fault(corrupt_response=7), None, match=lambda method, path: method == "GET")
    with pytest.raises(IntegrityError, match="damaged"):
        await stage.agent.transfer(checked.object("checked", N), target)
    stage.proxy.clear()
    stage.proxy.inject(Fault(corrupt_request=7), None, match=lambda method, path: method == "PUT")
    with pytest.raises(IntegrityError):
        await stage.agent.transfer(source, checked.object("other"))
    assert list(await (await stage.direct()).exists(["other"])) == [False]


async def test_some_objects_fail_and_others_do_not(stage: Stage) -> None:
    names = [f"part-{i}" for i in range(12)]
    for name in names:
        await stage.fill(name, 1000)
    store = await stage.store(attempts=2)
    stage.proxy.inject(internal_error(), None, match=lambda method, path: path.endswith(("part-3", "part-7")))
    got = np.zeros(12_000, np.uint8)
    transfer = stage.agent.submit(store.objects(names, 1000), await stage.agent.register(got))
    failed = {part.index async for part in transfer.parts() if part.error is not None}
    assert failed == {3, 7}
    with pytest.raises(NixlError):
        await transfer
    for i in set(range(12)) - failed:
        assert_same(got[i * 1000 : (i + 1) * 1000], pattern(1000))


async def test_a_server_that_is_not_there(stage: Stage) -> None:
    store = await stage.agent.store(stage.url, **stage.leg.options(stage.server, "http://127.0.0.1:9"), attempts=2)
    with pytest.raises(BackendError, match="cannot connect to 127.0.0.1:9"):
        await stage.agent.transfer(store.object("x"), await stage.agent.register(np.zeros(10, np.uint8)))
    with pytest.raises(BackendError):
        await store.exists(["x"])


# Cancelling.

STUCK = {
    "no answer": Fault(latency=30),
    "silent before the body": Fault(stall_after=0),
    "silent in the body": Fault(stall_after=MIDDLE),
    "dribbling": Fault(bytes_per_second=100_000),
    "dribbling in chunks": Fault(chunked=100, bytes_per_second=50_000),
}


@pytest.mark.parametrize("name", STUCK)
async def test_a_read_cancelled_in_the_middle_leaves_memory_alone(stage: Stage, name: str) -> None:
    sent = await stage.fill("stuck")
    store = await stage.store()
    got = np.zeros(N, np.uint8)
    target = await stage.agent.register(got)
    stage.proxy.inject(STUCK[name], match=lambda method, path: method == "GET")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await stage.agent.transfer(store.object("stuck"), target)
    assert stage.proxy.faulted == 1
    await Canary(got).watch()
    await stage.agent.transfer(store.object("stuck"), target)
    assert_same(got, sent)


async def test_a_write_cancelled_in_the_middle_sends_no_more(stage: Stage) -> None:
    store = await stage.store()
    sent = pattern(4 << 20)
    source = await stage.agent.register(sent)
    stage.proxy.inject(STUCK["no answer"], match=lambda method, path: method == "PUT")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await stage.agent.transfer(source, store.object("stuck"))
    assert stage.proxy.faulted == 1
    expected = sent.copy()
    sent[:] = POISON
    if (await (await stage.direct()).exists(["stuck"]))[0]:
        assert_same(await stage.content("stuck"), expected)


async def test_cancelled_while_waiting_to_send_again(stage: Stage) -> None:
    await stage.fill("again")
    store = await stage.store()
    got = np.zeros(N, np.uint8)
    target = await stage.agent.register(got)
    stage.proxy.inject(slow_down(retry_after=20), match=lambda method, path: method == "GET")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await stage.agent.transfer(store.object("again"), target)
    await Canary(got).watch()
    assert stage.proxy.requests == 1


# Conditional writes whose answer is lost.


async def test_a_conditional_write_that_succeeded_unheard(stage: Stage) -> None:
    store = await stage.store()
    sent = pattern(N)
    source = await stage.agent.register(sent)
    stage.proxy.inject(Fault(reset_after=0), match=lambda method, path: method == "PUT")
    await stage.agent.transfer(source, store.object("once", if_none_match=True))
    assert stage.proxy.faulted == 1
    assert_same(await stage.content("once"), sent)
    stage.proxy.inject(internal_error(), match=lambda method, path: method == "PUT")
    with pytest.raises(ConflictError):
        await stage.agent.transfer(source, store.object("once", if_none_match=True))
