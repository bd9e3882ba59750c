"""Layer by layer: each layer's bytes, then the notification that they are there; two consumers, each with its own prefix.

Run it: `python examples/notifications.py`.
"""

import asyncio

import numpy as np

from nixl_async import Agent

LAYERS, PAGES, PAGE = 4, 64, 16384


async def decode(agent: Agent, pool: np.ndarray) -> None:
    arrivals = agent.notifications(peer="prefill", prefix=b"layer")
    for _ in range(LAYERS):
        notification = await anext(arrivals)
        layer = int(notification.payload.split()[1])
        assert (pool[layer] == layer + 1).all()
        print(f"layer {layer} is complete")
    await agent.notify("prefill", b"done")


async def main() -> None:
    pool = np.zeros((LAYERS, PAGES, PAGE), np.uint8)
    cache = np.zeros((LAYERS, PAGES, PAGE), np.uint8)
    async with Agent("prefill", token="secret") as prefill, Agent("decode", token="secret") as other:
        mine = await prefill.register(cache)
        await other.register(pool, name="kv")
        theirs = (await prefill.connect(await other.serve())).region("kv")
        answers = prefill.notifications(prefix=b"done")
        async with asyncio.TaskGroup() as group:
            group.create_task(decode(other, pool))
            for layer in range(LAYERS):
                cache[layer] = layer + 1
                pages = np.arange(layer * PAGES, (layer + 1) * PAGES)
                sides = mine.pages(pages, PAGE), theirs.pages(pages, PAGE)
                await prefill.transfer(*sides, notify=b"layer %d" % layer)
        await anext(answers)


if __name__ == "__main__":
    asyncio.run(main())
