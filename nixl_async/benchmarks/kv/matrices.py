"""Traffic patterns: matrices of what each rank sends to each, and the files that list them, KVBench's own.

A matrix file has a row for each sender, in each row a cell for each receiver, apart by white space; a cell is a number of bytes,
with `K`, `M` or `G` (units of 1024) or `B` behind it in either case, and may have a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.kv.documents import read_document, read_text
from nixl_async.errors import ConfigurationError

UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
DRAM, VRAM = "dram", "vram"
_MEMORY = {"cuda": VRAM, "vram": VRAM, "cpu": DRAM, "dram": DRAM}
WRITE, READ = "WRITE", "READ"
MAX_NBYTES = 1 << 50
"""More than this in a cell is taken for a slip."""

Matrix = tuple[tuple[int, ...], ...]
"""`matrix[i][j]`: bytes that rank i sends to rank j."""


def parse_size(text: str) -> int:
    """Read a size: bytes, or with a unit, as `5K` or `1.5m`.

    Raises:
        ValueError: it is none, is negative or is too large.
    """
    unit = UNITS.get(text[-1:].lower())
    number = float(text if unit is None else text[:-1])
    if not math.isfinite(number) or not 0 <= number * (unit or 1) <= MAX_NBYTES:
        raise ValueError(text)
    return int((unit or 1) * number)


def read_matrix(path: str | Path) -> Matrix:
    """Read a matrix file.

    Raises:
        ConfigurationError: the file cannot be read, or is no square matrix of sizes; the message names the line.
    """
    rows: list[tuple[int, ...]] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        row = []
        for column, cell in enumerate(cells, 1):
            try:
                row.append(parse_size(cell))
            except (ValueError, OverflowError):
                raise ConfigurationError(
                    f"{str(path)!r}, line {number}, cell {column}: {cell!r} is no size; a size is a number of bytes, "
                    "or one with K, M or G"
                ) from None
        if rows and len(row) != len(rows[0]):
            raise ConfigurationError(f"{str(path)!r}, line {number}: {len(row)} cells; the first line has {len(rows[0])}")
        rows.append(tuple(row))
    if not rows or len(rows) != len(rows[0]):
        columns = len(rows[0]) if rows else 0
        raise ConfigurationError(
            f"{str(path)!r} has {len(rows)} rows of {columns} cells; it needs as many rows as cells in a row"
        )
    return tuple(rows)


def write_size(nbytes: int) -> str:
    """Write a size that `parse_size` reads back exactly."""
    for unit in ("g", "m", "k"):
        if nbytes and nbytes % UNITS[unit] == 0:
            return f"{nbytes // UNITS[unit]}{unit.upper()}"
    return str(nbytes)


@dataclass(frozen=True)
class Pattern:
    """A matrix and how it is run."""

    matrix: Matrix
    name: str
    """The file that it is from."""
    memory: str | None = None
    """`dram`, `vram`, or None where its file does not say."""
    op: str = WRITE
    """WRITE: senders push. READ: receivers pull."""
    sleep_before: float = 0.0
    """Seconds of computing before it."""
    sleep_after: float = 0.0

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return len(self.matrix)

    @property
    def nbytes(self) -> int:
        """Bytes of all cells."""
        return sum(map(sum, self.matrix))

    def sent(self, rank: int) -> int:
        """Bytes that a rank sends."""
        return sum(self.matrix[rank])

    def received(self, rank: int) -> int:
        """Bytes that a rank receives."""
        return sum(row[rank] for row in self.matrix)

    @property
    def senders(self) -> list[int]:
        """Ranks that send something."""
        return [rank for rank in range(self.world) if self.sent(rank)]

    @property
    def initiators(self) -> list[int]:
        """Ranks that start transfers: senders of a WRITE, receivers of a READ."""
        if self.op == WRITE:
            return self.senders
        return [rank for rank in range(self.world) if self.received(rank)]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "matrix": self.matrix,
            "name": self.name,
            "memory": self.memory,
            "op": self.op,
            "sleep_before": self.sleep_before,
            "sleep_after": self.sleep_after,
        }

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Pattern:
        """Take it out of JSON values."""
        return cls(**{**values, "matrix": tuple(tuple(row) for row in values["matrix"])})


@dataclass(frozen=True)
class Traffic:
    """What a file of patterns asks for."""

    patterns: tuple[Pattern, ...]
    sequential: bool
    """Whether it is a sequence, run alone and one after the other; otherwise one pattern, run again and again."""
    iters: int = 1
    warmup: int = 0

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.patterns[0].world

    def slept(self, scale: float) -> Traffic:
        """Return a copy in which computing takes `scale` times as long."""
        patterns = (
            replace(one, sleep_before=one.sleep_before * scale, sleep_after=one.sleep_after * scale) for one in self.patterns
        )
        return replace(self, patterns=tuple(patterns))


def read_traffic(path: str | Path) -> Traffic:
    """Read patterns as KVBench's `ct-perftest` (`traffic_pattern`) and `sequential-ct-perftest` (`traffic_patterns`) have them.

    A file that is neither YAML, JSON nor TOML by its name is a matrix, run once. Matrix files are looked for where the program
    runs, then beside the file that names them.

    Raises:
        ConfigurationError: a file cannot be read, a value makes no sense, or matrices differ in size.
    """
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml", ".json", ".toml"):
        return Traffic((Pattern(read_matrix(path), str(path)),), sequential=False)
    document = read_document(path)
    listed = document.get("traffic_patterns")
    sequential = listed is not None
    if not sequential:
        one = document.get("traffic_pattern")
        if one is None:
            raise ConfigurationError(f"{str(path)!r} has neither 'traffic_pattern' nor 'traffic_patterns'")
        listed = [one]
    if not isinstance(listed, list) or not listed:
        raise ConfigurationError(f"{str(path)!r}: 'traffic_patterns' must be a list of patterns that is not empty")
    patterns = tuple(_pattern(entry, f"{str(path)!r}, pattern {number}", path) for number, entry in enumerate(listed))
    if len({pattern.world for pattern in patterns}) > 1:
        worlds = ", ".join(f"{pattern.name}: {pattern.world}" for pattern in patterns)
        raise ConfigurationError(f"{str(path)!r}: all matrices need equally many ranks; they have {worlds}")
    counts = {}
    for name, key, least in (("iters", "iters", 1), ("warmup", "warmup_iters", 0)):
        value = document.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{str(path)!r}: {key!r} is {value!r}; it must be an integer of at least {least}")
        counts[name] = value
    return Traffic(patterns, sequential, **counts)


def _pattern(entry: Any, where: str, path: Path) -> Pattern:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("matrix_file"), str):
        raise ConfigurationError(f"{where}: 'matrix_file', the path of a matrix, is missing")
    shards = entry.get("shards", 1)
    if shards != 1:
        raise ConfigurationError(f"{where}: 'shards' is {shards!r}; a buffer in pieces is not supported, only 1")
    memory = entry.get("mem_type")
    if memory is not None and str(memory).lower() not in _MEMORY:
        raise ConfigurationError(f"{where}: 'mem_type' is {memory!r}; it must be one of {', '.join(_MEMORY)}")
    op = str(entry.get("xfer_op", WRITE)).upper()
    if op not in (WRITE, READ):
        raise ConfigurationError(f"{where}: 'xfer_op' is {entry['xfer_op']!r}; it must be WRITE or READ")
    sleeps = []
    for key in ("sleep_before_launch_sec", "sleep_after_launch_sec"):
        value = entry.get(key) or 0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigurationError(f"{where}: {key!r} is {value!r}; it must be a number of seconds, 0 or more")
        sleeps.append(float(value))
    file = Path(entry["matrix_file"])
    if not file.exists() and not file.is_absolute() and (path.parent / file).exists():
        file = path.parent / file
    memory = None if memory is None else _MEMORY[str(memory).lower()]
    return Pattern(read_matrix(file), entry["matrix_file"], memory, op, *sleeps)
