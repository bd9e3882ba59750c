"""Blocks between slots of files and memory, with their checksums: in one go through the page cache, else by the agent and then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.errors import TransferError
from nixl_async.fileio import SummedBlocks
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import CRC64NVME, key_sums, new_turn
from nixl_async.tiers.context import Context, together
from nixl_async.tiers.segments import Segments
from nixl_async.tiers.tier import Failures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array

T = TypeVar("T")


class CheckedMoves:
    """Moves blocks to and from `segments`. `cached`: they are used through the page cache.

    Memory is slower than summing up: what is copied and summed up piece by piece goes through the processor's cache once. What
    cannot be moved so, because it is not cached or meets an error, the agent moves, and tells the error.
    """

    def __init__(self, context: Context, segments: Segments, *, cached: bool) -> None:
        self._context, self._segments, self._cached = context, segments, cached
        self._turn = new_turn()

    async def read(
        self,
        keys: list[bytes],
        slots: Array,
        target: Blocks,
        sums: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        look: Callable[[], T],
        peek: Callable[[], T | None] = lambda: None,
    ) -> tuple[Failures, NDArray[np.bool_], T]:
        """Read slots in ascending order; return errors, which have the checksums they should have, and what `look()` said then.

        `look` runs on a thread; `peek` spares that if it knows the answer at once.
        """
        summed = None
        # What may not be written is left to the agent to refuse.
        if self._cached and self._context.verify and not target.region.readonly and bool((kinds == CRC64NVME).all()):
            summed = await self._summed(keys, slots, target)
            if summed is not None and summed.moved.all():
                seen = peek()
                return [None] * len(keys), summed.sums == sums, await self._context.on_thread(look) if seen is None else seen
        return await self._read_rest(keys, slots, target, sums, kinds, look, summed)

    async def _read_rest(
        self,
        keys: list[bytes],
        slots: Array,
        target: Blocks,
        sums: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        look: Callable[[], T],
        move: SummedBlocks | None,
    ) -> tuple[Failures, NDArray[np.bool_], T]:
        rest = np.arange(len(keys)) if move is None else np.flatnonzero(~move.moved)
        errors: Failures = [None] * len(keys)
        good = np.ones(len(keys), np.bool_) if move is None else move.sums == sums
        mine, to = (keys, target) if len(rest) == len(keys) else ([keys[at] for at in rest.tolist()], target.take(rest))
        failed = await self._segments.move(slots[rest], to, put=False)
        good[rest], seen = await self._context.verified_then(mine, to, sums[rest], kinds[rest], failed, look)
        for at, error in zip(rest.tolist(), failed, strict=True):
            errors[at] = error
        return errors, good, seen

    async def write(self, keys: list[bytes], slots: Array, source: Blocks) -> tuple[Failures, NDArray[np.uint64]]:
        """Write slots in ascending order; return errors and checksums."""
        kind = self._context.kind
        move = None
        if self._cached and kind == CRC64NVME:
            move = await self._summed(keys, slots, source, self._turn)
        if move is None:
            return await together(self._segments.move(slots, source, put=True), self._context.checksums(kind, keys, source))
        errors: Failures = [None] * len(keys)
        rest = np.flatnonzero(~move.moved)
        if len(rest):
            mine, left = [keys[at] for at in rest.tolist()], source.take(rest)
            moving = self._segments.move(slots[rest], left, put=True)
            failed, move.sums[rest] = await together(moving, self._context.checksums(kind, mine, left))
            for at, error in zip(rest.tolist(), failed, strict=True):
                errors[at] = error
        return errors, move.sums

    async def _summed(self, keys: list[bytes], slots: Array, blocks: Blocks, turn: Any = None) -> SummedBlocks | None:
        region = blocks.region
        region.check_usable()
        region.hold()
        try:
            async with self._segments.files(slots) as (fds, offsets):
                lengths = np.ascontiguousarray(blocks.lengths)
                moved = np.zeros(len(keys), np.bool_)
                move = SummedBlocks(fds, offsets, blocks.addresses(), lengths, key_sums(keys), moved)
                await self._context.summed(move, turn)
                return move
        except TransferError:
            # A segment that cannot be opened; the agent's way meets that again, block by block.
            return None
        finally:
            region.release()
