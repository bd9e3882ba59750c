"""One turn of a configuration: requests come when they come, go to whoever has the least to do, and end, one way or the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nixl_async.benchmarks.kv.processes import RanksFailed
from nixl_async.benchmarks.serve.arrivals import Request
from nixl_async.benchmarks.serve.fleet import DECODE, PREFILL, Fleet, Process
from nixl_async.benchmarks.serve.metrics import Record, Round
from nixl_async.benchmarks.serve.options import AUTO, Classes, Configuration

_WARMING = -1
WARM_UP_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """What a leg is told of the simulation."""

    requests: Sequence[Request]
    block_tokens: int
    token_nbytes: int
    page_tokens: int
    timeout: float
    finish_seconds: float = 5.0
    """How long a process may take to end a leg before it is asked whether it lives."""


class Leg:
    """Give requests to a fleet's processes at their time; `changed(records)` hears of all that have come whenever one gets on."""

    def __init__(
        self, fleet: Fleet, case: Case, number: int, configuration: Configuration, changed: Callable[[list[Record]], None]
    ) -> None:
        self._fleet, self._case, self._number, self._configuration = fleet, case, number, configuration
        self._changed = changed
        self._records: dict[int, Record] = {}
        self._to: dict[str, Process] = {}
        self._ended = asyncio.Event()

    async def run(self) -> Round:
        """Warm up, serve all requests, and return what became of them.

        Raises:
            RanksFailed: a process has reported wrong bytes, or the backend does not work.
        """
        fleet, chosen = self._fleet, self._configuration
        self._to = {one.role: one for one in fleet.processes}
        fleet.on_message, fleet.on_lost = self._heard, self._lost
        try:
            backend = None if chosen.backend == AUTO else chosen.backend
            for one in fleet.living():
                one.tokens = one.given = 0
                classes = chosen.classes is Classes.ON
                one.tell(do="begin", number=self._number, schedule=chosen.schedule.value, classes=classes, backend=backend)
            await fleet.heard("begun")
            await self._unless_broken(self._warm_up())
            self._records.clear()
            await self._unless_broken(self._serve())
            for one in fleet.living():
                one.tell(do="finish")
            finished = await fleet.heard("finished", seconds=self._case.finish_seconds)
        finally:
            fleet.on_message, fleet.on_lost = lambda process, message: None, lambda process: None
        return self._round(list(finished.values()))

    async def _unless_broken(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task, self._fleet.broken], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        if self._fleet.broken.done():
            self._fleet.broken.result()
        task.result()

    async def _warm_up(self) -> None:
        """Let a page go from every prefill to every decode process: connections are made by the first bytes."""
        pairs = [(one, other) for one in self._fleet.living(PREFILL) for other in self._fleet.living(DECODE)]
        for number, (prefill, decode) in enumerate(pairs, 1):
            request = Request(_WARMING * number, 0.0, self._case.page_tokens, 1, (0,))
            self._start(Record(request, time.monotonic(), prefill.role, decode.role), warm=True)
        await self._all_ended()
        for record in self._records.values():
            if record.error and self._to[record.prefill].alive and self._to[record.decode].alive:
                raise RanksFailed(f"{self._configuration.label}: {record.error}")

    async def _serve(self) -> None:
        began = time.monotonic()
        for request in self._case.requests:
            await asyncio.sleep(began + request.seconds - time.monotonic())
            self._route(Record(request, began + request.seconds))
        await self._all_ended()

    async def _all_ended(self) -> None:
        while not all(record.ended for record in self._records.values()):
            self._ended.clear()
            await self._ended.wait()

    def _route(self, record: Record) -> None:
        """Choose the processes with the fewest tokens at hand; of those, who has had the fewest requests."""
        chosen = {}
        for kind in (PREFILL, DECODE):
            living = self._fleet.living(kind)
            if not living:
                self._records[record.request.number] = record
                self._fail(record, f"no {kind} process is left")
                return
            chosen[kind] = min(living, key=lambda one: (one.tokens, one.given))
        record.prefill, record.decode = chosen[PREFILL].role, chosen[DECODE].role
        self._start(record)

    def _start(self, record: Record, *, warm: bool = False) -> None:
        request = record.request
        self._records[request.number] = record
        for one in self._both(record):
            one.tokens += request.prompt
            one.given += 1
            one.tell(
                do="serve",
                number=request.number,
                arrival=record.came,
                prompt=request.prompt,
                answer=request.answer,
                blocks=request.blocks,
                batch=request.batch,
                prefill=record.prefill,
                decode=record.decode,
                warm=warm,
            )
        timeout = WARM_UP_SECONDS if warm else self._case.timeout
        late = record.came + timeout - time.monotonic()
        asyncio.get_running_loop().call_later(late, self._timed_out, record, timeout)

    def _both(self, record: Record) -> list[Process]:
        return [self._to[name] for name in (record.prefill, record.decode) if name]

    # What happens to requests.

    def _heard(self, process: Process, message: dict[str, Any]) -> None:
        record = self._records.get(message["number"])
        if record is None or record.ended:
            return
        match message["event"]:
            case "failed":
                self._fail(record, f"{process.role}: {message['text']}")
                return
            case "prefilled":
                record.said = message
            case "done":
                record.told = message
        process.tokens -= record.request.prompt
        if record.ended:
            self._ended.set()
        self._changed(list(self._records.values()))

    def _lost(self, process: Process) -> None:
        for record in list(self._records.values()):
            if not record.ended and process in self._both(record):
                self._fail(record, process.ending())

    def _timed_out(self, record: Record, seconds: float) -> None:
        if not record.ended and self._records.get(record.request.number) is record:
            self._fail(record, f"it took longer than {seconds:g} s")

    def _fail(self, record: Record, text: str) -> None:
        both = self._both(record)
        for one, answer in zip(both, (record.said, record.told), strict=False):
            if not answer:
                one.tokens -= record.request.prompt
            one.tell(do="cancel", number=record.request.number)
        record.error = text
        self._ended.set()
        self._changed(list(self._records.values()))

    def _round(self, finished: list[dict[str, Any]]) -> Round:
        routes: dict[str, int] = {}
        tiers: dict[str, tuple[int, int]] = {}
        for one in finished:
            for name, nbytes in one["routes"].items():
                routes[name] = routes.get(name, 0) + nbytes
            for tier in one.get("tiers", ()):
                read, written = tiers.get(tier["name"], (0, 0))
                tiers[tier["name"]] = read + tier["read"], written + tier["written"]
        refused, cpu = (sum(one.get(name, 0) for one in finished) for name in ("refused", "cpu_seconds"))
        case = self._case
        return Round(tuple(self._records.values()), case.block_tokens, case.token_nbytes, routes, tiers, refused, cpu)
