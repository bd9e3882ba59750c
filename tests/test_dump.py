"""A dump says what each transfer waits for and what it has been through, within its bound."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from nixl_async import Agent, TransferState, load_backend
from nixl_async.testing import FaultyBackend
from tests.agents import TOKEN, connect, known

NBYTES = 1 << 20


async def test_what_is_live_with_its_history() -> None:
    faulty = FaultyBackend(load_backend("tcp"))
    async with Agent("a", token=TOKEN, backends=[faulty]) as a, Agent("b", token=TOKEN, backends=["tcp"]) as b:
        peer = await connect(a, b)
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        await a.transfer(mine, peer.region("theirs"))
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held = a.submit(mine, peer.region("theirs"), after=never, traffic_class="bulk", priority=3)
        with faulty.hang():
            stuck = a.submit(peer.region("theirs"), mine, deadline=asyncio.get_running_loop().time() + 60)
            async with asyncio.timeout(10):
                while stuck.state is not TransferState.ACTIVE:
                    await asyncio.sleep(0)
            told = a.dump()
            bounded = a.dump(1)
            for transfer in (held, stuck):
                transfer.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await transfer
        assert json.loads(json.dumps(told)) == told
        first, second = told["transfers"]
        assert (first["id"], first["state"], first["waits_for"]) == (held.id, "queued", "stream")
        assert (first["class"], first["priority"], first["put"], first["history"]) == ("bulk", 3, True, [])
        assert (second["state"], second["waits_for"], second["put"], second["peer"]) == ("active", "ops", False, "b")
        assert second["ops"]
        assert 0 < second["deadline_in"] <= 60
        assert [names for _, *names in second["history"]] == [["QUEUED", "admit", "ACTIVE"]]
        assert (told["counts"]["live"], told["counts"]["done"]) == (2, 1)
        (queue,) = (one for one in told["queues"] if one["backend"] == "tcp")
        assert queue["ops"] >= 1
        assert queue["bytes"] == NBYTES
        assert [(one["name"], one["suspect"], one["backends"]) for one in told["peers"]] == [("b", False, ["tcp"])]
        assert told["moved"][0]["bytes"] == NBYTES
        assert [one["id"] for one in bounded["transfers"]] == [held.id]
        assert bounded["omitted"] == {"transfers": 1, "peers": 0}
        assert a.dump()["transfers"] == []


async def test_an_agent_that_is_not_open_says_so() -> None:
    agent = Agent("a", token=TOKEN)
    assert agent.dump()["state"] == "new"
    async with agent:
        assert agent.dump()["counts"]["live"] == 0
    assert agent.dump()["state"] == "closed"
