"""The file engine: what it moves is what a plain model says, whatever the alignment; what it stops stays stopped."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixl_async import BackendError, ConfigurationError
from nixl_async.fileio import DEPTH, FileEngine, FileError, FileSegments, SummedBlocks, alignment, strictest
from nixl_async.native import ffi, int64, lib
from nixl_async.testing import pattern
from nixl_async.testing.patterns import CANARY, Canary, assert_same
from nixl_async.tiers.checksums import new_turn
from tests.agents import ROOT

FILE_NBYTES = 300_000
PATIENCE_SECONDS = 30.0


def has_io_uring() -> bool:
    engine = FileEngine("probe", 1)
    engine.close()
    return engine.how == "io_uring"


needs_io_uring = pytest.mark.skipif(not has_io_uring(), reason="the kernel refuses io_uring")


@contextmanager
def engine_of(kind: str, n_threads: int = 1) -> Iterator[FileEngine]:
    engine = FileEngine("test-files", n_threads, kind)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(params=[pytest.param("io_uring", marks=needs_io_uring), "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[FileEngine]:
    with engine_of(request.param, 2) as engine:
        yield engine


def segments(
    memory: np.ndarray[Any, np.dtype[np.uint8]], rows: list[tuple[int, int, int, int]], direct: list[int] | None = None
) -> FileSegments:
    """Make segments of (fd, offset in the file, place in memory, bytes)."""
    table = np.array(rows, np.int64).reshape(-1, 4)
    direct = direct or [-1] * len(rows)
    return FileSegments(
        table[:, 0].astype(np.int32),
        np.array(direct, np.int32),
        np.ascontiguousarray(table[:, 1]),
        np.ascontiguousarray(table[:, 2] + memory.ctypes.data),
        np.ascontiguousarray(table[:, 3]),
        strictest(direct),
    )


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def fresh(path: Path, content: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    path.write_bytes(content.tobytes())


async def run(engine: FileEngine, put: bool, what: FileSegments) -> None:
    """As the posix backend does it, on as many lanes as there are."""
    await engine.move(put, what, ways=8)


async def run_on_a_thread(engine: FileEngine, put: bool, what: FileSegments) -> None:
    """As the directory backend does it, in the middle of Python's work."""
    await engine.submit(lambda stop: engine.run(put, what, stop))


