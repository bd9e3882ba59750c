"""The sweep: which points there are, which are measured again, and real ones beside NIXL."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from bench.record.ratios import SLOWER
from bench.record.sweep import NIXL, QUICK, SHAPE, Sweep, ratio_of
from nixl_async.benchmarks.transfer.conductor import OURS, Round, Step
from nixl_async.benchmarks.transfer.peers.plain import Point

NONE = np.zeros(0)


def step(ours: tuple[float, ...], nixl: tuple[float, ...] = ()) -> Step:
    """Make a step of rounds of those speeds."""

    def rounds(speeds: tuple[float, ...]) -> list[Round]:
        return [Round(one, one, 1.0, 1, NONE, NONE, np.ones(1), 0.1, None, "tcp") for one in speeds]

    return Step(Point(4096, 1), {OURS: rounds(ours)} | ({NIXL: rounds(nixl)} if nixl else {}))


def sweep(backend: str = "samehost", nixl_python: str = "", **more: Any) -> Sweep:
    return Sweep(backend, QUICK, nixl_python, 0.0, lambda text: None, **({"warn": lambda text: None} | more))


def test_the_points_are_those_of_the_promise() -> None:
    points = list(SHAPE.options("tcp", "").points())
    blocks = [4096 * 4**n for n in range(8)]
    assert {one.block for one in points} == set(blocks)
    assert {one.batch for one in points} == {1, 4, 16, 64, 256}
    left_out = {(block, batch) for block in blocks for batch in (1, 4, 16, 64, 256)} - {
        (one.block, one.batch) for one in points
    }
    assert left_out == {(16 << 20, 256), (64 << 20, 64), (64 << 20, 256)}
    assert max(one.block * one.batch for one in points) == 1 << 30


def test_a_ratio_is_of_points_that_nixl_has_too() -> None:
    assert ratio_of(step((1.0,))) is None
    ratio = ratio_of(step((1.0, 4.0), (2.0, 2.0)))
    assert ratio is not None
    assert ratio.median == 1.25


def test_points_in_doubt_are_measured_again_first_then_the_noisy() -> None:
    one = sweep()
    sure, slow = step((2.0, 2.0), (1.0, 1.0)), step((0.5, 0.5), (1.0, 1.0))
    doubtful, doubtful_longer = step((0.9, 1.0), (1.0, 1.0)), step((0.9, 1.0, 0.9)[: QUICK.most_rounds], (1.0,) * 3)
    noisy, noisier, alone = step((2.0, 3.0), (1.0, 1.0)), step((2.0, 9.0), (1.0, 1.0)), step((1.0, 1.0))
    one.steps = [noisy, sure, noisier, slow, doubtful, doubtful_longer, alone]
    # Who has had as many rounds as there may be is done.
    assert QUICK.most_rounds == 3
    assert [id(found) for found in one._open()] == [id(doubtful), id(noisier), id(noisy)]
    assert SLOWER == 0.95


async def test_a_sweep_without_nixl_measures_ours_and_says_who_is_absent() -> None:
    warnings: list[str] = []
    one = sweep("tcp", sys.executable, warn=warnings.append)
    await one.run()
    assert any(text.startswith("nixl is absent") for text in warnings)
    rows = one.rows()
    assert {row.contender for row in rows} == {OURS}
    assert {row.route for row in rows} == {"tcp"}
    points = {(row.op, row.block_nbytes, row.parameters["batch"]) for row in rows}
    assert points == {
        (op, block, batch)
        for op in ("write", "read")
        for block, batch in ((4096, 1), (4096, 4), (16384, 1), (16384, 4), (65536, 1))
    }
    for row in rows:
        assert len(row.throughput) == len(row.phases["request"]["p50"]) == QUICK.rounds
        assert min(row.throughput) > 0


@pytest.mark.nixl
async def test_a_sweep_beside_nixl(nixl_python: str) -> None:
    said: list[str] = []
    one = Sweep("samehost", QUICK, nixl_python, 60.0, said.append, said.append)
    await one.run()
    assert {row.contender for row in one.rows()} == {OURS, NIXL}
    ratios = [ratio_of(found) for found in one.steps]
    assert len(ratios) == 10
    # Who left a doubt has had all the rounds that there are, since there was time.
    assert all(found is not None and (not found.doubtful or found.rounds == QUICK.most_rounds) for found in ratios)
    assert any(text.startswith("point 10 of 10: ") for text in said)
    assert not any("absent" in text for text in said)
