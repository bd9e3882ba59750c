"""What to move: places in registered memory, as numpy arrays.

One `Descriptor` stands for any number of pages of one region; nothing here makes a Python object per page. Validation,
pairing, coalescing and splitting are vectorised. This module does no I/O and knows neither backends nor asyncio; a
region is only something with an address, a size and an owner.
"""

from __future__ import annotations

import enum
import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nixl_async.errors import DescriptorError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array: TypeAlias = NDArray[np.int64]
    Selection: TypeAlias = int | slice | Sequence[int] | NDArray[np.int64] | None

_MIN_PAGES = 16
"""Shorter lists of pages are better joined before they are paired: each call of compiled code costs as much as some pages."""

# The arrays here are a few MiB. glibc gives such blocks back to the kernel as soon as they are freed, and mapping them afresh page
# by page takes ten times as long as the arithmetic. Having freed one large block teaches it to keep them (mallopt(3),
# M_MMAP_THRESHOLD is dynamic); this one is never touched and costs nothing.
np.empty(31 << 20, np.uint8)

AXES = ("layer", "kv", "block", "head")
"""The axes a `BlockLayout` may have, in the order in which it always lists its pages."""


class MemoryKind(enum.Enum):
    """Where bytes are; the values are NIXL's segment names. In files and objects an address is an offset."""

    DRAM = "DRAM"
    VRAM = "VRAM"
    FILE = "FILE"
    OBJECT = "OBJ"


