"""How transfers of objects are cut into runs and views, and how many are worked on at once. Nothing here does I/O."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import BackendError, NotFoundError, PartsFailed
from nixl_async.backend import Op, StoreAddress
from nixl_async.descriptors import Plan, Side
from nixl_async.memory import MemoryRegion, open_buffer
from nixl_async.objects import (
    WORK_ON_LOOP_NBYTES,
    ObjectBackend,
    Run,
    cut_runs,
    cut_views,
    gather,
    gather_bounded,
    off_loop,
    slices,
    store_of,
    views,
)
from nixl_async.storage import ObjectRegion
from nixl_async.testing.patterns import pattern

STORE = StoreAddress("s3", "bucket", "prefix/")


async def nothing(region: MemoryRegion) -> None:
    pass


def memory(array: np.ndarray[Any, np.dtype[np.uint8]]) -> MemoryRegion:
    return MemoryRegion("memory", open_buffer(array), nothing)


def plan_of(region: ObjectRegion, pieces: list[tuple[int, int, int]], array: Any = None, *, put: bool = False) -> Plan:
    """Return a plan between memory and pieces of objects: (object, offset, bytes)."""
    lengths = np.array([nbytes for _, _, nbytes in pieces], np.int64)
    near = memory(np.zeros(int(lengths.sum()), np.uint8) if array is None else array)
    local = Side(near.alone, near.address + np.cumsum(lengths) - lengths)
    stored = Side(region.alone, np.array([region.starts[key] + offset for key, offset, _ in pieces], np.int64))
    return (
        Plan(local, stored, lengths, int(lengths.sum()), ()) if put else Plan(stored, local, lengths, int(lengths.sum()), ())
    )


def described(run: Run) -> tuple[str, int, int, int, int, int]:
    return run.key, run.offset, run.nbytes, run.first, run.start, run.stop


def test_runs_are_cut_where_another_object_or_place_begins() -> None:
    region = ObjectRegion(STORE, ["a", "b", "c"], [100, 50, 10])
    plan = plan_of(region, [(0, 0, 10), (0, 10, 20), (0, 40, 5), (1, 0, 50), (2, 0, 10), (0, 99, 1)])
    assert [described(run) for run in cut_runs(plan, False)] == [
        ("a", 0, 30, 0, 0, 2),
        ("a", 40, 5, 30, 2, 3),
        ("b", 0, 50, 35, 3, 4),
        ("c", 0, 10, 85, 4, 5),
        ("a", 99, 1, 95, 5, 6),
    ]
    assert [run.size for run in cut_runs(plan, False)] == [100, 100, 50, 10, 100]
    assert store_of(plan.src, plan.dst) is STORE


def test_runs_of_a_put_are_of_the_destination() -> None:
    region = ObjectRegion(STORE, ["a", "b"], 10)
    plan = plan_of(region, [(1, 0, 5), (1, 5, 5), (0, 0, 10)], put=True)
    assert [described(run) for run in cut_runs(plan, True)] == [("b", 0, 10, 0, 0, 2), ("a", 0, 10, 10, 2, 3)]
    assert store_of(plan.src, plan.dst) is STORE


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=30))
def test_runs_hold_every_byte_once(pieces: list[tuple[int, int, int]]) -> None:
    region = ObjectRegion(STORE, ["a", "b", "c", "d"], 60)
    runs = list(cut_runs(plan_of(region, pieces), False))
    found = [(run.number, run.offset + i) for run in runs for i in range(run.nbytes)]
    assert found == [(key, offset + i) for key, offset, nbytes in pieces for i in range(nbytes)]
    assert [run.first for run in runs] == np.cumsum([0, *(run.nbytes for run in runs)])[:-1].tolist()
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    assert (runs[0].start, runs[-1].stop) == (0, len(pieces))


def test_views_are_of_the_memory_itself_and_neighbours_are_one() -> None:
    array = pattern(1000)
    region = memory(array)
    side = Side(region.alone, region.address + np.array([0, 10, 500, 20, 30], np.int64))
    lengths = np.array([10, 10, 7, 10, 1], np.int64)
    found = views(side, lengths, 0, 5)
    assert [len(one) for one in found] == [20, 7, 11]
    assert b"".join(found) == array[:20].tobytes() + array[500:507].tobytes() + array[20:31].tobytes()
    found[1][0] = array[500] ^ 0xFF
    assert array[500] == found[1][0]
    assert [len(one) for one in views(side, lengths, 2, 3)] == [7]
    assert [len(one) for one in views(side, lengths, 3, 5)] == [11]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 60))
def test_views_are_cut_at_exact_multiples(sizes: list[int], nbytes: int) -> None:
    data = pattern(sum(sizes)).tobytes()
    ends = np.cumsum(sizes)
    pieces = [memoryview(data)[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    found = cut_views(pieces, nbytes)
    assert all(sum(map(len, one)) == nbytes for one in found[:-1])
    assert 0 < sum(map(len, found[-1])) <= nbytes
    assert b"".join(part for one in found for part in one) == data
    assert all(len(part) for one in found for part in one)


# Many at once.


async def test_the_first_error_is_raised_when_all_are_quiet() -> None:
    ended: list[str] = []

    async def failing() -> None:
        await asyncio.sleep(0)
        raise NotFoundError("no such thing")

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("lasting")

    with pytest.raises(NotFoundError, match="no such thing"):
        await gather([lasting(), failing(), lasting()])
    assert ended == ["lasting", "lasting"]
    with pytest.raises(NotFoundError):
        await gather([failing()])
    await gather([])


async def test_no_more_at_once_than_is_allowed() -> None:
    now = most = done = 0

    async def one() -> None:
        nonlocal now, most, done
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        done += 1

    await gather_bounded((one() for _ in range(50)), 7)
    assert (most, done) == (7, 50)


async def test_much_work_leaves_the_loop() -> None:
    here = threading.get_ident()
    assert await off_loop(WORK_ON_LOOP_NBYTES, threading.get_ident) == here
    assert await off_loop(WORK_ON_LOOP_NBYTES + 1, threading.get_ident) != here


async def test_work_on_the_callers_memory_is_waited_for() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        may_end.wait()
        ended.set()

    task = asyncio.create_task(off_loop(1 << 20, work))
    await asyncio.to_thread(began.wait)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_slices_let_the_loop_go_round() -> None:
    rounds = 0
    running = True

    def go_round() -> None:
        nonlocal rounds
        rounds += 1
        if running:
            asyncio.get_running_loop().call_soon(go_round)

    go_round()
    data = pattern(1000).tobytes()
    found = [piece async for piece in slices(data, 64)]
    running = False
    assert b"".join(found) == data
    assert {len(piece) for piece in found[:-1]} == {64}
    assert rounds >= len(found) - 1
    assert [piece async for piece in slices(b"", 64)] == []
    await asyncio.sleep(0)


# The backend.


class Slow(ObjectBackend):
    """Remembers what it is asked for; objects called "bad" do not exist."""

    name = "slow"
    schemes = ("s3",)
    concurrency = 3
    closed = False

    def __init__(self) -> None:
        self.now = self.most = 0
        self.asked: list[tuple[str, str, int]] = []

    def refusal(self, src: Side, dst: Side) -> str | None:
        return super().refusal(src, dst)

    async def get_run(self, run: Run, plan: Plan) -> None:
        await self._move("get", run)

    async def put_run(self, run: Run, plan: Plan) -> None:
        await self._move("put", run)

    async def _move(self, what: str, run: Run) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            self.asked.append((what, run.key, run.nbytes))
            if run.key.startswith("bad"):
                raise NotFoundError(f"{run.key} does not exist")
        finally:
            self.now -= 1


def op_of(plan: Plan, put: bool, reports: list[tuple[int, int, Exception | None]]) -> Op:
    return Op(1, plan, None, put, (), lambda first, nbytes, error: reports.append((first, nbytes, error)))


async def test_what_fails_keeps_nothing_else_from_its_place() -> None:
    backend = Slow()
    region = ObjectRegion(STORE, ["a", "bad1", "b", "bad2", "c"], 10)
    reports: list[tuple[int, int, Exception | None]] = []
    plan = plan_of(region, [(key, 0, 10) for key in range(5)])
    with pytest.raises(PartsFailed, match="2 objects failed, the first of them: bad1"):
        await backend.copy(op_of(plan, False, reports))
    assert sorted(backend.asked) == sorted(("get", key, 10) for key in region.objects)
    assert sorted((first, nbytes, error is None) for first, nbytes, error in reports) == [
        (0, 10, True),
        (10, 10, False),
        (20, 10, True),
        (30, 10, False),
        (40, 10, True),
    ]
    assert backend.most == 3


async def test_a_single_failure_is_raised_as_it_is() -> None:
    region = ObjectRegion(STORE, ["bad"], 10)
    with pytest.raises(NotFoundError, match="bad does not exist"):
        await Slow().copy(op_of(plan_of(region, [(0, 0, 10)], put=True), True, []))


async def test_a_cancelled_copy_is_quiet() -> None:
    backend = Slow()
    region = ObjectRegion(STORE, [f"{i}" for i in range(50)], 10)
    task = asyncio.create_task(backend.copy(op_of(plan_of(region, [(key, 0, 10) for key in range(50)]), False, [])))
    for _ in range(3):
        await asyncio.sleep(0)
    assert backend.now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.now == 0
    assert len(backend.asked) < 50


async def test_a_closed_backend_refuses() -> None:
    backend = Slow()
    backend.closed = True
    region = ObjectRegion(STORE, ["a"], 10)
    with pytest.raises(BackendError, match="the slow backend is closed"):
        await backend.copy(op_of(plan_of(region, [(0, 0, 10)]), False, []))


def test_what_a_backend_of_objects_takes() -> None:
    backend = Slow()
    near = memory(np.zeros(10, np.uint8))
    local = Side(near.alone, np.array([near.address]))
    mine = Side(ObjectRegion(STORE, ["a"], 10).alone, np.array([0]))
    others = Side(ObjectRegion(StoreAddress("az", "box"), ["a"], 10).alone, np.array([0]))
    assert backend.refusal(local, mine) is None
    assert backend.refusal(mine, local) is None
    assert backend.refusal(local, others) == "it serves s3://, not az://"
    assert backend.refusal(local, local) == "it copies between DRAM and objects, not DRAM to DRAM"
    assert backend.refusal(mine, mine) == "it copies between DRAM and objects, not OBJ to OBJ"


def test_coroutines_that_are_never_begun_are_not_made() -> None:
    made: list[Coroutine[Any, Any, None]] = []

    async def one() -> None:
        raise NotFoundError("at once")

    def calls() -> Any:
        for _ in range(100):
            made.append(one())
            yield made[-1]

    async def run() -> None:
        with pytest.raises(NotFoundError):
            await gather_bounded(calls(), 2)

    asyncio.run(run())
    assert len(made) <= 4
