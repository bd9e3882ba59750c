"""KVBench's own figures, right or wrong, and the nixlbench command that it prints for them.

Facts from benchmark/kvbench of ai-dynamo/nixl (models/*.py, models/utils.py, commands/nixlbench.py, main.py). Its numbers go
through floating point, and so do these, in the same order.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.models import Model
from nixl_async.errors import ConfigurationError

DTYPES = {"fp8": 1, "int8": 1, "fp16": 2, "bfloat16": 2}


def knows(layout: Layout) -> bool:
    """Whether KVBench knows both of a layout's dtypes."""
    return layout.model_dtype in DTYPES and layout.kv_dtype in DTYPES


@dataclass(frozen=True)
class Figures:
    """What KVBench says of a model and a layout."""

    token_nbytes: int
    """Bytes of a token in the whole model: of MLA by the cache's dtype, of others by that of the weights."""
    stage_layers: float
    """Layers of a pipeline stage: of MLA rounded up, of others a fraction."""
    io_size: int
    """Bytes of one access."""
    batch_size: int
    """Accesses of all requests and of all ranks."""

    @classmethod
    def of(cls, model: Model, layout: Layout, page_size: int | None = None) -> Figures:
        """Reckon as KVBench does; `page_size` tokens a page, by default the layout's.

        Raises:
            ConfigurationError: a dtype is none of KVBench's, or nothing is left of an access.
        """
        for dtype in (layout.model_dtype, layout.kv_dtype):
            if dtype not in DTYPES:
                raise ConfigurationError(f"dtype is {dtype!r}; KVBench knows {', '.join(DTYPES)}")
        nbytes = DTYPES[layout.kv_dtype if model.latent else layout.model_dtype]
        token_nbytes = model.layers * model.heads * model.head_dim * model.kv * nbytes
        layer_nbytes: float = token_nbytes // model.layers / layout.tp
        stage_layers: float = model.layers / layout.pp
        if model.latent:
            stage_layers = math.ceil(stage_layers)
        else:
            layer_nbytes = int(layer_nbytes)
        io_nbytes = layer_nbytes
        if layout.by_block:
            io_nbytes *= stage_layers
            if not model.latent:
                io_nbytes = int(io_nbytes)
        io_size = int(io_nbytes * (layout.page_size if page_size is None else page_size))
        if io_size <= 0:
            raise ConfigurationError(f"tp {layout.tp} and pp {layout.pp} leave nothing of an access by KVBench's formulas")
        batch_size = math.ceil(token_nbytes * layout.isl / io_size * layout.num_requests)
        return cls(token_nbytes, stage_layers, io_size, batch_size)

    @property
    def total_buffer_size(self) -> int:
        """Bytes of all accesses."""
        return self.io_size * self.batch_size

    def as_dict(self) -> dict[str, Any]:
        """Return what programs get."""
        return {
            "token_nbytes": self.token_nbytes,
            "io_size": self.io_size,
            "batch_size": self.batch_size,
            "total_buffer_size": self.total_buffer_size,
        }


