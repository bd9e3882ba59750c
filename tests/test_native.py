"""The compiled module: built for the stable ABI, and its copies stop when told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nixl_async import native
from nixl_async.native import ffi, int64, lib
from nixl_async.testing import assert_same, pattern


def _arrays(*columns: list[int]) -> list[np.ndarray]:
    return [np.array(column, np.int64) for column in columns]


def test_the_module_serves_every_python_from_3_11_on() -> None:
    found = list(Path(native.__file__).parent.glob("_native*.so"))
    assert [path.name for path in found] == ["_native.abi3.so"]


def test_segments_are_copied_in_order_and_overlap_is_safe() -> None:
    memory = pattern(4096, 1)
    expected = memory.copy()
    expected[100:1100] = memory[0:1000]
    at = memory.ctypes.data
    dst, src, lengths = _arrays([at + 100], [at], [1000])
    assert lib.nx_copy_segments(int64(dst), int64(src), int64(lengths), 1, ffi.NULL) == 1000
    assert_same(memory, expected)


def test_a_copy_that_is_told_to_stop_stops_at_the_next_mebibyte() -> None:
    src, dst = np.ones(8 << 20, np.uint8), np.zeros(8 << 20, np.uint8)
    stop = ffi.new("int32_t *", 1)
    columns = _arrays([dst.ctypes.data], [src.ctypes.data], [8 << 20])
    assert lib.nx_copy_segments(*map(int64, columns), 1, stop) == 1 << 20
    assert int(dst.sum()) == 1 << 20


def test_copies_between_processes_report_errno() -> None:
    memory = np.zeros(8, np.uint8)
    spent = ffi.new("int64_t *")
    columns = _arrays([memory.ctypes.data], [8], [8])
    assert lib.nx_process_vm(os.getpid(), False, *map(int64, columns), 1, ffi.NULL, spent) == -errno.EFAULT
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert lib.nx_process_vm(ended.pid, False, *map(int64, columns), 1, ffi.NULL, spent) == -errno.ESRCH


def test_this_process_is_a_process_too() -> None:
    src, dst = pattern(3 << 20, 1), np.zeros(3 << 20, np.uint8)
    spent = ffi.new("int64_t *")
    cuts = np.array([0, 5, 1 << 20, (1 << 20) + 3, 3 << 20], np.int64)
    starts, lengths = cuts[:-1], np.diff(cuts)
    local, remote = src.ctypes.data + starts, dst.ctypes.data + starts
    status = lib.nx_process_vm(os.getpid(), True, int64(local), int64(remote), int64(lengths), 4, ffi.NULL, spent)
    assert (status, spent[0] > 0) == (0, True)
    assert_same(dst, src)


def test_only_contiguous_arrays_become_pointers() -> None:
    with pytest.raises((BufferError, ValueError)):
        int64(np.zeros((4, 4), np.int64)[:, ::2])


def test_a_missing_module_says_how_to_get_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['nixl_async.native._native'] = None\n"
        "from nixl_async.errors import MissingDependency\n"
        "try: import nixl_async.native\n"
        "except MissingDependency as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "builder.py" in ran.stdout
