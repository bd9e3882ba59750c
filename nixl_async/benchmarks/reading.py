"""Read results for comparing and drawing: result files, and the JSON lines of `python -m bench … --format json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.results import Latencies, Raw, Results, ResultsError, Row, load, parse

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_HEADER = ("cpu", "cores", "kernel")


def read(path: str | os.PathLike[str]) -> tuple[Results, int]:
    """Read a file of either form; return also how many of its rows have a unit that is neither GB/s nor a time.

    Raises:
        ResultsError: it cannot be read, or is neither.
    """
    lines = _lines(path)
    if lines is None:
        return load(path), 0
    header, rows, left = lines[0]["system"], [], 0
    for number, line in enumerate(lines[1:], 2):
        try:
            found = list(_rows(line))
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{path}: line {number} is no row of python -m bench: {error!r}") from None
        rows += found
        left += not found
    if not rows:
        raise ResultsError(f"{path} has no row in GB/s or in a unit of time; allowed: at least one")
    versions = {name: str(header[name]) for name in ("nixl_async", "nixl", "mooncake") if name in header}
    system = {**{name: header.get(name, "") for name in _HEADER}, **header, "versions": versions}
    made = Results(("python", "-m", "bench"), system, tuple(rows), started=str(header.get("when", "1970-01-01")))
    return parse(made.as_dict(), str(path)), left


def _lines(path: str | os.PathLike[str]) -> list[dict[str, Any]] | None:
    """Return the objects of a file of lines that begins with a header; `None` for any other file."""
    try:
        text = Path(path).read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError):
        # What is wrong with it is for `load` to say.
        return None
    if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get("system"), dict) or "schema" in lines[0]:
        return None
    return lines


def _rows(line: dict[str, Any]) -> Iterator[Row]:
    unit, case = line["unit"], dict(line["case"])
    if unit != "GB/s" and unit not in _SECONDS:
        return
    block = case.pop("page", 0)
    src_dst = {"block_nbytes": block if isinstance(block, int) else 0, "batch_nbytes": 0}
    parameters = {name: value for name, value in case.items() if isinstance(value, str | int | float | bool)}
    op = str(parameters.pop("op", line["command"]))
    route = str(parameters.pop("path", ""))
    parameters["bench"] = line["command"]
    raw = line.get("raw")
    for figure in (line["ours"], *line["others"]):
        if "samples" not in figure:
            raise KeyError(f"{figure['label']} has no samples; run python -m bench again")
        samples = tuple(figure["samples"])
        common = {
            "contender": figure["label"],
            "op": op,
            "route": route,
            "parameters": parameters,
            **src_dst,
        }
        if unit == "GB/s":
            limit = None if raw is None or "samples" not in raw else Raw(raw["label"], tuple(raw["samples"]))
            yield Row(**common, throughput=samples, raw=limit)
        else:
            yield Row(**common, latencies=tuple(Latencies((one * _SECONDS[unit],)) for one in samples))
