"""The files of a complete run: one for each part, in the forms that `nixl-async bench compare` and `plot` read.

A suite's is what `python -m bench SUITE --format json` prints; a sweep's is `nixl_async/benchmarks/results.py`'s. Both have, in
`system["run"]`, what is said of the part itself: `About`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.process import ROOT
from bench.report import Row, to_json
from nixl_async.benchmarks.results import Results, ResultsError, parse

SCHEMA_KEY = "schema"
DIGITS = 4
MACHINE = ("cpu", "cores", "memory_gib", "kernel")
VERSIONS = ("nixl_async", "nixl", "mooncake")
SOURCES = ("nixl_async", "backends", "bench")
_CODE = frozenset({".py", ".c", ".h"})


@dataclass(frozen=True)
class About:
    """How a part was measured, and what came of it; times are ISO 8601 and seconds."""

    part: str
    invocation: str
    """When the command began that measured this part: parts of one run have the same."""
    command: tuple[str, ...]
    sources: str
    quick: bool
    settings: Mapping[str, Any]
    started: str = ""
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    interrupted: bool = False
    warnings: tuple[str, ...] = ()
    load: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all of the part was measured."""
        return not self.failures and not self.interrupted

    @property
    def state(self) -> str:
        """In a word how it ended."""
        return "interrupted" if self.interrupted else "failed" if self.failures else "complete"


@dataclass(frozen=True)
class Part:
    """One file: what it ran on, how, and its rows: those of suites, or a sweep's."""

    about: About
    system: Mapping[str, Any]
    rows: tuple[Row, ...] = ()
    sweep: Results | None = None

    def like(self, system: Mapping[str, Any], about: About) -> bool:
        """Whether it was measured on the same machine with the same code, libraries and sizes as would be measured now."""
        machine = all(self.system.get(key) == system.get(key) for key in (*MACHINE, *VERSIONS))
        mine = (self.about.sources, self.about.quick, _plain(self.about.settings))
        return machine and mine == (about.sources, about.quick, _plain(about.settings))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def sources_digest() -> str:
    """Return what stands for the code that is measured and measures: the digest of all its files."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in _CODE and path.is_file() and "native/_native.c" not in str(path):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def path_of(directory: Path, name: str) -> Path:
    """Return where the part of that name is."""
    return directory / f"{name}.json"


def write(directory: Path, part: Part) -> None:
    """Write a part's file, by renaming a whole one into place.

    Raises:
        ResultsError: it cannot be written.
    """
    about = _plain(dataclasses.asdict(part.about))
    system = {**part.system, "run": about}
    path = path_of(directory, part.about.part)
    if part.sweep is not None:
        dataclasses.replace(part.sweep, system={**part.sweep.system, "run": about}).write(path)
        return
    lines = [to_json({"system": system}), *(to_json(_rounded(row.as_dict())) for row in part.rows)]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResultsError(f"{path} cannot be written: {error.strerror}") from None


def rounded(value: float) -> float:
    """Return a measured number as it is written: more digits than these say nothing."""
    return float(f"{value:.{DIGITS}g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return rounded(value) if isinstance(value, float) and math.isfinite(value) else value


def read(path: Path) -> Part:
    """Read a part's file.

    Raises:
        ResultsError: it is none; the message says why.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path} is no part of a recorded run: {error}") from None
    try:
        system = lines[0]["system"]
        about = _about(system["run"])
        if SCHEMA_KEY in lines[0]:
            return Part(about, system, sweep=parse(lines[0], str(path)))
        return Part(about, system, tuple(Row.from_dict(line) for line in lines[1:]))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path} is no part of a recorded run: {error!r}") from None


def _about(found: Mapping[str, Any]) -> About:
    made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return About(**made)


def read_all(directory: Path, names: Sequence[str]) -> list[Part]:
    """Read the parts that are there, in the order of `names`; others after them.

    Raises:
        ResultsError: one of the files is no part.
    """
    found = {path.stem: path for path in sorted(directory.glob("*.json"))}
    order = [*(name for name in names if name in found), *(name for name in found if name not in names)]
    return [read(found[name]) for name in order]
