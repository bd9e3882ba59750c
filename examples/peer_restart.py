"""A decode worker dies and comes back under its name; the prefill side goes on without a restart of its own.

Run it: `python examples/peer_restart.py`.
"""

import asyncio

import numpy as np

from nixl_async import Agent, PeerLost


async def worker(memory: np.ndarray, port: int, ready: asyncio.Future[int], stop: asyncio.Event) -> None:
    async with Agent("decode", token="secret") as agent:
        await agent.register(memory, name="kv")
        _, port = await agent.serve("127.0.0.1", port)
        ready.set_result(port)
        await stop.wait()


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with Agent("prefill", token="secret") as prefill:
        source = await prefill.register(np.ones(1 << 20, np.uint8))
        events = prefill.membership()
        port = 0
        for life in range(2):
            memory, ready, stop = np.zeros(1 << 20, np.uint8), loop.create_future(), asyncio.Event()
            task = asyncio.create_task(worker(memory, port, ready, stop))
            port = await ready
            peer = await prefill.connect(f"127.0.0.1:{port}")
            print("joined again" if life else "joined", (await anext(events)).kind)
            kv = peer.region("kv")
            await prefill.transfer(source, kv)
            assert memory.all()
            stop.set()
            await task
            print(await anext(events))
            try:
                await prefill.transfer(source, kv)
            except PeerLost as error:
                print(f"as expected: {error}")


if __name__ == "__main__":
    asyncio.run(main())
