"""Traffic made up from a model and its requests: what prefill workers send to decode workers, batch after batch.

As KVBench's inference_workload_matgen: prompts of a normal distribution, cut off at both ends; batches by count and memory; each
batch goes from the next prefill worker to the decode worker of the same number; computing it takes
(4 B S² H + 16 B S H²) L / (36 TFLOP/s · TP) seconds, of B requests, S tokens in all, hidden size H, L layers.

Which rank sends what to which is the planner's: whole pages of the heads and layers that each decode rank needs, once each. KVBench
divides all bytes evenly among pairs of ranks, MLA's latent vectors and heads that several ranks have too, and rounds cells to two
places after the point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from nixl_async.benchmarks.kv.layouts import Layout, dtype_nbytes
from nixl_async.benchmarks.kv.matrices import Matrix, write_size
from nixl_async.benchmarks.kv.models import Model
from nixl_async.errors import ConfigurationError
from nixl_async.planner import plan_pairs

FLOPS = 36e12
"""Floating point operations a second that a GPU is taken to do, KVBench's figure for an H100."""


@dataclass(frozen=True)
class Requests:
    """What users ask for."""

    count: int = 1000
    batch_size: int = 1
    isl_mean: int = 16000
    isl_scale: int = 10000
    isl_min: int = 1000
    isl_max: int = 128000
    max_batch_nbytes: float = 100e9
    """A batch is closed when it is larger."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.count < 1 or self.batch_size < 1 or self.isl_scale < 0:
            raise ConfigurationError(
                "the number of requests and the batch size must be positive, the scale of ISL not negative"
            )
        if not 1 <= self.isl_min <= self.isl_max:
            raise ConfigurationError(f"ISL is to be {self.isl_min} to {self.isl_max}; it needs 1 <= the least <= the most")

    def batches(self, token_nbytes: float) -> list[list[int]]:
        """Return the prompts' lengths in tokens, batch by batch: for a seed those of KVBench after `np.random.seed`."""
        random = np.random.RandomState(self.seed)
        found: list[list[int]] = []
        batch: list[int] = []
        for _ in range(self.count):
            batch.append(min(max(self.isl_min, int(random.normal(self.isl_mean, self.isl_scale))), self.isl_max))
            if sum(batch) * token_nbytes > self.max_batch_nbytes or len(batch) >= self.batch_size:
                found.append(batch)
                batch = []
        return [*found, batch] if batch else found


@dataclass(frozen=True)
class Fleet:
    """Workers of both kinds: as many prefill as decode workers, ranks of prefill first."""

    prefill: Layout
    decode: Layout
    workers: int = 1

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self.workers * (self.prefill.tp * self.prefill.pp + self.decode.tp * self.decode.pp)

    def ranks(self, worker: int) -> tuple[list[int], list[int]]:
        """Return the ranks of a prefill worker and of its decode worker."""
        sizes = self.prefill.tp * self.prefill.pp, self.decode.tp * self.decode.pp
        starts = worker * sizes[0], self.workers * sizes[0] + worker * sizes[1]
        return list(range(starts[0], starts[0] + sizes[0])), list(range(starts[1], starts[1] + sizes[1]))


@dataclass(frozen=True)
class Batch:
    """One batch on its way: who sends what, and how long it was computed."""

    cells: Matrix
    isl: int
    compute_seconds: float


def compute_seconds(model: Model, batch: Sequence[int], tp: int) -> float:
    """Estimate how long a batch's prefill takes.

    Raises:
        ConfigurationError: the model's source does not say its hidden size.
    """
    if not model.hidden_size:
        raise ConfigurationError(f"{model.source}: 'hidden_size' is missing; computing is estimated by it")
    requests, tokens, hidden = len(batch), sum(batch), model.hidden_size
    flop = 4 * requests * tokens**2 * hidden * model.layers + 16 * requests * tokens * hidden**2 * model.layers
    return flop / (FLOPS * tp)


