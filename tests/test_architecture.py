"""The house: what each file may import, that everything public is documented, and that every file has its test."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nixl_async
from nixl_async.transfer import mermaid
from tests.agents import ROOT

PACKAGE = ROOT / "nixl_async"
SOURCES = sorted(path.relative_to(ROOT) for path in [*PACKAGE.rglob("*.py"), *(ROOT / "backends").glob("*.py")])
SOURCES = [path for path in SOURCES if not str(path).startswith("nixl_async/backends")]

TESTED_ELSEWHERE = {
    "nixl_async/__init__.py": "tests/test_architecture.py",
    "nixl_async/__main__.py": "tests/test_cli.py",
    "nixl_async/cli.py": "tests/test_cli.py",
    "nixl_async/demo/": "tests/test_cli.py",
    "nixl_async/benchmarks/transfer/": "tests/benchmarks/test_transfer.py",
    "nixl_async/docs/": "tests/docs/test_site.py",
    "nixl_async/testing/": "tests/test_testing.py",
    "nixl_async/native/": "tests/test_native.py",
    "nixl_async/http/__init__.py": "tests/http/test_pool.py",
    "backends/cuda_ipc_": "tests/backends/test_cuda_ipc.py",
    "backends/azure_": "tests/backends/test_azure.py",
    "backends/gcs_": "tests/backends/test_gcs.py",
    "backends/s3_bucket": "tests/backends/test_s3.py",
    "backends/s3_upload": "tests/backends/test_s3.py",
    "nixl_async/relay.py": "tests/test_staging.py",
    "nixl_async/superseding.py": "tests/test_simultaneous.py",
    "nixl_async/cuda_lane.py": "tests/gpu/test_cuda_gpu.py",
    "nixl_async/compat/": "tests/compat/test_behaviours.py",
    "nixl_async/integrations/dynamo_connect/": "tests/integrations/test_dynamo_connect.py",
    "nixl_async/integrations/": "tests/upstream/run.sh",
    "nixl_async/tiers/__init__.py": "tests/tiers/test_store.py",
    "nixl_async/layers/__init__.py": "tests/layers/test_push.py",
    "nixl_async/metrics/__init__.py": "tests/metrics/test_endpoint.py",
    "nixl_async/metrics/families.py": "tests/metrics/test_readings.py",
    "nixl_async/discovery/__init__.py": "tests/discovery/test_finder.py",
    "nixl_async/layers/calls.py": "tests/layers/test_push.py",
    "nixl_async/layers/mover.py": "tests/layers/test_push.py",
    "nixl_async/layers/stream.py": "tests/layers/test_push.py",
    "nixl_async/doctor/__init__.py": "tests/doctor/test_examination.py",
    "nixl_async/doctor/child.py": "tests/doctor/test_children.py",
    "nixl_async/doctor/hardware.py": "tests/doctor/test_findings.py",
    "nixl_async/doctor/report.py": "tests/doctor/test_findings.py",
    "nixl_async/doctor/routes.py": "tests/doctor/test_examination.py",
    "nixl_async/doctor/stage.py": "tests/doctor/test_examination.py",
    "backends/__init__.py": "tests/backends/test_conformance.py",
    "nixl_async/benchmarks/__init__.py": "tests/benchmarks/test_cli.py",
    "nixl_async/benchmarks/kv/__init__.py": "tests/benchmarks/kv/test_cli.py",
    "nixl_async/benchmarks/kv/options.py": "tests/benchmarks/kv/test_cli.py",
    "nixl_async/benchmarks/kv/reports.py": "tests/benchmarks/kv/test_cli.py",
    "nixl_async/benchmarks/kv/profiling.py": "tests/benchmarks/kv/test_running.py",
    "nixl_async/benchmarks/kv/traffic.py": "tests/benchmarks/kv/test_running.py",
    "nixl_async/benchmarks/kv/worker.py": "tests/benchmarks/kv/test_processes.py",
    "nixl_async/benchmarks/serve/__init__.py": "tests/benchmarks/serve/test_run.py",
    "nixl_async/benchmarks/serve/command.py": "tests/benchmarks/serve/test_options.py",
    "nixl_async/benchmarks/serve/fleet.py": "tests/benchmarks/serve/test_leg.py",
    "nixl_async/benchmarks/serve/prefill.py": "tests/benchmarks/serve/test_leg.py",
    "nixl_async/benchmarks/serve/side.py": "tests/benchmarks/serve/test_leg.py",
    "nixl_async/benchmarks/serve/worker.py": "tests/benchmarks/serve/test_leg.py",
}


def _test_of(source: Path) -> str:
    text = str(source)
    for start, test in TESTED_ELSEWHERE.items():
        if text.startswith(start):
            return test
    room = "tests/backends" if text.startswith("backends/") else "tests"
    for name in (
        "benchmarks",
        "benchmarks/kv",
        "benchmarks/serve",
        "discovery",
        "doctor",
        "http",
        "layers",
        "metrics",
        "tiers",
    ):
        room = f"tests/{name}" if text.startswith(f"nixl_async/{name}/") else room
    return f"{room}/test_{source.stem}.py"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_file_has_its_test_file(source: Path) -> None:
    assert (ROOT / _test_of(source)).exists(), f"{source} needs {_test_of(source)}"


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_file_says_what_it_is_for(source: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / source).read_text())), source


def test_importing_the_library_loads_numpy_and_the_standard_library_only() -> None:
    program = (
        "import sys; import numpy; before = set(sys.modules); import nixl_async\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == ["nixl_async"]


def test_everything_public_is_documented() -> None:
    for name in nixl_async.__all__:
        one = getattr(nixl_async, name)
        assert inspect.getdoc(one), name
        if inspect.isclass(one):
            for attribute, value in vars(one).items():
                if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                    assert inspect.getdoc(getattr(one, attribute)), f"{name}.{attribute}"


def test_what_is_exported_is_in_order() -> None:
    assert nixl_async.__all__ == sorted(nixl_async.__all__)


def test_the_backends_are_one_folder_under_two_names() -> None:
    link = PACKAGE / "backends"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "backends"


def test_the_top_level_holds_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: what is in it cannot be told from what was built")
    allowed = {
        "pyproject.toml",
        "nixl_async",
        "backends",
        "examples",
        "tests",
        "bench",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
    }
    assert {path.partition("/")[0] for path in tracked if not path.startswith(".")} == allowed


def test_the_layers_hold() -> None:
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def test_the_readme_draws_the_table_of_transitions() -> None:
    assert f"```mermaid\n{mermaid()}\n```" in (ROOT / "README.md").read_text()


def test_the_changelog_has_the_version() -> None:
    assert f"## {nixl_async.__version__}" in (ROOT / "CHANGELOG.md").read_text()
