"""Carries out a plan: one part after the other, each written when it ends, whatever became of those before."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.commands import COMMANDS, Suite
from bench.process import ROOT
from bench.record import files
from bench.record.files import About, Part
from bench.record.machine import Meter
from bench.record.plan import SWEEPS, Planned
from bench.record.sweep import Sweep, measure
from bench.report import Row
from bench.session import Settings, judged
from nixl_async.benchmarks.results import Results, ResultsError

LONGEST_TEXT = 1500


@dataclass
class Screen:
    """Who hears how a run goes: what is being done, warnings, and how parts begin and end."""

    doing: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    begin: Callable[[Planned], None] = lambda planned: None
    end: Callable[[Planned, Part], None] = lambda planned, part: None
    kept: Callable[[Planned], None] = lambda planned: None


@dataclass
class Recorder:
    """Measures the parts of a plan into `directory`. `system` is the header of each."""

    directory: Path
    system: Mapping[str, Any]
    command: tuple[str, ...]
    nixl_python: str
    screen: Screen
    quick: bool = False
    sources: str = field(default_factory=files.sources_digest)
    invocation: str = field(default_factory=lambda: _now())

    def about(self, planned: Planned) -> About:
        """Say of a part what is known before it is measured."""
        return About(planned.name, self.invocation, self.command, self.sources, self.quick, planned.settings)

    def keep(self, planned: Planned) -> bool:
        """Whether the part is there already, whole, of this machine and this code."""
        try:
            found = files.read(files.path_of(self.directory, planned.name))
        except ResultsError:
            return False
        return found.about.complete and found.like(self.system, self.about(planned))

    def run(self, plan: Sequence[Planned]) -> list[Part]:
        """Measure every part; return them.

        Raises:
            KeyboardInterrupt: as soon as what was measured of the part under way is written.
            SystemExit: the same, of SIGTERM.
            ResultsError: a file cannot be written.
        """
        done = []
        for planned in plan:
            self.screen.begin(planned)
            part, ended = self._measure(planned)
            files.write(self.directory, part)
            self.screen.end(planned, part)
            done.append(part)
            if ended is not None:
                raise ended
        return done

    def _measure(self, planned: Planned) -> tuple[Part, BaseException | None]:
        """Measure a part; return it as far as it came, and what ended the run, if anything did."""
        warnings, failures, rows = list[str](), list[str](), list[Row]()
        started, begun, meter = _now(), time.monotonic(), Meter()

        def warn(text: str) -> None:
            warnings.append(_told(text))
            self.screen.warn(warnings[-1])

        sweep = self._sweep(planned, warn)
        works = [partial(measure, sweep)] if sweep is not None else self._suites(planned, rows, warn)
        ended: BaseException | None = None
        for work in works:
            try:
                work()
            except Exception as error:
                failures.append(_told(f"{type(error).__name__}: {error}"))
            except (KeyboardInterrupt, SystemExit) as error:
                ended = error
                break
        measured = rows if sweep is None else sweep.rows()
        if not measured and not failures and ended is None:
            failures.append("nothing was measured: what it needs is not there")
        about = dataclasses.replace(
            self.about(planned),
            started=started,
            seconds=round(time.monotonic() - begun, 1),
            failures=tuple(failures),
            interrupted=ended is not None,
            warnings=tuple(warnings),
            load=meter.read(),
        )
        results = None if sweep is None else Results(self.command, self._with_versions(), sweep.rows(), started=started)
        return Part(about, self.system, tuple(rows), results), ended

    def _sweep(self, planned: Planned, warn: Callable[[str], None]) -> Sweep | None:
        if planned.shape is None:
            return None
        (backend,) = SWEEPS[planned.name].backends or ("",)
        return Sweep(backend, planned.shape, self.nixl_python, planned.seconds, self.screen.doing, warn)

    def _suites(self, planned: Planned, rows: list[Row], warn: Callable[[str], None]) -> list[Callable[[], None]]:
        """Return what measures each path of a suite, into `rows`: one that fails leaves the others."""
        assert planned.suite is not None
        settings: Settings = dataclasses.replace(planned.suite, progress=self.screen.doing, warn=warn)

        def measure_one(suite: Suite) -> None:
            # Those before a failure stay.
            rows.extend(judged(suite(settings), settings))

        return [partial(measure_one, suite) for _, suite in COMMANDS[planned.name].suites]

    def _with_versions(self) -> dict[str, Any]:
        # What result files want beside what a header has.
        return {**self.system, "versions": {name: str(self.system[name]) for name in files.VERSIONS if name in self.system}}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _told(text: str) -> str:
    """Take from a text where things are on this machine, and what is too long of it."""
    for place, name in ((f"{ROOT}/", ""), (f"{sys.prefix}/", ""), (f"{Path.home()}/", "~/")):
        text = text.replace(place, name)
    return text if len(text) <= LONGEST_TEXT else f"… {text[-LONGEST_TEXT:]}"
