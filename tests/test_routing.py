"""Which backend moves what: preference, force, refusals with reasons, and that a changed peer is asked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nixl_async import ConfigurationError, NoRoute
from nixl_async.descriptors import make_plan
from nixl_async.outages import Outage
from tests.agents import known, two_agents


async def test_the_preferred_backend_is_the_route_and_the_others_follow() -> None:
    async with two_agents(backends=["samehost", "tcp"]) as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        explained = a.explain(here, peer.region("kv"))
        assert (explained.route, explained.routes, explained.refusals) == ("samehost", ("samehost", "tcp"), {})
        assert (explained.nbytes, explained.segments) == (4096, 1)
        assert "by samehost" in str(explained)
        assert "tcp: next in line" in str(explained)
        assert (await a.transfer(here, peer.region("kv"))).route == "samehost"
        assert (await a.transfer(here, peer.region("kv"), backend="tcp")).route == "tcp"
        assert (await a.transfer(here, peer.region("kv"))).route == "samehost"


async def test_a_route_that_is_down_comes_last_and_says_why() -> None:
    async with two_agents(backends=["samehost", "tcp"]) as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        plan, now = make_plan(here, peer.region("kv")), 10.0
        outage = Outage("samehost", "b", "it may not be traced", now - 2.5, now + 0.25)
        explained = a._router.explain(plan, outages={"samehost": outage}, now=now)
        assert explained.routes == ("tcp", "samehost")
        assert "samehost: down: it may not be traced; failed 2.5 s ago, tried again in 0.25 s" in str(explained)
        outage.again_at = None
        only = a._router.explain(plan, "samehost", outages={"samehost": outage}, now=now)
        assert only.route == "samehost"
        assert "samehost: down: it may not be traced; failed 2.5 s ago, it is being tried again" in str(only)


async def test_refusals_say_why() -> None:
    async with two_agents(backends=["memory", "tcp"]) as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        local = a.explain(here[0:10], here[10:20])
        assert local.route == "memory"
        assert "a peer only" in local.refusals["tcp"]
        between = a.explain(peer.region("kv"), peer.region("kv"))
        assert between.route is None
        assert "one side must be this agent's" in str(between)
        with pytest.raises(NoRoute, match=r"tcp: .*a peer only") as caught:
            await a.transfer(here[0:10], here[10:20], backend="tcp")
        assert set(caught.value.refusals) == {"memory", "tcp"}
        with pytest.raises(ConfigurationError, match="no backend 'fax'; it has memory, tcp"):
            await a.transfer(here[0:10], here[10:20], backend="fax")


async def test_storage_of_ours_and_memory_of_a_peer_go_through_us(tmp_path: Path) -> None:
    async with (
        two_agents(backends=["memory", "tcp", "posix"]) as (a, b, peer),
        a.file(tmp_path / "f", "w", nbytes=4096) as file,
    ):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        there = peer.region("kv")
        explained = a.explain(there, file)
        assert (explained.route, explained.how) == ("staging", "memory, then posix")
        assert "by staging (memory, then posix)" in str(explained)
        assert "the memory is peer 'b's" in explained.refusals["posix"] or "no peers" in explained.refusals["posix"]
        # Between memories nothing is staged, and neither is what one backend does.
        assert "no storage" in a.explain(here, there).refusals["staging"]
        assert "single backend" in a.explain(here, file).refusals["staging"]
        assert a.explain(here, file).route == "posix"
        assert (await a.transfer(file, there)).route == "staging"
        assert (await a.transfer(here, there)).route == "memory"


async def test_what_the_peer_no_longer_has_is_not_chosen_again() -> None:
    async with two_agents(backends=["samehost", "tcp"]) as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        assert (await a.transfer(here, peer.region("kv"))).route == "samehost"
        peer.backends.discard("samehost")
        peer.refusals["samehost"] = "it went away"
        assert (await a.transfer(here, peer.region("kv"))).route == "tcp"
        assert a.explain(here, peer.region("kv")).refusals == {"samehost": "it went away"}
        peer.backends.add("samehost")
