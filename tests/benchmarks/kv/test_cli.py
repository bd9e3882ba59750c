"""`nixl-async bench kv` as a user meets it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nixl_async.benchmarks.kv.cli import app
from nixl_async.benchmarks.kv.reports import numbers
from tests.agents import ROOT
from tests.benchmarks.kv.files import GOLDEN, MODELS, write_config, write_model

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "torch_dtype": "bfloat16"}


def run(*arguments: object, status: int = 0) -> str:
    """Run a command in this process; return what it printed."""
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "240"})
    assert ran.exit_code == status, ran.output
    assert "Traceback" not in ran.output
    return ran.output


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nixl_async", "bench", "kv", *map(str, arguments)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


# plan


def test_a_plan_says_what_each_rank_moves_and_where_kvbench_differs(tmp_path: Path) -> None:
    config = write_config(tmp_path, "block-tp8-pp8")
    text = run("plan", "--model", "deepseek-r1", "--model-config", config)
    for part in ("40: 16-55", "24: 0-15, 56-63", "latent", "73728", "KVBench: I/O 9216, batch size 38125", "MLA", "nixlbench"):
        assert part in text


def test_a_plan_as_json_and_csv_has_every_rank(tmp_path: Path) -> None:
    config = write_config(tmp_path, "layer-tp8-pp2")
    common = ("plan", "--model", "qwen3-235b", "--model-config", config, "--num-requests", 3, "--backend", "POSIX", "--format")
    (plan,) = json.loads(run(*common, "json"))
    assert (plan["config_file"], plan["copies"], plan["token_nbytes"], plan["pages_per_request"]) == (
        str(config),
        2,
        96256,
        63,
    )
    assert [rank["nbytes"] for rank in plan["ranks"]] == [47 * 3 * 63 * 16 * 256] * 16
    assert plan["kvbench"]["io_size"] == GOLDEN["qwen3_235b_a22b"]["layer-tp8-pp2"][1]
    assert (plan["nixlbench"]["op_type"], plan["nixlbench"]["max_block_size"]) == ("READ", 4096)
    rows = list(csv.DictReader(io.StringIO(run(*common, "csv"))))
    assert [int(row["nbytes"]) for row in rows] == [rank["nbytes"] for rank in plan["ranks"]]


def test_without_a_file_the_models_own_dtype_counts() -> None:
    (plan,) = json.loads(run("plan", "--model", "llama-3.1-405b", "--tp", 8, "--format", "json"))
    assert (plan["dtype"], plan["token_nbytes"], plan["isl"], plan["page_size"]) == ("bfloat16", 516096, 1000, 16)
    assert plan["kvbench"]["token_nbytes"] == 516096
    (plan,) = json.loads(run("plan", "--model", "llama-3.1-405b", "--dtype", "fp8", "--stages", "126", "--format", "json"))
    assert plan["token_nbytes"] == 258048


KVBENCH_TEXT = """\
================================================================================
Model Config: {config}
ISL: 1000 tokens
Page Size: 16
Requests: 10
TP: 1
PP: 8
================================================================================
nixlbench \\
    --backend POSIX \\
    --max_batch_size 4766 \\
    --max_block_size 73728 \\
    --op_type READ \\
    --start_batch_size 4766 \\
    --start_block_size 73728 \\
    --total_buffer_size 351387648

