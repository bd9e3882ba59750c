"""What UCX is asked: this machine's, what `ucx_info` prints where there are cards, and which UCX is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nixl_async.doctor.children import ask
from nixl_async.doctor.ucx import PREFER_SYSTEM, UCX, Library, ask_ucx, beside, find_program, read
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


def other_program(directory: Path, version: str) -> Path:
    """Make a `ucx_info` of another UCX."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "ucx_info"
    program.write_text(f"#!/bin/sh\necho '# Library version: {version}'\necho '# Configured with: --with-verbs'\n")
    program.chmod(0o755)
    return program


async def loaded() -> Library:
    answer = await ask("backend", seconds=60, setup={"name": "ucx"})
    (told,) = (message for message in answer.messages if message.get("event") == "library")
    return Library(told["version"], told["path"])


@pytest.mark.parametrize("preferred", ["false", "true"])
async def test_the_ucx_that_is_loaded_is_told_beside_the_one_on_path(
    preferred: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `ucx_info` on PATH whose libraries lack the names without a version: libucx loads its own, whatever is preferred."""
    libraries = Path(pytest.importorskip("libucx").__file__).parent / "lib"
    program = other_program(tmp_path / "bin", "1.13.1")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv(PREFER_SYSTEM, preferred)
    library = await loaded()
    assert Path(library.path).parent == libraries
    ucx = await ask_ucx(library)
    assert ucx is not None
    # Its transports are those of the library that is loaded.
    assert (ucx.program, ucx.version) == (str(libraries.parent / "bin/ucx_info"), library.version)
    assert "lo" in ucx.devices("tcp")
    assert ucx.others == ((str(program), "1.13.1"),)
    assert ucx.differing == ((str(program), "1.13.1"),)


async def test_one_that_is_the_same_is_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(pytest.importorskip("libucx").__file__).parent / "bin/ucx_info"
    (tmp_path / "ucx_info").symlink_to(program)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ucx = await ask_ucx(Library("1.0.0", str(program.parent.parent / "lib/libucp.so")))
    assert ucx is not None
    assert ucx.others == ()
    # The program's own version counts as well.
    assert ucx.differing == ((str(program), ucx.version),)


def test_the_program_beside_a_library_is_found(tmp_path: Path) -> None:
    program = other_program(tmp_path / "bin", "1.23.0")
    assert beside(Library("1.23.0", str(tmp_path / "lib/libucp.so.0"))) == str(program)
    assert beside(Library("1.23.0", str(tmp_path / "lib/x86_64-linux-gnu/libucp.so.0"))) is None
    assert beside(Library("1.23.0", "")) is None
    assert beside(None) is None
    assert UCX(str(program), "1.23.0").differing == ()


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
