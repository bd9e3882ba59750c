"""What `nixl-async bench serve` takes and refuses, as a user meets it: one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nixl_async.benchmarks.cli import app
from nixl_async.benchmarks.serve.options import Classes, Options, Schedule, Served, configurations, make, requests_of
from nixl_async.errors import ConfigurationError
from tests.benchmarks.serve.made import SMALL, write_model


def run(*arguments: object) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})
    return ran.exit_code, ran.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "warp"], "no backend is called 'warp'; known are"),
        (["--backend", "memory"], "does not reach other processes"),
        (["--rate", "0"], "--rate is 0.0; it must be a positive number"),
        (["--rate", "nan"], "--rate is nan; it must be a positive number"),
        (["--speed", "-1"], "--speed is -1.0; it must be a positive number"),
        (["--requests", "0"], "--requests is 0; it must be at least 1"),
        (["--spread", "1"], "--spread is 1.0; it must be between 0 and 0.99"),
        (["--prefix-share", "1.5"], "--prefix-share is 1.5; it must be between 0 and 1"),
        (["--layers", "33"], "--layers is 33; it must be at most 32, what llama-3.1-8b has"),
        (["--layers", "-1"], "--layers is -1; it must be at least 0"),
        (["--page-size", "48"], "--page-size is 48; it must be a divisor of the 64 tokens of a block (--block-tokens)"),
        (["--model", "llama-9"], "there is no model 'llama-9'"),
        (["--dtype", "fp3"], "dtype is 'fp3'; known are"),
        (["--trace", "none.jsonl"], "--trace none.jsonl cannot be read: No such file"),
        (["--trace", "t", "--rate", "3"], "--rate is for Poisson arrivals; leave it out, or --trace"),
        (["--trace", "t", "--shrink", "3"], "--shrink is 3; it must be a divisor of 512"),
        (["--shrink", "2"], "--shrink divides a trace's lengths"),
        (["--nvme", "/no/such"], "--nvme is /no/such; it must be a directory that exists"),
        (["--nvme-mib", "5"], "--nvme-mib is the size of --nvme DIRECTORY"),
        (["--objects", "bucket"], "store URL 'bucket' has scheme ''; known are"),
        (["--objects", "file:///no/such"], "--objects is file:///no/such; it must be a directory that exists"),
        (["--objects-endpoint", "http://x"], "--objects-endpoint is where --objects URL is"),
        (["--dram-mib", "1"], "--dram-mib is 1; it must be at least 8: a block of 64 tokens"),
        (["--isl", "100000000"], "--isl is 100000000; it must be at most 8388608"),
        (
            ["--isl", "4000000", "--requests", "1"],
            "GiB are available: give fewer --layers or --pool-requests, or a smaller --isl",
        ),
        (["--format", "parquet"], "--format parquet needs --output FILE"),
        (["--output", "/no/such/x.json"], "--output is /no/such/x.json; its directory does not exist"),
        (["--config-file", "none.toml"], "--config-file none.toml cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], said: str) -> None:
    status, output = run(*arguments)
    assert status == 2
    assert said in output
    assert output.startswith("nixl-async: ")
    assert output.count("\n") == 1


def test_words_that_are_no_choice_are_refused() -> None:
    for option, word in (("--schedule", "some"), ("--classes", "some"), ("--format", "xml")):
        status, output = run(option, word)
        assert status == 2
        assert option in output
        assert "Traceback" not in output


def test_a_bad_line_of_a_trace_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n{"timestamp": 1}\n')
    status, output = run("--trace", trace)
    assert (status, output.count("\n")) == (2, 1)
    assert f"--trace {trace}, line 2: input_length is missing" in output


def test_the_help_names_every_option() -> None:
    status, output = run("--help")
    assert status == 0
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in output, name


def test_a_file_says_the_same_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('rate = 3\nschedule = ["WHOLE"]\nbackend = "tcp,samehost"\nslo-ttft-ms = 100.5\nformat = "csv"\nisl = 7\n')
    made = make({"isl": 9}, str(path))
    assert (made.rate, made.schedule, made.backend, made.slo_ttft_ms, made.isl) == (
        3.0,
        (Schedule.WHOLE,),
        ("tcp", "samehost"),
        100.5,
        9,
    )
    path.write_text("rates = 3\n")
    with pytest.raises(ConfigurationError, match="unknown key 'rates'; the closest that is allowed is 'rate'"):
        make({}, str(path))
    path.write_text('rate = "3"\n')
    with pytest.raises(ConfigurationError, match="rate is '3'; it must be of type float"):
        make({}, str(path))


def test_everything_chosen_is_compared() -> None:
    made = make({"backend": ("TCP", "auto", "tcp"), "classes": (Classes.OFF, Classes.ON), "schedule": (Schedule.LAYERS,)})
    assert [one.label for one in configurations(made)] == [
        "layers, tcp",
        "layers + classes, tcp",
        "layers, auto",
        "layers + classes, auto",
    ]
    assert [one.label for one in configurations(Options())] == ["layers, auto", "whole, auto"]


def test_what_makes_a_case_is_what_differs() -> None:
    made = make({"rate": 3.0, "rounds": 7, "backend": ("tcp",), "output": "x.json"})
    assert made.changed() == {"rate": 3.0}


def served(directory: Path, **given: Any) -> Served:
    made = make({"model": write_model(directory), "page_size": 8, "block_tokens": 16, "dram_mib": 1, "spread": 0.0, **given})
    return Served.of(made, requests_of(made, 0))


def test_a_model_is_scaled(tmp_path: Path) -> None:
    found = served(tmp_path, isl=100, osl=10, pool_requests=3)
    # Keys and values of 4 layers, 2 heads, 32 numbers of 2 bytes; 13 and 14 pages of 8 tokens, three times.
    assert (found.geometry.token_nbytes, found.prefill_pages, found.decode_pages) == (1024, 39, 42)
    assert found.compute.parameters == 12 * 4 * 64**2
    half = served(tmp_path, layers=2, dtype="fp8")
    assert half.geometry.token_nbytes == 256
    assert half.compute.parameters == 12 * 2 * 64**2


def test_each_round_has_requests_of_its_own(tmp_path: Path) -> None:
    made = make({"batch_share": 0.5})
    assert requests_of(made, 0) != requests_of(made, 1)
    assert 0 < sum(one.batch for one in requests_of(made, 0)) < made.requests
    trace = tmp_path / "trace.jsonl"
    line = json.dumps({"timestamp": 1000, "input_length": 1000, "output_length": 100, "hash_ids": [1, 2]})
    trace.write_text(f"{line}\n{line}\n")
    made = make({"trace": str(trace), "shrink": 8})
    assert requests_of(made, 0) == requests_of(made, 1)
    assert [(one.seconds, one.prompt) for one in requests_of(made, 0)] == [(0.0, 125), (0.0, 125)]
    assert made.hash_tokens == 64


def test_a_page_has_whole_words(tmp_path: Path) -> None:
    odd = {**SMALL, "num_key_value_heads": 1, "head_dim": 1}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    made = make({"model": str(tmp_path / "odd.json"), "page_size": 1})
    with pytest.raises(
        ConfigurationError, match="--page-size is 1; it must be such that a page of a layer is a multiple of 8"
    ):
        Served.of(made, requests_of(made, 0))
