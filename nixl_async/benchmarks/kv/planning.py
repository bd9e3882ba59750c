"""What each rank of a model moves for a number of requests, and where KVBench reckons something else. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nixl_async.benchmarks.kv import kvbench
from nixl_async.benchmarks.kv.layouts import Layout, dtype_nbytes
from nixl_async.benchmarks.kv.models import Model
from nixl_async.geometry import KVGeometry, Shard


@dataclass(frozen=True)
class RankPlan:
    """What one rank moves. An access is one contiguous piece: a page in all of the rank's layers, or in one of them."""

    shard: Shard
    layout: Layout
    copies: int
    """How many ranks keep the same."""

    @property
    def io_nbytes(self) -> int:
        """Bytes of one access."""
        return self.shard.block_nbytes // (1 if self.layout.by_block else len(self.shard.layers))

    @property
    def ios_per_request(self) -> int:
        """Accesses that one request takes."""
        return self.layout.pages * (1 if self.layout.by_block else len(self.shard.layers))

    @property
    def batch_size(self) -> int:
        """Accesses of all requests."""
        return self.ios_per_request * self.layout.num_requests

    @property
    def nbytes(self) -> int:
        """Bytes of all requests."""
        return self.batch_size * self.io_nbytes

    def as_dict(self) -> dict[str, Any]:
        """Return what programs get."""
        layers, heads = self.shard.layers, self.shard.heads
        return {
            "rank": self.shard.rank,
            "stage": self.shard.rank // self.layout.tp,
            "tp_rank": self.shard.rank % self.layout.tp,
            "first_layer": layers.start,
            "layers": len(layers),
            "first_head": heads.start,
            "heads": len(heads),
            "copies": self.copies,
            "io_nbytes": self.io_nbytes,
            "ios_per_request": self.ios_per_request,
            "batch_size": self.batch_size,
            "nbytes": self.nbytes,
        }


@dataclass(frozen=True)
class Plan:
    """What a model's ranks move."""

    model: Model
    layout: Layout
    geometry: KVGeometry
    ranks: tuple[RankPlan, ...]

    @property
    def fullest(self) -> RankPlan:
        """The first of the ranks that move the most."""
        return max(self.ranks, key=lambda rank: rank.nbytes)

    @property
    def tokens_nbytes(self) -> int:
        """Bytes of all requests' tokens, once each."""
        return self.geometry.token_nbytes * self.layout.isl * self.layout.num_requests

    @property
    def pages_nbytes(self) -> int:
        """Bytes of all requests' pages, once each: the last page of a request is moved whole."""
        layout = self.layout
        return self.geometry.token_nbytes * layout.pages * layout.page_size * layout.num_requests

    @property
    def nbytes(self) -> int:
        """Bytes that all ranks move together."""
        return sum(rank.nbytes for rank in self.ranks)

    @property
    def copies(self) -> int:
        """How many ranks keep each byte."""
        return self.ranks[0].copies

    def differences(self) -> list[str]:
        """Say where KVBench reckons something else for this model and layout, and why."""
        return list(_differences(self))

    def notes(self) -> list[str]:
        """Say what else to know about the figures."""
        return list(_notes(self))

    def as_dict(self) -> dict[str, Any]:
        """Return what programs get."""
        model, layout = self.model, self.layout
        theirs = kvbench.Figures.of(model, layout) if kvbench.knows(layout) else None
        return {
            "model": model.name,
            "source": model.source,
            "dtype": layout.kv_dtype,
            "tp": layout.tp,
            "pp": layout.pp,
            "stages": [len(rank.shard.layers) for rank in self.ranks[:: layout.tp]],
            "isl": layout.isl,
            "num_requests": layout.num_requests,
            "page_size": layout.page_size,
            "access": "block" if layout.by_block else "layer",
            "token_nbytes": self.geometry.token_nbytes,
            "pages_per_request": layout.pages,
            "tokens_nbytes": self.tokens_nbytes,
            "pages_nbytes": self.pages_nbytes,
            "copies": self.copies,
            "nbytes": self.nbytes,
            "ranks": [rank.as_dict() for rank in self.ranks],
            "kvbench": None if theirs is None else theirs.as_dict(),
            "differences": self.differences(),
            "notes": self.notes(),
        }


