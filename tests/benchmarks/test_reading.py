"""Both forms of results are read: files of `nixl-async bench`, and the lines of `python -m bench --format json`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report import Figure, Row, to_json
from nixl_async.benchmarks.compare import compare
from nixl_async.benchmarks.reading import read
from nixl_async.benchmarks.results import ResultsError
from tests.benchmarks.made import made

HEADER = {"when": "2026-01-31T12:00:00+00:00", "cpu": "CPU", "cores": 2, "kernel": "6.8", "nixl_async": "python=3.12"}


def lines(path: Path, *rows: Row) -> Path:
    path.write_text("\n".join([to_json({"system": HEADER}), *(to_json(row.as_dict()) for row in rows)]) + "\n")
    return path


def throughput(samples: tuple[float, ...]) -> Row:
    case = {"path": "same host", "op": "write", "page": 4096}
    return Row(
        "throughput", case, "GB/s", Figure("nixl_async", samples), [Figure("nixl", (1.0, 2.0))], Figure("memcpy", (9.0,))
    )


def test_a_result_file_is_read(tmp_path: Path) -> None:
    made().write(tmp_path / "a.json")
    assert read(tmp_path / "a.json") == (made(), 0)


def test_lines_become_rows(tmp_path: Path) -> None:
    latency = Row("latency", {"path": "TCP"}, "us", Figure("nixl_async", (10.0, 12.0)))
    other = Row("planner", {"work": "plan"}, "%", Figure("nixl_async", (1.0,)))
    results, left = read(lines(tmp_path / "a.jsonl", throughput((3.0, 4.0)), latency, other))
    assert left == 1
    ours, theirs, timed = results.rows
    assert (ours.contender, ours.op, ours.route, ours.block_nbytes) == ("nixl_async", "write", "same host", 4096)
    assert ours.throughput == (3.0, 4.0)
    assert ours.share_of_raw == pytest.approx(3.5 / 9)
    assert (theirs.contender, theirs.throughput) == ("nixl", (1.0, 2.0))
    assert [one.quantile(0.5) for one in timed.latencies] == pytest.approx([10e-6, 12e-6])
    assert results.system["versions"] == {"nixl_async": "python=3.12"}


def test_lines_compare_with_lines(tmp_path: Path) -> None:
    first, _ = read(lines(tmp_path / "a", throughput((3.0, 3.1, 3.05, 2.95, 3.0))))
    second, _ = read(lines(tmp_path / "b", throughput((6.0, 6.1, 6.05, 5.95, 6.0))))
    (ours, theirs) = compare(first, second).comparisons
    assert (ours.verdict, round(ours.ratio, 2)) == ("faster", 2.0)
    assert theirs.verdict == "too few"


def test_lines_without_samples_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a", throughput((3.0,)))
    path.write_text(path.read_text().replace('"samples"', '"sample"'))
    with pytest.raises(ResultsError, match="line 2 is no row of python -m bench: .*nixl_async has no samples"):
        read(path)


def test_lines_of_other_units_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no row in GB/s"):
        read(lines(tmp_path / "a", Row("planner", {}, "%", Figure("nixl_async", (1.0,)))))


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('{"system": 1}\n{"a": 2}\n')
    with pytest.raises(ResultsError, match="is not JSON"):
        read(path)
