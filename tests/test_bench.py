"""The benchmarks run, tell right bytes from wrong ones, and judge figures as they say."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cli import app
from bench.commands import COMMANDS
from bench.loops import TimedSelector, Watch
from bench.pattern import allocate, blank, count_wrong, fill, page_order
from bench.process import Contender, Pair, WorkerError
from bench.report import Check, Figure, Row, to_json
from bench.served import AZURITE, NGINX, Place, serving
from bench.session import NIXL, NIXL_SAME, OURS, Settings, WrongBytes, alternate, check, judged, start_run
from bench.storage import (
    AWSCRT,
    OBSTORE,
    SOCKET,
    UVLOOP,
    Work,
    field,
    measure,
    ours_s3,
    raw_http,
    turn_checked,
)
from nixl_async.testing import servers

ROOT = Path(__file__).resolve().parent.parent
RAW = Contender("raw", "bench.workers.raw")
BUFFER = 1 << 20
SECONDS = 100


def bench(*arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a command at tiny sizes; return the machine's header and the rows. Skip the test if a server is not installed."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--quick", "--format", "json"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.endswith("_PYTHON")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if missing := re.search(r"^(nginx|juicefs|azurite) is left out: .*is not installed.*", done.stderr, re.MULTILINE):
        pytest.skip(missing.group())
    others = [line for line in done.stderr.splitlines() if "left out" in line and not line.startswith("fio is left out")]
    assert others == ([] if HAS_TORCH or arguments[0] != "membership" else [NO_TCPSTORE]), done.stderr
    header, *rows = map(json.loads, done.stdout.splitlines())
    return header["system"], rows


ROWS = {
    "throughput": 8,
    "slices": 12,
    "layers": 8,
    "latency": 4,
    "notification": 2,
    "stall": 16,
    "idle": 1,
    "busy-peer": 3,
    "many": 2,
    "membership": 37,
    "compat": 16,
    "descriptors": 4,
    "planner": 8,
    "qos": 8,
    "failover": 8,
    "verify": 8,
    "tracing": 2,
    "scheduler": 6,
    "s3-get": 8,
    "s3-put": 16,
    "s3-many": 8,
    "azure": 4,
    "files": 16,
    "tiers": 11,
}
HAS_TORCH = importlib.util.find_spec("torch") is not None
NO_TCPSTORE = "tcpstore is left out: torch is not installed"
WITHOUT_TORCH = {"membership": 7}
"""How many rows are less where there is no TCPStore."""
MAY_BE_ZERO = {
    "wall lag",
    "memory at its peak",
    "memory of a known one",
    "memory of a connected one",
    "memory of a peer's region",
    "an update, through the store",
}
"""A lag shorter than the ticker sees at these sizes is zero, and so may be what memory grows; metadata goes to a store later."""


@pytest.mark.parametrize("command", COMMANDS)
def test_command_yields_its_rows(command: str) -> None:
    system, rows = bench(command)
    assert system["cores"] >= 1
    assert {row["command"] for row in rows} == {command}
    absent = 0 if HAS_TORCH else WITHOUT_TORCH.get(command, 0)
    assert len(rows) == ROWS[command] - absent
    for row in rows:
        small = not MAY_BE_ZERO.isdisjoint(row["case"].values())
        assert row["ours"]["median"] > 0 or small, row
        assert row["met"] is None, "promises are not judged at --quick sizes"
        assert all(item["met"] is None and (item["value"] > 0 or small) for item in row["checks"]), row


def test_all_is_every_command() -> None:
    names = {command.name for command in app.registered_commands}
    assert names == {*COMMANDS, "all", "results"} == {*ROWS, "all", "results"}


@pytest.mark.nixl
@pytest.mark.parametrize("command", ["throughput", "slices", "latency", "many", "stall", "notification", "busy-peer"])
def test_command_beside_nixl(command: str, nixl_python: str) -> None:
    system, rows = bench(command, "--path", "samehost", "--nixl-python", nixl_python)
    assert "nixl-cu1" in system["nixl"]
    both = command not in ("stall", "busy-peer")
    for row in rows:
        assert [other["label"] for other in row["others"]] == ([NIXL, NIXL_SAME] if both else [NIXL])
        for other in row["others"]:
            # A loop may well show no lag at all in so short a time; then there is no ratio.
            assert other["median"] > 0 or command == "stall", row
            assert not (row["ours"]["median"] and other["median"]) or other["ratio"] > 0, row


STORAGE = {
    "s3-get": ("nginx", {"NIXL, 8 threads", "NIXL, 16 threads", "NIXL, 16 threads, 1 ms polls"}),
    "azure": ("all", {"NIXL, default", "NIXL, 4 threads", "NIXL, 4 threads, 1 ms polls", "Azure SDK"}),
    "files": ("page-cache", {"NIXL, io_uring", "NIXL, linux aio", "NIXL, posix aio"}),
}


@pytest.mark.nixl
@pytest.mark.parametrize("command", STORAGE)
def test_storage_command_beside_nixl(command: str, nixl_python: str) -> None:
    path, expected = STORAGE[command]
    _, rows = bench(command, "--path", path, "--nixl-python", nixl_python)
    assert rows
    for row in rows:
        labels = {other["label"] for other in row["others"]}
        # Stock clients take part if they are installed.
        assert labels - {UVLOOP, OBSTORE, AWSCRT} == expected
        assert all(other["ratio"] > 0 for other in row["others"]), row
        assert row["raw"]["median"] > 0 or row["unit"] == "CPU s/GB", row


def test_unknown_interpreter_is_a_warning_and_the_rest_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "latency", "--path", "samehost", "--quick", "--nixl-python", sys.executable],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NIXL is left out" in done.stderr
    assert "is installed in this interpreter" in done.stderr
    assert "4 KiB page, prepared" in done.stdout


# Servers.


def test_a_server_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIXL_ASYNC_NODE_MODULES", str(tmp_path))
    monkeypatch.setattr(servers, "__file__", str(tmp_path / "a/b/servers.py"))
    warnings: list[str] = []
    with serving(AZURITE, 1 << 20, Settings(warn=warnings.append)) as place:
        assert place is None
    (warning,) = warnings
    assert warning.startswith("azurite is left out: azurite is not installed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bench_ends_its_server_and_removes_its_files(number: signal.Signals) -> None:
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not installed: apt-get install -y nginx-core")
    command = [sys.executable, "-m", "bench", "s3-get", "--path", "nginx", "--quick", "--rounds", "2", "--format", "json"]
    pipe = subprocess.PIPE
    # What a shell starts in the background ignores SIGINT, and what that starts does too.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        first = parent.stdout.readline()
        children = _children(parent.pid)
        assert first, parent.communicate()[1]
        (server,) = [pid for pid in children if b"nginx" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        directory = Path(f"/proc/{server}/cwd").resolve()
        assert (directory / "nginx.conf").exists()
        pidfd = os.pidfd_open(server)
        try:
            parent.send_signal(number)
            parent.communicate(timeout=20)
            assert parent.returncode not in (0, -number)
            readable, _, _ = select.select([pidfd], [], [], 0)
            assert readable, "nginx is still alive"
        finally:
            os.close(pidfd)
    assert not directory.exists()


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.fixture
def place() -> Iterator[Place]:
    """A place for objects on nginx."""
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not installed: apt-get install -y nginx-core")
    with serving(NGINX, 1 << 20, Settings()) as found:
        assert found is not None
        yield found


def test_objects_that_are_wrong_or_stale_are_found(place: Place) -> None:
    with field([ours_s3(place)], raw_http(place), 1 << 18, Settings(rounds=1)) as players:
        got = Work("read", 1 << 16, 4, place.where([f"a/{n}" for n in range(4)]))
        samples = measure(players, got, "x")
        assert {label: len(taken) for label, taken in samples.items()} == {OURS: 1, SOCKET: 1}
        mine = players.contenders[OURS]
        # Other bytes than were laid out.
        players.raw.worker.call("aim", where=got.where, op="write", page_nbytes=1 << 16, n_pages=4, seed=1)
        players.raw.worker.call("fill", salt=77)
        players.raw.worker.call("store")
        with pytest.raises(WrongBytes, match=f"{OURS}: 4 of 4 objects"):
            turn_checked(players, mine, got, 1)
        put = Work("write", 1 << 16, 4, place.where([f"b/{n}" for n in range(4)]))
        measure(players, put, "x")
        # What an earlier turn has left there.
        with pytest.raises(WrongBytes, match=f"{OURS}: 4 of 4 objects"):
            turn_checked(players, mine, put, 99, do="usage")


# What the bytes say.


@pytest.mark.parametrize("scattered", [True, False])
def test_check_finds_every_misplaced_or_stale_page(scattered: bool) -> None:
    page, n_pages = 4096, 64
    order = page_order(n_pages, 3)
    source, target = allocate(page * n_pages), allocate(page * n_pages)
    fill(source, 5)
    blank(target, 6)
    assert count_wrong(target, order, page, 5, scattered=scattered) == n_pages
    pages, places = source.reshape(n_pages, page), target.reshape(n_pages, page)
    if scattered:
        places[order] = pages
    else:
        places[:] = pages[order]
    assert count_wrong(target, order, page, 5, scattered=scattered) == 0
    assert count_wrong(target, order, page, 4, scattered=scattered) == n_pages, "another run's bytes"
    target[7 * page + 11] ^= 1
    assert count_wrong(target, order, page, 5, scattered=scattered) == 1
    places[[20, 21]] = places[[21, 20]]
    assert count_wrong(target, order, page, 5, scattered=scattered) == 3


def test_a_run_that_moves_nothing_is_refused(pair: Pair) -> None:
    _, destination = start_run(pair, "write", 4096, BUFFER // 4096, 1)
    destination.call("blank", salt=2)
    with pytest.raises(WrongBytes, match=f"raw: {BUFFER // 4096} pages"):
        check(pair, destination, 1)


# Processes.


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two connected processes of the raw baseline."""
    with Pair(RAW, BUFFER) as started:
        yield started


