"""Stock NIXL agents that use etcd by NIXL_ETCD_ENDPOINTS, and ours that use it by URL: both directions, and both farewells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent
from nixl_async.discovery.etcd_client import Etcd
from tests.agents import TOKEN
from tests.compat.etcd_server import EtcdServer
from tests.discovery.conftest import etcd_url
from tests.discovery.events import until
from tests.test_interop import NBYTES, Stock, pytestmark, stock

__all__ = ["pytestmark"]

PATIENCE_SECONDS = 40.0
Start = Callable[..., contextlib.AbstractAsyncContextManager[Stock]]


@pytest.fixture(params=["/nixl/agents/", "/models/llama"], ids=["default-namespace", "own-namespace"])
def namespace(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(etcd: EtcdServer, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("NIXL_ETCD_ENDPOINTS", etcd.url)
    if namespace != "/nixl/agents/":
        monkeypatch.setenv("NIXL_ETCD_NAMESPACE", namespace)

    @contextlib.asynccontextmanager
    async def started(name: str, fill: int = 0) -> AsyncIterator[Stock]:
        async with stock(name, fill) as nixl:
            yield nixl
            # As its users should, and few do.
            if nixl.process.returncode is None:
                await call(nixl, "invalidate_local_metadata")

    return started


def ours(name: str, etcd: EtcdServer, namespace: str, **options: Any) -> Agent:
    path = "" if namespace == "/nixl/agents/" else namespace
    return Agent(name, token=TOKEN, backends=["ucx"], discovery=f"{etcd_url(etcd)}{path}?ttl=2&stock=allow", **options)


def call(nixl: Stock, method: str, *arguments: Any) -> Coroutine[Any, Any, dict[str, Any]]:
    return nixl.order("call", method=method, arguments=arguments)


async def test_a_stock_agent_is_found_used_and_followed(etcd: EtcdServer, namespace: str, start: Start) -> None:
    async with ours("reader", etcd, namespace) as agent, asyncio.timeout(PATIENCE_SECONDS):
        events = agent.membership()
        memory = np.zeros(NBYTES, np.uint8)
        region = await agent.register(memory)
        waiting = asyncio.create_task(agent.peer("stock"))
        async with start("stock", 7) as nixl:
            await call(nixl, "send_local_metadata")
            peer = await waiting
            assert await agent.peer("stock") is peer
            await agent.transfer(peer.at(nixl.address, NBYTES), region)
            assert (memory == 7).all()
            await call(nixl, "invalidate_local_metadata")
            await until(events, "left", "stock")
            assert not peer.connected
            waiting = asyncio.create_task(agent.peer("stock"))
            await call(nixl, "send_local_metadata")
            peer = await waiting
            # It dies without a farewell, and another of its name comes.
            nixl.process.kill()
            await nixl.process.wait()
        async with start("stock", 9) as nixl:
            await call(nixl, "send_local_metadata")
            while (await agent.peer("stock")).incarnation == peer.incarnation:
                await anext(events)
            peer = await agent.peer("stock")
            await agent.transfer(peer.at(nixl.address, NBYTES), region)
            assert (memory == 9).all()


async def test_a_stock_agent_finds_reads_and_writes_ours(etcd: EtcdServer, namespace: str, start: Start) -> None:
    async with start("stock", 5) as nixl, asyncio.timeout(PATIENCE_SECONDS):
        async with ours("served", etcd, namespace) as agent:
            await agent.serve()
            memory = np.arange(NBYTES, dtype=np.uint8)
            region = await agent.register(memory)
            await _published(etcd, namespace, "served", NBYTES)
            await call(nixl, "fetch_remote_metadata", "served")
            assert (await nixl.order("until", method="check_remote_metadata", arguments=["served"], expected=True))["result"]
            # The names go both ways: a stock agent is told to UCX by who it talks to.
            await call(nixl, "send_local_metadata")
            await agent.peer("stock")
            side = {"peer": "served", "nbytes": NBYTES, "local": 0, "remote": region.address}
            assert (await nixl.order("READ", **side))["state"] == "DONE"
            assert (await nixl.order("bytes", start=0, stop=512))["bytes"] == memory[:512].tobytes().hex()
            await nixl.order("fill", seed=3)
            arrivals = agent.notifications()
            assert (await nixl.order("WRITE", **side, notify="written"))["state"] == "DONE"
            assert (await anext(arrivals)).payload == b"written"
            assert memory[:4096].tobytes().hex() == (await nixl.order("bytes", start=0, stop=4096))["bytes"]
        # Who has closed is forgotten there too.
        gone = await nixl.order("until", method="check_remote_metadata", arguments=["served"], expected=False)
        assert gone["result"] is False


async def test_an_agent_with_a_token_takes_stock_ones_only_where_that_is_allowed(
    etcd: EtcdServer, namespace: str, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    path = "" if namespace == "/nixl/agents/" else namespace
    url = f"{etcd_url(etcd)}{path}"
    async with start("stock") as nixl, asyncio.timeout(PATIENCE_SECONDS):
        await call(nixl, "send_local_metadata")
        await _published(etcd, namespace, "stock", 1)
        async with Agent("strict", token=TOKEN, backends=["ucx"], discovery=url) as agent:
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(1):
                    await agent.peer("stock")
            assert "stock=allow" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]
        async with Agent("open", authenticate=False, backends=["ucx"], discovery=url) as agent:
            assert (await agent.peer("stock")).name == "stock"
        # Metadata under a name that is not its own.
        client = Etcd(etcd.url)
        await client.put(f"{namespace}/thief/metadata".encode(), nixl.metadata)
        await client.put(f"{namespace}/noise/metadata".encode(), b"nixlSerDes|noise")
        async with ours("lenient", etcd, namespace) as agent:
            for name in ("thief", "noise"):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await agent.peer(name)
                assert f"the metadata of {name!r}" in caplog.text
            assert agent.peers == {}


async def _published(etcd: EtcdServer, namespace: str, name: str, nbytes: int) -> None:
    """Wait until metadata of at least one region of that size is there."""
    client, key = Etcd(etcd.url), f"{namespace}/{name}/metadata".encode()
    value, revision = await client.get(key)
    async with contextlib.aclosing(client.watch(key, revision + 1)) as events:
        while value is None or b"MemSection" not in value or (nbytes > 1 and b"nixlSDList" not in value):
            value = (await anext(events)).value
