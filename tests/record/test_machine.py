"""What else the machine did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.record import machine
from bench.record.machine import Meter, available_nbytes

BURN = "import time\nend = time.thread_time() + 0.3\nwhile time.thread_time() < end: pass"
TICKS = os.sysconf("SC_CLK_TCK")


def counts(path: Path, user: int, system: int, idle: int, softirq: int, steal: int) -> None:
    """Write what the kernel would say of all cores, in seconds."""
    seconds = (user, 0, system, idle, 0, 0, softirq, steal, 0, 0)
    path.write_text("cpu  " + " ".join(str(one * TICKS) for one in seconds) + "\ncpu0 1 2 3\n")


def test_what_neither_we_nor_our_children_used_is_that_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    counts(stat, 100, 10, 1000, 5, 0)
    meter, again = Meter(), Meter()
    # Ten seconds pass on all cores together, three of which somebody used.
    counts(stat, 102, 11, 1005, 6, 1)
    found = meter.read()
    assert found["others_cpu"] == pytest.approx(0.3, abs=0.01)
    assert found["stolen_cpu"] == 0.1
    assert set(found) == {"load_before", "load_after", "others_cpu", "stolen_cpu"}
    # A child of ours did some of it.
    subprocess.run([sys.executable, "-c", BURN], check=True)
    assert again.read()["others_cpu"] < found["others_cpu"] - 0.02


def test_the_kernels_own_counts_are_shares() -> None:
    meter = Meter()
    subprocess.run([sys.executable, "-c", BURN], check=True)
    found = meter.read()
    assert 0 <= found["others_cpu"] <= 1
    assert 0 <= found["stolen_cpu"] <= 1


def test_there_is_memory() -> None:
    assert available_nbytes() > 1 << 20
