"""One transfer on its way through staging: cut, filled from one backend and emptied by another, objects written whole."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.arena import PAGE_NBYTES, Arena
from nixl_async.backend import Backend, Op, StorageBackend, Upload, quiesce
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError, TransferError
from nixl_async.objects import gather
from nixl_async.storage import ObjectRegion, object_parts, raise_failed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from nixl_async.descriptors import Array

logger = logging.getLogger("nixl_async.staging")

LEAST_PIECE_NBYTES = 1 << 20
"""Transfers of a few mebibytes are cut too, so that their halves overlap; smaller pieces would cost more than that gains."""
LEAST_MEMORY_PIECE_NBYTES = 8 << 20
"""Between memories: a mebibyte is on its way for a tenth of a millisecond there, and costs the loop three times as much."""
RETRIES = 3
RETRY_SECONDS = 0.02


@dataclass(slots=True, eq=False)
class _Whole:
    """An object that is written by an upload: `in_flight` pieces are on their way, no more follow once it is `complete`.

    `untold` are the pieces, as (first byte, bytes), whose outcome is that of the object.
    """

    upload: Upload
    first: int
    in_flight: int = 0
    complete: bool = False
    error: TransferError | None = None
    untold: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Piece:
    """Some segments of an op, `first` bytes into it; piece `number` of an upload."""

    plan: Plan
    first: int
    whole: _Whole | None = None
    number: int = 0


Errors = dict[int, TransferError]
"""What failed of a plan, by segment."""


class Relay:
    """One op on its way through the arena. A few lanes take pieces in turn; each fills a stretch, then empties it."""

    def __init__(
        self, op: Op, first: Backend, second: Backend, arena: Arena, buffer_nbytes: int, n_lanes: int, op_ids: Iterator[int]
    ) -> None:
        self._op, self._first, self._second = op, first, second
        self._arena, self._buffer_nbytes, self._n_lanes, self._op_ids = arena, buffer_nbytes, n_lanes, op_ids
        storage = {op.plan.src.kind, op.plan.dst.kind} & {MemoryKind.FILE, MemoryKind.OBJECT}
        least = LEAST_PIECE_NBYTES if storage else LEAST_MEMORY_PIECE_NBYTES
        step = min(buffer_nbytes, max(least, op.nbytes // (2 * n_lanes)))
        self._piece_nbytes = max(PAGE_NBYTES, step // PAGE_NBYTES * PAGE_NBYTES)
        self._turn = asyncio.Lock()
        self._uploads: set[_Whole] = set()
        self._failed: list[tuple[int, TransferError]] = []

    async def run(self) -> None:
        """Move everything.

        Raises:
            TransferError: what is not an object failed; nothing moves any more.
            PartsFailed: objects failed, and the others are in place.
        """
        try:
            # A generator that nobody closes is closed by the loop, by a task that nobody waits for.
            async with aclosing(self._pieces()) as pieces:
                await gather(self._lane(pieces) for _ in range(self._n_lanes))
        finally:
            if self._uploads:
                await quiesce(asyncio.ensure_future(self._abort(list(self._uploads))))
        raise_failed(self._failed, self._op)

    async def _lane(self, pieces: AsyncIterator[_Piece]) -> None:
        while True:
            async with self._turn:
                piece = await anext(pieces, None)
            if piece is None:
                return
            await self._move(piece)

    # Cutting.

    async def _pieces(self) -> AsyncGenerator[_Piece, None]:
        plan = self._op.plan
        if plan.dst.kind is not MemoryKind.OBJECT:
            first = 0
            for part in plan.split(self._piece_nbytes, 1 << 62):
                yield _Piece(part, first)
                first += part.nbytes
            return
        # Small objects, one behind the other: segments from `start` on, `held` bytes, `first` bytes into the op.
        start = held = first = at = 0
        ends = np.cumsum(plan.lengths)
        for region, key, begin, stop, _ in object_parts(plan.dst, plan.lengths):
            nbytes = int(ends[stop - 1]) - at
            if held and held + nbytes > self._piece_nbytes:
                yield _Piece(_cut(plan, start, begin), first)
                held = 0
            if nbytes > self._buffer_nbytes:
                async with aclosing(self._upload(_cut(plan, begin, stop), at, region, key)) as large:
                    async for piece in large:
                        yield piece
            else:
                if not held:
                    start, first = begin, at
                held += nbytes
            at += nbytes
        if held:
            yield _Piece(_cut(plan, start, len(plan.lengths)), first)

    async def _upload(self, plan: Plan, first: int, region: ObjectRegion, key: int) -> AsyncGenerator[_Piece, None]:
        whole = await self._begin(plan, first, region, key)
        if whole is None:
            return
        parts = _even(plan, whole.upload.piece_nbytes)
        at = first
        for number, part in enumerate(parts):
            whole.in_flight += 1
            whole.complete = at + part.nbytes == first + plan.nbytes
            yield _Piece(part, at, whole, number)
            at += part.nbytes
            if whole.error is not None and not whole.complete:
                whole.complete = True
                whole.untold.append((at, first + plan.nbytes - at))
                if not whole.in_flight:
                    await self._end(whole)
                return

    async def _begin(self, plan: Plan, first: int, region: ObjectRegion, key: int) -> _Whole | None:
        assert isinstance(self._second, StorageBackend)
        # Not cancelled: it could leave an upload behind that nobody knows.
        beginning = asyncio.ensure_future(
            self._second.upload(
                region.store,
                region.objects[key],
                plan.nbytes,
                if_none_match=region.if_none_match,
                max_piece_nbytes=self._buffer_nbytes,
            )
        )
        try:
            await quiesce(beginning)
        except TransferError as error:
            self._tell(first, np.array([plan.nbytes]), {0: error})
            return None
        finally:
            if not beginning.cancelled() and beginning.exception() is None:
                whole = _Whole(beginning.result(), first)
                self._uploads.add(whole)
        if whole.upload.piece_nbytes > self._buffer_nbytes:
            whole.complete = True
            whole.untold.append((first, plan.nbytes))
            whole.error = BackendError(
                f"object {region.objects[key]!r} needs pieces of {whole.upload.piece_nbytes} bytes, but buffers have"
                f" {self._buffer_nbytes}; give the agent StagingBackend(buffer_nbytes=…) with more",
                backend="staging",
            )
            await self._end(whole)
            return None
        return whole

    # Moving.

    async def _move(self, piece: _Piece) -> None:
        plan, whole = piece.plan, piece.whole
        async with self._arena.lend(plan.nbytes) as address:
            stage = Side(self._arena.region.alone, address + np.cumsum(plan.lengths) - plan.lengths)
            errors = await self._half(self._first, Plan(plan.src, stage, plan.lengths, plan.nbytes, ()))
            if whole is None:
                await self._write(plan, stage, errors)
            else:
                whole.error = whole.error or next(iter(errors.values()), None)
                if whole.error is None:
                    try:
                        await whole.upload.put(piece.number, stage, plan.lengths)
                    except TransferError as error:
                        whole.error = whole.error or error
        if whole is None:
            self._tell(piece.first, plan.lengths, errors)
            return
        whole.in_flight -= 1
        if whole.error is None and not (whole.complete and whole.in_flight == 0):
            self._op.report(piece.first, plan.nbytes, None)
            return
        whole.untold.append((piece.first, plan.nbytes))
        if whole.complete and whole.in_flight == 0:
            await self._end(whole)

    async def _write(self, plan: Plan, stage: Side, errors: Errors) -> None:
        """Empty a stretch; what could not be read, and the objects that it belongs to, is left out."""
        if not errors:
            errors.update(await self._half(self._second, Plan(stage, plan.dst, plan.lengths, plan.nbytes, ())))
            return
        if plan.dst.kind is MemoryKind.OBJECT:
            for _, _, start, stop, _ in object_parts(plan.dst, plan.lengths):
                if (error := next((errors[i] for i in range(start, stop) if i in errors), None)) is not None:
                    errors.update(dict.fromkeys(range(start, stop), error))
        kept = np.array([i for i in range(len(plan.lengths)) if i not in errors], np.int64)
        if len(kept):
            lengths = plan.lengths[kept]
            left = Plan(stage.choose(kept), plan.dst.choose(kept), lengths, int(lengths.sum()), ())
            found = await self._half(self._second, left)
            errors.update({int(kept[i]): error for i, error in found.items()})

    async def _half(self, backend: Backend, plan: Plan) -> Errors:
        """Copy between a stretch and a side; return what failed of objects.

        Raises:
            TransferError: what is not an object failed.
        """
        peer = plan.src.peer or plan.dst.peer
        if MemoryKind.OBJECT not in (plan.src.kind, plan.dst.kind):
            limits = backend.limits
            for part in plan.split(limits.max_op_nbytes, limits.max_op_segments):
                await self._insist(backend, Op(next(self._op_ids), part, peer, part.dst.peer is not None))
            return {}
        told: list[tuple[int, int, TransferError | None]] = []
        op = Op(next(self._op_ids), plan, peer, False, report=lambda start, nbytes, error: told.append((start, nbytes, error)))
        try:
            await backend.copy(op)
        except TransferError as error:
            return _by_segment(plan.lengths, told, error)
        return {}

    async def _insist(self, backend: Backend, op: Op) -> None:
        for attempt in range(RETRIES + 1):
            try:
                await backend.copy(op)
                return
            except TransferError as error:
                if not error.retryable or attempt == RETRIES:
                    raise
                await asyncio.sleep(RETRY_SECONDS * 2**attempt)

    async def _end(self, whole: _Whole) -> None:
        """Finish an upload of which nothing is on its way any more, or abort it."""
        if whole.error is None:
            try:
                await whole.upload.finish()
            except TransferError as error:
                whole.error = error
        if whole.error is not None:
            await quiesce(asyncio.ensure_future(self._abort([whole])))
            self._failed.append((whole.first, whole.error))
        self._uploads.discard(whole)
        for first, nbytes in whole.untold:
            self._op.report(first, nbytes, whole.error)

    async def _abort(self, uploads: list[_Whole]) -> None:
        for whole in uploads:
            try:
                await whole.upload.abort()
            except TransferError as error:
                logger.warning("an unfinished upload could not be aborted: %s", error)
            self._uploads.discard(whole)

    def _tell(self, first: int, lengths: Array, errors: Errors) -> None:
        """Report segments that begin `first` bytes into the op, together those with one outcome."""
        start = 0
        ends = np.cumsum(lengths).tolist()
        for cut in [i for i in range(1, len(ends)) if errors and errors.get(i) is not errors.get(i - 1)] + [len(ends)]:
            begin = ends[start - 1] if start else 0
            error = errors.get(start)
            if error is not None:
                self._failed.append((first + begin, error))
            self._op.report(first + begin, ends[cut - 1] - begin, error)
            start = cut


def _by_segment(lengths: Array, told: list[tuple[int, int, TransferError | None]], otherwise: TransferError) -> Errors:
    """Return what failed: what was told so, and what nothing was told of."""
    ends = np.cumsum(lengths)
    errors = dict.fromkeys(range(len(lengths)), otherwise)
    for start, nbytes, error in told:
        covered = range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, start + nbytes, "left")) + 1)
        for segment in covered:
            if error is None:
                errors.pop(segment, None)
            else:
                errors[segment] = error
    return errors


def _cut(plan: Plan, start: int, stop: int) -> Plan:
    lengths = plan.lengths[start:stop]
    return Plan(plan.src.take(start, stop), plan.dst.take(start, stop), lengths, int(lengths.sum()), ())


def _even(plan: Plan, nbytes: int) -> Iterator[Plan]:
    """Cut at exact multiples of `nbytes`, within segments too."""
    cuts = np.arange(nbytes, plan.nbytes, nbytes)
    old_ends = np.cumsum(plan.lengths)
    ends = np.union1d(old_ends, cuts)
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    which = np.searchsorted(old_ends, starts, "right")
    inside = starts - (old_ends[which] - plan.lengths[which])

    def side(one: Side) -> Side:
        chosen = one.choose(which)
        return Side(chosen.regions, chosen.addresses + inside, chosen.index)

    fine = Plan(side(plan.src), side(plan.dst), ends - starts, plan.nbytes, ())
    start = 0
    for stop in [*np.searchsorted(ends, cuts, "left").tolist(), len(ends) - 1]:
        yield _cut(fine, start, stop + 1)
        start = stop + 1