def generate(model: Model, fleet: Fleet, requests: Requests) -> list[Batch]:
    """Make a matrix for each batch.

    Raises:
        ConfigurationError: a dtype is unknown, or there are more stages than layers.
        DescriptorError: TP does not fit the KV heads.
    """
    geometry = fleet.prefill.geometry(model)
    pairs = plan_pairs(geometry, fleet.prefill.sharding(geometry), fleet.decode.sharding(geometry))
    workers = cycle(range(fleet.workers))
    found = []
    for batch in requests.batches(geometry.token_nbytes):
        senders, receivers = fleet.ranks(next(workers))
        page = fleet.prefill.page_size
        tokens = sum(-(-isl // page) * page for isl in batch)
        cells = np.zeros((fleet.world, fleet.world), np.int64)
        for pair in pairs:
            cells[senders[pair.src.rank], receivers[pair.dst.rank]] += pair.nbytes(tokens)
        rows = tuple(tuple(map(int, row)) for row in cells)
        found.append(Batch(rows, sum(batch), compute_seconds(model, batch, fleet.prefill.tp)))
    return found


def generate_as_kvbench(model: Model, fleet: Fleet, requests: Requests) -> list[tuple[list[list[float]], int, float]]:
    """Make KVBench's matrices: cells in bytes, not whole ones, with tokens and seconds of computing.

    Raises:
        ConfigurationError: its generator refuses pipeline stages, and TP of prefill that does not divide decode's.
    """
    prefill, decode = fleet.prefill, fleet.decode
    if prefill.pp > 1 or decode.pp > 1:
        raise ConfigurationError("KVBench's generator knows no pipeline stages: --prefill-pp and --decode-pp must be 1")
    peers, rest = divmod(decode.tp, prefill.tp)
    if rest:
        raise ConfigurationError(f"KVBench's generator needs prefill's TP, {prefill.tp}, to divide decode's, {decode.tp}")
    token_nbytes = model.layers * model.heads * model.head_dim * model.kv * dtype_nbytes(prefill.kv_dtype)
    workers = cycle(range(fleet.workers))
    found = []
    for batch in requests.batches(token_nbytes):
        senders, receivers = fleet.ranks(next(workers))
        cell = sum(isl * token_nbytes for isl in batch) / prefill.tp / peers
        cells = [[0.0] * fleet.world for _ in range(fleet.world)]
        for number, receiver in enumerate(receivers):
            cells[senders[number // peers]][receiver] = cell
        found.append((cells, sum(batch), compute_seconds(model, batch, prefill.tp)))
    return found


def kvbench_size(nbytes: float) -> str:
    """Write a cell as KVBench's generator does: at most two places after the point."""
    if nbytes == 0:
        return "0"
    units = "BKMG"
    unit = 0
    while nbytes / 1024 >= 1 and unit < len(units) - 1:
        nbytes /= 1024
        unit += 1
    return f"{round(nbytes, 2):g}{units[unit]}"


def write_workload(folder: Path, batches: Sequence[tuple[Sequence[Sequence[str]], int, float]]) -> Path:
    """Write matrices (cells as text, tokens, seconds) and the file that lists them in KVBench's form; return that file's path.

    Raises:
        ConfigurationError: the folder cannot be written to.
    """
    import yaml

    listed: list[dict[str, Any]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (rows, isl, seconds) in enumerate(batches):
            path = folder / f"matrix_{number}.txt"
            path.write_text("".join(" ".join(row) + "\n" for row in rows))
            file = path.absolute().as_posix()
            listed.append({"matrix_file": file, "sleep_before_launch_sec": seconds, "metadata": {"isl": isl}})
        index = folder / "metadata.yaml"
        index.write_text(yaml.safe_dump({"traffic_patterns": listed}))
    except OSError as error:
        raise ConfigurationError(f"{str(folder)!r} cannot be written to: {error.strerror}") from None
    return index


def as_text(cells: Matrix) -> list[list[str]]:
    """Write cells so that they are read back exactly."""
    return [[write_size(cell) for cell in row] for row in cells]
