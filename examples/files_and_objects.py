"""Write pages of registered memory to a file and to many objects, and read them back in another order.

python examples/files_and_objects.py                                   # the objects are files in a temporary directory
python examples/files_and_objects.py --url s3://bucket/prefix          # AWS_ACCESS_KEY_ID and so on are read as usual
python examples/files_and_objects.py --url s3://bucket/prefix --endpoint http://host:9000
"""

import argparse
import asyncio
import sys
import tempfile

import numpy as np

from nixl_async import Agent, NixlError, PartsFailed

PAGE, N = 65_536, 64


async def main(url: str, options: dict[str, str], directory: str) -> None:
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
        store = await agent.store(url, **options)
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="a store: s3://BUCKET/PREFIX, az://..., gs://..., file://...")
    parser.add_argument("--endpoint", help="the URL of an S3 server that is not Amazon's")
    given = parser.parse_args()
    options = {"endpoint_url": given.endpoint, "addressing": "path"} if given.endpoint else {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            asyncio.run(main(given.url or f"file://{scratch}/store", options, scratch))
        except NixlError as error:
            sys.exit(f"{type(error).__name__}: {error}")
