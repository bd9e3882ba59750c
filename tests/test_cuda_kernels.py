"""What the copy kernel is told, and, compiled for the CPU, what it does with it. On a device: tests/gpu."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async.cuda_kernels import (
    AREAS,
    REACH_NBYTES,
    SOURCE,
    THREADS_PER_BLOCK,
    UNIT_NBYTES,
    UNITS_PER_BLOCK,
    Batch,
    Far,
    make_batch,
    shifted,
)
from nixl_async.cuda_lane import FIRST_SLICE, SLICE, slices
from nixl_async.descriptors import Side
from nixl_async.memory import RemoteRegion
from nixl_async.native import ffi, int64, lib
from nixl_async.testing import assert_same, pattern

# What a device's compiler has of its own. A word that is not at its boundary stops the program, as it does on a device.
_BEFORE = r"""
#include <cstdint>
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct index { unsigned x; };
static index threadIdx, blockIdx, gridDim, blockDim;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
static unsigned atomicAdd(unsigned *to, unsigned n) { unsigned was = *to; *to += n; return was; }
"""
_BEHIND = r"""
extern "C" void run(const unsigned long long *src, const unsigned long long *dst, const unsigned long long *lengths,
                    unsigned long long nbytes, unsigned units, unsigned units_per_piece, unsigned blocks, unsigned threads) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            nixl_copy(src, dst, lengths, nbytes, units, units_per_piece);
}
extern "C" void order(const unsigned long long *by, unsigned n, unsigned long long low, unsigned shift, unsigned *starts,
                      const unsigned long long *from, unsigned long long *to, unsigned rows) {
    gridDim.x = blockDim.x = 1;
    blockIdx.x = threadIdx.x = 0;
    nixl_order(by, n, low, shift, starts, from, to, rows);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    room: Path = tmp_path_factory.mktemp("kernel")
    (room / "kernel.cpp").write_text(_BEFORE + SOURCE + _BEHIND)
    command = [compiler, "-O1", "-w", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(room / "kernel.so"), str(room / "kernel.cpp")], check=True)
    return ctypes.CDLL(str(room / "kernel.so"))


@pytest.fixture(scope="module")
def run(library: Any) -> Callable[[Batch, int], None]:
    def call(batch: Batch, blocks: int) -> None:
        arrays = [np.ascontiguousarray(array, np.int64) for array in batch.arrays()]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays] + [None]
        numbers = batch.units, batch.units_per_piece, blocks or batch.blocks, THREADS_PER_BLOCK
        library.run(*pointers[:3], ctypes.c_uint64(batch.piece_nbytes), *map(ctypes.c_uint, numbers))

    return call


def copied(run: Callable[[Batch, int], None], lengths: Any, gap: int, shift: int, blocks: int = 0) -> None:
    """Copy ranges that lie `gap` bytes apart to others in another order, `shift` bytes off, and look at every byte."""
    lengths = np.asarray(lengths, np.int64)
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    there = np.empty_like(lengths)
    there[order] = np.cumsum(lengths[order]) - lengths[order] + gap * np.arange(len(lengths)) + shift
    here = np.cumsum(lengths) - lengths + gap * np.arange(len(lengths))
    room = int(lengths.sum()) + gap * len(lengths) + shift
    source, target = pattern(room), np.full(room, 0xEE, np.uint8)
    expected = target.copy()
    for at, to, n in zip(here, there, lengths, strict=True):
        expected[to : to + n] = source[at : at + n]
    run(make_batch(source.ctypes.data + here, target.ctypes.data + there, lengths), blocks)
    assert_same(target, expected)


@pytest.mark.parametrize("nbytes", [1, 15, 16, 17, 511, 2047, 2048, 2049, 10_000, 65_536])
@pytest.mark.parametrize(("gap", "shift"), [(0, 0), (1, 0), (8, 4), (16, 3), (5, 16)])
def test_every_byte_of_pages_is_copied(run: Callable[[Batch, int], None], nbytes: int, gap: int, shift: int) -> None:
    copied(run, [nbytes] * 9, gap, shift)
    # Fewer blocks than there is work for go round again.
    copied(run, [nbytes] * 9, gap, shift, blocks=1)


