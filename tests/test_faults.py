"""Peers that die, stop, come back or lie; and a backend that fails."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixl_async import Agent, AuthenticationError, BackendError, ConfigurationError, PeerLost, load_backend
from nixl_async.testing import FaultyBackend, assert_same, pattern
from nixl_async.wire import FrameType, Greeting, encode_frame
from tests.agents import TOKEN, AgentProcess, agent_process, connect, two_agents

LARGE = 32 << 20
PROMPT_SECONDS = 1.0
ROUTES = ["samehost", "tcp", "ucx"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_killed_peer(route: str, when: str) -> None:
    async with agent_process("far", nbytes=LARGE) as far, Agent("near", token=TOKEN, backends=[route]) as near:
        here = await near.register(await asyncio.to_thread(pattern, LARGE, 5))
        peer = await near.connect(far.address)
        remote, events = peer.region("memory"), near.membership()

        async def on_and_on() -> None:
            while True:
                await near.transfer(here, remote)

        task = asyncio.create_task(on_and_on()) if when == "during" else None
        if when == "after":
            await near.transfer(here, remote)
        elif task is not None:
            await asyncio.wait([task], timeout=0.03)
        far.kill()
        await far.process.wait()
        died = time.monotonic()
        if task is None:
            task = asyncio.create_task(on_and_on())
        done, _ = await asyncio.wait([task], timeout=10)
        assert done
        assert isinstance(task.exception(), PeerLost)
        assert time.monotonic() - died < PROMPT_SECONDS
        async with asyncio.timeout(PROMPT_SECONDS):
            assert (await anext(events)).kind == "lost"
        assert "far" not in near.peers


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stopped_peer(route: str) -> None:
    async with agent_process("far", nbytes=LARGE) as far, Agent("near", token=TOKEN, backends=[route]) as near:
        mine, expected = await asyncio.to_thread(pattern, LARGE, 5), await asyncio.to_thread(pattern, LARGE, 5)
        here = await near.register(mine)
        remote = (await near.connect(far.address)).region("memory")
        await near.transfer(here, remote)
        far.stop()
        try:
            task = asyncio.ensure_future(near.transfer(remote, here))
            await asyncio.wait([task], timeout=0.5)
            # Its memory is there for samehost; the others wait for its threads, and the peer stays a peer.
            assert task.done() == (route == "samehost")
            assert "far" in near.peers
        finally:
            far.resume()
        async with asyncio.timeout(20):
            await task
        await asyncio.to_thread(assert_same, mine, expected)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_peer_that_restarts_under_its_name(route: str) -> None:
    async with Agent("near", token=TOKEN, backends=[route]) as near:
        got = np.zeros(1 << 20, np.uint8)
        here = await near.register(got)
        events = near.membership()
        async with agent_process("far", seed=1) as far:
            old = (await near.connect(far.address)).region("memory")
            await near.transfer(old, here)
            assert_same(got, pattern(1 << 20, 1))
        assert [(await anext(events)).kind for _ in range(2)] == ["joined", "lost"]
        async with agent_process("far", seed=2) as far:
            fresh = (await near.connect(far.address)).region("memory")
            with pytest.raises(PeerLost):
                await near.transfer(old, here)
            await near.transfer(fresh, here)
            assert_same(got, pattern(1 << 20, 2))
            assert (await anext(events)).kind == "joined"


async def test_a_peer_that_leaves_in_order() -> None:
    async with Agent("near", token=TOKEN) as near, agent_process("far") as far:
        events = near.membership()
        await near.connect(far.address)
        await far.send("leave")
        async with asyncio.timeout(10):
            assert [(await anext(events)).kind for _ in range(2)] == ["joined", "left"]


@pytest.mark.parametrize(("ours", "theirs"), [("wrong", "right"), (None, "right"), ("right", None)])
async def test_tokens_that_differ(ours: str | None, theirs: str | None) -> None:
    def options(token: str | None) -> dict[str, object]:
        return {"token": token} if token else {"authenticate": False}

    async with Agent("a", **options(ours)) as a, Agent("b", **options(theirs)) as b:  # type: ignore[arg-type]
        address = await b.serve()
        with pytest.raises((AuthenticationError, PeerLost)):
            await a.connect(address)
        assert not a.peers
        assert not b.peers


async def test_no_token_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIXL_ASYNC_TOKEN", raising=False)
    async with Agent("a") as a:
        with pytest.raises(ConfigurationError, match="authenticate=False"):
            await a.serve()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(
    st.one_of(
        st.binary(min_size=1, max_size=300),
        st.sampled_from(list(FrameType)).map(lambda kind: encode_frame(kind, b"{}")),
        st.sampled_from(list(FrameType)).map(lambda kind: Greeting.create("x", "y").encode() + encode_frame(kind, b"z" * 32)),
        st.just(b"\xff\xff\xff\xff\x01"),
    )
)
def test_whatever_a_stranger_sends_closes_its_connection_only(data: bytes) -> None:
    async def run() -> None:
        async with two_agents() as (a, b, peer):
            address = b.address
            assert address is not None
            reader, writer = await asyncio.open_connection(*address)
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(10):
                while await reader.read(65536):
                    pass
            writer.close()
            assert set(b.peers) == {"a"}
            await a.notify(peer, b"still here")
            async with asyncio.timeout(10):
                assert (await anext(b.notifications())).payload == b"still here"

    asyncio.run(run())


async def test_the_next_route_takes_over() -> None:
    first, second = FaultyBackend(load_backend("memory")), load_backend("tcp")
    async with Agent("a", token=TOKEN, backends=[first, second]) as a, Agent("b", token=TOKEN) as b:
        theirs = np.zeros(1 << 20, np.uint8)
        await b.register(theirs, name="theirs")
        peer = await connect(a, b)
        here = await a.register(pattern(1 << 20, 1))
        with first.fail_next(BackendError("on purpose"), times=99):
            result = await a.transfer(here, peer.region("theirs"))
        assert result.route == "tcp"
        assert_same(theirs, pattern(1 << 20, 1))


async def test_what_may_succeed_later_is_tried_again() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        got = np.zeros(4096, np.uint8)
        src, dst = await a.register(pattern(4096, 1)), await a.register(got)
        with faulty.fail_next(BackendError("busy", retryable=True), times=2):
            result = await a.transfer(src, dst)
        assert result.attempts == 3
        assert_same(got, pattern(4096, 1))


async def test_a_killed_peer_ends_every_wait_for_it() -> None:
    async with agent_process("far", nbytes=LARGE) as far, Agent("near", token=TOKEN, backends=["tcp"]) as near:
        here = await near.register(np.zeros(LARGE, np.uint8))
        remote = (await near.connect(far.address)).region("memory")
        far.stop()
        transfers = [near.submit(here, remote) for _ in range(20)]
        await _moving(far)
        far.kill()
        ended = await asyncio.wait_for(asyncio.gather(*transfers, return_exceptions=True), 10)
        assert all(isinstance(error, PeerLost) for error in ended)


async def _moving(far: AgentProcess) -> None:
    await asyncio.sleep(0)
    assert far.process.returncode is None
