"""A recording of what an agent does, as a trace in Chrome's JSON form, which https://ui.perfetto.dev shows.

One process for each agent: its transfers with their stages (the wait for a stream, the wait for a turn, the way), its ops by
backend, what waits and is in flight, and the layers of pushes and pulls.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Op
from nixl_async.descriptors import Plan
from nixl_async.transfer import TrafficClass, TransferRecord

if TYPE_CHECKING:
    from nixl_async.agent import Agent

MAX_EVENTS = 200_000
"""So many events are kept; the oldest are dropped."""
SAMPLE_SECONDS = 0.001
"""How often queues are looked at, at most."""
_LAYERS = 1
_FIRST_LANE = 100
_LANES = 100


class Timeline:
    """An observer of one agent that records until `stop`; `events` are what it recorded, in microseconds since the epoch.

    `dropped` says how many events, the oldest, there was no room for.
    """

    def __init__(self, agent: Agent, number: int = 1, max_events: int = MAX_EVENTS) -> None:
        self.agent = agent
        self.dropped = 0
        self._number = number
        self._events: deque[dict[str, Any]] = deque(maxlen=max_events)
        self._reached: dict[int, float] = {}
        self._lanes: dict[str, list[int | None]] = {}
        self._begun: dict[int, tuple[float, int]] = {}
        self._layers: dict[tuple[str, int], float] = {}
        self._sampled = -1.0
        self._wall_offset = time.time() - agent._loop.time()

    def start(self) -> Timeline:
        """Begin to record."""
        self.agent._observers.add(self)
        return self

    def stop(self) -> None:
        """End it. Idempotent."""
        self.agent._observers.remove(self)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what was recorded, after the names of its tracks."""
        yield self._named("process_name", 0, f"agent {self.agent.name}")
        yield self._named("thread_name", _LAYERS, "layers")
        for at, (backend, lanes) in enumerate(self._lanes.items()):
            for lane in range(len(lanes)):
                yield self._named("thread_name", _FIRST_LANE + at * _LANES + lane, f"{backend} {lane}")
        yield from list(self._events)

    # Observer.

    def reached(self, record: TransferRecord) -> None:
        """Note that a stream has come to where a transfer may begin."""
        self._reached[record.id] = self._now()

    def started(self, backend: str, op: Op) -> None:
        """Note an op's beginning."""
        lanes = self._lanes.setdefault(backend, [])
        lane = next((at for at, taken in enumerate(lanes) if taken is None), len(lanes))
        if lane == len(lanes):
            lanes.append(None)
        lanes[lane] = op.id
        self._begun[op.id] = self._now(), lane
        self._sample()

    def ended(self, backend: str, op: Op, error: BaseException | None) -> None:
        """Note its end."""
        begun = self._begun.pop(op.id, None)
        if begun is None:
            return
        at, lane = begun
        self._lanes[backend][lane] = None
        track = _FIRST_LANE + list(self._lanes).index(backend) * _LANES + min(lane, _LANES - 1)
        what = {"bytes": op.nbytes, "transfers": [part[0] for part in op.parts[:16]], "peer": op.peer or ""}
        if error is not None:
            what["error"] = f"{type(error).__name__}: {error}"[:200]
        self._add("X", f"op {op.id}", "op", at, tid=track, dur=(self._now() - at) * 1e6, args=what)
        self._sample()

    def finished(self, record: TransferRecord) -> None:
        """Note a transfer with its stages."""
        end = record.submitted if record.finished is None else record.finished
        reached = self._reached.pop(record.id, None)
        what = {
            "bytes": record.plan.nbytes,
            "peer": record.peer or "",
            "backend": record.routes[0],
            "class": record.traffic_class.value,
            "state": record.state.value,
            "attempts": record.attempts,
        }
        self._span(f"transfer {record.id}", "transfer", record.id, record.submitted, end, what)
        queued = record.submitted
        if reached is not None:
            self._span("stream", "transfer", record.id, record.submitted, reached)
            queued = reached
        if record.started is not None:
            self._span("queue", "transfer", record.id, queued, record.started)
            self._span("moving", "transfer", record.id, record.started, end)

    def copied(self, plan: Plan, peer: str | None, route: str, traffic_class: TrafficClass, seconds: float) -> None:
        """Note a transfer that was copied at once."""
        what = {"bytes": plan.nbytes, "peer": peer or "", "backend": route, "class": traffic_class.value}
        self._add("X", "copied at once", "transfer", self._now() - seconds, tid=0, dur=seconds * 1e6, args=what)

    def noted(self, kind: str, name: str, number: int) -> None:
        """Note what happens to a layer."""
        now = self._now()
        self._add("i", f"{name} layer {number} {kind}", "layer", now, tid=_LAYERS, s="t")
        if kind == "ready":
            self._layers[name, number] = now
        elif (ready := self._layers.pop((name, number), None)) is not None:
            self._span(f"layer {number}", f"layers {name}", number, ready, now)

    # Inside.

    def _now(self) -> float:
        return self.agent._loop.time()

    def _add(self, phase: str, name: str, category: str, at: float, **more: Any) -> None:
        if len(self._events) == self._events.maxlen:
            self.dropped += 1
        event = {
            "ph": phase,
            "name": name,
            "cat": category,
            "ts": round((at + self._wall_offset) * 1e6, 3),
            "pid": self._number,
        }
        self._events.append(event | more)

    def _span(
        self, name: str, category: str, number: int, begin: float, end: float, args: dict[str, Any] | None = None
    ) -> None:
        self._add("b", name, category, begin, id=number, tid=0, args=args or {})
        self._add("e", name, category, end, id=number, tid=0)

    def _sample(self) -> None:
        now = self._now()
        if now - self._sampled < SAMPLE_SECONDS:
            return
        self._sampled = now
        for queue in self.agent._dispatcher._scheduler.queues():
            if queue.peers:
                waiting = sum(sum(peer.waiting) for peer in queue.peers.values())
                self._add("C", f"{queue.name} queue", "queue", now, tid=0, args={"waiting": waiting, "ops": queue.ops})
                self._add("C", f"{queue.name} bytes in flight", "queue", now, tid=0, args={"bytes": queue.nbytes})

    def _named(self, what: str, track: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": self._number, "tid": track, "args": {"name": name}}


class Recording:
    """`with record(agent, path):` writes the file when the block is left."""

    def __init__(self, agents: tuple[Agent, ...], path: str | Path) -> None:
        self._path = Path(path)
        self.timelines = [Timeline(agent, number) for number, agent in enumerate(agents, 1)]

    def __enter__(self) -> Recording:
        for timeline in self.timelines:
            timeline.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for timeline in self.timelines:
            timeline.stop()
        write(self._path, [event for timeline in self.timelines for event in timeline.events()])


def record(*agents: Agent, path: str | Path) -> Recording:
    """Record what agents of this process do in the block, and write it to `path`."""
    return Recording(agents, path)


def write(path: Path, events: list[dict[str, Any]]) -> None:
    """Write events as a file that Perfetto and Chrome open."""
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
