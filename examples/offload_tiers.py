"""A KV cache goes from memory to NVMe and on to an object store; another process reads it from there and checks every byte.

    python examples/offload_tiers.py                                       # the objects are files in a temporary directory
    AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \
        python examples/offload_tiers.py --url s3://bucket/demo            # Amazon's; --endpoint http://host:9000 for another

Blocks are in DRAM when `put` returns. They sink to the tiers below by themselves, and whoever has the same tokens finds them there.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TransferSpeedColumn

from nixl_async import Agent, NixlError
from nixl_async.tiers import DRAM, Files, Objects, Tiers, hash_tokens

BLOCK_TOKENS = 16
BLOCK = 2 << 20
"""Bytes of 16 tokens of Llama-3.1-8B: keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes."""
AT_ONCE = 16


def block_bytes(number: int) -> np.ndarray:
    """Return what the model computed for a block; both processes know it, so that every byte can be checked."""
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
                print(json.dumps({"checked": part.stop}), flush=True)


async def read_elsewhere(n_tokens: int, store: Objects, bars: Progress) -> int:
    """Start the other process; return how many blocks it checked."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, __file__, "--read", stdin=pipe, stdout=pipe)
    # Not as an argument, which every user of the machine could see: there are credentials in it.
    where = {"url": store.url, "options": dict(store.options), "name": store.name}
    child.stdin.write(json.dumps({"n_tokens": n_tokens, "store": where}).encode())
    child.stdin.close()
    task = bars.add_task("checked by another process", total=n_tokens // BLOCK_TOKENS * BLOCK)
    checked = 0
    async for line in child.stdout:
        checked = json.loads(line)["checked"]
        bars.update(task, completed=checked * BLOCK)
    if status := await child.wait():
        raise SystemExit(f"the other process ended with {status}")
    return checked


async def main(given: argparse.Namespace) -> None:
    keys = keys_of(given.tokens)
    console = Console(stderr=True)
    columns = TextColumn("{task.description:>26}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TransferSpeedColumn()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offload-", dir=given.directory)))
        options = {"endpoint_url": given.endpoint, "addressing": "path"} if given.endpoint else {}
        (directory / "objects").mkdir()
        store = Objects(given.url or f"file://{directory}/objects", options=options, name="objects")
        print(f"objects: {store.url}", flush=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            start = time.perf_counter()
            await offload(keys, directory / "nvme", store, bars)
            checked = await read_elsewhere(given.tokens, store, bars)
        seconds = time.perf_counter() - start
        if checked != len(keys):
            raise SystemExit(f"the other process found {checked} of {len(keys)} blocks")
        print(f"another process read {checked} blocks from {store.name}, every byte checked; {seconds:.1f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", help="a store: s3://BUCKET/PREFIX, az://..., gs://..., file://...")
    parser.add_argument("--endpoint", help="the URL of an S3 server that is not Amazon's")
    parser.add_argument("--directory", help="a directory on NVMe (default: the system's for temporary files)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the demo's prompt")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens < BLOCK_TOKENS:
        parser.error(f"--tokens is {arguments.tokens}; a block has {BLOCK_TOKENS} tokens")
    try:
        asyncio.run(read(json.load(sys.stdin)) if arguments.read else main(arguments))
    except (NixlError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
