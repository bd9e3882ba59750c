"""What is reported of rounds made by hand: as a table, as a result file that can be drawn and compared, as CSV and Parquet."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nixl_async.benchmarks.compare import compare
from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.plot import make_report
from nixl_async.benchmarks.results import load
from nixl_async.benchmarks.serve import report
from nixl_async.benchmarks.serve.options import Options, Served, configurations, make, requests_of
from tests.benchmarks.made import SYSTEM
from tests.benchmarks.serve.made import failed, record, turn, write_model

LAYERS, WHOLE = configurations(Options(backend=("tcp",)))
# 100 and 300 ms to the first token; goodput 2 in 0.8 s.
FAST = turn(record(0, 0.0, [0.1, 0.12], tiers=["dram"]), record(1, 0.5, [0.8]))
SLOW = turn(record(0, 0.0, [0.2, 0.22]), record(1, 0.5, [1.1]), failed(2, 0.6))
MEASURED = {LAYERS: [FAST, FAST], WHOLE: [SLOW, SLOW]}


@pytest.fixture
def served(tmp_path: Path) -> tuple[Options, Served]:
    chosen = make({"model": write_model(tmp_path), "backend": ("tcp",)})
    return chosen, Served.of(chosen, requests_of(chosen, 0))


def write(served: tuple[Options, Served], form: Format, output: Path | str = "") -> None:
    chosen = dataclasses.replace(served[0], format=form, output=str(output))
    report.write(chosen, served[1], MEASURED, ["bench", "serve"], SYSTEM, "2026-01-31T12:00:00+00:00")


def test_figures_by_hand(served: tuple[Options, Served]) -> None:
    row = report.figures(served[0], LAYERS, MEASURED[LAYERS])
    assert row["ttft_p50_ms"] == pytest.approx(200)
    assert row["itl_p50_ms"] == pytest.approx(20)
    assert row["exposed_p99_ms"] == pytest.approx(20)
    assert row["goodput"] == pytest.approx(2 / 0.8)
    assert (row["served"], row["failed"], row["attainment"], row["route"]) == (4, 0, 1.0, "tcp")
    assert row["hit_rate_dram"] == pytest.approx(32 / 200)
    assert (row["kv_gb"], row["tier_read_gb"], row["tier_written_gb"]) == pytest.approx((2e-4, 3e-9, 4e-9))
    # Tiers' own copies are not among what went to peers.
    assert (row["moved_gb"], row["cpu_seconds"]) == pytest.approx((5e-9, 1.0))
    other = report.figures(served[0], WHOLE, MEASURED[WHOLE])
    # One came too late for 500 ms, one failed.
    assert (other["failed"], other["attainment"]) == (2, pytest.approx(1 / 3))
    assert set(row) == set(other) <= set(report.COLUMNS)


def test_the_table_has_what_was_measured(served: tuple[Options, Served]) -> None:
    text = io.StringIO()
    report.print_table(*served, MEASURED, Console(file=text, width=200))
    for part in ("layers, tcp", "4, 2 failed", "200.0 / 300.0", "2.50", "100%", "16%", "4 layers, 1024 bytes", "Poisson 4/s"):
        assert part in text.getvalue()
    assert "tcp: by layers, exposed p50 is 1.00 times and TTFT p50 0.50 times what they are whole" in text.getvalue()


def test_a_result_file_can_be_read_compared_and_drawn(served: tuple[Options, Served], tmp_path: Path) -> None:
    write(served, Format.JSON, tmp_path / "a.json")
    found = load(tmp_path / "a.json")
    assert [(row.contender, row.op) for row in found.rows] == [
        (label, op) for label in ("layers, tcp", "whole, tcp") for op in ("ttft", "itl", "exposed", "requests")
    ]
    ttft, _, _, requests = found.rows[:4]
    assert [one.quantile(0.5) for one in ttft.latencies] == pytest.approx([0.2, 0.2])
    assert requests.figures["goodput"].values == pytest.approx((2.5, 2.5))
    assert (requests.route, requests.scheme, requests.parameters["model"]) == ("tcp", "1P1D", served[1].model.name)
    same = compare(found, found).comparisons
    assert {one.metric for one in same} >= {"latency-p50", "goodput", "hit_rate_dram"}
    page = make_report({"a.json": found})
    for part in ("ttft, 1P1D", "Distribution of latencies", "Other figures", "goodput", "Timelines", "median TTFT"):
        assert part in page


def test_standard_output_has_the_same_file(served: tuple[Options, Served], tmp_path: Path, capsys: Any) -> None:
    write(served, Format.JSON, tmp_path / "a.json")
    write(served, Format.JSON)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "a.json").read_text())


@pytest.mark.keeps
def test_rows_as_csv_and_parquet(served: tuple[Options, Served], tmp_path: Path) -> None:
    write(served, Format.CSV, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [(row["schedule"], row["served"]) for row in rows] == [("layers", "4"), ("whole", "4")]
    assert float(rows[0]["goodput"]) == pytest.approx(2.5)
    parquet = pytest.importorskip("pyarrow.parquet")
    write(served, Format.PARQUET, tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist()[0]["goodput"] == pytest.approx(2.5)


def test_a_timeline_begins_when_the_request_comes() -> None:
    spans = report.timeline("one", record(0, 5.0, [5.1, 5.2, 5.3], tiers=["dram"])).spans
    found = {(one.lane, one.label): (one.start, one.end) for one in spans}
    assert found["waiting", "for memory and its turn"] == pytest.approx((0, 0.01))
    assert found["tiers", "1 blocks"] == pytest.approx((0.01, 0.015))
    assert found["prefill", "0"] == pytest.approx((0.015, 0.07))
    assert found["prefill", "1"] == pytest.approx((0.07, 0.08))
    # The first layer was on its way while the second was computed.
    assert found["transfer", "0"] == pytest.approx((0.07, 0.075))
    assert found["transfer", "1"] == pytest.approx((0.08, 0.1))
    assert found["decode", "token 2"] == pytest.approx((0.1, 0.2))
    assert found["decode", "token 3"] == pytest.approx((0.2, 0.3))


def test_whole_requests_are_moved_after_the_last_layer() -> None:
    one = record(0, 5.0, [5.1, 5.2])
    one.told["arrived"] = [5.09, 5.1]
    spans = [span for span in report.timeline("one", one).spans if span.lane == "transfer"]
    assert [(span.start, span.end) for span in spans] == [pytest.approx((0.08, 0.09)), pytest.approx((0.08, 0.1))]
