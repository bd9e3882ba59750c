"""Two KV pools of different layouts: SGLang's [layers, 2, blocks, page] and vLLM's [blocks, layers, 2, page].

    python examples/block_tables.py

`BlockLayout` lists the pages of both in one order, so that one call moves a request's blocks whatever the pools look like.
"""

import asyncio

import numpy as np

from nixl_async import Agent, BlockLayout

LAYERS, BLOCKS, PAGE = 8, 128, 4096


async def main() -> None:
    random = np.random.default_rng(0)
    by_layer = random.integers(0, 256, (LAYERS, 2, BLOCKS, PAGE), dtype=np.uint8)
    by_block = np.zeros((BLOCKS, LAYERS, 2, PAGE), np.uint8)
    ours = BlockLayout(("layer", "kv", "block"), (LAYERS, 2, BLOCKS), PAGE)
    theirs = BlockLayout(("block", "layer", "kv"), (BLOCKS, LAYERS, 2), PAGE)

    async with Agent("prefill", token="secret") as prefill, Agent("decode", token="secret") as decode:
        source = await prefill.register(by_layer)
        await decode.register(by_block, name="kv")
        remote = (await prefill.connect(await decode.serve())).region("kv")

        table, remote_table = random.permutation(BLOCKS)[:40], random.permutation(BLOCKS)[:40]
        step = await prefill.prepare(ours.pages(source, block=table), theirs.pages(remote, block=remote_table))
        result = await step.transfer()

        for mine, other in zip(table, remote_table, strict=True):
            assert (by_layer[:, :, mine] == by_block[other]).all()
        print(f"every block is in its place: {result.nbytes} bytes by {result.route}")


if __name__ == "__main__":
    asyncio.run(main())
