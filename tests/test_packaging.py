"""What is shipped: the source distribution, the wheel, what they need, and what is said when they cannot be built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

import nixl_async
from tests.agents import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; sys.path.insert(0, 'nixl_async/native'); import pep517; print(pep517.build_{kind}(sys.argv[1]))"
NEVER = re.compile(r"(^|/)(tests|bench|examples|build|docs)/|\.(c|h|pyc|md)$|/stale\.py$")


def build(kind: str, source: Path, into: Path, code: str = BUILD, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the build backend's hook as pip does, in the project's directory, in a process of its own."""
    into.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code.format(kind=kind), str(into)]
    return subprocess.run(
        command, cwd=source, capture_output=True, text=True, check=False, timeout=100, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of this checkout, and the wheel that is built of that."""
    place = tmp_path_factory.mktemp("packaging")
    checkout = place / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, checkout)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_native.c")
    for name in ("nixl_async", "backends", "tests"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=unwanted)
    assert (checkout / "nixl_async/backends").is_symlink()
    ran = build("sdist", checkout, place / "dist")
    assert ran.returncode == 0, ran.stderr
    (archive,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    # What an earlier build left behind.
    stale = source / f"build/lib.linux-{os.uname().machine}-{sys.implementation.cache_tag}/nixl_async/stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    ran = build("wheel", source, place / "dist")
    assert ran.returncode == 0, ran.stderr
    (wheel,) = (place / "dist").glob("*.whl")
    return archive, wheel


def shipped() -> set[str]:
    """The files of the package that whoever installs it needs."""
    found = {path.relative_to(ROOT) for path in (ROOT / "nixl_async").rglob("*.py") if "docs" not in path.parts}
    found |= {Path("nixl_async/backends") / path.name for path in (ROOT / "backends").glob("*.py")}
    data = ["py.typed", "metrics/dashboard.json", "compat/distribution/pyproject.toml", "native/_native.abi3.so"]
    return {str(path) for path in found} | {f"nixl_async/{name}" for name in data}


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        entries = wheel.infolist()
    files = {entry.filename for entry in entries if ".dist-info/" not in entry.filename}
    assert files == shipped()
    assert not [name for name in files if NEVER.search(name)]
    # Real files: a link in a zip file would be its target's path.
    assert all(entry.file_size > 100 for entry in entries if entry.filename.startswith("nixl_async/backends/s3"))
    assert not [entry.filename for entry in entries if (entry.external_attr >> 16) & 0o170000 == 0o120000]


def test_the_wheel_is_of_the_stable_abi_and_says_what_it_is(built: tuple[Path, Path]) -> None:
    assert re.fullmatch(rf"nixl_async-{re.escape(nixl_async.__version__)}-cp311-abi3-linux_\w+\.whl", built[1].name)
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        said = BytesParser().parsebytes(wheel.read(name))
        assert [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert said["Version"] == nixl_async.__version__
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    assert set(said.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])


def test_the_source_distribution_has_what_the_build_needs_and_no_tests(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    files = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert not [member.name for member in members if member.issym()]
    assert shipped() - {"nixl_async/native/_native.abi3.so"} <= files
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nixl_async/native").glob("*.[ch]")}
    assert native - {"nixl_async/native/_native.c"} <= files
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= files
    assert not [name for name in files if name.startswith(("tests/", "bench/", "backends/"))]


@pytest.mark.parametrize(
    ("before", "environment", "said"),
    [
        ("", {"PATH": "/nowhere", "CC": ""}, "there is no '.*cc' on PATH"),
        ("", {"CC": "no-such-compiler -O2"}, "there is no 'no-such-compiler' on PATH"),
        ("import sys; sys.platform = 'darwin'; ", {}, "it runs on Linux only, and this is darwin"),
        ("import sysconfig; sysconfig.get_path = lambda name: '/nowhere'; ", {}, "there is no /nowhere/Python.h"),
    ],
    ids=["no compiler", "no CC", "macOS", "no headers"],
)
def test_what_is_missing_to_build_is_named(tmp_path: Path, before: str, environment: dict[str, str], said: str) -> None:
    code = BUILD.replace("import pep517", f"import pep517; {before}pass")
    ran = build("wheel", ROOT, tmp_path, code, **environment)
    assert ran.returncode == 1
    assert re.search(f"nixl_async cannot be built here: .*{said}", ran.stderr), ran.stderr
    assert "Traceback" not in ran.stderr


def direct() -> dict[str, set[str]]:
    """Each package that `pyproject.toml` names, and where."""
    project = PROJECT["project"]
    named: dict[str, set[str]] = {}
    groups = {"always": project["dependencies"], "building": PROJECT["build-system"]["requires"]}
    for group, requirements in (groups | project["optional-dependencies"]).items():
        for requirement in requirements:
            name = normal(re.split(r"[\[<>=!;~ ]", requirement)[0])
            if name != "nixl-async":
                named.setdefault(name, set()).add(group)
    return named


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def table() -> dict[str, str]:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", (ROOT / ".github/DEPENDENCIES.md").read_text(), re.MULTILINE)
    assert rows[0] == ("package", "license")
    return {normal(name): said for names, said in rows[1:] for name in names.split(", ")}


def test_every_direct_dependency_and_its_license_is_listed() -> None:
    listed = table()
    assert set(listed) == set(direct())
    compared = 0
    for name, said in listed.items():
        try:
            expression = metadata(name).get("License-Expression")
        except PackageNotFoundError:
            continue
        if expression is not None:
            compared += 1
            assert said == expression, name
    assert compared > 10


def test_optional_packages_that_messages_offer_are_extras() -> None:
    offered = set()
    for path in (ROOT / "nixl_async").rglob("*.py"):
        offered |= set(re.findall(r"nixl-async\[([\w-]+)\]", path.read_text()))
    for path in (ROOT / "backends").glob("*.py"):
        offered |= set(re.findall(r"nixl-async\[([\w-]+)\]", path.read_text()))
    assert len(offered) > 5
    assert offered <= set(PROJECT["project"]["optional-dependencies"])


def test_both_sets_of_all_extras_are_complete() -> None:
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    for everything in ("all-cu12", "all-cu13"):
        whole = " ".join(extras[everything])
        for name in ("s3", "azure", "gcs", "metrics", "tracing", "uvloop", "verify"):
            assert re.search(rf"[\[,]{name}[,\]]", whole), (everything, name)


def test_the_second_distribution_needs_this_version_or_an_earlier_one() -> None:
    project = tomllib.loads((ROOT / "nixl_async/compat/distribution/pyproject.toml").read_text())["project"]
    (floor,) = re.findall(r"nixl-async>=([\d.]+)", " ".join(project["dependencies"]))
    assert [int(part) for part in floor.split(".")] <= [int(part) for part in nixl_async.__version__.split(".")]
    assert project["requires-python"] == PROJECT["project"]["requires-python"]


def test_the_workflows_use_the_scripts_that_are_here() -> None:
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        scripts = [name for step in steps for name in re.findall(r"\.ci/\w+", step.get("run", ""))]
        assert all((ROOT / name).exists() for name in scripts), path.name
        assert all("@" in step["uses"] for step in steps if "uses" in step)
    wheels = (ROOT / ".github/workflows/wheels.yml").read_text()
    assert re.search(r"cibuildwheel==\d", wheels)
