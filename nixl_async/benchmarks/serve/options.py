"""What `nixl-async bench serve` may be told, what fits together, and the model, requests and schedules that follow from it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nixl_async.backend import SCHEMES, load_backend
from nixl_async.benchmarks.kv.contents import WORD
from nixl_async.benchmarks.kv.layouts import dtype_nbytes
from nixl_async.benchmarks.kv.models import Model, find_model
from nixl_async.benchmarks.kv.processes import check_memory
from nixl_async.benchmarks.kv.running import check_backend
from nixl_async.benchmarks.options import Format, Word, flag, plain, read_file, refusal
from nixl_async.benchmarks.serve.arrivals import MAX_TOKENS, TRACE_BLOCK_TOKENS, Request, poisson, read_trace, with_batch
from nixl_async.benchmarks.serve.computing import Compute
from nixl_async.benchmarks.serve.contents import page_count
from nixl_async.benchmarks.tables import check_format
from nixl_async.errors import ConfigurationError
from nixl_async.geometry import KVGeometry
from nixl_async.storage import parse_store

AUTO = "auto"
POISSON_BLOCK_TOKENS = 64
MIB = 1 << 20


class Schedule(Word):
    """When a request's layers go from prefill to decode."""

    LAYERS = "layers"
    WHOLE = "whole"


class Classes(Word):
    """Whether requests have traffic classes and deadlines."""

    OFF = "off"
    ON = "on"


