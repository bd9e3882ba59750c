"""The report as text: every finding with what to do, every fact with its source, and reasons beside routes."""

from __future__ import annotations

import io

from rich.console import Console

from nixl_async.doctor.facts import Facts
from nixl_async.doctor.report import Finding, Level, Report, Route, Tried
from nixl_async.doctor.text import print_report


def printed(report: Report, width: int = 200) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=width), report)
    return out.getvalue()


def test_findings_come_first_with_what_to_do() -> None:
    findings = [Finding(Level.BROKEN, "it is [broken]", "because", "mend it"), Finding(Level.OK, "fine")]
    lines = printed(Report(Facts(), findings=findings)).splitlines()
    assert lines[2:6] == ["BROKEN it is [broken]", "       why: because", "       do: mend it", "OK     fine"]
    assert lines[-1] == "something is broken: see the first findings (1 broken, 0 slow, 0 note, 1 ok)"


def test_facts_are_in_units_with_their_sources() -> None:
    facts = Facts()
    facts.add("memory", "bytes", 3 << 30, "/proc/meminfo")
    facts.add("kernel", "CAP_SYS_PTRACE", True, "/proc/self/status")
    facts.add("kernel", "yama.ptrace_scope", None, "/proc/sys/kernel/yama/ptrace_scope")
    text = printed(Report(facts))
    rows = [line.split() for line in text.splitlines()]
    assert ["memory", "bytes", "3", "GiB", "/proc/meminfo"] in rows
    assert ["kernel", "CAP_SYS_PTRACE", "yes", "/proc/self/status"] in rows
    assert ["yama.ptrace_scope", "-", "/proc/sys/kernel/yama/ptrace_scope"] in rows
    assert text.endswith("nothing is broken (0 broken, 0 slow, 0 note, 0 ok)\n")


def test_routes_that_go_the_same_way_are_one_line_with_reasons() -> None:
    refusals = {"memory": "another process", "samehost": "another process", "gds": "no device", "posix": "no file"}
    there = Route("DRAM", "DRAM, other host", "tcp", "", ("ucx",), refusals)
    back = Route("DRAM, other host", "DRAM", "tcp", "", ("ucx",), refusals)
    peers = Route("DRAM, same host", "DRAM, other host", None, "", (), {"tcp": "both sides are peers'"})
    alone = Route("file", "DRAM", None, "", (), {"tcp": "it copies DRAM only"})
    ranks = {"memory": 0, "samehost": 10, "tcp": 30, "posix": 60}
    report = Report(Facts(), routes=[there, back, peers, alone], ranks=ranks, missing={"gds": "no device"})
    text = printed(report)
    assert text.count("⇄ DRAM, other host") == 1
    assert "memory, samehost: another process" in text
    # Who would come after it, and who is not there at all, would not have gone before it.
    assert "posix: no file" not in text
    assert "both sides are peers'" not in text
    assert "none" in text
    assert "tcp: it copies DRAM only" in text
    assert "gds is not here: no device" in text


def test_the_self_test_shows_shares_and_failures() -> None:
    good = Tried("tcp", "a", True, (4.0, 5.0, 6.0), (2.0,), (10.0,), 12e-6)
    bad = Tried("ucx", "a", False, error="3 of 9 pages arrived wrong")
    text = printed(Report(Facts(), trials=[good, bad]))
    (row,) = (line for line in text.splitlines() if "every one right" in line)
    for cell in ("5.00", "50%", "2.00", "20%", "10.00", "12 µs"):
        assert cell in row
    assert "FAILED: 3 of 9 pages arrived wrong" in text
