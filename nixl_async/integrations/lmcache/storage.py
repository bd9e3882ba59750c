"""LMCache's storage plug-in on this library, for LMCache inside an engine (`storage_plugins`): files, objects, tiers of them."""

from __future__ import annotations

import asyncio
import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface

from nixl_async import ClosedError, ConfigurationError, NixlError, NotFoundError
from nixl_async.integrations.lmcache.chunks import Chunk, Chunks
from nixl_async.integrations.lmcache.layouts import Layouts
from nixl_async.integrations.lmcache.names import chunk_text, host_bytes
from nixl_async.integrations.lmcache.options import read_options

if TYPE_CHECKING:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryObj
    from lmcache.v1.metadata import LMCacheMetadata

logger = logging.getLogger(__name__)

SHORT_REMEMBERED = 1 << 16
"""Chunks in tiers, shorter than whole ones, that are found again: their sizes are kept, the latest ones."""


class NixlAsyncStorageBackend(StoragePluginInterface):
    """Keeps LMCache's chunks by an asyncio agent on a thread of its own.

    In LMCache's configuration:

        storage_plugins: ["kv"]
        extra_config:
          storage_plugin.kv.module_path: nixl_async.integrations.lmcache
          storage_plugin.kv.class_name: NixlAsyncStorageBackend
          storage_plugin.kv.url: s3://bucket/kv              # or tiers and block_nbytes: every parameter of the L2 adapter
          storage_plugin.kv.options: {region: eu-central-1}  # but max_capacity_gb, for nothing evicts what is at a url

    To have it twice, derive a class for each.

    - What is stored is a chunk's bytes and no more: its shape follows from its size and the model's, for whole chunks, the shorter
      ones at a sequence's end, and single layers (`use_layerwise`). In tiers, whole chunks and single layers of them are found
      after a restart; shorter ones while this process remembers their size.
    - Chunks are read into memory of LMCache's CPU backend, which must be there (`max_local_cpu_size`).
    - Pins keep `remove(force=False)` away. Tiers evict in spite of them; what is evicted meanwhile is a miss.

    All methods may be called from any thread, at once; those that are coroutines on any loop.

    Raises:
        ConfigurationError: (a `ValueError`) a parameter is wrong.
        NixlError: the store cannot be opened.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig | None = None,
        metadata: LMCacheMetadata | None = None,
        local_cpu_backend: Any = None,
        loop: asyncio.AbstractEventLoop | None = None,
        dst_device: str = "cpu",
    ) -> None:
        super().__init__(
            dst_device=dst_device, config=config, metadata=metadata, local_cpu_backend=local_cpu_backend, loop=loop
        )
        if config is None or metadata is None:
            raise ConfigurationError("NixlAsyncStorageBackend needs LMCache's config and metadata; LMCache gives them")
        name, given = _parameters(type(self), config)
        options = read_options(given, f"storage_plugin.{name}")
        if options.capacity_nbytes:
            raise ConfigurationError(f"storage_plugin.{name}: max_capacity_gb has no meaning here; nothing evicts from a url")
        self._layouts = Layouts(config, metadata)
        self._lock = threading.Lock()
        self._putting: set[CacheEngineKey] = set()
        self._pins: dict[CacheEngineKey, int] = {}
        self._short: dict[CacheEngineKey, int] = {}
        """The sizes of chunks in tiers that are shorter than a whole one."""
        self._in_tiers = bool(options.tiers)
        self._chunks = Chunks(options, f"lmcache-{name}", _arena(local_cpu_backend))
        if local_cpu_backend is not None:
            _close_before(local_cpu_backend, self.close)
        logger.info("%s keeps chunks in %s", self._chunks.name, options)

    def __str__(self) -> str:
        return type(self).__name__

    # What is there.

    def contains(self, key: CacheEngineKey, pin: bool = False) -> bool:
        """Tell whether a chunk is there, and pin it if so asked; asks the store, for at most `lookup_seconds`."""
        return self.batched_contains([key], pin) == 1

    def batched_contains(self, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """Return how many of the first keys are there, and pin those if so asked; one question for all."""
        return self._prefix(keys, self._chunks.submit(self._find(keys)).result(), pin)

    async def batched_async_contains(self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False) -> int:
        """As `batched_contains`, without blocking the loop."""
        return self._prefix(keys, await self._chunks.submit(self._find(keys)).wait(), pin)

    async def _find(self, keys: Sequence[CacheEngineKey]) -> list[int | None]:
        return await self._chunks.find(list(map(chunk_text, keys)), [self._sizes(key) for key in keys])

    def _sizes(self, key: CacheEngineKey) -> tuple[int, ...]:
        whole = self._layouts.whole(key)
        short = self._short.get(key)
        return (whole,) if short is None else (short, whole)

    def _prefix(self, keys: Sequence[CacheEngineKey], found: Sequence[int | None], pin: bool) -> int:
        hits = next((at for at, nbytes in enumerate(found) if nbytes is None), len(found))
        if pin:
            with self._lock:
                for key in keys[:hits]:
                    self._pins[key] = self._pins.get(key, 0) + 1
        return hits

    def pin(self, key: CacheEngineKey) -> bool:
        """Pin a chunk that is there; tell whether it is."""
        return self.contains(key, pin=True)

    def unpin(self, key: CacheEngineKey) -> bool:
        """Take one pin off; tell whether there was one."""
        with self._lock:
            left = self._pins.get(key, 0) - 1
            if left > 0:
                self._pins[key] = left
            else:
                self._pins.pop(key, None)
        return left >= 0

    def exists_in_put_tasks(self, key: CacheEngineKey) -> bool:
        """Tell whether a chunk is being stored."""
        with self._lock:
            return key in self._putting

    # Storing.

    def batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> list[Future[None]] | None:
        """Begin to store chunks that are not being stored yet; return one future for them, `None` if there are none.

        It has an error if a chunk was not stored; the others are. The callback is called for each that is, on a thread. The
        memory objects are held until then. After `close` nothing is stored.
        """
        mine: list[tuple[CacheEngineKey, MemoryObj]] = []
        with self._lock:
            for key, one in zip(keys, objs, strict=True):
                if key not in self._putting:
                    self._putting.add(key)
                    one.ref_count_up()
                    mine.append((key, one))
        if not mine:
            return None
        try:
            return [self._chunks.submit(self._put(mine, on_complete_callback)).future]
        except ClosedError as error:
            self._release(mine)
            logger.warning("%d chunks are not stored: %s", len(mine), error)
            return None

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[CacheEngineKey],
        objs: list[MemoryObj],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[CacheEngineKey], None] | None = None,
    ) -> None:
        """As `batched_submit_put_task`; returns at once."""
        self.batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback)

    async def _put(
        self, mine: Sequence[tuple[CacheEngineKey, MemoryObj]], callback: Callable[[CacheEngineKey], None] | None
    ) -> None:
        try:
            chunks = [Chunk(chunk_text(key), *host_bytes(one)) for key, one in mine]
            if self._in_tiers:
                self._remember([(key, chunk.nbytes) for (key, _), chunk in zip(mine, chunks, strict=True)])
            results = await self._chunks.put(chunks)
            errors = [result for result in results if isinstance(result, NixlError)]
        finally:
            self._release(mine)
        if callback is not None:
            done = [key for (key, _), result in zip(mine, results, strict=True) if not isinstance(result, NixlError)]
            # On another thread: it may ask this object.
            await asyncio.to_thread(self._call_back, callback, done)
        if errors:
            logger.warning("%s: %d of %d chunks were not stored: %s", self._chunks.name, len(errors), len(mine), errors[0])
            raise errors[0]

    def _call_back(self, callback: Callable[[CacheEngineKey], None], keys: Sequence[CacheEngineKey]) -> None:
        for key in keys:
            try:
                callback(key)
            except Exception:
                logger.exception("%s: the callback for %s failed", self._chunks.name, key.to_string())

    def _remember(self, sizes: Sequence[tuple[CacheEngineKey, int]]) -> None:
        with self._lock:
            for key, nbytes in sizes:
                if nbytes != self._layouts.whole(key):
                    self._short[key] = nbytes
            while len(self._short) > SHORT_REMEMBERED:
                del self._short[next(iter(self._short))]

    def _release(self, mine: Sequence[tuple[CacheEngineKey, MemoryObj]]) -> None:
        with self._lock:
            self._putting.difference_update(key for key, _ in mine)
        for _, one in mine:
            one.ref_count_down()

    # Reading.

    def get_blocking(self, key: CacheEngineKey) -> MemoryObj | None:
        """Read a chunk; `None` if it is not there."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[CacheEngineKey]) -> list[MemoryObj | None]:
        """Read chunks, all at once; `None` for each that is not there or has no room in LMCache's memory."""
        found = self._chunks.submit(self._find(keys)).result()
        objects = self._allocate(keys, found)
        return self._chunks.submit(self._get(keys, objects)).result()  # type: ignore[no-any-return]

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey], transfer_spec: Any = None
    ) -> list[MemoryObj]:
        """Read chunks up to the first that is not there, without blocking the loop.

        Cancelling it gives all memory back when nothing moves in it any more.
        """
        found = await self._chunks.submit(self._find(keys)).wait()
        hits = next((at for at, nbytes in enumerate(found) if nbytes is None), len(found))
        allocating = asyncio.ensure_future(asyncio.to_thread(self._allocate, keys[:hits], found[:hits]))
        try:
            objects = await asyncio.shield(allocating)
        except asyncio.CancelledError:
            allocating.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else _give_back(done.result())
            )
            raise
        call = self._chunks.submit(self._get(keys[:hits], objects))
        try:
            read = await call.wait()
        except asyncio.CancelledError:
            if call.future.exception() is None:
                _give_back(call.future.result())
            raise
        whole = next((at for at, one in enumerate(read) if one is None), len(read))
        _give_back(read[whole:])
        return read[:whole]  # type: ignore[no-any-return]

    def _allocate(self, keys: Sequence[CacheEngineKey], found: Sequence[int | None]) -> list[MemoryObj | None]:
        """Take memory for each chunk that was found; it may wait until other requests give some back."""
        if self.local_cpu_backend is None:
            raise ConfigurationError(
                "NixlAsyncStorageBackend reads into LMCache's CPU backend; set max_local_cpu_size above 0"
            )
        objects: list[MemoryObj | None] = []
        try:
            for key, nbytes in zip(keys, found, strict=True):
                layout = None if nbytes is None else self._layouts.of(key, nbytes)
                objects.append(None if layout is None else self.local_cpu_backend.allocate(*layout))
        except BaseException:
            _give_back(objects)
            raise
        return objects

    async def _get(self, keys: Sequence[CacheEngineKey], objects: list[MemoryObj | None]) -> list[MemoryObj | None]:
        wanted = [(at, one) for at, one in enumerate(objects) if one is not None]
        read = list(objects)
        errors = []
        try:
            results = await self._chunks.get([Chunk(chunk_text(keys[at]), *host_bytes(one)) for at, one in wanted])
        except BaseException:
            _give_back(objects)
            raise
        for (at, one), result in zip(wanted, results, strict=True):
            if result is not True:
                one.ref_count_down()
                read[at] = None
                if isinstance(result, NixlError) and not isinstance(result, NotFoundError):
                    errors.append(result)
        if errors:
            logger.warning("%s: %d of %d chunks were not read: %s", self._chunks.name, len(errors), len(keys), errors[0])
        return read

    # Removing, and the end.

    def remove(self, key: CacheEngineKey, force: bool = True) -> bool:
        """Delete a chunk, unless it is pinned and `force` is false; tell whether it was there."""
        return self.batched_remove([key], force) == 1

    def batched_remove(self, keys: list[CacheEngineKey], force: bool = True) -> int:
        """Delete chunks, except, without `force`, those that are pinned; return how many were there."""
        with self._lock:
            free = [key for key in dict.fromkeys(keys) if force or key not in self._pins]
        if not free:
            return 0
        names, sizes = list(map(chunk_text, free)), [self._sizes(key) for key in free]
        try:
            found = self._chunks.submit(self._chunks.delete(names, sizes)).result()
        except NixlError as error:
            logger.warning("%s: deleting %d chunks failed: %s", self._chunks.name, len(free), error)
            return 0
        with self._lock:
            for key in free:
                self._pins.pop(key, None)
                self._short.pop(key, None)
        return sum(nbytes is not None for nbytes in found)

    def touch_cache(self) -> None:
        """Do nothing: tiers learn what is used from what is read."""

    def get_allocator_backend(self) -> Any:
        """Return LMCache's CPU backend, which has the memory that chunks are read into."""
        if self.local_cpu_backend is None:
            raise ConfigurationError(
                "NixlAsyncStorageBackend reads into LMCache's CPU backend; set max_local_cpu_size above 0"
            )
        return self.local_cpu_backend

    def close(self) -> None:
        """Finish what is being stored, for at most `close_seconds`, and release everything. Idempotent.

        When it returns, no byte of any memory object moves any more.
        """
        self._chunks.close(wait=True)


