"""Copies between processes by two threads: the caller's, and one that takes part when it is awake."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async.native import ffi, int64, lib
from nixl_async.testing import assert_same, pattern

TOGETHER = 128 << 10
NBYTES = 4 << 20
TRIES = 16
TRY_EVERY = 1024


class Call:
    """A copy from `src` to `dst` of this process, which is a process too, cut at `cuts`."""

    def __init__(
        self, src: np.ndarray, dst: np.ndarray, cuts: list[int], *, put: bool = True, pidfd: int | None = None
    ) -> None:
        edges = np.array([0, *cuts, len(src)], np.int64)
        self.lengths = np.diff(edges)
        # From the last segment to the first, so that no two are one.
        order = np.arange(len(self.lengths))[::-1]
        self.lengths = np.ascontiguousarray(self.lengths[order])
        near, far = (src, dst) if put else (dst, src)
        self.local, self.remote = (np.ascontiguousarray(side.ctypes.data + edges[:-1][order]) for side in (near, far))
        self.pidfd = os.pidfd_open(os.getpid()) if pidfd is None else pidfd
        arrays = [int64(array) for array in (self.local, self.remote, self.lengths)]
        self.native = ffi.new("nx_vm_call *", (os.getpid(), self.pidfd, put, len(self.lengths), len(src), *arrays))

    def close(self) -> None:
        os.close(self.pidfd)


@pytest.fixture
def second() -> Iterator[Any]:
    made = lib.nx_vm_second_open(ffi.new("int *"))
    assert made
    yield made
    lib.nx_vm_second_close(made)


def until_joined(call: Call, second: Any) -> None:
    """Copy until the second thread has taken part once more; it may be asleep, or without a core."""
    before, end = lib.nx_vm_second_joined(second), time.monotonic() + 60
    while lib.nx_vm_second_joined(second) == before:
        assert lib.nx_vm_now(call.native, second) == 0
        assert time.monotonic() < end, "the second thread takes part in nothing"


@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("nbytes", [TOGETHER, TOGETHER + 1, (1 << 20) - 3, NBYTES])
def test_two_threads_copy_every_byte(second: Any, put: bool, nbytes: int) -> None:
    src, dst = pattern(nbytes, 1), np.zeros(nbytes, np.uint8)
    call = Call(src, dst, [], put=put)
    for _ in range(5):
        dst[:] = 0
        until_joined(call, second)
        assert_same(dst, src)
    assert call.native.spent_ns > 0
    call.close()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_may_end_anywhere(data: st.DataObject) -> None:
    nbytes = data.draw(st.integers(TOGETHER, 2 * TOGETHER), label="nbytes")
    cuts = sorted(data.draw(st.lists(st.integers(0, nbytes), max_size=40), label="cuts"))
    src, dst = pattern(nbytes, 2), np.zeros(nbytes, np.uint8)
    call = Call(src, dst, cuts)
    made = lib.nx_vm_second_open(ffi.new("int *"))
    try:
        for _ in range(3):
            dst[:] = 0
            assert lib.nx_vm_now(call.native, made) == 0
            assert_same(dst, src)
    finally:
        lib.nx_vm_second_close(made)
        call.close()


@pytest.mark.parametrize("put", [True, False])
def test_each_size_is_copied_alone_at_first_and_then_by_two(second: Any, put: bool) -> None:
    for nbytes in (TOGETHER, 2 * TOGETHER, NBYTES):
        src, dst = pattern(nbytes, 3), np.zeros(nbytes, np.uint8)
        call = Call(src, dst, [], put=put)
        before = lib.nx_vm_second_joined(second)
        for _ in range(TRIES):
            assert lib.nx_vm_now(call.native, second) == 0
        assert lib.nx_vm_second_joined(second) == before
        until_joined(call, second)
        assert_same(dst, src)
        call.close()


@pytest.mark.parametrize("put", [True, False])
def test_both_ways_are_tried_again_whichever_was_faster(second: Any, put: bool) -> None:
    nbytes = 2 * TOGETHER
    src, dst = pattern(nbytes, 4), np.zeros(nbytes, np.uint8)
    call = Call(src, dst, [], put=put)
    for _ in range(TRIES):
        assert lib.nx_vm_now(call.native, second) == 0
    seen: set[bool] = set()
    end = time.monotonic() + 60
    while seen != {True, False}:
        before = lib.nx_vm_second_joined(second)
        for _ in range(TRY_EVERY):
            assert lib.nx_vm_now(call.native, second) == 0
        joined = lib.nx_vm_second_joined(second) - before
        seen |= {True} if joined else set()
        seen |= {False} if joined < TRY_EVERY else set()
        assert time.monotonic() < end, seen
    call.close()


def test_small_copies_and_none_are_the_callers_alone(second: Any) -> None:
    src, dst = pattern(TOGETHER - 1, 1), np.zeros(TOGETHER - 1, np.uint8)
    call = Call(src, dst, [100])
    for given_one in (second, ffi.NULL):
        dst[:] = 0
        for _ in range(200):
            assert lib.nx_vm_now(call.native, given_one) == 0
        assert_same(dst, src)
    assert lib.nx_vm_second_joined(second) == 0
    call.close()


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_a_piece_that_fails_fails_the_copy(second: Any, bad: int) -> None:
    src, dst = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
    good = Call(src, dst, [])
    call = Call(src, dst, [NBYTES // 8 * i for i in range(1, 8)])
    call.remote[bad] = 8
    for _ in range(50):
        assert lib.nx_vm_now(call.native, second) == -errno.EFAULT
    # It goes on with the next.
    until_joined(good, second)
    assert_same(dst, src)
    good.close()
    call.close()


def test_a_process_that_has_ended_is_not_written_to(second: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
        process.communicate(b"\n")
    src, dst = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
    # The number is this process's, as it might be another's.
    call = Call(src, dst, [], pidfd=pidfd)
    assert lib.nx_vm_now(call.native, second) == -errno.ESRCH
    assert not dst.any()
    call.close()


def test_threads_that_copy_at_once_disturb_each_other_in_nothing(second: Any) -> None:
    wrong: list[int] = []

    def copy(number: int) -> None:
        src, dst = pattern(1 << 20, number), np.zeros(1 << 20, np.uint8)
        call = Call(src, dst, [1000, 500_000])
        for _ in range(100):
            dst[:] = 0
            if lib.nx_vm_now(call.native, second) or not np.array_equal(dst, src):
                wrong.append(number)
        call.close()

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_second_thread_sleeps_when_there_is_nothing_to_do(second: Any) -> None:
    src, dst = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
    call = Call(src, dst, [])
    until_joined(call, second)
    (task,) = [path for path in Path("/proc/self/task").iterdir() if (path / "comm").read_text().strip() == "nixl-second"]

    end = time.monotonic() + 30
    while (state := (task / "stat").read_text().rpartition(")")[2].split()[0]) != "S":
        assert time.monotonic() < end, state
    # Awake again, it takes part again.
    until_joined(call, second)
    call.close()
