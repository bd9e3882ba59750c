"""Who is alive: a process that ends, one that stops, a network that goes silent; and what it costs to look."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import Agent, ConfigurationError, Liveness, Peer, PeerLost, Quarantined
from nixl_async.liveness import Kernel, Pulse, Vigil, ask_kernel, period
from nixl_async.peers import MembershipEvents
from nixl_async.testing import assert_same, pattern
from tests.agents import TOKEN, AgentProcess, agent_process, known, two_agents
from tests.loops import every_loop

QUICK = Liveness(suspect_seconds=0.4, lost_seconds=3.0, stopped_seconds=1.2)
ANSWERS = Kernel(False, 0.0)
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27


@pytest.mark.parametrize(
    "limits",
    [
        {"suspect_seconds": 0},
        {"suspect_seconds": -1},
        {"lost_seconds": float("nan")},
        {"lost_seconds": "3"},
        {"lost_seconds": True},
        {"stopped_seconds": 1.0},
        {"stopped_seconds": float("inf")},
        {"suspect_seconds": None},
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(limits))):
        Liveness(**limits)


# What is decided, without a clock.


def _run(
    limits: Liveness, seconds: float, kernel: Kernel | None, silent_since: float | None = None
) -> list[tuple[float, str]]:
    """Say nothing for so long, and note what is done when."""
    vigil, told, step = Vigil(limits), [], period(limits)
    for tick in range(1, round(seconds / step) + 1):
        now = tick * step
        if not vigil.due(step):
            continue
        asked = any(kind == "ask" for _, kind in told)
        seen = kernel if silent_since is None else Kernel(asked, now + silent_since)
        verdict = vigil.look(step, seen)
        told += [(now, "suspect")] if verdict.doubt else []
        told += [(now, "ask")] if verdict.ask else []
        if verdict.lost:
            told.append((now, "lost"))
            break
    return told


def test_a_stopped_peer_is_asked_then_suspect_and_lost_only_at_its_limit() -> None:
    told = _run(Liveness(), 70, ANSWERS)
    assert told[0] == (1.0, "ask")
    assert [one for one in told if one[1] != "ask"] == [(2.0, "suspect"), (60.0, "lost")]
    assert 50 <= sum(kind == "ask" for _, kind in told) <= 60
    assert [kind for _, kind in _run(Liveness(stopped_seconds=None), 7200, ANSWERS) if kind != "ask"] == ["suspect"]


@given(st.floats(0.2, 20), st.floats(0.3, 20), st.floats(0, 0.99))
def test_a_silent_network_is_lost_within_its_limit_and_suspect_before(suspect: float, lost: float, late: float) -> None:
    limits = Liveness(suspect, lost, None)
    # The last sign of life came up to a period before the look that noticed it.
    late *= period(limits)
    told = _run(limits, 3 * lost, None, silent_since=late)
    assert [kind for _, kind in told if kind != "ask"] == ["suspect", "lost"]
    when = told[-1][0]
    assert when + late <= lost
    # It was asked, and had time to answer.
    assert when - told[0][0] >= 1.9 * period(limits)


def test_one_that_speaks_is_never_asked_and_one_that_speaks_again_recovers() -> None:
    vigil = Vigil(Liveness())
    for _ in range(100):
        assert vigil.heard() == (False, "", False, "")
    while not (vigil.due(0.5) and vigil.look(0.5, ANSWERS).doubt):
        pass
    assert vigil.suspect
    assert vigil.heard().believe
    assert not vigil.suspect
    assert not vigil.heard().believe
    assert not vigil.due(0.5)


def test_a_question_just_sent_after_a_long_silence_is_no_evidence() -> None:
    vigil = Vigil(Liveness())
    assert vigil.due(1.0)
    # Nothing was exchanged for an hour; the kernel waits for one round trip, and then no more.
    assert vigil.look(0.5, Kernel(False, 3600)).ask
    assert vigil.due(0.5)
    assert not vigil.look(0.5, Kernel(True, 3600)).lost
    vigil.heard()
    assert not vigil.suspect


async def test_nothing_ticks_while_nobody_is_connected() -> None:
    async with two_agents(backends=["memory"], liveness=QUICK) as (a, b, peer):
        pulse = a._membership._pulse
        assert pulse._timer is not None
        await a.disconnect(peer)
        while b.peers:
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            while pulse._timer is not None:
                await asyncio.sleep(0.01)


async def test_a_loop_that_was_held_up_doubts_nobody() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, liveness=QUICK) as near:
        await near.connect(far.address)
        events = near.membership()
        for _ in range(2):
            time.sleep(0.8)  # noqa: ASYNC251
            await asyncio.sleep(0.02)
        await near.notify("far", b"x")
        assert near.peers["far"].connected
        assert events._queue.empty()


def test_the_kernel_says_nothing_of_other_sockets() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert ask_kernel(left) is None
    assert ask_kernel(None) is None
    with socket.socket() as closed:
        closed.close()
        assert ask_kernel(closed) is None


# Real processes.


def _cut(sock: socket.socket) -> None:
    """Let the kernel drop whatever arrives for a socket, as a dead network would."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))


