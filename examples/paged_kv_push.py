"""A prefill process pushes the KV pages of requests into a decode process, which said which of its blocks are free for them.

    python examples/paged_kv_push.py

Both pools are registered once. A request is two block tables: what the decode process sends with its request, and where the prefill
process has computed the pages. One `transfer` moves all of them, in any order, and its notification arrives when the bytes are in
place: the decode process never polls, and reads a page only when it is whole.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE

import numpy as np

from nixl_async import Agent

LAYERS, BLOCKS, PAGE = 16, 256, 8192
N_REQUESTS, MOST_BLOCKS = 8, 40


def pages_of(table: list[int] | np.ndarray) -> np.ndarray:
    """Return the page numbers of a request's blocks in a pool of [LAYERS, BLOCKS, PAGE] bytes: every block in every layer."""
    return (np.arange(LAYERS)[:, None] * BLOCKS + np.array(table)).ravel()


def computed(request: int, n_blocks: int) -> np.ndarray:
    """Return what the model computes for a request; both processes know it, so that every byte can be checked."""
    return np.random.default_rng(request).integers(0, 256, (LAYERS, n_blocks, PAGE), np.uint8)


async def prefill() -> None:
    """Compute what is asked for, and push it to whoever asked."""
    pool = np.zeros((LAYERS, BLOCKS, PAGE), np.uint8)
    async with Agent("prefill", token="secret") as agent:
        kv = await agent.register(pool, name="kv")
        asked = agent.notifications(prefix=b"{")
        print(*await agent.serve("127.0.0.1", 0), flush=True)
        for _ in range(N_REQUESTS):
            question = await anext(asked)
            request, theirs = json.loads(question.payload).values()
            mine = np.random.permutation(BLOCKS)[: len(theirs)]
            pool[:, mine] = computed(request, len(theirs))

            peer = agent.peers[question.peer]
            src, dst = kv.pages(pages_of(mine), PAGE), peer.region("kv").pages(pages_of(theirs), PAGE)
            await agent.transfer(src, dst, notify=b"done %d" % request)


async def decode(host: str, port: int) -> None:
    """Take blocks for each request, ask for it, and use it once it is there."""
    pool, free = np.zeros((LAYERS, BLOCKS, PAGE), np.uint8), list(np.random.permutation(BLOCKS))
    async with Agent("decode", token="secret") as agent:
        await agent.register(pool, name="kv")
        peer = await agent.connect((host, port))
        arrivals = agent.notifications(peer="prefill", prefix=b"done")
        for request in range(N_REQUESTS):
            n_blocks = int(np.random.randint(1, MOST_BLOCKS))
            table, free = [int(block) for block in free[:n_blocks]], free[n_blocks:]
            await agent.notify(peer, json.dumps({"request": request, "blocks": table}).encode())

            assert (await anext(arrivals)).payload == b"done %d" % request
            assert (pool[:, table] == computed(request, n_blocks)).all()
            print(f"request {request}: {n_blocks} blocks in {LAYERS} layers, every byte checked", flush=True)
            free += table


async def main() -> None:
    other = await asyncio.create_subprocess_exec(sys.executable, __file__, "prefill", stdout=PIPE)
    try:
        host, port = (await other.stdout.readline()).decode().split()
        await decode(host, int(port))
        await other.wait()
    finally:
        if other.returncode is None:
            other.kill()


if __name__ == "__main__":
    try:
        asyncio.run(prefill() if sys.argv[1:] == ["prefill"] else main())
    except KeyboardInterrupt:
        sys.exit(130)
