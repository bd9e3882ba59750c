"""Requests and the processes that serve them: to the end, and when processes die, stop, or hold wrong bytes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.kv.processes import RanksFailed
from nixl_async.benchmarks.serve.fleet import DECODE, Fleet
from nixl_async.benchmarks.serve.leg import Case, Leg
from nixl_async.benchmarks.serve.metrics import Record, Round
from nixl_async.benchmarks.serve.options import Configuration, Options, Served, configurations, make, requests_of
from nixl_async.benchmarks.serve.run import setups
from tests.benchmarks.serve.made import TINY, write_model


def options(directory: Path, **given: Any) -> Options:
    return make({**TINY, "model": write_model(directory), **given})


def told(chosen: Options) -> list[dict[str, Any]]:
    return setups(chosen, Served.of(chosen, requests_of(chosen, 0)), "")


async def serve(
    fleet: Fleet, chosen: Options, number: int = 0, changed: Any = lambda records: None, by: Configuration | None = None
) -> Round:
    case = Case(requests_of(chosen, 0), chosen.hash_tokens, 1, chosen.page_size, chosen.timeout, 0.5)
    return await Leg(fleet, case, number, by or configurations(chosen)[0], changed).run()


class Striker:
    """Sends a signal to the decode process of the first request that prefill has done with and decode has not."""

    def __init__(self, fleet: Fleet, number: signal.Signals) -> None:
        self.fleet, self.number, self.struck = fleet, number, ""

    def __call__(self, records: list[Record]) -> None:
        for record in records:
            if not self.struck and record.request.number >= 0 and record.said and not record.told:
                self.struck = record.decode
                one = next(one for one in self.fleet.processes if one.role == record.decode)
                os.kill(one.process.pid, self.number)


async def test_decode_processes_die_or_stop_one_after_the_other(tmp_path: Path) -> None:
    # Answers that take about half a second: whoever is struck has requests at hand.
    long = options(tmp_path, decode=2, osl=50, speed=2e-5, requests=8)
    short = options(tmp_path, decode=2)
    async with Fleet(told(long)) as fleet:
        striker = Striker(fleet, signal.SIGKILL)
        first = await serve(fleet, long, 0, striker)
        lost = [one for one in first.records if one.error]
        assert {one.decode for one in lost} == {striker.struck}
        assert first.done
        assert len(first.done) + len(lost) == 8
        assert any("was killed by SIGKILL" in one.error or "PeerLost" in one.error for one in lost)
        # The other one goes on.
        assert [one.role for one in fleet.living(DECODE)] == [f"decode-{1 - int(striker.struck[-1])}"]
        assert len((await serve(fleet, short, 1)).done) == 6
        # One that is stopped keeps nobody waiting; it does not answer in the end either, and is killed.
        bounded = options(tmp_path, decode=2, osl=50, speed=2e-5, timeout=1.5)
        stopped = await serve(fleet, bounded, 2, Striker(fleet, signal.SIGSTOP))
        assert {one.error for one in stopped.records if not one.done} == {"it took longer than 1.5 s"}
        assert not fleet.living(DECODE)
        alone = await serve(fleet, short, 3)
        assert {one.error for one in alone.records} == {"no decode process is left"}
    assert all(one.process.returncode is not None for one in fleet.processes)


async def test_wrong_bytes_end_the_run(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    prefill, decode = told(chosen)
    # Decode takes each page for another one of its block.
    async with Fleet([prefill, {**decode, "block_tokens": 32}]) as fleet:
        with pytest.raises(RanksFailed, match=r"decode-0: request 0: \d+ of 16 pages of layer 0 hold wrong bytes"):
            await serve(fleet, chosen)


async def test_processes_that_cannot_start_are_named(tmp_path: Path) -> None:
    prefill, decode = told(options(tmp_path))
    with pytest.raises(RanksFailed, match="decode-0: ConfigurationError: no backend is called 'warp'"):
        async with Fleet([prefill, {**decode, "backends": ["warp"]}]):
            pass
