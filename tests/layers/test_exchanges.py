"""The messages of pushes and pulls: what is malformed harms nobody, what nobody takes is bounded, users never see them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import numpy as np
import pytest

from nixl_async import Aborted, Agent, LayerPlan, Peer
from nixl_async.layers import exchanges
from nixl_async.layers.exchanges import PREFIX, encode
from nixl_async.notifications import WINDOW_NBYTES
from tests.agents import two_agents
from tests.layers.pairs import request_between, turns


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Agent, Agent, Peer]]:
    async with two_agents(backends=["memory"]) as made:
        yield made


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        json.dumps({"t": "open"}).encode(),
        json.dumps({"t": "open", "x": "1", "m": True}).encode(),
        json.dumps({"t": "open", "x": 1, "m": True, "k": "shove", "r": "r", "n": 1}).encode(),
        json.dumps({"t": "open", "x": 1, "m": True, "k": "push", "r": "", "n": 1}).encode(),
        json.dumps({"t": "open", "x": 1, "m": True, "k": "push", "r": "r", "n": 0}).encode(),
        json.dumps({"t": "open", "x": 1, "m": True, "k": "push", "r": "r", "n": 1 << 40}).encode(),
        b'{"t":' * 100_000,
    ],
    ids=lambda message: str(message[:60]),
)
async def test_malformed_messages_are_reported_and_dropped(
    pair: tuple[Agent, Agent, Peer], message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, peer = pair
    with caplog.at_level(logging.WARNING, "nixl_async.layers"):
        await a.notify(peer, PREFIX + message)
        await a.notify(peer, b"after")
        async with asyncio.timeout(10):
            assert (await anext(b.notifications())).payload == b"after"
    assert any("peer a sent a malformed message" in record.message for record in caplog.records)
    assert b.statistics().unread_notifications == 0
    assert "b" in a.peers


@pytest.mark.parametrize("layers", [[2], ["0"], 7, [True], [-1]], ids=str)
async def test_numbers_that_are_no_layers_are_dropped(layers: object, caplog: pytest.LogCaptureFixture) -> None:
    async with request_between(2) as on, on.consumer.incoming("r") as incoming:
        async with on.producer.push(on.peer, on.plan()) as push:
            await push.wanted()
            with caplog.at_level(logging.WARNING, "nixl_async.layers"):
                await on.producer.notify(on.peer, encode("layers", 1, mine=True, l=layers))
                await turns()
            assert incoming.arrived == ()
            push.ready(0, 1)
        assert [record for record in caplog.records if "malformed" in record.message]


async def test_unknown_exchanges_are_answered_or_ignored(pair: tuple[Agent, Agent, Peer]) -> None:
    a, _, peer = pair
    answers: list[bytes] = []
    a._exchanges._received = lambda one: answers.append(one.payload)  # type: ignore[method-assign]
    a._membership.inbox._intercepts = [(PREFIX, a._exchanges._received)]
    for kind in ("layers", "confirm", "done", "quiet", "take", "refuse", "whatever", "end"):
        a._exchanges.post("b", kind, 99, mine=True)
    async with asyncio.timeout(10):
        while not answers:
            await asyncio.sleep(0)
    await turns()
    # Who asks for an end must know that nothing moves.
    assert answers == [encode("quiet", 99, mine=False)]
    assert peer.connected


async def test_what_nobody_takes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "MAX_WAITING", 2)
    async with request_between(1) as on:
        pushes = [on.producer.push(on.peer, on.plan(f"r{i}")) for i in range(3)]
        for push in pushes:
            await push.__aenter__()
            push.ready(0)
        with pytest.raises(Aborted, match="2 exchanges wait here already"):
            await pushes[2].__aexit__(None, None, None)
        for name, push in zip(("r0", "r1"), pushes[:2], strict=True):
            async with on.consumer.incoming(name) as incoming:
                assert [one async for one in incoming.layers()] == [0]
            await push.__aexit__(None, None, None)


async def test_what_is_remembered_of_ended_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "MAX_REMEMBERED", 2)
    async with request_between(1) as on:
        for i in range(4):
            async with on.consumer.incoming(f"r{i}"):
                pass
        assert list(on.consumer._exchanges._over) == [("push", "r2"), ("push", "r3")]


async def test_users_never_see_them_and_they_are_not_held_up_for_ever() -> None:
    async with request_between(4) as on, asyncio.timeout(20):
        everything = on.consumer.notifications()
        # The user's own notifications fill the window: ours wait their turn, in order.
        filler = asyncio.ensure_future(on.producer.notify(on.peer, bytes(WINDOW_NBYTES - 64)))
        await filler
        async with on.producer.push(on.peer, on.plan()) as push:
            push.ready(*range(4))
            async with on.consumer.incoming("r") as incoming:
                await turns()
                assert incoming.n_layers is None
                assert len((await anext(everything)).payload) == WINDOW_NBYTES - 64
                assert [one async for one in incoming.layers()] == [0, 1, 2, 3]
        assert on.consumer.statistics().unread_notifications == 0


async def test_a_push_and_a_pull_of_one_name_are_two_things() -> None:
    async with (
        request_between(2) as on,
        asyncio.timeout(10),
        on.consumer.incoming("r") as incoming,
        on.producer.push(on.peer, on.plan()) as push,
    ):
        room = await on.consumer.register(np.zeros(on.near.nbytes, np.uint8))
        async with on.producer.offer("c", "r", 1) as offer:
            offer.ready(0)
            plan = LayerPlan("r", [(on.consumer.peers["p"].region("kv"), room)])
            assert [one async for one in on.consumer.pull("p", plan)] == [0]
        assert incoming.arrived == ()
        push.ready(0, 1)
        assert [one async for one in incoming.layers()] == [0, 1]
