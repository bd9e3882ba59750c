"""What LMCache's configuration says about this library: where chunks are kept, and how long anything may take.

The L2 adapter reads it from `adapter_params`, the storage plug-in from `extra_config`; both take the same parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nixl_async import ConfigurationError
from nixl_async.tiers import DRAM, Files, Objects

Tier = DRAM | Files | Objects
TIERS: dict[str, type[Tier]] = {"dram": DRAM, "files": Files, "objects": Objects}
GIB = 1 << 30

PARAMETERS = """\
- url (str): where each chunk is an object of its own: file:///directory, s3://bucket/prefix, az://container/prefix or
    gs://bucket/prefix. Either this or tiers is required.
- options (dict): the store's options, as of nixl_async's Agent.store: endpoint_url, access_key, direct, fsync, ...
- tiers (list): the fastest first, each a dict with "type": "dram" (nbytes, ttl), "files" (path, nbytes, direct, ttl,
    segment_nbytes) or "objects" (url, options, nbytes, listing, ask, ttl), and a "name" where a type comes twice.
- block_nbytes (int): tiers keep blocks of this size (required with them); best is one that divides the chunks' size.
- durable (bool): a store into tiers is complete when it survives a power failure (default false).
- max_capacity_gb (float): the GiB that LMCache's eviction keeps the url within (default 0: no bound). Tiers have nbytes instead.
- lookup_seconds (float): how long a lookup may take before it counts as a miss (default 5).
- transfer_seconds (float): how long up to 256 MiB may take before they count as failed (default 60).
- close_seconds (float): how long closing may go on writing what is queued (default 30).
- failures (int): after so many failures in a row, lookups miss and stores fail at once (default 3) ...
- retry_seconds (float): ... until so much time has passed and another attempt is made (default 10).
"""


@dataclass(frozen=True, slots=True)
class ChunkOptions:
    """Where chunks are kept: in a store at `url`, each whole, or in `tiers`, cut into blocks of `block_nbytes`."""

    url: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tiers: tuple[Tier, ...] = ()
    block_nbytes: int = 0
    durable: bool = False
    max_capacity_gb: float = 0.0
    lookup_seconds: float = 5.0
    transfer_seconds: float = 60.0
    close_seconds: float = 30.0
    failures: int = 3
    retry_seconds: float = 10.0

    @property
    def capacity_nbytes(self) -> int:
        """The bytes that may be kept, 0 for no bound."""
        return int(self.max_capacity_gb * GIB)

    def __str__(self) -> str:
        if self.url:
            return self.url
        return f"tiers {', '.join(tier.name for tier in self.tiers)} of {self.block_nbytes}-byte blocks"


def read_options(given: Mapping[str, Any], where: str) -> ChunkOptions:
    """Check the parameters that `where` gives, and return them.

    Raises:
        ConfigurationError: (a `ValueError`) one is unknown, missing, or not what it must be.
    """
    known = [one.name for one in dataclasses.fields(ChunkOptions)]
    for name in given:
        if name not in known:
            raise ConfigurationError(f"{where}: there is no parameter {name!r}; known are {', '.join(known)}")
    values = dict(given)
    _check(where, values, "url", str, lambda one: "://" in one, "a URL such as file:///nvme/kv or s3://bucket/kv")
    _check(
        where, values, "options", dict, lambda one: all(isinstance(name, str) for name in one), "a dict of the store's options"
    )
    _check(where, values, "tiers", list, bool, "a list of at least one dict")
    _check(where, values, "block_nbytes", int, lambda one: one > 0, "a positive number of bytes")
    _check(where, values, "durable", bool, lambda one: True, "true or false")
    _check(where, values, "max_capacity_gb", float, lambda one: one >= 0, "a number of GiB, 0 for no bound")
    for name in ("lookup_seconds", "transfer_seconds", "close_seconds", "retry_seconds"):
        _check(where, values, name, float, lambda one: one > 0, "a positive number of seconds")
    _check(where, values, "failures", int, lambda one: one > 0, "a positive number")
    if ("url" in values) == ("tiers" in values):
        raise ConfigurationError(f"{where}: give either url or tiers, and not both")
    if "options" in values:
        values["options"] = _frozen(values["options"])
    only = ("block_nbytes", "durable") if "url" in values else ("options", "max_capacity_gb")
    for name in only:
        if name in values:
            raise ConfigurationError(
                f"{where}: {name} has no meaning with {'url' if 'url' in values else 'tiers'}; leave it out"
            )
    if "tiers" in values:
        if "block_nbytes" not in values:
            raise ConfigurationError(f"{where}: block_nbytes is missing; tiers need it")
        values["tiers"] = tuple(_tier(f"{where}: tier {at}", one) for at, one in enumerate(values["tiers"], 1))
    return ChunkOptions(**values)


def _check(where: str, values: dict[str, Any], name: str, kind: type, allowed: Any, must: str) -> None:
    if name not in values:
        return
    value = values[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = values[name] = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)) or not allowed(value):
        raise ConfigurationError(f"{where}: {name} is {value!r}; it must be {must}")


def _tier(where: str, given: object) -> Tier:
    if not isinstance(given, dict) or given.get("type") not in TIERS:
        raise ConfigurationError(f'{where} is {given!r}; it must be a dict with "type": one of {", ".join(TIERS)}')
    values = {name: value for name, value in given.items() if name != "type"}
    kind = TIERS[given["type"]]
    fields = {one.name: one for one in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigurationError(f"{where} has no parameter {name!r}; known are {', '.join(fields)}")
    for name, one in fields.items():
        if name not in values and one.default is one.default_factory is dataclasses.MISSING:
            raise ConfigurationError(f"{where} needs {name}")
    _check(where, values, "nbytes", int, lambda one: one > 0, "a positive number of bytes")
    _check(where, values, "segment_nbytes", int, lambda one: one > 0, "a positive number of bytes")
    _check(where, values, "ttl", float, lambda one: one > 0, "a positive number of seconds")
    for name in ("path", "url", "name"):
        _check(where, values, name, str, bool, "a string that is not empty")
    for name in ("direct", "listing", "ask"):
        _check(where, values, name, bool, lambda one: True, "true or false")
    _check(where, values, "options", dict, lambda one: True, "a dict of the store's options")
    if "options" in values:
        values["options"] = _frozen(values["options"])
    return kind(**values)


def _frozen(options: dict[str, Any]) -> dict[str, Any]:
    """Make JSON's lists what can be hashed."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
