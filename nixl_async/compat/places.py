"""One side of transfers as NIXL's callers give it: a list of places, or runs of them with a stride, which are never expanded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.compat.enums import nixl_mem_t
from nixl_async.compat.errors import nixlInvalidParamError, nixlNotFoundError, refusal
from nixl_async.compat.lists import nixlXferDList
from nixl_async.compat.ranges import Found, Ranges, compact
from nixl_async.descriptors import Plan, Side
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from nixl_async.descriptors import Array


@dataclass(slots=True, eq=False)
class Places:
    """N places, or N runs of places: `counts[i]` of them, `strides[i]` bytes apart. `held`: which regions hold them, by backend."""

    memory: nixl_mem_t
    addresses: Array
    lengths: Array
    devices: Array
    strides: Array | None = None
    counts: Array | None = None
    ends: Array | None = None
    """How many places there are up to the end of each run."""
    remote: Any = None
    """The remote agent that they are of; `None` for this agent's own."""
    target: bool = False
    """Whether they are the remote side of transfers: a remote agent's, or this one's own for a loopback."""
    held: dict[int, Found] = field(default_factory=dict)
    n: int = 0
    _native: Any = None

    @property
    def native(self) -> Any:
        """The places as `nx_pair` takes them."""
        if self._native is None:
            strides = ffi.NULL if self.strides is None else int64(self.strides)
            ends = ffi.NULL if self.ends is None else int64(self.ends)
            columns = int64(self.addresses), int64(self.lengths), strides, ends
            # What it points to must live as long as it does.
            self._native = ffi.new("nx_places *", (*columns, len(self.lengths), self.n)), columns
        return self._native[0]

    def find(self, ranges: Ranges) -> Found | None:
        """Find which registrations hold the places; a run must lie in one."""
        lengths = self.lengths
        if self.strides is not None and self.counts is not None:
            if not len(lengths) or int(self.counts.min()) <= 0 or bool((self.strides < lengths).any()):
                return None
            if int(self.counts.max()) > (1 << 62) // max(1, int(self.strides.max())):
                return None
            lengths = (self.counts - 1) * self.strides + lengths
        return ranges.find(self.memory, self.addresses, lengths, self.devices)

    def choose(self, indices: Array, found: Found) -> tuple[Side, Array]:
        """Return the chosen places, which must exist, and their lengths."""
        which = indices
        if self.strides is None or self.ends is None:
            addresses = self.addresses[indices]
        elif len(self.ends) == 1:
            addresses = indices.astype(np.int64)
            addresses *= self.strides[0]
            addresses += self.addresses[0]
            which = np.zeros(len(indices), np.int64)
        else:
            which = np.searchsorted(self.ends, indices, "right")
            first = np.concatenate((np.zeros(1, np.int64), self.ends[:-1]))
            addresses = self.addresses[which] + (indices - first[which]) * self.strides[which]
        if found.index is not None:
            # Only those that are used may have been deregistered since.
            found = compact(found.regions, found.index[which])
        side = Side(found.regions, addresses, found.index)
        return side, self.lengths[which]


def from_list(descs: nixlXferDList) -> Places:
    """Take a descriptor list."""
    rows = _signed(descs.rows)
    columns = np.array(rows.T, order="C")
    return Places(descs.getType(), columns[0], columns[1], columns[2], n=len(rows))


def from_runs(memory: nixl_mem_t, runs: Any) -> Places:
    """Take an Nx5 array of (address, length, device, stride, count).

    Raises:
        ValueError: it is none.
    """
    if not isinstance(runs, np.ndarray) or runs.ndim != 2 or runs.shape[1] != 5 or runs.dtype not in (np.uint64, np.int64):
        what = f"{runs.dtype} of shape {runs.shape}" if isinstance(runs, np.ndarray) else type(runs).__name__
        raise ValueError(f"descs must be a Nx5 numpy array of uint64 or int64, not {what}")
    columns = np.array(_signed(runs).T, order="C")
    ends = np.cumsum(columns[4])
    n = int(ends[-1]) if len(ends) else 0
    addresses, lengths, devices, strides, counts = columns
    return Places(memory, addresses, lengths, devices, strides, counts, ends, n=n)


def _signed(rows: Any) -> Array:
    # What is more than any registration has is negative so.
    signed: Array = rows.view(np.int64)
    if len(signed) and int(np.minimum.reduce(signed, None)) < 0:
        raise refusal(nixlNotFoundError, "a number of a descriptor is negative, or more than any registration has")
    return signed


def read_indices(side: str, indices: Any) -> Array:
    """Read a list or array of indices: one dimension, contiguous, int32 or int64."""
    chosen = indices if type(indices) is np.ndarray else np.asarray(list(indices) if isinstance(indices, range) else indices)
    if chosen.ndim != 1:
        raise ValueError(f"indices numpy array must be 1D, not of shape {chosen.shape}")
    if chosen.dtype.kind not in "iu":
        if len(chosen) and not isinstance(indices, np.ndarray):
            raise RuntimeError(f"{side} indices must be integers, not {chosen.dtype}")
        chosen = chosen.astype(np.int64)
    if chosen.dtype not in (np.int64, np.int32):
        chosen = chosen.astype(np.int64)
    return chosen if chosen.flags.c_contiguous else np.ascontiguousarray(chosen)


_ADDRESS = {-1: "local", -2: "remote"}


def pair(near: Places, mine: Array | None, held: Found, far: Places, theirs: Array | None, held_far: Found) -> Plan:
    """Plan to write chosen places of one side (all of them, without indices) to as many of the other; neighbours are joined.

    Raises:
        nixlInvalidParamError: an index is out of range, or two places are not of the same length.
    """
    n = near.n if mine is None else len(mine)
    out = np.empty(5 * n + 1, np.int64)
    count = lib.nx_pair(
        near.native,
        ffi.NULL if mine is None else ffi.from_buffer(mine),
        ffi.NULL if held.index is None else int64(held.index),
        far.native,
        ffi.NULL if theirs is None else ffi.from_buffer(theirs),
        ffi.NULL if held_far.index is None else int64(held_far.index),
        0 if mine is None else mine.itemsize,
        0 if theirs is None else theirs.itemsize,
        n,
        int64(out),
    )
    if count < 0:
        raise _mismatch(count, int(out[0]), near, mine, far, theirs)
    nbytes = int(out[5 * n])
    regions, regions_far = held, held_far
    # Only those that are used may have been deregistered since.
    if held.index is not None:
        regions = compact(held.regions, out[3 * n : 3 * n + count])
    if held_far.index is not None:
        regions_far = compact(held_far.regions, out[4 * n : 4 * n + count])
    return Plan(
        Side(regions.regions, out[:count], regions.index),
        Side(regions_far.regions, out[n : n + count], regions_far.index),
        out[2 * n : 2 * n + count],
        nbytes,
        (nbytes,),
    )


def _mismatch(status: int, at: int, near: Places, mine: Array | None, far: Places, theirs: Array | None) -> Exception:
    if status == -3:
        return refusal(nixlInvalidParamError, f"the two places of pair {at} are not of the same length")
    places, chosen = (near, mine) if status == -1 else (far, theirs)
    index = at if chosen is None else int(chosen[at])
    return refusal(nixlInvalidParamError, f"{_ADDRESS[status]} index {index} is out of range: there are {places.n} places")
