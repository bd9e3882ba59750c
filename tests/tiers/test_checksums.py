"""Checksums of blocks: of the key and the bytes, however they are cut, and the same on every processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nixl_async.native import ffi, int64, lib
from nixl_async.testing import pattern
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import checksum_blocks
from tests.tiers.conftest import BLOCK, Bench

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
