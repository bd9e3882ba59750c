"""KVBench's files, written as it has them: its seven models, and its configurations by their names (`block-tp8-pp2`)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Of each of KVBench's models and example configurations: bytes of a token, of an access, number of accesses, tokens in a page.
# KVBench's own code said so (get_kv_size_per_token, get_io_size, get_batch_size), at 8770b655 of ai-dynamo/nixl.
GOLDEN: dict[str, dict[str, list[int]]] = json.loads((HERE / "golden.json").read_text())

GROUPED = "num_layers num_query_heads num_kv_heads query_head_dimension"
LLAMA = "num_layers num_query_heads_with_mha query_head_dimension gqa_num_queries_in_group"
MODELS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "deepseek_r1": (
        "DEEPSEEK_R1",
        "num_layers num_query_heads query_head_dimension embedding_dimension rope_mla_dimension mla_latent_vector_dimension",
        (61, 128, 128, 7168, 64, 512),
    ),
    "gpt_oss_120b": ("GPT_OSS_120B", GROUPED, (36, 64, 8, 64)),
    "gpt_oss_20b": ("GPT_OSS_20B", GROUPED, (24, 64, 8, 64)),
    "llama_3_1_70b": ("LLAMA3.1_70B", LLAMA, (80, 64, 128, 8)),
    "llama_3_1_8b": ("LLAMA3.1_8B", LLAMA, (32, 32, 128, 4)),
    "qwen3_235b_a22b": ("QWEN3_235B_A22B", GROUPED, (94, 64, 4, 128)),
    "qwen3_8b": ("QWEN3_8B", GROUPED, (36, 32, 8, 128)),
}
NAMES = {
    "deepseek_r1": "deepseek-r1",
    "gpt_oss_120b": "gpt-oss-120b",
    "gpt_oss_20b": "gpt-oss-20b",
    "llama_3_1_70b": "llama-3.1-70b",
    "llama_3_1_8b": "llama-3.1-8b",
    "qwen3_235b_a22b": "qwen3-235b-a22b",
    "qwen3_8b": "qwen3-8b",
}
"""The same models' names in our table."""


def write_model(folder: Path, name: str) -> Path:
    title, keys, values = MODELS[name]
    lines = [f"model_name: '{title}'", *(f"{k}: {v}" for k, v in zip(keys.split(), values, strict=True))]
    path = folder / f"model_{name}.yaml"
    path.write_text("# A model.\n\n" + "\n".join([*lines, "num_model_params: 8000000000"]) + "\n")
    return path


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    found = re.fullmatch(r"(block|layer)-tp(\d+)-pp(\d+)", name)
    assert found is not None
    access, tp, pp = found.groups()
    isl = 8192 if name == "block-tp8-pp16" else 1000
    page = 1 if name == "layer-tp8-pp8" else 16
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""
strategy:
  tp_size: {tp}
  pp_size: {pp}
  model_quant_mode: "{changes.get("model_dtype", "fp8")}"
  kvcache_quant_mode: "{changes.get("kv_dtype", "fp8")}"

runtime:
  isl: {changes.get("isl", isl)}
  osl: 100
  num_requests: 10

system:
  hardware: "H100"
  backend: "SGLANG"
  access_pattern: "{access}"
  page_size: {page}
  something_else: 1
"""
    )
    return path


ODD: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], [1], [["x"]], {}, {"a": 1}, 10**30]
"""Values that no field of any file should have."""


def spoiled(document: Any) -> Iterator[Any]:
    """Yield a document again and again, each time with another odd value in another place of it."""
    for place in _places(document):
        for value in ODD:
            changed = copy.deepcopy(document)
            if not place:
                yield value
                continue
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            yield changed


def _places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    inner = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in inner:
        yield from _places(value, (*above, key))
