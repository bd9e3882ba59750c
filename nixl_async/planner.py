"""Which bytes of a paged KV cache go from which rank to which, where two sides shard it differently.

`plan_pairs` says which ranks have something to move between them; a `Pair` turns the two sides' block tables into descriptors,
all layers at once or layer by layer. Tensor and pipeline parallelism, page sizes and the order of a pool's axes may differ on
the two sides. Pure arithmetic on numpy arrays: no I/O, no asyncio, no agent; nothing here makes a Python object for a page.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from nixl_async.descriptors import Descriptor, Region, integers
from nixl_async.errors import DescriptorError
from nixl_async.geometry import KVGeometry, Shard, Sharding

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nixl_async.descriptors import Array

Pool: TypeAlias = "Region | Descriptor | Sequence[Region | Descriptor]"
"""Where a rank's pool is: a region, one range of it (`region[start:stop]`), or several of those, as `Sharding.axes` says."""


class Slices(NamedTuple):
    """What to move and where to, as `agent.transfer(*slices)` takes it; range i of `src` goes to range i of `dst`.

    One descriptor for each side, or, where a pool is several regions, equally many for both.
    """

    src: Descriptor | list[Descriptor]
    dst: Descriptor | list[Descriptor]


@dataclass(frozen=True)
class Pair:
    """Two ranks between which `heads` of `layers` move, numbered as in the whole model."""

    src: Shard
    dst: Shard
    layers: range
    heads: range

    def nbytes(self, tokens: int) -> int:
        """Tell how many bytes `tokens` tokens are."""
        geometry = self.src.geometry
        return tokens * len(self.layers) * geometry.kv * len(self.heads) * geometry.row_nbytes

    def pages(
        self, src: Pool, src_blocks: ArrayLike, dst: Pool, dst_blocks: ArrayLike, tokens: int | range | None = None
    ) -> Slices:
        """Describe a request's tokens on both sides, in as few ranges as are contiguous on both.

        `src_blocks[i]` is the block of the source's pool that has the request's page i, `dst_blocks` the same of the other side,
        whose pages may be longer or shorter. `tokens`: how many of the request's tokens move, from its first; or which, as
        a `range`; by default all of full pages. Longer tables than the tokens need are all right.

        Raises:
            DescriptorError: a block is outside its pool or twice in `dst_blocks`, a table is too short, a pool is no whole number
                of blocks.
        """
        apart, found = self._slices(src, src_blocks, dst, dst_blocks, tokens, ())
        return found[0] if not apart else Slices([s.src for s in found], [s.dst for s in found])  # type: ignore[misc]

    def by_layer(
        self, src: Pool, src_blocks: ArrayLike, dst: Pool, dst_blocks: ArrayLike, tokens: int | range | None = None
    ) -> list[Slices]:
        """Describe the same as `pages` in one piece for each of `layers`, in order, to be moved as each layer is ready."""
        apart, found = self._slices(src, src_blocks, dst, dst_blocks, tokens, ("layer",))
        if "kv" not in apart:
            return found
        together = (found[i : i + self.src.geometry.kv] for i in range(0, len(found), self.src.geometry.kv))
        return [Slices([s.src for s in layer], [s.dst for s in layer]) for layer in together]  # type: ignore[misc]

    def _slices(
        self,
        src: Pool,
        src_blocks: ArrayLike,
        dst: Pool,
        dst_blocks: ArrayLike,
        tokens: int | range | None,
        apart: Iterable[str],
    ) -> tuple[set[str], list[Slices]]:
        """Return the axes by which descriptors are apart, and for each of their indices one descriptor for each side."""
        a, b = _Placed("src", self.src, self, src), _Placed("dst", self.dst, self, dst)
        a_table, b_table = a.table(src_blocks), b.table(dst_blocks, once=True)
        first, last = _span(tokens, len(a_table) * a.page_tokens, len(b_table) * b.page_tokens)
        axes = {*apart, *a.regions_by, *b.regions_by}
        counts = {"layer": len(self.layers), "kv": self.src.geometry.kv, "head": len(self.heads)}
        within = {axis: count for axis, count in counts.items() if axis not in axes}
        starts, ends = _cut(first, last, a.page_tokens, b.page_tokens)
        a_at, b_at, lengths = _ranges(a, a_table, b, b_table, starts, ends, within, self.src.geometry.row_nbytes)
        found = []
        cached: dict[tuple[int, int], Array] = {}
        for layer, kv in itertools.product(*(range(counts[axis]) if axis in axes else (0,) for axis in ("layer", "kv"))):
            both = []
            for side, (placed, at) in enumerate(((a, a_at), (b, b_at))):
                region, offset = placed.place(layer + self.layers.start - placed.shard.layers.start, kv)
                # Regions of their own differ in nothing else: they share the array.
                shift = offset + sum(
                    i * placed.strides.get(axis, 0) for axis, i in (("layer", layer), ("kv", kv)) if axis in axes
                )
                if (side, shift) not in cached:
                    cached[side, shift] = at + shift if shift else at
                both.append(Descriptor(region, cached[side, shift], lengths))
            found.append(Slices(*both))
        return axes, found


