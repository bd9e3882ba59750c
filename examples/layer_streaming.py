"""Two prefill ranks push a request into one decode rank, layer by layer while it is computed; another request is pulled.

    python examples/layer_streaming.py

The heads that each prefill rank has are half of those of the decode rank: a plan says which slices go where. Compute is a
`CPUStream` here; a CUDA stream of cupy or torch takes its place unchanged.
"""

import asyncio

import numpy as np

from nixl_async import Agent, CPUStream, KVGeometry, LayerPlan, MemoryRegion, Pair, Peer, RemoteRegion, Sharding, plan_pairs

GEOMETRY = KVGeometry(layers=8, heads=4, head_dim=64)
PREFILL, DECODE = Sharding(tp=2, page_tokens=16), Sharding(tp=1, page_tokens=32)
TOKENS = 256
PREFILL_BLOCKS, DECODE_BLOCKS = np.random.permutation(16), np.random.permutation(8)
POOL_NBYTES = GEOMETRY.layers * GEOMETRY.kv * TOKENS * GEOMETRY.heads * GEOMETRY.row_nbytes


def plan(request: str, pair: Pair, src: MemoryRegion | RemoteRegion, dst: MemoryRegion | RemoteRegion) -> LayerPlan:
    return LayerPlan(request, pair.by_layer(src, PREFILL_BLOCKS, dst, DECODE_BLOCKS, TOKENS))


async def push(agent: Agent, pool: np.ndarray, kv: MemoryRegion, peer: Peer, pair: Pair) -> None:
    layers = pool.reshape(GEOMETRY.layers, -1)
    with CPUStream() as compute:
        async with agent.push(peer, plan("request 1", pair, kv, peer.region("kv"))) as pushed:
            for layer in range(GEOMETRY.layers):
                compute.launch(layers[layer].fill, layer + 1)
                pushed.ready(layer, after=compute)


async def main() -> None:
    pairs = plan_pairs(GEOMETRY, PREFILL, DECODE)
    pool, parts = np.zeros(POOL_NBYTES, np.uint8), [np.zeros(POOL_NBYTES // 2, np.uint8) for _ in range(2)]
    async with (
        Agent("prefill-0", token="secret") as first,
        Agent("prefill-1", token="secret") as second,
        Agent("decode", token="secret") as decode,
    ):
        address = await decode.serve("127.0.0.1", 0)
        kv = await decode.register(pool, name="kv")
        ranks = [(agent, await agent.register(part, name="kv")) for agent, part in zip((first, second), parts, strict=True)]
        peers = [await agent.connect(address) for agent, _ in ranks]

        async with asyncio.TaskGroup() as group:
            for (agent, region), part, peer, pair in zip(ranks, parts, peers, pairs, strict=True):
                group.create_task(push(agent, part, region, peer, pair))
            async with (
                decode.incoming("request 1", peer="prefill-0") as one,
                decode.incoming("request 1", peer="prefill-1") as other,
            ):
                theirs = other.layers()
                async for layer in one.layers():
                    # The layer is complete when it has come from both ranks.
                    assert layer == await anext(theirs)
                    print(f"layer {layer} arrived, all of it: {(pool.reshape(GEOMETRY.layers, -1)[layer] == layer + 1).all()}")

        # The other way: decode reads what prefill-1 offers.
        pool[:] = 0
        source = (await decode.wait_peer("prefill-1")).region("kv")
        async with second.offer("decode", "request 2", GEOMETRY.layers) as offer:
            offer.ready(*range(GEOMETRY.layers))
            pulled = [layer async for layer in decode.pull("prefill-1", plan("request 2", pairs[1], source, kv))]
        print(f"pulled {len(pulled)} layers, {np.count_nonzero(pool)} of {POOL_NBYTES} bytes: the heads of one rank")


if __name__ == "__main__":
    asyncio.run(main())
