"""The file that every benchmark writes: one JSON object, defined here, read and written here.

    {
      "schema": "nixl-async/benchmark/1",
      "started": "2026-01-31T12:00:00+00:00",         when measuring began, ISO 8601 with its offset from UTC
      "command": ["nixl-async", "bench", ...],        what was run
      "system": {                                     what it ran on; more keys may follow
        "cpu": "…", "cores": 8, "memory_gib": 64.0, "kernel": "6.8.0",
        "versions": {"python": "3.12.1", "nixl-async": "0.1.0", …}
      },
      "rows": [
        {
          "contender": "nixl_async",                  who did it
          "op": "write",                              what was done: "write", "read", or the program's own word
          "scheme": "pairwise",                       who talks to whom; "" where that means nothing
          "route": "samehost",                        which way the bytes went; "" where it is not known
          "src": "DRAM", "dst": "DRAM",               kinds of the places: "DRAM", "VRAM", "FILE", "OBJECT"; "" where not known
          "block_nbytes": 65536,                      bytes of one descriptor
          "batch_nbytes": 67108864,                   bytes of one transfer
          "parameters": {"threads": 1},               what else tells two rows apart: strings, numbers, booleans
          "throughput": [9.1, 9.3],                   GB/s (10^9 bytes a second), one number a repetition
          "latencies": [[1e-3, …], …],                seconds, one entry a repetition: a list, or a histogram
          "cpu_seconds_per_gb": [0.11, 0.1],          CPU seconds of all processes that took part, one number a repetition
          "loop_stall_p999": [4e-4, 5e-4],            seconds: 99.9th percentile of how late the event loop woke, one a repetition
          "phases": {"post": {"mean": [1e-6, 1e-6], "p99": [2e-6, 2e-6]}, …},   seconds of a transfer's parts, one a repetition
          "figures": {"goodput": {"unit": "requests/s", "more_is_better": true, "values": [3.1, 3.2]}, …},   what else there is
          "raw": {"label": "memcpy", "throughput": [10.2, 10.1]},     the limit of this machine for this row
          "share_of_raw": 0.91                        written for readers, worked out again when read
        }
      ],
      "timelines": [
        {"title": "one request", "spans": [{"lane": "prefill", "label": "layer 0", "start": 0.0, "end": 0.01}]}
      ]
    }

A histogram is `{"bounds": [b0, b1, …, bn], "counts": [c1, …, cn]}`: `c1` latencies lie in [b0, b1), in seconds, bounds rising.
Left out means not measured: `throughput`, `latencies`, `cpu_seconds_per_gb`, `loop_stall_p999`, `phases`, `figures`, `raw`,
`timelines` and `parameters` may be; what identifies a row may not. Two rows of one file may not be of the same contender and case.
A repetition is what is independent of the others: statistics over repetitions, never over single latencies, are what is compared.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from nixl_async.errors import ConfigurationError

SCHEMA = "nixl-async/benchmark/1"
Scalar: TypeAlias = str | int | float | bool

_IDENTITY = ("contender", "op", "scheme", "route", "src", "dst")
_SERIES = ("throughput", "cpu_seconds_per_gb", "loop_stall_p999")


class ResultsError(ConfigurationError):
    """Refuse a file that is no result of a benchmark; the message says where in it, what is there and what is allowed."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many latencies of a repetition lie between which bounds.

    `bounds`: seconds, rising, one more than there are `counts`; `counts[i]` latencies lie in [bounds[i], bounds[i + 1]).
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the latency in seconds below which `share` (0 … 1) of them lie, taken as evenly spread within their bin."""
        below = share * len(self)
        seen = 0
        for (low, high), count in zip(itertools.pairwise(self.bounds), self.counts, strict=True):
            if count and seen + count >= below:
                return low + (high - low) * max(below - seen, 0.0) / count
            seen += count
        return self.bounds[-1]

    @classmethod
    def of(cls, latencies: Sequence[float], bounds: Sequence[float]) -> Histogram:
        """Count `latencies` (seconds) between `bounds`; those outside go to the first and the last bin."""
        counts = [0] * (len(bounds) - 1)
        for one in latencies:
            counts[min(max(bisect.bisect_right(bounds, one) - 1, 0), len(counts) - 1)] += 1
        return cls(tuple(bounds), tuple(counts))


@dataclass(frozen=True, slots=True)
class Latencies:
    """Every latency of a repetition, in seconds."""

    seconds: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.seconds)

    def quantile(self, share: float) -> float:
        """Return the latency in seconds below which `share` (0 … 1) of them lie, between neighbours by their distance."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


