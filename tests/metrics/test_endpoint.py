"""The endpoint as a scraper meets it."""

from __future__ import annotations

import asyncio
import time
import urllib.request

import pytest

from nixl_async import ConfigurationError, metrics
from tests.agents import two_agents
from tests.metrics.test_collector import get, parsed


def fetch(address: tuple[str, int]) -> str:
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


async def test_it_serves_all_its_agents_on_the_loopback_address() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, _), metrics.serve(a, b) as endpoint:
        assert endpoint.address[0] == "127.0.0.1"
        samples = parsed(await asyncio.to_thread(fetch, endpoint.address))
        assert get(samples, "agent_peers", agent_name="a", state="connected") == 1
        assert get(samples, "agent_peers", agent_name="b", state="connected") == 1
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(fetch, endpoint.address)


async def test_it_answers_while_the_loop_is_stuck_and_tells_of_it() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, _), metrics.serve(a) as endpoint:
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(None, lambda: (fetch(endpoint.address), time.monotonic())[1])
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        stuck_until = time.monotonic()
        assert await asked < stuck_until
        while not sum(endpoint._collector._agents[0][1].stalls.counts[-10:]):
            await asyncio.sleep(0.01)
        samples = parsed(await asyncio.to_thread(fetch, endpoint.address))
        late = get(samples, "agent_loop_stall_us_count") - get(samples, "agent_loop_stall_us_bucket", le="100000.0")
        assert late >= 1


async def test_an_address_that_cannot_be_used_is_refused() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, _), metrics.serve(a) as endpoint:
        host, port = endpoint.address
        with pytest.raises(ConfigurationError, match=f"{host}:{port}"):
            async with metrics.serve(a, port=port):
                pass
    with pytest.raises(ConfigurationError, match="no agent"):
        metrics.serve()


async def test_nothing_is_observed_after_it() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, _):
        async with metrics.serve(a):
            assert a._observers.finished is not None
        assert a._observers.finished is None
