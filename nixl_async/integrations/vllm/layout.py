"""Where one rank of a vLLM engine keeps the pages of each layer, and which bytes of them another rank needs.

A page is one block of one layer. vLLM's tensor of a layer is logically [blocks, heads, tokens, content], with strides of its own
(`KVCacheLayout` of vllm/v1/kv_cache_layout.py). Ranks of equal tensor parallelism copy whole pages; ranks of unequal one copy
the heads that they share, which are contiguous where heads are the outermost axis of a page (LBHNC, BLHNC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MambaSpec, UniformTypeKVCacheSpecs

from nixl_async import ConfigurationError, Descriptor, KVGeometry, MemoryRegion, RemoteRegion, Sharding, plan_pairs

Table = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Layer:
    """One layer's pages: page p lies at `offset + p * stride` of region `region`, and has `nbytes` contiguous bytes.

    `ratio` pages, which are the attention kernel's blocks, make one block of the scheduler. `by_head` tells whether a page is its
    heads one after the other. `group` is the KV cache group whose block tables it follows.
    """

    name: str
    region: str
    offset: int
    stride: int
    nbytes: int
    ratio: int
    group: int
    by_head: bool


@dataclass(frozen=True)
class Layout:
    """What a rank tells its peers of its KV cache before anything moves.

    `heads` is how many KV heads the whole model has; 0 for MLA, of which every rank has everything. `group_tokens[g]` is how many
    tokens a block of KV cache group g has. `facts` must be equal on both sides whatever their parallelism.
    """

    engine: str
    rank: int
    tp: int
    heads: int
    group_tokens: list[int]
    layers: list[Layer]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """How many KV heads each rank has."""
        return max(1, self.heads // self.tp)

    def pack(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def unpack(cls, values: Mapping[str, Any]) -> Layout:
        """Read what `pack` wrote.

        Raises:
            ConfigurationError: it is malformed.
        """
        try:
            return cls(**{**values, "layers": [Layer(**layer) for layer in values["layers"]]})
        except (TypeError, KeyError) as error:
            raise ConfigurationError(f"a peer's description of its KV cache is malformed: {error!r}") from None

    def check(self, other: Layout) -> None:
        """Refuse a peer between whose KV cache and this one nothing can be copied.

        Raises:
            ConfigurationError: the message names what differs, and both values.
        """
        for name in sorted(self.facts.keys() | other.facts.keys()):
            self._equal(other, name, self.facts.get(name), other.facts.get(name))
        self._equal(other, "the number of KV heads", self.heads, other.heads)
        self._equal(other, "tokens in a block of each KV cache group", self.group_tokens, other.group_tokens)
        self._equal(other, "layers", [layer.name for layer in self.layers], [layer.name for layer in other.layers])
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            what = f"of layer {mine.name!r}"
            self._equal(other, f"the KV cache group {what}", mine.group, theirs.group)
            self._equal(other, f"kernel blocks in a block {what}", mine.ratio, theirs.ratio)
            if self.held == other.held or not self.heads:
                self._equal(other, f"bytes of a page {what}", mine.nbytes, theirs.nbytes)
                self._equal(other, f"heads outermost in a page {what}", mine.by_head, theirs.by_head)
                continue
            if not (mine.by_head and theirs.by_head):
                raise ConfigurationError(
                    f"tensor parallelism is {self.tp} here and {other.tp} at engine {other.engine!r}: heads must be outermost in a"
                    f" page on both sides, and {what} they are not; set the KV cache layout LBHNC on both"
                )
            self._equal(other, f"bytes of a head in a page {what}", mine.nbytes / self.held, theirs.nbytes / other.held)

    def _equal(self, other: Layout, what: str, mine: object, theirs: object) -> None:
        if mine != theirs:
            raise ConfigurationError(f"{what}: {mine!r} here, {theirs!r} at engine {other.engine!r}; both sides need the same")


def describe(
    caches: Mapping[str, Any], config: KVCacheConfig, *, engine: str, rank: int, tp: int, heads: int, facts: dict[str, str]
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Return the layout of what `register_kv_caches` was given, and the memory to register, by region name, as bytes.

    Layers that share another layer's cache have no specification of their own and are left out.

    Raises:
        ConfigurationError: a layer's pages are not contiguous, or it keeps a state that is no pages (Mamba).
    """
    specs = _specs(config)
    regions: dict[str, torch.Tensor] = {}
    by_storage: dict[int, str] = {}
    layers = []
    for name in sorted(caches, key=_numbered):
        if name not in specs:
            continue
        group, spec = specs[name]
        cache = caches[name]
        if isinstance(spec, MambaSpec) or not isinstance(cache, torch.Tensor):
            raise ConfigurationError(
                f"layer {name!r} keeps a {type(spec).__name__} state; NixlAsyncConnector moves paged KV only"
            )
        storage = cache.untyped_storage()
        at = storage.data_ptr()
        if at not in by_storage:
            by_storage[at] = f"kv-{len(regions)}"
            regions[by_storage[at]] = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage)
        layers.append(_layer(name, by_storage[at], cache, cache.data_ptr() - at, spec, group, config.num_blocks))
    if not layers:
        raise ConfigurationError(
            f"none of the KV caches {sorted(caches)} takes part in transfers; there is nothing to connect"
        )
    tokens = [int(group.kv_cache_spec.block_size) for group in config.transfer_groups]
    return Layout(engine, rank, tp, heads, tokens, layers, facts), regions


