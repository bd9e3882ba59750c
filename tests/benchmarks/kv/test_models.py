"""Models out of the table, of config.json and of KVBench's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.models import TABLE, find_model, of_config
from nixl_async.benchmarks.kv.planning import make_plan
from nixl_async.errors import ConfigurationError, DescriptorError
from tests.benchmarks.kv.files import MODELS, NAMES, spoiled, write_model

LLAMA = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "torch_dtype": "bfloat16",
}
MLA = {"num_hidden_layers": 4, "num_attention_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}


@pytest.mark.parametrize("name", TABLE)
def test_each_of_the_table_by_its_name_and_by_its_repository(name: str) -> None:
    found = find_model(name)
    assert find_model(TABLE[name][0]) == find_model(name.upper().replace("-", "_")) == found
    assert found.name == name
    assert found.dtype == "bfloat16"
    assert found.source == f"config.json of {TABLE[name][0]}"


@pytest.mark.parametrize(
    ("name", "layers", "heads", "head_dim", "kv", "bytes_of_a_token"),
    [
        ("llama-3.1-8b", 32, 8, 128, 2, 131072),
        ("llama-3.1-70b", 80, 8, 128, 2, 327680),
        ("llama-3.1-405b", 126, 8, 128, 2, 516096),
        ("deepseek-r1", 61, 1, 576, 1, 70272),
        ("deepseek-v3", 61, 1, 576, 1, 70272),
        ("gpt-oss-20b", 24, 8, 64, 2, 49152),
        ("gpt-oss-120b", 36, 8, 64, 2, 73728),
        ("qwen3-8b", 36, 8, 128, 2, 147456),
        ("qwen3-235b", 94, 4, 128, 2, 192512),
    ],
)
def test_figures_of_the_table(name: str, layers: int, heads: int, head_dim: int, kv: int, bytes_of_a_token: int) -> None:
    found = find_model(name)
    assert (found.layers, found.heads, found.head_dim, found.kv) == (layers, heads, head_dim, kv)
    assert found.geometry(2).token_nbytes == bytes_of_a_token


@pytest.mark.parametrize("name", MODELS)
def test_kvbenchs_files_say_the_same_as_the_hub(name: str, tmp_path: Path) -> None:
    ours, theirs = find_model(NAMES[name]), find_model(str(write_model(tmp_path, name)))
    assert (theirs.layers, theirs.heads, theirs.head_dim, theirs.kv) == (ours.layers, ours.heads, ours.head_dim, ours.kv)


def test_a_config_is_found_by_its_path_and_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": "llama"}))
    found = find_model(str(folder))
    assert found == find_model(str(folder / "config.json"))
    assert (found.name, found.layers, found.heads, found.head_dim) == ("My-Model", 4, 2, 8)


@pytest.mark.parametrize(
    ("config", "heads", "head_dim", "kv"),
    [
        (LLAMA, 2, 8, 2),
        (MLA, 1, 576, 1),
        (LLAMA | {"head_dim": 128}, 2, 128, 2),
        ({"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64}, 8, 8, 2),
        ({"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64, "multi_query": True}, 1, 8, 2),
        ({"text_config": LLAMA, "model_type": "vision"}, 2, 8, 2),
        (LLAMA | {"num_experts": 128, "num_experts_per_tok": 8}, 2, 8, 2),
        (LLAMA | {"head_dim": 16, "v_head_dim": 16}, 2, 16, 2),
        (LLAMA | {"is_encoder_decoder": False}, 2, 8, 2),
    ],
)
def test_families(config: dict[str, Any], heads: int, head_dim: int, kv: int) -> None:
    found = of_config(config, "x", "x")
    assert (found.layers, found.heads, found.head_dim, found.kv) == (4, heads, head_dim, kv)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"index_head_dim": 128}, "index_head_dim"),
        ({"v_head_dim": 192, "head_dim": 128}, "v_head_dim"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"layers_block_type": ["mamba"]}, "layers_block_type"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
        ({"block_configs": [{}] * 4}, "block_configs"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": [2, 4]}, "num_key_value_heads"),
        ({"num_attention_heads": "8"}, "num_attention_heads"),
        ({"sliding_window": "all"}, "sliding_window"),
    ],
)
def test_what_is_no_paged_cache_is_refused_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the-model: .*{field}"):
        of_config(LLAMA | changes, "x", "the-model")


def test_windows() -> None:
    assert find_model("gpt-oss-20b").windows == (128, 0) * 12
    assert of_config(LLAMA | {"sliding_window": 4096}, "x", "x").windows == (4096,) * 4
    assert of_config(LLAMA | {"sliding_window": 4096, "use_sliding_window": False}, "x", "x").windows == ()
    assert of_config(LLAMA, "x", "x").windows == ()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("gtp-oss-20b", "did you mean 'gpt-oss-20b'"),
        ("nothing-like-it", "known are llama-3.1-8b"),
        ("nowhere/config.json", "is no file"),
        ("", "known are"),
    ],
)
def test_unknown_names(given: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        find_model(given)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model_name: MISTRAL_7B\n", "names that contain llama3.1"),
        ("model_name: QWEN3_X\nnum_layers: 4\n", "num_query_heads"),
        (
            "model_name: LLAMA3.1_X\nnum_layers: 4\nnum_query_heads_with_mha: 10\n"
            "query_head_dimension: 8\ngqa_num_queries_in_group: 4\n",
            "does not divide",
        ),
        ("something: 1\n", "neither 'model_name'"),
        ("- 1\n", "must be a mapping"),
        ("a: [1\n", "does not parse"),
    ],
)
def test_wrong_files(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=match):
        find_model(str(path))


KVBENCH = {"model_name": "LLAMA3.1_X", "num_layers": 4, "num_query_heads_with_mha": 8, "query_head_dimension": 8}


@pytest.mark.parametrize(
    "document",
    [
        LLAMA | {"layer_types": ["full_attention"] * 4, "sliding_window": 128, "head_dim": 8, "dtype": "float16"},
        MLA,
        {"text_config": LLAMA},
        KVBENCH | {"gqa_num_queries_in_group": 4, "num_model_params": 8},
    ],
)
def test_any_spoiled_file_is_read_or_refused_in_one_line(document: dict[str, Any], tmp_path: Path) -> None:
    path, read, said = tmp_path / "config.json", 0, []
    for spoilt in spoiled(document):
        path.write_text(json.dumps(spoilt))
        try:
            make_plan(find_model(str(path)), Layout(tp=2)).as_dict()
            read += 1
        except (ConfigurationError, DescriptorError) as error:
            said.append(str(error))
    assert read
    assert not [text for text in said if "\n" in text]
