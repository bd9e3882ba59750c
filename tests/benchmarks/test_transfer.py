"""The transfer benchmark: each scheme and mode with real processes, what it says when something is wrong, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nixl_async.benchmarks import results
from nixl_async.benchmarks.transfer.conductor import OURS, RAW, SPARE, Step, WrongBytes
from nixl_async.benchmarks.transfer.control import HERE, BenchmarkFailed, Contender
from nixl_async.benchmarks.transfer.options import Location, Mode, Op, Scheme, make
from nixl_async.benchmarks.transfer.peers.plain import Point
from nixl_async.cli import app
from tests.agents import ROOT
from tests.benchmarks.runs import PROGRAM, TINY, arguments, command, conducting, environment, refused, steps

RAW_PEER = Contender(RAW, str(HERE / "peers" / "raw_peer.py"))


def only(found: list[Step]) -> Step:
    (step,) = found
    for rounds in step.rounds.values():
        for one in rounds:
            assert one.throughput > 0
            assert len(one.latency) == len(one.post) == len(one.prep) > 0
            assert (one.latency >= one.post).all()
            assert one.cpu_per_gb is not None
    return step


@pytest.mark.parametrize(
    ("scheme", "initiators", "targets", "op"),
    [
        (Scheme.PAIRWISE, 1, 1, Op.WRITE),
        (Scheme.PAIRWISE, 1, 1, Op.READ),
        (Scheme.MANY_TO_ONE, 2, 1, Op.WRITE),
        (Scheme.ONE_TO_MANY, 1, 2, Op.READ),
        (Scheme.TP, 1, 2, Op.WRITE),
        (Scheme.TP, 2, 1, Op.READ),
    ],
)
async def test_schemes(scheme: Scheme, initiators: int, targets: int, op: Op) -> None:
    step = only(await steps(scheme=scheme, num_initiator_dev=initiators, num_target_dev=targets, op_type=op))
    assert step.checked
    assert step.route == "samehost"
    assert len(step.rounds[OURS]) == 2
    # Four requests a round of each initiator.
    assert len(step.rounds[OURS][0].latency) == 4 * initiators


@pytest.mark.parametrize(
    ("scheme", "n", "m"), [(Scheme.PAIRWISE, 2, 2), (Scheme.MANY_TO_ONE, 2, 1), (Scheme.ONE_TO_MANY, 1, 2), (Scheme.TP, 1, 2)]
)
@pytest.mark.parametrize("op", list(Op))
async def test_one_process_for_all_devices_of_a_side(scheme: Scheme, n: int, m: int, op: Op) -> None:
    given = {"scheme": scheme, "num_initiator_dev": n, "num_target_dev": m, "op_type": op}
    step = only(await steps(mode=Mode.MG, raw=True, notify=True, num_threads=2, **given))
    assert step.checked
    # Four requests a round, each with what all devices move.
    assert [len(one.latency) for one in step.rounds[OURS]] == [4, 4]
    moved = step.point.block * step.point.batch * max(n, m if scheme is Scheme.ONE_TO_MANY else 1) * 4
    assert [round(one.throughput * one.seconds * 1e9) for one in step.rounds[OURS]] == [moved, moved]


@pytest.mark.parametrize(
    "given",
    [
        {"num_threads": 2, "pipeline_depth": 2},
        {"recreate_xfer": True},
        {"recreate_xfer": True, "prepared_xfer": True},
        {"reregister_mem": True},
        {"notify": True},
        {"randomize_location_mode": Location.BLOCK, "backend": "tcp"},
        {"start_block_size": 1001, "max_block_size": 1001, "total_buffer_size": 1 << 20},
        {"check_consistency": False, "warmup_iter": 0},
    ],
    ids=lambda given: ",".join(given),
)
async def test_modes(given: dict[str, Any]) -> None:
    step = only(await steps(**given))
    assert step.checked is given.get("check_consistency", True)
    assert step.route == given.get("backend", "samehost")
    if given.get("recreate_xfer") or given.get("reregister_mem"):
        assert min(float(one.prep.mean()) for one in step.rounds[OURS]) > 1e-6


@pytest.mark.parametrize(("backend", "limit"), [("", "memcpy"), ("tcp", "stream")])
@pytest.mark.parametrize("op", list(Op))
async def test_the_raw_limit_of_the_route_is_measured_in_the_same_rounds(backend: str, limit: str, op: Op) -> None:
    step = only(await steps(backend=backend, raw=True, op_type=op, num_threads=2))
    assert step.raw_label == limit
    assert len(step.raw) == 2
    assert all(one.throughput > 0 for one in step.raw)


def spoiling(tmp_path: Path, body: str) -> Contender:
    """Make a contender that does what the raw limit does, and then something wrong."""
    path = tmp_path / "spoiling_peer.py"
    path.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            sys.path.insert(0, {peers!r})
            from plain import serve
            from raw_peer import Raw

            class Spoiling(Raw):
                kind = "stream"
                def run(self, iterations):
                    result = super().run(iterations)
                    return result
            {body}
            serve(Spoiling())
            """
        ).format(peers=str(HERE / "peers"), body=textwrap.indent(textwrap.dedent(body), "    ").lstrip("\n"))
    )
    return Contender(OURS, str(path))


