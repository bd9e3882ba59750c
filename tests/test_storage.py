"""Regions of files and objects: where their bytes are, what may be written, and what is refused before anything moves."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import (
    ClosedError,
    ConfigurationError,
    DescriptorError,
    FileRegion,
    MemoryKind,
    NotFoundError,
    ObjectRegion,
    Op,
)
from nixl_async.backend import StoreAddress
from nixl_async.descriptors import Descriptor, make_plan
from nixl_async.errors import BackendError, PartsFailed, TransferError
from nixl_async.memory import MemoryRegion, open_buffer
from nixl_async.storage import UNSIZED_NBYTES, object_parts, parse_store, raise_failed

STORE = StoreAddress("s3", "bucket", "prefix/")
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=8)


def objects(sizes: list[int] | int | None, n: int | None = None, **options: Any) -> ObjectRegion:
    count = n if n is not None else (len(sizes) if isinstance(sizes, list) else 1)
    return ObjectRegion(STORE, [f"k{i}" for i in range(count)], sizes, **options)


async def _closed(region: MemoryRegion) -> None:
    pass


def memory(nbytes: int) -> MemoryRegion:
    return MemoryRegion("memory", open_buffer(np.zeros(nbytes, np.uint8)), _closed)


# Against plain models.


@given(sizes=SIZES, data=st.data())
def test_an_address_is_in_the_object_that_the_plain_model_says(sizes: list[int], data: st.DataObject) -> None:
    region = objects(sizes)
    model = [(number, inside) for number, size in enumerate(sizes) for inside in range(size + 1)]
    assert region.nbytes == len(model) - 1
    wanted = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=30))
    which, inside = region.locate(np.array(wanted, np.int64))
    assert list(zip(which.tolist(), inside.tolist(), strict=True)) == [model[address] for address in wanted]


@st.composite
def written(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Draw sizes of objects, and ranges (object, offset, bytes) to be written: whole objects in pieces, often with a fault."""
    sizes = draw(SIZES)
    ranges = []
    for number in draw(st.permutations(range(len(sizes))))[: draw(st.integers(1, len(sizes)))]:
        edges = sorted({0, sizes[number], *draw(st.lists(st.integers(0, sizes[number]), max_size=3))})
        ranges += [(number, start, stop - start) for start, stop in itertools.pairwise(edges)]
    fault = draw(st.sampled_from(["none", "drop", "swap", "repeat", "shift"]))
    at = draw(st.integers(0, len(ranges) - 1))
    if fault == "drop" and len(ranges) > 1:
        del ranges[at]
    elif fault == "swap":
        other = draw(st.integers(0, len(ranges) - 1))
        ranges[at], ranges[other] = ranges[other], ranges[at]
    elif fault == "repeat":
        ranges.append(ranges[at])
    elif fault == "shift" and ranges[at][2] > 1:
        number, offset, nbytes = ranges[at]
        ranges[at] = (number, offset + 1, nbytes - 1)
    return sizes, ranges


def may_be_written(sizes: list[int], ranges: list[tuple[int, int, int]]) -> bool:
    done = []
    while ranges:
        number, at = ranges[0][0], 0
        while ranges and ranges[0][:2] == (number, at):
            at += ranges.pop(0)[2]
        if at != sizes[number] or number in done:
            return False
        done.append(number)
    return True


@given(written())
def test_only_whole_objects_each_once_may_be_written(drawn: tuple[list[int], list[tuple[int, int, int]]]) -> None:
    sizes, ranges = drawn
    region = objects(sizes)
    numbers, offsets, lengths = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    target = region.select(numbers, offsets, lengths)
    source = memory(target.nbytes)
    if may_be_written(sizes, list(ranges)):
        assert make_plan(source, target).nbytes == target.nbytes
    else:
        with pytest.raises(DescriptorError):
            make_plan(source, target)


@given(sizes=SIZES, data=st.data())
def test_a_side_is_cut_into_runs_of_one_object(sizes: list[int], data: st.DataObject) -> None:
    ranges = []
    for _ in range(data.draw(st.integers(1, 20))):
        number = data.draw(st.integers(0, len(sizes) - 1))
        start = data.draw(st.integers(0, sizes[number] - 1))
        ranges.append((number, start, data.draw(st.integers(1, sizes[number] - start))))
    region, extra = objects(sizes), objects([100], n=1)
    numbers, offsets, lengths = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    sides: list[Descriptor] = [region.select(numbers, offsets, lengths)]
    expected: list[tuple[int, int, int]] = []
    for number, start, nbytes in ranges:
        if expected and expected[-1][0] == number and expected[-1][1] + expected[-1][2] == start:
            expected[-1] = (number, expected[-1][1], expected[-1][2] + nbytes)
        else:
            expected.append((number, start, nbytes))
    if data.draw(st.booleans()):
        sides.append(extra[5:25])
        expected.append((-1, 5, 20))
    plan = make_plan(sides, memory(sum(side.nbytes for side in sides)))
    found = []
    behind = 0
    for one, number, start, stop, offset in object_parts(plan.src, plan.lengths):
        assert start == behind
        behind = stop
        found.append((number if one is region else -1, offset, int(plan.lengths[start:stop].sum())))
    assert behind == len(plan.lengths)
    assert found == expected


