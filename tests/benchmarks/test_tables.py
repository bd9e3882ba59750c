"""Figures as CSV and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.tables import check_format, write_rows
from nixl_async.errors import ConfigurationError

ROWS = [{"name": "a, b", "seconds": 1.5}, {"name": "c", "seconds": None}]


def test_csv_goes_to_a_file_or_to_standard_output(tmp_path: Path, capsys: Any) -> None:
    write_rows(Format.CSV, str(tmp_path / "a.csv"), ["name", "seconds"], ROWS, {})
    assert (tmp_path / "a.csv").read_text() == 'name,seconds\n"a, b",1.5\nc,\n'
    write_rows(Format.CSV, "", ["name", "seconds"], ROWS, {})
    assert capsys.readouterr().out == (tmp_path / "a.csv").read_text()


@pytest.mark.keeps
def test_parquet_has_the_system_with_it(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_rows(Format.PARQUET, str(tmp_path / "a.parquet"), ["name", "seconds"], ROWS, {"cpu": "X", "cores": 2})
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.to_pylist() == ROWS
    assert table.schema.metadata == {b"cpu": b"X", b"cores": b"2"}


def test_what_could_not_be_written_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--format parquet needs --output FILE"):
        check_format(Format.PARQUET, "")
    with pytest.raises(ConfigurationError, match="its directory does not exist"):
        check_format(Format.CSV, str(tmp_path / "none" / "a.csv"))
    check_format(Format.JSON, str(tmp_path / "a.json"))
