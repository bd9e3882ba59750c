"""The document: what it says is what the files say."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.record.files import Part
from bench.record.render import document
from tests.record.made import row, suite, sweep

GOOD = {
    (op, block, batch): ((4.0,) * 3, (2.0,) * 3) for op in ("write", "read") for block in (4096, 16384) for batch in (1, 4)
}


def sections(*parts: Part) -> dict[str, str]:
    """Return the document's sections by their headings."""
    first, *others = document(parts).split("\n## ")
    return {"": first} | {text.partition("\n")[0]: text.partition("\n")[2] for text in others}


def rows_of(text: str, begin: str) -> list[list[str]]:
    """Return the cells of the lines of tables that begin so."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {begin}")
    ]


def test_a_run_without_a_loss() -> None:
    found = sections(sweep("sweep-samehost", GOOD), sweep("sweep-tcp", GOOD), suite("throughput", [row(3.0, 1.0)]))
    assert (
        found["Where we lose"].strip()
        == "In no row that was measured is a peer better by more than 5 %, and no target is missed."
    )
    summary = found["Summary"]
    assert rows_of(summary, "sweep, points measured") == [["sweep, points measured beside NIXL", "16", ""]]
    assert rows_of(summary, "sweep, geometric mean") == [["sweep, geometric mean of the ratios", "2.00", "✅ ≥ 2"]]
    assert rows_of(summary, "sweep, points not slower")[0][1:] == ["100.0%", "✅ all"]
    assert found["The sweep"].count("### ") == 4
    assert "Absent and failed" not in found


def test_every_loss_is_named_in_the_list_and_marked_in_its_table() -> None:
    points: dict[Any, Any] = GOOD | {("read", 4096, 4): ((0.8, 0.8, 0.8), (1.0, 1.0, 1.0))}
    slow = row(1.0, 2.0, op="write", page=4096)
    slow.at_least("NIXL", 3.0)
    found = sections(sweep("sweep-tcp", points), suite("throughput", [slow, row(9.0, 1.0, op="read", page=4096)]))
    lost = found["Where we lose"]
    assert rows_of(lost, "throughput | write")[0] == [
        "throughput",
        "write, page 4 KiB",
        "1 GB/s",
        "NIXL",
        "2 GB/s",
        "0.50",
        "-",
        "-",
    ]
    assert rows_of(lost, "throughput | write")[1] == ["throughput", "write, page 4 KiB", ">= 3x NIXL", "0.50x"]
    assert rows_of(lost, "the sweep")[0][:2] == ["the sweep, tcp", "read, 4 KiB x 4"]
    assert rows_of(found["Summary"], "sweep, points not slower")[0][1:] == ["87.5%", "❌ all"]
    assert rows_of(found["Summary"], "sweep, least")[0][1] == "0.80: the sweep, tcp, read, 4 KiB x 4"
    _, read = found["The sweep"].split("### the sweep, tcp, read")
    assert rows_of(read, "4 KiB")[0] == ["4 KiB", "🟦 2.00", "🟥 **0.80**"]
    (table,) = (text for title, text in found.items() if title == "Many pages in random order")
    assert "(🟥 **0.50x**)" in table
    assert "❌ >= 3x NIXL: 0.50x" in table
    assert "(9.00x)" in table


def test_points_that_are_left_out_or_open_are_told() -> None:
    points = {
        ("write", 4096, 1): ((0.9, 0.94, 1.5), (1.0,) * 3),
        ("write", 4096, 4): ((1.0, 1.0, 1.0), (1.0,) * 3),
        ("write", 16384, 1): ((1.2,) * 3, (1.0,) * 3),
    }
    text = sections(sweep("sweep-tcp", points))["The sweep"]
    assert rows_of(text, "4 KiB")[0] == ["4 KiB", "🟥 **0.94**?", "⬜ 1.00"]
    assert rows_of(text, "16 KiB")[0] == ["16 KiB", "🟩 1.20", "-"]
    assert "Requests of more than 128 KiB are not measured (-)" in text


def test_without_nixl_there_are_speeds_and_no_ratios() -> None:
    part = sweep("sweep-tcp", {("write", 4096, 1): ((1.25,), None)})
    part = dataclasses.replace(part, system={**part.system, "absent": {"nixl": "it has no environment here"}})
    found = sections(part)
    assert "NIXL was not there" in found["The sweep"]
    assert rows_of(found["The sweep"], "4 KiB") == [["4 KiB", "1.25"]]
    assert found["Where we lose"].strip() == "Nothing was measured beside a peer, and no target was judged."
    assert found["Absent and failed"].strip() == "- nixl: it has no environment here"


def test_what_failed_or_was_interrupted_is_not_hidden() -> None:
    failed = suite("throughput", [row(1.0, 1.0)], failures=("WorkerError: it ended\nwith a traceback",))
    stopped = suite("latency", [], interrupted=True, warnings=("fio is left out",))
    found = sections(failed, stopped)
    assert rows_of(found["Summary"], "parts that did not")[0][1:] == ["throughput, latency", "❌ none"]
    assert "- throughput: WorkerError: it ended\n  with a traceback" in found["Absent and failed"]
    assert "- latency: fio is left out" in found["Absent and failed"]
    assert [cells[-1] for cells in rows_of(found["How it was measured"], "throughput")] == ["failed"]
    assert [cells[-1] for cells in rows_of(found["How it was measured"], "latency")] == ["interrupted"]


def test_parts_that_are_not_of_one_run_are_told() -> None:
    one, other = suite("throughput", [row(1.0, 1.0)]), suite("latency", [row(1.0, 1.0)])
    assert "Put together" not in document([one, other])
    later = dataclasses.replace(other.about, invocation="2026-02-01T12:00:00+00:00", sources="def")
    text = document([one, dataclasses.replace(other, about=later, system={**other.system, "cpu": "another"})])
    assert "Put together from 2 invocations" in text
    assert "different machines:** throughput; latency." in text
    assert "different states of the code:** throughput; latency." in text


def test_tiny_sizes_are_told() -> None:
    part = suite("throughput", [row(1.0, 1.0)])
    assert "Tiny sizes" not in document([part])
    assert "Tiny sizes" in document([dataclasses.replace(part, about=dataclasses.replace(part.about, quick=True))])


def test_bars_and_line_ends_do_not_break_a_table() -> None:
    text = document([suite("throughput", [row(1.0, 1.0, label="a|b\nc", path="x|y")])])
    (head,) = (line for line in text.splitlines() if line.startswith("| path"))
    assert "a\\|b c" in head
    assert head.replace("\\|", "").count("|") == text.splitlines()[text.splitlines().index(head) + 1].count("|")