MOST_LATENCIES = 2000
"""More latencies of a repetition than this are written as a histogram."""
_BINS_PER_DECADE = 40
_LEAST_SECONDS = 1e-9


def condensed(seconds: Sequence[float]) -> Latencies | Histogram:
    """Keep latencies as they are, or as a histogram if there are more than `MOST_LATENCIES`."""
    if len(seconds) <= MOST_LATENCIES:
        return Latencies(tuple(seconds))
    low, high = (math.log10(max(one, _LEAST_SECONDS)) * _BINS_PER_DECADE for one in (min(seconds), max(seconds)))
    bounds = tuple(10.0 ** (edge / _BINS_PER_DECADE) for edge in range(math.floor(low), math.ceil(high) + 2))
    return Histogram.of(seconds, bounds)


@dataclass(frozen=True, slots=True)
class Raw:
    """The limit of the machine for a row: what the same bytes take without any library, in GB/s, one number a repetition."""

    label: str
    throughput: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """A figure that has no field of its own, one number a repetition, its unit, and whether more of it is better."""

    unit: str
    values: tuple[float, ...]
    more_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """What one contender did in one case. Units: bytes, seconds, GB/s (10^9 bytes a second).

    Series have one number a repetition; an empty one was not measured.
    """

    contender: str
    op: str
    block_nbytes: int
    batch_nbytes: int
    scheme: str = ""
    route: str = ""
    src: str = ""
    dst: str = ""
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    throughput: tuple[float, ...] = ()
    latencies: tuple[Latencies | Histogram, ...] = ()
    cpu_seconds_per_gb: tuple[float, ...] = ()
    loop_stall_p999: tuple[float, ...] = ()
    raw: Raw | None = None
    phases: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    figures: Mapping[str, Figures] = field(default_factory=dict)

    @property
    def case(self) -> tuple[Scalar, ...]:
        """What is measured: everything that tells rows apart but the contender."""
        given = (self.op, self.scheme, self.route, self.src, self.dst, self.block_nbytes, self.batch_nbytes)
        return (*given, *(f"{name}={self.parameters[name]}" for name in sorted(self.parameters)))

    @property
    def share_of_raw(self) -> float | None:
        """The median throughput as a share of the raw limit's; `None` where either was not measured."""
        if self.raw is None or not self.throughput:
            return None
        limit = statistics.median(self.raw.throughput)
        return statistics.median(self.throughput) / limit if limit else None

    def as_dict(self) -> dict[str, Any]:
        """Return what the file has for this row."""
        made: dict[str, Any] = {name: getattr(self, name) for name in _IDENTITY}
        made |= {"block_nbytes": self.block_nbytes, "batch_nbytes": self.batch_nbytes}
        if self.parameters:
            made["parameters"] = dict(self.parameters)
        made |= {name: list(getattr(self, name)) for name in _SERIES if getattr(self, name)}
        if self.latencies:
            made["latencies"] = [_latencies(one) for one in self.latencies]
        if self.phases:
            made["phases"] = {name: {key: list(each) for key, each in phase.items()} for name, phase in self.phases.items()}
        if self.figures:
            made["figures"] = {
                name: {"unit": one.unit, "more_is_better": one.more_is_better, "values": list(one.values)}
                for name, one in self.figures.items()
            }
        if self.raw is not None:
            made["raw"] = {"label": self.raw.label, "throughput": list(self.raw.throughput)}
        if (share := self.share_of_raw) is not None:
            made["share_of_raw"] = share
        return made


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time: in which lane (a process, a layer, a link), from when to when, in seconds."""

    lane: str
    label: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happened when, of one request for example; the clock starts where the writer says."""

    title: str
    spans: tuple[Span, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what the file has for this timeline."""
        spans = [{"lane": one.lane, "label": one.label, "start": one.start, "end": one.end} for one in self.spans]
        return {"title": self.title, "spans": spans}


@dataclass(frozen=True, slots=True)
class Results:
    """One run of one benchmark. `system` comes from `nixl_async.benchmarks.system.describe`; `started` is ISO 8601."""

    command: tuple[str, ...]
    system: Mapping[str, Any]
    rows: tuple[Row, ...]
    timelines: tuple[Timeline, ...] = ()
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, Any]:
        """Return the file's object."""
        made: dict[str, Any] = {
            "schema": SCHEMA,
            "started": self.started,
            "command": list(self.command),
            "system": dict(self.system),
            "rows": [row.as_dict() for row in self.rows],
        }
        if self.timelines:
            made["timelines"] = [one.as_dict() for one in self.timelines]
        return made

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, by renaming a whole one into place.

        Raises:
            ResultsError: a value that no reader would take (the file is not touched), or a place that cannot be written.
        """
        made = self.as_dict()
        parse(made, str(path))
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n")
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ResultsError(f"{path} cannot be written: {error.strerror}") from None


def _latencies(one: Latencies | Histogram) -> Any:
    return list(one.seconds) if isinstance(one, Latencies) else {"bounds": list(one.bounds), "counts": list(one.counts)}


def load(path: str | os.PathLike[str]) -> Results:
    """Read a file and check all of it.

    Raises:
        ResultsError: it cannot be read, is not JSON, or is not a result: one line that says where and what is allowed.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path} is no text; allowed: JSON as nixl-async bench writes it") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} is not JSON: {error}") from None
    return parse(found, str(path))


