"""Runs the sweep: contenders take turns at every step, round after round, and every byte is checked after each."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nixl_async.benchmarks.options import plain
from nixl_async.benchmarks.transfer.control import (
    BenchmarkFailed,
    Contender,
    ControlServer,
    Launcher,
    PeerAbsent,
    Process,
    RemoteLauncher,
    together,
)
from nixl_async.benchmarks.transfer.options import Op, Options, Segment, flows, store_options, store_url
from nixl_async.benchmarks.transfer.peers.plain import SERIES, Flow, Point, need

OURS = "nixl_async"
RAW = "raw"
SPARE = 0.2
"""The share of a turn of some seconds that may be left over."""
Seconds = NDArray[np.float64]


@dataclass
class Round:
    """What one contender did in one round; series have one number a request, seconds."""

    throughput: float
    each: float
    seconds: float
    requests: int
    prep: Seconds
    post: Seconds
    latency: Seconds
    cpu_per_gb: float | None
    stall: float | None
    route: str

    @property
    def tx(self) -> Seconds:
        """From the return of the call that posts a request to its completion."""
        return self.latency - self.post


@dataclass
class Step:
    """One step of the sweep: rounds by contender, and what the raw limit is."""

    point: Point
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    raw: list[Round] = field(default_factory=list)
    raw_label: str = ""
    route: str = ""
    checked: bool = False


@dataclass
class Watcher:
    """Who hears how a run goes: what is being done, bytes moved since that began, and warnings."""

    doing: Callable[[str], None] = lambda text: None
    moved: Callable[[int], None] = lambda nbytes: None
    warn: Callable[[str], None] = lambda text: None


class Field:
    """All processes of one contender."""

    def __init__(self, contender: Contender, processes: list[Process], links: Sequence[Flow]) -> None:
        self.contender, self.processes, self._flows = contender, processes, links
        self.label = contender.label
        self.initiators = [one for one in processes if one.role == "initiator"]
        self.targets = [one for one in processes if one not in self.initiators]

    async def open(self, server: ControlServer, options: Options, settings: dict[str, Any]) -> None:
        """Start the processes, and connect initiators with their targets."""
        await together((), [one.start(server) for one in self.processes])
        peers: dict[str, Any] = {}
        largest = max(options.points(), key=lambda point: point.block * point.batch)

        async def open_one(one: Process) -> None:
            role, index = one.role, one.index
            nbytes = need(largest, list(self._flows), role, index)
            if not options.storage:
                sharing = options.n_initiators if role == "initiator" else options.n_targets
                nbytes = max(nbytes, options.total_buffer_size // sharing)
            place = {"role": role, "index": index, "host": options.address}
            peers[f"{role} {index}"] = await one.call("open", **place, nbytes=nbytes, options=settings)

        await together(self.processes, [open_one(one) for one in self.processes])
        listed = [vars(flow) for flow in self._flows]
        await together(self.processes, [one.call("meet", peers=peers, flows=listed) for one in self.processes])

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Have it run, and hold it still afterwards if it would spin."""
        if self.contender.spins:
            await together((), [one.launcher.signal(one.name, signal.SIGCONT) for one in self.processes])
        try:
            yield
        finally:
            await self.rest()

    async def rest(self) -> None:
        """Hold it still if it would spin."""
        if self.contender.spins:
            await together((), [one.launcher.signal(one.name, signal.SIGSTOP) for one in self.processes])

    async def everyone(self, do: str, **arguments: Any) -> list[Any]:
        """Give all processes one command."""
        return await together(self.processes, [one.call(do, **arguments) for one in self.processes])

    async def run(self, iterations: int, *, notified: bool, watcher: Watcher, seconds: float = 0.0) -> Round:
        """Have every initiator make `iterations` requests; return what all of them took together.

        With `seconds` they go on until about as many have passed, in runs that double: who suddenly takes a thousand times as long
        for a request is found out by a short one.
        """
        first = iterations
        taken = [await self._once(first, notified=notified, watcher=watcher)]
        while (left := seconds - sum(one.seconds for one in taken)) > seconds * SPARE:
            each = taken[-1].seconds / iterations
            # Multiples of the first: slots share them.
            iterations = first * max(1, min(2 * iterations, round(left / each)) // first)
            taken.append(await self._once(iterations, notified=notified, watcher=watcher))
        return _round(taken)

    async def _once(self, iterations: int, *, notified: bool, watcher: Watcher) -> Run:
        moved: dict[int, int] = {}

        def hear(rank: int, nbytes: int) -> None:
            moved[rank] = nbytes
            watcher.moved(sum(moved.values()))

        for one in self.initiators:
            assert one.channel is not None
            one.channel.on_progress = lambda nbytes, rank=one.rank: hear(rank, nbytes)  # type: ignore[misc]
        expected = {
            one: sum(iterations for flow in self._flows if flow.target == one.index) if notified else 0 for one in self.targets
        }
        attending = [one.call("attend", count=expected[one]) for one in self.targets]
        answers = (
            await together(self.processes, [one.call("run", iterations=iterations) for one in self.initiators] + attending)
        )[: len(self.initiators)]
        left = await together(self.processes, [one.call("left") for one in self.targets])
        return Run(answers, left)


@dataclass(frozen=True)
class Run:
    """What the initiators and the targets have said of some requests."""

    answers: list[dict[str, Any]]
    left: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """How long the slowest initiator took."""
        return max(float(one["seconds"]) for one in self.answers)


def _round(taken: list[Run]) -> Round:
    answers, left = ([one for run in taken for one in getattr(run, name)] for name in ("answers", "left"))
    nbytes = sum(one["nbytes"] for one in answers)
    series = {name: np.concatenate([_decoded(one[name]) for one in answers]) for name in SERIES}
    stalls = [one["stall"] for one in (*answers, *left) if one.get("stall") is not None]
    initiators = [[run.answers[n] for run in taken] for n in range(len(taken[0].answers))]
    seconds = [sum(one["seconds"] for one in own) for own in initiators]
    speeds = [sum(one["nbytes"] for one in own) / spent for own, spent in zip(initiators, seconds, strict=True)]
    return Round(
        throughput=nbytes / sum(run.seconds for run in taken) / 1e9,
        each=float(np.mean(speeds)) / 1e9,
        seconds=float(np.mean(seconds)),
        requests=len(series["latency"]) // len(initiators),
        **series,
        cpu_per_gb=sum(one["cpu"] for one in (*answers, *left)) / (nbytes / 1e9),
        stall=max(stalls) if stalls else None,
        route=answers[0].get("route", ""),
    )


def _decoded(text: str) -> Seconds:
    return np.frombuffer(base64.b64decode(text), "<f8")


class Conductor:
    """Runs the sweep of `options` with `contenders` (ours first) on `launchers`, one for each rank.

    Use it as `async with`; leaving ends every process.
    """

    def __init__(
        self,
        options: Options,
        contenders: Sequence[Contender],
        server: ControlServer,
        launchers: Sequence[Launcher | RemoteLauncher],
        watcher: Watcher,
    ) -> None:
        self._options, self._contenders = options, list(contenders)
        self._server, self._launchers, self._watcher = server, launchers, watcher
        self._fields: dict[str, Field] = {}
        self._flows = flows(options)
        self._round_number = 0
        self.absent: dict[str, str] = {}
        """Contenders that are left out, and why."""
        self.under_way: Step | None = None
        """The step that is not finished, with the rounds that are."""

    async def __aenter__(self) -> Conductor:
        try:
            await self._open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End every process."""
        channels = [one.channel for found in self._fields.values() for one in found.processes if one.channel is not None]
        for channel in channels:
            await channel.aclose()
        for launcher in dict.fromkeys(self._launchers):
            await launcher.aclose()
        await self._server.aclose()

    async def _open(self) -> None:
        options = self._options
        token = secrets.token_hex(16)
        for contender in self._contenders:
            if contender.absent:
                self._leave_out(contender.label, contender.absent)
                continue
            self._watcher.doing(f"starting {contender.label}")
            ranks = range(options.world)
            processes = [Process(contender, rank, *options.role(rank), self._launchers[rank]) for rank in ranks]
            found = Field(contender, processes, self._flows)
            settings = {f.name: plain(getattr(options, f.name)) for f in dataclasses.fields(options)}
            settings |= {"store_url": store_url(options), "store_options": store_options(options)}
            settings |= {"token": token, "run": token[:8], **contender.settings}
            try:
                await found.open(self._server, options, settings)
            except BenchmarkFailed as error:
                if contender.label in (OURS, RAW):
                    raise
                self._leave_out(contender.label, str(error))
                await self._end(found)
                continue
            await found.rest()
            self._fields[contender.label] = found

    def _leave_out(self, label: str, why: str) -> None:
        self.absent[label] = why
        self._watcher.warn(f"{label} is absent: {why}")

    async def _end(self, gone: Field) -> None:
        for one in gone.processes:
            with contextlib.suppress(KeyError):
                await one.launcher.end(one.name)

    async def steps(self) -> AsyncIterator[Step]:
        """Yield each step of the sweep when it is done.

        Raises:
            BenchmarkFailed: a process of ours has ended or failed, or bytes are wrong. Others' are left out from there on.
        """
        for point in self._options.points():
            iterations, warm_up = self._options.iterations(point.block)
            step = self.under_way = Step(point)
            await self.begin(step, warm_up)
            for number in range(self._options.rounds):
                await self.round(step, iterations, f"round {number + 1} of {self._options.rounds}")
            step.rounds = {label: rounds for label, rounds in step.rounds.items() if label in self._fields}
            self.under_way = None
            yield step

    async def begin(self, step: Step, warm_up: int) -> None:
        """Have every contender fill its memory for a step, make what it sends, and send it `warm_up` times."""
        options, watcher, point = self._options, self._watcher, step.point
        step.checked = options.check_consistency
        for label, one in list(self._fields.items()):
            watcher.doing(f"{_what(point)}: {label}, warming up")
            async with self._tolerating(label), one.turn():
                if label == RAW:
                    step.raw_label = _limit(options, step.route)
                    await one.everyone("limit", kind=step.raw_label)
                await one.everyone("ready", point=vars(point))
                # One request even without a warm-up: it tells the route.
                measured = await one.run(warm_up or options.slots, notified=options.notify, watcher=watcher)
                if label == OURS:
                    step.route = measured.route

    async def round(self, step: Step, iterations: int, which: str, seconds: float = 0.0) -> None:
        """Let every contender take its turn once: `iterations` requests, or with `seconds` as long a turn that begins with as many.

        The step is the one that was begun last, and the round is added to it. `which` names the round for the watcher.
        """
        for label, one in list(self._fields.items()):
            self._watcher.doing(f"{_what(step.point)}: {label}, {which}")
            async with self._tolerating(label), one.turn():
                measured = await self._checked(one, iterations, seconds)
                (step.raw if label == RAW else step.rounds.setdefault(label, [])).append(measured)

    async def _checked(self, one: Field, iterations: int, seconds: float) -> Round:
        check = self._options.check_consistency
        if check:
            self._round_number += 1
            await one.everyone("blank", value=self._round_number * 37 % 251)
        measured = await one.run(iterations, notified=self._options.notify, watcher=self._watcher, seconds=seconds)
        if check:
            counted = await one.everyone("check")
            wrong, total = sum(bad for bad, _ in counted), sum(n for _, n in counted)
            if wrong:
                raise WrongBytes(f"{one.label}: {wrong} of {total} blocks hold wrong bytes")
        return measured

    @contextlib.asynccontextmanager
    async def _tolerating(self, label: str) -> AsyncIterator[None]:
        """Leave others' libraries out where they fail; what is wrong with our own ends the run."""
        try:
            yield
        except WrongBytes:
            raise
        except BenchmarkFailed as error:
            if label in (OURS, RAW):
                raise
            self._leave_out(label, str(error))
            await self._end(self._fields.pop(label))


class WrongBytes(BenchmarkFailed):
    """Report a contender that claims success while the destination does not hold what it should."""


def _what(point: Point) -> str:
    return f"{point.block} B x {point.batch}"


def _limit(options: Options, route: str) -> str:
    """Choose the raw limit of a route: what the same bytes cost without a library."""
    if options.target_seg_type is Segment.FILE:
        return "pwritev" if options.op_type is Op.WRITE else "preadv"
    over_network = route in ("tcp", "ucx")
    return "stream" if over_network else "memcpy"


__all__ = ["OURS", "RAW", "Conductor", "Field", "PeerAbsent", "Round", "Step", "Watcher", "WrongBytes"]
