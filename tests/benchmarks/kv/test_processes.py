"""Ranks as processes: what goes wrong is told, and none is left however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.kv.matrices import Pattern
from nixl_async.benchmarks.kv.processes import RanksFailed, check_memory, run_ranks
from nixl_async.errors import ConfigurationError

SLEEPY = Pattern(((0, 1024), (1024, 0)), "sleepy", "dram", sleep_before=60.0)


def setups(pattern: Pattern = SLEEPY, **changes: Any) -> list[dict[str, Any]]:
    setup = {
        "job": "traffic",
        "patterns": [pattern.as_dict()],
        "sequential": True,
        "iters": 1,
        "isolated_iters": 1,
        "warmup": 1,
        "verify": True,
        "backends": ["samehost"],
        "memory": "dram",
        "token": "secret",
    }
    return [setup | changes] * 2


class Watch:
    """Notes the processes that were started, and when all of them have come to the sequence."""

    def __init__(self) -> None:
        self.pids: dict[int, int] = {}
        self.asleep = asyncio.Event()
        self._isolated: set[int] = set()

    def __call__(self, rank: int, message: dict[str, Any]) -> None:
        if message["event"] == "started":
            self.pids[rank] = message["pid"]
        elif message["event"] == "isolated":
            self._isolated.add(rank)
            if len(self._isolated) == len(self.pids):
                self.asleep.set()

    def left(self) -> list[int]:
        return [pid for pid in self.pids.values() if Path(f"/proc/{pid}").exists()]


async def test_a_job_that_is_cancelled_leaves_no_process() -> None:
    watch = Watch()
    task = asyncio.create_task(run_ranks(setups(), watch))
    await asyncio.wait_for(watch.asleep.wait(), 60)
    assert len(watch.left()) == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watch.left() == []


async def test_a_rank_that_is_killed_ends_the_job() -> None:
    watch = Watch()
    task = asyncio.create_task(run_ranks(setups(), watch))
    await asyncio.wait_for(watch.asleep.wait(), 60)
    os.kill(watch.pids[1], signal.SIGKILL)
    with pytest.raises(RanksFailed, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
        await asyncio.wait_for(task, 30)
    assert watch.left() == []


async def test_what_a_rank_says_of_its_failure_is_told() -> None:
    watch = Watch()
    with pytest.raises(RanksFailed, match="rank [01]: ConfigurationError: .*'warp'"):
        await run_ranks(setups(backends=["warp"]), watch)
    assert watch.left() == []


async def test_a_fault_of_a_rank_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RanksFailed, match="rank 0"):
        await run_ranks(setups(job="nothing"))
    assert "KeyError" in capfd.readouterr().err


def test_what_does_not_fit_into_memory_is_refused() -> None:
    check_memory(1, 1, "")
    with pytest.raises(ConfigurationError, match=r"3 processes need 1048576\.2 GiB and .* are available: be modest"):
        check_memory(1 << 50, 3, "be modest")
