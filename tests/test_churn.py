"""The elastic drill passes, notices what is done wrong on purpose, and leaves nothing; what it judges by, without a fleet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.churn import ledger
from bench.churn.etcd import INSTALL, program
from bench.churn.ledger import Count, Ledger
from bench.churn.lending import Lending, Lent
from bench.churn.network import PREFIX
from bench.churn.options import INJECTED, Options
from bench.churn.pages import PAGE_NBYTES, Pages, owner_salt
from bench.churn.plan import LEAST, LINKS, SECONDS, Action, is_remote, make_plan, names
from bench.churn.records import Done, Event, Failure, First, Life, Records
from bench.churn.verdict import GROWTH_NBYTES, Verdict, judge

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--prefill", "6", "--decode", "3", "--rate", "40"]
needs_etcd = pytest.mark.skipif(program() is None, reason=f"etcd is not installed: {INSTALL}")


@dataclass
class Ran:
    """What a drill left: its exit status, its result and what it said meanwhile."""

    status: int
    result: dict[str, Any]
    said: str


def drill(*arguments: str) -> subprocess.Popen[str]:
    """Start a drill."""
    command = [sys.executable, "-m", "bench.churn", *arguments, "--format", "json"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def drills() -> dict[str, Ran]:
    """Run two drills side by side, as both wait most of the time: one in which nothing is wrong, one with what is put there.

    The machine may be busy with other things: the first is given more time than by default, and no byte less is checked.
    """
    wrongs = [part for wrong in INJECTED for part in ("--inject", wrong)]
    fleet = ["--prefill", "5", "--decode", "3", "--rate", "30", "--limit", "2", "--namespaces", "no"]
    with (
        drill("--seconds", "60", "--seed", "2", "--limit", "8", "--allowance", "6", *SMALL) as right,
        drill("--seconds", "20", *fleet, *wrongs) as wrong,
        ThreadPoolExecutor(2) as threads,
    ):
        try:
            printed = list(threads.map(lambda each: each.communicate(timeout=230), (right, wrong)))
        finally:
            for process in (right, wrong):
                process.kill()
    ran = [
        Ran(each.returncode, json.loads(out or "{}"), said) for each, (out, said) in zip((right, wrong), printed, strict=True)
    ]
    return dict(zip(("right", "wrong"), ran, strict=True))


# Whole drills.


@needs_etcd
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_in_which_everything_breaks_loses_nothing(drills: dict[str, Ran]) -> None:
    ran = drills["right"]
    result = ran.result
    assert ran.status == 0, result.get("faults") or ran.said
    assert result["faults"] == []
    expected = set(SECONDS)
    assert expected <= set(result["actions"]), result["actions"]
    total = result["total"]
    assert total["requests_done"] > 200
    assert total["pages_checked"] > 1000
    assert total["requests"] == total["requests_done"] + total["requests_failed"] + result["died_with"]["requests"]
    assert total["transfers"] == total["transfers_done"] + total["transfers_failed"] + result["died_with"]["transfers"]
    assert set(result["nbytes_by_route"]) == {"samehost", "tcp"}
    assert {"death", "leave"} <= set(result["detected_seconds"])


@needs_etcd
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_is_wrong_on_purpose_is_noticed(drills: dict[str, Ran]) -> None:
    ran = drills["wrong"]
    result = ran.result
    assert ran.status == 1, ran.said
    for words in ("hold wrong bytes", "has no end", "put there on purpose"):
        assert any(words in fault for fault in result["faults"]), (words, result["faults"])
    assert result["total"]["requests_done"] > 50


@needs_etcd
@pytest.mark.slow
def test_an_interrupted_drill_says_what_it_saw_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.churn", "--seconds", "300", "--prefill", "5", "--decode", "3", "--format", "json"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # The first action shows that the fleet is at work.
    for line in process.stderr:
        if " s  " in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    result = json.loads(out)
    assert result["interrupted"]
    assert result["total"]["requests_done"] > 0
    assert list(tmp_path.iterdir()) == []
    assert not list(Path("/run/netns").glob(f"{PREFIX}-{process.pid}-*"))
    running = subprocess.run(["pgrep", "-f", "bench.churn.member"], capture_output=True, text=True, check=False)
    assert all(_parent(int(pid)) != process.pid for pid in running.stdout.split())


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


# The plan.


@given(st.integers(0, 10_000), st.sampled_from([(60, 6, 3), (60, 24, 8), (300, 24, 8)]))
def test_a_plan_spares_enough_and_leaves_who_was_hit_alone(seed: int, size: tuple[int, int, int]) -> None:
    seconds, prefill, decode = size
    plan = make_plan(seed, seconds, prefill, decode)
    assert plan == make_plan(seed, seconds, prefill, decode)
    alive, busy = set(names(prefill, decode)), defaultdict(float)
    for action in plan:
        assert action.at + action.seconds + 3 <= seconds
        for name in action.targets:
            assert name in alive, action
            assert busy[name] <= action.at, action
            assert action.kind not in LINKS or is_remote(name)
            busy[name] = action.at + action.seconds
        spared = [name for name in alive if name not in action.targets and busy[name] <= action.at]
        for role, least in LEAST.items():
            assert sum(name.startswith(role) for name in spared) >= least, action
        if action.kind in ("replace", "die"):
            alive -= set(action.targets)
        if action.added:
            assert action.added not in alive
            alive.add(action.added)


def test_five_minutes_hold_every_kind() -> None:
    for seed in range(20):
        plan = make_plan(seed, 300, 24, 8)
        assert {action.kind for action in plan} == set(SECONDS)
        assert len(plan) > 50
        assert {action.kind for action in make_plan(seed, 60, 6, 3, only=["gap", "kill"])} == {"gap", "kill"}


# Bytes.


def test_a_page_of_anybody_else_is_wrong() -> None:
    pages = Pages(8)
    places = pages.take(4)
    assert places is not None
    salt = owner_salt("prefill-0", "abc")
    pages.fill(places, salt, 7)
    assert pages.count_wrong(places, salt, 7, places) == 0
    assert pages.count_wrong(places, owner_salt("prefill-0", "abd"), 7, places) == 4
    assert pages.count_wrong(places, salt, 8, places) == 4
    assert pages.count_wrong(places, salt, 7, [places[1], places[0], *places[2:]]) == 2
    pages.spoil(places[2])
    assert pages.count_wrong(places, salt, 7, places) == 1


def test_what_is_written_to_free_pages_is_noticed() -> None:
    pages = Pages(4)
    taken = pages.take(2)
    assert taken == [0, 1]
    pages.fill(taken, 1, 1)
    pages.give_back(taken)
    assert pages.audit() == 0
    pages.memory[PAGE_NBYTES + 5] = 0
    assert pages.audit() == 1
    assert pages.take(5) is None
    assert pages.take(4) == [2, 3, 0, 1]
    assert pages.overwritten == 1
    assert np.shares_memory(pages.memory, pages.memory[:1])


def test_a_killed_process_has_counted_until_its_end(tmp_path: Path) -> None:
    path = tmp_path / "one"
    ledger.create(path)
    program = (
        "import os, signal, sys; from pathlib import Path; from bench.churn.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.add('requests', 3); ledger.add('requests_done')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert ledger.read(path) == Count(requests=3, requests_done=1)
    assert ledger.read(path).open_requests == 2


def test_counters_are_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "one"
    ledger.create(path)
    counters = Ledger(path)
    counters.add("nbytes", 1 << 40)
    counters.close()
    assert ledger.read(path).nbytes == 1 << 40


# Pages that others may read or write.


def _lend(settle: float, *, cuts_off: bool) -> tuple[Pages, Lending, Lent]:
    pages = Pages(4)
    lending = Lending(pages, settle, cuts_off=cuts_off)
    taken = pages.take(3)
    assert taken is not None
    lent = Lent(taken, "prefill-0")
    lending.expose(7, lent)
    return pages, lending, lent


def test_pages_of_a_request_that_was_given_up_are_free_when_the_peer_answers() -> None:
    pages, lending, lent = _lend(60, cuts_off=False)
    assert (lent.holder, pages.free) == ("peer", 1)
    lending.answered(7, waited_for=False)
    assert pages.free == 4
    lending.answered(7, waited_for=False)
    lending.gone("prefill-0", left=False)
    assert pages.free == 4


def test_a_lost_process_of_this_host_may_write_until_it_has_joined_again() -> None:
    pages, lending, lent = _lend(0.0, cuts_off=False)
    lending.gone("prefill-1", left=False)
    lending.gone("prefill-0", left=False)
    lending.tick(time.monotonic() + 100)
    assert (lent.holder, pages.free) == ("nobody", 1)
    assert lending.quarantined == {"prefill-0": [0, 1, 2]}
    lending.joined("prefill-0")
    lending.tick(time.monotonic() + 1)
    assert pages.free == 4
    assert lending.quarantined == {}


@pytest.mark.parametrize(("cuts_off", "left"), [(True, False), (False, True)])
def test_who_is_cut_off_or_has_left_writes_no_more_after_a_while(cuts_off: bool, left: bool) -> None:
    pages, lending, _ = _lend(30.0, cuts_off=cuts_off)
    lending.gone("prefill-0", left=left)
    lending.tick(time.monotonic())
    assert pages.free == 1
    lending.tick(time.monotonic() + 31)
    assert pages.free == 4


def test_what_was_offered_is_free_when_it_was_read_or_its_time_is_over() -> None:
    pages = Pages(2)
    lending = Lending(pages, 1.0, cuts_off=True)
    for number in range(2):
        taken = pages.take(1)
        assert taken is not None
        lending.offer(("decode-0", number), taken, 100.0)
    lending.over(("decode-0", 0))
    lending.over(("decode-0", 0))
    assert pages.free == 1
    lending.tick(99.0)
    assert pages.free == 1
    lending.tick(101.0)
    assert pages.free == 2


# The verdict. The run goes from 1000 to 1100; decode-0 and prefill-1 are left alone, prefill-0 is killed at 1050.


def _life(name: str, **fields: Any) -> Life:
    count = Count(requests=10, requests_done=9, requests_failed=1)
    life = Life(name, 1, 1, 990.0, 995.0, 1100.5, code=0, expected_end=True, count=count, left=[])
    for field, value in fields.items():
        setattr(life, field, value)
    return life


def _run(**fields: Any) -> Records:
    killed = _life("prefill-0", ended=1050.0, killed=True, code=-9, left=None, count=Count(requests=10, requests_done=8))
    again = _life("prefill-0", number=2, started=1050.5, ready=1051.0)
    action = Action(50.0, "kill", ("prefill-0",), 0.5)
    records = Records(
        lives=[_life("decode-0"), _life("prefill-1"), killed, again],
        events=[
            Event("decode-0", 1, "joined", "prefill-0", 996.0, ""),
            Event("decode-0", 1, "joined", "prefill-1", 996.0, ""),
            Event("decode-0", 1, "lost", "prefill-0", 1050.2, "it ended"),
            Event("decode-0", 1, "joined", "prefill-0", 1051.5, ""),
        ],
        failures=[Failure("decode-0", 1, "request: ask", "prefill-0", "PeerLost", 1049.9, 1050.2, "it ended", "")],
        done=[Done(action, 1050.0, 1051.0, ("prefill-0",), (1,))],
        watches=[("decode-0", "prefill-0", 1051.0)],
        firsts=[First("decode-0", "prefill-0", 1051.7)],
        began=1000.0,
        ended=1100.0,
    )
    for field, value in fields.items():
        setattr(records, field, value)
    return records


def _judge(records: Records) -> Verdict:
    return judge(records, Options())


def _the_fault(records: Records) -> str:
    (fault,) = _judge(records).faults
    return fault


def test_a_run_in_which_all_went_well_is_passed() -> None:
    verdict = _judge(_run())
    assert verdict.faults == []
    assert verdict.detections == {"death": [pytest.approx(0.2)]}
    assert verdict.recoveries == {"kill": [pytest.approx(0.7)]}
    assert verdict.died_with == Count(requests=2)
    assert verdict.total.requests == 40
    assert verdict.outcomes["request: ask", "PeerLost", True] == 1


def test_a_failure_without_a_reason_is_a_fault() -> None:
    records = _run()
    records.failures.append(Failure("decode-0", 1, "transfer", "prefill-1", "PeerLost", 1050.0, 1050.2, "why?", "Traceback"))
    fault = _the_fault(records)
    assert "why?" in fault
    assert "Traceback" in fault


def test_an_error_of_no_expected_kind_is_a_fault_whenever_it_comes() -> None:
    records = _run()
    records.failures.append(Failure("decode-0", 1, "transfer", "prefill-0", "InternalError", 1050.0, 1050.2, "oh", ""))
    assert "InternalError" in _the_fault(records)


@pytest.mark.parametrize("at", [1052.5, None])
def test_an_end_that_is_noticed_late_or_never_is_a_fault(at: float | None) -> None:
    records = _run()
    lost = records.events.pop(2)
    if at is not None:
        records.events.append(Event(lost.observer, 1, "lost", lost.peer, at, ""))
    assert ("2.50 s" if at else "never") in _the_fault(records)


def test_a_peer_that_is_lost_without_a_reason_is_a_fault() -> None:
    records = _run()
    records.events.append(Event("decode-0", 1, "lost", "prefill-1", 1030.0, "nobody knows"))
    assert "nobody knows" in _the_fault(records)


def test_who_was_away_for_a_moment_must_not_be_lost() -> None:
    records = _run()
    action = Action(20.0, "pause", ("prefill-1",), 0.5)
    records.done.append(Done(action, 1020.0, 1020.5, ("prefill-1",), (1,)))
    records.events.append(Event("decode-0", 1, "lost", "prefill-1", 1020.4, "too eager"))
    assert "too eager" in _the_fault(records)


def test_a_member_that_is_never_reached_again_is_a_fault() -> None:
    assert "decode-0 with prefill-0 (kill)" in _the_fault(_run(firsts=[]))
    # Unless the run ended before.
    assert _judge(_run(firsts=[], watches=[("decode-0", "prefill-0", 1098.0)])).faults == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": Count(requests=10, requests_done=9)}, "1 requests have no outcome"),
        ({"count": Count(requests=10, requests_done=10, transfers=3, transfers_done=2)}, "1 transfers have no outcome"),
        ({"expected_end": False, "code": -11}, "died by itself, exit status -11"),
        ({"unheard": True}, "did not leave"),
        ({"left": None, "code": 1}, "left without a word"),
        ({"left": ["fd 7: socket:[1]"]}, "left behind: fd 7"),
        ({"name": "decode-1", "count": Count(requests=3, requests_failed=3)}, "completed no request"),
        ({"overwritten": 2}, "2 free pages were written to"),
        ({"quarantined_region": True}, "region is quarantined"),
        ({"beats": [(1000.0 + n, n * GROWTH_NBYTES // 50, 20, 5) for n in range(100)]}, "memory grew"),
        ({"beats": [(1000.0 + n, 0, 20 + n, 5) for n in range(100)]}, "more descriptors"),
    ],
)
def test_what_a_member_must_not_do(fields: dict[str, Any], words: str) -> None:
    records = _run()
    records.lives[1] = _life(**{"name": "prefill-1", **fields})
    assert words in _the_fault(records)


@pytest.mark.parametrize("what", ["wrong", "hangs", "logged", "shared_memory"])
def test_what_is_reported_is_a_fault(what: str) -> None:
    assert "this and that" in _the_fault(_run(**{what: ["this and that"]}))


def test_pages_that_stay_with_a_lost_peer_are_told_and_no_fault() -> None:
    records = _run()
    records.lives[0].quarantined_pages = {"prefill-0": 3}
    verdict = _judge(records)
    assert verdict.quarantined == {"decode-0: prefill-0": 3}
    assert verdict.faults == []


def test_the_clock_is_the_hosts() -> None:
    # Times of different processes are compared.
    said = subprocess.run([sys.executable, "-c", "import time; print(time.monotonic())"], capture_output=True, check=True)
    assert abs(float(said.stdout) - time.monotonic()) < 60