class Region:
    """Memory that descriptors point into: `nbytes` bytes at `address`, of this agent (`peer is None`) or of a peer."""

    name: str
    address: int
    nbytes: int
    kind: MemoryKind
    device: int
    peer: str | None
    readonly: bool
    sized: bool = True
    """Whether `nbytes` is the size; False for what grows as it is written and for objects not asked for their size."""
    keyed: bool = False
    """Whether the region is objects of a store: then each range is a part of its own, and writing replaces whole objects."""

    _alone: tuple[Region] | None = None

    @property
    def alone(self) -> tuple[Region]:
        """A tuple of this region only, the same one each time: many plans have no other region."""
        if self._alone is None:
            self._alone = (self,)
        return self._alone

    def check_usable(self) -> None:
        """Raise `ClosedError` when the region is deregistered, `PeerLost` when its peer is gone."""
        raise NotImplementedError

    def hold(self) -> None:
        """Count one more transfer that uses the region."""
        raise NotImplementedError

    def release(self) -> None:
        """Count one transfer less."""
        raise NotImplementedError

    def whole(self, nbytes: int) -> Descriptor:
        """Describe all of a region that has no size yet, when the other side of a transfer has `nbytes` bytes."""
        return self[0:nbytes]

    def check_target(self, offsets: Array, lengths: Array) -> None:
        """Raise `DescriptorError` when these ranges, in order, cannot be written by one transfer."""

    def replaced(self, offsets: Array) -> Iterable[Hashable]:
        """Tell what writing at these offsets replaces as a whole: no two regions of one transfer may replace the same."""
        return ()

    def __repr__(self) -> str:
        owner = "" if self.peer is None else f" of {self.peer!r}"
        return f"<{type(self).__name__} {self.name!r}{owner}: {self.nbytes} bytes {self.kind.value}>"

    def __getitem__(self, item: slice) -> Descriptor:
        """Describe the byte range `region[start:stop]`; like a `bytes` slice, but out-of-range ends are refused."""
        if not isinstance(item, slice) or item.step not in (None, 1):
            raise TypeError(f"index a region by a slice of bytes without a step, such as region[0:4096], not {item!r}")
        start = 0 if item.start is None else operator.index(item.start)
        stop = self.nbytes if item.stop is None else operator.index(item.stop)
        if not 0 <= start <= stop <= self.nbytes:
            raise DescriptorError(
                f"bytes {start}:{stop} do not lie within region {self.name!r} of {self.nbytes} bytes (0 <= start <= stop)"
            )
        return Descriptor.one(self, start, stop - start)

    def pages(self, indices: ArrayLike, page_nbytes: int, *, offset: int = 0, stride_nbytes: int | None = None) -> Descriptor:
        """Describe the pages `offset + i * stride_nbytes` for every i of `indices`, in that order.

        `indices`: integers of any shape, read in C order; they are copied. `stride_nbytes` is `page_nbytes` unless given.

        Raises:
            DescriptorError: an index is negative or its page ends behind the region; a size is not positive.
        """
        page_nbytes = _positive("page_nbytes", page_nbytes)
        stride = page_nbytes if stride_nbytes is None else _positive("stride_nbytes", stride_nbytes)
        offset = operator.index(offset)
        if offset < 0:
            raise DescriptorError(f"offset is {offset}; it must not be negative")
        chosen = integers("indices", indices, as_given=np.int32)
        n_pages = max(0, (self.nbytes - offset - page_nbytes) // stride + 1)
        # 32 bits where they do: half the memory is half the page faults, which cost more than the copying.
        narrow = n_pages < 1 << 31
        copied: Any = np.empty(len(chosen), np.int32) if narrow else chosen.astype(np.int64)
        if not (narrow and _check_indices(chosen, n_pages, copied)):
            _check_bounds("page index", chosen, n_pages, f"region {self.name!r} holds {n_pages} pages of {page_nbytes} bytes")
        return Descriptor.paged(self, copied, page_nbytes, stride, offset)

    def ranges(self, offsets: ArrayLike, nbytes: ArrayLike) -> Descriptor:
        """Describe the ranges of `nbytes[i]` bytes at `offsets[i]`; one integer for `nbytes` serves all of them.

        Raises:
            DescriptorError: a range is negative or ends behind the region, or the two lists differ in length.
        """
        starts = np.array(integers("offsets", offsets))
        lengths = integers("nbytes", nbytes)
        if len(lengths) == 1 and len(starts) != 1:
            lengths = _repeated(int(lengths[0]), len(starts))
        else:
            lengths = np.array(lengths)
        if len(lengths) != len(starts):
            raise DescriptorError(f"{len(starts)} offsets but {len(lengths)} byte counts; give one for each, or one for all")
        if len(starts):
            _check_bounds("byte count", lengths, self.nbytes + 1, f"region {self.name!r} has {self.nbytes} bytes")
            _check_bounds("offset", starts, self.nbytes + 1, f"region {self.name!r} has {self.nbytes} bytes")
            ends = starts + lengths
            if (last := int(ends.max())) > self.nbytes:
                raise DescriptorError(f"a range ends at byte {last}, but region {self.name!r} has {self.nbytes} bytes")
        return Descriptor(self, starts, lengths)


class Descriptor:
    """N byte ranges of one region, in order: `offsets` and `lengths` in bytes, int64 arrays of shape (N,), not to be changed.

    Made by `Region.pages`, `Region.ranges`, slicing a region, or `BlockLayout.pages`; those check the bounds.
    """

    __slots__ = ("_base", "_indices", "_lengths", "_offsets", "_stride", "first", "nbytes", "region")
    region: Region
    first: int | None
    """The offset of the only range, in bytes; `None` unless there is exactly one."""
    nbytes: int
    _indices: NDArray[np.int32] | Array | None
    _stride: int
    _base: int
    _offsets: Array | None
    _lengths: Array | None

    def __init__(self, region: Region, offsets: Array, lengths: Array) -> None:
        self.region = region
        self._indices = None
        self._offsets = offsets
        self._lengths = lengths
        single = len(lengths) == 1
        if page_nbytes := page_nbytes_of(lengths):
            self.nbytes = page_nbytes * len(lengths)
        else:
            self.nbytes = int(lengths[0]) if single else int(lengths.sum())
        self.first = int(offsets[0]) if single else None

    @classmethod
    def one(cls, region: Region, offset: int, nbytes: int) -> Descriptor:
        """Describe one range whose bounds have been checked. Its arrays are made when somebody asks for them."""
        made = cls.__new__(cls)
        made.region, made.first, made.nbytes = region, offset, nbytes
        made._offsets = made._lengths = made._indices = None
        return made

    @classmethod
    def paged(
        cls, region: Region, indices: NDArray[np.int32] | Array, page_nbytes: int, stride_nbytes: int, offset: int
    ) -> Descriptor:
        """Describe pages whose bounds have been checked, by an array of indices that nobody else changes.

        Where the pages are is reckoned when it is needed, for long lists on a thread.
        """
        n = len(indices)
        if n == 1:
            return cls.one(region, int(indices[0]) * stride_nbytes + offset, page_nbytes)
        made = cls.__new__(cls)
        made.region, made.first, made.nbytes = region, None, n * page_nbytes
        made._indices, made._stride, made._base = indices, stride_nbytes, offset
        made._offsets, made._lengths = None, _repeated(page_nbytes, n)
        return made

    @property
    def offsets(self) -> Array:
        """Where each range begins in its region, in bytes."""
        if self._offsets is None:
            self._offsets = np.array([self.first], np.int64) if self._indices is None else self._from(self._base)
        return self._offsets

    @property
    def addresses(self) -> Array:
        """Where each range begins in its owner's memory."""
        if self._indices is not None and self._offsets is None:
            return self._from(self._base + self.region.address)
        return self.offsets + self.region.address

    def _from(self, base: int) -> Array:
        assert self._indices is not None
        found: Array = self._indices.astype(np.int64)
        found *= self._stride
        found += base
        return found

    @property
    def page_nbytes(self) -> int:
        """The bytes of each of several pages; 0 where that is not known to be one number."""
        return 0 if self._lengths is None else page_nbytes_of(self._lengths)

    def places(self) -> tuple[Any, int, int, int]:
        """Return numbers, the bytes of one of them, a stride and a base: range i begins at address base + stride * numbers[i]."""
        if self._indices is not None:
            return _pointer(self._indices), self._indices.itemsize, self._stride, self._base + self.region.address
        return _pointer(self.offsets), 8, 1, self.region.address

    @property
    def lengths(self) -> Array:
        """How long each range is, in bytes."""
        if self._lengths is None:
            self._lengths = np.array([self.nbytes], np.int64)
        return self._lengths

    def __len__(self) -> int:
        return 1 if self._lengths is None else len(self._lengths)

    def __repr__(self) -> str:
        return f"<Descriptor: {len(self)} ranges, {self.nbytes} bytes of {self.region!r}>"


Places: TypeAlias = "Region | Descriptor | Sequence[Region | Descriptor]"
"""What one side of a transfer may be."""


@dataclass(frozen=True)
class BlockLayout:
    """The order in which a paged KV pool keeps its blocks.

    `axes` names the dimensions from outermost to innermost, out of `AXES`; `shape` gives their lengths; every
    element is a page of `page_nbytes` contiguous bytes. `BlockLayout(("layer", "kv", "block"), (32, 2, 1000), 65536)` is a
    `[layers, 2, blocks, block_bytes]` pool, `BlockLayout(("block", "layer", "kv"), …)` a `[blocks, layers, 2, …]` one.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    page_nbytes: int
    _strides: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the axes and derive the byte strides."""
        if not self.axes or len(set(self.axes)) != len(self.axes) or not set(self.axes) <= set(AXES):
            raise DescriptorError(f"axes are {self.axes!r}; give each of them once, out of {AXES}")
        if len(self.shape) != len(self.axes):
            raise DescriptorError(f"{len(self.axes)} axes but {len(self.shape)} lengths in shape {self.shape!r}")
        stride = _positive("page_nbytes", self.page_nbytes)
        strides = {}
        for axis, length in zip(reversed(self.axes), reversed(self.shape), strict=True):
            strides[axis] = stride
            stride *= _positive(f"length of axis {axis!r}", length)
        object.__setattr__(self, "_strides", strides)

    @property
    def nbytes(self) -> int:
        """The bytes of a whole pool."""
        total = self.page_nbytes
        for length in self.shape:
            total *= length
        return total

    def pages(self, region: Region, *, offset: int = 0, **selection: Selection) -> Descriptor:
        """Describe the selected pages of a pool that starts `offset` bytes into `region`.

        Each axis takes an integer, a slice, a list of integers, or nothing for all. Pages are listed in the order of
        `AXES` whatever the layout's own order is, so that two sides with different layouts pair up.

        Raises:
            DescriptorError: an axis is unknown, an index is out of range, or the pool does not fit the region.
        """
        if unknown := set(selection) - set(self.axes):
            raise DescriptorError(f"no axis {sorted(unknown)!r} in this layout; it has {self.axes!r}")
        if offset < 0 or offset + self.nbytes > region.nbytes:
            raise DescriptorError(
                f"a pool of {self.nbytes} bytes at offset {offset} does not fit region {region.name!r} of {region.nbytes} bytes"
            )
        offsets = np.array([offset], np.int64)
        for axis in AXES:
            if axis in self.axes:
                chosen = self._select(axis, selection.get(axis))
                offsets = (offsets[:, None] + chosen * self._strides[axis]).ravel()
        return Descriptor(region, offsets, _repeated(self.page_nbytes, len(offsets)))

    def _select(self, axis: str, selection: Selection) -> Array:
        length = self.shape[self.axes.index(axis)]
        if selection is None:
            return np.arange(length, dtype=np.int64)
        if isinstance(selection, slice):
            return np.arange(length, dtype=np.int64)[selection]
        chosen: Array = integers(axis, selection)
        _check_bounds(f"{axis} index", chosen, length, f"the layout has {length} along axis {axis!r}")
        return chosen


# Side, Plan and Op are not `frozen`: that would triple what making one costs. Nobody changes them all the same.


@dataclass(slots=True, eq=False)
class Side:
    """One side of a plan or op: absolute addresses, and the region each of them lies in.

    `index[i]` is the position in `regions` of address i; `None` when there is one region. All regions of a side have the
    same owner (`peer`), kind and device.
    """

    regions: tuple[Region, ...]
    addresses: Array
    index: Array | None = None

    @property
    def peer(self) -> str | None:
        """The owner's name, `None` for this agent."""
        return self.regions[0].peer

    @property
    def kind(self) -> MemoryKind:
        """Where the memory is."""
        return self.regions[0].kind

    def take(self, start: int, stop: int) -> Side:
        """Return addresses `start:stop`; the arrays are views."""
        return Side(self.regions, self.addresses[start:stop], None if self.index is None else self.index[start:stop])

    def choose(self, which: NDArray[np.bool_] | Array) -> Side:
        """Return the addresses that an index array or a mask selects."""
        return Side(self.regions, self.addresses[which], None if self.index is None else self.index[which])


@dataclass(slots=True, eq=False, weakref_slot=True)
class Plan:
    """A checked, paired and coalesced transfer: `lengths[i]` bytes go from `src.addresses[i]` to `dst.addresses[i]`.

    `part_ends[p]` is the number of bytes up to the end of part p, where each descriptor given for `src` is a part; with objects
    on a side (of `dst`, if on both), each of its ranges.
    """

    src: Side
    dst: Side
    lengths: Array
    nbytes: int
    part_ends: tuple[int, ...]

    def split(self, max_nbytes: int, max_segments: int) -> Iterator[Plan]:
        """Yield the plan in order as pieces of at most `max_nbytes` bytes and `max_segments` segments.

        `part_ends` of a piece is empty.
        """
        if self.nbytes <= max_nbytes and len(self.lengths) <= max_segments:
            yield self
            return
        src, dst, lengths = _cut_long(self.src, self.dst, self.lengths, max_nbytes)
        longest = int(lengths.max())
        if longest == int(lengths.min()):
            step = min(max_nbytes // longest, max_segments)
            for start in range(0, len(lengths), step):
                stop = min(start + step, len(lengths))
                yield Plan(src.take(start, stop), dst.take(start, stop), lengths[start:stop], (stop - start) * longest, ())
            return
        ends = np.cumsum(lengths)
        start, done = 0, 0
        while start < len(lengths):
            stop = min(int(ends.searchsorted(done + max_nbytes, "right")), start + max_segments)
            end = int(ends[stop - 1])
            yield Plan(src.take(start, stop), dst.take(start, stop), lengths[start:stop], end - done, ())
            start, done = stop, end


def make_plan(src: Places, dst: Places) -> Plan:
    """Check both sides against each other, pair their ranges byte by byte in order, and coalesce neighbours.

    The sides need equal byte counts in all, not equal pages: 4 KiB pages pair with 64 KiB pages. Runs that are contiguous
    on both sides become one segment, never across parts. Ranges that overlap within `dst` leave undefined bytes.

    Raises:
        DescriptorError: the byte counts differ, a side is empty, or mixes owners, kinds or devices, or `dst` is read-only.
        ClosedError: a region is deregistered, or its peer is gone.
    """
    if isinstance(src, Descriptor) and isinstance(dst, Descriptor) and src.first is not None and dst.first is not None:
        return _plan_one(src, src.first, dst, dst.first)
    src, dst = _settle(src, dst), _settle(dst, src)
    sources, targets = _as_descriptors("src", src), _as_descriptors("dst", dst)
    nbytes, wanted = sum(d.nbytes for d in sources), sum(d.nbytes for d in targets)
    _check_sizes(nbytes, wanted)
    for target in targets:
        _check_writable(target.region)
    if targets[0].region.keyed:
        _check_targets(targets)
    part_ends = _part_ends(targets if targets[0].region.keyed else sources)
    if not targets[0].region.keyed and _are_alike(sources, targets):
        return Plan(*_pair_pages(sources, targets), nbytes, tuple(part_ends))
    a, a_lengths = _side(sources)
    b, b_lengths = _side(targets)
    if page_nbytes_of(a_lengths) and page_nbytes_of(a_lengths) == page_nbytes_of(b_lengths):
        lengths = a_lengths
    else:
        if len(a_lengths) == len(b_lengths) and np.array_equal(a_lengths, b_lengths):
            lengths = a_lengths
        else:
            a, b, lengths = _pair_unequal(a, a_lengths, b, b_lengths)
        if not lengths.all():
            keep = lengths > 0
            a, b, lengths = a.choose(keep), b.choose(keep), lengths[keep]
    if len(lengths) > 1:
        a, b, lengths = _coalesce(a, b, lengths, part_ends)
    return Plan(a, b, np.ascontiguousarray(lengths), nbytes, tuple(part_ends))


def _plan_one(src: Descriptor, first_src: int, dst: Descriptor, first_dst: int) -> Plan:
    """Plan one range to one range: the case where the price of each numpy call counts."""
    source, target = src.region, dst.region
    source.check_usable()
    target.check_usable()
    _check_sizes(src.nbytes, dst.nbytes)
    _check_writable(target)
    if target.keyed:
        target.check_target(dst.offsets, dst.lengths)
    nbytes = src.nbytes
    stop = 1 if nbytes else 0
    row = np.array((source.address + first_src, target.address + first_dst, nbytes), np.int64)
    return Plan(Side(source.alone, row[:stop]), Side(target.alone, row[1 : 1 + stop]), row[2 : 2 + stop], nbytes, (nbytes,))


def _check_sizes(nbytes: int, wanted: int) -> None:
    if nbytes != wanted:
        raise DescriptorError(f"src has {nbytes} bytes but dst has {wanted}; both sides need the same number")


def _check_writable(region: Region) -> None:
    if region.readonly:
        hint = "register writable memory to receive into" if region.kind is MemoryKind.DRAM else "open it for writing"
        raise DescriptorError(f"dst region {region.name!r} is read-only; {hint}")


def _settle(place: Places, other: Places) -> Places:
    """Give a place without a size the other side's."""
    if not isinstance(place, Region) or place.sized:
        return place
    listed = [other] if isinstance(other, Region | Descriptor) else other
    for one in listed:
        if isinstance(one, Region) and not one.sized:
            raise DescriptorError(f"neither {place!r} nor {one!r} has a size; slice one, or say nbytes where it is made")
    return place.whole(sum(one.nbytes for one in listed))


def _check_targets(targets: list[Descriptor]) -> None:
    regions: dict[int, list[Descriptor]] = {}
    for target in targets:
        regions.setdefault(id(target.region), []).append(target)
    for found in regions.values():
        offsets, lengths = np.concatenate([d.offsets for d in found]), np.concatenate([d.lengths for d in found])
        found[0].region.check_target(offsets, lengths)
    if len(regions) > 1:
        replaced: set[Hashable] = set()
        for found in regions.values():
            for one in found[0].region.replaced(np.concatenate([d.offsets for d in found])):
                if one in replaced:
                    raise DescriptorError(f"{found[0].region!r} is to be written with an object twice; give each once")
                replaced.add(one)


def _part_ends(places: list[Descriptor]) -> list[int]:
    """Return how many bytes there are up to the end of each part: of each descriptor, or of each range of objects."""
    if not places[0].region.keyed:
        return list(itertools.accumulate(place.nbytes for place in places))
    ends: list[int] = np.cumsum(np.concatenate([place.lengths for place in places])).tolist()
    return ends


def page_nbytes_of(lengths: Array) -> int:
    """Return the byte count that all elements of a list of pages' lengths are, without looking at them; 0 if that takes looking."""
    return int(lengths[0]) if len(lengths) and lengths.strides == (0,) else 0


def concatenate(plans: Sequence[Plan]) -> Plan:
    """Join plans between the same two owners into one, for a single wire operation."""
    if len(plans) == 1:
        return plans[0]
    return Plan(
        _join([p.src for p in plans]),
        _join([p.dst for p in plans]),
        np.concatenate([p.lengths for p in plans]),
        sum(p.nbytes for p in plans),
        (),
    )


def _repeated(nbytes: int, n: int) -> Array:
    """Return an array of `n` times `nbytes` that takes no memory: all its elements are one."""
    array: Array = np.ndarray((n,), np.int64, np.array([nbytes], np.int64), 0, (0,))
    array.flags.writeable = False
    return array


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """Return the compiled module: whoever moves nothing, such as a program that runs in NIXL's environment, need not have it."""
    from nixl_async import native

    return native


def _pointer(array: Any) -> Any:
    """Return a C pointer to an array's data, for as long as it lives."""
    return _compiled().ffi.from_buffer(array)


def _check_indices(indices: Any, limit: int, to: Any) -> bool:
    """Copy page indices as 32-bit ones; tell whether all of them are less than `limit` and none is negative."""
    native = _compiled()
    room = native.ffi.from_buffer("int32_t[]", to)
    return bool(native.lib.nx_page_indices(_pointer(indices), indices.itemsize, len(indices), limit, room))


def _positive(what: str, value: int) -> int:
    number = operator.index(value)
    if number <= 0:
        raise DescriptorError(f"{what} is {number}; it must be positive")
    return number


def integers(what: str, values: ArrayLike, as_given: type[np.signedinteger[Any]] = np.int64) -> Any:
    """Return whole numbers as a flat array of int64, or of `as_given` if they are that; it may be the caller's own.

    Raises:
        TypeError: they are no integers.
        DescriptorError: one of them does not fit 64 bits.
    """
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise DescriptorError(f"{what} holds {int(array.max())}, which is more than any region has")
    return (array if array.dtype == as_given else np.asarray(array, np.int64)).ravel()


def _check_bounds(what: str, values: Any, limit: int, allowed: str) -> None:
    # As unsigned numbers the negative ones are the largest: one pass finds both kinds of error.
    unsigned = values.view(np.uint32 if values.dtype == np.int32 else np.uint64)
    if len(values) and int(unsigned.max()) >= limit:
        low, high = int(values.min()), int(values.max())
        raise DescriptorError(f"{what} {low if low < 0 else high} is out of range: {allowed}")


def _as_descriptors(what: str, places: Places) -> list[Descriptor]:
    if isinstance(places, Region | Descriptor):
        listed: Sequence[Region | Descriptor] = [places]
    elif isinstance(places, Sequence) and not isinstance(places, str | bytes | bytearray | memoryview):
        listed = places
    else:
        raise TypeError(
            f"{what} must be a region, a descriptor, or a list of them, not {type(places).__name__};"
            " memory is registered first: region = await agent.register(memory)"
        )
    for place in listed:
        if isinstance(place, Region) and not place.sized:
            raise DescriptorError(f"{place!r} of {what} has no size; slice it, or say nbytes where it is made")
    found = [place[:] if isinstance(place, Region) else place for place in listed]
    for place in found:
        if not isinstance(place, Descriptor):
            raise TypeError(f"{what} must be regions or descriptors of regions, not {type(place).__name__}")
    if not found:
        raise DescriptorError(f"{what} is empty; give at least one region or descriptor")
    first = found[0].region
    seen = set()
    for place in found:
        region = place.region
        if id(region) in seen:
            continue
        seen.add(id(region))
        region.check_usable()
        if (region.peer, region.kind, region.device) != (first.peer, first.kind, first.device):
            raise DescriptorError(f"{what} mixes {first!r} with {region!r}; use one transfer for each owner, kind and device")
    return found


def _are_alike(sources: list[Descriptor], targets: list[Descriptor]) -> bool:
    """Tell whether both sides are as many lists, each of as many pages of one size as its counterpart."""
    if len(sources) != len(targets) or sum(map(len, sources)) < _MIN_PAGES * len(sources):
        return False
    return all(
        a.page_nbytes and a.page_nbytes == b.page_nbytes and len(a) == len(b) for a, b in zip(sources, targets, strict=True)
    )


def _pair_pages(sources: list[Descriptor], targets: list[Descriptor]) -> tuple[Side, Side, Array]:
    """Pair lists that are alike, in one pass over each pair."""
    native = _compiled()
    n, int64 = sum(map(len, sources)), native.int64
    a, b, lengths = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    counts, at = [], 0
    for source, target in zip(sources, targets, strict=True):
        room = int64(a[at:]), int64(b[at:]), int64(lengths[at:])
        page_nbytes, pages = source.page_nbytes, len(source)
        count = native.lib.nx_pair_pages(*source.places(), *target.places(), pages, page_nbytes, *room)
        if count == pages and len(sources) > 1:
            lengths[at : at + count] = page_nbytes
        counts.append(count)
        at += count
    lengths = sources[0].lengths if len(sources) == 1 and at == n else lengths[:at]
    return _of_regions(sources, a[:at], counts), _of_regions(targets, b[:at], counts), np.ascontiguousarray(lengths)


def _of_regions(descriptors: list[Descriptor], addresses: Array, counts: list[int]) -> Side:
    """Return the side that has `counts[i]` of the addresses in the region of descriptor i."""
    if len(descriptors) == 1:
        return Side(descriptors[0].region.alone, addresses)
    regions: dict[int, int] = {}
    table: list[Region] = []
    positions = []
    for descriptor in descriptors:
        if id(descriptor.region) not in regions:
            regions[id(descriptor.region)] = len(table)
            table.append(descriptor.region)
        positions.append(regions[id(descriptor.region)])
    index = np.repeat(np.array(positions, np.int64), counts) if len(table) > 1 else None
    return Side(tuple(table), addresses, index)


def _side(descriptors: list[Descriptor]) -> tuple[Side, Array]:
    if len(descriptors) == 1:
        only = descriptors[0]
        return Side(only.region.alone, only.addresses), only.lengths
    addresses = np.concatenate([d.addresses for d in descriptors])
    side = _of_regions(descriptors, addresses, [len(d) for d in descriptors])
    return side, np.concatenate([d.lengths for d in descriptors])


def _pair_unequal(a: Side, a_lengths: Array, b: Side, b_lengths: Array) -> tuple[Side, Side, Array]:
    a_ends, b_ends = np.cumsum(a_lengths), np.cumsum(b_lengths)
    ends = np.union1d(a_ends, b_ends)
    ends = ends[ends > 0]
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))[: len(ends)]

    def cut(side: Side, side_ends: Array, lengths: Array) -> Side:
        which = np.searchsorted(side_ends, starts, "right")
        inside = starts - (side_ends[which] - lengths[which])
        chosen = side.choose(which)
        return Side(chosen.regions, chosen.addresses + inside, chosen.index)

    return cut(a, a_ends, a_lengths), cut(b, b_ends, b_lengths), ends - starts