def parse(found: Any, name: str = "results") -> Results:
    """Make results of a file's object; `name` stands for the file in errors.

    Raises:
        ResultsError: something in it is missing, unknown or out of bounds.
    """
    at = _At(found, name)
    schema = at.value.get("schema") if isinstance(at.value, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{name} is no result of this benchmark: schema is {_short(schema)}; allowed: {SCHEMA!r}")
    at.keys(required=("schema", "started", "command", "system", "rows"), optional=("timelines",))
    started = at["started"].text()
    try:
        datetime.fromisoformat(started)
    except ValueError:
        at["started"].refuse("a time as ISO 8601 writes it")
    system = at["system"]
    if not isinstance(system.value, dict):
        system.refuse("an object")
    system.keys(required=("cpu", "cores", "kernel", "versions"), optional=tuple(system.value))
    if not isinstance(system["versions"].value, dict):
        system["versions"].refuse("an object of names and versions")
    rows = tuple(_row(one) for one in at["rows"].items())
    seen: dict[Any, int] = {}
    for place, row in enumerate(rows):
        if (first := seen.setdefault((row.contender, row.case), place)) != place:
            raise ResultsError(f"{name}: rows[{first}] and rows[{place}] are of the same contender and case: {row.case}")
    timelines = tuple(_timeline(one) for one in at["timelines"].items()) if "timelines" in at.value else ()
    return Results(tuple(one.text() for one in at["command"].items()), dict(system.value), rows, timelines, started)


def _row(at: _At) -> Row:
    at.keys(
        required=(*_IDENTITY, "block_nbytes", "batch_nbytes"),
        optional=("parameters", *_SERIES, "latencies", "phases", "figures", "raw", "share_of_raw"),
    )
    made: dict[str, Any] = {name: at[name].text() for name in _IDENTITY}
    made |= {name: at[name].count() for name in ("block_nbytes", "batch_nbytes")}
    made |= {name: at[name].series() for name in _SERIES if name in at.value}
    if not made["contender"]:
        at["contender"].refuse("a name")
    if "parameters" in at.value:
        if not isinstance(at["parameters"].value, dict):
            at["parameters"].refuse("an object")
        made["parameters"] = {name: at["parameters"][name].scalar() for name in at["parameters"].value}
    if "raw" in at.value:
        at["raw"].keys(required=("label", "throughput"))
        made["raw"] = Raw(at["raw"]["label"].text(), at["raw"]["throughput"].series())
    if "phases" in at.value:
        if not isinstance(at["phases"].value, dict):
            at["phases"].refuse("an object")
        made["phases"] = {name: _phase(at["phases"][name]) for name in at["phases"].value}
    if "figures" in at.value:
        if not isinstance(at["figures"].value, dict):
            at["figures"].refuse("an object")
        made["figures"] = {name: _figures(at["figures"][name]) for name in at["figures"].value}
    if "latencies" in at.value:
        made["latencies"] = tuple(_quantiles(one) for one in at["latencies"].items())
    if not any(made.get(name) for name in (*_SERIES, "latencies", "figures")):
        at.refuse(f"at least one of {', '.join((*_SERIES, 'latencies', 'figures'))}", "a row that measures nothing")
    return Row(**made)


def _figures(at: _At) -> Figures:
    at.keys(required=("unit", "more_is_better", "values"))
    better = at["more_is_better"]
    if not isinstance(better.value, bool):
        better.refuse("true or false")
    return Figures(at["unit"].text(), at["values"].series(), bool(better.value))


def _phase(at: _At) -> dict[str, tuple[float, ...]]:
    if not isinstance(at.value, dict):
        at.refuse("an object of series")
    return {name: at[name].series() for name in at.value}


def _quantiles(at: _At) -> Latencies | Histogram:
    if isinstance(at.value, list):
        return Latencies(at.series())
    at.keys(required=("bounds", "counts"))
    bounds = at["bounds"].series()
    counts = tuple(one.count() for one in at["counts"].items())
    if len(bounds) != len(counts) + 1 or any(low >= high for low, high in itertools.pairwise(bounds)):
        at["bounds"].refuse("rising numbers, one more than there are counts", f"{len(bounds)} bounds, {len(counts)} counts")
    if not sum(counts):
        at["counts"].refuse("at least one latency", "all of them are 0")
    return Histogram(bounds, counts)


def _timeline(at: _At) -> Timeline:
    at.keys(required=("title", "spans"))
    spans = []
    for one in at["spans"].items():
        one.keys(required=("lane", "label", "start", "end"))
        span = Span(one["lane"].text(), one["label"].text(), one["start"].number(-math.inf), one["end"].number(-math.inf))
        if span.end < span.start:
            one["end"].refuse(f"seconds not before the start ({span.start})")
        spans.append(span)
    return Timeline(at["title"].text(), tuple(spans))


class _At:
    """A value and where in the file it is."""

    def __init__(self, value: Any, place: str) -> None:
        self.value = value
        self.place = place

    def __getitem__(self, key: str) -> _At:
        return _At(self.value[key], f"{self.place}: {key}" if ": " not in self.place else f"{self.place}.{key}")

    def refuse(self, allowed: str, given: str | None = None) -> None:
        raise ResultsError(f"{self.place} is {_short(self.value) if given is None else given}; allowed: {allowed}")

    def keys(self, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not isinstance(self.value, dict):
            self.refuse("an object")
        for key in required:
            if key not in self.value:
                self.refuse(f"an object with {', '.join(required)}", f"without {key!r}")
        known = {*required, *optional}
        for key in self.value:
            if key not in known:
                self.refuse(", ".join(sorted(known)), f"an object with {key!r}")

    def items(self) -> list[_At]:
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [_At(one, f"{self.place}[{index}]") for index, one in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("a string")
        return str(self.value)

    def number(self, least: float = 0.0) -> float:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            self.refuse("a finite number" if least == -math.inf else f"a finite number >= {least:g}")
        return float(value)

    def count(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 0:
            self.refuse("a whole number >= 0")
        return int(self.value)

    def scalar(self) -> Scalar:
        value = self.value
        if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
            self.refuse("a string, a finite number, true or false")
        made: Scalar = value
        return made

    def series(self) -> tuple[float, ...]:
        numbers = tuple(one.number() for one in self.items())
        if not numbers:
            self.refuse("at least one number")
        return numbers


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
