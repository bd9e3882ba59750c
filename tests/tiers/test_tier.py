"""What all lower tiers share."""

from __future__ import annotations

from nixl_async import NixlError
from nixl_async.tiers import TierStatistics
from nixl_async.tiers.tier import MISSING, LowerTier, Miss


class _Nothing(LowerTier):
    name = "nothing"
    capacity = 5
    known = frozenset()  # type: ignore[assignment]

    def keys(self):  # type: ignore[no-untyped-def]
        return []

    def __len__(self) -> int:
        return 3

    async def find(self, keys):  # type: ignore[no-untyped-def]
        return []

    async def read(self, keys, blocks):  # type: ignore[no-untyped-def]
        return []

    async def write(self, keys, blocks, *, durable):  # type: ignore[no-untyped-def]
        return []

    async def delete(self, keys):  # type: ignore[no-untyped-def]
        pass

    async def sweep(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


def test_statistics_are_a_copy() -> None:
    tier = _Nothing()
    tier.counters.hits = 4
    taken = tier.statistics(queued=2)
    tier.counters.hits = 9
    assert taken == TierStatistics("nothing", 3, 5, hits=4, queued=2)


def test_a_miss_is_no_error_of_the_world() -> None:
    assert isinstance(MISSING, Miss)
    assert isinstance(MISSING, NixlError)
