"""How a model is served and what is asked of it: parallelism, requests, pages; KVBench's configuration files, read unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.kv.documents import read_document
from nixl_async.benchmarks.kv.models import Model
from nixl_async.errors import ConfigurationError
from nixl_async.geometry import KVGeometry, Shard, Sharding

BLOCK, LAYER = "block", "layer"
ACCESSES = (BLOCK, LAYER)
AXES = {
    # One access is one contiguous piece of a rank's pool: a page in all of its layers, or in one.
    BLOCK: ("block", "layer", "kv", "token", "head"),
    LAYER: ("layer", "block", "kv", "token", "head"),
}
DTYPES = {
    "fp8": 1,
    "int8": 1,
    "fp16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bf16": 2,
    "float32": 4,
    "fp32": 4,
}
"""Bytes of a number by the names of KVBench (the first four), of config.json, and others in use."""

_STRATEGY = {"tp_size": "tp", "pp_size": "pp", "model_quant_mode": "model_dtype", "kvcache_quant_mode": "kv_dtype"}
_RUNTIME = {"num_requests": "num_requests", "isl": "isl", "osl": "osl"}
_SYSTEM = {
    "hardware": "hardware",
    "backend": "engine",
    "page_size": "page_size",
    "access_pattern": "access",
    "source": "source",
    "destination": "destination",
}
_SECTIONS = {"strategy": _STRATEGY, "runtime": _RUNTIME, "system": _SYSTEM}
_NUMBERS = ("tp", "pp", "num_requests", "isl", "osl", "page_size")
MAX_NUMBER = 1 << 32
MAX_RANKS = 1 << 14


@dataclass(frozen=True)
class Layout:
    """A model's ranks, and the requests whose cache is moved. The defaults are KVBench's."""

    tp: int = 1
    pp: int = 1
    model_dtype: str = "fp8"
    """What the weights are made of; KVBench reckons the cache of models without MLA by it."""
    kv_dtype: str = "fp8"
    """What the cache is made of."""
    num_requests: int = 1
    isl: int = 1
    """Tokens of a request's prompt."""
    osl: int = 1
    """Tokens of its answer; they are not there yet when the prompt's cache is moved."""
    page_size: int = 1
    """Tokens in a page."""
    access: str | None = None
    """`block`: a page is moved in all layers of a rank at once. `layer`, or nothing: layer by layer."""
    engine: str = "SGLANG"
    hardware: str | None = None
    source: str | None = None
    destination: str | None = None
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage, where the engine does not divide them as `split_layers`."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in _NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_NUMBER:
                raise ConfigurationError(f"{name} is {value!r}; it must be a positive integer of at most {MAX_NUMBER}")
        if self.tp * self.pp > MAX_RANKS:
            raise ConfigurationError(
                f"tp is {self.tp} and pp {self.pp}: {self.tp * self.pp} ranks; at most {MAX_RANKS} are planned"
            )
        for name in ("model_dtype", "kv_dtype", "source", "destination"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and "dtype" not in name):
                raise ConfigurationError(f"{name} is {value!r}; it must be a name")
        if self.access is not None and self.access not in ACCESSES:
            raise ConfigurationError(f"access is {self.access!r}; it must be one of {', '.join(ACCESSES)}")

    def changed(self, **values: Any) -> Layout:
        """Return a copy in which the values that are not None take the place of those here."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def with_default_stages(self) -> Layout:
        """Return a copy whose stages are divided by `split_layers`."""
        return replace(self, stages=None)

    @property
    def by_block(self) -> bool:
        """Whether a page is moved in all layers of a rank at once."""
        return self.access == BLOCK

    @property
    def pages(self) -> int:
        """Pages that one request takes."""
        return math.ceil(self.isl / self.page_size)

    def geometry(self, model: Model) -> KVGeometry:
        """Return what the model keeps, in the cache's dtype.

        Raises:
            ConfigurationError: the dtype is unknown.
        """
        return model.geometry(dtype_nbytes(self.kv_dtype))

    def sharding(self, geometry: KVGeometry) -> Sharding:
        """Return how the ranks share it: `Sharding.axes` are such that an access is one piece of a rank's pool.

        Raises:
            ConfigurationError: there are more stages than layers.
        """
        stages = self.stages if self.stages is not None else split_layers(geometry.layers, self.pp)
        return Sharding(self.tp, self.pp, self.page_size, AXES[BLOCK if self.by_block else LAYER], stages)

    def shards(self, geometry: KVGeometry) -> list[Shard]:
        """Return what each rank keeps.

        Raises:
            DescriptorError: TP neither divides the KV heads nor is a multiple of them, or `stages` do not fit.
        """
        sharding = self.sharding(geometry)
        return [sharding.shard(geometry, rank) for rank in range(sharding.ranks)]

    def as_kvbench(self) -> dict[str, dict[str, Any]]:
        """Return the values in KVBench's sections."""
        return {section: {key: getattr(self, name) for key, name in names.items()} for section, names in _SECTIONS.items()}


def dtype_nbytes(dtype: str) -> int:
    """Return what a number takes.

    Raises:
        ConfigurationError: the name is unknown.
    """
    try:
        return DTYPES[dtype.lower()]
    except KeyError:
        raise ConfigurationError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}") from None


def split_layers(layers: int, pp: int) -> tuple[int, ...]:
    """Divide layers among pipeline stages as vLLM does: what is left over goes to the stages before the last, one each.

    Raises:
        ConfigurationError: there are more stages than layers.
    """
    if pp > layers:
        raise ConfigurationError(f"pp is {pp}, but the model has {layers} layers; each stage needs one")
    each, rest = divmod(layers, pp)
    stages = [each] * pp
    for stage in range(2, rest + 2):
        stages[-stage] += 1
    return tuple(stages)


def read_layout(path: str | Path, base: Layout | None = None) -> Layout:
    """Read one of KVBench's configuration files: sections `strategy`, `runtime`, `system`; what it does not name is `base`'s.

    Unknown names are passed over, as KVBench does.

    Raises:
        ConfigurationError: the file cannot be read, or a value makes no sense.
    """
    document = read_document(path)
    if not set(_SECTIONS) & set(document):
        raise ConfigurationError(f"{str(path)!r} has none of the sections {', '.join(_SECTIONS)}")
    values: dict[str, Any] = {}
    for section, names in _SECTIONS.items():
        found = document.get(section)
        if not isinstance(found, Mapping):
            continue
        for key, value in found.items():
            if (name := names.get(key)) is not None:
                values[name] = _number(value) if name in _NUMBERS else value
    try:
        return replace(base or Layout(), **values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(path)!r}: {error}") from None


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() else value
