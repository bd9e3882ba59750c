"""`nixl-async bench serve` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.results import load
from tests.agents import ROOT
from tests.benchmarks.serve.made import TINY, write_model


def command(directory: Path, **given: Any) -> list[str]:
    found = [sys.executable, "-m", "nixl_async", "bench", "serve"]
    for name, value in {**TINY, "model": write_model(directory), **given}.items():
        for one in value if isinstance(value, tuple) else (value,):
            found += [f"--{name.replace('_', '-')}", str(one)]
    return found


ENVIRONMENT = os.environ | {"COLUMNS": "200"}


def test_requests_are_served_in_both_ways_through_all_tiers(tmp_path: Path) -> None:
    """Two schedules, memory for half of what is shared, files and objects behind it."""
    (tmp_path / "nvme").mkdir()
    (tmp_path / "objects").mkdir()
    output = tmp_path / "a.json"
    tiers = {"nvme": tmp_path / "nvme", "nvme_mib": 1, "objects": f"file://{tmp_path / 'objects'}", "dram_mib": 1}
    ran = subprocess.run(
        command(tmp_path, format="json", output=output, classes="on", **tiers),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 0, ran.stderr
    assert "round 1 of 1, layers + classes, samehost: 6 served, TTFT p50" in ran.stderr
    found = load(output)
    rows = {(row.contender, row.op): row for row in found.rows}
    for label in ("layers + classes, samehost", "whole + classes, samehost"):
        assert rows[label, "ttft"].route == "samehost"
        ((ttft,), (itl,)) = (rows[label, op].latencies for op in ("ttft", "itl"))
        assert (len(ttft), len(itl)) == (6, 18)
        figures = {name: one.values[0] for name, one in rows[label, "requests"].figures.items()}
        # Six prompts of 128 tokens of 1024 bytes.
        assert figures["kv_gb"] == 6 * 128 * 1024 / 1e9
        # Half of each is the same; the first one finds nothing. Whatever a tier had, it was checked at decode.
        assert 0 < sum(figures[f"hit_rate_{tier}"] for tier in ("dram", "nvme", "objects")) <= 5 / 6 / 2
        assert figures["tier_written_gb"] > 0
    assert [one.title.partition(":")[0] for one in found.timelines] == [
        "layers + classes, samehost",
        "whole + classes, samehost",
    ]
    lanes = {span.lane for span in found.timelines[0].spans}
    assert lanes >= {"waiting", "prefill", "transfer", "decode"}
    # Nothing is left in either.
    assert not list((tmp_path / "nvme").iterdir())
    assert not [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]


def test_ctrl_c_ends_it_and_shows_what_was_measured(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, rounds=1000, format="csv"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    try:
        assert process.stderr is not None
        assert "round 1 of 1000" in process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert err.endswith("nixl-async: interrupted\n")
    assert "Traceback" not in err
    assert out.splitlines()[1].startswith("layers,off,samehost,samehost,6,0,")
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_failed_requests_are_reported_and_are_the_exit_status(tmp_path: Path) -> None:
    ran = subprocess.run(
        command(tmp_path, schedule="layers", timeout=0.05, osl=1000, format="json"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 1
    assert "nixl-async: 6 of 6 requests failed: 6: it took longer than 0.05 s" in ran.stderr.splitlines()[-1]
    rows = json.loads(ran.stdout)["rows"]
    assert [row["op"] for row in rows] == ["requests"]
    assert rows[0]["figures"]["attainment"]["values"] == [0.0]