@dataclass(frozen=True)
class Options:
    """A simulation."""

    model: str = "llama-3.1-8b"
    layers: int = 0
    dtype: str = ""
    page_size: int = 16
    prefill: int = 1
    decode: int = 1
    pool_requests: int = 4
    trace: str = ""
    requests: int = 24
    rate: float = 4.0
    isl: int = 512
    osl: int = 32
    spread: float = 0.5
    prefix_share: float = 0.5
    prefixes: int = 4
    block_tokens: int = POISSON_BLOCK_TOKENS
    shrink: int = 1
    batch_share: float = 0.0
    seed: int = 0
    speed: float = 0.25
    tflops: float = 400.0
    memory_bandwidth: float = 2000.0
    parameters: float = 0.0
    dram_mib: int = 256
    nvme: str = ""
    nvme_mib: int = 1024
    objects: str = ""
    objects_endpoint: str = ""
    schedule: tuple[Schedule, ...] = field(default=(Schedule.LAYERS, Schedule.WHOLE), metadata={"of": Schedule})
    classes: tuple[Classes, ...] = field(default=(Classes.OFF,), metadata={"of": Classes})
    backend: tuple[str, ...] = field(default=(AUTO,), metadata={"of": str})
    rounds: int = 2
    slo_ttft_ms: float = 500.0
    slo_itl_ms: float = 50.0
    timeout: float = 60.0
    format: Format = Format.TEXT
    output: str = ""

    @property
    def hash_tokens(self) -> int:
        """Tokens of the blocks by which prefixes are known."""
        return TRACE_BLOCK_TOKENS // self.shrink if self.trace else self.block_tokens

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults and makes a case, as plain values; paths as other machines may have them."""
        found = {}
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if value != one.default and one.name not in _NO_CASE:
                found[one.name] = plain(value)
        if self.trace:
            found["trace"] = os.path.basename(self.trace)
        if self.nvme:
            found["nvme"] = True
        if self.objects:
            found["objects"] = self.objects.partition("://")[0]
        return found


_NO_CASE = ("schedule", "classes", "backend", "rounds", "timeout", "format", "output", "objects_endpoint")
_OF_POISSON = ("rate", "isl", "osl", "spread", "prefix_share", "prefixes", "block_tokens")
_POSITIVE = (
    "page_size",
    "prefill",
    "decode",
    "pool_requests",
    "requests",
    "isl",
    "osl",
    "prefixes",
    "block_tokens",
    "shrink",
    "rounds",
    "nvme_mib",
)
_RATES = ("rate", "speed", "tflops", "memory_bandwidth", "slo_ttft_ms", "slo_itl_ms", "timeout")
_MOST = 1e12


def make(given: Mapping[str, Any], config_file: str = "") -> Options:
    """Make options of a file's and, before those, of what is `given`; check that they fit together.

    Raises:
        ConfigurationError: something is out of bounds or does not fit.
    """
    chosen = (read_file(config_file, Options, {}) if config_file else {}) | dict(given)
    return check(Options(**chosen), frozenset(chosen))


def check(options: Options, chosen: frozenset[str] = frozenset()) -> Options:
    """Return the options, backends' names as they are written here.

    Raises:
        ConfigurationError: they do not fit together; the message names what is wrong and what is allowed.
    """
    for name in _POSITIVE:
        if getattr(options, name) < 1:
            raise refusal(options, name, "at least 1")
    for name in ("isl", "osl"):
        if getattr(options, name) > MAX_TOKENS // 2:
            raise refusal(options, name, f"at most {MAX_TOKENS // 2}")
    for name in ("layers", "dram_mib", "seed", "parameters"):
        if not 0 <= getattr(options, name) < _MOST:
            raise refusal(options, name, "at least 0")
    for name in _RATES:
        if not 0 < getattr(options, name) <= _MOST:
            raise refusal(options, name, "a positive number")
    for name, most in (("spread", 0.99), ("prefix_share", 1.0), ("batch_share", 1.0)):
        if not 0 <= getattr(options, name) <= most:
            raise refusal(options, name, f"between 0 and {most:g}")
    for name in ("schedule", "classes", "backend"):
        if not getattr(options, name):
            raise refusal(options, name, "at least one")
    _check_arrivals(options, chosen)
    _check_tiers(options, chosen)
    names = []
    for one in dict.fromkeys(options.backend):
        if one.lower() == AUTO:
            names.append(AUTO)
        else:
            names += check_backend(one) or []
    check_format(options.format, options.output)
    return dataclasses.replace(options, backend=tuple(dict.fromkeys(names)))


def _check_arrivals(options: Options, chosen: frozenset[str]) -> None:
    if options.trace:
        for name in _OF_POISSON:
            if name in chosen:
                raise ConfigurationError(f"{flag(name)} is for Poisson arrivals; leave it out, or --trace")
        if TRACE_BLOCK_TOKENS % options.shrink:
            raise refusal(options, "shrink", f"a divisor of {TRACE_BLOCK_TOKENS}, the tokens of a trace's blocks")
    elif "shrink" in chosen:
        raise ConfigurationError("--shrink divides a trace's lengths; leave it out, or give --trace")
    if options.hash_tokens % options.page_size:
        what = f"{options.hash_tokens} tokens of a block ({'--shrink' if options.trace else '--block-tokens'})"
        raise refusal(options, "page_size", f"a divisor of the {what}")


def _check_tiers(options: Options, chosen: frozenset[str]) -> None:
    if options.nvme and not os.path.isdir(options.nvme):
        raise refusal(options, "nvme", "a directory that exists")
    if "nvme_mib" in chosen and not options.nvme:
        raise ConfigurationError("--nvme-mib is the size of --nvme DIRECTORY; give both")
    if options.objects:
        address = parse_store(options.objects, {})
        if address.scheme == "file" and not os.path.isdir(address.bucket):
            raise refusal(options, "objects", "a directory that exists")
        load_backend(SCHEMES[address.scheme])
    if options.objects_endpoint and not options.objects:
        raise ConfigurationError("--objects-endpoint is where --objects URL is; give both")


@dataclass(frozen=True)
class Configuration:
    """What is compared: a schedule with or without classes, by a backend."""

    schedule: Schedule
    classes: Classes
    backend: str

    @property
    def label(self) -> str:
        """Its name: what tells it apart."""
        return f"{self.schedule.value}{' + classes' if self.classes is Classes.ON else ''}, {self.backend}"


def configurations(options: Options) -> list[Configuration]:
    """Return everything that is compared, in the order of its turns."""
    every = itertools.product(dict.fromkeys(options.backend), dict.fromkeys(options.schedule), dict.fromkeys(options.classes))
    return [Configuration(schedule, classed, backend) for backend, schedule, classed in every]


def requests_of(options: Options, turn: int) -> list[Request]:
    """Return the requests of a round: a trace's own, or others in each round.

    Raises:
        ConfigurationError: the trace cannot be read.
    """
    if options.trace:
        found = read_trace(options.trace, options.requests, shrink=options.shrink, speed=options.speed)
    else:
        names = ("isl", "osl", "spread", "block_tokens", "prefix_share", "prefixes")
        values = {name: getattr(options, name) for name in names}
        found = poisson(options.requests, options.rate, **values, seed=options.seed + turn)
    return with_batch(found, options.batch_share, options.seed + turn)


@dataclass(frozen=True)
class Served:
    """A model as it is served here: its cache, its computing, and how large the pools of both sides are."""

    model: Model
    geometry: KVGeometry
    compute: Compute
    prefill_pages: int
    decode_pages: int

    @classmethod
    def of(cls, options: Options, requests: list[Request]) -> Served:
        """Find the model, scale it, and see that all of it fits into memory.

        Raises:
            ConfigurationError: it is not known, cannot be scaled so, or there is too little memory.
        """
        model = find_model(options.model)
        if options.layers > model.layers:
            raise refusal(options, "layers", f"at most {model.layers}, what {model.name} has; 0 is all of them")
        if options.layers:
            model = dataclasses.replace(model, layers=options.layers, windows=())
        geometry = model.geometry(dtype_nbytes(options.dtype or model.dtype or "bfloat16"))
        if geometry.token_nbytes // geometry.layers * options.page_size % WORD:
            raise refusal(options, "page_size", f"such that a page of a layer is a multiple of {WORD} bytes")
        compute = Compute.of(
            model,
            geometry.token_nbytes,
            tflops=options.tflops,
            gb_per_second=options.memory_bandwidth,
            parameters=options.parameters,
            speed=options.speed,
        )
        longest = max(page_count(one.prompt, options.page_size) for one in requests)
        whole = max(page_count(one.prompt + one.answer, options.page_size) for one in requests)
        served = cls(model, geometry, compute, longest * options.pool_requests, whole * options.pool_requests)
        page = geometry.token_nbytes * options.page_size
        pools = page * (options.prefill * served.prefill_pages + options.decode * served.decode_pages)
        advice = "give fewer --layers or --pool-requests, or a " + ("larger --shrink" if options.trace else "smaller --isl")
        check_memory(pools + options.prefill * options.dram_mib * MIB, options.prefill + options.decode, advice)
        block = geometry.token_nbytes * options.hash_tokens
        for name, used in (("dram_mib", options.dram_mib > 0), ("nvme_mib", bool(options.nvme))):
            if used and getattr(options, name) * MIB < block:
                raise refusal(options, name, f"at least {math.ceil(block / MIB)}: a block of {options.hash_tokens} tokens")
        return served
