"""Taking strangers in: who gives way when there are too many, what each source may have, and what is left when it closes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nixl_async import Agent, ConfigurationError, ConnectionLimits
from nixl_async.acceptor import Acceptor, _Allowance, _source
from nixl_async.wire import FrameType, Greeting
from tests.agents import TOKEN
from tests.strangers import Stranger, stranger


@pytest.mark.parametrize(
    ("address", "source"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        ("", "this host"),
    ],
)
def test_what_a_connection_counts_for(address: Any, source: str) -> None:
    assert _source(address) == source


@pytest.mark.parametrize(
    "limits",
    [
        {"handshake_seconds": 0},
        {"handshake_seconds": float("inf")},
        {"handshake_seconds": "5"},
        {"half_open": 0},
        {"half_open": 1.5},
        {"half_open": True},
        {"per_second": -1},
        {"burst": 0},
        {"connections": None},
    ],
)
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(limits))):
        ConnectionLimits(**limits)


def test_an_allowance_is_used_up_and_comes_back() -> None:
    limits = ConnectionLimits(per_second=1e-6, burst=3)
    allowance = _Allowance(3.0)
    assert [allowance.take(limits) for _ in range(5)] == [True, True, True, False, False]
    allowance.at -= 2e6
    assert [allowance.take(limits) for _ in range(3)] == [True, True, False]


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[tuple[Agent, Acceptor]]:
    chosen = ConnectionLimits(**{"handshake_seconds": 30, **limits})
    async with Agent("b", token=TOKEN, backends=["memory"], connection_limits=chosen) as agent:
        await agent.serve()
        assert agent._membership._server is not None
        yield agent, agent._membership._server


async def _open(stack: contextlib.AsyncExitStack, agent: Agent, *, greets: bool) -> Stranger:
    assert agent.address is not None
    one = await stack.enter_async_context(stranger(agent.address))
    if greets:
        one.writer.write(Greeting.create("x", "1").encode())
        assert (await one.frame())[0] is FrameType.HELLO
    return one


async def _is_open(one: Stranger) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            with contextlib.suppress(EOFError):
                await one.frame()
            return False
    return True


async def _is_refused(agent: Agent) -> bool:
    assert agent.address is not None
    try:
        async with stranger(agent.address) as one:
            return not await _is_open(one)
    except ConnectionResetError:
        return True


async def test_the_silent_give_way_first_and_then_the_oldest() -> None:
    async with served(half_open=3) as (agent, acceptor), contextlib.AsyncExitStack() as stack:
        greeted = [await _open(stack, agent, greets=True) for _ in range(2)]
        silent = await _open(stack, agent, greets=False)
        fourth = await _open(stack, agent, greets=True)
        assert [await _is_open(one) for one in (*greeted, silent, fourth)] == [True, True, False, True]
        fifth = await _open(stack, agent, greets=True)
        assert [await _is_open(one) for one in (*greeted, fourth, fifth)] == [False, True, True, True]
        assert (acceptor.half_open, acceptor.turned_away) == (3, 2)
        async with Agent("a", token=TOKEN, backends=["memory"]) as a:
            await a.connect(agent.address)  # type: ignore[arg-type]
            assert acceptor.half_open == 2


async def test_the_source_that_has_the_most_gives_way() -> None:
    async with served(half_open=4) as (agent, _), contextlib.AsyncExitStack() as stack:
        assert agent.address is not None
        few = [await _open(stack, agent, greets=False)]
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.bind(("127.0.0.3", 0))
            await asyncio.get_running_loop().sock_connect(sock, agent.address)
        few.append(await _open(stack, agent, greets=False))
        assert [await _is_open(one) for one in few] == [True, True]


async def test_one_source_that_comes_too_often_is_turned_away_and_others_are_not() -> None:
    async with served(burst=2, per_second=0.001) as (agent, acceptor), contextlib.AsyncExitStack() as stack:
        ones = [await _open(stack, agent, greets=False) for _ in range(2)]
        for _ in range(2):
            assert await _is_refused(agent)
        assert [await _is_open(one) for one in ones] == [True, True]
        assert acceptor.turned_away == 2
        assert agent.address is not None
        sock = stack.enter_context(socket.socket())
        sock.setblocking(False)
        sock.bind(("127.0.0.3", 0))
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, agent.address)
        await loop.sock_sendall(sock, Greeting.create("x", "1").encode())
        async with asyncio.timeout(5):
            assert await loop.sock_recv(sock, 100)


async def test_those_who_authenticate_do_not_count() -> None:
    async with served(burst=2, per_second=0.001) as (agent, acceptor):
        for _ in range(5):
            async with Agent("a", token=TOKEN, backends=["memory"]) as a:
                await a.connect(agent.address)  # type: ignore[arg-type]
        assert acceptor.turned_away == 0


async def test_no_more_connections_than_allowed() -> None:
    async with served(connections=2) as (agent, acceptor), contextlib.AsyncExitStack() as stack:
        for name in ("a", "c"):
            other = await stack.enter_async_context(Agent(name, token=TOKEN, backends=["memory"]))
            await other.connect(agent.address)  # type: ignore[arg-type]
        assert await _is_refused(agent)
        assert acceptor.turned_away == 1
        assert set(agent.peers) == {"a", "c"}


async def test_without_descriptors_it_waits_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixl_async.acceptor.PAUSE_SECONDS", 0.01)
    async with served() as (agent, acceptor), contextlib.AsyncExitStack() as stack:
        first = await _open(stack, agent, greets=False)
        failures = iter([errno.EMFILE, errno.EMFILE])
        listener = acceptor._listeners[0]

        class Failing:
            def accept(self) -> Any:
                if (number := next(failures, None)) is not None:
                    raise OSError(number, "no more")
                return listener.accept()

        asyncio.get_running_loop().remove_reader(listener.fileno())
        acceptor._accept(Failing())  # type: ignore[arg-type]
        assert acceptor._paused is not None
        assert not await _is_open(first)
        await asyncio.sleep(0.05)
        async with Agent("a", token=TOKEN, backends=["memory"]) as a:
            await a.connect(agent.address)  # type: ignore[arg-type]


async def test_what_comes_to_nothing_is_reported_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (agent, acceptor):
        for _ in range(30):
            async with stranger(agent.address) as one:  # type: ignore[arg-type]
                one.writer.write(b"\xff" * 9)
                await one.ended()
        assert caplog.text.count("came to nothing") == 1
        acceptor._report_after = 0
        async with stranger(agent.address) as one:  # type: ignore[arg-type]
            one.writer.write(b"\xff" * 9)
            await one.ended()
        assert "30 connections came to nothing, the last from 127.0.0.1" in caplog.text


async def test_closing_ends_the_half_open_ones() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with served() as (agent, acceptor):
            ones = [await _open(stack, agent, greets=bool(n % 2)) for n in range(6)]
        assert acceptor.half_open == 0
        assert not any([await _is_open(one) for one in ones])


async def test_localhost_is_all_of_its_addresses_at_one_port() -> None:
    async with Agent("b", token=TOKEN, backends=["memory"]) as agent:
        _, port = await agent.serve("localhost")
        assert agent._membership._server is not None
        assert {sock.getsockname()[1] for sock in agent._membership._server._listeners} == {port}
    for bad in ("name-that-does-not-exist.invalid", "203.0.113.1"):
        async with Agent("b", token=TOKEN, backends=["memory"]) as agent:
            with pytest.raises(ConfigurationError, match="cannot serve"):
                await agent.serve(bad)
