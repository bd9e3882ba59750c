"""The feature matrix: every cell says yes, partly or no and where that is seen; what it names of this repository exists."""

from __future__ import annotations

import re

import pytest

from bench.cli import COMMANDS
from tests.agents import ROOT

PAGE = (ROOT / "nixl_async/docs/explanation/feature_matrix.md").read_text()
COLUMNS = ["nixl_async", "NIXL", "Mooncake", "UCXX", "LMCache"]
LINES = [line for line in PAGE.splitlines() if line.startswith("|")]
ROWS = [cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in LINES) if cells[0].strip("-")]
OURS = 1


def test_every_table_has_the_same_columns() -> None:
    assert ROWS, "the page has no rows"
    heads = [line for line in LINES if line.startswith("| |")]
    assert len(heads) == PAGE.count("\n|---|")
    assert {tuple(cell.strip() for cell in head.strip("|").split("|")[1:]) for head in heads} == {tuple(COLUMNS)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", "-", row[0])[:40])
def test_a_row_answers_for_all_five_and_its_evidence_exists(row: list[str]) -> None:
    assert len(row) == 1 + len(COLUMNS)
    for column, cell in enumerate(row[1:], 1):
        assert cell == "\N{EN DASH}" or re.match(r"\*\*(yes|partly|no)\*\*", cell), (COLUMNS[column - 1], cell)
        # What there is or is not in part has to be seen somewhere; that a thing is not there at all may go without.
        if "**yes**" in cell or "**partly**" in cell or column == OURS:
            assert "`" in cell or "the same command" in cell, (COLUMNS[column - 1], cell)
    for evidence in re.findall(r"`([^`]+)`", row[OURS]):
        if evidence.startswith("python -m bench"):
            name = evidence.removeprefix("python -m bench").strip()
            assert name in COMMANDS or (name == ".churn" and (ROOT / "bench/churn/__main__.py").exists()), evidence
        elif "/" in evidence or (ROOT / evidence).suffix or evidence == "LICENSE":
            assert (ROOT / evidence).exists(), evidence


def test_names_of_rows_are_unique() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS)
