"""The README's example runs, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cli import COMMANDS
from nixl_async import errors
from tests.agents import ROOT

DOCUMENTS = [
    "README.md",
    "bench/README.md",
    "bench/RESULTS.md",
    "backends/README.md",
    "examples/README.md",
    "examples/fastapi_disagg/README.md",
    "examples/migrate_from_nixl/README.md",
]
README = (ROOT / "README.md").read_text()


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "snippet.py"
    path.write_text(snippet)
    ran = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "nbytes=67108864" in ran.stdout
    assert "layer 0" in ran.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_paths_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    rooms = "nixl_async|backends|examples|tests|bench"
    for path in re.findall(rf"`((?:{rooms})/[\w./]*|\.ci/\w+)`", text):
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_the_map_has_every_room() -> None:
    section = README[README.index("## The map") :]
    for path in sorted((ROOT / "nixl_async").iterdir()):
        if path.name.startswith(("_", ".")) or path.suffix not in (".py", ""):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in section or f"nixl_async/{name}" in section or path.name == "backends", name


def test_every_error_is_named() -> None:
    section = README[README.index("## Errors") : README.index("## The map")]
    for name, one in vars(errors).items():
        if isinstance(one, type) and issubclass(one, errors.NixlError) and name != "InvalidTransition":
            assert f"`{name}`" in section, name


def test_commands_of_the_bench_exist() -> None:
    known = {"all", "gpu", "results", *COMMANDS}
    for document in DOCUMENTS:
        for command in re.findall(r"python -m bench ([\w-]+)", (ROOT / document).read_text()):
            assert command in known, f"{document}: {command}"


def test_the_plugin_of_the_backend_guide_passes_the_suite(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "backends/README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path, env=_environment())
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
