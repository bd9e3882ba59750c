"""KVBench's figures and what it prints, as its own code says them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.kv import kvbench
from nixl_async.benchmarks.kv.kvbench import Figures
from nixl_async.benchmarks.kv.layouts import Layout, read_layout
from nixl_async.benchmarks.kv.models import find_model
from nixl_async.errors import ConfigurationError
from tests.benchmarks.kv.files import GOLDEN, NAMES, write_config, write_model

# KVBench's 41 cases (benchmark/kvbench/test/test_kvcache.py of ai-dynamo/nixl).
PIPELINES = [f"block-tp1-pp{n}" for n in (1, 2, 4, 8)] + [f"block-tp8-pp{n}" for n in (2, 4, 8, 16, 32)]
LAYERS = [f"layer-tp1-pp{n}" for n in (1, 2, 4, 8)]
SIZES = [
    *(("llama_3_1_8b", config, 65536) for config in [*PIPELINES, *LAYERS]),
    *(("llama_3_1_70b", config, 163840) for config in [*PIPELINES, *LAYERS]),
    *(("deepseek_r1", config, 35136) for config in PIPELINES[4:]),
]
IO_SIZES = [
    *((config, size) for config, size in zip(PIPELINES[4:], (10240, 5120, 2560, 1280, 640), strict=True)),
    *((f"layer-tp8-pp{n}", 256) for n in (2, 4, 8, 16, 32)),
]
assert len(SIZES) + len(IO_SIZES) == 41


@pytest.mark.parametrize(("model", "config", "expected"), SIZES)
def test_kvcache_size(model: str, config: str, expected: int, tmp_path: Path) -> None:
    found = Figures.of(find_model(str(write_model(tmp_path, model))), read_layout(write_config(tmp_path, config)))
    assert found.token_nbytes == expected


@pytest.mark.parametrize(("config", "expected"), IO_SIZES)
def test_io_size(config: str, expected: int, tmp_path: Path) -> None:
    model, layout = find_model(str(write_model(tmp_path, "llama_3_1_70b"))), read_layout(write_config(tmp_path, config))
    assert Figures.of(model, layout, page_size=1).io_size == expected


@pytest.mark.parametrize("model", GOLDEN)
def test_every_model_with_every_configuration(model: str, tmp_path: Path) -> None:
    """By the model's file and by its name in our table, which has its figures from the hub."""
    assert len(GOLDEN[model]) == 20
    for config, (token, io_size, batch, page) in GOLDEN[model].items():
        layout = read_layout(write_config(tmp_path, config))
        assert layout.page_size == page
        for found in (find_model(str(write_model(tmp_path, model))), find_model(NAMES[model])):
            figures = Figures.of(found, layout)
            assert (figures.token_nbytes, figures.io_size, figures.batch_size) == (token, io_size, batch), config


# What the reference has of a token's access, in bytes: block TP 1 PP 1, TP 8 PP 2, 8, 32; layer TP 1, TP 8.
PER_TOKEN = {
    "deepseek-r1": (35136, 2232, 576, 144, 576, 72),
    "gpt-oss-120b": (36864, 2304, 576, 144, 1024, 128),
    "gpt-oss-20b": (24576, 1536, 384, 96, 1024, 128),
    "llama-3.1-70b": (163840, 10240, 2560, 640, 2048, 256),
    "llama-3.1-8b": (65536, 4096, 1024, 256, 2048, 256),
    "qwen3-235b-a22b": (96256, 6016, 1504, 376, 1024, 128),
    "qwen3-8b": (73728, 4608, 1152, 288, 2048, 256),
}


@pytest.mark.parametrize("model", PER_TOKEN)
def test_a_tokens_access(model: str) -> None:
    shapes = [("block", 1, 1), ("block", 8, 2), ("block", 8, 8), ("block", 8, 32), ("layer", 1, 1), ("layer", 8, 4)]
    found = [Figures.of(find_model(model), Layout(tp=tp, pp=pp, access=access)).io_size for access, tp, pp in shapes]
    assert tuple(found) == PER_TOKEN[model]


@pytest.mark.parametrize(
    ("model", "model_dtype", "kv_dtype", "token"),
    [
        ("llama-3.1-8b", "fp16", "fp8", 131072),
        ("llama-3.1-8b", "fp8", "fp16", 65536),
        ("deepseek-r1", "fp8", "bfloat16", 70272),
        ("deepseek-r1", "fp16", "int8", 35136),
    ],
)
def test_the_dtype_is_that_of_the_weights_but_for_mla(model: str, model_dtype: str, kv_dtype: str, token: int) -> None:
    assert Figures.of(find_model(model), Layout(model_dtype=model_dtype, kv_dtype=kv_dtype)).token_nbytes == token