def _coalesce(a: Side, b: Side, lengths: Array, part_ends: Sequence[int]) -> tuple[Side, Side, Array]:
    joined = _continues(a, lengths)
    if not joined.any():
        return a, b, lengths
    joined &= _continues(b, lengths)
    if not joined.any():
        return a, b, lengths
    page_nbytes = int(lengths[0])
    uniform = page_nbytes_of(lengths) > 0 or int(lengths.min()) == int(lengths.max())
    if len(part_ends) > 1:
        inner = np.asarray(part_ends[:-1], np.int64)
        firsts = inner // page_nbytes if uniform else np.searchsorted(np.cumsum(lengths), inner, "left") + 1
        joined[firsts[(firsts > 0) & (firsts < len(lengths))] - 1] = False
    first = np.empty(len(lengths), np.bool_)
    first[0] = True
    np.logical_not(joined, out=first[1:])
    starts = np.flatnonzero(first)
    if uniform:
        merged = np.empty_like(starts)
        np.subtract(starts[1:], starts[:-1], out=merged[:-1])
        merged[-1] = len(lengths) - starts[-1]
        merged *= page_nbytes
    else:
        merged = np.add.reduceat(lengths, starts)
    return a.choose(starts), b.choose(starts), merged


def _continues(side: Side, lengths: Array) -> NDArray[np.bool_]:
    """Tell for each range but the first whether it begins where the one before it ends, in the same region."""
    addresses, last = side.addresses, len(lengths) - 1
    joined = np.empty(last, np.bool_)
    # In blocks: large temporaries go back to the kernel each time and cost more in page faults than in arithmetic.
    for start in range(0, last, 8192):
        stop = min(start + 8192, last)
        gaps = addresses[start + 1 : stop + 1] - addresses[start:stop]
        np.equal(gaps, lengths[start:stop], out=joined[start:stop])
    if side.index is not None:
        joined &= side.index[1:] == side.index[:-1]
    return joined