# The property: both ways, cached and direct, every alignment.


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Draw segments that do not overlap in either of two files: (file, offset, gap in memory before it, bytes)."""
    unit = draw(st.sampled_from([1, 1, 512, 4096]))
    sizes = st.one_of(st.integers(0, 3), st.integers(0, 20_000), st.sampled_from([4096, 8192, 65536, 40_960]))
    at = [draw(st.integers(0, 9000)) // unit * unit, draw(st.integers(0, 9000)) // unit * unit]
    rows = []
    which = 0
    for _ in range(draw(st.integers(0, 12))):
        which ^= draw(st.integers(0, 3)) == 0
        at[which] += draw(st.sampled_from([0, 0, 0, 1, 4096, 5000])) // unit * unit
        nbytes = min(draw(sizes) // unit * unit, FILE_NBYTES - at[which])
        if nbytes < 0:
            break
        rows.append((which, at[which], draw(st.sampled_from([0, 0, 1, 4096])) // unit * unit, nbytes))
        at[which] += nbytes
    return draw(st.permutations(rows)) if draw(st.booleans()) else rows


@pytest.mark.parametrize("run", [run, run_on_a_thread])
@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("direct", [False, True])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=layouts(), begin=st.sampled_from([0, 16, 512, 1]), put=st.booleans())
def test_it_moves_what_the_plain_model_says(
    engine: FileEngine,
    tmp_path: Path,
    run: Callable[[FileEngine, bool, FileSegments], Coroutine[Any, Any, None]],
    where: str,
    direct: bool,
    rows: list[tuple[int, int, int, int]],
    begin: int,
    put: bool,
) -> None:
    directory = tmp_path if where == "disk" else Path("/dev/shm")
    paths = [directory / f"nixl-async-{os.getpid()}-{i}" for i in range(2)]
    files = [pattern(FILE_NBYTES, seed) for seed in (1, 2)]
    total = begin + sum(gap + nbytes for _, _, gap, nbytes in rows) + 10
    anonymous = mmap.mmap(-1, total + 4096)
    memory = np.frombuffer(anonymous, np.uint8)[:total]
    memory[:] = pattern(total, 3) if put else CANARY
    places, at = [], begin
    for which, offset, gap, nbytes in rows:
        at += gap
        places.append((which, offset, at, nbytes))
        at += nbytes
    expected_memory, expected_files = memory.copy(), [file.copy() for file in files]
    for which, offset, place, nbytes in places:
        if put:
            expected_files[which][offset : offset + nbytes] = memory[place : place + nbytes]
        else:
            expected_memory[place : place + nbytes] = files[which][offset : offset + nbytes]
    try:
        with ExitStack() as stack:
            for path, content in zip(paths, files, strict=True):
                fresh(path, content)
            fds = [stack.enter_context(opened(path)) for path in paths]
            try:
                past = [stack.enter_context(opened(path, os.O_RDWR | os.O_DIRECT)) for path in paths] if direct else [-1, -1]
            except OSError:
                pytest.skip(f"no direct I/O in {directory}")
            what = segments(
                memory,
                [(fds[which], offset, place, nbytes) for which, offset, place, nbytes in places],
                [past[which] for which, _, _, _ in places],
            )
            asyncio.run(run(engine, put, what))
        for path, wanted in zip(paths, expected_files, strict=True):
            assert_same(np.fromfile(path, np.uint8), wanted, path.name)
        assert_same(memory, expected_memory, "memory")
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 5, 3_000_001])
async def test_a_new_file_gets_no_longer_than_what_was_written(
    engine: FileEngine, tmp_path: Path, nbytes: int, direct: bool
) -> None:
    content = pattern(nbytes)
    path = tmp_path / "new"
    with ExitStack() as stack:
        fd = stack.enter_context(opened(path))
        past = stack.enter_context(opened(path, os.O_RDWR | os.O_DIRECT)) if direct else -1
        await run(engine, True, segments(content, [(fd, 0, 0, nbytes)], [past]))
        got = np.full(nbytes + 1, CANARY, np.uint8)
        await run(engine, False, segments(got, [(fd, 0, 0, nbytes)], [past]))
    assert_same(np.fromfile(path, np.uint8), content)
    assert_same(got[:-1], content)
    assert got[-1] == CANARY


async def test_nothing_to_move(engine: FileEngine) -> None:
    await run(engine, True, segments(np.zeros(1, np.uint8), []))


# Files that are not what they should be.


@pytest.mark.parametrize("direct", [False, True])
async def test_a_file_that_ends_too_soon(engine: FileEngine, tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "short"
    fresh(path, pattern(10_000))
    got = np.full(30_000, CANARY, np.uint8)
    with ExitStack() as stack:
        fd = stack.enter_context(opened(path))
        past = stack.enter_context(opened(path, os.O_RDWR | os.O_DIRECT)) if direct else -1
        what = segments(got, [(fd, 0, 0, 5000), (fd, 9000, 5000, 2000), (fd, 0, 7000, 100)], [past] * 3)
        with pytest.raises(FileError) as caught:
            await run(engine, False, what)
        assert (caught.value.errno, caught.value.segment) == (errno.ENODATA, 1)
        # It shrinks between two reads, too.
        os.truncate(path, 4097)
        with pytest.raises(FileError) as caught:
            await run(engine, False, segments(got, [(fd, 0, 0, 5000)], [past]))
        assert caught.value.errno == errno.ENODATA
        await run(engine, False, segments(got, [(fd, 0, 0, 4097)], [past]))
    assert_same(got[:4097], pattern(10_000)[:4097])
    assert (got[7100:] == CANARY).all()


async def test_holes_read_as_zeros(engine: FileEngine, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    sent, got = pattern(5000), np.full(2 << 20, CANARY, np.uint8)
    with opened(path) as fd:
        os.ftruncate(fd, 1 << 40)
        await run(engine, True, segments(sent, [(fd, (1 << 39) + 1000, 0, 5000)]))
        with opened(path, os.O_RDONLY | os.O_DIRECT) as past:
            await run(engine, False, segments(got, [(fd, 1 << 39, 0, 2 << 20)], [past]))
        assert os.fstat(fd).st_blocks < 1000
    assert_same(got[1000:6000], sent)
    assert not got[:1000].any()
    assert not got[6000:].any()


async def test_more_than_two_gigabytes_in_one_segment(engine: FileEngine, tmp_path: Path) -> None:
    nbytes = (1 << 31) + (1 << 22)
    path = tmp_path / "large"
    marks = [0, (1 << 31) - 50, nbytes - 100]
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as anonymous:
        anonymous.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(anonymous, np.uint8)
        with opened(path) as fd:
            os.ftruncate(fd, nbytes + 7)
            for number, mark in enumerate(marks):
                os.pwrite(fd, pattern(100, number).tobytes(), mark + 7)
            # Past the page cache, which would have to be filled with as many bytes.
            with opened(path, os.O_RDONLY | os.O_DIRECT) as past:
                await run(engine, False, segments(memory, [(fd, 7, 0, nbytes)], [past]))
        for number, mark in enumerate(marks):
            assert_same(memory[mark : mark + 100], pattern(100, number))
        assert not memory[1 << 30 : (1 << 30) + (1 << 20)].any()
        del memory
    path.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
async def test_a_full_file_system_says_so_in_the_middle(engine: FileEngine, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("mounting is forbidden here")
    try:
        with opened(mount / "a") as a, opened(mount / "b") as b:
            content = pattern(3 << 20)
            what = segments(content, [(a, 0, 0, 500_000), (b, 0, 500_000, 1 << 20), (a, 500_000, 2 << 20, 1000)])
            with pytest.raises(FileError) as caught:
                # On one lane: of two, either may be the one for which there is no room.
                await engine.move(True, what)
            assert (caught.value.errno, caught.value.segment) == (errno.ENOSPC, 1)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


async def test_a_descriptor_that_is_not_open(engine: FileEngine) -> None:
    memory = np.zeros(10, np.uint8)
    for put in (False, True):
        with pytest.raises(FileError) as caught:
            await run(engine, put, segments(memory, [(1 << 20, 0, 0, 10)]))
        assert caught.value.errno == errno.EBADF


# Stopping.


@needs_io_uring
@pytest.mark.parametrize("n", [1, DEPTH, 3 * DEPTH])
async def test_what_waits_for_a_device_is_cancelled(n: int) -> None:
    """A pipe is the slowest file there is: it answers when somebody writes to it, here in part only."""
    reader, writer = os.pipe()
    got = np.full(n * 100, CANARY, np.uint8)
    with engine_of("io_uring") as engine, os.fdopen(reader, "rb"), os.fdopen(writer, "wb", 0):
        os.set_blocking(reader, True)
        what = segments(got, [(reader, 0, i * 100, 100) for i in range(n)])
        task = asyncio.ensure_future(run(engine, False, what))
        os.write(writer, b"short")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (got != CANARY).any():
                # The read is in the kernel's hands, and its rest is sent once more.
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
        assert task.cancelled()
        canary = Canary(got)
        os.write(writer, b"late" * 10)
        await canary.watch()
        # Nobody has taken these bytes, and the ring is as good as new.
        after = np.full(40, CANARY, np.uint8)
        await run(engine, False, segments(after, [(reader, 0, 0, 40)]))
        assert after.tobytes() == b"late" * 10


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("put", [False, True])
async def test_stopped_at_any_moment_nothing_moves_late(engine: FileEngine, tmp_path: Path, put: bool, direct: bool) -> None:
    n, page = 256, 32_768
    path = tmp_path / "pages"
    fresh(path, np.full(n * page, CANARY, np.uint8) if put else pattern(n * page))
    order = np.random.default_rng(5).permutation(n)
    with mmap.mmap(-1, n * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as anonymous, ExitStack() as stack:
        memory = np.frombuffer(anonymous, np.uint8)
        fd = stack.enter_context(opened(path))
        past = stack.enter_context(opened(path, os.O_RDWR | os.O_DIRECT)) if direct else -1
        what = segments(memory, [(fd, int(k) * page, i * page, page) for i, k in enumerate(order)], [past] * n)
        memory[:] = pattern(n * page)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await run(engine, put, what)
        seconds = loop.time() - began
        cancelled = 0
        for step in range(12):
            if put:
                memory[:] = pattern(n * page)
            task = asyncio.ensure_future(run(engine, put, what))
            await asyncio.sleep(seconds * step / 12)
            task.cancel()
            await asyncio.wait([task])
            cancelled += task.cancelled()
            if put:
                # What is in the file stays what it is, though the memory is used for something else.
                before = await asyncio.to_thread(path.read_bytes)
                memory[:] = 0xEE
                assert await asyncio.to_thread(path.read_bytes) == before
            else:
                await Canary(memory).watch(0.005)
        assert cancelled
        del memory


@pytest.mark.parametrize("kind", [pytest.param("io_uring", marks=needs_io_uring), "threads"])
async def test_the_first_error_of_a_lane_stops_the_others(kind: str, tmp_path: Path) -> None:
    n, page = 512, 65_536
    path = tmp_path / "f"
    fresh(path, pattern(n * page))
    got = np.full((n + 1) * page, CANARY, np.uint8)
    with engine_of(kind, 3) as engine, opened(path) as fd:
        rows = [(fd, i * page, i * page, page) for i in range(n)]
        # No descriptor; it is the first in the order in which they are moved.
        rows.insert(1, (-1, 0, n * page, page))
        with pytest.raises(FileError) as caught:
            await engine.move(False, segments(got, rows), ways=3)
        assert (caught.value.errno, caught.value.segment) == (errno.EBADF, 1)
        await Canary(got).watch()
        assert (got[page * n // 2 :] == CANARY).any()


async def test_many_at_once_on_few_lanes(engine: FileEngine, tmp_path: Path) -> None:
    n, page = 200, 10_000
    path = tmp_path / "f"
    fresh(path, pattern(n * page))
    got = np.zeros(n * page, np.uint8)
    with opened(path) as fd:
        await asyncio.gather(
            *(engine.move(False, segments(got, [(fd, i * page, i * page, page)]), ways=1 + i % 3) for i in range(n))
        )
    assert_same(got, pattern(n * page))


@needs_io_uring
async def test_what_has_not_begun_is_cancelled_at_once() -> None:
    reader, writer = os.pipe()
    got = np.full(200, CANARY, np.uint8)
    with engine_of("io_uring") as engine, os.fdopen(reader, "rb"), os.fdopen(writer, "wb", 0):
        os.set_blocking(reader, True)
        first = asyncio.ensure_future(run(engine, False, segments(got, [(reader, 0, 0, 100)])))
        second = asyncio.ensure_future(run(engine, False, segments(got, [(reader, 0, 100, 100)])))
        await asyncio.sleep(0)
        second.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.wait([second])
        assert second.cancelled()
        assert not first.done()
        os.write(writer, bytes(100))
        await first
    assert (got[:100] == 0).all()
    assert (got[100:] == CANARY).all()


# Memory to memory, and blocks with their checksums.

BLOCK, N_BLOCKS = 4096, 64


@pytest.mark.parametrize("ways", [1, 3])
async def test_memory_is_copied(engine: FileEngine, ways: int) -> None:
    data, got = pattern(9 << 20, 4), np.zeros(9 << 20, np.uint8)
    # Some longer than a lane takes at a time, many shorter, some empty.
    sizes = np.array([3 << 20, 0, 2 << 20, *[1 << 10] * 4096, 0], np.int64)
    starts = np.cumsum(sizes) - sizes
    await engine.copy(starts + got.ctypes.data, starts + data.ctypes.data, sizes, ways)
    assert_same(got, data)
    await engine.copy(*(np.zeros(0, np.int64) for _ in range(3)))


async def test_a_copy_that_is_cancelled_is_quiet(engine: FileEngine) -> None:
    data, got = pattern(64 << 20, 4), np.full(64 << 20, CANARY, np.uint8)
    sizes = np.full(64, 1 << 20, np.int64)
    starts = np.cumsum(sizes) - sizes
    copying = asyncio.ensure_future(engine.copy(starts + got.ctypes.data, starts + data.ctypes.data, sizes))
    await asyncio.sleep(0)
    copying.cancel()
    await asyncio.wait([copying])
    if copying.cancelled():
        # How far it came is chance; that it comes no further is not.
        got[:] = CANARY
        await Canary(got).watch()
    else:
        assert_same(got, data)


class Summed:
    """Blocks of a file and of memory, the file's in an order of its own."""

    def __init__(self, fd: int, memory: np.ndarray[Any, np.dtype[np.uint8]], n: int = N_BLOCKS, n_ranges: int = 1) -> None:
        self.memory, piece = memory, BLOCK // n_ranges
        self.order = np.random.default_rng(1).permutation(n)
        starts = np.arange(n * n_ranges).reshape(n, n_ranges) * piece
        self.blocks = SummedBlocks(
            np.full(n, fd, np.int32),
            self.order * BLOCK,
            starts + memory.ctypes.data,
            np.full((n, n_ranges), piece, np.int64),
            np.zeros(n, np.uint64),
            np.zeros(n, np.bool_),
        )

    def right_sums(self) -> list[int]:
        found = np.zeros(len(self.order), np.uint64)
        arrays = int64(self.blocks.addresses), int64(self.blocks.lengths)
        values = ffi.from_buffer("uint64_t[]", found, require_writable=True)
        lib.nx_crc64nvme_plain(*arrays, *self.blocks.addresses.shape, values)
        return found.tolist()


