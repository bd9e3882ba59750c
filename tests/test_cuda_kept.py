"""Plans that devices are told of once: as long as they live, as much as there is room for. Of a device: tests/gpu."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from nixl_async import BackendError
from nixl_async.cuda_kept import KEPT_NBYTES, MIN_SEGMENTS, KeptPlans
from nixl_async.cuda_lanes import Lanes
from nixl_async.descriptors import Plan
from tests.cuda_host import Host, stand_in

N = MIN_SEGMENTS


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return stand_in(monkeypatch)


@pytest.fixture
async def kept(host: Host) -> AsyncIterator[KeptPlans[str]]:
    lanes = Lanes(asyncio.get_running_loop(), "test")
    made: KeptPlans[str] = KeptPlans(lanes)
    yield made
    await made.aclose()
    await lanes.aclose()


def plan(n: int = N) -> Plan:
    lengths = np.full(n, 16)
    return Plan(None, None, lengths, 16 * n, ())  # type: ignore[arg-type]


def describing(one: Plan, beside: str = "beside") -> Any:
    return lambda lane, take: (lane.describe(one.lengths, one.lengths, one.lengths, take=take), beside)


async def test_a_plan_is_known_as_long_as_it_lives(host: Host, kept: KeptPlans[str]) -> None:
    first, second = plan(), plan()
    for one in (first, first, second):
        await kept.keep(one, 0, describing(one))
    found = kept.find(first)
    assert found is not None
    assert (len(host.described), found.beside) == (2, "beside")
    assert host.described[0] != host.described[1]
    del one, first, found
    gc.collect()
    third = plan()
    await kept.keep(third, 0, describing(third))
    # Where the first was.
    assert host.described[2] == host.described[0]
    assert kept.find(second) is not None
    assert host.allocated == {0: KEPT_NBYTES}
    await kept.aclose()
    assert kept.find(second) is None
    assert host.freed == [0x1000]


async def test_few_segments_are_not_worth_it(host: Host, kept: KeptPlans[str]) -> None:
    one = plan(N - 1)
    await kept.keep(one, 0, describing(one))
    assert kept.find(one) is None
    assert host.allocated == {}


@pytest.mark.parametrize("is_full", [True, False])
async def test_where_there_is_no_room_plans_are_not_kept(
    host: Host, kept: KeptPlans[str], monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    monkeypatch.setattr("nixl_async.cuda_kept.KEPT_NBYTES", 16 * N)
    host.is_full = is_full
    plans = [plan(), plan()]
    for one in plans:
        await kept.keep(one, 0, describing(one))
    assert [kept.find(one) is not None for one in plans] == [not is_full, False]


async def test_what_cannot_be_described_takes_no_room(
    host: Host, kept: KeptPlans[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nixl_async.cuda_kept.KEPT_NBYTES", 16 * N)

    def fails(lane: Any, take: Any) -> Any:
        assert take(16 * N) is not None
        raise BackendError("the device is on fire")

    one = plan()
    with pytest.raises(BackendError, match="on fire"):
        await kept.keep(one, 0, fails)
    await kept.keep(one, 0, describing(one))
    assert kept.find(one) is not None
