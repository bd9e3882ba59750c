"""Checksums of blocks: of the key and the bytes, however they are cut, and the same on every processor."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async.native import ffi, int64, lib
from nixl_async.testing import pattern
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import SummedMove, checksum_blocks, new_turn
from tests.tiers.conftest import BLOCK, Bench, N

# The check value of CRC-64/NVME in the NVM Express NVM Command Set Specification: over "123456789".
DIGITS, CHECK = b"123456789", 0xAE8B14860A799888
FUNCTIONS = [lib.nx_crc64nvme, lib.nx_crc64nvme_plain]


def _crc(function: Any, data: bytes, before: int = 0) -> int:
    kept = np.frombuffer(data or b"x", np.uint8)
    found = np.array([before], np.uint64)
    addresses, lengths = np.array([kept.ctypes.data], np.int64), np.array([len(data)], np.int64)
    function(int64(addresses), int64(lengths), 1, 1, ffi.from_buffer("uint64_t[]", found, require_writable=True))
    return int(found[0])


def _bitwise(data: bytes) -> int:
    crc = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFFFFFFFFFF


@pytest.mark.parametrize("function", FUNCTIONS, ids=["fastest", "plain"])
def test_it_is_the_one_of_the_standard(function: Any) -> None:
    assert _crc(function, DIGITS) == CHECK
    assert _crc(function, DIGITS[4:], _crc(function, DIGITS[:4])) == CHECK


@pytest.mark.parametrize("function", FUNCTIONS, ids=["fastest", "plain"])
def test_all_lengths_and_alignments(function: Any) -> None:
    data = pattern(2000, 3).tobytes()
    for length in (0, 1, 7, 8, 15, 16, 127, 128, 129, 143, 144, 255, 256, 257, 300, 1024, 1999):
        for start in (0, 1, 5, 8):
            part = data[start : start + length]
            assert _crc(function, part) == _bitwise(part), (length, start)


def test_a_checksum_covers_key_and_bytes_and_not_how_they_are_cut(bench: Bench) -> None:
    keys = [b"key", b"kez", b"a longer key"]
    whole = checksum_blocks(keys, Blocks.of(bench.src([3, 3, 3]), 3, BLOCK)).tolist()
    cut = checksum_blocks(keys, Blocks.of(bench.source.pages(np.tile(range(24, 32), 3), BLOCK // 8), 3, BLOCK)).tolist()
    assert whole == cut
    assert len(set(whole)) == 3
    data = bench.data[3 * BLOCK : 4 * BLOCK].tobytes()
    assert whole == [_crc(lib.nx_crc64nvme_plain, key + data) for key in keys]
    bench.data[4 * BLOCK - 1] ^= 1
    assert not set(whole) & set(checksum_blocks(keys, Blocks.of(bench.src([3, 3, 3]), 3, BLOCK)).tolist())


def _move(fd: int, keys: list[bytes], blocks: Blocks, slots: Any, turn: Any = None) -> SummedMove:
    offsets = np.asarray(slots, np.int64) * BLOCK
    return SummedMove(keys, blocks, np.full(len(keys), fd, np.int32), offsets, turn)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "segment", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_blocks_are_moved_and_summed_up_in_one_go(bench: Bench, file: int) -> None:
    slots = np.random.default_rng(1).permutation(N)
    put = _move(file, bench.keys, Blocks.of(bench.src(), N, BLOCK), slots, new_turn())
    put.run()
    assert put.done.all()
    assert np.array_equal(put.sums, checksum_blocks(bench.keys, Blocks.of(bench.src(), N, BLOCK)))
    # In pieces: what lies in two pages of the file's order may lie anywhere in memory.
    cut = bench.target.pages(np.arange(8 * N), BLOCK // 8)
    get = _move(file, bench.keys, Blocks.of(cut, N, BLOCK), slots)
    threads = [threading.Thread(target=get.run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert get.done.all()
    assert bench.right()
    assert np.array_equal(get.sums, put.sums)


def test_what_is_behind_the_end_or_cannot_be_written_is_not_done(bench: Bench, file: int, tmp_path: Path) -> None:
    os.write(file, bench.data[: 2 * BLOCK + 5].tobytes())
    get = _move(file, bench.keys[:4], Blocks.of(bench.dst(range(4)), 4, BLOCK), range(4))
    get.run()
    assert get.done.tolist() == [True, True, False, False]
    assert get.sums[:2].tolist() == checksum_blocks(bench.keys[:2], Blocks.of(bench.src(range(2)), 2, BLOCK)).tolist()
    readonly = os.open(tmp_path / "segment", os.O_RDONLY)
    put = _move(readonly, bench.keys[:4], Blocks.of(bench.src(range(4)), 4, BLOCK), range(4), new_turn())
    put.run()
    os.close(readonly)
    assert not put.done.any()
    # With very many ranges it does not begin.
    many = Blocks.of(bench.target.pages(np.arange(BLOCK), 1), 1, BLOCK)
    left = _move(file, bench.keys[:1], many, [0])
    left.run()
    assert not left.done.any()


def test_a_move_that_is_stopped_ends(bench: Bench, file: int) -> None:
    put = _move(file, bench.keys, Blocks.of(bench.src(), N, BLOCK), range(N), new_turn())
    put.stop()
    put.run()
    assert not put.done.any()
    assert os.fstat(file).st_size == 0
