"""Exchange metadata by your own means: etcd, a router, a file. Each side needs the other's blob only once.

Run it: `python examples/out_of_band.py`.
"""

import asyncio

import numpy as np

from nixl_async import Agent


async def main() -> None:
    async with Agent("prefill", token="secret") as prefill, Agent("decode", token="secret") as decode:
        target = np.zeros(1 << 20, np.uint8)
        await decode.register(target, name="kv")
        await decode.serve("127.0.0.1", 0)
        blob = decode.metadata()

        # Here the blob travels. A stock NIXL agent loads the same one with add_remote_agent, and sends its own back.
        peer = await prefill.add_peer(blob)
        source = await prefill.register(np.ones(1 << 20, np.uint8))
        print(prefill.explain(source, peer.region("kv")))
        await prefill.transfer(source, peer.region("kv"))
        assert target.all()
        print(f"met through {len(blob)} bytes of metadata")


if __name__ == "__main__":
    asyncio.run(main())
