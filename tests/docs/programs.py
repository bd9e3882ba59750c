"""Programs that end with all that they have started, in an environment that says nothing of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.agents import ROOT


def run(command: list[str], directory: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command in a session of its own; return its status and what it printed; nothing of the session outlives it."""
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=90)
        finally:
            process.poll()
            for one in _session(process.pid):
                os.kill(one, signal.SIGKILL)
    return process.returncode, printed.decode()


def _session(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
        except OSError:
            continue
    return found


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NIXL_", "AWS_", "AZURE_", "UCX_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT)}
