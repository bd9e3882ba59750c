"""What is recorded is what happened, in the form that Chrome defines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nixl_async import CPUStream, LayerPlan
from nixl_async.timeline import Timeline, record
from tests.agents import known, two_agents

NBYTES = 1 << 20


def check(events: list[dict[str, Any]]) -> None:
    """Hold events against the format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
    opened: dict[tuple[Any, ...], int] = {}
    for event in events:
        assert {"ph", "name", "pid"} <= set(event)
        if event["ph"] == "M":
            continue
        assert isinstance(event["ts"], float)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] in "be":
            key = event["pid"], event["cat"], event["id"], event["name"]
            opened[key] = opened.get(key, 0) + (1 if event["ph"] == "b" else -1)
            assert opened[key] in (0, 1), event
    assert not any(opened.values())


async def test_transfers_ops_queues_streams_and_layers(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        theirs = peer.region("theirs")
        half = NBYTES // 2
        plan = LayerPlan("request 7", [(mine[:half], theirs[:half]), (mine[half:], theirs[half:])])
        with record(a, b, path=path), CPUStream() as stream:
            await a.transfer(mine, theirs, after=stream)
            await a.transfer(mine[:64], theirs[:64])
            async with b.incoming("request 7") as incoming, a.push(peer, plan) as push:
                push.ready(0, 1)
                assert [layer async for layer in incoming.layers()] == [0, 1]
    whole = json.loads(path.read_text())
    events = whole["traceEvents"]
    check(events)
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"agent a", "agent b"}
    found = {(event["pid"], event["ph"], event["name"]) for event in events}
    assert {(1, "b", "transfer 1"), (1, "b", "stream"), (1, "b", "queue"), (1, "b", "moving")} <= found
    assert (1, "X", "copied at once") in found
    assert (1, "C", "tcp queue") in found
    assert (1, "i", "request 7 layer 1 ready") in found
    assert (1, "i", "request 7 layer 1 landed") in found
    assert (2, "i", "request 7 layer 1 arrived") in found
    assert (1, "b", "layer 0") in found
    ops = [event for event in events if event["ph"] == "X" and event["cat"] == "op"]
    assert sum(op["args"]["bytes"] for op in ops) >= 2 * NBYTES
    (transfer,) = (event for event in events if event["ph"] == "b" and event["name"] == "transfer 1")
    assert transfer["args"] == {
        "bytes": NBYTES,
        "peer": "b",
        "backend": "tcp",
        "class": "normal",
        "state": "done",
        "attempts": transfer["args"]["attempts"],
    }


async def test_what_is_kept_is_bounded() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(64, np.uint8), name="mine")
        await b.register(np.zeros(64, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        timeline = Timeline(a, max_events=10).start()
        for _ in range(30):
            await a.submit(mine, peer.region("theirs"))
        timeline.stop()
        assert len([event for event in timeline.events() if event["ph"] != "M"]) == 10
        assert timeline.dropped > 100
        assert (timeline._begun, timeline._reached) == ({}, {})
        assert a._observers.finished is None