"""


def test_what_kvbench_prints(tmp_path: Path) -> None:
    """Its own output for this command line, byte for byte."""
    model, config = write_model(tmp_path, "deepseek_r1"), write_config(tmp_path, "block-tp1-pp8")
    common = ("plan", "--model", model, "--model_config", config, "--backend", "POSIX", "--kvbench-compatible")
    assert run(*common) == KVBENCH_TEXT.format(config=config)
    (plan,) = json.loads(run(*common, "--format", "json"))
    assert list(plan)[:3] == ["backend", "check_consistency", "device_list"]
    assert list(plan)[-2:] == ["recreate_xfer", "config_file"]
    assert (len(plan), plan["total_buffer_size"], plan["scheme"]) == (47, 351387648, "pairwise")


@pytest.mark.parametrize("model", MODELS)
def test_kvbenchs_figures_of_many_files(model: str, tmp_path: Path) -> None:
    for config in GOLDEN[model]:
        write_config(tmp_path, config)
    found = run(
        "plan",
        *("--model", write_model(tmp_path, model), "--model_configs", f"{tmp_path}/*-tp*.yaml"),
        *("--backend", "UCX", "--source", "gpu", "--destination", "gpu", "--format", "json", "--kvbench-compatible"),
    )
    plans = {Path(plan["config_file"]).stem: plan for plan in json.loads(found)}
    assert {name: [plan["start_block_size"], plan["max_batch_size"]] for name, plan in plans.items()} == {
        name: figures[1:3] for name, figures in GOLDEN[model].items()
    }


def test_files_that_fail_do_not_keep_others_back(tmp_path: Path) -> None:
    for name in ("block-tp8-pp16", "block-tp8-pp32"):
        write_config(tmp_path, name)
    text = run("plan", "--model", "gpt-oss-20b", "--model-configs", f"{tmp_path}/*.yaml", status=2)
    assert "64: 56-119" in text
    assert "block-tp8-pp32.yaml: pp is 32, but the model has 24 layers" in text


# kvcache


def test_the_sizes_of_a_cache(tmp_path: Path) -> None:
    model, config = write_model(tmp_path, "deepseek_r1"), write_config(tmp_path, "block-tp1-pp8")
    common = ("kvcache", "--model", model, "--model_config", config, "--isl", 10000, "--page_size", 512)
    # As KVBench's README has it.
    assert run(*common, "--kvbench-compatible") == (
        "Model          ISL    Num Requests    Batch Size  IO Size      TP    PP    Page Size  Access\n"
        "-----------  -----  --------------  ------------  ---------  ----  ----  -----------  --------\n"
        "DEEPSEEK_R1  10000              10          1490  2.25 MB       1     8          512  block\n"
    )
    (row,) = json.loads(run(*common, "--format", "json", "--kvbench-compatible"))
    assert (row["batch_size"], row["io_nbytes"]) == (1490, 2359296)
    (row,) = json.loads(run(*common, "--format", "json"))
    assert (row["batch_size"], row["io_nbytes"], row["token_nbytes"]) == (200, 2359296, 35136)
    text = run(*common)
    for part in ("2.25 MB", "34.31 KB", "KVBench differs"):
        assert part in text


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "--model", "gpt-5"], "known are llama-3.1-8b"),
        (["plan", "--model", "nowhere.yaml"], "is no file"),
        (["plan", "--model", "llama-3.1-8b", "--tp", "3"], "tp is 3; it must divide 8 KV heads"),
        (["plan", "--model", "llama-3.1-8b", "--tp", "0"], "--tp"),
        (["plan", "--model", "llama-3.1-8b", "--pp", "40"], "the model has 32 layers"),
        (["plan", "--model", "llama-3.1-8b", "--stages", "a,b"], "stages is 'a,b'"),
        (["plan", "--model", "llama-3.1-8b", "--dtype", "fp4"], "'fp4'; known are fp8"),
        (["plan", "--model", "llama-3.1-8b", "--model-config", "gone.yaml"], "'gone.yaml' cannot be read: No such file"),
        (["plan", "--model", "llama-3.1-8b", "--model-configs", "gone*.yaml"], "no file matches 'gone*.yaml'"),
        (["plan", "--model", "llama-3.1-8b", "--access-pattern", "page"], "block"),
        (["plan", "--model", "llama-3.1-8b", "--backend", "WARP"], "'WARP'; known are UCX"),
        (["plan", "--model", "llama-3.1-8b", "--no-such-option", "1"], "no such option: --no-such-option"),
        (["plan", "--model", "llama-3.1-8b", "--kvbench-compatible"], "give --model-config"),
        (["kvcache", "--model", "llama-3.1-8b", "--kvbench-compatible"], "give --model-config"),
        (["profile", "--model", "llama-3.1-8b", "--rank", "1"], "rank is 1; with tp 1 and pp 1 it is 0 to 0"),
        (["profile", "--model", "llama-3.1-8b", "--decode-tp", "3"], "tp is 3"),
        (["profile", "--model", "llama-3.1-8b", "--isl", "100000000"], "GiB are available"),
        (["profile", "--model", "llama-3.1-8b", "--backend", "memory"], "does not reach other processes"),
        (["traffic", "gone.yaml"], "'gone.yaml' cannot be read"),
        (["traffic", "gone.txt"], "'gone.txt' cannot be read"),
        (
            ["workload", "--model", "llama-3.1-8b", "--results-dir", "/proc/no", "--num-user-requests", "1"],
            "cannot be written to",
        ),
        (["workload", "--model", "llama-3.1-8b", "--results-dir", "x", "--min-isl", "9", "--max-isl", "8"], "1 <= the least"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], text: str) -> None:
    ran = CliRunner().invoke(app, arguments, env={"COLUMNS": "240"})
    assert ran.exit_code == 2, ran.output
    assert text in ran.output
    assert "Traceback" not in ran.output
    if ran.output.startswith("nixl-async:"):
        assert len(ran.output.splitlines()) == 1


def test_kvbenchs_plan_needs_a_backend(tmp_path: Path) -> None:
    config = write_config(tmp_path, "block-tp1-pp1")
    common = ("plan", "--model", "qwen3-8b", "--model_config", config, "--kvbench-compatible")
    assert "give --backend UCX" in run(*common, status=2)
    assert "source is 'file'" in run(*common, "--backend", "UCX", status=2)


def test_a_malformed_matrix_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "matrix.txt"
    path.write_text("0 1\n2 many\n")
    ran = subprocess.run(program("traffic", path), capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        f"nixl-async: '{path}', line 2, cell 2: 'many' is no size; a size is a number of bytes, or one with K, M or G\n"
    )


# profile, traffic, workload: for real, in processes.


def command(*arguments: object) -> str:
    ran = subprocess.run(
        program(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=110,
        check=False,
        env=os.environ | {"COLUMNS": "240"},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def test_a_profile(small: Path) -> None:
    common = ("profile", "--model", small, "--isl", 33, "--repeats", 2, "--warmup", 0, "--backend", "samehost")
    result: dict[str, Any] = json.loads(command(*common, "--op", "write", "--mode", "prepared", "--format", "json"))
    assert (result["nbytes"], result["verified"], len(result["cases"])) == (3 * 16 * 256, True, 1)
    text = command(*common)
    for part in ("write", "read", "prepared", "one-shot", "samehost", "every byte checked"):
        assert part in text


def test_a_workload_is_run_by_traffic(small: Path, tmp_path: Path) -> None:
    small.write_text(json.dumps(SMALL | {"hidden_size": 64}))
    folder = tmp_path / "matrices"
    made = command(
        *("workload", "--model", small, "--results-dir", folder, "--prefill-tp", 1, "--decode-tp", 2),
        *("--num-user-requests", 2, "--isl-mean", 100, "--min-isl", 50, "--max-isl", 200),
    )
    assert made == f"{folder}/metadata.yaml: 2 patterns between 3 ranks\n"
    output = tmp_path / "result.json"
    text = command(
        *("traffic", folder / "metadata.yaml", "--iters", 1, "--isolated-iters", 2, "--warmup", 1, "--senders"),
        *("--backend", "samehost", "--memory", "dram", "--json-output-path", output),
    )
    for part in ("matrix_0.txt", "matrix_1.txt", "every byte checked", "samehost", "Isolated Latency (ms)"):
        assert part in text
    result = json.loads(output.read_text())
    assert len(result["iterations_results"][0]) == 2
    assert {"size", "latency", "isolated_latency", "num_senders", "mean_bw", "min_start_ts", "max_end_ts"} <= set(
        result["iterations_results"][0][0]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "matrix.txt").write_text("0 1K\n1K 0\n")
    config = tmp_path / "config.yaml"
    config.write_text("traffic_patterns:\n- {matrix_file: matrix.txt, mem_type: cpu, sleep_after_launch_sec: 60}\n")
    command = program("traffic", config, "--isolated-iters", 1, "--warmup", 0, "--backend", "samehost")
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as running:
        children = _children(running.pid, 2)
        running.send_signal(number)
        told = time.monotonic()
        running.wait(20)
        assert time.monotonic() - told < 5
        assert running.stderr is not None
        if number is not signal.SIGKILL:
            assert running.returncode == 130
            assert running.stderr.read().splitlines()[-1] == "nixl-async: interrupted"
    deadline = time.monotonic() + 20
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def _children(parent: int, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        if len(text.split()) == count:
            return [int(pid) for pid in text.split()]
        time.sleep(0.01)
    raise AssertionError("the ranks did not start")


def test_numbers_are_written_shortly() -> None:
    assert numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert numbers([]) == ""
