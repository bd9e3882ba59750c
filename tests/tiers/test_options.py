"""Tiers that cannot work are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from nixl_async import ConfigurationError
from nixl_async.tiers import DRAM, Files, Objects, Outcome
from nixl_async.tiers.options import check_options

MIB = 1 << 20


@pytest.mark.parametrize(
    ("tiers", "block_nbytes", "says"),
    [
        ([], 4096, "tiers is empty"),
        ([DRAM(MIB)], 0, "block_nbytes is 0"),
        ([DRAM(MIB)], 4096.0, "block_nbytes is 4096.0"),
        ([Files("a", MIB), Files("b", MIB)], 4096, "name of its own"),
        ([Files("a", MIB), DRAM(MIB)], 4096, "DRAM is tier 2"),
        ([DRAM(100)], 4096, "'dram' of 100 bytes holds no block of 4096"),
        ([DRAM(MIB, ttl=0)], 4096, "ttl of tier 'dram' is 0"),
        ([Files("a", MIB, segment_nbytes=10)], 4096, "segment_nbytes is 10"),
        ([MIB], 4096, "is none of DRAM, Files, Objects"),
    ],
)
def test_refused(tiers: list[Any], block_nbytes: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_options(tiers, block_nbytes)


def test_accepted() -> None:
    check_options([DRAM(MIB), Files("a", MIB), Files("b", MIB, name="slow"), Objects("s3://bucket")], 4096)


def test_an_outcome_is_true_when_the_block_is_where_it_was_asked_for() -> None:
    assert Outcome("dram", ok=True)
    assert not Outcome()
