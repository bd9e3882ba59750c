"""What the backends of object stores have in common: cutting a transfer into runs of one object each, and working many at once."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.backend import Limits, Op, StorageBackend, quiesce
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError, TransferError
from nixl_async.http import view
from nixl_async.storage import ObjectRegion, object_parts, raise_failed

if TYPE_CHECKING:
    from nixl_async.backend import StoreAddress
    from nixl_async.descriptors import Array

T = TypeVar("T")

WORK_ON_LOOP_NBYTES = 64 << 10
"""What is hashed or copied at once on the loop, a tenth of a millisecond at most; more goes to a thread."""


@dataclass(slots=True, eq=False)
class Run:
    """Contiguous bytes of one object, from `offset` on: segments `start` to `stop` of a plan, `first` bytes into the op."""

    region: ObjectRegion
    number: int
    start: int
    stop: int
    offset: int
    first: int
    nbytes: int

    @property
    def key(self) -> str:
        """The object's full key."""
        return self.region.objects[self.number]

    @property
    def size(self) -> int:
        """The size that the object is said to have, in bytes."""
        return int(self.region.sizes[self.number])


class ObjectBackend(StorageBackend):
    """A storage backend that moves each run of a transfer by itself, up to `concurrency` at once."""

    kinds = frozenset()
    reports = True
    limits = Limits(max_ops=64, max_nbytes=1 << 62, max_op_nbytes=1 << 62, max_op_segments=1 << 62, batch=False)
    concurrency: int = 64
    closed: bool = True

    @abstractmethod
    async def get_run(self, run: Run, plan: Plan) -> None:
        """Get a run into the plan's destination. Cancelled, it must leave nothing moving."""

    @abstractmethod
    async def put_run(self, run: Run, plan: Plan) -> None:
        """Put a whole object out of the plan's source. Cancelled, it must leave nothing moving."""

    def check_open(self) -> None:
        """Raise when the backend is closed."""
        if self.closed:
            raise BackendError(f"the {self.name} backend is closed", backend=self.name)

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but local DRAM on one side and this store's objects on the other."""
        if {src.kind, dst.kind} != {MemoryKind.DRAM, MemoryKind.OBJECT}:
            return f"it copies between DRAM and objects, not {src.kind.value} to {dst.kind.value}"
        if (peer := src.peer or dst.peer) is not None:
            return f"the memory is peer {peer!r}'s"
        scheme = store_of(src, dst).scheme
        return None if scheme in self.schemes else f"it serves {', '.join(self.schemes)}://, not {scheme}://"

    async def copy(self, op: Op) -> None:
        """Get or put every object, many at once; those that fail do not keep the others from their places."""
        self.check_open()
        put = op.plan.dst.kind is MemoryKind.OBJECT
        move = self.put_run if put else self.get_run
        runs = cut_runs(op.plan, put)
        failed: list[tuple[int, TransferError]] = []

        async def worker() -> None:
            for run in runs:
                try:
                    await move(run, op.plan)
                except TransferError as error:
                    failed.append((run.first, error))
                    op.report(run.first, run.nbytes, error)
                else:
                    op.report(run.first, run.nbytes, None)

        await gather(worker() for _ in range(min(self.concurrency, len(op.plan.lengths))))
        raise_failed(failed, op)


def store_of(src: Side, dst: Side) -> StoreAddress:
    """Return the store of the side that is objects."""
    region = (src if src.kind is MemoryKind.OBJECT else dst).regions[0]
    assert isinstance(region, ObjectRegion)
    return region.store


def cut_runs(plan: Plan, put: bool) -> Iterator[Run]:
    """Cut a plan where another object, or another place in one, begins."""
    first = 0
    ends = np.cumsum(plan.lengths)
    for region, number, start, stop, offset in object_parts(plan.dst if put else plan.src, plan.lengths):
        end = int(ends[stop - 1])
        yield Run(region, number, start, stop, offset, first, end - first)
        first = end


def views(side: Side, lengths: Array, start: int, stop: int) -> list[memoryview]:
    """Return the local memory of segments `start` to `stop`; neighbours become one view."""
    if stop - start == 1:
        return [view(int(side.addresses[start]), int(lengths[start]))]
    found = []
    address = nbytes = 0
    for at, length in zip(side.addresses[start:stop].tolist(), lengths[start:stop].tolist(), strict=True):
        if at == address + nbytes:
            nbytes += length
            continue
        if nbytes:
            found.append(view(address, nbytes))
        address, nbytes = at, length
    found.append(view(address, nbytes))
    return found


def cut_views(pieces: Sequence[memoryview], nbytes: int) -> list[list[memoryview]]:
    """Cut views into lists of `nbytes` bytes each; the last may have fewer."""
    found: list[list[memoryview]] = [[]]
    room = nbytes
    for piece in pieces:
        left = piece
        while len(left):
            if room == 0:
                found.append([])
                room = nbytes
            found[-1].append(left[:room])
            taken = min(room, len(left))
            left = left[taken:]
            room -= taken
    return found


async def gather(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all; raise the first error bare, when all the others are quiet."""
    waiting = list(calls)
    if len(waiting) == 1:
        await waiting[0]
        return
    try:
        async with asyncio.TaskGroup() as group:
            for call in waiting:
                group.create_task(call)
    except* TransferError as errors:
        failed: BaseException = errors
        while isinstance(failed, BaseExceptionGroup):
            failed = failed.exceptions[0]
        raise failed from None


async def gather_bounded(calls: Iterator[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Await all, `at_once` at the same time; raise the first error."""

    async def worker() -> None:
        for call in calls:
            await call

    await gather(worker() for _ in range(at_once))


async def off_loop(nbytes: int, work: Callable[..., T], *arguments: Any) -> T:
    """Do work on `nbytes` bytes, on a thread if they are many; wait for it even if cancelled: it uses the caller's memory."""
    if nbytes <= WORK_ON_LOOP_NBYTES:
        return work(*arguments)
    return await quiesce(asyncio.get_running_loop().run_in_executor(None, work, *arguments))


async def slices(data: bytes, nbytes: int) -> AsyncIterator[bytes]:
    """Iterate over pieces of `nbytes` bytes, each in an iteration of the loop of its own."""
    for at in range(0, len(data), nbytes):
        if at:
            await asyncio.sleep(0)
        yield data[at : at + nbytes]
