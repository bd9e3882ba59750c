"""Every row that is lost, and no other."""

from __future__ import annotations

import pytest

from bench.record.losses import case_text, cells, judged, losses, lost, misses, peers
from bench.report import Figure
from tests.record.made import row, suite, sweep


@pytest.mark.parametrize(
    ("mine", "theirs", "unit", "is_lost"),
    [
        (0.94, 1.0, "GB/s", True),
        (0.96, 1.0, "GB/s", False),
        (1.06, 1.0, "us", True),
        (1.04, 1.0, "us", False),
        (2.0, 1.0, "CPU s/GB", True),
        (1.0, 2.0, "% of a core", False),
    ],
)
def test_lost_is_worse_by_more_than_5_percent_whatever_the_unit(mine: float, theirs: float, unit: str, is_lost: bool) -> None:
    part = suite("throughput", [row(mine, theirs, unit)])
    assert lost(part.rows[0], part.rows[0].others[0]) is is_lost
    assert len(losses([part])) == is_lost


def test_part_by_part_the_worst_comes_first_with_both_figures_and_the_peer() -> None:
    first = suite("throughput", [row(9.0, 10.0), row(1.0, 4.0, label="Mooncake", path="tcp", op="read", page=65536, blocks=3)])
    one, two, three = losses([first, suite("latency", [row(1.0, 9.0)])])
    assert (one.part, one.peer, one.case, one.ours, one.theirs, one.ratio) == (
        "throughput", "Mooncake", "tcp, read, page 64 KiB, blocks 3", "1 GB/s", "4 GB/s", 0.25,
    )  # fmt: skip
    assert (two.peer, two.ratio, three.part) == ("NIXL", 0.9, "latency")


def test_a_row_is_lost_once_to_the_best_and_the_others_are_named() -> None:
    made = row(1.0, 2.0)
    made.others += [Figure("Mooncake", (4.0,)), Figure("obstore", (0.5,))]
    (loss,) = losses([suite("throughput", [made])])
    assert (loss.peer, loss.ratio, loss.also) == ("Mooncake", 0.25, "NIXL 0.50")


@pytest.mark.parametrize("label", ["nixl_async ucx", "nixl_async, uvloop", "verify=crc32c", "spans recorded"])
def test_our_own_variants_are_no_peers(label: str) -> None:
    part = suite("throughput", [row(1.0, 9.0, label=label)])
    assert peers(part.rows[0]) == []
    assert losses([part]) == []
    assert judged([part])["worse"] == 0


def test_overlapping_quartiles_are_told() -> None:
    apart, near = row(1.0, 2.0), row(1.0, 2.0)
    near.ours = Figure("nixl_async", (0.5, 1.0, 3.0, 4.0, 0.9))
    assert [one.doubt for one in losses([suite("throughput", [apart])])] == [""]
    assert [one.doubt for one in losses([suite("throughput", [near])])] == ["quartiles overlap"]


def test_the_points_of_a_sweep() -> None:
    part = sweep("sweep-tcp", {
        ("write", 4096, 1): ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
        ("write", 4096, 4): ((0.9, 0.9, 1.2), (1.0, 1.0, 1.0)),
        ("read", 65536, 1): ((1.0,), None),
    })  # fmt: skip
    found = {(cell.op, cell.block, cell.batch): cell for cell in cells(part)}
    assert [cell.ratio.median if cell.ratio else None for cell in found.values()] == [2.0, 0.9, None]
    (loss,) = losses([part])
    assert (loss.part, loss.case, loss.peer, loss.ratio) == ("sweep-tcp", "write, 4 KiB x 4", "NIXL", 0.9)
    assert loss.doubt == "3 rounds: 0.90 to 1.20"
    assert found["read", 65536, 1].nixl is None


def test_a_point_that_moves_more_but_whose_median_request_is_slower_is_lost_too() -> None:
    part = sweep("sweep-tcp", {("write", 4096, 1): ((2.0,), (1.0,))}, p50=(30, 15))
    (loss,) = losses([part])
    assert (loss.case, loss.ours, loss.theirs, loss.ratio) == ("write, 4 KiB x 1, median request", "30 us", "15 us", 0.5)
    (loss,) = losses([sweep("sweep-tcp", {("write", 4096, 1): ((0.5,), (1.0,))}, p50=(30, 15))])
    assert (loss.case, loss.ratio, loss.also) == ("write, 4 KiB x 1", 0.5, "median request 30 us, its 15 us: 0.50")


def test_targets_that_are_missed() -> None:
    bad, good, quick = row(1.0, 1.0), row(9.0, 1.0), row(1.0, 1.0)
    bad.at_least("NIXL", 2.0)
    good.at_least("NIXL", 2.0)
    quick.at_least("NIXL", 2.0)
    quick.checks = [type(check)(check.target, check.value, None, check.shown) for check in quick.checks]
    part = suite("throughput", [bad, good, quick])
    assert [(one.target, one.found) for one in misses([part])] == [(">= 2x NIXL", "1.00x")]
    count = judged([part])
    assert (count["met"], count["missed"], count["not judged"]) == (1, 1, 1)
    assert (count["better"], count["equal"], count["worse"]) == (1, 2, 0)


def test_a_case_in_words() -> None:
    assert case_text({"path": "tcp", "page": 1 << 20, "p99.9 of": "wall lag"}) == "tcp, page 1 MiB, p99.9 of wall lag"
