"""Every page of the documentation does what it says: its blocks run, and print what they are said to print."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import SITE, Block, parse
from tests.docs.programs import environment, run
from tests.docs.stand_ins import stand_in

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.md"))
RUN = [page for page in PAGES if parse((SITE / page).read_text()).blocks]
EXCUSED = [(page, block) for page in PAGES for block in parse((SITE / page).read_text()).blocks if block.excuse is not None]


@pytest.mark.parametrize("page", RUN)
def test_page(page: str, servers: dict[str, Any], tmp_path: Path) -> None:
    text = (SITE / page).read_text()
    needs = parse(text)
    for module in needs.modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    variables = environment()
    for name in needs.servers:
        if isinstance(servers[name], str):
            pytest.skip(servers[name])
        found = stand_in(name, servers[name])
        variables |= found.environment
        for known, address in found.texts.items():
            text = text.replace(known, address)
    (source := tmp_path / "page.md").write_text(text)
    (room := tmp_path / "room").mkdir()
    status, printed = run([sys.executable, "-m", "tests.docs.running", str(source), str(SITE / page)], room, variables)
    assert status == 0, printed


@pytest.mark.parametrize(("page", "block"), EXCUSED, ids=[f"{page}-{block.line}" for page, block in EXCUSED])
def test_excused_block(page: str, block: Block) -> None:
    pytest.skip(f"{page}:{block.line}: {block.excuse}")