@pytest.mark.parametrize("ways", [1, 2])
async def test_blocks_are_moved_and_summed_up_in_one_go(engine: FileEngine, tmp_path: Path, ways: int) -> None:
    data, got = pattern(N_BLOCKS * BLOCK, 5), np.zeros(N_BLOCKS * BLOCK, np.uint8)
    with opened(tmp_path / "f") as fd:
        put = Summed(fd, data)
        await engine.summed(new_turn(), put.blocks, ways)
        assert put.blocks.moved.all()
        assert put.blocks.sums.tolist() == put.right_sums()
        # What is one range where it comes from may be several where it goes.
        get = Summed(fd, got, n_ranges=8)
        await engine.summed(ffi.NULL, get.blocks, ways)
    assert get.blocks.moved.all()
    assert_same(got, data)
    assert get.blocks.sums.tolist() == put.blocks.sums.tolist()


async def test_what_is_behind_the_end_or_cannot_be_written_is_not_moved(engine: FileEngine, tmp_path: Path) -> None:
    data, got = pattern(4 * BLOCK, 5), np.zeros(4 * BLOCK, np.uint8)
    fresh(tmp_path / "f", data[: 2 * BLOCK + 5])
    with opened(tmp_path / "f", os.O_RDONLY) as fd:
        get = Summed(fd, got, 4)
        await engine.summed(ffi.NULL, get.blocks)
        assert get.blocks.moved.tolist() == [place < 2 for place in get.order]
        assert [one for one, moved in zip(get.blocks.sums.tolist(), get.blocks.moved, strict=True) if moved] == [
            one for one, moved in zip(get.right_sums(), get.blocks.moved, strict=True) if moved
        ]
        put = Summed(fd, data, 4)
        await engine.summed(new_turn(), put.blocks)
        assert not put.blocks.moved.any()
        # With very many ranges it does not begin.
        many = Summed(fd, got, 1, BLOCK)
        await engine.summed(ffi.NULL, many.blocks)
        assert not many.blocks.moved.any()


