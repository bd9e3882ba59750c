"""The distribution `nixl-async-compat`, built and installed into an environment of its own as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
from email.parser import BytesParser
from pathlib import Path
from zipfile import ZipFile

import pytest

import nixl_async.compat
from nixl_async.compat.naming import VERSION
from tests.agents import ROOT

SOURCE = Path(nixl_async.compat.path()).parent / "distribution"
# What vLLM asks of an installed NIXL: vllm/distributed/nixl_utils.py, check_nixl_version("1.5.0").
CHECK = """
import json
from importlib.metadata import packages_distributions, requires, version

import nixl, nixl._api, nixl._bindings, nixl._utils, nixl.logging, nixl_cu12._api, nixl_cu13._api

owners = packages_distributions()
agent = nixl.nixl_agent("installed")
print(json.dumps({
    "owners": {name: owners.get(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")},
    "version": version("nixl-async-compat"),
    "requires": requires("nixl-async-compat"),
    "file": nixl.__file__,
    "api": nixl.__version__,
    "metadata": len(agent.get_agent_metadata()),
}))
"""


def build(source: Path, kind: str, directory: Path) -> Path:
    """Build as pip and `python -m build` do: the backend's hook, in the project's directory, in a process of its own."""
    code = f"import sys; sys.path.insert(0, '.'); import shim_backend; print(shim_backend.build_{kind}(sys.argv[1]))"
    ran = subprocess.run([sys.executable, "-c", code, str(directory)], cwd=source, capture_output=True, text=True, check=True)
    return directory / ran.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An environment which pip has built and installed it into; this library is there as it is here."""
    directory = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin/python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory), "platbase": str(directory)}))
    (packages / "ours.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    ran = subprocess.run([*pip, str(SOURCE)], capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return python, packages


def test_it_is_what_engines_take_for_nixl(installed: tuple[Path, Path]) -> None:
    python, packages = installed
    ran = subprocess.run([python, "-c", CHECK], capture_output=True, text=True, check=False, timeout=60, cwd=packages.parent)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["owners"] == {name: ["nixl-async-compat"] for name in ("nixl", "nixl_cu12", "nixl_cu13")}
    assert tuple(map(int, found["version"].partition("+")[0].split("."))) >= (1, 5)
    assert found["version"].startswith(f"{VERSION}+")
    assert found["api"] == VERSION
    assert found["requires"] == ["nixl-async>=0.1"]
    assert Path(found["file"]).parent == packages / "nixl"
    assert found["metadata"] > 0


def test_a_wheel_of_the_source_distribution_is_the_same(tmp_path: Path) -> None:
    wheel, archive = build(SOURCE, "wheel", tmp_path), build(SOURCE, "sdist", tmp_path)
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(tmp_path / "unpacked", filter="data")
    again = tmp_path / "again"
    again.mkdir()
    (source,) = (tmp_path / "unpacked").iterdir()
    assert build(source, "wheel", again).read_bytes() == wheel.read_bytes()
    with ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        metadata = BytesParser().parsebytes(opened.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("nixl-async-compat", archive.name.split("-")[1].removesuffix(".tar.gz"))
