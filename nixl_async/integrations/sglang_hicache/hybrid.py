"""How far a prefix can be restored where a model keeps several things of each page, and of some pages more than of others."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer, PoolTransferResult

from nixl_async.integrations.sglang_hicache.pool import PoolStore, together


async def restorable(
    anchor: PoolStore, hashes: list[bytes], transfers: Sequence[PoolTransfer], stores: Sequence[PoolStore]
) -> PoolTransferResult:
    """Tell which of the prefixes of these pages can be restored with what each transfer's pool, in its store, must have for it.

    A pool of policy "all_pages" must have every page of the prefix; one of "trailing_pages" the last ones, as many as its transfer
    has keys (one, if it has none). The result also tells the longest prefix of each pool alone.
    """
    n_kv = await anchor.prefix(hashes)
    mine = hashes[:n_kv]
    found = await together([_lengths(transfer, store, mine) for transfer, store in zip(transfers, stores, strict=True)])
    hits: dict[str, int] = {PoolName.KV: n_kv} if n_kv else {}
    hits |= {transfer.name: max(lengths) for transfer, lengths in zip(transfers, found, strict=True) if lengths}
    of_all = set(range(1, n_kv + 1)).intersection(*found)
    return PoolTransferResult(max(of_all, default=0), hits, sorted(of_all))


async def _lengths(transfer: PoolTransfer, store: PoolStore, hashes: list[bytes]) -> set[int]:
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, await store.prefix(hashes) + 1))
    window = max(1, len(transfer.keys or ()))
    run, found = 0, set()
    for length, here in enumerate(await store.exists(hashes), 1):
        run = run + 1 if here else 0
        if run >= min(window, length):
            found.add(length)
    return found
