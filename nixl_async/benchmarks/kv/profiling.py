"""What a prefill and a decode rank do to move a plan's requests for real, again and again, each time with other bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.agent import Agent
from nixl_async.benchmarks.kv.contents import Cache, Memory, WrongBytes
from nixl_async.errors import ConfigurationError
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.planner import Pair, Slices, plan_pairs

if TYPE_CHECKING:
    from nixl_async.benchmarks.kv.worker import Parent

__all__ = ["POOL_SLACK", "Cases", "WrongBytes", "decode", "describe", "find_pair", "pool_blocks", "prefill"]

POOL_SLACK = 1.25
"""How much larger a pool is than what the requests use of it."""
WRITE, READ = "write", "read"
PREPARED, ONE_SHOT = "prepared", "one-shot"
REGION = "kv"


def describe(geometry: KVGeometry, src: Sharding, dst: Sharding) -> dict[str, Any]:
    """Return as JSON values what both sides need to know of the model and the ranks."""
    return {"geometry": asdict(geometry), "src": asdict(src), "dst": asdict(dst)}


def find_pair(values: dict[str, Any], rank: int) -> Pair:
    """Return the first pair in which a rank of the source sends.

    Raises:
        ConfigurationError: the rank sends nothing, because others that have the same heads do.
        DescriptorError: a side cannot divide the model so, or there is no such rank.
    """
    geometry, src, dst = KVGeometry(**values["geometry"]), _sharding(values["src"]), _sharding(values["dst"])
    src.shard(geometry, rank)
    pairs = plan_pairs(geometry, src, dst)
    for pair in pairs:
        if pair.src.rank == rank:
            return pair
    senders = sorted({pair.src.rank for pair in pairs})
    raise ConfigurationError(f"rank {rank} sends nothing: others with the same heads do; these send: {senders}")


def _sharding(values: dict[str, Any]) -> Sharding:
    stages = values["stages"]
    return Sharding(**{**values, "axes": tuple(values["axes"]), "stages": None if stages is None else tuple(stages)})


def pool_blocks(pages: int) -> int:
    """Return how many blocks a pool has for that many pages."""
    return int(pages * POOL_SLACK) + 1


class Cases:
    """The transfers that are timed, in the order of a round, and what they took."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.pair = find_pair(setup, setup["prefill_rank"])
        self.blocks = pool_blocks(setup["pages"])
        self.tables = [self._table(setup["pages"], side) for side in range(2)]
        self.cases = [(op, mode) for op in setup["ops"] for mode in setup["modes"]]
        self.warmup, self.repeats = setup["warmup"], setup["repeats"]
        self.seconds: dict[tuple[str, str], list[float]] = {case: [] for case in self.cases}

    def _table(self, pages: int, side: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng((1, side)).permutation(self.blocks)[:pages].astype(np.int32)

    def turns(self) -> Iterator[tuple[int, str, str, bool]]:
        """Yield number, operation, mode, and whether it counts: rounds of each case once, the first ones to warm up."""
        number = 0
        for turn in range(self.warmup + self.repeats):
            for op, mode in self.cases:
                number += 1
                yield number, op, mode, turn >= self.warmup

    def slices(self, src: MemoryRegion | RemoteRegion, dst: MemoryRegion | RemoteRegion) -> Slices:
        """Describe all pages of all requests."""
        return self.pair.pages(src, self.tables[0], dst, self.tables[1])

    def results(self, routes: dict[str, str]) -> list[dict[str, Any]]:
        """Return what the cases took that this side started."""
        found = []
        for (op, mode), seconds in self.seconds.items():
            if not seconds:
                continue
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
            found.append(
                {
                    "op": op,
                    "mode": mode,
                    "route": routes[op],
                    "n": len(seconds),
                    "median_seconds": statistics.median(seconds),
                    "q1_seconds": low,
                    "q3_seconds": high,
                    "min_seconds": min(seconds),
                    "max_seconds": max(seconds),
                }
            )
        return found


async def prefill(setup: dict[str, Any], parent: Parent) -> dict[str, Any]:
    """Hold the requests' cache; write it into the other side's pool, or have it read."""
    return await _side(setup, parent, source=True)


async def decode(setup: dict[str, Any], parent: Parent) -> dict[str, Any]:
    """Get the requests' cache, by whichever side's doing, and check it."""
    return await _side(setup, parent, source=False)


async def _side(setup: dict[str, Any], parent: Parent, *, source: bool) -> dict[str, Any]:
    cases, memory = Cases(setup), Memory(setup["memory"], parent.rank)
    own = WRITE if source else READ
    cache = Cache(cases.pair, source=source, blocks=cases.blocks, table=cases.tables[not source], memory=memory)
    async with Agent(setup["job"], backends=setup["backends"], token=setup["token"]) as agent:
        region = await agent.register(cache.buffer, name=REGION)
        address = None if source else await agent.serve("127.0.0.1", 0)
        host, port = (await parent.gather("addresses", address))[1]
        peer = await (agent.connect((host, port)) if source else agent.wait_peer("prefill"))
        await parent.gather("connected")
        far = peer.region(REGION)
        sides = (region, far) if source else (far, region)
        slices = cases.slices(*sides)
        prepared = await agent.prepare(*slices)
        for number, op, mode, counts in cases.turns():
            if source:
                await memory.run(lambda salt=number: cache.fill(salt))  # type: ignore[misc]
            await parent.gather(f"filled {number}")
            if op == own:
                began = time.perf_counter()
                if mode == PREPARED:
                    await prepared.transfer()
                else:
                    await agent.transfer(*cases.slices(*sides))
                if counts:
                    cases.seconds[op, mode].append(time.perf_counter() - began)
            await parent.gather(f"moved {number}")
            if not source:
                await memory.run(lambda salt=number: cache.check(salt))  # type: ignore[misc]
            if counts:
                parent.say(event="turn", number=number)
        await parent.gather("done")
        routes = [route for route, nbytes in agent.statistics().nbytes.items() if nbytes]
    found = cases.results({own: "+".join(routes)})
    return {"cases": found, "ranges": len(slices.src), "nbytes": prepared.nbytes}
