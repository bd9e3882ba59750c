"""Models: what each keeps for a token, out of the table here, a Hugging Face `config.json`, or KVBench's model file.

**Sliding windows.** A layer of the kind `sliding_attention` (every second one of GPT-OSS) needs the last `sliding_window` tokens
only. Engines keep and send its pages like any other layer's unless they have a hybrid cache manager, and KVBench counts them so;
all figures here do too. The plan says what is left where windowed layers send what is in their window and nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.kv.documents import read_document
from nixl_async.errors import ConfigurationError, DescriptorError
from nixl_async.geometry import KVGeometry

_BF16 = {"torch_dtype": "bfloat16"}
TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    # name: repository on the Hugging Face hub, and what its config.json says, under the names that it has there.
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096} | _BF16,
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B",
        {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192} | _BF16,
    ),
    "llama-3.1-405b": (
        "meta-llama/Llama-3.1-405B",
        {"num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "hidden_size": 16384} | _BF16,
    ),
    "deepseek-r1": (
        "deepseek-ai/DeepSeek-R1",
        {"num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        | _BF16,
    ),
    "deepseek-v3": (
        "deepseek-ai/DeepSeek-V3",
        {"num_hidden_layers": 61, "num_attention_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
        | _BF16,
    ),
    "gpt-oss-20b": (
        "openai/gpt-oss-20b",
        {"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 2880}
        | {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12}
        | _BF16,
    ),
    "gpt-oss-120b": (
        "openai/gpt-oss-120b",
        {"num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "hidden_size": 2880}
        | {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 18}
        | _BF16,
    ),
    "qwen3-8b": (
        "Qwen/Qwen3-8B",
        {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096}
        | _BF16,
    ),
    "qwen3-235b-a22b": (
        "Qwen/Qwen3-235B-A22B",
        {"num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "hidden_size": 4096}
        | _BF16,
    ),
}
_ALIASES = {"qwen3235b": "qwen3-235b-a22b"}

# What makes a token's cache something else than keys and values, or a latent vector, in every layer.
_OTHER_CACHES = {
    "index_head_dim": "the indexer of its sparse attention keeps a cache of its own",
    "v_head_dim": "values have another size than keys",
    "num_kv_shared_layers": "some layers use the cache of others",
    "layers_block_type": "some layers keep a state instead of keys and values",
    "block_types": "some layers keep a state instead of keys and values",
    "hybrid_override_pattern": "some layers keep a state instead of keys and values",
    "attn_type_list": "some layers keep a state instead of keys and values",
    "attn_layer_period": "some layers keep a state instead of keys and values",
    "full_attention_interval": "some layers keep a state instead of keys and values",
    "linear_attn_config": "some layers keep a state instead of keys and values",
    "ssm_state_size": "it keeps a state instead of keys and values",
    "block_configs": "its layers differ from each other",
    "cross_attention_layers": "some layers attend to an encoder",
    "is_encoder_decoder": "it has an encoder",
}
# What a slip of the pen is taken for, rather than a model.
_MOST = {"layers": 4096, "heads": 65536, "head_dim": 1 << 20}
# DeepSeek's MLA has values of another size, but keeps neither them nor keys.
_NOT_OF_MLA = {"v_head_dim"}


@dataclass(frozen=True)
class Model:
    """What a model keeps in its KV cache, and what else its traffic is reckoned by."""

    name: str
    source: str
    """Where the figures are from."""
    layers: int
    heads: int
    """KV heads; 1 for MLA."""
    head_dim: int
    """Numbers in a vector: a head's size, or the latent's with the rotated key's."""
    kv: int
    """2 where keys and values are apart, 1 for MLA."""
    dtype: str | None = None
    """What the model's own numbers are, if its source says so."""
    hidden_size: int | None = None
    windows: tuple[int, ...] = field(default=(), repr=False)
    """The sliding window of each layer in tokens, 0 where it has none; empty where no layer has one."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigurationError(f"{self.source}: it has {getattr(self, name)} {name}; 1 to {most} are allowed")

    def geometry(self, dtype_nbytes: int) -> KVGeometry:
        """Return what is kept for each token when a number takes `dtype_nbytes` bytes."""
        return KVGeometry(self.layers, self.heads, self.head_dim, dtype_nbytes, self.kv)

    @property
    def latent(self) -> bool:
        """Whether it keeps a latent vector (MLA), of which every tensor-parallel rank needs all."""
        return self.kv == 1


def find_model(given: str) -> Model:
    """Return the model of that name in the table, or of a file: Hugging Face's `config.json` (or its directory), or KVBench's.

    Names are those of the table, of the repositories and of KVBench; case and punctuation do not matter.

    Raises:
        ConfigurationError: there is neither such a name nor such a file, or the file describes no model known here.
    """
    path = Path(given)
    if path.is_dir() and (path / "config.json").exists():
        path = path / "config.json"
    if path.is_file():
        return _of_file(path)
    plain = _plain(given.rpartition("/")[2])
    for suffix in ("instruct", "base", "0528"):
        plain = plain.removesuffix(suffix)
    name = _ALIASES.get(plain) or next((name for name in TABLE if _plain(name) == plain), None)
    if name is None:
        if path.suffix or "/" in given:
            raise ConfigurationError(f"the model {given!r} is no file, and no known name; known are {', '.join(TABLE)}")
        near = difflib.get_close_matches(given.lower(), TABLE, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigurationError(
            f"there is no model {given!r}{hint}; known are {', '.join(TABLE)}; or give the path of a config.json"
        )
    repository, config = TABLE[name]
    return of_config(config, name, f"config.json of {repository}")


def _of_file(path: Path) -> Model:
    document = read_document(path)
    if "model_name" in document:
        return _of_kvbench(document, path)
    if not {"num_hidden_layers", "text_config", "model_type", "architectures"} & set(document):
        raise ConfigurationError(
            f"{str(path)!r} has neither 'model_name', as KVBench's model files, nor 'num_hidden_layers', as a config.json"
        )
    name = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return of_config(document, name, str(path))


def of_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """Read a model's `config.json` as on the Hugging Face hub.

    Raises:
        ConfigurationError: a field is missing or makes no sense, or says that the cache is no paged one of keys and values or
            latent vectors; the message names the field.
    """
    if "num_hidden_layers" not in config and isinstance(config.get("text_config"), Mapping):
        config = {"torch_dtype": config.get("torch_dtype"), "dtype": config.get("dtype")} | dict(config["text_config"])
    latent = config.get("kv_lora_rank") is not None
    head_dim = config.get("head_dim")
    for key, why in _OTHER_CACHES.items():
        value = config.get(key)
        if value and not (key in _NOT_OF_MLA and (latent or value == head_dim)):
            raise ConfigurationError(f"{source}: {key!r} is {_short(value)}: {why}; that is not supported")
    if config.get("multi_query") and config.get("num_key_value_heads") is None:
        config = {**config, "num_key_value_heads": 1}
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ConfigurationError(f"{source}: 'layer_types' is {_short(kinds)}; it must be a list of names")
    hidden_size = config.get("hidden_size")
    if hidden_size is not None and (not isinstance(hidden_size, int) or not 0 < hidden_size <= _MOST["head_dim"]):
        raise ConfigurationError(f"{source}: 'hidden_size' is {_short(hidden_size)}; a positive integer is needed")
    try:
        # One byte a number: what numbers take is the caller's to choose.
        geometry = KVGeometry.from_config(config, 1)
    except DescriptorError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    dtype = config.get("dtype") or config.get("torch_dtype")
    windows = _windows(config, geometry.layers, source)
    return Model(
        name,
        source,
        geometry.layers,
        geometry.heads,
        geometry.head_dim,
        geometry.kv,
        None if dtype is None else str(dtype).removeprefix("torch."),
        hidden_size,
        windows,
    )


def _windows(config: Mapping[str, Any], layers: int, source: str) -> tuple[int, ...]:
    kinds = config.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise ConfigurationError(f"{source}: 'layer_types' has {len(kinds)} layers, 'num_hidden_layers' is {layers}")
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return ()
    if not isinstance(window, int):
        raise ConfigurationError(f"{source}: 'sliding_window' is {window!r}; it must be a number of tokens")
    found = tuple(window if kind == "sliding_attention" else 0 for kind in kinds or ["sliding_attention"] * layers)
    return found if any(found) else ()


# KVBench's families: how model_name shows them, the fields each needs beside, and its other numbers.
_LLAMA, _DEEPSEEK, _GPT_OSS, _QWEN = "llama3.1", "deepseek_r1", "gpt_oss", "qwen3"
_GROUPED = ("num_layers", "num_query_heads", "num_kv_heads", "query_head_dimension")
_FIELDS = {
    _LLAMA: ("num_layers", "num_query_heads_with_mha", "query_head_dimension", "gqa_num_queries_in_group"),
    _DEEPSEEK: ("num_layers", "num_query_heads", "embedding_dimension", "rope_mla_dimension", "mla_latent_vector_dimension"),
    _GPT_OSS: _GROUPED,
    _QWEN: _GROUPED,
}


def _of_kvbench(document: Mapping[str, Any], path: Path) -> Model:
    name = str(document["model_name"])
    family = next((family for family in _FIELDS if family in name.lower()), None)
    if family is None:
        raise ConfigurationError(
            f"{str(path)!r}: 'model_name' is {name!r}; KVBench knows names that contain {', '.join(_FIELDS)}. "
            "For another model give its config.json"
        )
    numbers = {}
    for key in _FIELDS[family]:
        value = document.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigurationError(f"{str(path)!r}: {key!r} is {value!r}; a model like {family} needs a positive integer")
        numbers[key] = value
    layers = numbers["num_layers"]
    if family == _DEEPSEEK:
        size = numbers["rope_mla_dimension"] + numbers["mla_latent_vector_dimension"]
        return Model(name, str(path), layers, 1, size, 1, None, numbers["embedding_dimension"])
    queries = numbers.get("num_query_heads_with_mha") or numbers["num_query_heads"]
    dim = numbers["query_head_dimension"]
    if family == _LLAMA:
        heads, rest = divmod(queries, numbers["gqa_num_queries_in_group"])
        if rest:
            raise ConfigurationError(
                f"{str(path)!r}: 'gqa_num_queries_in_group' is {numbers['gqa_num_queries_in_group']}, which does not divide "
                f"'num_query_heads_with_mha', {queries}"
            )
    else:
        heads = numbers["num_kv_heads"]
    return Model(name, str(path), layers, heads, dim, 2, None, queries * dim)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("meta-"))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
