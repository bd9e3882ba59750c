"""The sweep: blocks by batches, write and read, by one route, beside stock NIXL in turns; what is close is measured again.

`nixl_async/benchmarks/transfer` moves and checks the bytes. Connections and registered memory stay for all points.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bench.record.files import rounded
from bench.record.ratios import Ratio, paired
from nixl_async.benchmarks.results import Row
from nixl_async.benchmarks.transfer import report
from nixl_async.benchmarks.transfer.conductor import OURS, Conductor, Round, Step, Watcher
from nixl_async.benchmarks.transfer.contenders import NIXL_LIKE_OURS, contenders
from nixl_async.benchmarks.transfer.control import BenchmarkFailed, ControlServer, Launcher
from nixl_async.benchmarks.transfer.options import Op, Options, Versus, make
from nixl_async.benchmarks.transfer.peers.plain import Point

NIXL = "nixl"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PROCESSES = 4
"""Ours and NIXL's, initiator and target: each has memory for the largest request."""
MEMORY_SHARE = 0.6
FIRST_NBYTES, FIRST_MOST = 16 * MIB, 16
"""With how many requests a point is warmed up, and a turn begins."""
NOISY = 0.15
"""Points whose interval is wider than this to either side are measured again, if there is time."""


@dataclass(frozen=True)
class Shape:
    """What is swept, and how long each point takes. `rounds` go to every point; `again` more at a time to those that need them."""

    blocks: tuple[int, int] = (4 * KIB, 64 * MIB)
    batches: tuple[int, int] = (1, 256)
    factor: int = 4
    most_nbytes: int = GIB
    turn_seconds: float = 0.1
    rounds: int = 3
    again: int = 3
    most_rounds: int = 15

    def within(self, available_nbytes: int) -> Shape:
        """Return it with requests no larger than the memory allows."""
        most = self.most_nbytes
        while most * PROCESSES > available_nbytes * MEMORY_SHARE and most > self.blocks[0]:
            most //= self.factor
        return dataclasses.replace(self, most_nbytes=most)

    def options(self, backend: str, nixl_python: str) -> Options:
        """Return the options of the transfer benchmark that these are."""
        (start_block, max_block), (start_batch, max_batch) = self.blocks, self.batches
        return make(
            {
                "backend": backend,
                "start_block_size": start_block,
                "max_block_size": max_block,
                "start_batch_size": start_batch,
                "max_batch_size": max_batch,
                "size_factor": self.factor,
                "max_request_size": self.most_nbytes,
                "raw": False,
                "versus": (Versus.NIXL,),
                "nixl_python": nixl_python,
            }
        )


SHAPE = Shape()
QUICK = Shape(
    blocks=(4 * KIB, 64 * KIB), batches=(1, 4), most_nbytes=128 * KIB, turn_seconds=0.005, rounds=2, again=1, most_rounds=3
)


@dataclass
class Sweep:
    """A sweep by one backend of ours; NIXL has the same way by its own means. `seconds` are for repetitions, too."""

    backend: str
    shape: Shape
    nixl_python: str
    seconds: float
    progress: Callable[[str], None]
    warn: Callable[[str], None]
    steps: list[Step] = field(default_factory=list)
    """What has been measured, also when the run was interrupted."""

    async def run(self) -> None:
        """Measure every point, and then again those that are close to the bound or noisy, until the time is over.

        Raises:
            BenchmarkFailed: a process failed after it had started, or bytes arrived wrong.
        """
        deadline = time.monotonic() + self.seconds
        server = ControlServer()
        address = await server.open()
        options = self.shape.options(self.backend, self.nixl_python)
        launchers = [Launcher(address, server.secret)] * options.world
        # Only as installed: with our settings it is in the suites.
        players = [one for one in contenders(options) if one.label != NIXL_LIKE_OURS]
        points = list(_points(options))
        done = 0

        def doing(text: str) -> None:
            self.progress(f"point {done + 1} of {len(points)}: {text}" if done < len(points) else f"again: {text}")

        async with Conductor(options, players, server, launchers, Watcher(doing=doing, warn=self.warn)) as conductor:
            for step in points:
                self.steps.append(step)
                await self._visit(conductor, step, self.shape.rounds)
                done += 1
            while time.monotonic() < deadline and (open_ones := self._open()):
                for step in open_ones:
                    await self._visit(conductor, step, self.shape.again)
                    if time.monotonic() >= deadline:
                        break
            if (why := conductor.absent.get(NIXL)) and any(step.rounds.get(NIXL) for step in self.steps):
                raise BenchmarkFailed(f"NIXL was lost within the sweep, and is missing from there on: {why}")

    async def _visit(self, conductor: Conductor, step: Step, rounds: int) -> None:
        """Take some more rounds of a point."""
        first = max(1, min(FIRST_MOST, FIRST_NBYTES // (step.point.block * step.point.batch)))
        await conductor.begin(step, first)
        for number in range(rounds):
            await conductor.round(step, first, f"round {number + 1} of {rounds}", self.shape.turn_seconds)

    def _open(self) -> list[Step]:
        """Return the points that want more rounds: those that leave open whether we are slower, then the noisy."""
        known = [(step, ratio_of(step)) for step in self.steps]
        more = [(step, ratio) for step, ratio in known if ratio is not None and ratio.rounds < self.shape.most_rounds]
        doubtful = sorted((one for one in more if one[1].doubtful), key=lambda one: one[1].rounds)
        noisy = [one for one in more if not one[1].doubtful and one[1].width > NOISY]
        return [step for step, _ in doubtful + sorted(noisy, key=lambda one: -one[1].width)]

    def rows(self) -> tuple[Row, ...]:
        """Return what has been measured as rows of a result file; of latencies each round's median and 99th percentile."""
        options = self.shape.options(self.backend, self.nixl_python)
        return tuple(
            _condensed(row, step.rounds[row.contender])
            for step in self.steps
            if step.rounds.get(OURS)
            for row in report.result_rows(dataclasses.replace(options, op_type=Op(step.point.op)), step)
        )


def _points(options: Options) -> Iterator[Step]:
    """Yield every point, write and read; each has bytes of its own."""
    salt = 0
    for one in options.points():
        for op in Op:
            salt += 1
            yield Step(Point(one.block, one.batch, one.slots, op.value, salt))


def ratio_of(step: Step) -> Ratio | None:
    """Return how many times as fast as NIXL we were; `None` if it was not there."""
    ours, theirs = (tuple(one.throughput for one in step.rounds.get(label, ())) for label in (OURS, NIXL))
    return paired(ours, theirs)


def _condensed(row: Row, rounds: list[Round]) -> Row:
    request = {
        name: tuple(rounded(float(np.quantile(one.latency, share))) for one in rounds)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }
    return dataclasses.replace(
        row,
        throughput=tuple(map(rounded, row.throughput)),
        cpu_seconds_per_gb=tuple(map(rounded, row.cpu_seconds_per_gb)),
        loop_stall_p999=(),
        latencies=(),
        phases={"request": request},
    )


def measure(sweep: Sweep) -> None:
    """Run a sweep to its end, or until Ctrl-C; its processes have ended in any case."""
    asyncio.run(sweep.run())