def test_a_failed_command_carries_the_traceback_and_the_process_goes_on(pair: Pair) -> None:
    with pytest.raises(WorkerError, match=r"(?s)raw \(initiator\).*no_such_command"):
        pair.initiator.call("no_such_command")
    assert pair.initiator.call("memcpy") > 0


def test_a_dead_process_is_reported(pair: Pair) -> None:
    pair.target.process.kill()
    with pytest.raises(WorkerError, match=r"(?s)raw \(target\).*exit code -9"):
        pair.target.call("usage")


def test_a_module_that_cannot_start_is_reported_with_its_output() -> None:
    with pytest.raises(WorkerError, match="No module named 'bench.workers.absent'|No module named bench.workers.absent"):
        Pair(Contender("absent", "bench.workers.absent"), BUFFER)


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


def test_a_spinning_contender_is_stopped_between_turns() -> None:
    with Pair(Contender("raw", "bench.workers.raw", stopped_between_turns=True), BUFFER) as pair:
        pair.rest()
        for worker in (pair.initiator, pair.target):
            os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)
            assert _stopped(worker.process.pid)
        with pair.turn():
            assert pair.initiator.call("memcpy") > 0
        for worker in (pair.initiator, pair.target):
            os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)
            assert _stopped(worker.process.pid)


