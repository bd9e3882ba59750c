"""A caller's memory seen as blocks: N blocks of equal size, each of one or more ranges of a region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nixl_async.descriptors import Descriptor, MemoryKind, Region
from nixl_async.errors import DescriptorError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nixl_async.descriptors import Array

Memory = Region | Descriptor
"""Where blocks are: a region, or a descriptor such as `region.pages(indices, block_nbytes)`."""


class Blocks:
    """N blocks: block i is the ranges `offsets[i, :]` of `lengths[i, :]` bytes, which make up `block_nbytes` in order."""

    __slots__ = ("block_nbytes", "lengths", "offsets", "region")

    def __init__(self, region: Region, offsets: Array, lengths: Array, block_nbytes: int) -> None:
        self.region = region
        self.offsets, self.lengths = offsets, lengths
        self.block_nbytes = block_nbytes

    @classmethod
    def of(cls, memory: Memory, n_blocks: int, block_nbytes: int) -> Blocks:
        """Cut a caller's memory into blocks: `n_blocks` pages, longer ranges of whole blocks, or equally many pages for each block.

        Raises:
            DescriptorError: it is not `n_blocks * block_nbytes` bytes, or a block would end within a range.
        """
        given = memory[:] if isinstance(memory, Region) else memory
        if not isinstance(given, Descriptor):
            raise TypeError(f"blocks must be a region or a descriptor of one, not {type(given).__name__}")
        if given.nbytes != n_blocks * block_nbytes:
            raise DescriptorError(
                f"{n_blocks} keys of {block_nbytes} bytes each need {n_blocks * block_nbytes} bytes, but {given!r} is given"
            )
        given.region.check_usable()
        offsets, lengths = given.offsets, given.lengths
        if len(offsets) == n_blocks and (not n_blocks or bool((lengths == block_nbytes).all())):
            return cls(given.region, offsets.reshape(-1, 1), lengths.reshape(-1, 1), block_nbytes)
        if not bool((lengths % block_nbytes).any()):
            counts = lengths // block_nbytes
            first = np.repeat(offsets - (np.cumsum(counts) - counts) * block_nbytes, counts)
            starts = first + np.arange(n_blocks) * block_nbytes
            return cls(given.region, starts.reshape(-1, 1), np.full((n_blocks, 1), block_nbytes, np.int64), block_nbytes)
        if n_blocks and len(offsets) % n_blocks == 0:
            pages = lengths.reshape(n_blocks, -1)
            if bool((pages.sum(axis=1) == block_nbytes).all()):
                return cls(given.region, offsets.reshape(pages.shape), pages, block_nbytes)
        raise DescriptorError(
            f"{given!r} does not fall into {n_blocks} blocks of {block_nbytes} bytes: give one page for each key, or equally many"
        )

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def readable(self) -> bool:
        """Whether this process can read the bytes where they are."""
        return self.region.peer is None and self.region.kind is MemoryKind.DRAM

    def take(self, which: ArrayLike) -> Blocks:
        """Return some of the blocks, in the order of `which`."""
        chosen = np.asarray(which, np.int64)
        return Blocks(self.region, self.offsets[chosen], self.lengths[chosen], self.block_nbytes)

    def part(self, start: int, stop: int) -> Blocks:
        """Return the blocks from `start` to `stop`."""
        return Blocks(self.region, self.offsets[start:stop], self.lengths[start:stop], self.block_nbytes)

    def addresses(self) -> Array:
        """Return where the ranges are in this process's memory; for blocks that are `readable`."""
        return np.ascontiguousarray(self.offsets + self.region.address)

    def descriptor(self) -> Descriptor:
        """Describe all blocks in order."""
        if self.offsets.shape[1] == 1:
            return self.region.ranges(self.offsets.ravel(), [self.block_nbytes])
        return self.region.ranges(self.offsets.ravel(), self.lengths.ravel())

    def each(self) -> list[list[Descriptor]]:
        """Describe the blocks one by one."""
        rows = zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)
        region = self.region
        return [[region[at : at + n] for at, n in zip(starts, sizes, strict=True)] for starts, sizes in rows]