def _layer(name: str, region: str, cache: torch.Tensor, offset: int, spec: KVCacheSpec, group: int, blocks: int) -> Layer:
    size = cache.element_size()
    if cache.ndim == 1:
        # A byte view of memory that layers of several groups share: its pages abut.
        nbytes = int(spec.page_size_bytes)
        return Layer(name, region, offset, nbytes, nbytes, 1, group, False)
    if cache.shape[0] < blocks or cache.shape[0] % blocks:
        raise ConfigurationError(
            f"layer {name!r} has {cache.shape[0]} blocks, which is no multiple of the scheduler's {blocks}"
        )
    shape, strides = list(cache.shape[1:]), list(cache.stride()[1:])
    run = 1
    order = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: strides[axis])
    for axis in order:
        if strides[axis] != run:
            raise ConfigurationError(
                f"a page of layer {name!r} is not contiguous (shape {tuple(cache.shape)}, strides {tuple(cache.stride())});"
                " set a KV cache layout that keeps a block's heads and tokens together, such as LBHNC"
            )
        run *= shape[axis]
    by_head = cache.ndim == 4 and (shape[0] == 1 or order[-1] == 0)
    return Layer(name, region, offset, cache.stride(0) * size, run * size, cache.shape[0] // blocks, group, by_head)


def _specs(config: KVCacheConfig) -> dict[str, tuple[int, KVCacheSpec]]:
    found = {}
    for number, group in enumerate(config.transfer_groups):
        spec = group.kv_cache_spec
        for name in group.layer_names:
            found[name] = number, spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    return found


def first_spec(spec: KVCacheSpec) -> KVCacheSpec:
    """Return the specification of a group's layers; where it holds one for each, they are of one kind."""
    return next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def _numbered(name: str) -> tuple[tuple[int, int | str], ...]:
    """Order layer names by their numbers: both sides list the same layers, whatever order they allocated them in."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in name.split("."))


# Who has what of whom.


@lru_cache
def heads_between(heads: int, source_tp: int, target_tp: int) -> dict[tuple[int, int], range]:
    """Tell which KV heads go from which rank to which: (source, target) to heads, numbered as in the whole model."""
    pairs = plan_pairs(KVGeometry(1, heads or 1, 1, 1, 1), Sharding(tp=source_tp), Sharding(tp=target_tp))
    return {(pair.src.rank, pair.dst.rank): pair.heads for pair in pairs}


def consumers(heads: int, source: int, source_tp: int, target_tp: int) -> list[int]:
    """Tell which target ranks say to a source rank that they need nothing more of it: those that have read from it, or one."""
    found = [target for origin, target in heads_between(heads, source_tp, target_tp) if origin == source]
    return found or [source % target_tp]


def sources(heads: int, source_tp: int, target: int, target_tp: int) -> tuple[list[int], list[int]]:
    """Tell which source ranks a target rank needs, and to which others it says that it needs nothing."""
    needed = [origin for origin, one in heads_between(heads, source_tp, target_tp) if one == target]
    told = [rank for rank in range(source_tp) if target in consumers(heads, rank, source_tp, target_tp)]
    return needed, [rank for rank in told if rank not in needed]


@dataclass(frozen=True)
class Slice:
    """What of one rank's pages another rank shares: `count` heads from `start` on of the `held` ones."""

    start: int
    count: int
    held: int

    def pages(self, layer: Layer, region: MemoryRegion | RemoteRegion, blocks: Table) -> Descriptor:
        """Describe that part of a layer's blocks, in order."""
        table = blocks if layer.ratio == 1 else np.add.outer(blocks * layer.ratio, np.arange(layer.ratio)).ravel()
        if self.count == self.held:
            return region.pages(table, layer.nbytes, offset=layer.offset, stride_nbytes=layer.stride)
        head = layer.nbytes // self.held
        return region.pages(table, self.count * head, offset=layer.offset + self.start * head, stride_nbytes=layer.stride)


def shared(source: Layout, target: Layout) -> tuple[Slice, Slice]:
    """Tell which part of a source rank's pages, and of a target rank's, are the same heads.

    Raises:
        ConfigurationError: nothing goes from that rank to that rank.
    """
    heads = heads_between(source.heads, source.tp, target.tp).get((source.rank, target.rank))
    if heads is None:
        raise ConfigurationError(f"rank {target.rank} of {target.tp} needs nothing of rank {source.rank} of {source.tp}")
    return _part(source, heads), _part(target, heads)


def _part(side: Layout, heads: range) -> Slice:
    if not side.heads:
        return Slice(0, 1, 1)
    first = side.rank * side.heads // side.tp
    return Slice(heads.start - first, len(heads), side.held)


def table(blocks: Sequence[int] | bytes) -> Table:
    """Return a block table that came as a list, or as the bytes of 32-bit numbers."""
    if isinstance(blocks, bytes):
        return np.frombuffer(blocks, np.int32).astype(np.int64)
    return np.asarray(blocks, np.int64)


def packed(blocks: Sequence[int] | Table) -> bytes:
    """Return a block table in the form in which it travels."""
    return np.asarray(blocks, np.int32).tobytes()
