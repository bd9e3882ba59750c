"""The doctor as a user meets it, on a machine that is whole, and where the kernel forbids things or gives little."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nixl_async.cli import app
from nixl_async.doctor import examine
from nixl_async.doctor.examination import LEAST_NBYTES, NBYTES, _nbytes
from nixl_async.doctor.facts import Facts
from nixl_async.errors import ConfigurationError
from tests.agents import ROOT

FORBIDDING = str(ROOT / "tests/doctor/forbidding.py")
# System calls of x86-64 and of every newer architecture.
IO_URING, PROCESS_VM = "425,426,427", {"x86_64": "310,311", "aarch64": "270,271"}.get(os.uname().machine, "")


def doctor(*arguments: str, within: Sequence[str] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor, by a program that takes its command as the last arguments if there is one."""
    whole = [
        *within,
        *(() if within[:1] == ("setpriv",) else (sys.executable,)),
        "-P",
        "-m",
        "nixl_async",
        "doctor",
        *arguments,
    ]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(whole, capture_output=True, text=True, timeout=110, check=False, env=environment)


def told(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.stdout, ran.stderr
    result = json.loads(ran.stdout)
    assert isinstance(result, dict)
    return result


def routes(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(route["src"], route["dst"]): route for route in report["routes"]}


def findings(report: dict[str, Any], level: str) -> list[str]:
    return [finding["what"] for finding in report["findings"] if finding["level"] == level]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Return the report of this machine as it is, with a short self-test of few bytes."""
    report = asyncio.run(examine(seconds=0.3, nbytes=2 << 20))
    made = json.loads(json.dumps(report.as_dict()))
    assert isinstance(made, dict)
    return made


def test_every_pair_of_places_has_its_route(whole: dict[str, Any]) -> None:
    found = routes(whole)
    places = ["DRAM", "DRAM, same host", "DRAM, other host", "file", "object"]
    assert {(a, b) for a in places for b in places} <= set(found)
    expected = {
        ("DRAM", "DRAM"): "memory",
        ("DRAM", "DRAM, same host"): "samehost",
        ("DRAM, same host", "DRAM"): "samehost",
        ("DRAM", "DRAM, other host"): "tcp",
        ("DRAM", "file"): "posix",
        ("object", "DRAM"): "directory",
        ("file", "object"): "staging",
        ("DRAM, same host", "file"): "staging",
        ("DRAM, same host", "DRAM, other host"): None,
    }
    assert {pair: found[pair]["route"] for pair in expected} == expected
    assert "no such backend" in found["DRAM", "DRAM, other host"]["refusals"]["samehost"]
    assert "both sides are peers'" in found["DRAM, same host", "DRAM, other host"]["refusals"]["tcp"]


def test_every_route_moved_bytes(whole: dict[str, Any]) -> None:
    trials = {(trial["route"], trial["what"]): trial for trial in whole["self_test"]}
    assert {route for route, _ in trials} >= {"memory", "samehost", "tcp", "ucx", "posix", "directory", "staging"}
    for trial in trials.values():
        assert trial["verified"] is True, trial
        assert trial["error"] == ""
        assert min(trial["writes"]) > 0
        assert trial["write_share_of_memcpy"] > 0
    assert trials["samehost", "DRAM ↔ DRAM, same host"]["small_p50"] > 0
    assert trials["tcp", "DRAM ↔ DRAM, same host"]["reads"]


def test_the_report_says_where_its_facts_are_from(whole: dict[str, Any]) -> None:
    assert whole["schema"] == "nixl-async/doctor/1"
    assert whole["healthy"] is True
    assert whole["failures"] == {}
    assert all(fact["source"] for fact in whole["facts"])
    assert {"machine", "kernel", "limits", "memory", "network", "ucx", "packages"} <= {fact["room"] for fact in whole["facts"]}


def test_the_text_can_be_read_without_colours() -> None:
    ran = doctor("--no-test")
    assert ran.returncode == 0, ran.stderr
    assert "\x1b" not in ran.stdout
    for text in ("Findings", "This machine", "Routes", "samehost", "RLIMIT_NOFILE", "nothing is broken", "ucx_info -d"):
        assert text in ran.stdout
    assert "Self-test" not in ran.stdout


@pytest.fixture(scope="module")
def confined() -> dict[str, Any]:
    """Return the report of where the kernel forbids what it can, and CUDA may see no device."""
    within = (sys.executable, FORBIDDING, ",".join(filter(None, (IO_URING, PROCESS_VM))))
    return told(doctor("--format", "json", "--no-test", within=within, CUDA_VISIBLE_DEVICES=""))


@pytest.mark.skipif(not PROCESS_VM, reason="the numbers of the calls are not known for this architecture")
def test_where_ptrace_is_refused_tcp_goes_and_the_reason_is_told(confined: dict[str, Any]) -> None:
    report = confined
    route = routes(report)["DRAM", "DRAM, same host"]
    assert route["route"] == "tcp"
    assert "Operation not permitted" in route["refusals"]["samehost"]
    (slow,) = (finding for finding in report["findings"] if "not by samehost" in finding["what"])
    assert (slow["level"], slow["why"]) == ("slow", route["refusals"]["samehost"])
    assert "a seccomp profile that allows process_vm_readv" in slow["do"]
    assert report["healthy"] is True


def test_where_io_uring_is_forbidden_threads_are_found(confined: dict[str, Any]) -> None:
    assert "files are read and written by threads: the kernel refuses io_uring" in findings(confined, "slow")
    assert routes(confined)["DRAM", "file"]["how"].startswith("threads, no io_uring")


@pytest.mark.parametrize("count", [24, 64])
def test_with_few_descriptors_the_limit_is_named(count: int) -> None:
    ran = doctor("--format", "json", "--no-test", within=("bash", "-c", f'ulimit -n {count}; exec "$@"', "-"))
    report = told(ran)
    assert any(what.startswith(f"RLIMIT_NOFILE is {count}") for what in findings(report, "slow"))
    assert ran.returncode == (0 if report["healthy"] else 1)
    for finding in report["findings"]:
        if finding["level"] == "broken":
            assert "ulimit -n" in finding["do"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root becomes somebody else, by setpriv")
def test_an_unprivileged_user_is_served() -> None:
    """Under root's home there may be interpreters that nobody else may run; the system's serves too if it is the same version."""
    # By `env`, for what setpriv itself runs may be found by what root may do.
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env")
    path = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])
    here = {"HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        program = [*nobody, python, "-P", "-c", "import nixl_async.cli"]
        tried = subprocess.run(program, capture_output=True, check=False, env=os.environ | here)
        if tried.returncode == 0:
            break
    else:
        pytest.skip("no interpreter here is for everybody")
    report = told(doctor("--format", "json", "--no-test", within=(*nobody, python), **here))
    assert findings(report, "broken") == []
    assert routes(report)["DRAM", "DRAM, same host"]["route"] == "samehost"


def test_without_devices_that_cuda_may_see(confined: dict[str, Any]) -> None:
    assert confined["gpu"]["devices"] == []
    assert confined["healthy"] is True
    assert "cuda" in confined["backends"]["missing"]


def test_a_ucx_that_crashes_is_reported_and_left_out(tmp_path: Path) -> None:
    package = tmp_path / "ucxx"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    ran = doctor("--format", "json", "--no-test", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    report = told(ran)
    assert ran.returncode == 1
    assert findings(report, "broken") == ["opening ucx: it was killed by SIGSEGV"]
    assert "killed by SIGSEGV" in report["backends"]["missing"]["ucx"]
    assert routes(report)["DRAM", "DRAM, other host"]["route"] == "tcp"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--format", "xml"], "json"),
        (["--seconds", "0"], "seconds"),
        (["--directory", "/nowhere"], "nixl-async: directory '/nowhere' cannot be written: No such file or directory"),
        (["--fast"], "--fast"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], text: str) -> None:
    ran = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


async def test_a_directory_that_cannot_be_written() -> None:
    with pytest.raises(ConfigurationError, match="'/proc/nowhere' cannot be written"):
        await examine(seconds=0, directory="/proc/nowhere")


def test_little_memory_is_not_filled(tmp_path: Path) -> None:
    facts = Facts()
    assert _nbytes(facts, tmp_path, NBYTES) <= NBYTES
    facts.add("memory", "limit of the cgroup, bytes", 64 << 20, "made")
    assert _nbytes(facts, tmp_path, NBYTES) == 2 << 20
    facts.add("memory", "available bytes", 1 << 20, "made")
    assert _nbytes(facts, tmp_path, NBYTES) == LEAST_NBYTES
