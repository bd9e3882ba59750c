"""What an agent costs while nothing moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.process import Worker
from bench.report import Figure, Row
from bench.session import NIXL, OURS, Settings, nixl, ours

PEERS, WAITS = 8, 100
LIMIT_PERCENT = 1.0
BUFFER = 1 << 20


def idle(settings: Settings) -> Iterator[Row]:
    """Watch an agent with 8 connected peers and 100 pending waits; NIXL's has no peer and waits for nothing."""
    with ExitStack() as stack:
        hub = stack.enter_context(_worker(Worker(ours(), "hub")))
        spokes = stack.enter_context(_worker(Worker(ours(), "spokes")))
        settings.progress("idle: connecting 8 peers")
        address = hub.call("open", role="hub", nbytes=BUFFER, options={})
        spokes.call("open", role="spare", nbytes=BUFFER, options={})
        spokes.call("spokes", hub=address, count=PEERS)
        if (known := hub.call("pend", count=WAITS)) != PEERS:
            raise AssertionError(f"the hub knows {known} peers, not {PEERS}")
        mine = [_percent(hub, settings, OURS, turn) for turn in range(3)]
    row = Row("idle", {"work": "CPU of an idle agent, 8 peers, 100 waits"}, "% of a core", Figure(OURS, tuple(mine)))
    for contender in nixl(settings)[:1]:
        with _worker(Worker(contender, "idle")) as agent:
            agent.call("open", role="idle", nbytes=BUFFER, options={})
            theirs = [_percent(agent, settings, NIXL, turn) for turn in range(3)]
        row.others.append(Figure(NIXL, tuple(theirs), "no peers"))
    row.at_most(LIMIT_PERCENT, text="below 1 % of a core")
    yield row


@contextmanager
def _worker(worker: Worker) -> Iterator[Worker]:
    try:
        yield worker
    finally:
        worker.close()


def _percent(worker: Worker, settings: Settings, label: str, turn: int) -> float:
    settings.progress(f"idle: watching {label}, {turn + 1} of 3")
    before = worker.call("usage")
    time.sleep(settings.seconds)
    after = worker.call("usage")
    return float((after["cpu"] - before["cpu"]) / (after["at"] - before["at"]) * 100)