ORPHANS = """
import sys
from bench.process import Contender, Pair
pair = Pair(Contender("raw", "bench.workers.raw", stopped_between_turns=True), 4096)
pair.rest()
print(pair.initiator.process.pid, pair.target.process.pid, flush=True)
sys.stdin.read()
"""


def test_stopped_processes_die_with_the_bench() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
        try:
            assert len(pidfds) == 2
            for pidfd in pidfds:
                readable, _, _ = select.select([pidfd], [], [], 10)
                assert readable, "still alive"
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


def test_turns_alternate_and_the_first_does_not_count() -> None:
    with Pair(RAW, BUFFER) as a, Pair(RAW, BUFFER) as b:
        seen: list[Pair] = []
        samples = alternate({"a": a, "b": b}, Settings(rounds=2), "x", lambda one: seen.append(one) or float(len(seen)))
    assert [one is a for one in seen] == [True, False] * 3
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


# Judgement.


def _row(unit: str, mine: float, theirs: float) -> Row:
    return Row("x", {}, unit, Figure(OURS, (mine,)), [Figure(NIXL, (theirs,))], Figure("memcpy", (10.0,)))


def test_ratios_point_the_right_way() -> None:
    faster, quicker = _row("GB/s", 8.0, 2.0), _row("us", 2.0, 8.0)
    assert faster.ratio(faster.others[0]) == quicker.ratio(quicker.others[0]) == 4.0


