"""Write figures as CSV or Parquet, to a file or to standard output."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.options import Format
from nixl_async.errors import ConfigurationError, MissingDependency


def check_format(form: Format, output: str) -> None:
    """Refuse what could not be written in the end, before anything runs; an empty `output` is standard output.

    Raises:
        MissingDependency: Parquet needs pyarrow.
        ConfigurationError: Parquet needs a file; or the output's directory does not exist.
    """
    if form is Format.PARQUET:
        if not output:
            raise ConfigurationError("--format parquet needs --output FILE: it is no text")
        _pyarrow()
    if output and not Path(output).absolute().parent.is_dir():
        raise ConfigurationError(f"--output is {output}; its directory does not exist")


def write_rows(
    form: Format, output: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], system: Mapping[str, Any]
) -> None:
    """Write rows as CSV (None is empty), or as Parquet with the system as its metadata."""
    if form is Format.CSV:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        put(output, text.getvalue())
        return
    pyarrow, parquet = _pyarrow()
    table = pyarrow.Table.from_pylist(list(rows))
    parquet.write_table(table.replace_schema_metadata({key: str(value) for key, value in system.items()}), output)


def put(output: str, text: str) -> None:
    """Write text to a file, or to standard output where none is named."""
    if output:
        Path(output).write_text(text)
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("--format parquet needs pyarrow: pip install 'nixl-async[parquet]'") from error
    return pyarrow, pyarrow.parquet
