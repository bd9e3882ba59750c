"""Azure through an HTTP proxy, and past it where NO_PROXY says so; test_azure has the tunnel of https."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from nixl_async import AccessError, Agent, BackendError, IntegrityError
from nixl_async.backends.azure import AzureBackend
from nixl_async.testing.patterns import Canary, assert_same, pattern
from nixl_async.testing.proxy import Answer, Fault, FaultProxy
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix

NBYTES = 300_000


@pytest.fixture
async def proxied(azure_server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", azure_server.port) as proxy:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.url)
        yield proxy


@asynccontextmanager
async def azure_agent(server: Server) -> AsyncIterator[Agent]:
    backend = AzureBackend(connection_string=server.connection_string, block_threshold_nbytes=200_000, block_nbytes=100_000)
    async with Agent("azure", backends=[backend, "memory"]) as agent:
        yield agent


async def test_a_proxy_is_used_and_shown(proxied: FaultProxy, azure_server: Server) -> None:
    async with azure_agent(azure_server) as agent:
        store = await agent.store(f"az://bench/{fresh_prefix()}", checksum="md5")
        sent, got = pattern(NBYTES), np.zeros(NBYTES, np.uint8)
        source, target = await agent.register(sent), await agent.register(got)
        assert "because of a proxy" in str(agent.explain(source, store.object("large")))
        await agent.transfer(source, store.object("large"))
        await agent.transfer(source[:1000], store.object("a small/one+", if_none_match=True))
        await agent.transfer(store.object("large"), target)
        assert_same(got, sent)
        await agent.transfer(store.object("large", NBYTES)[70_001:80_002], target[:10_001])
        assert_same(got[:10_001], sent[70_001:80_002])
        assert sorted([found.key async for found in store.list()]) == ["a small/one+", "large"]
        assert await store.exists(["large", "none"]) == [True, False]
        with pytest.raises(FileExistsError):
            await agent.transfer(source[:1000], store.object("a small/one+", if_none_match=True))
        with pytest.raises(IntegrityError):
            await agent.transfer(store.object("large", NBYTES + 1)[:], await agent.register(np.zeros(NBYTES + 1, np.uint8)))
        await store.delete(["large"])
    start = f"http://127.0.0.1:{azure_server.port}/"
    assert proxied.requests > 10
    assert all(path.startswith(start) for _, path in proxied.seen)


@pytest.mark.parametrize("value", ["127.0.0.1", "*"])
async def test_no_proxy_is_heeded(
    value: str, proxied: FaultProxy, azure_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", value)
    monkeypatch.setenv("no_proxy", value)
    async with azure_agent(azure_server) as agent:
        store = await agent.store(f"az://bench/{fresh_prefix()}")
        source = await agent.register(pattern(1000))
        assert "zero-copy" in str(agent.explain(source, store.object("o")))
        await agent.transfer(source, store.object("o"))
    assert proxied.requests == 0


async def test_what_breaks_is_sent_again_or_has_its_type(proxied: FaultProxy, azure_server: Server) -> None:
    async with azure_agent(azure_server) as agent:
        store = await agent.store(f"az://bench/{fresh_prefix()}", attempts=2)
        got = np.zeros(100_000, np.uint8)
        target = await agent.register(got)
        await agent.transfer(await agent.register(pattern(100_000)), store.object("o"))
        one = store.object("o", 100_000)[:]
        for fault in (Fault(reset_after=50_000), Fault(answer=Answer(503)), Fault(drop="reset")):
            got[:] = 0
            proxied.inject(fault)
            await agent.transfer(one, target)
            assert_same(got, pattern(100_000))
        proxied.inject(Fault(close_after=50_000), None)
        with pytest.raises(BackendError, match=r"through the proxy 127\.0\.0\.1"):
            await agent.transfer(one, target)
        proxied.clear()
        proxied.inject(Fault(answer=Answer(403)), None)
        with pytest.raises(AccessError):
            await agent.transfer(one, target)
        proxied.clear()
        proxied.inject(Fault(stall_after=50_000), None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await agent.transfer(one, target)
        await Canary(got).watch()