def test_runs_of_ten_thousand_objects_are_made_as_they_are_asked_for() -> None:
    region = objects(4096, n=10_000)
    plan = make_plan(region, memory(40_960_000))
    assert len(plan.part_ends) == len(plan.lengths) == 10_000
    runs = object_parts(plan.src, plan.lengths)
    assert next(runs) == (region, 0, 0, 1, 0)
    assert len(list(runs)) == 9999


# Sizes.


def test_a_size_is_taken_from_the_other_side() -> None:
    source, unsized = memory(100), objects(None)
    assert not unsized.sized
    for plan in (make_plan(source, unsized), make_plan(unsized, [source[:60], source[60:]])):
        assert plan.nbytes == 100
        region = (plan.src if plan.src.kind is MemoryKind.OBJECT else plan.dst).regions[0]
        assert isinstance(region, ObjectRegion)
        assert (region.nbytes, region.exact) == (100, True)
    assert make_plan(unsized[10:20], source[:10]).nbytes == 10
    for sides in ((unsized, objects(None)), (unsized, [source, objects(None)]), ([unsized, unsized], source)):
        with pytest.raises(DescriptorError, match="size"):
            make_plan(*sides)


@pytest.mark.parametrize(
    ("keys", "nbytes", "error"),
    [
        ([], 5, DescriptorError),
        (["a", "b"], None, DescriptorError),
        (["a", "b"], [1, 2, 3], DescriptorError),
        (["a", "b"], [1, -2], DescriptorError),
        (["a"], UNSIZED_NBYTES + 1, DescriptorError),
        (["a"], 2**63, DescriptorError),
        (["a"] * 5000, UNSIZED_NBYTES, DescriptorError),
        (["a", "b"], [1.5, 2.5], TypeError),
        (["a"], "10", TypeError),
        (["a"], True, TypeError),
    ],
)
def test_sizes_that_make_no_sense(keys: list[str], nbytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ObjectRegion(STORE, keys, nbytes)


@pytest.mark.parametrize(
    ("indices", "offsets", "nbytes", "error"),
    [
        ([3], 0, None, DescriptorError),
        ([-1], 0, None, DescriptorError),
        ([0], 11, None, DescriptorError),
        ([0], -1, None, DescriptorError),
        ([0], 5, 6, DescriptorError),
        ([0], 5, -1, DescriptorError),
        ([0], 2**62, 2**62, DescriptorError),
        ([0, 1], [1, 2, 3], None, DescriptorError),
        ([0, 1], 0, [1, 2, 3], DescriptorError),
        ([0.5], 0, None, TypeError),
        ([True, False, True], 0, None, TypeError),
        ([0], 0.5, None, TypeError),
    ],
)
def test_selections_that_are_out_of_range(indices: Any, offsets: Any, nbytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        objects(10, n=3).select(indices, offsets, nbytes)


def test_selections() -> None:
    region = objects([10, 20, 30])
    assert len(region) == 3
    assert (region[:].nbytes, region[:].lengths.tolist()) == (60, [10, 20, 30])
    assert region.select([2, 0]).lengths.tolist() == [30, 10]
    assert region.select([2, 0], 4).lengths.tolist() == [26, 6]
    assert region.select([2, 2], [0, 15], 15).nbytes == 30
    assert region.select([]).nbytes == 0
    for item in (slice(0, 10), slice(None, None, 2), 1):
        with pytest.raises(DescriptorError, match="select"):
            region[item]  # type: ignore[index]
    assert objects(10)[2:4].nbytes == 2


# Targets.


def test_an_object_is_written_once_by_whichever_name() -> None:
    source = memory(20)
    twice = ObjectRegion(STORE, ["a", "a"], 10)
    for target in (twice, [objects(10), objects(10)], [objects(10, n=1), ObjectRegion(STORE, ["k0"], 10)]):
        with pytest.raises(DescriptorError, match="twice"):
            make_plan(source, target)
    elsewhere = ObjectRegion(StoreAddress("s3", "other"), ["k0"], 10)
    assert make_plan(source, [objects(10), elsewhere]).nbytes == 20
    # In two pieces, one behind the other, beside another region.
    two, one = objects([10, 5], n=2), ObjectRegion(STORE, ["z"], 5)
    assert make_plan(source, [two.select([0], 0, 5), two.select([0, 1], [5, 0], 5), one]).nbytes == 20
    assert make_plan(twice, source).nbytes == 20


def test_objects_without_bytes_are_not_written() -> None:
    for target in (objects(0), objects([10, 0, 10])):
        with pytest.raises(DescriptorError, match="no bytes"):
            make_plan(memory(100)[: target[:].nbytes], target)
    assert make_plan(objects([10, 0, 10]), memory(20)).part_ends == (10, 10, 20)


def test_what_is_read_only_or_mixed_is_no_target() -> None:
    with pytest.raises(DescriptorError, match="read-only"):
        make_plan(memory(10), objects(10, readonly=True))
    with pytest.raises(DescriptorError, match="mixes"):
        make_plan(memory(20), [objects(10), ObjectRegion(StoreAddress("az", "b"), ["k"], 10)])
    with pytest.raises(DescriptorError, match="mixes"):
        make_plan([memory(10), objects(10)], memory(20))


# Errors of an op.


def test_one_run_fails_as_itself_and_many_as_parts() -> None:
    missing = NotFoundError("not there", backend="s3")
    one = Op(1, make_plan(objects(40)[:].region.pages([0, 1, 2, 3], 10), memory(40).pages([3, 1, 2, 0], 10)), None, False)
    assert len(one.plan.lengths) > 1
    raise_failed([], one)
    with pytest.raises(NotFoundError, match="not there"):
        raise_failed([(0, missing)], one)
    many = Op(2, make_plan(objects(10, n=3), memory(30)), None, False)
    failed: list[tuple[int, TransferError]] = [(20, BackendError("later")), (10, missing)]
    with pytest.raises(PartsFailed, match="2 objects failed, the first of them: not there") as caught:
        raise_failed(failed, many)
    assert caught.value.__cause__ is missing
    with pytest.raises(PartsFailed, match="1 object failed"):
        raise_failed(failed[:1], many)


# Addresses.


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a/b", ("s3", "bucket", "a/b")),
        ("s3://bucket", ("s3", "bucket", "")),
        ("s3://bucket/a?b#c%20d", ("s3", "bucket", "a?b#c%20d")),
        ("az://container/", ("az", "container", "")),
        ("gs://b/k//l", ("gs", "b", "k//l")),
        ("file:///a/b/", ("file", "/a/b", "")),
        ("file:///", ("file", "/", "")),
    ],
)
def test_urls(url: str, expected: tuple[str, str, str]) -> None:
    found = parse_store(url, {})
    assert (found.scheme, found.bucket, found.prefix) == expected


