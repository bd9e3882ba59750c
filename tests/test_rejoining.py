"""A peer that is given up and taken back within one life: nothing of the connections before is written after what is newer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, PeerLost, ProtocolError, joining, membership
from nixl_async.backend import PeerInfo
from nixl_async.backends.memory import MemoryBackend
from nixl_async.backends.tcp import TCPBackend
from nixl_async.link import Link
from nixl_async.peers import PIECE_REGIONS, encode_announcement
from nixl_async.rejoining import Losses
from nixl_async.security import ConnectionLimits
from nixl_async.testing import FaultyBackend, assert_same, pattern
from nixl_async.testing.network import HOST, Network, network
from nixl_async.wire import FrameType, encode_frame, encode_json
from tests.agents import TOKEN, AgentProcess, agent_process, connect, two_agents
from tests.strangers import stranger
from tests.test_failover import NBYTES, SECONDS, Distant, digest


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "PROBE_SECONDS", 0.2)


@asynccontextmanager
async def cut_off() -> AsyncIterator[tuple[Agent, AgentProcess, Network, Network]]:
    """Yield near, far (a process of its own), and what near's control connection and its data go through."""
    tcp = Distant()
    async with (
        agent_process("far", nbytes=NBYTES, backends=["tcp"]) as far,
        network(far.address[1]) as control,
        network(0) as data,
        Agent("near", token=TOKEN, backends=[tcp]) as near,
    ):
        tcp.network = data
        await near.connect((HOST, control.port))
        yield near, far, control, data


async def lose(agent: Agent, control: Network) -> None:
    """Let an agent alone lose the peer that it has reached through `control`; the peer hears nothing of it."""
    events = agent.membership()
    control.hold()
    control.reset_clients()
    async with asyncio.timeout(SECONDS):
        while (await anext(events)).kind != "lost":
            pass


async def lost_and_back(agent: Agent, name: str) -> None:
    """Wait until a peer is lost, and joins again."""
    events = agent.membership()
    async with asyncio.timeout(SECONDS):
        for kind in ("lost", "joined"):
            while (event := await anext(events)).kind != kind or event.peer != name:
                pass


async def works(a: Agent, b: Agent) -> None:
    """Copy from each to the other."""
    for one, other, seed in ((a, b, 1), (b, a, 2)):
        target = np.zeros(1 << 16, np.uint8)
        async with await other.register(target, name="target"), await one.register(pattern(1 << 16, seed)) as source:
            events = one.membership()
            async with asyncio.timeout(SECONDS):
                while "target" not in one.peers[other.name].regions:
                    await anext(events)
                await one.transfer(source, one.peers[other.name].region("target"))
        assert_same(target, pattern(1 << 16, seed))


