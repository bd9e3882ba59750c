"""What a model keeps in its KV cache, and how an engine spreads it over ranks and lays it out in each rank's pool.

Pure arithmetic; `planner` makes descriptors of it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nixl_async.errors import DescriptorError

NHD = ("layer", "kv", "block", "token", "head")
"""Axes of a pool whose pages are [tokens, heads, head_dim]."""
HND = ("layer", "kv", "block", "head", "token")
"""Axes of a pool whose pages are [heads, tokens, head_dim]."""

_DTYPE_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_PAGED_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class KVGeometry:
    """What a model keeps for each token: in each layer, `kv` times `heads` vectors of `head_dim` numbers.

    `kv` is 2 where keys and values are apart. MLA keeps one latent vector, which is `heads` 1 and `kv` 1: `KVGeometry.mla`.
    """

    layers: int
    heads: int
    """KV heads of the whole model."""
    head_dim: int
    dtype_nbytes: int = 2
    kv: int = 2

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("layers", "heads", "head_dim", "dtype_nbytes"):
            _positive(name, getattr(self, name))
        if self.kv not in (1, 2):
            raise DescriptorError(f"kv is {self.kv!r}; it must be 2 (keys and values) or 1 (a latent vector, as of MLA)")

    @classmethod
    def mla(cls, layers: int, kv_lora_rank: int, rope_dim: int, dtype_nbytes: int = 2) -> KVGeometry:
        """Describe multi-head latent attention: the latent and the rotated key in one vector, the same on all TP ranks."""
        return cls(layers, 1, _positive("kv_lora_rank", kv_lora_rank) + _positive("rope_dim", rope_dim), dtype_nbytes, 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype_nbytes: int | None = None) -> KVGeometry:
        """Read a model's `config.json` as on the Hugging Face hub (Llama, Qwen, GPT-OSS, DeepSeek and their like).

        `dtype_nbytes` is what a number takes in the cache; by default the size of the model's own dtype.

        Raises:
            DescriptorError: a key is missing or makes no sense, or some layers keep no paged KV cache.
        """
        if "num_hidden_layers" not in config and isinstance(config.get("text_config"), Mapping):
            config = config["text_config"]
        kinds = set(config.get("layer_types") or ()) - set(_PAGED_ATTENTION)
        if kinds:
            raise DescriptorError(f"layer_types has {sorted(kinds)}; only {_PAGED_ATTENTION} keep a paged KV cache")
        if dtype_nbytes is None:
            dtype = str(config.get("dtype") or config.get("torch_dtype"))
            if dtype not in _DTYPE_NBYTES:
                raise DescriptorError(f"dtype is {dtype!r}, not one of {sorted(_DTYPE_NBYTES)}; give dtype_nbytes")
            dtype_nbytes = _DTYPE_NBYTES[dtype]
        layers = _entry(config, "num_hidden_layers")
        if config.get("kv_lora_rank") is not None:
            return cls.mla(layers, _entry(config, "kv_lora_rank"), _entry(config, "qk_rope_head_dim"), dtype_nbytes)
        queries = _entry(config, "num_attention_heads")
        heads = queries if config.get("num_key_value_heads") is None else _entry(config, "num_key_value_heads")
        if config.get("head_dim") is None:
            return cls(layers, heads, _entry(config, "hidden_size") // queries, dtype_nbytes)
        return cls(layers, heads, _entry(config, "head_dim"), dtype_nbytes)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one vector: one token, one head, of one layer's keys or values. No slice is smaller."""
        return self.head_dim * self.dtype_nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token in the whole model."""
        return self.layers * self.kv * self.heads * self.row_nbytes


@dataclass(frozen=True)
class Sharding:
    """How an engine spreads a KV cache over its ranks, and how each rank lays out its pool.

    Rank r is tensor-parallel rank `r % tp` of pipeline stage `r // tp`. Of `tp` ranks each has `heads / tp` heads; where there are
    fewer heads than ranks, `tp / heads` ranks in a row have the same one (so do vLLM and SGLang; of MLA all ranks have all).
    """

    tp: int = 1
    pp: int = 1
    page_tokens: int = 16
    """Tokens in a page."""
    axes: tuple[str, ...] = NHD
    """The pool's axes from outermost to innermost: `NHD`, `HND`, or any other order of "layer", "kv", "block", "token", "head"; the
    innermost thing is always a vector. Axes of length 1 may be left out. Where the pool is several regions, they are one for each
    index of the first axis, or of the first two: `("kv", "layer", ...)` in 2 * layers regions has all K first, then all V."""
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage, where `pp` does not divide the layers or the engine divides them unevenly."""

    def __post_init__(self) -> None:
        """Check the numbers and the axes."""
        for name in ("tp", "pp", "page_tokens"):
            _positive(name, getattr(self, name))
        if len(set(self.axes)) != len(self.axes) or not set(self.axes) <= set(NHD) or "block" not in self.axes:
            raise DescriptorError(f"axes are {self.axes!r}; give each once, 'block' among them, out of {NHD}")
        if self.stages is not None:
            if len(self.stages) != self.pp:
                raise DescriptorError(f"stages names {len(self.stages)} stages, but pp is {self.pp}")
            for nlayers in self.stages:
                _positive("the layers of a stage", nlayers)

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.tp * self.pp

    def shard(self, geometry: KVGeometry, rank: int) -> Shard:
        """Tell what a rank keeps.

        Raises:
            DescriptorError: there is no such rank, or the model cannot be divided so.
        """
        rank = operator.index(rank)
        if not 0 <= rank < self.ranks:
            raise DescriptorError(f"rank is {rank}; with tp {self.tp} and pp {self.pp} it is 0 to {self.ranks - 1}")
        stages, (stage, place) = self.stages, divmod(rank, self.tp)
        if stages is None:
            if geometry.layers % self.pp:
                raise DescriptorError(f"pp is {self.pp}, which does not divide {geometry.layers} layers; give stages")
            stages = (geometry.layers // self.pp,) * self.pp
        elif sum(stages) != geometry.layers:
            raise DescriptorError(f"stages {stages!r} have {sum(stages)} layers, but the model has {geometry.layers}")
        first = sum(stages[:stage])
        if geometry.heads % self.tp == 0:
            each = geometry.heads // self.tp
            heads = range(place * each, (place + 1) * each)
        elif self.tp % geometry.heads == 0:
            head = place // (self.tp // geometry.heads)
            heads = range(head, head + 1)
        else:
            raise DescriptorError(f"tp is {self.tp}; it must divide {geometry.heads} KV heads, or be a multiple of them")
        shard = Shard(geometry, self, rank, range(first, first + stages[stage]), heads)
        for axis, length in shard.lengths.items():
            if length > 1 and axis not in self.axes:
                raise DescriptorError(f"axes {self.axes!r} leave out {axis!r}, of which each rank has {length}")
        return shard


@dataclass(frozen=True)
class Shard:
    """What one rank keeps: `heads` of `layers`, numbered as in the whole model."""

    geometry: KVGeometry
    sharding: Sharding
    rank: int
    layers: range
    heads: range

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths of the pool's axes, but of the blocks."""
        page_tokens = self.sharding.page_tokens
        return {"layer": len(self.layers), "kv": self.geometry.kv, "token": page_tokens, "head": len(self.heads)}

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block in all layers of the rank."""
        return math.prod(self.lengths.values()) * self.geometry.row_nbytes


def _positive(what: str, value: Any) -> int:
    number = operator.index(value)
    if number <= 0:
        raise DescriptorError(f"{what} is {number}; it must be positive")
    return number


def _entry(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DescriptorError(f"the model's config has {value!r} as {name!r}; a positive integer is needed")
    return _positive(name, value)
