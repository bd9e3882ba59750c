"""LMCache's L2 adapter on this library: chunks in files, objects or tiers of them, for its server (`--l2-adapter`)."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import KeyEntry, KeyListPage, MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface, L2TaskId
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.platform import create_event_notifier

from nixl_async import ClosedError, ConfigurationError, NixlError, NotFoundError
from nixl_async.integrations.lmcache.chunks import Chunk, Chunks
from nixl_async.integrations.lmcache.keepers import Result
from nixl_async.integrations.lmcache.names import chunk_name, host_bytes, model_prefix, parse_chunk_name
from nixl_async.integrations.lmcache.options import PARAMETERS, ChunkOptions, read_options

if TYPE_CHECKING:
    from lmcache.v1.memory_management import MemoryObj

logger = logging.getLogger(__name__)

ADOPTED_AT_ONCE = 1000
SIZES_REMEMBERED = 4
"""Sizes that chunks of one model and group are looked for in tiers, besides the one that the lookup's layout says."""


class NixlAsyncL2AdapterConfig(L2AdapterConfigBase):
    """The adapter's parameters, `adapter_params` in LMCache's configuration; `help()` says what they are."""

    def __init__(self, options: ChunkOptions) -> None:
        self.options = options

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> NixlAsyncL2AdapterConfig:
        """Check the parameters.

        Raises:
            ConfigurationError: (a `ValueError`) one is unknown, missing, or not what it must be.
        """
        return cls(read_options(d, "adapter_params of NixlAsyncL2Adapter"))

    @classmethod
    def help(cls) -> str:
        """Return what the parameters are."""
        return f"NixlAsyncL2Adapter parameters (adapter_params):\n{PARAMETERS}"


