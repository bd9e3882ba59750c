"""Keep KV blocks in memory, on NVMe and in object stores: `Tiers`, a store of content-addressed blocks over a list of tiers.

    async with Tiers(agent, [DRAM(8 << 30), Files("/nvme/kv", 1 << 40), Objects("s3://bucket/kv")], block_nbytes=65536) as tiers:
        keys = hash_tokens(tokens, 16, salt=b"llama-3.1-8b")
        n = await tiers.prefix(keys)
        await tiers.get(keys[:n], region.pages(table[:n], 65536))
        await tiers.put(keys[n:], region.pages(table[n:], 65536))

It moves bytes by `Agent.transfer`, except between memory and files in the page cache: those are copied and summed up in one go.
"""

from nixl_async.tiers.keys import hash_tokens
from nixl_async.tiers.options import DRAM, Files, Objects, Outcome, TiersStatistics, TierStatistics
from nixl_async.tiers.store import Tiers

__all__ = ["DRAM", "Files", "Objects", "Outcome", "TierStatistics", "Tiers", "TiersStatistics", "hash_tokens"]