def plan_pairs(geometry: KVGeometry, src: Sharding, dst: Sharding) -> list[Pair]:
    """Tell which ranks of `src` send what to which ranks of `dst`, ordered by source rank, then destination rank.

    Every rank of `dst` gets each of its heads and layers exactly once. Where several ranks of `src` have a head, one of them
    sends it, and those that need it are spread over them.

    Raises:
        DescriptorError: a side cannot divide the model so; see `Sharding.shard`.
    """
    sources = [src.shard(geometry, rank) for rank in range(src.ranks)]
    copies, wanted = (max(1, side.tp // geometry.heads) for side in (src, dst))
    pairs = []
    for target in (dst.shard(geometry, rank) for rank in range(dst.ranks)):
        # Of the ranks that want the same heads, this is number `turn`; among the sources' copies it takes its share.
        turn = target.rank % dst.tp % wanted
        chosen = turn * copies // wanted
        for source in sources:
            layers, heads = _overlap(source.layers, target.layers), _overlap(source.heads, target.heads)
            if layers and heads and source.rank % src.tp % copies == chosen:
                pairs.append(Pair(source, target, layers, heads))
    return sorted(pairs, key=lambda pair: (pair.src.rank, pair.dst.rank))


class _Placed:
    """A rank's pool in memory: its regions, and how far apart neighbours along each axis are in one of them."""

    def __init__(self, what: str, shard: Shard, pair: Pair, pool: Pool) -> None:
        self.what, self.shard = what, shard
        self.page_tokens = shard.sharding.page_tokens
        listed = [_range_of(what, place) for place in ([pool] if isinstance(pool, Region | Descriptor) else pool)]
        axes = shard.sharding.axes
        leading = list(itertools.takewhile(lambda axis: axis in ("layer", "kv"), axes))
        for n in range(len(leading) + 1):
            if math.prod(shard.lengths[axis] for axis in leading[:n]) == len(listed):
                self.regions_by = tuple(leading[:n])
                break
        else:
            allowed = [math.prod(shard.lengths[axis] for axis in leading[:n]) for n in range(len(leading) + 1)]
            raise DescriptorError(f"{what} is {len(listed)} regions; rank {shard.rank} of axes {axes!r} has one of {allowed}")
        each = shard.block_nbytes // len(listed)
        self.places: list[tuple[Region, int]] = []
        nblocks = set()
        for region, offset, nbytes in listed:
            if nbytes % each or not nbytes:
                raise DescriptorError(
                    f"{what} pool {region.name!r} has {nbytes} bytes, which is no whole number of blocks of {each} bytes; "
                    "take the pool out of its region, as region[start:stop]"
                )
            self.places.append((region, offset))
            nblocks.add(nbytes // each)
        if len(nblocks) > 1:
            raise DescriptorError(f"{what} regions have {sorted(nblocks)} blocks; all regions of a pool need equally many")
        self.blocks = nblocks.pop()
        self.strides: dict[str, int] = {}
        stride = shard.geometry.row_nbytes
        for axis in reversed(axes[len(self.regions_by) :]):
            self.strides[axis] = stride
            stride *= self.blocks if axis == "block" else shard.lengths[axis]
        # Where the pair's first head and layer begin in a region.
        head, layer = pair.heads.start - shard.heads.start, pair.layers.start - shard.layers.start
        self.base = head * self.strides.get("head", 0) + layer * self.strides.get("layer", 0)

    def table(self, blocks: ArrayLike, *, once: bool = False) -> Array:
        """Check a block table."""
        name = f"{self.what}_blocks"
        table: Array = integers(name, blocks)
        if len(table) and not 0 <= (low := int(table.min())) <= (high := int(table.max())) < self.blocks:
            raise DescriptorError(
                f"{name} has block {low if low < 0 else high}; the pool of rank {self.shard.rank} has {self.blocks} blocks"
            )
        if once and len(table) > 1:
            counts = np.bincount(table)
            if int(counts.max()) > 1:
                raise DescriptorError(f"{name} has block {int(counts.argmax())} twice; no block can take two pages")
        return table

    def place(self, layer: int, kv: int) -> tuple[Region, int]:
        """Return the region that has a layer of the rank, and where the pool begins in it."""
        at = 0
        for axis in self.regions_by:
            at = at * self.shard.lengths[axis] + (layer if axis == "layer" else kv)
        return self.places[at]

    def at(self, table: Array, tokens: Array) -> Array:
        """Return where tokens are, by their numbers in the request."""
        page, inside = np.divmod(tokens, self.page_tokens)
        at: Array = table[page] * self.strides["block"]
        at += inside * self.strides.get("token", 0) + self.base
        return at


def _ranges(
    a: _Placed, a_table: Array, b: _Placed, b_table: Array, starts: Array, ends: Array, counts: dict[str, int], row: int
) -> tuple[Array, Array, Array]:
    """Return where the ranges of tokens `starts[i]` to `ends[i]`, none of them across pages, begin on both sides, and lengths.

    `counts` are the axes to go through besides.
    """

    def adjacent(axis: str, nbytes: int) -> bool:
        return a.strides.get(axis) == nbytes == b.strides.get(axis)

    def joined(left: dict[str, int], nbytes: int) -> int:
        """Take out of `left` the axes along which runs of `nbytes` bytes join on both sides; return the bytes of the runs."""
        while axis := next((axis for axis in left if adjacent(axis, nbytes)), None):
            nbytes *= left.pop(axis)
        return nbytes

    counts = {axis: count for axis, count in counts.items() if count > 1}
    lengths = ends - starts
    whole = lengths == a.page_tokens
    left = {"token": a.page_tokens, **counts} if a.page_tokens > 1 else dict(counts)
    run = joined(left, row)
    inner = {"head": counts.pop("head")} if "head" in counts else {}
    vector = joined(inner, row)
    parts = []
    if a.page_tokens == b.page_tokens and "token" not in left and run > vector * a.page_tokens and whole.any():
        # Whole pages join along more axes than tokens do.
        parts.append(_spread(a, a_table, b, b_table, starts[whole], np.full(int(whole.sum()), run), left))
        starts, ends, lengths = starts[~whole], ends[~whole], lengths[~whole]
    if len(starts) or not parts:
        if len(starts) and int(lengths.max()) > 1 and not adjacent("token", vector):
            starts = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
            lengths = np.ones_like(starts)
        parts.append(_spread(a, a_table, b, b_table, starts, lengths * vector, {**counts, **inner}))
    if len(parts) == 1:
        return parts[0]
    a_parts, b_parts, n_parts = zip(*parts, strict=True)
    return np.concatenate(a_parts), np.concatenate(b_parts), np.concatenate(n_parts)


def _spread(
    a: _Placed, a_table: Array, b: _Placed, b_table: Array, starts: Array, lengths: Array, counts: dict[str, int]
) -> tuple[Array, Array, Array]:
    """Repeat runs that begin at tokens `starts` along the axes of `counts`, after joining neighbours."""
    at = [placed.at(table, starts) for placed, table in ((a, a_table), (b, b_table))]
    joined = np.ones(max(0, len(starts) - 1), np.bool_)
    for offsets in at:
        joined &= np.diff(offsets) == lengths[:-1]
    if joined.any():
        firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
        at, lengths = [offsets[firsts] for offsets in at], np.add.reduceat(lengths, firsts)
    # In the order in which the destination has them: neighbours in the list are then near each other in memory.
    axes = [axis for axis in b.shard.sharding.axes if axis in counts]
    spread = []
    for placed, offsets in zip((a, b), at, strict=True):
        outer = np.zeros(1, np.int64)
        for axis in axes:
            outer = np.add.outer(outer, np.arange(counts[axis]) * placed.strides[axis]).ravel()
        spread.append(np.add.outer(outer, offsets).ravel())
    n = math.prod(counts.values())
    if len(lengths) and int(lengths.min()) == int(lengths.max()):
        # One number for all takes no memory, and is how descriptors know pages of one length.
        return spread[0], spread[1], np.broadcast_to(lengths[:1], (n * len(lengths),))
    return spread[0], spread[1], np.tile(lengths, n)


def _span(tokens: int | range | None, src_tokens: int, dst_tokens: int) -> tuple[int, int]:
    if tokens is None:
        if src_tokens != dst_tokens:
            raise DescriptorError(f"the tables have {src_tokens} tokens of src, {dst_tokens} of dst; say how many tokens move")
        return 0, src_tokens
    span = tokens if isinstance(tokens, range) else range(operator.index(tokens))
    if (not isinstance(tokens, range) and tokens < 0) or span.step != 1 or not 0 <= span.start <= span.stop:
        raise DescriptorError(f"tokens is {tokens!r}; give a count, or a range of step 1 that does not begin below 0")
    if span.stop > min(src_tokens, dst_tokens):
        raise DescriptorError(
            f"token {span.stop - 1} is to move, but the tables have {src_tokens} tokens of src, {dst_tokens} of dst"
        )
    return span.start, span.stop


def _cut(first: int, last: int, *sizes: int) -> tuple[Array, Array]:
    """Cut tokens `first` to `last` - 1 where a page of either side begins; return where pieces start and end."""
    inner = [np.arange(first - first % size + size, last, size) for size in sorted(set(sizes))]
    cuts = inner[0] if max(sizes) % min(sizes) == 0 else np.union1d(*inner)
    if first == last:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(([first], cuts)), np.concatenate((cuts, [last]))


def _range_of(what: str, place: Region | Descriptor) -> tuple[Region, int, int]:
    if isinstance(place, Region):
        if not place.sized:
            raise DescriptorError(f"{place!r} of {what} has no size; take the pool out of it, as region[start:stop]")
        return place, 0, place.nbytes
    if not isinstance(place, Descriptor):
        raise TypeError(f"{what} must be regions or ranges of regions, not {type(place).__name__}")
    if place.first is None:
        raise DescriptorError(f"{what} has {place!r} for a pool; give one range, such as region[0:4096]")
    return place.region, place.first, place.nbytes


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