def test_figures_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="fp4"):
        Figures.of(find_model("qwen3-8b"), Layout(model_dtype="fp4"))
    with pytest.raises(ConfigurationError, match="leave nothing"):
        Figures.of(find_model("qwen3-8b"), Layout(tp=4096))


@pytest.mark.parametrize(
    ("backend", "source", "destination", "expected"),
    [
        ("GDS", "file", "gpu", {"op_type": "READ", "target_seg_type": "VRAM"}),
        ("gds_mt", "gpu", "file", {"op_type": "WRITE", "target_seg_type": "FILE"}),
        ("POSIX", "file", "memory", {"op_type": "READ", "target_seg_type": "DRAM"}),
        ("HF3FS", "memory", "file", {"op_type": "WRITE", "initiator_seg_type": "DRAM"}),
        ("UCX", "memory", "gpu", {"initiator_seg_type": "DRAM", "target_seg_type": "VRAM"}),
        ("Mooncake", "gpu", "gpu", {"initiator_seg_type": "VRAM", "target_seg_type": "VRAM"}),
        ("OBJ", "gpu", "file", {"op_type": "WRITE", "initiator_seg_type": "VRAM"}),
        ("OBJ", "file", "memory", {"op_type": "READ", "initiator_seg_type": "DRAM"}),
    ],
)
def test_segments(backend: str, source: str, destination: str, expected: dict[str, str]) -> None:
    assert kvbench.segments(backend, source, destination) == expected


@pytest.mark.parametrize(
    ("backend", "source", "destination", "text"),
    [
        ("GDS", "memory", "gpu", "file, gpu"),
        ("POSIX", "gpu", "file", "file, memory"),
        ("UCX", "file", "memory", "source is 'file'"),
        ("UCX", "memory", "file", "destination is 'file'"),
        ("OBJ", "memory", "gpu", "exactly one"),
        ("OBJ", "file", "file", "exactly one"),
        ("LIBFABRIC", "memory", "memory", "known are UCX"),
    ],
)
def test_ways_that_do_not_exist(backend: str, source: str, destination: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        kvbench.segments(backend, source, destination)


def test_the_command_has_what_differs_from_the_defaults() -> None:
    given = kvbench.read_parameters(
        ["--backend", "UCX", "--num_threads", "4", "--check_consistency", "--enable-vmm", "true", "--obj_ca_bundle", "x"]
    )
    values = kvbench.parameters(given | {"max_block_size": 1}, 40960, 40000, "memory", "gpu")
    assert kvbench.command(values) == (
        "nixlbench \\\n    --check_consistency True \\\n    --enable_vmm True \\\n    --max_batch_size 40000 \\\n"
        "    --max_block_size 40960 \\\n    --num_threads 4 \\\n    --start_batch_size 40000 \\\n    --start_block_size 40960 \\\n"
        "    --target_seg_type VRAM \\\n    --total_buffer_size 1638400000"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nope"], "--nope"),
        (["--num_iter", "many"], "many"),
        (["--enable_vmm", "perhaps"], "neither true nor false"),
        (["--num_iter"], "expected one argument"),
        (["stray"], "stray"),
    ],
)
def test_wrong_parameters_are_named(arguments: list[str], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        kvbench.read_parameters(arguments)


def test_csv_has_a_column_for_everything() -> None:
    layout = Layout(tp=2, hardware="H100", access="block")
    values = kvbench.parameters({"backend": "POSIX"}, 16, 3, "file", "memory")
    (row,) = csv.DictReader(io.StringIO(kvbench.as_csv([("a.yaml", layout, values)])))
    expected: dict[str, Any] = {"backend": "POSIX", "total_buffer_size": "48", "model": "", "config_file": "a.yaml"}
    expected |= {"model_strategy_tp_size": "2", "model_system_hardware": "H100", "model_runtime_osl": "1"}
    assert {name: row[name] for name in expected} == expected
    assert len(row) == len(kvbench.DEFAULTS) + 2 + 4 + 3 + 6


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0.0 B"), (1023, "1023.0 B"), (2359296, "2.25 MB"), (1 << 40, "1.0 TB")])
def test_sizes_as_kvbench_writes_them(nbytes: int, text: str) -> None:
    assert kvbench.size_text(nbytes) == text