@pytest.mark.parametrize("page", [NBYTES // 4, 4096], ids=["large", "small"])
async def test_what_was_sent_to_a_peer_before_it_was_given_up_does_not_overwrite_what_is_newer(page: int) -> None:
    async with cut_off() as (near, far, control, data):
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here, there = await near.register(mine, name="mine"), near.peers["far"].region("memory")
        data.hold()
        # One small page goes by the express connection.
        cuts = [slice(0, page)] if page == 4096 else [slice(at, at + page) for at in range(0, NBYTES, page)]
        calls = [asyncio.ensure_future(near.transfer(here[cut], there[cut])) for cut in cuts]
        await data.holds(len(calls) * page)
        data.reset_clients()
        await lose(near, control)
        async with asyncio.timeout(SECONDS):
            for call in calls:
                with pytest.raises(PeerLost):
                    await call
            # far has heard nothing of it.
            peer = await near.connect((HOST, control.port))
            mine[:] = await asyncio.to_thread(pattern, NBYTES, 3)
            await near.transfer(here, peer.region("memory"))
        assert (await far.order("digest"))["digest"] == digest(3)
        await data.release()
        assert data.refused >= len(calls) * page
        assert data.delivered == 0
        assert (await far.order("digest"))["digest"] == digest(3)
        # What let far in before does not any more: it has been told anew.
        answer = await far.order("transfer", peer="near", region="mine", put=True)
        assert answer == {"nbytes": NBYTES, "route": "tcp"}


@pytest.mark.parametrize("backend", ["tcp", "ucx", "samehost"])
async def test_a_stopped_peer_is_taken_back_when_it_confirms(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "ucx":
        pytest.importorskip("ucxx")
    monkeypatch.setattr(membership, "LEAVE_SECONDS", 0.1)
    limits = ConnectionLimits(handshake_seconds=0.6)
    async with (
        agent_process("far", nbytes=NBYTES, backends=[backend]) as far,
        Agent("near", token=TOKEN, backends=[backend], connection_limits=limits) as near,
    ):
        peer = await near.connect(far.address)
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here = await near.register(mine)
        far.stop()
        try:
            transfer = near.submit(here, peer.region("memory"))
            while not transfer._record.ops:
                await asyncio.sleep(0)
            async with asyncio.timeout(SECONDS):
                await near.disconnect(peer)
                assert transfer.done()
                with pytest.raises((PeerLost, ProtocolError)):
                    await near.connect(far.address)
        finally:
            far.resume()
        async with asyncio.timeout(SECONDS):
            peer = None
            while peer is None:
                with contextlib.suppress(PeerLost, ProtocolError):
                    peer = await near.connect(far.address)
            mine[:] = await asyncio.to_thread(pattern, NBYTES, 3)
            await near.transfer(here, peer.region("memory"))
        for _ in range(3):
            assert (await far.order("digest"))["digest"] == digest(3)


@pytest.mark.parametrize("backends", [["tcp"], ["ucx"], ["samehost"]], ids=lambda names: names[0])
async def test_the_peer_parts_before_it_is_used_again(backends: list[str]) -> None:
    if backends == ["ucx"]:
        pytest.importorskip("ucxx")
    async with Agent("a", token=TOKEN, backends=backends) as a, Agent("b", token=TOKEN, backends=backends) as b:
        _, port = await b.serve(HOST, 0)
        async with network(port) as control:
            for _ in range(3):
                await a.connect((HOST, control.port))
                before = await b.wait_peer("a")
                await lose(a, control)
                assert before.connected
                watching = asyncio.create_task(lost_and_back(b, "a"))
                await asyncio.sleep(0)
                async with asyncio.timeout(SECONDS):
                    await a.connect((HOST, control.port))
                    await watching
                assert not before.connected
                assert "had given this agent up" in before.gone
                await works(a, b)
                await a.disconnect("b")
                async with asyncio.timeout(SECONDS):
                    while "a" in b.peers:
                        await asyncio.sleep(0)


async def test_what_is_told_before_the_confirmation_is_heard_after_it() -> None:
    count, tcp = 3 * PIECE_REGIONS, Fencing()
    memory = np.zeros((count + 1, 8), np.uint8)
    async with Agent("a", token=TOKEN, backends=["tcp"]) as a, Agent("b", token=TOKEN, backends=[tcp]) as b:
        _, port = await b.serve(HOST, 0)
        for number in range(count):
            await b.register(memory[number], name=f"r{number}")
        async with network(port) as control:
            await a.connect((HOST, control.port))
            await b.wait_peer("a")
            await lose(a, control)
            tcp.stuck = asyncio.Event()
            joining = asyncio.create_task(a.connect((HOST, port)))
            async with asyncio.timeout(SECONDS):
                while not any(link.announced for link in a._membership._links):
                    await asyncio.sleep(0)
                # All that b is, and this besides, has come; that it has parted has not.
                await b.register(memory[count], name="late")
                closing = asyncio.create_task(b._membership.regions["r0"].aclose())
                done, _ = await asyncio.wait([joining], timeout=0.1)
                assert not done
                assert "b" not in a.peers
                tcp.stuck.set()
                peer = await joining
                await closing
                assert set(peer.regions) == {f"r{number}" for number in range(1, count)} | {"late"}
                await b.wait_peer("a")
                await works(a, b)


async def test_one_that_was_given_up_and_does_not_know_it_dials_too() -> None:
    async with Agent("a", token=TOKEN, backends=["tcp"]) as a, Agent("b", token=TOKEN, backends=["tcp"]) as b:
        at_a, at_b = await a.serve(HOST, 0), await b.serve(HOST, 0)
        async with network(at_b[1]) as control:
            for turns in range(10):
                await a.connect((HOST, control.port))
                await b.wait_peer("a")
                await lose(a, control)
                async with asyncio.timeout(SECONDS):
                    dialling = asyncio.create_task(b.connect(at_a))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    await asyncio.gather(a.connect(at_b), dialling, return_exceptions=True)
                    # What b has dialled may have told it of its loss, and be what is left.
                    await asyncio.gather(
                        *(_until_stable(one, other, at) for one, other, at in ((a, "b", at_b), (b, "a", at_a)))
                    )
                    await works(a, b)
                    await a.disconnect("b")
                    while "a" in b.peers:
                        await asyncio.sleep(0)


async def _until_stable(agent: Agent, name: str, address: tuple[str, int]) -> None:
    while name not in agent.peers:
        try:
            await agent.connect(address)
        except (PeerLost, ConnectionError):
            await asyncio.sleep(0.01)


async def test_both_have_given_each_other_up_and_dial_at_once() -> None:
    async with Agent("a", token=TOKEN, backends=["tcp"]) as a, Agent("b", token=TOKEN, backends=["tcp"]) as b:
        at_a, at_b = await a.serve(HOST, 0), await b.serve(HOST, 0)
        await asyncio.gather(a.connect(at_b), b.connect(at_a))
        for turns in range(20):
            lost = [asyncio.create_task(_gone(one, other)) for one, other in ((a, "b"), (b, "a"))]
            await asyncio.sleep(0)
            for one, other in ((a, "b"), (b, "a")):
                link = one.peers[other].link
                assert link is not None
                link.give_up("the test says so")
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*lost)
                dialling = asyncio.create_task(b.connect(at_a))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await asyncio.gather(a.connect(at_b), dialling)
                await works(a, b)
            assert (a.statistics().peers, b.statistics().peers) == (1, 1)


async def _gone(agent: Agent, name: str) -> None:
    events = agent.membership()
    while name in agent.peers:
        await anext(events)


class Fencing(TCPBackend):
    """Does not come to an end of a fence while `stuck`, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.error = ""

    async def fence(self, peer: PeerInfo, mark: bytes) -> None:
        if self.stuck is not None:
            self.asked.set()
            await self.stuck.wait()
        if self.error:
            raise BackendError(self.error, backend=self.name)
        await super().fence(peer, mark)


async def test_a_peer_that_does_not_confirm_is_not_taken_back() -> None:
    tcp = Fencing()
    limits = ConnectionLimits(handshake_seconds=0.6)
    async with (
        Agent("a", token=TOKEN, backends=["tcp"], connection_limits=limits) as a,
        Agent("b", token=TOKEN, backends=[tcp]) as b,
    ):
        _, port = await b.serve(HOST, 0)
        async with network(port) as control, network(port) as second:
            await a.connect((HOST, control.port))
            await b.wait_peer("a")
            await lose(a, control)
            tcp.stuck = asyncio.Event()
            with pytest.raises(PeerLost, match="'b' did not confirm within 0.6 s") as raised:
                async with asyncio.timeout(SECONDS):
                    calling = asyncio.ensure_future(a.connect((HOST, second.port)))
                    await tcp.asked.wait()
                    # Its end is not heard of: what could not be confirmed on it is not taken for confirmed by the next.
                    second.hold()
                    await calling
            assert raised.value.retryable
            assert "b" not in a.peers
            assert a._membership._questions._answers == a._membership._joining._rejoins == {}
            tcp.stuck.set()
            tcp.error = "out of memory"
            with pytest.raises(PeerLost, match="'b' cannot confirm .*out of memory"):
                async with asyncio.timeout(SECONDS):
                    await a.connect((HOST, port))
            tcp.error = ""
            async with asyncio.timeout(SECONDS):
                await a.connect((HOST, port))
                await b.wait_peer("a")
                await works(a, b)
            assert b._membership._joining._rejoining == set()
            assert list(b._membership._joining._returned) == [("a", a.incarnation)]
            await a.disconnect("b")
            async with asyncio.timeout(SECONDS):
                while b._membership._joining._returned:
                    await asyncio.sleep(0)
            assert b._membership._joining._turns == {}


async def test_who_left_says_so_when_it_comes_back_and_is_taken_in_at_once() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, _):
        for _ in range(2):
            await a.disconnect("b")
            await connect(a, b)
            await works(a, b)


async def test_a_life_before_is_parted_from_before_the_next_is_told_of_anything() -> None:
    memory = FaultyBackend(MemoryBackend())
    async with Agent("b", token={"a": "of a"}, backends=[memory]) as b:
        address = await b.serve(HOST, 0)
        here = await b.register(np.zeros(64, np.uint8))
        async with (
            Agent("a", token="of a", backends=["memory"]) as first,
            Agent("a", token="of a", backends=["memory"]) as second,
        ):
            await first.register(np.zeros(64, np.uint8), name="kv")
            await first.connect(address)
            peer = await b.wait_peer("a")
            with memory.hang(stubborn=True) as gate:
                transfer = b.submit(here, peer.region("kv"))
                await gate.reached()
                joining = asyncio.ensure_future(second.connect(address))
                done, _ = await asyncio.wait([joining], timeout=0.2)
                assert not done
                gate.release()
            async with asyncio.timeout(SECONDS):
                await joining
                with pytest.raises(PeerLost):
                    await transfer
                assert (await b.wait_peer("a")).incarnation == second.incarnation


async def test_who_is_lost_while_it_joins_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Agent("a", token=TOKEN, backends=["memory"]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        address = await b.serve(HOST, 0)
        joining = a._membership._joining
        tell = joining._tell

        def tell_and_lose(link: Link) -> None:
            tell(link)
            a._membership._members.losses.add("b", b.incarnation)

        with monkeypatch.context() as patched:
            patched.setattr(joining, "_tell", tell_and_lose)
            with pytest.raises(PeerLost, match="was lost while it joined") as raised:
                await a.connect(address)
        assert raised.value.retryable
        await a.connect(address)
        await b.wait_peer("a")
        await works(a, b)


async def test_what_comes_late_on_a_connection_that_was_given_up_is_not_heard() -> None:
    metadata = encode_frame(FrameType.METADATA, encode_announcement("odd", "1", None, [], []))
    async with Agent("b", token=TOKEN, backends=["memory"]) as b:
        address = await b.serve(HOST, 0)
        async with stranger(address) as early, stranger(address) as late:
            await early.authenticate("odd", TOKEN.encode())
            await late.authenticate("odd", TOKEN.encode())
            late.writer.write(encode_json(FrameType.REJOIN, {"id": 5, "number": 3}))
            kinds = [await late.frame() for _ in range(2)]
            assert (FrameType.FENCED, b'{"id":5}') in kinds
            early.writer.write(metadata)
            await early.ended()
            assert "odd" not in b.peers
            late.writer.write(metadata)
            assert (await b.wait_peer("odd")).incarnation == "1"


# Who lies.


async def test_a_stranger_does_not_part_two_that_are_connected() -> None:
    async with two_agents(backends=["memory"]) as (a, b, _):
        peer = b.peers["a"]
        async with stranger(b.address or ("", 0)) as thief:
            await thief.authenticate("a", TOKEN.encode(), a.incarnation)
            thief.writer.write(encode_json(FrameType.REJOIN, {"id": 1, "number": 7}))
            ended = await thief.ended()
        assert ended[-1][0] is FrameType.REFUSED
        assert b"belongs to an agent that is connected and alive" in ended[-1][1]
        assert b.peers["a"] is peer
        await works(a, b)


@pytest.mark.parametrize(
    "said",
    [
        [{"id": 1, "number": 0}],
        [{"id": 1, "number": True}],
        [{"id": 1}],
        [{"id": 1, "number": 1 << 63}],
        2 * [{"id": 1, "number": 1}],
    ],
)
async def test_what_is_no_rejoin_is_refused(said: list[dict[str, Any]]) -> None:
    async with Agent("b", token=TOKEN, backends=["memory"]) as b:
        async with stranger(await b.serve(HOST, 0)) as odd:
            await odd.authenticate("odd", TOKEN.encode())
            for one in said:
                odd.writer.write(encode_json(FrameType.REJOIN, one))
            assert (await odd.ended())[-1][0] is FrameType.REFUSED
        assert not b.peers


async def test_a_rejoin_comes_before_the_metadata() -> None:
    async with Agent("a", token=TOKEN, backends=["memory"]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        await connect(a, b)
        link = a.peers["b"].link
        assert link is not None
        events = b.membership()
        link.send(encode_json(FrameType.REJOIN, {"id": 1, "number": 1}))
        async with asyncio.timeout(SECONDS):
            event = await anext(events)
        assert (event.kind, "REJOIN comes twice, or after METADATA" in event.reason) == ("lost", True)


# Who was lost.


def test_losses_are_numbered_by_life() -> None:
    losses = Losses()
    assert losses.number("a", "1") == 0
    losses.add("a", "1")
    losses.add("b", "1")
    first = losses.number("a", "1")
    assert 0 < first < losses.number("b", "1")
    losses.add("a", "1")
    assert losses.number("a", "1") > losses.number("b", "1")
    assert losses.number("a", "2") == 0
    losses.add("a", "2")
    assert losses.number("a", "1") == 0


def test_of_losses_that_are_forgotten_none_is_denied() -> None:
    losses = Losses(remembered=2)
    for name in ("a", "b", "c"):
        losses.add(name, "1")
    assert 0 < losses.number("a", "1") < losses.number("b", "1") < losses.number("c", "1")
    # Nobody knows any more that it was not lost.
    assert losses.number("d", "1") == losses.number("a", "1")
