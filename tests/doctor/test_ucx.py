"""What UCX is asked: this machine's, and what `ucx_info` prints where there are cards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nixl_async.doctor.ucx import PREFER_SYSTEM, ask_ucx, find_program, read
from tests.agents import ROOT

WITH_CARDS = """\
# Library version: 1.18.0
# Configured with: --with-verbs --with-cuda=/usr/local/cuda
#
# Memory domain: mlx5_0
#      Transport: rc_mlx5
#         Device: mlx5_0:1
#           Type: network
#      Transport: ud_verbs
#         Device: mlx5_1:1
#      Transport: tcp
#         Device: eth0
#      Transport: tcp
#         Device: eth0
#      Transport: tcp
#         Device: lo
"""


def test_what_ucx_info_prints_is_read() -> None:
    ucx = read("/usr/bin/ucx_info", WITH_CARDS)
    assert ucx.version == "1.18.0"
    assert ucx.built.startswith("--with-verbs")
    assert ucx.rdma == ("rc_mlx5", "ud_verbs")
    assert ucx.devices("tcp") == ("eth0", "lo")
    assert read("x", "nonsense", "it was killed by SIGSEGV").transports == ()


async def test_this_machines_ucx() -> None:
    pytest.importorskip("libucx")
    ucx = await ask_ucx()
    assert ucx is not None
    assert ucx.failure == ""
    assert ucx.version
    assert "lo" in ucx.devices("tcp")


def test_the_systems_ucx_is_asked_where_it_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "ucx_info"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(PREFER_SYSTEM, "false")
    assert find_program() != str(program)
    monkeypatch.setenv(PREFER_SYSTEM, "true")
    assert find_program() == str(program)


def test_importing_the_doctor_loads_no_ucx() -> None:
    program = (
        "import asyncio, sys, nixl_async.doctor\n"
        "from nixl_async.doctor.ucx import ask_ucx\n"
        "assert asyncio.run(ask_ucx()).version\n"
        "print('ucxx' in sys.modules, 'libucx' in sys.modules, 'libucp' in open('/proc/self/maps').read())"
    )
    pytest.importorskip("libucx")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == ["False", "False", "False"]
