"""What `--hicache-storage-backend-extra-config` says, read and checked: tiers, their sizes, and how pages are moved.

Nothing here imports SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from nixl_async.backend import SCHEMES
from nixl_async.errors import ConfigurationError
from nixl_async.tiers import DRAM, Files, Objects

Tier = DRAM | Files | Objects

KINDS: dict[str, type[Tier]] = {"dram": DRAM, "files": Files, "gds": Files, "objects": Objects}
REQUIRED = {"dram": ("nbytes",), "files": ("path", "nbytes"), "gds": ("path", "nbytes"), "objects": ("url",)}
SIZES = frozenset({"nbytes", "segment_nbytes", "queue_nbytes", "bounce_nbytes"})
SGLANGS = frozenset(
    {
        "backend_name",
        "module_path",
        "class_name",
        "interface_v1",
        "prefetch_threshold",
        "prefetch_timeout_base",
        "prefetch_timeout_per_ki_token",
        "hicache_storage_pass_prefix_keys",
        "tp_lcm_size",
    }
)
"""Entries of the same dictionary that are SGLang's own (managers/cache_controller.py, hybrid_cache_controller.py)."""
EXAMPLE = '"tiers": [{"kind": "files", "path": "/nvme/kv", "nbytes": "500Gi", "direct": true}]'
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HiCacheOptions:
    """The options of `HiCacheNixlAsync`, checked; its docstring says what each means. `gds`: one of the tiers is of that kind."""

    tiers: tuple[Tier, ...]
    interface_v1: bool = False
    zero_copy: bool = True
    namespace: str = ""
    durable: bool = False
    timeout: float = 30.0
    checksum: bool = True
    verify: bool = True
    promote: bool = True
    queue_nbytes: int = 256 << 20
    bounce_nbytes: int = 128 << 20
    gds: bool = False

    @property
    def backends(self) -> list[str]:
        """The backends that an agent needs for these tiers and memory of the host."""
        schemes = {tier.url.partition("://")[0] for tier in self.tiers if isinstance(tier, Objects)}
        return ["memory", "posix", *sorted({SCHEMES[scheme] for scheme in schemes})]

    def tiers_for(self, part: str, share: float) -> list[Tier]:
        """Return the tiers for one part of the pages: in a place of its own, with that share of each tier's bytes."""
        made: list[Tier] = []
        for tier in self.tiers:
            nbytes = None if tier.nbytes is None else max(1, int(tier.nbytes * share))
            if isinstance(tier, Files):
                made.append(replace(tier, path=PurePath(tier.path) / part, nbytes=nbytes or 1))
            elif isinstance(tier, Objects):
                made.append(replace(tier, url=f"{tier.url.rstrip('/')}/{part}/", nbytes=nbytes))
            else:
                made.append(replace(tier, nbytes=nbytes or 1))
        return made


def read_options(given: Mapping[str, Any] | None) -> HiCacheOptions:
    """Read the extra config of SGLang's command line; its own entries are passed over.

    Raises:
        ConfigurationError: an entry is unknown, missing, or has a value that means nothing; the message lists what may be there.
    """
    mine = {name: value for name, value in (given or {}).items() if name not in SGLANGS}
    allowed = {one.name for one in fields(HiCacheOptions)} - {"gds", "interface_v1"}
    _refuse_unknown("the extra config", mine, allowed)
    tiers = mine.pop("tiers", None)
    if not isinstance(tiers, list) or not tiers:
        raise ConfigurationError(f"extra config tiers={tiers!r}; it must be a list of one tier or more, such as {EXAMPLE}")
    read = [_read_tier(at, tier) for at, tier in enumerate(tiers)]
    options: dict[str, Any] = {name: _read_value("extra config", name, value) for name, value in mine.items()}
    for name in ("zero_copy", "durable", "checksum", "verify", "promote"):
        if not isinstance(options.get(name, True), bool):
            raise ConfigurationError(f"extra config {name}={options[name]!r}; it must be true or false")
    if not isinstance(options.get("namespace", ""), str):
        raise ConfigurationError(f"extra config namespace={options['namespace']!r}; it must be a string")
    timeout = options.get("timeout", 30.0)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigurationError(f"extra config timeout={timeout!r}; it must be a positive number of seconds")
    if options.get("durable") and all(isinstance(tier, DRAM) for tier in read):
        raise ConfigurationError("extra config durable=true needs a tier of kind files, gds or objects; there is only dram")
    version = (given or {}).get("interface_v1", 0)
    gds = any(tier["kind"] == "gds" for tier in tiers)
    return HiCacheOptions(tuple(read), interface_v1=bool(version), gds=gds, **options)


def read_size(what: str, given: object) -> int:
    """Read a number of bytes: an integer, or a string such as "64Gi", "64GiB" (binary) or "64G", "64GB" (decimal).

    Raises:
        ConfigurationError: it is neither, or not positive.
    """
    found = None
    if isinstance(given, int) and not isinstance(given, bool):
        found = given
    elif isinstance(given, str) and (match := _SIZE.fullmatch(given)):
        number, unit, binary = match.groups()
        found = int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.lower()])
    if found is None or found < 1:
        raise ConfigurationError(
            f'{what}={given!r}; it must be a positive number of bytes, such as 1073741824, "64Gi" or "64G"'
        )
    return found


def _read_tier(at: int, given: object) -> Tier:
    what = f"tier {at + 1} of the extra config"
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{what} is {given!r}; a tier is a dictionary, such as {EXAMPLE}")
    kind = given.get("kind")
    if kind not in KINDS:
        raise ConfigurationError(f"{what}: kind={kind!r}; it must be one of {', '.join(sorted(KINDS))}")
    entries = {name: value for name, value in given.items() if name != "kind"}
    allowed = {one.name for one in fields(KINDS[kind])} - ({"direct"} if kind == "gds" else set())
    _refuse_unknown(f"{what}, {kind},", entries, allowed)
    for name in REQUIRED[kind]:
        if name not in entries:
            raise ConfigurationError(f"{what}, {kind}, lacks {name}; it needs {', '.join(REQUIRED[kind])}")
    options: dict[str, Any] = {name: _read_value(what, name, value) for name, value in entries.items()}
    for name, wanted in (("path", str), ("url", str), ("name", str), ("options", dict), ("direct", bool)):
        if name in options and not isinstance(options[name], wanted):
            raise ConfigurationError(f"{what}: {name}={options[name]!r}; it must be a {wanted.__name__}")
    for name in ("listing", "ask"):
        if not isinstance(options.get(name, True), bool):
            raise ConfigurationError(f"{what}: {name}={options[name]!r}; it must be true or false")
    ttl = options.get("ttl")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not ttl > 0):
        raise ConfigurationError(f"{what}: ttl={ttl!r}; it must be a positive number of seconds")
    if "url" in options and options["url"].partition("://")[0] not in SCHEMES:
        schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigurationError(f"{what}: url={options['url']!r}; it must begin with one of {schemes}")
    if kind == "gds":
        options["direct"] = True
    return KINDS[kind](**options)


def _read_value(what: str, name: str, value: object) -> object:
    return read_size(f"{what}: {name}", value) if name in SIZES and value is not None else value


def _refuse_unknown(what: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(map(str, given)) - allowed)
    if unknown:
        raise ConfigurationError(f"{what} has {', '.join(unknown)}; it may have {', '.join(sorted(allowed))}")
