"""What callers say about tiers and are told: the tiers' options, the outcome for each key, and statistics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nixl_async.errors import ConfigurationError, NixlError

SEGMENT_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class DRAM:
    """Memory of this process: `nbytes` of it, registered with the agent. Least recently used blocks go first.

    `ttl` is the seconds that a block may live (`None`: for ever).
    """

    nbytes: int
    ttl: float | None = None
    name: str = "dram"


@dataclass(frozen=True, slots=True)
class Files:
    """A directory of segment files, up to `nbytes` in all, that several processes of one host use at once.

    `direct` goes past the page cache. `segment_nbytes` is what is allocated at a time; it is fixed when the directory is made.
    The least recently used blocks of all processes go first; `ttl` as of `DRAM`.
    """

    path: str | os.PathLike[str]
    nbytes: int
    ttl: float | None = None
    direct: bool = False
    segment_nbytes: int = SEGMENT_NBYTES
    name: str = "files"


@dataclass(frozen=True, slots=True)
class Objects:
    """A store of objects, one for each block: `url` and `options` as of `Agent.store`; any number of processes and hosts.

    `nbytes` bounds what this process knows to be there, by deleting the least recently used (`None`: no bound); recency is only
    this process's. `listing` lists the store when it is opened; `ask` asks it for keys that this process has not heard of.
    """

    url: str
    nbytes: int | None = None
    ttl: float | None = None
    listing: bool = True
    ask: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = "objects"


TierOptions = DRAM | Files | Objects


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one key: the name of the tier that has or gave it (`None`: no tier did), and the error met, if any.

    True in a condition: a put block is stored as asked, a got block is in the caller's memory. A `get` that another tier could
    serve in spite of an error carries that error and is true all the same.
    """

    tier: str | None = None
    error: NixlError | None = None
    ok: bool = False

    def __bool__(self) -> bool:
        return self.ok


MISS = Outcome()


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Counters of one tier since it was opened; blocks unless the name says bytes. `queued` waits to be written into it."""

    name: str
    blocks: int
    capacity: int | None
    hits: int = 0
    written: int = 0
    nbytes_read: int = 0
    nbytes_written: int = 0
    evictions: int = 0
    corrupt: int = 0
    errors: int = 0
    promoted: int = 0
    queued: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class TiersStatistics:
    """Counters of all tiers, the first tier first: keys got (`hits`), keys that no tier had (`misses`), keys put."""

    tiers: tuple[TierStatistics, ...]
    hits: int
    misses: int
    puts: int

    def __getitem__(self, name: str) -> TierStatistics:
        return next(tier for tier in self.tiers if tier.name == name)


@dataclass(slots=True, eq=False)
class Counters:
    """The counters that a tier keeps; `TierStatistics` is a copy of them."""

    hits: int = 0
    written: int = 0
    nbytes_read: int = 0
    nbytes_written: int = 0
    evictions: int = 0
    corrupt: int = 0
    errors: int = 0
    promoted: int = 0


def check_options(tiers: list[TierOptions], block_nbytes: int) -> None:
    """Refuse tiers that cannot work.

    Raises:
        ConfigurationError: the message says which and why.
    """
    if not isinstance(block_nbytes, int) or block_nbytes < 1:
        raise ConfigurationError(f"block_nbytes is {block_nbytes!r}; it must be a positive number of bytes")
    if not tiers:
        raise ConfigurationError("tiers is empty; give at least one of DRAM, Files, Objects")
    for tier in tiers:
        if not isinstance(tier, DRAM | Files | Objects):
            raise ConfigurationError(f"tier {tier!r} is none of DRAM, Files, Objects")
    names = [tier.name for tier in tiers]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"tiers are called {names}; give each a name of its own: Files(..., name='fast')")
    for at, tier in enumerate(tiers):
        if isinstance(tier, DRAM) and at:
            raise ConfigurationError(f"DRAM is tier {at + 1}; it can only be the first")
        if tier.nbytes is not None and tier.nbytes < block_nbytes:
            raise ConfigurationError(f"tier {tier.name!r} of {tier.nbytes} bytes holds no block of {block_nbytes}")
        if tier.ttl is not None and tier.ttl <= 0:
            raise ConfigurationError(f"ttl of tier {tier.name!r} is {tier.ttl}; it must be positive, or None for no limit")
    for tier in tiers:
        if isinstance(tier, Files) and tier.segment_nbytes < block_nbytes:
            raise ConfigurationError(f"segment_nbytes is {tier.segment_nbytes}; a segment must hold a block of {block_nbytes}")