@pytest.mark.parametrize("url", ["", "s3:", "s3:///key", "http://a/b", "file://relative/a", "bucket/key", "s3://[", None, 5])
def test_urls_that_cannot_be_read(url: Any) -> None:
    with pytest.raises(ConfigurationError, match="URL"):
        parse_store(url, {})


def test_options_are_hashable_and_not_shown() -> None:
    address = parse_store("s3://bucket/", {"secret_key": "hunter2", "part_nbytes": 5})
    assert "hunter2" not in repr(address) + str(address)
    assert "hunter2" not in repr(ObjectRegion(address, ["k"], 1))
    assert address == parse_store("s3://bucket/", {"part_nbytes": 5, "secret_key": "hunter2"})
    assert pickle.loads(pickle.dumps(address)) == address
    with pytest.raises(ConfigurationError, match="tags"):
        parse_store("s3://bucket/", {"tags": {}})


# Files.


class Closing:
    """What closes a file region."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    async def __call__(self, publish: bool) -> None:
        self.calls.append(publish)


def file_region(closing: Closing, nbytes: int | None = 100) -> FileRegion:
    return FileRegion("/some/file", 3, -1, nbytes, False, closing)


async def test_a_file_is_closed_once_after_its_transfers() -> None:
    closing = Closing()
    region = file_region(closing)
    forgotten: list[FileRegion] = []
    region.forget = forgotten.append
    region.hold()
    waiting = [asyncio.create_task(region.aclose()) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert region.closed
    assert closing.calls == []
    with pytest.raises(ClosedError, match="is closed"):
        make_plan(region, memory(100))
    waiting[0].cancel()
    region.release()
    await asyncio.wait(waiting)
    await region.aclose(publish=False)
    assert closing.calls == [True]
    assert forgotten == [region]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_block_that_raises_publishes_nothing(fails: bool) -> None:
    closing = Closing()
    try:
        async with file_region(closing):
            if fails:
                raise ValueError("on purpose")
    except ValueError:
        pass
    assert closing.calls == [not fails]


async def test_a_quarantined_file_keeps_its_descriptor() -> None:
    closing = Closing()
    region = file_region(closing)
    region.quarantined = True
    with pytest.raises(ClosedError, match="quarantined"):
        make_plan(region, memory(100))
    with pytest.raises(BackendError, match="stays open"):
        await region.aclose()
    assert closing.calls == []


def test_a_file_without_a_size_takes_the_other_sides() -> None:
    region = file_region(Closing(), None)
    assert make_plan(memory(70), region).nbytes == 70
    assert make_plan(memory(10), region[1 << 40 : (1 << 40) + 10]).dst.addresses.tolist() == [1 << 40]
    with pytest.raises(DescriptorError, match="no size"):
        make_plan([region], memory(10))