def _cut_all(cut: bool) -> None:
    """Do so to every TCP connection of this process; or let what arrives pass again."""
    targets = {number: os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    for number in [number for number, target in targets.items() if "socket:" in target]:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as sock:
            if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
                if cut:
                    _cut(sock)
                else:
                    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def _socket(peer: Peer) -> socket.socket:
    assert peer.link is not None
    return socket.socket(fileno=os.dup(peer.link.socket.fileno()))


@asynccontextmanager
async def _near_and_far(
    liveness: Liveness | None, nbytes: int = 1 << 20, **options: Any
) -> AsyncIterator[tuple[Agent, AgentProcess, Peer, MembershipEvents]]:
    async with agent_process("far", nbytes=nbytes) as far, Agent("near", token=TOKEN, liveness=liveness, **options) as near:
        peer = await near.connect(far.address)
        yield near, far, peer, near.membership()
        if far.process.returncode is None:
            far.resume()


async def _next(events: MembershipEvents, kind: str, seconds: float) -> str:
    async with asyncio.timeout(seconds):
        event = await anext(events)
    assert (event.kind, event.peer) == (kind, "far")
    return event.reason


@pytest.mark.alone
async def test_a_silent_network_is_noticed_within_three_seconds() -> None:
    # Another process's kernel is this one's too: dropping what comes back is all that can be seen of a network that is gone.
    async with _near_and_far(None, backends=["tcp"]) as (near, _, peer, events):
        await near.notify(peer, b"just now")
        with _socket(peer) as sock:
            _cut(sock)
        began = time.monotonic()
        await _next(events, "suspect", 10)
        assert "acknowledged nothing" in await _next(events, "lost", 10)
        assert time.monotonic() - began < 3.5  # Three seconds are what is promised; the test machine may be busy.
        assert not near.peers


@every_loop
async def test_where_one_way_still_works_the_other_side_knows_at_once() -> None:
    async with _near_and_far(Liveness(0.4, 1.2), backends=["tcp"]) as (_, far, peer, events):
        with _socket(peer) as sock:
            # Nothing comes back any more: what is sent from here on is not acknowledged, and its end would wait behind it.
            _cut(sock)
        await _next(events, "suspect", 10)
        await _next(events, "lost", 10)
        began = time.monotonic()
        async with asyncio.timeout(10):
            while (await far.order("statistics"))["peers"]:
                pass
        # By itself it would need three seconds from when it heard of us last.
        assert time.monotonic() - began < 1.5


async def test_a_network_that_comes_back_in_time_costs_nothing() -> None:
    async with _near_and_far(Liveness(0.4, 10.0)) as (near, far, peer, events):
        with _socket(peer) as sock:
            _cut(sock)
            assert "host" in await _next(events, "suspect", 10)
            assert peer.suspect
            assert "suspect" in repr(peer)
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        await _next(events, "recovered", 10)
        assert not peer.suspect
        await near.notify("far", b"hello")
        assert (await far.order("listen", prefix="hello"))["from"] == "near"


async def test_tcp_connections_outlast_a_gap_of_the_network_that_the_control_connection_outlasts() -> None:
    async with two_agents(backends=["tcp"], liveness=Liveness(0.4, 60.0)) as (a, b, peer):
        await b.register(pattern(1 << 20, 1), name="kv")
        await known(a, peer, "kv")
        got = np.zeros(1 << 20, np.uint8)
        region = await a.register(got)
        await a.transfer(peer.region("kv"), region)
        events = a.membership()
        _cut_all(True)
        try:
            async with asyncio.timeout(10):
                assert (await anext(events)).kind == "suspect"
            # Idle connections are probed once a second meanwhile.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(3.5):
                    pytest.fail(f"{await anext(events)}")
        finally:
            _cut_all(False)
        async with asyncio.timeout(20):
            assert (await anext(events)).kind == "recovered"
        got[:] = 0
        await a.transfer(peer.region("kv"), region)
        assert_same(got, pattern(1 << 20, 1))


@every_loop
async def test_a_stopped_peer_is_suspect_and_recovers() -> None:
    async with _near_and_far(Liveness(0.4, 3.0, 60.0)) as (near, far, peer, events):
        far.stop()
        assert "its host answers" in await _next(events, "suspect", 10)
        assert near.peers["far"] is peer
        assert peer.connected
        far.resume()
        await _next(events, "recovered", 10)
        assert (await far.order("statistics"))["peers"] == ["near"]


async def test_a_stopped_peer_whose_buffers_are_full_is_not_lost() -> None:
    async with _near_and_far(Liveness(0.4, 1.5, 60.0)) as (near, far, peer, events):
        far.stop()
        sending = asyncio.create_task(_on_and_on(near))
        await _next(events, "suspect", 10)
        # Twice what a silent network is given: its host acknowledges that it takes no more.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3):
                pytest.fail(f"{await anext(events)}")
        assert peer.connected
        far.resume()
        await _next(events, "recovered", 10)
        sending.cancel()
        await asyncio.wait([sending])


async def _on_and_on(near: Agent) -> None:
    while True:
        await near.notify("far", bytes(1 << 20))


@pytest.mark.parametrize("route", ["samehost", "tcp"])
@pytest.mark.slow
async def test_a_peer_that_was_stopped_for_too_long_corrupts_nothing_when_it_goes_on(route: str) -> None:
    nbytes = 32 << 20
    first, second = await asyncio.to_thread(pattern, nbytes, 8), await asyncio.to_thread(pattern, nbytes, 9)
    async with _near_and_far(QUICK, nbytes, backends=[route]) as (near, far, peer, events):
        here, then = await near.register(first), await near.register(second)
        writing = asyncio.create_task(_again_and_again(near, here, peer.region("memory")))
        await asyncio.wait([writing], timeout=0.05)
        far.stop()
        await _next(events, "suspect", 10)
        assert "said nothing" in await _next(events, "lost", 10)
        async with asyncio.timeout(20):
            # What was handed to the peer's threads through shared memory cannot be taken back while they are stopped.
            with pytest.raises((PeerLost, Quarantined) if route == "samehost" else PeerLost):
                await writing
        # Nothing reads it any more.
        first[:] = 0
        far.resume()
        again = await near.connect(far.address)
        await near.transfer(then, again.region("memory"))
        want = (await far.order("digest"))["digest"]
        back = np.zeros(nbytes, np.uint8)
        await near.transfer(again.region("memory"), await near.register(back))
        await asyncio.to_thread(assert_same, back, second)
        assert (await far.order("digest"))["digest"] == want


async def _again_and_again(near: Agent, here: Any, there: Any) -> None:
    while True:
        await near.transfer(here, there)


async def test_an_ended_process_is_noticed_at_once_whatever_the_limits() -> None:
    async with _near_and_far(Liveness(60, 60, None), backends=["tcp"]) as (_, far, __, events):
        far.kill()
        await far.process.wait()
        began = time.monotonic()
        await _next(events, "lost", 10)
        assert time.monotonic() - began < 1.0


CROWD = """
import asyncio, sys
from nixl_async import Agent

async def main():
    count, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    agents = [Agent(f"peer-{number}", token="t", backends=["memory"]) for number in range(count)]
    for agent in agents:
        await agent.__aenter__()
        await agent.connect((host, port))
    print("there", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

asyncio.run(main())
"""


async def test_a_hundred_idle_peers_wake_the_loop_seldom() -> None:
    pipe = asyncio.subprocess.PIPE
    async with Agent("hub", token="t", backends=["memory"]) as hub:
        host, port = await hub.serve()
        crowd = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CROWD, "100", host, str(port), stdin=pipe, stdout=pipe
        )
        try:
            assert crowd.stdin is not None
            assert crowd.stdout is not None
            assert await crowd.stdout.readline() == b"there\n"
            assert len(hub.peers) == 100
            before, began = _waits(), time.monotonic()
            await asyncio.sleep(3)
            rate = (_waits() - before) / (time.monotonic() - began)
            assert not any(peer.suspect for peer in hub.peers.values())
            # Each asks, and is asked, once in some seconds: they are seen to in groups.
            assert rate < 60
        finally:
            crowd.kill()
            await crowd.wait()
            crowd.stdin.close()


def _waits() -> int:
    """How often this process has gone to sleep."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


async def test_connections_are_looked_at_in_small_groups() -> None:
    class Quiet:
        def __init__(self) -> None:
            self.vigil, self.heard, self.socket, self.asked = Vigil(QUICK), False, None, 0

        def ping(self) -> None:
            self.asked += 1
            asked.append(self)

        def doubt(self, reason: str) -> None:
            pass

        def believe(self) -> None:
            pass

        def give_up(self, reason: str) -> None:
            pulse.discard(self)

    asked: list[Quiet] = []
    pulse = Pulse(QUICK)
    quiet = [Quiet() for _ in range(200)]
    for one in quiet:
        pulse.add(one)
    largest = before = 0
    async with asyncio.timeout(10):
        while len(asked) < 200:
            await asyncio.sleep(0)
            largest, before = max(largest, len(asked) - before), len(asked)
        assert 1 <= largest <= 32
        while pulse._timer is not None:
            await asyncio.sleep(0.01)
