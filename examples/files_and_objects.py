"""Write pages of registered memory to a file and to many objects, and read them back in another order."""

import asyncio
import sys
import tempfile

import numpy as np

from nixl_async import Agent, PartsFailed

PAGE, N = 65_536, 64


async def main(url: str, directory: str) -> None:
    """Use the store at `url`, and a file in `directory`."""
    kv, back = np.random.default_rng(0).integers(0, 255, N * PAGE, np.uint8), np.zeros(N * PAGE, np.uint8)
    async with Agent("offload") as agent:
        source, target = await agent.register(kv), await agent.register(back)
        order = np.random.permutation(N)

        # A file gets its name when it is whole and on the device.
        async with agent.file(f"{directory}/kv.bin", "w", nbytes=kv.nbytes, publish=True, fsync=True) as file:
            print(await agent.transfer(source.pages(order, PAGE), file[:]))
        async with agent.file(f"{directory}/kv.bin") as file:
            await agent.transfer(file[:], target.pages(order, PAGE))
            assert (back == kv).all()
            print(agent.explain(file, target))

        # Many objects in one transfer; each tells when it is there, or why it is not.
        store = await agent.store(url)
        keys = [f"block-{i:03d}" for i in order]
        await agent.transfer(source.pages(order, PAGE), store.objects(keys, PAGE))
        await store.delete(keys[:2])
        transfer = agent.submit(store.objects(keys, PAGE), target.pages(order, PAGE))
        failed = [keys[part.index] async for part in transfer.parts() if part.error is not None]
        try:
            await transfer
        except PartsFailed as error:
            print(error, sorted(failed) == sorted(keys[:2]))
        print(sum(await store.exists(keys)), "of", N, "are there:", [found.key async for found in store.list()][:2], "…")
        await store.delete(keys)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else f"file://{scratch}/store", scratch))