class NixlAsyncL2Adapter(L2AdapterInterface):
    """Stores, looks up and loads chunks by an asyncio agent on a thread of its own, which signals LMCache's event descriptors.

    Switch it on with `--l2-adapter '{"type": "plugin", "module_path": "nixl_async.integrations.lmcache", "class_name":
    "NixlAsyncL2Adapter", "adapter_params": {"url": "file:///nvme/kv"}}'`; `NixlAsyncL2AdapterConfig.help()` has the parameters.

    - Memory: L1's arena is registered once. What is elsewhere is registered for each task.
    - A load writes into an object's buffer only until its task is complete, whatever its result, and never after `close`.
    - Without `close`, the end of the process loses what tiers have not yet written; LMCache's server closes its adapters.
    - A store is successful if every object is stored or was there already; those that are stored count even if others failed.
    - Objects at a URL have the names that LMCache's own `fs` adapter gives its files: either reads the other's.
    - An object of another size than the buffer's is a miss: the same model may have been served with another layout.
    - Locks keep `delete` from what was found. The tiers' own eviction may still be faster than a load: that load is a miss.
    - With `max_capacity_gb`, what is in the store at the start is told to LMCache's eviction when the first task comes, and stores
      that would exceed it fail. Tiers evict by themselves, and tell LMCache the last tier's bytes.

    All methods may be called from any thread, at once; `close` once nobody else calls.

    Raises:
        ConfigurationError: (a `ValueError`) a parameter is wrong.
        NixlError: the store cannot be opened.
    """

    def __init__(
        self, config: NixlAsyncL2AdapterConfig | Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None, **_: object
    ) -> None:
        if not isinstance(config, NixlAsyncL2AdapterConfig):
            config = NixlAsyncL2AdapterConfig.from_dict(dict(config))
        options = config.options
        super().__init__(max_capacity_bytes=options.capacity_nbytes)
        self._lock = threading.Lock()
        self._next_task: L2TaskId = 0
        self._stores: dict[L2TaskId, L2StoreResult] = {}
        self._bitmaps: dict[L2TaskId, Bitmap] = {}
        self._locks: dict[ObjectKey, int] = {}
        self._sizes: dict[ObjectKey, int] | None = {} if options.capacity_nbytes else None
        """The bytes of each stored key, if LMCache's eviction bounds them."""
        self._reserved = 0
        """The bytes that stores under way may add; used on the loop alone."""
        self._adopting = options.capacity_nbytes == 0
        self._gone: set[ObjectKey] | None = None
        """What was deleted while the store is listed; `None` while it is not."""
        self._seen: dict[tuple[str, int], tuple[int, ...]] = {}
        self._closed = False
        arena = (l1_memory_desc.ptr, l1_memory_desc.size) if l1_memory_desc is not None and l1_memory_desc.ptr else None
        self._chunks = Chunks(options, "lmcache-l2", arena)
        self._store_event = create_event_notifier()
        self._lookup_event = create_event_notifier()
        self._load_event = create_event_notifier()
        logger.info("%s keeps chunks in %s", self._chunks.name, options)

    def get_store_event_fd(self) -> int:
        """Return what becomes readable when stores are complete."""
        return int(self._store_event.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Return what becomes readable when lookups are complete."""
        return int(self._lookup_event.fileno())

    def get_load_event_fd(self) -> int:
        """Return what becomes readable when loads are complete."""
        return int(self._load_event.fileno())

    # Stores.

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Begin to store objects; they must stay as they are until the task is complete.

        Raises:
            ValueError: there are not as many objects as keys.
            ClosedError: the adapter is closed.
        """
        _check_pairs(keys, objects)
        task = self._task()
        self._begin(self._store(task, list(keys), list(objects)))
        return task

    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]:
        """Return what is complete since the last call."""
        with self._lock:
            done, self._stores = self._stores, {}
        return done

    async def _store(self, task: L2TaskId, keys: list[ObjectKey], objects: list[MemoryObj]) -> None:
        result = L2StoreResult(False, 0)
        reserved = 0
        try:
            chunks = self._describe(keys, objects)
            fitting, reserved = self._fitting(keys, chunks)
            self._reserved += reserved
            found = iter(await self._chunks.put([chunk for chunk in fitting if isinstance(chunk, Chunk)]))
            results = [next(found) if isinstance(chunk, Chunk) else chunk for chunk in fitting]
            stored = {key: chunk.nbytes for key, chunk, one in zip(keys, chunks, results, strict=True) if one is True}
            self._failed("storing", keys, results)
            result = L2StoreResult(not any(isinstance(one, NixlError) for one in results), sum(stored.values()))
            self._tell_stored(stored)
        except Exception:
            logger.exception("%s: storing %d objects failed", self._chunks.name, len(keys))
        finally:
            self._reserved -= reserved
            with self._lock:
                self._stores[task] = result
            self._store_event.notify()

    def _fitting(self, keys: Sequence[ObjectKey], chunks: Sequence[Chunk]) -> tuple[list[Chunk | NixlError], int]:
        """Replace what would exceed the capacity by an error; return the bytes that the others may add, too."""
        if self._sizes is None:
            return list(chunks), 0
        room = self._max_capacity_bytes - self.get_usage().total_bytes_used - self._reserved
        found: list[Chunk | NixlError] = []
        added = 0
        for key, chunk in zip(keys, chunks, strict=True):
            needed = 0 if key in self._sizes else chunk.nbytes
            if needed and added + needed > room:
                full = f"max_capacity_gb is {self._chunks.options.max_capacity_gb:g}: no room for {chunk.nbytes} bytes"
                found.append(ConfigurationError(f"{full}; let LMCache evict (an eviction policy) or allow more"))
            else:
                found.append(chunk)
                added += needed
        return found, added

    # Lookups.

    def submit_lookup_and_lock_task(self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]) -> L2TaskId:
        """Begin to look up keys; those that are found are locked until `submit_unlock`, once for each time.

        Raises:
            ClosedError: the adapter is closed.
        """
        task = self._task()
        self._begin(self._look_up(task, list(keys), dict(group_layout_descs)))
        return task

    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None:
        """Return a bit for each key, once; `None` before the lookup is complete."""
        with self._lock:
            return self._bitmaps.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Take one lock off each key."""
        with self._lock:
            for key in keys:
                left = self._locks.get(key, 0) - 1
                if left > 0:
                    self._locks[key] = left
                else:
                    self._locks.pop(key, None)

    async def _look_up(self, task: L2TaskId, keys: list[ObjectKey], layouts: dict[int, MemoryLayoutDesc]) -> None:
        bitmap = Bitmap(len(keys))
        try:
            found = await self._chunks.find(list(map(chunk_name, keys)), [self._sizes_of(key, layouts) for key in keys])
            with self._lock:
                for at, (key, nbytes) in enumerate(zip(keys, found, strict=True)):
                    if nbytes is not None:
                        bitmap.set(at)
                        self._locks[key] = self._locks.get(key, 0) + 1
            if self._chunks.breaker.failures == 0:
                self._tell_gone([key for key, nbytes in zip(keys, found, strict=True) if nbytes is None])
        except Exception:
            logger.exception("%s: looking up %d keys failed", self._chunks.name, len(keys))
        finally:
            with self._lock:
                self._bitmaps[task] = bitmap
            self._lookup_event.notify()

    def _sizes_of(self, key: ObjectKey, layouts: Mapping[int, MemoryLayoutDesc]) -> tuple[int, ...]:
        """Return the sizes that a key's object may have: the latest seen, and what its layout says."""
        seen = self._seen.get((key.model_name, key.object_group_id), ())
        layout = layouts.get(key.object_group_id)
        if layout is None or not layout.shapes:
            return seen
        said = sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))
        return (*seen, said) if said and said not in seen else seen

    # Loads.

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> L2TaskId:
        """Begin to load objects into their buffers, whose content is undefined where the result's bit is 0.

        Raises:
            ValueError: there are not as many objects as keys.
            ClosedError: the adapter is closed.
        """
        _check_pairs(keys, objects)
        task = self._task()
        self._begin(self._load(task, list(keys), list(objects)))
        return task

    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None:
        """Return a bit for each key, once; `None` before the load is complete."""
        with self._lock:
            return self._bitmaps.pop(task_id, None)

    async def _load(self, task: L2TaskId, keys: list[ObjectKey], objects: list[MemoryObj]) -> None:
        bitmap = Bitmap(len(keys))
        try:
            results = await self._chunks.get(self._describe(keys, objects))
            for at, result in enumerate(results):
                if result is True:
                    bitmap.set(at)
            self._failed("loading", keys, [False if isinstance(one, NotFoundError) else one for one in results])
            loaded = [key for key, result in zip(keys, results, strict=True) if result is True]
            if loaded:
                self._telling(lambda: self._notify_keys_accessed(loaded))
            self._tell_gone([key for key, result in zip(keys, results, strict=True) if isinstance(result, NotFoundError)])
        except Exception:
            logger.exception("%s: loading %d objects failed", self._chunks.name, len(keys))
        finally:
            with self._lock:
                self._bitmaps[task] = bitmap
            self._load_event.notify()

    # Eviction, listing, status, the end.

    def delete(self, keys: list[ObjectKey]) -> None:
        """Delete objects, except those that are locked; return when they are gone and the listeners know, or it failed."""
        with self._lock:
            free = [key for key in dict.fromkeys(keys) if key not in self._locks]
        if not free:
            return
        if self._chunks.thread.current:
            # A listener asks: this is the thread that would have to do it.
            self._begin(self._delete(free, tell=True))
            return
        try:
            deleted = self._chunks.submit(self._delete(free, tell=False)).result()
        except NixlError as error:
            logger.warning("%s: deleting %d objects failed: %s", self._chunks.name, len(free), error)
            return
        self._tell_deleted(deleted)

    async def _delete(self, keys: list[ObjectKey], *, tell: bool) -> dict[ObjectKey, int]:
        found = await self._chunks.delete(list(map(chunk_name, keys)), [self._sizes_of(key, {}) for key in keys])
        deleted = {key: nbytes for key, nbytes in zip(keys, found, strict=True) if nbytes is not None}
        for key in keys:
            if self._sizes is not None and key not in deleted and key in self._sizes:
                # Somebody else has deleted it.
                deleted[key] = self._sizes[key]
        if tell:
            self._tell_deleted(deleted)
        return deleted

    def list_l2_keys(self, model_name: str | None = None, page_size: int = 500, cursor: str | None = None) -> KeyListPage:
        """List what a store at a URL holds, whoever stored it, in order of names; each page lists it anew.

        Raises:
            NotImplementedError: the chunks are in tiers, which keep no names.
            ValueError: `page_size` is not positive.
            RuntimeError: the store failed, or the listing took more than `transfer_seconds`.
        """
        if not self._chunks.options.url:
            raise NotImplementedError("NixlAsyncL2Adapter lists chunks at a url; tiers keep hashes of their names")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be positive")
        prefix = "" if model_name is None else model_prefix(model_name)

        async def page() -> list[tuple[str, ObjectKey, int]]:
            found: list[tuple[str, ObjectKey, int]] = []
            async with (
                asyncio.timeout(self._chunks.options.transfer_seconds),
                aclosing(self._chunks.listing(prefix)) as listing,
            ):
                async for name, nbytes in listing:
                    if (cursor is None or name > cursor) and (key := parse_chunk_name(name)) is not None:
                        found.append((name, key, nbytes))
                        if len(found) > page_size:
                            break
            return found

        try:
            found = self._chunks.submit(page()).result()
        except (NixlError, TimeoutError) as error:
            raise RuntimeError(f"{self._chunks.options} cannot be listed: {error or 'it took too long'}") from error
        entries = tuple(KeyEntry(key=key.to_encoded_object_key(), size_bytes=nbytes) for _, key, nbytes in found[:page_size])
        return KeyListPage(entries=entries, next_page_token=found[page_size - 1][0] if len(found) > page_size else None)

    def get_usage(self) -> AdapterUsage:
        """Return the bytes stored and the capacity; of tiers, those of the last one."""
        if self._chunks.options.url or self._chunks.thread.current:
            return super().get_usage()
        try:
            used, capacity = self._chunks.submit(self._tiers_usage()).result()
        except ClosedError:
            return super().get_usage()
        return AdapterUsage(total_bytes_used=used, total_capacity_bytes=capacity)

    async def _tiers_usage(self) -> tuple[int, int]:
        return self._chunks.usage() or (0, 0)

    def report_status(self) -> dict[str, Any]:
        """Return whether the adapter works, where it keeps chunks, and its counters."""
        breaker = self._chunks.breaker
        with self._lock:
            found: dict[str, Any] = {"locked_key_count": len(self._locks), "failures_in_a_row": breaker.failures}
        found |= {"type": type(self).__name__, "is_healthy": not self._closed and self._chunks.thread.alive and breaker.closed}
        with suppress(ClosedError):
            if not self._chunks.thread.current:
                found |= self._chunks.submit(self._chunks.status()).result()
        usage = self.get_usage()
        return found | {"current_size_bytes": usage.total_bytes_used, "max_capacity_bytes": usage.total_capacity_bytes}

    def close(self) -> None:
        """Fail the tasks under way, write what tiers have queued, release everything. Idempotent.

        When it returns, no byte of any object moves any more; the event descriptors are closed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._chunks.close()
        finally:
            for event in (self._store_event, self._lookup_event, self._load_event):
                event.close()

    # Underneath.

    def _task(self) -> L2TaskId:
        with self._lock:
            self._next_task = task = self._next_task + 1
            first, self._adopting = not self._adopting, True
        if first:
            # Not at the start: the listeners come after it.
            self._begin(self._adopt())
        return task

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        self._chunks.submit(work)

    def _describe(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> list[Chunk]:
        chunks = []
        for key, one in zip(keys, objects, strict=True):
            chunk = Chunk(chunk_name(key), *host_bytes(one))
            family = (key.model_name, key.object_group_id)
            seen = self._seen.get(family, ())
            if not seen or seen[0] != chunk.nbytes:
                self._seen[family] = (chunk.nbytes, *(one for one in seen if one != chunk.nbytes))[:SIZES_REMEMBERED]
            chunks.append(chunk)
        return chunks

    def _failed(self, doing: str, keys: Sequence[ObjectKey], results: Sequence[Result | Chunk]) -> None:
        errors = [one for one in results if isinstance(one, NixlError)]
        if errors:
            logger.warning("%s: %s %d of %d objects failed: %s", self._chunks.name, doing, len(errors), len(keys), errors[0])

    # Telling the listeners, whose exceptions are theirs.

    def _telling(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:
            logger.exception("%s: a listener failed", self._chunks.name)

    def _tell_stored(self, stored: Mapping[ObjectKey, int]) -> None:
        if self._sizes is not None:
            stored = {key: nbytes for key, nbytes in stored.items() if key not in self._sizes}
            self._sizes |= stored
        if stored:
            self._telling(lambda: self._notify_keys_stored(list(stored), list(stored.values())))

    def _tell_deleted(self, deleted: Mapping[ObjectKey, int]) -> None:
        if self._sizes is not None:
            deleted = {key: self._sizes.pop(key, nbytes) for key, nbytes in deleted.items()}
            if self._gone is not None:
                self._gone.update(deleted)
        if deleted:
            self._telling(lambda: self._notify_keys_deleted(list(deleted), list(deleted.values())))

    def _tell_gone(self, missed: Sequence[ObjectKey]) -> None:
        if self._sizes is not None:
            self._tell_deleted({key: self._sizes[key] for key in missed if key in self._sizes})

    async def _adopt(self) -> None:
        """Tell the listeners of what is in the store from before, so that it can be evicted."""
        gone: set[ObjectKey] = set()
        self._gone = gone
        found: dict[ObjectKey, int] = {}

        def tell() -> None:
            self._tell_stored({key: nbytes for key, nbytes in found.items() if key not in gone})
            found.clear()

        try:
            async for name, nbytes in self._chunks.listing():
                if (key := parse_chunk_name(name)) is not None:
                    found[key] = nbytes
                if len(found) == ADOPTED_AT_ONCE:
                    tell()
        except NixlError as error:
            logger.warning("%s: what was stored before cannot be listed, and is not evicted: %s", self._chunks.name, error)
        finally:
            tell()
            self._gone = None


def _check_pairs(keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> None:
    if len(keys) != len(objects):
        raise ValueError(f"{len(keys)} keys but {len(objects)} objects; give one for each")