@needs_io_uring
async def test_blocks_whose_turn_has_not_come_are_not_moved_once_it_is_cancelled(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    data, got = pattern(N_BLOCKS * BLOCK, 5), np.zeros(100, np.uint8)
    with opened(tmp_path / "f") as fd, engine_of("io_uring") as engine, os.fdopen(reader, "rb"), os.fdopen(writer, "wb", 0):
        first = asyncio.ensure_future(run(engine, False, segments(got, [(reader, 0, 0, 100)])))
        put = Summed(fd, data)
        moving = asyncio.ensure_future(engine.summed(new_turn(), put.blocks))
        await asyncio.sleep(0)
        moving.cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.wait([moving])
        assert moving.cancelled()
        os.write(writer, bytes(100))
        await first
        assert not put.blocks.moved.any()
        assert os.fstat(fd).st_size == 0


# What there is, and what is forbidden.


def test_the_engine_is_chosen() -> None:
    with pytest.raises(ConfigurationError, match="must be one of auto, io_uring, threads"):
        FileEngine("x", 1, "warp")
    with engine_of("threads") as engine:
        assert engine.how == "threads, no io_uring (asked for)"


async def test_a_closed_engine_refuses() -> None:
    with engine_of("auto") as engine:
        pass
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        await engine.submit(lambda stop: None)
    with pytest.raises(BackendError, match="closed"):
        await engine.move(False, segments(np.zeros(1, np.uint8), []))


def test_alignment_is_a_power_of_two_and_a_page_of_the_file_at_least(tmp_path: Path) -> None:
    with opened(tmp_path / "a", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
        memory, offset = alignment(fd)
    assert memory & (memory - 1) == 0 < memory
    assert offset & (offset - 1) == 0
    assert offset >= 4096
    assert strictest([]) == (1, 1)
    assert strictest([-1]) == (1, 1)


FORBIDDEN = """
import asyncio, ctypes, errno, struct, sys
import numpy as np
from nixl_async import Agent, ConfigurationError
from nixl_async.fileio import FileEngine

number, directory = int(sys.argv[1]), sys.argv[2]
# Load the number of the system call; if it is ours, the error EPERM; else allow.
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, number, 0x06, 0, 0, 0x00050000 | errno.EPERM, 0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, ctypes.addressof(code)))) == 0, ctypes.get_errno()

async def main():
    async with Agent("contained", backends=["posix", "memory"]) as agent:
        sent, got = np.arange(300_000, dtype=np.int32), np.zeros(300_000, np.int32)
        async with agent.file(directory + "/f", "w", direct=True) as file:
            target = await agent.register(sent)
            await agent.transfer(target, file)
        async with agent.file(directory + "/f", direct=True) as file:
            region = await agent.register(got)
            await agent.transfer(file, region)
            print(agent.explain(file, region).how)
        assert (sent == got).all()
    try:
        FileEngine("x", 1, "io_uring")
    except ConfigurationError as error:
        print(error)

asyncio.run(main())
"""


@needs_io_uring
@pytest.mark.parametrize("call", [425, 426], ids=["io_uring_setup", "io_uring_enter"])
def test_where_io_uring_is_forbidden_threads_do_the_work(tmp_path: Path, call: int) -> None:
    command = [sys.executable, "-c", FORBIDDEN, str(call), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "threads, no io_uring (io_uring_setup: Operation not permitted), direct" in done.stdout
    assert "the kernel refuses it: Operation not permitted" in done.stdout


@needs_io_uring
def test_threads_that_get_no_ring_copy_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "f"
    fresh(path, pattern(100_000))
    got = np.zeros(100_000, np.uint8)
    with engine_of("auto") as engine, opened(path) as fd:
        monkeypatch.setattr("nixl_async.fileio._open_ring", lambda: (ffi.NULL, errno.EMFILE))
        asyncio.run(run_on_a_thread(engine, False, segments(got, [(fd, 0, 0, 100_000)])))
    assert_same(got, pattern(100_000))
