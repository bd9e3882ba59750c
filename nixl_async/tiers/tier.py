"""What a tier below the first must do; one class for files, one for objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from nixl_async.errors import NixlError
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.options import Counters, TierStatistics

if TYPE_CHECKING:
    from collections.abc import Container

Failures = list[NixlError | None]
"""An error, or `None`, for each block in order."""


class Miss(NixlError):
    """Say that a block is not there, or is no longer what the index said: not an error to a caller."""


MISSING = Miss("the block is not there")


class LowerTier(ABC):
    """Keeps blocks under keys. All methods are called on the loop; memory they are given is quiet when they return or raise."""

    name: str
    capacity: int | None
    """The blocks it may hold, `None` if there is no bound."""

    def __init__(self) -> None:
        self.counters = Counters()

    @property
    @abstractmethod
    def known(self) -> Container[bytes]:
        """The keys that are here as far as this process knows; for `in`, which costs a fraction of a microsecond."""

    @abstractmethod
    def keys(self) -> Iterable[bytes]:
        """Return the keys of all blocks, those that outlived their time among them; valid until the loop does other work."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many blocks are known."""

    @abstractmethod
    async def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell which keys are here, also those that other processes brought."""

    @abstractmethod
    async def read(self, keys: Sequence[bytes], blocks: Blocks) -> Failures:
        """Read blocks into memory, verified; `MISSING` for those that are not there, after which the memory is undefined."""

    @abstractmethod
    async def write(self, keys: Sequence[bytes], blocks: Blocks, *, durable: bool) -> Failures:
        """Store blocks; `durable`: return when they would survive the end of the machine."""

    @abstractmethod
    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks."""

    @abstractmethod
    async def sweep(self) -> None:
        """Forget what has outlived its time to live, and what is too much."""

    @abstractmethod
    async def aclose(self) -> None:
        """Finish what was begun and release everything."""

    def statistics(self, *, queued: int = 0, dropped: int = 0) -> TierStatistics:
        """Return the counters."""
        return TierStatistics(self.name, len(self), self.capacity, queued=queued, dropped=dropped, **asdict(self.counters))
