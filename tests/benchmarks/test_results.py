"""The result file: what is written is read back, and whatever is wrong with a file is one line that says where."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.benchmarks.results import (
    MOST_LATENCIES,
    SCHEMA,
    Histogram,
    Latencies,
    Raw,
    Results,
    ResultsError,
    Row,
    Span,
    Timeline,
    condensed,
    load,
    parse,
)
from nixl_async.errors import ConfigurationError, NixlError
from tests.benchmarks.made import SYSTEM, made


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results = made()
    results.write(path)
    assert load(path) == results
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_the_share_of_the_raw_limit_is_worked_out() -> None:
    row = Row("a", "write", 1, 1, throughput=(4.0, 5.0, 9.0), raw=Raw("memcpy", (10.0, 10.0, 11.0)))
    assert row.share_of_raw == 0.5
    assert row.as_dict()["share_of_raw"] == 0.5
    assert Row("a", "write", 1, 1, throughput=(4.0,)).share_of_raw is None
    whole = Results(("x",), SYSTEM, (row,)).as_dict()
    whole["rows"][0]["share_of_raw"] = 0.9
    assert parse(whole).rows[0].share_of_raw == 0.5


def test_parameters_tell_rows_apart_and_their_order_does_not() -> None:
    one = Row("a", "write", 1, 1, parameters={"x": 1, "y": True})
    assert one.case == Row("a", "write", 1, 1, parameters={"y": True, "x": 1}).case
    assert one.case != Row("a", "write", 1, 1, parameters={"x": 2, "y": True}).case


def _at(*path: Any) -> Callable[[Any, Any], None]:
    def change(whole: Any, value: Any) -> None:
        for key in path[:-1]:
            whole = whole[key]
        whole[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (_at("schema"), "other/2", f"schema is 'other/2'; allowed: '{SCHEMA}'"),
        (_at("started"), "yesterday", "x.json: started is 'yesterday'; allowed: a time as ISO 8601"),
        (_at("command"), "ls", "x.json: command is 'ls'; allowed: a list"),
        (_at("system"), [], "x.json: system is []; allowed: an object"),
        (_at("system", "versions"), "1", "x.json: system.versions is '1'"),
        (_at("rows", 0), 3, "x.json: rows[0] is 3; allowed: an object"),
        (_at("rows", 0, "op"), 3, "x.json: rows[0].op is 3; allowed: a string"),
        (_at("rows", 0, "contender"), "", "x.json: rows[0].contender is ''; allowed: a name"),
        (_at("rows", 0, "block_nbytes"), -1, "x.json: rows[0].block_nbytes is -1; allowed: a whole number >= 0"),
        (_at("rows", 0, "block_nbytes"), True, "x.json: rows[0].block_nbytes is True"),
        (_at("rows", 0, "throughput"), [], "x.json: rows[0].throughput is []; allowed: at least one number"),
        (_at("rows", 0, "throughput", 1), -1, "x.json: rows[0].throughput[1] is -1; allowed: a finite number >= 0"),
        (_at("rows", 0, "throughput", 1), float("nan"), "x.json: rows[0].throughput[1] is nan"),
        (_at("rows", 0, "latencies", 0), "x", "x.json: rows[0].latencies[0] is 'x'"),
        (_at("rows", 0, "latencies", 0), {"bounds": [0, 1]}, "rows[0].latencies[0] is without 'counts'"),
        (_at("rows", 0, "latencies", 0), {"bounds": [0, 1], "counts": [1, 2]}, "is 2 bounds, 2 counts; allowed: rising"),
        (_at("rows", 0, "latencies", 0), {"bounds": [1, 1], "counts": [1]}, "allowed: rising"),
        (_at("rows", 0, "latencies", 0), {"bounds": [0, 1], "counts": [0]}, "all of them are 0"),
        (_at("rows", 0, "parameters"), {"x": []}, "x.json: rows[0].parameters.x is []; allowed: a string"),
        (_at("rows", 0, "raw"), {"label": "m"}, "x.json: rows[0].raw is without 'throughput'"),
        (_at("rows", 0, "speed"), 3, "x.json: rows[0] is an object with 'speed'; allowed: batch_nbytes"),
        (_at("timelines", 0, "spans", 0, "end"), -1, "allowed: seconds not before the start (0.0)"),
        (_at("timelines", 0, "title"), None, "x.json: timelines[0].title is None"),
        (_at("extra"), 1, "x.json is an object with 'extra'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(where: Callable[[Any, Any], None], value: Any, said: str) -> None:
    whole = copy.deepcopy(made().as_dict())
    where(whole, value)
    with pytest.raises(ResultsError) as caught:
        parse(whole, "x.json")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigurationError | NixlError)


@pytest.mark.parametrize("key", ["started", "command", "system", "rows"])
def test_what_is_missing_is_named(key: str) -> None:
    whole = made().as_dict()
    del whole[key]
    with pytest.raises(ResultsError, match=f"without '{key}'"):
        parse(whole, "x.json")


def test_two_rows_of_one_case_are_refused() -> None:
    whole = made().as_dict()
    whole["rows"].append(whole["rows"][0])
    with pytest.raises(ResultsError, match=r"rows\[0\] and rows\[2\] are of the same contender and case"):
        parse(whole)


def test_a_row_that_measures_nothing_is_refused() -> None:
    whole = made().as_dict()
    for key in ("throughput", "latencies", "cpu_seconds_per_gb", "loop_stall_p999"):
        whole["rows"][0].pop(key, None)
    with pytest.raises(ResultsError, match="measures nothing; allowed: at least one of throughput"):
        parse(whole)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is no text"), (b"[]", "schema is None"), (b"[" * 100_000, "is not JSON")],
    ids=["cut", "binary", "list", "deep"],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=said):
        load(path)


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="cannot be read: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(ResultsError, match="cannot be written: No such file"):
        made().write(tmp_path / "none" / "a.json")


def test_what_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(ResultsError, match="throughput"):
        Results(("x",), SYSTEM, (Row("a", "write", 1, 1, throughput=(float("inf"),)),)).write(path)
    assert path.read_text() == "before"


@given(st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_quantiles_are_numpys(seconds: list[float], share: float) -> None:
    assert Latencies(tuple(seconds)).quantile(share) == pytest.approx(np.quantile(seconds, share))


@given(st.lists(st.floats(1e-6, 1.0, exclude_max=True), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_a_histograms_quantile_is_right_to_a_bin(seconds: list[float], share: float) -> None:
    bounds = np.geomspace(1e-6, 1.0, 100)
    histogram = Histogram.of(seconds, bounds.tolist())
    assert len(histogram) == len(seconds)
    # The value that the share of them lies at or below, as the histogram counts.
    exact = np.quantile(seconds, share, method="inverted_cdf")
    place = int(np.clip(np.searchsorted(bounds, exact, "right") - 1, 0, 98))
    assert bounds[place] * (1 - 1e-12) <= histogram.quantile(share) <= bounds[place + 1] * (1 + 1e-12)


def test_a_histogram_keeps_what_lies_outside() -> None:
    assert Histogram.of([0.0, 5.0, 99.0], [1.0, 2.0, 10.0]).counts == (1, 2)
    assert Histogram((0.0, 1.0), (4,)).quantile(1.0) == 1.0


def test_spans_may_begin_before_the_clock() -> None:
    timeline = Timeline("t", (Span("a", "b", -1.0, 0.5),))
    whole = Results(("x",), SYSTEM, made().rows, (timeline,)).as_dict()
    assert parse(whole).timelines == (timeline,)


def test_many_latencies_become_a_histogram() -> None:
    few = [0.001, 0.002]
    assert condensed(few) == Latencies((0.001, 0.002))
    rising = [1e-3 * 1.001**number for number in range(MOST_LATENCIES + 1)]
    found = condensed(rising)
    assert isinstance(found, Histogram)
    assert len(found) == len(rising)
    assert found.bounds[0] <= rising[0]
    assert rising[-1] < found.bounds[-1]
    # A bin is 10 ** (1 / 40), 6 %, wide.
    assert found.quantile(0.5) == pytest.approx(Latencies(tuple(rising)).quantile(0.5), rel=0.06)
    assert len(condensed([0.0] * (MOST_LATENCIES + 1))) == MOST_LATENCIES + 1
