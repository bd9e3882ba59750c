"""The header of a result: it is this machine's, and a result file takes it."""

from __future__ import annotations

import os
import platform

import nixl_async
from nixl_async.benchmarks.results import Results, Row, parse
from nixl_async.benchmarks.system import cpu_model, describe


def test_the_header_describes_this_machine() -> None:
    header = describe({"nixl-cu12": "1.5.1"})
    assert header["cores"] == len(os.sched_getaffinity(0))
    assert header["kernel"] == platform.release()
    assert header["cpu"] == cpu_model() != ""
    assert header["versions"]["nixl-cu12"] == "1.5.1"
    assert header["versions"]["python"] == platform.python_version()
    assert header["versions"].get("nixl-async", nixl_async.__version__)
    results = Results(("x",), header, (Row("a", "write", 1, 1, throughput=(1.0,)),))
    assert parse(results.as_dict()) == results