async def test_one_wrong_byte_is_found(tmp_path: Path) -> None:
    good = spoiling(tmp_path, "")
    assert only(await steps([good]))
    bad = spoiling(
        tmp_path,
        """
        def left(self):
            self.buffer[4096 * 2 + 17] ^= 1
            return super().left()
        """,
    )
    with pytest.raises(WrongBytes, match=r"nixl_async: 1 of 4 blocks hold wrong bytes"):
        await steps([bad])


async def test_bytes_that_never_move_are_found(tmp_path: Path) -> None:
    idle = spoiling(
        tmp_path,
        """
        def _stream(self, spans):
            pass
        """,
    )
    with pytest.raises(WrongBytes, match=r"nixl_async: 4 of 4 blocks hold wrong bytes"):
        await steps([idle])


@pytest.mark.parametrize("side", ["target", "initiator"])
async def test_a_process_that_dies_is_named_with_its_last_lines(tmp_path: Path, side: str) -> None:
    dying = spoiling(
        tmp_path,
        f"""
        def ready(self, point):
            if self.role == {side!r}:
                print("the disk is on fire", file=sys.stderr, flush=True)
                os.kill(os.getpid(), 9)
            return super().ready(point)
        """,
    )
    with pytest.raises(
        BenchmarkFailed, match=rf"(?s)nixl_async, {side} 0: process \d+ was killed by SIGKILL.*disk is on fire"
    ):
        await steps([dying])


async def test_a_target_that_dies_while_others_move_is_what_is_told(tmp_path: Path) -> None:
    dying = spoiling(
        tmp_path,
        """
        def attend(self, count):
            os._exit(3)
        """,
    )
    with pytest.raises(BenchmarkFailed, match=r"nixl_async, target 0: process \d+ ended with exit status 3"):
        await steps([dying])


async def test_another_library_that_fails_is_left_out(tmp_path: Path) -> None:
    failing = spoiling(tmp_path, "    def opened(self):\n        raise RuntimeError('no such device')\n")
    warnings: list[str] = []
    (step,) = await steps([RAW_AS_OURS, Contender("nixl", failing.program)], warnings)
    assert list(step.rounds) == [OURS]
    (warning,) = warnings
    assert re.fullmatch(r"nixl is absent: nixl, (initiator|target) 0: RuntimeError: no such device", warning)


RAW_AS_OURS = Contender(OURS, str(HERE / "peers" / "raw_peer.py"))


async def test_a_turn_of_some_seconds_has_as_many_requests_as_it_takes() -> None:
    options = make(TINY | {"num_threads": 2})
    async with conducting(options) as conductor:
        step = Step(next(iter(options.points())))
        await conductor.begin(step, 2)
        for seconds in (0.0, 0.05):
            await conductor.round(step, 4, "a round", seconds)
        # Another point, and back to the first: it goes on.
        await conductor.begin(Step(Point(4096, 2, 2, salt=9)), 2)
        await conductor.begin(step, 2)
        await conductor.round(step, 4, "a round")
    counted, timed, again = step.rounds[OURS]
    assert counted.requests == again.requests == 4
    assert timed.requests > 4
    assert timed.requests % 4 == 0
    assert len(timed.latency) == timed.requests
    assert 0.05 * (1 - SPARE) <= timed.seconds < 5
    assert timed.throughput == pytest.approx(timed.requests * 4096 * 4 / timed.seconds / 1e9)


async def test_contenders_take_turns_and_those_that_spin_are_stopped(tmp_path: Path) -> None:
    spinning = Contender("other", str(HERE / "peers" / "raw_peer.py"), spins=True)
    (step,) = await steps([RAW_AS_OURS, spinning])
    assert {label: len(rounds) for label, rounds in step.rounds.items()} == {OURS: 2, "other": 2}


# The whole command.


