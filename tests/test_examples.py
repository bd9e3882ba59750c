"""Every example runs, says what it should, is listed, and ends at Ctrl-C or at a wrong argument without a fuss."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nixl_async.testing.servers import Server
from tests.agents import ROOT

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.iterdir() if path.suffix == ".py" or (path / "__main__.py").exists())
SAYS = {
    "prefill_decode.py": "every byte verified",
    "hello.py": "the page is there",
    "cancel.py": "nothing moves any more",
    "notifications.py": "layer 3",
    "paged_kv_push.py": "request 7",
    "peer_restart.py": "joined again",
    "out_of_band.py": "met through",
    "block_tables.py": "every block is in its place",
    "chaos.py": "pages, every byte checked",
    "custom_backend.py": "256 pages there by proc-mem and back by proc-mem, every byte checked",
    "layer_streaming.py": "layer 7 arrived, all of it: True",
    "migrate_from_nixl": "drop-in -> nixl_async written, read back, every byte checked by both",
    "offload_tiers.py": "another process read 8 blocks from objects, every byte checked",
    "files_and_objects.py": "62 of 64 are there",
}
NIXL = os.environ.get("NIXL_ASYNC_NIXL_PYTHON", str(ROOT / ".nixl-env/bin/python"))
# Less than by default, where nothing more is shown by it; and NIXL itself where it is installed.
ARGUMENTS = {
    "offload_tiers.py": ["--tokens", "128"],
    "chaos.py": ["--seconds", "3.5"],
    "migrate_from_nixl": ["--nixl-python", NIXL] if Path(NIXL).exists() else [],
}
WRONG = {
    "chaos.py": (["--seconds", "soon"], "invalid float value: 'soon'"),
    "offload_tiers.py": (["--tokens", "3"], "--tokens is 3; a block has 16 tokens"),
    "files_and_objects.py": (["--url", "ftp://x"], "store URL 'ftp://x' has scheme 'ftp'; known are file://, s3://"),
    "migrate_from_nixl": (["--nixl-python", "/nowhere"], "--nixl-python: /nowhere is not a program"),
}
# Those that have processes or tiers, and are at it for a while after the first line.
LONG = {"chaos.py": [], "offload_tiers.py": ["--tokens", "2048"]}
MOST_LINES = 150


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_each_example_is_expected_to_say_something() -> None:
    assert set(EXAMPLES) == set(SAYS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    ran = run(name, *ARGUMENTS.get(name, []))
    assert ran.returncode == 0, ran.stderr
    assert SAYS[name] in ran.stdout
    assert ran.stderr == ""
    if name == "migrate_from_nixl":
        pairs = [line.split()[:3] for line in ran.stdout.splitlines()]
        kinds = ["nixl_async", "drop-in", "NIXL"] if ARGUMENTS[name] else ["nixl_async", "drop-in"]
        assert pairs == [[sender, "->", receiver] for sender in kinds for receiver in kinds]


@pytest.mark.parametrize(
    ("name", "says"), [("offload_tiers.py", "8 blocks from objects"), ("files_and_objects.py", "62 of 64")]
)
def test_the_objects_are_in_s3(name: str, says: str, seaweed: Server) -> None:
    store = ["--url", f"s3://{seaweed.bucket}/example-{name}", "--endpoint", seaweed.endpoint]
    keys = {"AWS_ACCESS_KEY_ID": seaweed.key_id, "AWS_SECRET_ACCESS_KEY": seaweed.secret, "AWS_REGION": seaweed.region}
    ran = run(name, *store, *(ARGUMENTS.get(name, [])), **keys)
    assert ran.returncode == 0, ran.stderr
    assert says in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(name: str) -> None:
    arguments, says = WRONG[name]
    ran = run(name, *arguments)
    assert ran.returncode != 0
    assert says in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_ends_it_with_all_its_processes(name: str) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / name), *LONG[name]],
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    # To the program alone: its processes have to be ended by it. They have its standard error, which ends with the last of them.
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert "Traceback" not in said


def test_the_readme_lists_every_example() -> None:
    text = (FOLDER / "README.md").read_text()
    listed = re.findall(r"^\| \[([\w./]+)\]\(([\w./]+)\)", text, re.MULTILINE)
    assert all((FOLDER / target).exists() for _, target in listed)
    there = [path.name if path.is_file() else f"{path.name}/" for path in FOLDER.iterdir() if path.name != "__pycache__"]
    assert sorted(name for name, _ in listed) == sorted(set(there) - {"README.md"})


def test_every_example_is_short_and_says_how_to_run_it() -> None:
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES, path
        said = text.split('"""')[1]
        assert path.parent != FOLDER or f"python examples/{path.name}" in said, path


def test_the_paths_that_the_readmes_name_exist() -> None:
    for readme in sorted(FOLDER.rglob("README.md")):
        text = readme.read_text()
        named = re.findall(r"`((?:nixl_async|backends|examples|tests|bench)/[\w./]*)`", text)
        linked = re.findall(r"\]\((?!http)([\w./]+)\)", text)
        run = re.findall(r"(?:bin/)?python (examples/[\w./]+)", text)
        missing = [path for path in [*named, *run] if not (ROOT / path).exists()]
        assert missing + [path for path in linked if not (readme.parent / path).exists()] == [], readme


def test_the_table_of_the_migration_names_what_the_programs_call() -> None:
    programs = [(FOLDER / "migrate_from_nixl" / f"{name}.py").read_text() for name in ("with_nixl", "with_nixl_async")]
    rows = re.findall(
        r"^\| (\d)\. [^|]+\| ([^|]+)\| ([^|]+)\|", (FOLDER / "migrate_from_nixl/README.md").read_text(), re.MULTILINE
    )
    assert [number for number, _, _ in rows] == [str(at) for at in range(1, 10)]
    for program, texts in zip(programs, zip(*[(nixl, ours) for _, nixl, ours in rows], strict=True), strict=True):
        assert [number for number, _, _ in rows if f" {number}. " not in program] == []
        for text in texts:
            called = re.findall(r"`(?:await )?(?:async with )?(?:agent\.)?(\w+)\(", text)
            assert all(f"{name}(" in program for name in called), (called, text)
