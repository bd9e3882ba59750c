"""One drill from its beginning to its end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.churn.chaos import Chaos
from bench.churn.fleet import Fleet
from bench.churn.ledger import read
from bench.churn.options import Options
from bench.churn.plan import Action, make_plan, names
from bench.churn.records import Records

Show = Callable[[Fleet, float], None]


async def run(options: Options, plan: list[Action], tell: Callable[[str], None], show: Show) -> Records:
    """Run a plan on a fleet; return what was seen. SIGINT and SIGTERM end it early, once everything is gone.

    Raises:
        RuntimeError: the fleet cannot be started; nothing of it is left.
    """
    records = Records()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    shared, spent = set(os.listdir("/dev/shm")), _spent()
    with tempfile.TemporaryDirectory(prefix="nixl-async-churn-") as name:
        alone = set(names(0, options.decode)) - {name for action in plan for name in action.targets}
        fleet = Fleet(options, Path(name), records, tell, spoilt=min(alone, default="decode-0") if options.inject else "")
        try:
            await _until(stop, asyncio.create_task(_live(fleet, plan, show)))
        finally:
            records.interrupted = stop.is_set()
            records.ended = records.ended or time.monotonic()
            tell("ending")
            await fleet.close()
    records.shared_memory = [name for name in set(os.listdir("/dev/shm")) - shared if _ours(name)]
    records.cpu_seconds = _spent() - spent
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)
    return records


async def _live(fleet: Fleet, plan: list[Action], show: Show) -> None:
    records = fleet.records
    opening = asyncio.create_task(fleet.open())
    while not opening.done():
        show(fleet, 0.0)
        await asyncio.wait([opening], timeout=0.5)
    await opening
    records.began = began = time.monotonic()
    busy, total = _machine()
    fleet.go()
    chaos = asyncio.create_task(Chaos(fleet, began).run(plan))
    try:
        while (elapsed := time.monotonic() - began) < fleet.options.seconds or not chaos.done():
            show(fleet, elapsed)
            if chaos.done() and chaos.exception() is not None:
                break
            await asyncio.sleep(0.5)
        await chaos
    finally:
        chaos.cancel()
        await asyncio.gather(chaos, return_exceptions=True)
        records.ended = time.monotonic()
        now_busy, now_total = _machine()
        records.cpu_share = (now_busy - busy) / max(1, now_total - total)


async def _until(stop: asyncio.Event, work: asyncio.Task[None]) -> None:
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, work], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not work.done():
        work.cancel()
    ended = await asyncio.gather(work, return_exceptions=True)
    if not stop.is_set() and isinstance(ended[0], BaseException):
        raise ended[0]


def _machine() -> tuple[int, int]:
    """Return how long the machine's CPUs were busy, and how long there were, in ticks."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _spent() -> float:
    """Return the CPU time of all children that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ours(name: str) -> bool:
    # Other benchmarks on the machine keep their servers' files there meanwhile.
    return name.startswith("nixl") and not name.startswith("nixl-async-bench-")


def moved(fleet: Fleet) -> tuple[int, int]:
    """Return how many requests were completed and failed so far."""
    done = failed = 0
    for life in fleet.records.lives:
        process = fleet.processes.get(life.name)
        count = read(process.path) if process is not None and process.life is life else life.count
        done, failed = done + count.requests_done, failed + count.requests_failed
    return done, failed


def planned(options: Options) -> list[Action]:
    """Return the plan of a run."""
    return make_plan(options.seed, options.seconds, options.prefill, options.decode, options.only)
