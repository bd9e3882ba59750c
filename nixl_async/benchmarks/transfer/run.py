"""One run from its options to its result: starts what is needed here, shows what happens, reports what has been measured."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.transfer import report
from nixl_async.benchmarks.transfer.conductor import OURS, Conductor, Step, Watcher
from nixl_async.benchmarks.transfer.contenders import contenders
from nixl_async.benchmarks.transfer.control import ControlServer, Launcher, RemoteLauncher, serve_launcher
from nixl_async.benchmarks.transfer.machine import header
from nixl_async.benchmarks.transfer.options import Options, Runtime
from nixl_async.benchmarks.transfer.rendezvous import Meeting, meet, ranks_here
from nixl_async.errors import ConfigurationError, NixlError

if TYPE_CHECKING:
    from rich.status import Status

REFRESH_SECONDS = 0.2
GATHER_SECONDS = 120.0


class Interrupted(Exception):
    """The run was ended by a signal; what it had measured has been reported."""


class Screen:
    """Shows on standard error what is being done and how fast bytes move; finished steps a line each where it is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._status: Status | None = None
        self._doing = ""
        self._begun = time.monotonic()
        self._shown = 0.0
        self.watcher = Watcher(self.doing, self.moved, self.warn)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()

    def doing(self, text: str) -> None:
        """Say what is being done."""
        self._doing, self._begun = text, time.monotonic()
        if self._status is not None:
            self._status.update(escape(text))

    def moved(self, nbytes: int) -> None:
        """Say how many bytes have moved since that began."""
        now = time.monotonic()
        if self._status is not None and now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            speed = nbytes / max(now - self._begun, 1e-9) / 1e9
            self._status.update(f"{escape(self._doing)}: {nbytes / 1e9:.2f} GB, {speed:.2f} GB/s")

    def step(self, options: Options, step: Step) -> None:
        """Show a finished step."""
        for row in report.figures(options, step):
            share = row["share_of_raw"]
            limit = "" if share is None else f", {share:.0%} of {step.raw_label}"
            latency = "" if row["p50_us"] is None else f", p50 {row['p50_us']:.1f} us"
            self._console.print(
                f"[dim]{row['block_nbytes']} B x {row['batch']}: {escape(row['contender'])}"
                f" {row['aggregate_gb_per_second']:.3f} GB/s{latency}{limit}[/]"
            )

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._console.print(f"[yellow]{escape(text)}[/]")

    def header(self, system: dict[str, Any]) -> None:
        """Show what it runs on, on standard output."""
        console = Console(soft_wrap=True)
        for key, value in system.items():
            shown = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            console.print(f"[dim]{key}: {escape(str(shown))}[/]")


async def run(options: Options, command: Sequence[str]) -> None:
    """Carry out a run and report it; a rank that is not the first serves the first one, and reports nothing.

    Raises:
        Interrupted: a signal has ended it, after what was measured has been reported.
        BenchmarkFailed: a process has ended or failed, or bytes arrived wrong.
        ConfigurationError: ranks and processes do not match, or nobody is met.
    """
    runtime = _runtime(options)
    if runtime is Runtime.RAY:
        from nixl_async.benchmarks.transfer.on_ray import on_ray

        async with on_ray(options) as (server, launchers):
            await _conduct(options, command, server, launchers)
        return
    if runtime is Runtime.LOCAL:
        server = ControlServer()
        address = await server.open()
        await _conduct(options, command, server, [Launcher(address, server.secret)] * options.world)
        return
    async with meet(options, runtime) as meeting:
        if meeting.world != options.world:
            raise ConfigurationError(
                f"there are {meeting.world} ranks; --num-initiator-dev {options.num_initiator_dev} and {options.n_targets}"
                f" targets need {options.world}"
            )
        await _take_part(options, command, meeting)


def _runtime(options: Options) -> Runtime:
    if options.runtime is not Runtime.AUTO:
        if options.runtime is Runtime.ETCD and not options.etcd_endpoints:
            raise ConfigurationError("--runtime etcd needs --etcd-endpoints, such as http://10.0.0.5:2379")
        return options.runtime
    if options.etcd_endpoints:
        return Runtime.ETCD
    return Runtime.RANKS if ranks_here(options) is not None else Runtime.LOCAL


async def _take_part(options: Options, command: Sequence[str], meeting: Meeting) -> None:
    if meeting.rank:
        channel = await meeting.connect()
        launcher = Launcher(meeting.address, meeting.secret)
        known = {one.label: one for one in contenders(options)}
        try:
            finished = await serve_launcher(channel, launcher, known, lambda: header(known.values()))
        except asyncio.CancelledError:
            raise Interrupted from None
        finally:
            await launcher.aclose()
            await channel.aclose()
        if not finished:
            raise NixlError(f"rank 0 at {meeting.address[0]}:{meeting.address[1]} has gone before the run's end")
        return
    server = meeting.server
    assert server is not None
    others = [server.arrival(meeting.name(rank)) for rank in range(1, meeting.world)]
    if others:
        _, missing = await asyncio.wait(others, timeout=GATHER_SECONDS)
        if missing:
            absent = [rank for rank in range(1, meeting.world) if not others[rank - 1].done()]
            await server.aclose()
            raise ConfigurationError(f"ranks {', '.join(map(str, absent))} have not come within {GATHER_SECONDS:g} s")
    launchers: list[Launcher | RemoteLauncher] = [Launcher(meeting.address, meeting.secret)]
    launchers += [RemoteLauncher(one.result(), meeting.name(rank)) for rank, one in enumerate(others, 1)]
    await _conduct(options, command, server, launchers)


async def _conduct(
    options: Options, command: Sequence[str], server: ControlServer, launchers: Sequence[Launcher | RemoteLauncher]
) -> None:
    everyone = contenders(options)
    system = await asyncio.to_thread(header, everyone)
    steps: list[Step] = []
    started = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted = False
    absent: dict[str, str] = {}
    conductor: Conductor | None = None
    with Screen() as screen:
        if options.format is Format.TEXT:
            screen.header(system)
        try:
            async with AsyncExitStack() as stack:
                conductor = await stack.enter_async_context(Conductor(options, everyone, server, launchers, screen.watcher))
                for number, launcher in enumerate(dict.fromkeys(launchers)):
                    if isinstance(launcher, RemoteLauncher):
                        system[f"rank {number}"] = await launcher.describe()
                absent = conductor.absent
                async for step in conductor.steps():
                    steps.append(step)
                    screen.step(options, step)
        except asyncio.CancelledError:
            interrupted = True
        finally:
            if conductor is not None and conductor.under_way is not None:
                steps.append(conductor.under_way)
            _report(options, steps, command, system | ({"absent": absent} if absent else {}), started)
    if interrupted:
        raise Interrupted


def _report(options: Options, steps: list[Step], command: Sequence[str], system: dict[str, Any], started: str) -> None:
    steps = [step for step in steps if step.rounds.get(OURS)]
    if options.format is Format.TEXT and steps:
        sys.stderr.flush()
        report.print_table(options, steps, system.get("absent", {}))
    if steps:
        report.write(options, steps, command, system, started)
