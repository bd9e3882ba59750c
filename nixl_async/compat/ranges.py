"""Which registration holds which place: sorted arrays, asked for many places at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.compat.enums import nixl_mem_t

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

_NO_DEVICE = -1
_LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Range:
    """Registered memory: what holds it is `region`, an object of the owner's choice."""

    memory: nixl_mem_t
    device: int
    address: int
    nbytes: int
    region: Any


@dataclass(frozen=True, slots=True)
class Found:
    """The regions that hold N places: `regions[index[i]]` holds place i; without an index, `regions[0]` holds all."""

    regions: tuple[Any, ...]
    index: Array | None


class Group:
    """Registrations of one memory: `starts` and `ends`, in the order of the starts, and `regions`."""

    def __init__(self, ranges: list[Range]) -> None:
        ranges = sorted(ranges, key=lambda one: (one.address, one.nbytes))
        self.starts = np.array([one.address for one in ranges], np.int64)
        self.ends = np.array([min(one.address + one.nbytes, _LARGEST) for one in ranges], np.int64)
        self.regions = tuple(one.region for one in ranges)

    def find(self, addresses: Array, lengths: Array) -> Array | None:
        """Return the position of a registration that holds each place, `None` if one place lies in none."""
        if len(self.regions) == 1:
            inside = (addresses >= self.starts[0]) & (addresses <= self.ends[0]) & (lengths <= self.ends[0] - addresses)
            return np.zeros(len(addresses), np.int64) if bool(inside.all()) else None
        at = np.searchsorted(self.starts, addresses, "right") - 1
        if len(at) and int(at.min()) < 0:
            return None
        room = self.ends[at] - addresses
        short = np.flatnonzero((room < 0) | (lengths > room))
        # A range that begins later may end sooner, where registrations overlap.
        for i in short.tolist():
            k = int(at[i]) - 1
            while k >= 0 and not (self.ends[k] >= addresses[i] and lengths[i] <= self.ends[k] - addresses[i]):
                k -= 1
            if k < 0:
                return None
            at[i] = k
        return at


class Ranges:
    """The registrations of one owner. Unchanging: another is made when something is added or taken away."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self.all = tuple(ranges)
        groups: dict[tuple[nixl_mem_t, int], list[Range]] = {}
        for one in self.all:
            groups.setdefault((one.memory, _device(one.memory, one.device)), []).append(one)
        self._groups = {key: Group(found) for key, found in groups.items()}

    def of(self, memory: nixl_mem_t, device: int) -> Group | None:
        """Return what is registered of that memory of a device."""
        return self._groups.get((memory, _device(memory, device)))

    def find(self, memory: nixl_mem_t, addresses: Array, lengths: Array, devices: Array) -> Found | None:
        """Find a region for each place, `None` if one of them lies in no single registration."""
        if not len(addresses):
            return None
        if memory is nixl_mem_t.DRAM_SEG or bool((devices == devices[0]).all()):
            group = self._groups.get((memory, _device(memory, int(devices[0]))))
            at = None if group is None else group.find(addresses, lengths)
            if group is None or at is None:
                return None
            return Found(group.regions, None) if len(group.regions) == 1 else compact(group.regions, at)
        regions: list[Any] = []
        index = np.empty(len(addresses), np.int64)
        order = np.argsort(devices, kind="stable")
        cuts = np.flatnonzero(np.diff(devices[order])) + 1
        for mine in np.split(order, cuts):
            group = self._groups.get((memory, int(devices[mine[0]])))
            at = None if group is None else group.find(addresses[mine], lengths[mine])
            if group is None or at is None:
                return None
            index[mine] = at + len(regions)
            regions.extend(group.regions)
        return compact(tuple(regions), index)


def _device(memory: nixl_mem_t, device: int) -> int:
    # An address of main memory means the same whatever number a program gave it.
    return _NO_DEVICE if memory is nixl_mem_t.DRAM_SEG else device


def compact(regions: tuple[Any, ...], index: Array) -> Found:
    """Leave out the regions that no place is in."""
    used, inverse = np.unique(index, return_inverse=True)
    if len(used) == 1:
        return Found((regions[int(used[0])],), None)
    return Found(tuple(regions[i] for i in used.tolist()), np.ascontiguousarray(inverse.reshape(-1), np.int64))