def _give_back(objects: Sequence[MemoryObj | None]) -> None:
    for one in objects:
        if one is not None:
            one.ref_count_down()


def _parameters(kind: type, config: LMCacheEngineConfig) -> tuple[str, dict[str, Any]]:
    """Find the name under which the configuration has this class, and what it says under that name."""
    extra = config.extra_config or {}
    names = []
    for name in config.storage_plugins or ():
        path, wanted = (extra.get(f"storage_plugin.{name}.{field}") for field in ("module_path", "class_name"))
        if wanted == kind.__name__ and path and getattr(importlib.import_module(path), wanted, None) is kind:
            names.append(name)
    if len(names) != 1:
        raise ConfigurationError(
            f"{len(names)} of storage_plugins {list(config.storage_plugins or ())} have class_name {kind.__name__}; it must be one"
            " (derive a class for each to have several)"
        )
    start = f"storage_plugin.{names[0]}."
    given = {name.removeprefix(start): value for name, value in extra.items() if name.startswith(start)}
    return names[0], {name: value for name, value in given.items() if name not in ("module_path", "class_name")}


def _close_before(local_cpu_backend: Any, close: Callable[[], None]) -> None:
    """Let `close` end before LMCache's CPU backend frees its memory.

    LMCache closes that backend first (lmcache/v1/storage_backend/storage_manager.py), with chunks still being read from it.
    """
    freeing = local_cpu_backend.close

    def both() -> None:
        close()
        freeing()

    local_cpu_backend.close = both


def _arena(local_cpu_backend: Any) -> tuple[int, int] | None:
    """Return the memory that LMCache's CPU backend allocates from, if it is one piece."""
    allocator = getattr(local_cpu_backend, "memory_allocator", None)
    buffer = getattr(allocator, "buffer", None)
    if not isinstance(buffer, torch.Tensor) or buffer.device.type != "cpu" or not buffer.is_contiguous():
        return None
    nbytes = buffer.numel() * buffer.element_size()
    return (buffer.data_ptr(), nbytes) if nbytes else None


__all__ = ["NixlAsyncStorageBackend"]
