"""What agents export is what happened, as the official client reads it."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nixl_async import Agent, PeerLost, TransferState, load_backend, metrics
from nixl_async.metrics.families import FAMILIES
from nixl_async.testing import FaultyBackend
from tests.agents import TOKEN, known, two_agents

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
NBYTES = 4 << 20


def scraped(*agents: Agent) -> Samples:
    registry = CollectorRegistry()
    registry.register(metrics.AgentCollector(*agents))
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "hostname")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def get(samples: Samples, name: str, **labels: str) -> float:
    labels = {label.rstrip("_"): value for label, value in labels.items()}
    found = [value for (sample, given), value in samples.items() if sample == name and set(labels.items()) <= set(given)]
    assert found, f"no {name} with {labels}"
    return sum(found)


async def test_what_was_moved_counts_on_both_sides() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        theirs = peer.region("theirs")
        with metrics.AgentCollector(a, b) as collector:
            await a.transfer(mine, theirs, notify=b"done", traffic_class="latency")
            await a.transfer(theirs, mine, traffic_class="bulk")
            await a.transfer(mine[:100], theirs[:100])
            await anext(b.notifications())
        registry = CollectorRegistry()
        registry.register(collector)
        samples = parsed(generate_latest(registry).decode())
        assert get(samples, "agent_tx_bytes_total", agent_name="a") == NBYTES + 100
        assert get(samples, "agent_rx_bytes_total", agent_name="a") == NBYTES
        assert get(samples, "agent_tx_requests_num_total", agent_name="a") == 2
        assert get(samples, "agent_tx_bytes_total", agent_name="b") == 0
        assert get(samples, "agent_moved_bytes_total", peer="b", backend="tcp", class_="latency", direction="tx") == NBYTES
        assert get(samples, "agent_moved_transfers_total", peer="b", class_="bulk", direction="rx") == 1
        assert get(samples, "agent_served_bytes_total", agent_name="b", backend="tcp", direction="rx") == NBYTES + 100
        assert get(samples, "agent_served_bytes_total", agent_name="b", backend="tcp", direction="tx") == NBYTES
        assert get(samples, "agent_transfers_total", agent_name="a", state="done") == 3
        assert get(samples, "agent_xfer_time_us_count", agent_name="a") == 3
        assert get(samples, "agent_xfer_time_us_bucket", agent_name="a", le="+Inf") == 3
        # NIXL's time of the post: until a transfer's turn, and all of what was copied at once.
        assert get(samples, "agent_xfer_post_time_us_count", agent_name="a") == 3
        assert get(samples, "agent_xfer_post_time_us_count", agent_name="a", class_="bulk") == 1
        posted = get(samples, "agent_xfer_post_time_total", agent_name="a")
        assert 0 < posted == pytest.approx(get(samples, "agent_xfer_post_time_us_sum", agent_name="a"))
        assert posted < get(samples, "agent_xfer_time_total", agent_name="a")
        assert get(samples, "agent_queue_time_us_count", agent_name="a") >= 2
        assert get(samples, "agent_notifications_sent_total", agent_name="a") == 1
        assert get(samples, "agent_notifications_received_total", agent_name="b") == 1
        assert get(samples, "agent_notifications_received_bytes_total", agent_name="b") == 4
        assert get(samples, "agent_membership_events_total", agent_name="b", kind="joined") == 1
        assert get(samples, "agent_memory_registered_total", agent_name="a") == NBYTES
        assert get(samples, "agent_regions", agent_name="b") == 1
        assert get(samples, "agent_peers", agent_name="a", state="connected") == 1


async def test_what_waits_and_what_is_in_flight() -> None:
    faulty = FaultyBackend(load_backend("tcp"))
    async with two_agents(backends=["tcp"]) as (_, b, _), Agent("c", token=TOKEN, backends=[faulty]) as c:
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        host, port = b.address or ("", 0)
        peer = await c.connect((host, port))
        mine = await c.register(np.ones(NBYTES, np.uint8), name="mine")
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held = c.submit(mine, peer.region("theirs"), after=never, traffic_class="bulk")
        with faulty.hang():
            stuck = c.submit(mine, peer.region("theirs"))
            async with asyncio.timeout(10):
                while stuck.state is not TransferState.ACTIVE:
                    await asyncio.sleep(0)
            samples = scraped(c)
            assert get(samples, "agent_inflight_ops", peer="b") >= 1
            assert get(samples, "agent_inflight_bytes", peer="b", backend="tcp") == NBYTES
            assert get(samples, "agent_live_transfers", class_="bulk") == 1
            assert get(samples, "agent_live_transfers", class_="normal") == 1
            for transfer in (held, stuck):
                transfer.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await transfer
        samples = scraped(c)
        assert get(samples, "agent_inflight_bytes", peer="b") == 0
        assert get(samples, "agent_draining_transfers") == 0
        assert get(samples, "agent_transfers_total", state="cancelled") == 2
        assert get(samples, "agent_errors_total", status="canceled") == 2


async def test_failures_have_nixls_status() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transfer = a.submit(mine, peer.region("theirs"), after=never)
        await a.disconnect("b")
        with pytest.raises(PeerLost):
            await transfer
        samples = scraped(a)
        assert get(samples, "agent_errors_total", status="remote_disconnect", error="PeerLost") == 1
        assert get(samples, "agent_membership_events_total", kind="left") == 1
        assert get(samples, "agent_peers", state="connected") == 0


async def test_peers_beyond_the_bound_are_others() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, _), Agent("d", token=TOKEN, backends=["tcp"]) as d:
        await d.serve("127.0.0.1", 0)
        a._dispatcher.traffic.max_peers = 1
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        for agent in (b, d):
            await agent.register(np.zeros(NBYTES, np.uint8), name="theirs")
            host, port = agent.address or ("", 0)
            peer = await a.connect((host, port))
            await known(a, peer, "theirs")
            await a.transfer(mine, peer.region("theirs"))
        samples = scraped(a)
        labels = {dict(given).get("peer") for (name, given) in samples if name == "agent_moved_bytes_total"}
        assert labels == {"b", "other"}
        assert {dict(given)["peer"] for (name, given) in samples if name == "agent_inflight_bytes"} <= {"b", "other"}
        assert get(samples, "agent_tx_bytes_total") == 2 * NBYTES


async def test_it_can_be_collected_from_another_thread_while_all_changes() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await known(a, peer, "theirs")
        stop, failures, rounds = threading.Event(), [], []

        def collect() -> None:
            while not stop.is_set():
                try:
                    scraped(a, b)
                    rounds.append(1)
                except Exception as error:
                    failures.append(error)

        thread = threading.Thread(target=collect)
        thread.start()
        try:
            while len(rounds) < 20 and not failures:
                await asyncio.gather(*(a.transfer(mine, peer.region("theirs"), notify=b"x") for _ in range(20)))
        finally:
            stop.set()
            thread.join()
        assert failures == []


async def test_an_agent_that_is_not_open_has_no_samples() -> None:
    assert scraped(Agent("new", token="t")) == {}


async def test_every_metric_that_the_dashboard_asks_for_is_exported() -> None:
    exported = set()
    for family in FAMILIES.values():
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.kind]
        exported |= {family.name + ending for ending in endings}
    board = json.loads(metrics.dashboard())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["definition"] for one in board["templating"]["list"] if one["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bagent_\w+", query)} - {"agent_name"}
    assert len(asked) > 20
    assert asked <= exported
    # And every one of those has its labels.
    for query in queries:
        for name, selector in re.findall(r"\b(agent_\w+)\{([^}]*)\}", query):
            family = next(f for f in FAMILIES.values() if name in (f.name, f.name + "_total", f.name + "_bucket"))
            assert set(re.findall(r"(\w+)\s*!?=~?", selector)) <= {*family.labels, "agent_name", "hostname"}, query


def test_the_dashboard_is_whole() -> None:
    board = json.loads(metrics.dashboard())
    assert board["title"] == "nixl_async"
    assert board["uid"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(board["panels"])
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "agent"}
