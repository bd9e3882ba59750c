"""Bytes that prove where they came from, as every contender's process makes and checks them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from nixl_async.benchmarks.transfer.peers.plain import Point, allocate, count_wrong, fill


@pytest.mark.parametrize("nbytes", [8, 24, 1000, 4096, 4097, 3, (1 << 19) + 8])
def test_every_wrong_misplaced_or_stale_block_is_found(nbytes: int) -> None:
    count = 6
    source, target = allocate(nbytes * count), allocate(nbytes * count)
    fill(source, 5)
    order = np.random.default_rng(1).permutation(count)
    places, sources = order * nbytes, np.arange(count) * nbytes
    for place, start in zip(places.tolist(), sources.tolist(), strict=True):
        target[place : place + nbytes] = source[start : start + nbytes]
    assert count_wrong(target, places, sources, nbytes, 5) == 0
    assert count_wrong(target, places, sources, nbytes, 6) == count
    target[places[2] + nbytes - 1] ^= 1
    assert count_wrong(target, places, sources, nbytes, 5) == 1
    assert count_wrong(target, places[::-1], sources, nbytes, 5) >= count - 1


def test_a_block_that_begins_within_a_word_is_compared_too() -> None:
    source = allocate(4096)
    fill(source, 9)
    target = source[13:1013].copy()
    assert count_wrong(target, np.array([0]), np.array([13]), 1000, 9) == 0
    assert count_wrong(target, np.array([0]), np.array([14]), 1000, 9) == 1


def test_no_two_sources_have_the_same_salt() -> None:
    salts = [
        Point(8, 1, salt=salt).salt_of(role, index)
        for salt in range(1, 50)
        for role in ("initiator", "target")
        for index in range(-1, 64)
    ]
    assert len(set(salts)) == len(salts)


def test_huge_pages_are_there_or_the_error_says_how_many_are_needed() -> None:
    free = int(re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[1])  # type: ignore[index]
    if free >= 2:
        assert len(allocate(3 << 20, hugepages=True)) == 3 << 20
    else:
        with pytest.raises(OSError, match=r"2 free huge pages of 2 MiB are needed.*/proc/sys/vm/nr_hugepages"):
            allocate(3 << 20, hugepages=True)
