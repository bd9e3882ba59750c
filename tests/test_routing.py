"""Which backend moves what: preference, force, refusals with reasons, and that a changed peer is asked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent, ConfigurationError, NoRoute
from nixl_async.backend import BUILT_IN
from nixl_async.backends.memory import MemoryBackend
from nixl_async.descriptors import Side, make_plan
from nixl_async.outages import Outage
from nixl_async.routing import RANKS_VARIABLE
from tests.agents import TOKEN, known, two_agents


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


class Choosy(MemoryBackend):
    """Comes last towards itself, and where it is told first towards peers."""

    name = "choosy"
    rank = 90

    def __init__(self) -> None:
        super().__init__()
        self.towards_peers = 90

    def rank_for(self, src: Side, dst: Side) -> int:
        return self.rank if (src.peer or dst.peer) is None else self.towards_peers


async def test_a_rank_may_depend_on_the_peer_where_the_caller_gave_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixl_async.agent.DEFAULT_BACKENDS", ("tcp", "memory", "choosy"))
    monkeypatch.setitem(BUILT_IN, "choosy", f"{__name__}:Choosy")
    async with two_agents() as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        there, choosy = peer.region("kv"), a._backends["choosy"]
        assert isinstance(choosy, Choosy)
        assert a.explain(here, there).routes == ("memory", "tcp", "choosy")
        assert (await a.transfer(here, there)).route == "memory"
        choosy.towards_peers = -1
        choosy._host.rank_changed()  # type: ignore[union-attr]
        assert a.explain(here, there).routes == ("choosy", "memory", "tcp")
        assert (await a.transfer(here, there)).route == "choosy"
        assert a.explain(here[:10], here[10:20]).routes == ("memory", "choosy")


async def test_a_caller_s_list_is_the_order_whatever_the_ranks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANKS_VARIABLE, "samehost=1,tcp=2")
    async with two_agents(backends=["tcp", "samehost"]) as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        assert a.explain(here, peer.region("kv")).routes == ("tcp", "samehost")


async def test_the_environment_s_ranks_go_before_those_of_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixl_async.agent.DEFAULT_BACKENDS", ("memory", "samehost", "tcp"))
    monkeypatch.setenv(RANKS_VARIABLE, " tcp=-5, samehost = 99 ,nobody=1")
    async with two_agents() as (a, b, peer):
        here = await a.register(np.zeros(4096, np.uint8))
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        assert a.explain(here, peer.region("kv")).routes == ("tcp", "memory", "samehost")
        assert (await a.transfer(here, peer.region("kv"))).route == "tcp"


@pytest.mark.parametrize("text", ["tcp", "tcp=", "tcp=first", "tcp=1;ucx=2"])
def test_ranks_that_cannot_be_read_are_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANKS_VARIABLE, text)
    with pytest.raises(ConfigurationError, match="NIXL_ASYNC_RANKS has .* such as ucx=20,tcp=45"):
        Agent("a", token=TOKEN)


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
