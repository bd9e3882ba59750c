"""Every example runs, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "prefill_decode.py": "every byte verified",
    "hello.py": "the page is there",
    "cancel.py": "nothing moves any more",
    "notifications.py": "layer 3",
    "peer_restart.py": "joined again",
    "out_of_band.py": "met through",
    "block_tables.py": "every block is in its place",
    "layer_streaming.py": "layer 7 arrived, all of it: True",
    "offload_tiers.py": "every byte verified",
    "files_and_objects.py": "62 of 64 are there",
}

ARGUMENTS = {"offload_tiers.py": ["--tokens", "256"]}
"""Less than by default, where nothing more is shown by it."""


def test_each_example_is_expected_to_say_something() -> None:
    assert {path.name for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path) -> None:
    command = [sys.executable, str(path), *ARGUMENTS.get(path.name, [])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert SAYS[path.name] in ran.stdout
    assert ran.stderr == ""
