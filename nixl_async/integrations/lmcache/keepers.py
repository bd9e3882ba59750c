"""What keeps chunks: a store, each of them an object of its own name, or tiers, each of them some blocks.

Both answer the same calls, on the loop of their agent. They raise what their store or tiers raise; of single chunks that fail,
they return the errors.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async import (
    Agent,
    BackendError,
    Descriptor,
    MemoryRegion,
    NixlError,
    NotFoundError,
    PartsFailed,
    Store,
    TransferError,
)
from nixl_async.integrations.lmcache.options import ChunkOptions
from nixl_async.tiers import Outcome, Tiers

if TYPE_CHECKING:
    from numpy.typing import NDArray

Result = bool | NixlError
"""What became of a chunk: True for stored or read, False for stored before, or why not."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a chunk's bytes are: a registered region and an offset in it."""

    region: MemoryRegion
    offset: int
    nbytes: int

    def describe(self) -> Descriptor:
        """Return it as one side of a transfer."""
        return self.region[self.offset : self.offset + self.nbytes]


class _HostMemory:
    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def host_view(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Return bytes of this process as an array; the caller keeps them alive."""
    return np.asarray(_HostMemory(address, nbytes))


class Whole:
    """Keeps chunks as objects of a store. One that is written has its name only when it is whole."""

    def __init__(self, agent: Agent, store: Store) -> None:
        self._agent = agent
        self._store = store
        self._writing: dict[str, asyncio.Future[None]] = {}

    async def open(self) -> None:
        """Nothing is to be opened: the store is."""

    async def aclose(self) -> None:
        """Nothing is queued."""

    async def find(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Ask the store for sizes."""
        return [None if stat is None else stat.nbytes for stat in await self._store.stats(names)]

    async def put(self, names: list[str], placed: list[Placed]) -> list[Result]:
        """Write those that are not there, and that no other call is writing."""
        results: list[Result] = [False] * len(names)
        mine = [at for at, name in enumerate(names) if name not in self._writing]
        others = {at: self._writing[name] for at, name in enumerate(names) if name in self._writing}
        done = asyncio.get_running_loop().create_future()
        self._writing.update((names[at], done) for at in mine)
        try:
            if mine:
                here = await self.find([names[at] for at in mine], ())
                absent = [at for at, nbytes in zip(mine, here, strict=True) if nbytes != placed[at].nbytes]
                moved = await self._move([names[at] for at in absent], [placed[at] for at in absent], put=True)
                for at, result in zip(absent, moved, strict=True):
                    results[at] = result
        finally:
            for at in mine:
                del self._writing[names[at]]
            done.set_result(None)
        for at, other in others.items():
            await other
            (nbytes,) = await self.find([names[at]], ())
            if nbytes != placed[at].nbytes:
                (results[at],) = await self._move([names[at]], [placed[at]], put=True)
        return results

    async def get(self, names: list[str], placed: list[Placed]) -> list[Result]:
        """Read objects of exactly these sizes: one of another size was stored by another layout of the same model."""
        return await self._move(names, placed, put=False)

    async def _move(self, names: Sequence[str], placed: Sequence[Placed], *, put: bool) -> list[Result]:
        if not names:
            return []
        objects = self._store.objects(names, [one.nbytes for one in placed])
        objects.exact = True
        memory = [one.describe() for one in placed]
        try:
            if put:
                await self._agent.transfer(memory, objects[:])
            else:
                # A request waits for these.
                await self._agent.transfer(objects[:], memory, traffic_class="latency")
        except PartsFailed as failed:
            return [failed.parts.get(at, True) for at in range(len(names))]
        except TransferError as error:
            return [error] * len(names)
        return [True] * len(names)

    async def delete(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Delete those that are there."""
        found = await self.find(names, sizes)
        await self._store.delete([name for name, nbytes in zip(names, found, strict=True) if nbytes is not None])
        return found

    async def listing(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """List the store."""
        async for stat in self._store.list(prefix):
            yield stat.key, stat.nbytes

    def usage(self) -> None:
        """Stores do not tell."""
        return None

    def status(self) -> dict[str, Any]:
        """Nothing is counted."""
        return {}


ENDS_NBYTES = 32 << 20
"""A buffer for the last blocks of chunks that are no multiple of blocks."""
ASKED_AT_ONCE = 64
"""Keys that tiers look up together when this process has not heard of them."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A block: its key, which chunk it is of, and where that chunk's bytes for it are; fewer than a block at a chunk's end."""

    key: bytes
    chunk: int
    place: Placed


class InTiers:
    """Keeps chunks as blocks of one size. A chunk is there if all of its blocks are, in whatever tier each is.

    The tiers evict by themselves. Keys are hashes of the chunk's name and size: the same name with another size, from another
    layout of the same model, is another chunk. The last block of a chunk that is no multiple of blocks goes through a buffer.
    """

    def __init__(self, agent: Agent, options: ChunkOptions) -> None:
        self._agent = agent
        self._durable = options.durable
        self._nbytes = options.block_nbytes
        self._tiers = Tiers(agent, options.tiers, block_nbytes=options.block_nbytes)

    async def open(self) -> None:
        """Open the tiers."""
        await self._tiers.__aenter__()

    async def aclose(self) -> None:
        """Write what is queued for the lower tiers, and close them; cancelled, it drops what is queued."""
        await self._tiers.aclose()

    def _keys(self, name: str, nbytes: int) -> list[bytes]:
        start = hashlib.sha256(name.encode()).digest() + nbytes.to_bytes(8, "little")
        return [start + at.to_bytes(4, "little") for at in range(-(-nbytes // self._nbytes))]

    def _here(self, name: str, nbytes: int) -> bool:
        return all(self._tiers.contains(self._keys(name, nbytes)))

    async def find(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Look for each chunk in each size that it may have, first as far as this process knows, then in what tiers share."""
        found = await self._known(names, sizes)
        missed = [(at, nbytes) for at, one in enumerate(found) if one is None for nbytes in sizes[at]]
        for start in range(0, len(missed), ASKED_AT_ONCE):
            asked = missed[start : start + ASKED_AT_ONCE]
            firsts = [self._keys(names[at], nbytes)[0] for at, nbytes in asked]
            # It looks all of them up, and what it found is known from then on.
            await self._tiers.prefix(firsts)
            for (at, nbytes), here in zip(asked, self._tiers.contains(firsts), strict=True):
                if here and found[at] is None:
                    keys = self._keys(names[at], nbytes)
                    if await self._tiers.prefix(keys) == len(keys):
                        found[at] = nbytes
        return found

    async def _known(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        found: list[int | None] = []
        for at, name in enumerate(names):
            found.append(next((nbytes for nbytes in sizes[at] if self._here(name, nbytes)), None))
            if at % ASKED_AT_ONCE == ASKED_AT_ONCE - 1:
                await asyncio.sleep(0)
        return found

    async def put(self, names: list[str], placed: list[Placed]) -> list[Result]:
        """Put the blocks of those that are not there."""
        here = await self._known(names, [[one.nbytes] for one in placed])
        results: list[Result] = [nbytes is None for nbytes in here]
        await self._move([at for at, nbytes in enumerate(here) if nbytes is None], names, placed, results, put=True)
        return results

    async def get(self, names: list[str], placed: list[Placed]) -> list[Result]:
        """Get all blocks of each."""
        results: list[Result] = [True] * len(names)
        await self._move(range(len(names)), names, placed, results, put=False)
        return results

    async def _move(
        self, which: Sequence[int], names: Sequence[str], placed: Sequence[Placed], results: list[Result], *, put: bool
    ) -> None:
        whole: dict[MemoryRegion, list[_Block]] = {}
        ends: list[_Block] = []
        for at in which:
            one = placed[at]
            for number, key in enumerate(self._keys(names[at], one.nbytes)):
                start = number * self._nbytes
                place = Placed(one.region, one.offset + start, min(self._nbytes, one.nbytes - start))
                if place.nbytes == self._nbytes:
                    whole.setdefault(one.region, []).append(_Block(key, at, place))
                else:
                    ends.append(_Block(key, at, place))
        moves = [self._call(region, [block.place.offset for block in blocks], blocks, put) for region, blocks in whole.items()]
        if ends:
            moves.append(self._move_ends(ends, put))
        blocks = [block for some in whole.values() for block in some] + ends
        outcomes = [outcome for found in await _all(moves) for outcome in found]
        for block, outcome in zip(blocks, outcomes, strict=True):
            if not outcome:
                what = f"block {block.key.hex()} of chunk {names[block.chunk]!r}"
                none = BackendError(f"no tier took {what}") if put else NotFoundError(f"no tier has {what}")
                results[block.chunk] = outcome.error or none

    async def _call(self, region: MemoryRegion, offsets: Sequence[int], blocks: Sequence[_Block], put: bool) -> list[Outcome]:
        keys, memory = [block.key for block in blocks], region.ranges(offsets, [self._nbytes])
        if put:
            return await self._tiers.put(keys, memory, durable=self._durable)
        return await self._tiers.get(keys, memory)

    async def _move_ends(self, ends: Sequence[_Block], put: bool) -> list[Outcome]:
        at_once = min(len(ends), max(1, ENDS_NBYTES // self._nbytes))
        buffer = np.zeros((at_once, self._nbytes), np.uint8)
        outcomes: list[Outcome] = []
        async with await self._agent.register(buffer) as region:
            for start in range(0, len(ends), at_once):
                blocks = ends[start : start + at_once]
                if put:
                    for row, block in zip(buffer, blocks, strict=False):
                        row[: block.place.nbytes] = _bytes(block.place)
                        row[block.place.nbytes :] = 0
                found = await self._call(region, range(0, len(blocks) * self._nbytes, self._nbytes), blocks, put)
                if not put:
                    for row, block, outcome in zip(buffer, blocks, found, strict=False):
                        if outcome:
                            _bytes(block.place)[:] = row[: block.place.nbytes]
                outcomes += found
        return outcomes

    async def delete(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Delete all blocks of those that this process knows to be there."""
        found = await self._known(names, sizes)
        here = [(name, nbytes) for name, nbytes in zip(names, found, strict=True) if nbytes is not None]
        await self._tiers.delete([key for name, nbytes in here for key in self._keys(name, nbytes)])
        return found

    def usage(self) -> tuple[int, int]:
        """Return the bytes in the last tier, and what it may hold (0: no bound)."""
        last = self._tiers.statistics().tiers[-1]
        return last.blocks * self._nbytes, (last.capacity or 0) * self._nbytes

    def status(self) -> dict[str, Any]:
        """Return each tier's blocks, evictions, errors and what it still has to write."""
        found = self._tiers.statistics()
        counted = ("blocks", "capacity", "hits", "written", "evictions", "corrupt", "errors", "queued", "dropped")
        return {"tiers": {tier.name: {name: getattr(tier, name) for name in counted} for tier in found.tiers}}


async def _all(moves: Sequence[Any]) -> list[list[Outcome]]:
    """Run them at once; if one raises, the others have ended too when its error comes."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(move) for move in moves]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        if isinstance(first, NixlError):
            raise first from None
        raise
    return [task.result() for task in tasks]


def _bytes(place: Placed) -> NDArray[np.uint8]:
    return host_view(place.region.address + place.offset, place.nbytes)
