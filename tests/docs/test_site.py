"""The site has a page for all that there is, and its own tables are the code's."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import nixl_async
from bench.cli import COMMANDS
from nixl_async import Agent
from nixl_async.benchmarks.cli import app as benchmarks
from nixl_async.cli import app
from nixl_async.transfer import TRANSITIONS
from tests.agents import ROOT
from tests.docs.pages import SITE
from tests.docs.test_pages import PAGES

REFERENCE = "\n".join(path.read_text() for path in sorted((SITE / "reference").glob("*.md")))
MODULES = ("nixl_async", "nixl_async.tiers", "nixl_async.metrics", "nixl_async.testing")
IN_TABLES = {"FAMILIES", "BackendTests"}


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = {"index.md"}
    for page in PAGES:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (SITE / page).read_text(), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {((SITE / page).parent / f"{name}.md").relative_to(SITE).as_posix() for name in names}
    assert listed == set(PAGES)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_its_place_once(module: str) -> None:
    documented = re.findall(r"^\.\. auto\w+:: (\S+)", REFERENCE, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    objects = [_object(name) for name in documented]
    for name in set(importlib.import_module(module).__all__) - IN_TABLES:
        assert any(getattr(importlib.import_module(module), name) is one for one in objects), f"{module}.{name}"


def _object(path: str) -> Any:
    names = path.split(".")
    for n in range(len(names), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(names[:n]))
        except ModuleNotFoundError:
            continue
        for name in names[n:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def test_every_call_of_an_agent_has_its_place() -> None:
    documented = re.findall(r"^\.\. auto(?:method|property):: nixl_async\.Agent\.(\w+)$", REFERENCE, re.MULTILINE)
    assert sorted(documented) == sorted(name for name in dir(Agent) if not name.startswith("_"))


def test_every_command_has_its_place() -> None:
    documented = re.findall(r"^```\{command\} (.+)$", (SITE / "reference/command-line.md").read_text(), re.MULTILINE)
    found = [*_commands(typer.main.get_command(app)), *_commands(typer.main.get_command(benchmarks), "bench")]
    assert sorted(documented) == sorted(name for name in found if name != "bench")


def _commands(command: Any, *names: str) -> Iterator[str]:
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(names)
    else:
        for name, one in below.items():
            yield from _commands(one, *names, name)


def test_promises_name_tests_that_exist() -> None:
    named = re.findall(r"`((?:tests|nixl_async)/[\w/]+\.py)(?:::(\w+))?`", (SITE / "explanation/promises.md").read_text())
    assert len(named) > 15
    for path, function in named:
        assert f"def {function}" in (ROOT / path).read_text(), f"{path}::{function}"


@pytest.mark.parametrize("page", PAGES)
def test_the_benchmarks_that_pages_name_exist(page: str) -> None:
    named = re.findall(r"python -m bench ([a-z][\w-]*)|bench `([a-z-]+)`", (SITE / page).read_text())
    assert {one or other for one, other in named} <= {"all", "gpu", *COMMANDS}


@pytest.mark.parametrize("page", PAGES)
def test_the_paths_that_pages_name_exist(page: str) -> None:
    for path in re.findall(r"`((?:nixl_async|backends|examples|tests|bench)/[\w./]*|\.ci/\w+)`", (SITE / page).read_text()):
        assert (ROOT / path).exists(), path


def test_the_figure_shows_each_state_and_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SITE))
    drawn = importlib.import_module("states").picture(TRANSITIONS)
    monkeypatch.delitem(sys.modules, "states")
    names = [state.name for state in TRANSITIONS]
    assert sorted(re.findall(r'class="name".*?>(\w+)<', drawn)) == sorted(names)
    events = [event.value for arrows in TRANSITIONS.values() for event in arrows]
    told = [event for text in re.findall(r'class="event".*?>([\w, ]+)<', drawn) for event in text.split(", ")]
    assert sorted(told) == sorted(events)


def test_the_version_is_the_librarys() -> None:
    assert "version = nixl_async.__version__" in Path(SITE / "conf.py").read_text()
    assert nixl_async.__version__