def _cut_long(a: Side, b: Side, lengths: Array, max_nbytes: int) -> tuple[Side, Side, Array]:
    if int(lengths.max()) <= max_nbytes:
        return a, b, lengths
    counts = -(-lengths // max_nbytes)
    which = np.repeat(np.arange(len(lengths)), counts)
    step = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * max_nbytes
    pieces = np.minimum(lengths[which] - step, max_nbytes)
    a, b = a.choose(which), b.choose(which)
    return Side(a.regions, a.addresses + step, a.index), Side(b.regions, b.addresses + step, b.index), pieces


def _join(sides: list[Side]) -> Side:
    addresses = np.concatenate([s.addresses for s in sides])
    if all(s.regions == sides[0].regions and s.index is None for s in sides):
        return Side(sides[0].regions, addresses)
    table: list[Region] = []
    where: dict[int, int] = {}
    parts = []
    for side in sides:
        mapping = []
        for region in side.regions:
            if id(region) not in where:
                where[id(region)] = len(table)
                table.append(region)
            mapping.append(where[id(region)])
        positions = np.array(mapping, np.int64)
        parts.append(np.full(len(side.addresses), positions[0]) if side.index is None else positions[side.index])
    return Side(tuple(table), addresses, np.concatenate(parts) if len(table) > 1 else None)