DEFAULTS: dict[str, Any] = {
    # What nixlbench takes when a parameter is not given, in the order of KVBench's JSON.
    "backend": "UCX",
    "check_consistency": False,
    "device_list": "all",
    "enable_pt": False,
    "progress_threads": 0,
    "etcd_endpoints": "http://localhost:2379",
    "storage_enable_direct": False,
    "filepath": "",
    "enable_vmm": False,
    "gds_batch_pool_size": 32,
    "gds_batch_limit": 128,
    "initiator_seg_type": "DRAM",
    "max_batch_size": 1,
    "max_block_size": 67108864,
    "mode": "SG",
    "num_files": 1,
    "num_initiator_dev": 1,
    "num_iter": 1000,
    "num_target_dev": 1,
    "num_threads": 1,
    "op_type": "WRITE",
    "posix_api_type": "AIO",
    "runtime_type": "ETCD",
    "scheme": "pairwise",
    "start_batch_size": 1,
    "start_block_size": 4096,
    "target_seg_type": "DRAM",
    "total_buffer_size": 8589934592,
    "warmup_iter": 100,
    "worker_type": "nixl",
    "benchmark_group": "default",
    "gds_mt_num_threads": 1,
    "gpunetio_device_list": "0",
    "gpunetio_oob_list": "",
    "hf3fs_iopool_size": 64,
    "obj_access_key": "",
    "obj_secret_key": "",
    "obj_session_token": "",
    "obj_bucket_name": "",
    "obj_scheme": "http",
    "obj_region": "eu-central-1",
    "obj_use_virtual_addressing": False,
    "obj_endpoint_override": "",
    "obj_req_checksum": "supported",
    "large_blk_iter_ftr": 16,
    "recreate_xfer": False,
}
_FLAGS = {"check_consistency", "recreate_xfer", "enable_pt"}
_IGNORED = {"obj_ca_bundle": ""}
_DERIVED = {"start_block_size", "max_block_size", "start_batch_size", "max_batch_size", "total_buffer_size"}
_SEGMENTS = {"memory": "DRAM", "gpu": "VRAM"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


def read_parameters(arguments: Sequence[str]) -> dict[str, Any]:
    """Read nixlbench's parameters as KVBench's commands take them; names may have dashes for underscores.

    Raises:
        ConfigurationError: one is unknown, or its value is of the wrong type.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, default in (DEFAULTS | _IGNORED).items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        if name in _FLAGS:
            parser.add_argument(*names, dest=name, action="store_true")
        else:
            parser.add_argument(*names, dest=name, type=_boolean if isinstance(default, bool) else type(default))
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigurationError(f"no such option: {unknown[0]}")
    return {name: value for name, value in vars(found).items() if name not in _IGNORED}


def _boolean(text: str) -> bool:
    lower = text.lower()
    if lower in ("1", "true", "t", "yes", "y", "on"):
        return True
    if lower in ("0", "false", "f", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def segments(backend: str, source: str, destination: str) -> dict[str, str]:
    """Return the parameters that say what is moved where, as KVBench takes them from a source and a destination.

    Raises:
        ConfigurationError: the backend cannot be planned for, or does not go between those two.
    """
    name = backend.lower()
    if name in ("gds", "gds_mt"):
        return _storage(
            backend, source, {"file": ("READ", "target_seg_type", "VRAM"), "gpu": ("WRITE", "target_seg_type", "FILE")}
        )
    if name in ("posix", "hf3fs"):
        memory = ("WRITE", "initiator_seg_type", "DRAM")
        return _storage(backend, source, {"file": ("READ", "target_seg_type", "DRAM"), "memory": memory})
    if name in ("ucx", "gpunetio", "mooncake"):
        for what, place in (("source", source), ("destination", destination)):
            if place not in _SEGMENTS:
                raise ConfigurationError(f"{what} is {place!r}; of {backend} it must be one of {', '.join(_SEGMENTS)}")
        return {"initiator_seg_type": _SEGMENTS[source], "target_seg_type": _SEGMENTS[destination]}
    if name == "obj":
        if (source in _SEGMENTS) == (destination in _SEGMENTS):
            raise ConfigurationError(
                f"source is {source!r} and destination {destination!r}; of OBJ exactly one must be {' or '.join(_SEGMENTS)}"
            )
        if source in _SEGMENTS:
            return {"op_type": "WRITE", "initiator_seg_type": _SEGMENTS[source]}
        return {"op_type": "READ", "initiator_seg_type": _SEGMENTS[destination]}
    raise ConfigurationError(f"backend is {backend!r}; known are UCX, GDS, GDS_MT, POSIX, GPUNETIO, Mooncake, HF3FS, OBJ")


def _storage(backend: str, source: str, ways: dict[str, tuple[str, str, str]]) -> dict[str, str]:
    if source not in ways:
        raise ConfigurationError(f"source is {source!r}; of {backend} it must be one of {', '.join(ways)}")
    op, segment, kind = ways[source]
    return {"op_type": op, segment: kind}


def parameters(given: dict[str, Any], io_size: int, batch_size: int, source: str, destination: str) -> dict[str, Any]:
    """Return all parameters of nixlbench for accesses of one size; sizes that are `given` give way to them.

    Raises:
        ConfigurationError: the backend does not go between those two.
    """
    sizes = {
        "start_block_size": io_size,
        "max_block_size": io_size,
        "start_batch_size": batch_size,
        "max_batch_size": batch_size,
        "total_buffer_size": io_size * batch_size,
    }
    where = segments(given.get("backend", DEFAULTS["backend"]), source, destination)
    return DEFAULTS | {name: value for name, value in given.items() if name not in _DERIVED} | sizes | where


# The order in which KVBench prints them.
_PRINTED = [
    "benchmark_group",
    *(name for name in DEFAULTS if name not in ("benchmark_group", "large_blk_iter_ftr", "recreate_xfer")),
    "large_blk_iter_ftr",
    "recreate_xfer",
]


def command(values: dict[str, Any]) -> str:
    """Write the nixlbench command, with the parameters that differ from its defaults, as KVBench does."""
    parts = [f"--{name} {values[name]}" for name in _PRINTED if values[name] != DEFAULTS[name]]
    return " \\\n    ".join(["nixlbench", *parts])


def banner(config: str, layout: Layout) -> str:
    """Write what KVBench prints above a command."""
    line = "=" * 80
    return "\n".join(
        [
            line,
            f"Model Config: {config}",
            f"ISL: {layout.isl} tokens",
            f"Page Size: {layout.page_size}",
            f"Requests: {layout.num_requests}",
            f"TP: {layout.tp}",
            f"PP: {layout.pp}",
            line,
        ]
    )


def as_json(plans: Iterable[tuple[str, Layout, dict[str, Any]]]) -> str:
    """Write plans (configuration file, layout, parameters) as KVBench's JSON."""
    return json.dumps([values | {"config_file": config} for config, _, values in plans], indent=2)


def as_csv(plans: Iterable[tuple[str, Layout, dict[str, Any]]]) -> str:
    """Write plans as KVBench's CSV, whose columns are in no certain order there and sorted here; its model column is empty."""
    rows = []
    for config, layout, values in plans:
        row = values | {"config_file": config, "model": None}
        for section, entries in layout.as_kvbench().items():
            row |= {f"model_{section}_{key}": value for key, value in entries.items()}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for row in rows for name in row}), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def kvcache_table(rows: Iterable[tuple[str, Layout, int, int]]) -> str:
    """Write rows of model name, layout, batch size and I/O size as KVBench's `kvcache` does."""
    heads = ["Model", "ISL", "Num Requests", "Batch Size", "IO Size", "TP", "PP", "Page Size", "Access"]
    texts = {"Model", "IO Size", "Access"}
    table = [
        [
            name,
            str(layout.isl),
            str(layout.num_requests),
            str(batch),
            size_text(io_size),
            str(layout.tp),
            str(layout.pp),
            str(layout.page_size),
            layout.access or "",
        ]
        for name, layout, batch, io_size in rows
    ]
    widths = [max(len(head) + 2, *(len(row[i]) for row in table)) for i, head in enumerate(heads)]

    def line(cells: list[str]) -> str:
        aligned = (
            cell.ljust(width) if head in texts else cell.rjust(width)
            for head, cell, width in zip(heads, cells, widths, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(heads), "  ".join("-" * width for width in widths), *map(line, table)])


def size_text(nbytes: int) -> str:
    """Write a byte count as KVBench does: units of 1024 that are called KB, MB, GB and TB."""
    power = 0 if nbytes <= 0 else math.floor(math.log(nbytes, 1024))
    return f"{round(nbytes / 1024**power, 2)} {['B', 'KB', 'MB', 'GB', 'TB'][power]}"