def make_plan(model: Model, layout: Layout) -> Plan:
    """Reckon what each rank moves.

    Raises:
        ConfigurationError: the dtype is unknown, or there are more stages than layers.
        DescriptorError: TP neither divides the KV heads nor is a multiple of them, or the stages do not fit.
    """
    geometry = layout.geometry(model)
    copies = max(1, layout.tp // geometry.heads)
    return Plan(model, layout, geometry, tuple(RankPlan(shard, layout, copies) for shard in layout.shards(geometry)))


def _differences(plan: Plan) -> Iterator[str]:
    model, layout, geometry = plan.model, plan.layout, plan.geometry
    if not kvbench.knows(layout):
        yield f"KVBench knows no dtype {layout.kv_dtype!r} or {layout.model_dtype!r}: it has {', '.join(kvbench.DTYPES)}"
        return
    theirs = kvbench.Figures.of(model, layout)
    if theirs.token_nbytes != geometry.token_nbytes:
        yield (
            f"a token takes {geometry.token_nbytes} bytes, KVBench says {theirs.token_nbytes}: it reckons this cache by the "
            f"weights' dtype, {layout.model_dtype}, not by the cache's, {layout.kv_dtype}"
        )
    if model.latent and layout.tp > 1:
        yield (
            f"each of the {layout.tp} tensor-parallel ranks has the whole latent vector (MLA); KVBench divides it by TP: its "
            "accesses are too small, and the copies are left out"
        )
    elif layout.tp > geometry.heads:
        yield (
            f"there are {geometry.heads} KV heads for TP {layout.tp}: {plan.copies} ranks have the same head; KVBench gives "
            "each of them a part of one: its accesses are too small, and the copies are left out"
        )
    if layout.by_block and geometry.layers % layout.pp:
        stages = sorted({len(rank.shard.layers) for rank in plan.ranks}, reverse=True)
        kind = f"{theirs.stage_layers:g} layers" + ("" if model.latent else ", which no stage has")
        counts = " or ".join(map(str, stages))
        yield f"{geometry.layers} layers on {layout.pp} stages are {counts} each; KVBench gives every stage {kind}"
    if layout.isl % layout.page_size:
        yield (
            f"{layout.isl} tokens take {layout.pages} pages of {layout.page_size}, the last of them moved whole; KVBench counts "
            "fractions of pages, and rounds all requests' sum"
        )
    if layout.tp * layout.pp > 1:
        yield (
            "batch sizes here are each rank's own; KVBench has one for all ranks together, and its command moves all of "
            "that between two processes"
        )


def _notes(plan: Plan) -> Iterator[str]:
    layout, windows = plan.layout, plan.model.windows
    windowed = [window for window in windows if window and window < layout.isl]
    if windowed:
        page, total = layout.page_size, len(windows) * layout.pages
        # The pages that the last `window` tokens touch.
        kept = (len(windows) - len(windowed)) * layout.pages
        kept += sum(layout.pages - (layout.isl - window) // page for window in windowed)
        yield (
            f"{len(windowed)} of {len(windows)} layers have a sliding window of {windowed[0]} tokens; they are counted in full, "
            "as engines without a hybrid cache manager move them; with what is in their windows alone it would be "
            f"{kept / total:.0%} of the bytes"
        )
    if plan.model.dtype and dtype_nbytes(layout.kv_dtype) != _nbytes(plan.model.dtype):
        yield f"the model's own dtype is {plan.model.dtype}; the cache is reckoned as {layout.kv_dtype}"


def _nbytes(dtype: str) -> int | None:
    try:
        return dtype_nbytes(dtype)
    except ValueError:
        return None
