"""The programs with a device's memory: what examines the machine, and the benchmark of transfers. Needs a CUDA device and cupy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nixl_async.cuda import device_count

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "nixl_async", *arguments]
    wide = os.environ | {"COLUMNS": "250"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=wide)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_doctor_moves_every_byte_of_a_devices_memory() -> None:
    shown = run("doctor")
    assert "BROKEN" not in shown
    for pair in ("DRAM ↔ VRAM", "VRAM ↔ VRAM", "VRAM ↔ VRAM, same host"):
        assert any(pair in line and "FAILED" not in line for line in shown.splitlines()), shown


@pytest.mark.parametrize(("target", "route"), [("VRAM", "cuda_ipc"), ("dram", "staging")])
def test_a_benchmark_moves_a_devices_memory(tmp_path: Path, target: str, route: str) -> None:
    found = tmp_path / "result.json"
    sizes = ["--start-block-size", "65536", "--max-block-size", "65536", "--num-iter", "4", "--total-buffer-size", "4194304"]
    places = ["--initiator-seg-type", "VRAM", "--target-seg-type", target]
    run("bench", "transfer", *places, *sizes, "--format", "json", "--output", str(found))
    result: dict[str, Any] = json.loads(found.read_text())
    assert route in json.dumps(result)


@pytest.mark.parametrize("op", ["WRITE", "READ"])
def test_one_process_moves_the_memory_of_several_devices(tmp_path: Path, op: str) -> None:
    found = tmp_path / "result.json"
    sizes = ["--start-block-size", "65536", "--max-block-size", "65536", "--start-batch-size", "4", "--num-iter", "4"]
    places = ["--mode", "MG", "--num-initiator-dev", "2", "--num-target-dev", "2", "--op-type", op]
    kinds = ["--initiator-seg-type", "VRAM", "--target-seg-type", "VRAM"]
    run("bench", "transfer", *places, *kinds, *sizes, "--format", "json", "--output", str(found))
    assert "cuda_ipc" in found.read_text()