def test_promises_are_judged_by_the_median() -> None:
    row = Row("x", {}, "GB/s", Figure(OURS, (1.0, 8.0, 9.0)), [Figure(NIXL, (4.0, 4.0, 100.0))], Figure("memcpy", (10.0,)))
    row.at_least(NIXL, 2.0)
    row.share_of_raw(0.8)
    assert row.met is True
    row.at_least(NIXL, 2.1)
    assert row.met is False
    assert [item.met for item in row.checks] == [True, True, False]
    row = _row("us", 20.0, 1.0)
    row.at_most(20.0)
    assert row.met is True
    row.at_most(19.9)
    assert row.met is False


def test_the_best_of_several_decides() -> None:
    row = Row("x", {}, "GB/s", Figure(OURS, (8.0,)), [Figure("a", (2.0,)), Figure("b", (4.0,)), Figure("c", (8.0,))])
    row.at_least_best(("a", "b"), 2.0, "the best")
    row.at_least_best(("a", "b", "c"), 2.0, "the best")
    row.at_least_best(("d",), 2.0, "the best")
    assert row.checks == [
        Check(">= 2x the best", 2.0, True, "{:.2f}x"),
        Check(">= 2x the best", 1.0, False, "{:.2f}x"),
    ]


def test_an_absent_peer_is_not_judged() -> None:
    row = Row("x", {}, "GB/s", Figure(OURS, (1.0,)))
    row.at_least(NIXL, 2.0)
    row.share_of_raw(0.8)
    assert (row.checks, row.met) == ([], None)


def test_quick_rows_judge_nothing() -> None:
    row = _row("GB/s", 1.0, 2.0)
    row.at_least(NIXL, 2.0)
    [kept] = judged([row], Settings(quick=True))
    assert kept.checks == [Check(">= 2x NIXL", 0.5, None, "{:.2f}x")]


def test_a_row_comes_back_from_its_json() -> None:
    row = Row("x", {"path": "tcp"}, "us", Figure(OURS, (1.0, 2.0), "p99 3"), [Figure(NIXL, (4.0,))], Figure("memcpy", (5.0,)))
    row.at_least(NIXL, 2.0)
    row.at_most(1.0)
    row.share_of_raw(0.5)
    assert Row.from_dict(json.loads(to_json(row.as_dict()))) == row
    row.raw = None
    assert Row.from_dict(json.loads(to_json(row.as_dict()))) == row


def test_json_has_no_infinities() -> None:
    row = _row("GB/s", 1.0, 0.0)
    assert json.loads(to_json(row.as_dict()))["others"][0]["ratio"] is None


def test_quartiles_and_spread() -> None:
    figure = Figure("x", (1.0, 2.0, 3.0, 4.0, 5.0))
    assert (figure.median, figure.quartiles, figure.spread) == (3.0, (2.0, 4.0), pytest.approx(1 / 3))


# The instrument.


def _burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def _watched(burn: float, *, ticker: bool) -> dict[str, list[float]]:
    selector = TimedSelector()

    async def run() -> dict[str, list[float]]:
        watch = Watch(selector)
        watch.start(ticker=ticker)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        _burn(burn)
        await asyncio.sleep(0)
        return await watch.stop()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(run())


def test_an_iteration_that_keeps_the_thread_busy_is_seen() -> None:
    assert max(_watched(0.05, ticker=False)["cpu"]) >= 0.05
    assert max(_watched(0.0, ticker=False)["cpu"]) < 0.05


def test_a_blocked_loop_shows_as_lag() -> None:
    assert max(_watched(0.05, ticker=True)["lag"]) >= 0.04


def test_page_order_is_a_permutation_that_both_sides_agree_on() -> None:
    order = page_order(1000, 5)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, page_order(1000, 5))
    assert not np.array_equal(order, page_order(1000, 6))
