"""The smallest transfer: one agent writes a page into another agent's memory.

Run it: `python examples/hello.py`.
"""

import asyncio

import numpy as np

from nixl_async import Agent


async def main() -> None:
    async with Agent("a", token="secret") as a, Agent("b", token="secret") as b:
        page = np.arange(4096, dtype=np.uint8)
        pool = np.zeros((16, 4096), np.uint8)
        source = await a.register(page)
        await b.register(pool, name="pool")

        peer = await a.connect(await b.serve())
        result = await a.transfer(source, peer.region("pool").pages([7], 4096))

        assert (pool[7] == page).all()
        print(f"the page is there: {result.nbytes} bytes by {result.route}")


if __name__ == "__main__":
    asyncio.run(main())
