"""The program of with_nixl.py with nixl_async's own API, step by step: completions and notifications are awaited, not polled.

    python with_nixl_async.py sender|receiver       # `python examples/migrate_from_nixl` starts both and carries the metadata

Its peer may be a stock NIXL agent, the drop-in, or this program.
"""

import argparse
import asyncio
import sys

import numpy as np

from nixl_async import Agent

BLOCKS, PAGE = 64, 16_384
MINE, THEIRS = np.random.default_rng(1).permutation(BLOCKS), np.random.default_rng(2).permutation(BLOCKS)


async def sender(agent, peer, pool, region):
    arrivals = agent.notifications(peer=peer.name)
    # 5. What goes where: pages of a region, numpy arrays on each side.
    local = region.pages(MINE, PAGE)
    remote = next(iter(peer.regions.values())).pages(THEIRS, PAGE)
    sent = np.random.default_rng(3).integers(0, 256, (BLOCKS, PAGE), np.uint8)
    pool[:] = sent
    # 6. Write, and tell the peer when it is there.
    await agent.transfer(local, remote, notify=b"written")
    # 7. Wait for an answer.
    assert (await anext(arrivals)).payload == b"checked"
    # 8. Read.
    pool[:] = 0
    await agent.transfer(remote, local)
    assert (pool == sent).all()


async def receiver(agent, peer, pool):
    assert (await anext(agent.notifications(peer=peer.name))).payload == b"written"
    expected = np.random.default_rng(3).integers(0, 256, (BLOCKS, PAGE), np.uint8)
    assert (pool[THEIRS] == expected[MINE]).all()
    await agent.notify(peer, b"checked")
    # The memory must stay until the sender has read it: it says so by ending, which ends our standard input.
    await asyncio.to_thread(sys.stdin.read)


async def main(role):
    # 1. An agent. 9. Its end: memory and peers end with it.
    async with Agent(role) as agent:
        # 2. Memory.
        pool = np.zeros((BLOCKS, PAGE), np.uint8)
        region = await agent.register(pool, name="kv")
        # 3. Metadata, which travels by the program's own means. (With `serve` and `connect`, or `discovery`, there is no need.)
        await agent.serve("127.0.0.1")
        print("metadata", agent.metadata().hex(), pool.ctypes.data, flush=True)
        metadata, _ = (await asyncio.to_thread(sys.stdin.readline)).split()
        # 4. The peer.
        peer = await agent.add_peer(bytes.fromhex(metadata))
        if role == "sender":
            await sender(agent, peer, pool, region)
        else:
            await receiver(agent, peer, pool)
    print(f"{role} with nixl_async's API: every byte checked", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("role", choices=["sender", "receiver"])
    asyncio.run(main(parser.parse_args().role))
