"""The tier of an object store: each block an object, with a trailer that says what it is, so that any host can verify it.

What is there is what listing the store said when it was opened, what this process stored, and what it asked the store about.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.descriptors import Descriptor
from nixl_async.errors import IntegrityError, NixlError, NotFoundError, PartsFailed, TransferError
from nixl_async.http import view
from nixl_async.stores import Store
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context, Slots
from nixl_async.tiers.keys import object_name, parse_object_name
from nixl_async.tiers.options import Objects
from nixl_async.tiers.tier import MISSING, Failures, LowerTier

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAILER = struct.Struct("<8sIIQQ")
"""Magic, kind of checksum, zero, bytes of the block, checksum of key and block."""
MAGIC = b"nixlblk\x01"
AT_ONCE = 256
"""Objects of one transfer."""
DELETED_AT_ONCE = 500


class ObjectTier(LowerTier):
    """Blocks under `options.url`, in a part of it for their size."""

    def __init__(self, context: Context, options: Objects) -> None:
        super().__init__()
        self.name = options.name
        self._context, self._options = context, options
        self.capacity = None if options.nbytes is None else options.nbytes // context.block_nbytes
        self._stored: OrderedDict[bytes, float] = OrderedDict()
        self._nbytes = context.block_nbytes + TRAILER.size
        self._store: Store
        self._trailers: Slots

    @property
    def known(self) -> Container[bytes]:
        """The keys that this process knows to be in the store."""
        return self._stored if self._options.ttl is None else _Young(self._stored, self._options.ttl)

    def keys(self) -> Iterable[bytes]:
        """The keys that this process has heard of."""
        return self._stored.keys()

    def __len__(self) -> int:
        return len(self._stored)

    async def open(self) -> None:
        """Open the store, and list it if that is wanted."""
        self._store = await self._context.agent.store(self._options.url, **self._options.options)
        if self._options.listing:
            found = []
            async for stat in self._store.list(self._prefix):
                key = parse_object_name(stat.key[len(self._prefix) :])
                if key is not None and stat.nbytes == self._nbytes:
                    found.append((stat.modified or time.time(), key))
            self._stored.update((key, stored) for stored, key in sorted(found))
        self._trailers = await Slots.make(self._context, 4 * AT_ONCE, TRAILER.size)

    @property
    def _prefix(self) -> str:
        # Blocks of another size have another place: a store may serve several models.
        return f"{self._context.block_nbytes}/"

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        return [self._prefix + object_name(key) for key in keys]

    async def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Look into the dict, and ask the store about what is not in it."""
        known = self.known
        found = [key in known for key in keys]
        if self._options.ask and not all(found):
            unknown = [key for key, here in zip(keys, found, strict=True) if not here]
            for key, stat in zip(unknown, await self._store.stats(self._names(unknown)), strict=True):
                if stat is not None and stat.nbytes == self._nbytes:
                    self._stored[key] = stat.modified or time.time()
            known = self.known
            found = [key in known for key in keys]
        return found

    async def read(self, keys: Sequence[bytes], blocks: Blocks) -> Failures:
        """Get the objects, many at once, and verify them."""
        failures: Failures = [MISSING] * len(keys)
        known = self.known
        ask = self._options.ask
        wanted = [at for at, key in enumerate(keys) if key in known or (ask and key not in self._stored)]
        for start in range(0, len(wanted), AT_ONCE):
            which = wanted[start : start + AT_ONCE]
            mine, target = [keys[at] for at in which], blocks.take(which)
            trailers = await self._trailers.take(len(which))
            try:
                errors = await self._move(mine, target, trailers, put=False)
                good = await self._verify(mine, target, trailers, errors)
            finally:
                self._trailers.give(trailers)
            for at, key, error, right in zip(which, mine, errors, good.tolist(), strict=True):
                failures[at] = self._judge(key, error, right)
        return failures

    def _judge(self, key: bytes, error: TransferError | None, right: bool) -> NixlError | None:
        if isinstance(error, NotFoundError):
            self._stored.pop(key, None)
            return MISSING
        if error is not None:
            self.counters.errors += 1
            return error
        if not right:
            self.counters.corrupt += 1
            self._stored.pop(key, None)
            return IntegrityError(f"object {key.hex()} of {self._store} does not have its checksum", backend="tiers")
        if key in self._stored:
            self._stored.move_to_end(key)
        elif self._options.ttl is None:
            self._stored[key] = time.time()
        self.counters.nbytes_read += self._context.block_nbytes
        return None

    async def write(self, keys: Sequence[bytes], blocks: Blocks, *, durable: bool) -> Failures:
        """Put the objects, many at once; a store has what it says it has, so `durable` changes nothing."""
        failures: Failures = [None] * len(keys)
        known = self.known
        wanted = [at for at, key in enumerate(keys) if key not in known]
        for start in range(0, len(wanted), AT_ONCE):
            which = wanted[start : start + AT_ONCE]
            if len({keys[at] for at in which}) < len(which):
                which = list({keys[at]: at for at in which}.values())
            mine, source = [keys[at] for at in which], blocks.take(which)
            kind = self._context.kind
            sums = await self._context.checksums(kind, mine, source)
            trailers = await self._trailers.take(len(which))
            try:
                for slot, checksum in zip(trailers, sums.tolist(), strict=True):
                    TRAILER.pack_into(self._trailer(slot), 0, MAGIC, kind, 0, self._context.block_nbytes, checksum)
                errors = await self._move(mine, source, trailers, put=True)
            finally:
                self._trailers.give(trailers)
            by_key = {}
            for key, error in zip(mine, errors, strict=True):
                if error is None:
                    self._stored[key] = time.time()
                    self.counters.written += 1
                    self.counters.nbytes_written += self._context.block_nbytes
                else:
                    by_key[key] = error
            self.counters.errors += len(by_key)
            if by_key:
                for at, key in enumerate(keys):
                    failures[at] = by_key.get(key, failures[at])
        if wanted:
            await self.sweep()
        return failures

    def _trailer(self, slot: int) -> memoryview:
        region = self._trailers.region
        return view(region.address + slot * TRAILER.size, TRAILER.size)

    async def _move(
        self, keys: Sequence[bytes], blocks: Blocks, trailers: Sequence[int], *, put: bool
    ) -> list[TransferError | None]:
        objects = self._store.objects(self._names(keys), self._nbytes)
        memory: list[Descriptor] = []
        for block, trailer in zip(blocks.each(), self._trailers.blocks(trailers).each(), strict=True):
            memory += block
            memory += trailer
        try:
            await self._context.transfer(*((memory, objects[:]) if put else (objects[:], memory)), put=put)
        except PartsFailed as failed:
            return [failed.parts.get(at) for at in range(len(keys))]
        except TransferError as error:
            return [error] * len(keys)
        return [None] * len(keys)

    async def _verify(
        self, keys: Sequence[bytes], blocks: Blocks, trailers: Sequence[int], errors: Sequence[TransferError | None]
    ) -> NDArray[np.bool_]:
        sums, kinds = np.zeros(len(keys), np.uint64), np.zeros(len(keys), np.uint8)
        formed = np.zeros(len(keys), np.bool_)
        for at, slot in enumerate(trailers):
            if errors[at] is None:
                magic, kind, _, nbytes, checksum = TRAILER.unpack(self._trailer(slot))
                formed[at] = magic == MAGIC and nbytes == self._context.block_nbytes and kind < 256
                if formed[at]:
                    sums[at], kinds[at] = checksum, kind
        return formed & await self._context.verified(keys, blocks, sums, kinds, errors)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Delete the objects; those that do not exist are no error."""
        for key in keys:
            self._stored.pop(key, None)
        for start in range(0, len(keys), DELETED_AT_ONCE):
            await self._store.delete(self._names(keys[start : start + DELETED_AT_ONCE]))

    async def sweep(self) -> None:
        """Delete what has outlived its time to live, and the least recently used of what is too much."""
        gone: list[bytes] = []
        if self._options.ttl is not None:
            limit = time.time() - self._options.ttl
            gone = [key for key, stored in self._stored.items() if stored < limit]
            for key in gone:
                del self._stored[key]
        while self.capacity is not None and len(self._stored) > self.capacity:
            gone.append(self._stored.popitem(last=False)[0])
        if gone:
            self.counters.evictions += len(gone)
            await self.delete(gone)

    async def aclose(self) -> None:
        """Release the memory for trailers."""
        await self._trailers.aclose()


class _Young:
    def __init__(self, stored: OrderedDict[bytes, float], ttl: float) -> None:
        self._stored, self._limit = stored, time.time() - ttl

    def __contains__(self, key: object) -> bool:
        stored = self._stored.get(key)  # type: ignore[call-overload]
        return stored is not None and bool(stored >= self._limit)