def test_every_byte_of_ranges_of_all_sizes_is_copied(run: Callable[[Batch, int], None]) -> None:
    rng = np.random.default_rng(5)
    for number in range(20):
        copied(run, rng.integers(1, 30_000, rng.integers(2, 60)), int(rng.integers(0, 20)), number)
    copied(run, [100] * 50 + [3_000_001], 0, 0)


def test_pages_of_one_size_need_no_lengths() -> None:
    addresses = np.arange(1000) * 9000
    batch = make_batch(addresses, addresses + 64, np.full(1000, 9000))
    assert (batch.same, batch.piece_nbytes, batch.units_per_piece, batch.units) == (True, 9000, 5, 5000)
    assert batch.blocks == 5000 // UNITS_PER_BLOCK
    assert [len(array) for array in batch.arrays()] == [1000, 1000]


def test_one_run_of_any_length_is_one_piece() -> None:
    batch = make_batch(np.array([64]), np.array([1 << 40]), np.array([3 << 30]))
    assert (batch.n, batch.units) == (1, (3 << 30) // UNIT_NBYTES)


@pytest.mark.parametrize("lengths", [[1024] * 300 + [8_000_000], [1, 2 << 30], [*range(1, 5000)], [16384, 32768, 49153] * 300])
def test_pieces_of_many_sizes_are_few_and_waste_little(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    batch = make_batch(np.cumsum(sizes) - sizes, np.zeros(len(sizes), np.int64), sizes)
    assert not batch.same
    src, _, cut = batch.arrays()
    assert len(src) == batch.n <= 2 * len(sizes) + 1024
    assert int(cut.sum()) == int(sizes.sum())
    assert int(cut.min()) > 0
    assert int(cut.max()) <= batch.piece_nbytes
    # One behind the other at the source, as the segments were.
    assert np.array_equal(src, np.cumsum(cut) - cut)


@pytest.mark.parametrize("page", [512, 16384, 5000])
def test_pages_of_which_some_follow_each_other_are_pages_again(page: int) -> None:
    many = np.random.default_rng(3).choice([1, 1, 1, 2, 3], 2000)
    src = (np.cumsum(many) - many) * page
    batch = make_batch(src, src + 64, many * page)
    assert (batch.same, batch.piece_nbytes) == (True, page)
    assert np.array_equal(batch.arrays(), np.arange(many.sum()) * page + [[0], [64]])


@pytest.mark.parametrize("many", [[1] * 50, [1, 2, 1, 3] * 20, [1, 2.5, 3] * 20], ids=["pages", "joined", "ranges"])
def test_pieces_are_written_where_the_device_sees_them(many: list[float]) -> None:
    lengths = (np.array(many) * 4096).astype(np.int64)
    batch = make_batch(np.cumsum(lengths) - lengths, np.cumsum(lengths) * 2, lengths)
    rows = np.zeros((batch.rows, batch.n), np.int64)
    batch.write(ffi.cast("int64_t *", rows.ctypes.data), (1000, -64))
    assert np.array_equal(rows[:2], np.add(batch.arrays()[:2], [[1000], [-64]]))
    assert batch.same or np.array_equal(rows[2], batch.arrays()[2])


def described(
    src: Any, dst: Any, lengths: Any, *, side: int = 0, low: int = 0, shift: int = 0, in_order: bool = False
) -> tuple[Any, Any]:
    """Return the rows that the device gets, and where the areas start; `lengths` is `None` for pages of one size."""
    n, rows = len(src), 2 if lengths is None else 3
    to, starts = np.zeros(rows * n, np.int64), np.zeros(AREAS, np.uint32)
    moved = int64(src), 1000, int64(dst), -64, ffi.NULL if lengths is None else int64(lengths)
    lib.nx_describe(*moved, n, side, low, shift, in_order, int64(to), ffi.from_buffer("uint32_t[]", starts))
    return to.reshape(rows, n), starts


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_entries_are_put_in_order_by_area(library: Any, side: int, same: bool) -> None:
    n, rng = 3000, np.random.default_rng(6)
    src, dst = rng.integers(1 << 40, (1 << 40) + (40 << 30), n), rng.permutation(n) * (13 << 20) + 64
    lengths = None if same else rng.integers(1, 9, n)
    by = (src + 1000, dst - 64)[side - 1]
    far = Far(side == 2, int(by.min()), int(by.max()) + 8)
    where: dict[str, Any] = {"side": side, "low": far.low, "shift": far.shift}
    rows, starts = described(src, dst, lengths, **where)
    assert rows[:2].tolist() == [(src + 1000).tolist(), (dst - 64).tolist()]
    assert lengths is None or rows[2].tolist() == lengths.tolist()
    areas = (by - far.low) >> far.shift
    assert areas.max() < AREAS <= 2 * areas.max() + 2
    assert np.array_equal(starts, np.searchsorted(np.sort(areas), np.arange(AREAS)))
    ordered = np.zeros_like(rows)

    def pointer(array: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    # By the device, and before it is told.
    places = map(pointer, (starts, rows, ordered))
    library.order(pointer(np.ascontiguousarray(by)), n, ctypes.c_uint64(far.low), far.shift, *places, len(rows))
    for found in (ordered, described(src, dst, lengths, in_order=True, **where)[0]):
        assert (np.diff((found[side - 1] - far.low) >> far.shift) >= 0).all()
        assert set(zip(*found.tolist(), strict=True)) == set(zip(*rows.tolist(), strict=True))


def test_memory_within_reach_needs_no_order() -> None:
    assert Far(False, 1 << 40, (1 << 40) + REACH_NBYTES).shift == 0
    # Areas are of 2 MiB at least, and 4,096 at most.
    assert Far(False, 1 << 40, (1 << 40) + REACH_NBYTES + 1).shift == 21
    assert Far(True, 0, 8 << 30).shift == 22
    assert Far(True, 0, (8 << 30) - 1).shift == 21


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_what_is_not_of_one_size_is_seen(n: int) -> None:
    addresses, lengths = np.arange(n) * 64, np.full(n, 7)
    assert make_batch(addresses, addresses, lengths).same
    for at in {0, n // 2, n - 1}:
        lengths[at] = 8
        batch = make_batch(addresses, addresses, lengths)
        assert not batch.same
        rows, _ = described(*batch.arrays())
        assert rows.tolist() == [(addresses + 1000).tolist(), (addresses - 64).tolist(), lengths.tolist()]
        lengths[at] = 7


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("n", [1, 2, FIRST_SLICE, FIRST_SLICE + 1, SLICE, 2 * SLICE, 300_000])
def test_slices_are_all_segments_once(n: int, ordered: bool) -> None:
    found = list(slices(n, ordered=ordered))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == n
    assert all(start < stop for start, stop in found)
    if ordered:
        assert len(found) <= 2
    else:
        assert max(stop - start for start, stop in found) <= SLICE
        assert n <= FIRST_SLICE or found[0] == (0, FIRST_SLICE)


def test_addresses_move_with_their_regions() -> None:
    regions = tuple(RemoteRegion("p", "i", f"r{n}", 1000 * n, 500) for n in (1, 2))
    side = Side(regions, np.array([1000, 2001, 1002]), np.array([0, 1, 0]))
    assert shifted(side, [10, -2000]).tolist() == [1010, 1, 1012]
    assert shifted(Side(regions[:1], np.array([1000, 1001])), [5]).tolist() == [1005, 1006]