def test_the_result_is_a_result_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    ran = command(*arguments(raw=True, max_batch_size=8), "--format", "json", "--output", str(path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    found = results.load(path)
    assert [(row.contender, row.block_nbytes, row.batch_nbytes) for row in found.rows] == [
        (OURS, 4096, 4 * 4096),
        (OURS, 4096, 8 * 4096),
    ]
    for row in found.rows:
        assert row.share_of_raw is not None
        assert row.share_of_raw > 0
        assert len(row.throughput) == len(row.latencies) == len(row.cpu_seconds_per_gb) == len(row.loop_stall_p999) == 2
        assert set(row.phases) == {"prep", "post", "tx"}
    for name in ("cpu", "cores", "numa", "kernel", "gpu", "networks", "ucx", "versions"):
        assert name in found.system
    assert "nixl-async" in found.system["versions"]


def test_the_table_has_nixlbenchs_columns_and_more() -> None:
    ran = command(*arguments(raw=True))
    assert ran.returncode == 0, ran.stderr
    for text in ("Block Size (B)", "Batch Size", "B/W (GB/Sec)", "Avg Lat. (us)", "P99 Prep (us)", "P99 Post (us)", "P99 Tx (us)",
                 "P50 (us)", "P99.9 (us)", "Spread", "CPU (s/GB)", "Stall P99.9 (ms)", "Of Raw", "every byte checked"):  # fmt: skip
        assert text in ran.stdout, text
    assert "4096 B x 4: nixl_async" in ran.stderr


# Arrow starts its threads at the first use and keeps them.
@pytest.mark.keeps
def test_csv_and_parquet(tmp_path: Path) -> None:
    ran = command(*arguments(), "--format", "csv")
    assert ran.returncode == 0, ran.stderr
    (row,) = csv.DictReader(io.StringIO(ran.stdout))
    assert (row["contender"], row["block_nbytes"], row["batch"], row["op"]) == (OURS, "4096", "4", "WRITE")
    assert float(row["gb_per_second"]) > 0
    path = tmp_path / "result.parquet"
    ran = command(*arguments(), "--format", "parquet", "--output", str(path))
    try:
        import pyarrow.parquet
    except ImportError:
        assert ran.returncode == 2
        assert ran.stderr == "nixl-async: --format parquet needs pyarrow: pip install 'nixl-async[parquet]'\n"
    else:
        assert ran.returncode == 0, ran.stderr
        assert pyarrow.parquet.read_table(path).to_pylist()[0]["contender"] == OURS


def test_a_file_is_read_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text("start_block_size = 8192\nmax_block_size = 8192\nnum_iter = 4\nraw = false\nwarmup_iter = 0\nrounds = 1\n")
    ran = command("--config_file", str(path), "--num_iter", "6", "--format", "json")
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads(ran.stdout)["rows"]
    assert row["block_nbytes"] == 8192
    assert len(row["latencies"][0]) == 6


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--scheme", "ring"], "'pairwise', 'manytoone'"),
        (["--num-iter", "many"], "--num-iter"),
        (["--no-such-option"], "no-such-option"),
        (["--num-initiator-dev", "2"], "nixl-async: --scheme pairwise needs as many targets as initiators; it has 2 and 1"),
        (["--config-file", "/nowhere.toml"], "nixl-async: --config-file /nowhere.toml cannot be read"),
        (["--runtime", "etcd"], "nixl-async: --runtime etcd needs --etcd-endpoints"),
        (["--runtime", "ranks"], "nixl-async: --runtime ranks needs the variables of torchrun, SLURM or OpenMPI"),
        (["--output", "/nowhere/x", "--format", "csv"], "its directory does not exist"),
    ],
)
def test_wrong_input_is_refused(given: list[str], text: str) -> None:
    ran = refused(*given)
    assert ran.exit_code == 2
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_backend_that_does_not_exist_is_named() -> None:
    ran = command(*arguments(backend="warp"))
    assert ran.returncode in (1, 2)
    assert "warp" in ran.stderr
    assert "Traceback (most recent call last)" not in ran.stderr.splitlines()[0]


def test_python_m_bench_transfer_is_the_same() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bench.transfer", "--scheme", "ring"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert ran.returncode == 2
    assert "pairwise" in ran.stderr


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_reports_what_there_is_and_leaves_no_process(number: signal.Signals) -> None:
    many = arguments(max_batch_size=4096, rounds=100)
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, *many, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment(), preexec_fn=listen
    )
    assert process.stderr is not None
    # A line tells that a step is done; many more follow.
    while b"4096 B x 4: nixl_async" not in (line := await process.stderr.readline()):
        assert line, "it ended"
    children = await asyncio.to_thread(descendants, process.pid)
    assert len(children) >= 2
    process.send_signal(number)
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 130, err.decode()
    assert err.decode().splitlines()[-1] == "nixl-async: interrupted"
    assert "B/W (GB/Sec)" in out.decode()
    assert not {str(pid) for pid in children} & set(os.listdir("/proc"))


async def test_an_interrupt_within_a_step_reports_its_finished_rounds() -> None:
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = asyncio.subprocess.PIPE
    given = arguments(rounds=100_000, num_iter=100_000, warmup_iter=0, format="json")
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, *given, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment(), preexec_fn=listen
    )
    # Rounds have begun when the initiator has run for a while: its CPU time grows without end.
    while not await asyncio.to_thread(_busy_child, process.pid):
        assert process.returncode is None
        await asyncio.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 130, err.decode()
    (row,) = json.loads(out)["rows"]
    assert len(row["throughput"]) == len(row["cpu_seconds_per_gb"]) > 0


def _busy_child(pid: int) -> bool:
    """Tell whether two children each have switched away a thousand times: commands come and go."""
    seen = []
    for child in descendants(pid):
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{child}/status").read_text()
            seen.append(int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]))
    return sum(count > 1000 for count in seen) >= 2


def test_the_help_names_every_option() -> None:
    ran = refused("--help")
    assert ran.exit_code == 0
    for text in ("--scheme", "--pipeline-depth", "--versus", "--runtime", "--config-file"):
        assert text in ran.stdout


def test_the_list_of_benchmarks() -> None:
    ran = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "120"})
    assert ran.exit_code == 0
    assert "transfer" in ran.stdout
