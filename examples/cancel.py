"""Give up on a transfer: when the `except` is reached, the memory of both sides may be reused at once.

Run it: `python examples/cancel.py`.
"""

import asyncio

import numpy as np

from nixl_async import Agent


async def main() -> None:
    async with Agent("a", token="secret") as a, Agent("b", token="secret", backends=["tcp"]) as b:
        mine = np.ones(256 << 20, np.uint8)
        theirs = np.zeros(256 << 20, np.uint8)
        source = await a.register(mine)
        await b.register(theirs, name="kv")
        peer = await a.connect(await b.serve())

        try:
            async with asyncio.timeout(0.005):
                await a.transfer(source, peer.region("kv"))
        except TimeoutError:
            arrived = int(theirs.sum())
            mine[:] = 2
            await asyncio.sleep(0.05)
            assert int(theirs.sum()) == arrived
            print(f"cancelled after {arrived} bytes, and nothing moves any more")


if __name__ == "__main__":
    asyncio.run(main())
