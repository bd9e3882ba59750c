"""What a rank keeps, and what models' own configurations say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nixl_async.demo.job import MODELS
from nixl_async.errors import DescriptorError
from nixl_async.geometry import HND, NHD, KVGeometry, Sharding

LLAMA_8B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80}
QWEN3_8B = {"head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8}
QWEN3_235B = QWEN3_8B | {
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
GPT_OSS_120B = {
    "head_dim": 64,
    "hidden_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_attention_heads": 64,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
}
DEEPSEEK_R1 = {
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


# Bytes of a token with one byte for each number, as NIXL's KVBench reckons them.
@pytest.mark.parametrize(
    ("config", "nbytes"),
    [
        (LLAMA_8B, 65536),
        (LLAMA_70B, 163840),
        (QWEN3_8B, 73728),
        (QWEN3_235B, 96256),
        (GPT_OSS_120B, 36864),
        (GPT_OSS_120B | {"num_hidden_layers": 24}, 24576),
        (DEEPSEEK_R1, 35136),
    ],
)
def test_configs_of_models_give_the_bytes_that_kvbench_reckons(config: dict[str, Any], nbytes: int) -> None:
    assert KVGeometry.from_config(json.loads(json.dumps(config)), dtype_nbytes=1).token_nbytes == nbytes


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-3.1-8b", LLAMA_8B),
        ("llama-3.1-70b", LLAMA_70B),
        ("deepseek-r1", DEEPSEEK_R1),
        ("qwen3-235b", QWEN3_235B),
    ],
)
def test_the_demos_models_have_the_shapes_of_their_configs(name: str, config: dict[str, Any]) -> None:
    geometry, model = KVGeometry.from_config(config), MODELS[name]
    assert (model.layers, model.kv) == (geometry.layers, geometry.kv)
    assert model.token_nbytes == geometry.heads * geometry.row_nbytes


def test_a_config_of_several_models_gives_the_text_models() -> None:
    assert KVGeometry.from_config({"text_config": LLAMA_8B}) == KVGeometry.from_config(LLAMA_8B)


def test_without_kv_heads_each_query_head_has_its_own() -> None:
    config = {k: v for k, v in LLAMA_8B.items() if k != "num_key_value_heads"}
    assert KVGeometry.from_config(config) == KVGeometry(32, 32, 128)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "dtype is 'None'"),
        ({"dtype": "int3"}, "dtype is 'int3'.*give dtype_nbytes"),
        ({"dtype": "float16"}, "None as 'num_hidden_layers'"),
        (LLAMA_8B | {"num_key_value_heads": "8"}, "'8' as 'num_key_value_heads'"),
        (LLAMA_8B | {"num_hidden_layers": True}, "True as 'num_hidden_layers'"),
        (LLAMA_8B | {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be positive"),
        (LLAMA_8B | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({k: v for k, v in DEEPSEEK_R1.items() if k != "qk_rope_head_dim"}, "'qk_rope_head_dim'"),
    ],
)
def test_a_config_without_a_kv_cache_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DescriptorError, match=message):
        KVGeometry.from_config(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVGeometry(0, 8, 128), "layers is 0"),
        (lambda: KVGeometry(2, -1, 128), "heads is -1"),
        (lambda: KVGeometry(2, 8, 128, kv=3), "kv is 3"),
        (lambda: KVGeometry.mla(2, 0, 64), "kv_lora_rank is 0"),
        (lambda: Sharding(tp=0), "tp is 0"),
        (lambda: Sharding(page_tokens=-16), "page_tokens is -16"),
        (lambda: Sharding(axes=("layer", "kv", "token", "head")), "'block' among them"),
        (lambda: Sharding(axes=("layer", "layer", "block")), "give each once"),
        (lambda: Sharding(axes=("layer", "kv", "block", "dim")), "give each once"),
        (lambda: Sharding(pp=2, stages=(1,)), "stages names 1 stages, but pp is 2"),
        (lambda: Sharding(pp=2, stages=(2, 0)), "layers of a stage is 0"),
        (lambda: Sharding(tp=3).shard(KVGeometry(2, 8, 128), 0), "tp is 3; it must divide 8 KV heads"),
        (lambda: Sharding(tp=12).shard(KVGeometry(2, 8, 128), 0), "tp is 12"),
        (lambda: Sharding(pp=2).shard(KVGeometry(3, 8, 128), 0), "pp is 2, which does not divide 3 layers; give stages"),
        (lambda: Sharding(pp=2, stages=(1, 1)).shard(KVGeometry(3, 8, 128), 0), "have 2 layers, but the model has 3"),
        (lambda: Sharding(tp=2, pp=2).shard(KVGeometry(4, 8, 128), 4), "rank is 4; .* 0 to 3"),
        (lambda: Sharding(axes=("layer", "block", "token", "head")).shard(KVGeometry(2, 8, 128), 0), "leave out 'kv'"),
    ],
)
def test_what_cannot_be_divided_is_refused(make: Any, message: str) -> None:
    with pytest.raises(DescriptorError, match=message):
        make()


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError):
        KVGeometry(2, 8, 64.0)  # type: ignore[arg-type]


def test_ranks_are_numbered_stage_by_stage() -> None:
    shard = Sharding(tp=4, pp=2, stages=(3, 2)).shard(KVGeometry(5, 8, 128), 6)
    assert (shard.layers, shard.heads) == (range(3, 5), range(4, 6))
    assert shard.block_nbytes == 2 * 2 * 16 * 2 * 256


def test_ranks_in_a_row_share_a_head_where_heads_are_too_few() -> None:
    geometry = KVGeometry(1, 2, 128)
    assert [Sharding(tp=8).shard(geometry, rank).heads.start for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {Sharding(tp=8).shard(KVGeometry.mla(1, 512, 64), rank).heads for rank in range(8)} == {range(1)}


def test_a_latent_pool_needs_no_axes_for_keys_and_heads() -> None:
    axes = ("layer", "block", "token")
    assert Sharding(tp=8, axes=axes).shard(KVGeometry.mla(61, 512, 64), 7).block_nbytes == 61 * 16 * 1152
    assert set(NHD) == set(HND)
