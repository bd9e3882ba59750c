r"""SGLang's HiCache storage on tiers of files and object stores: `HiCacheNixlAsync`, for `--hicache-storage-backend dynamic`.

    python -m sglang.launch_server --enable-hierarchical-cache --hicache-mem-layout page_first \
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
            "backend_name": "nixl_async", "module_path": "nixl_async.integrations.sglang_hicache",
            "class_name": "HiCacheNixlAsync", "interface_v1": 1,
            "tiers": [{"kind": "files", "path": "/nvme/kv", "nbytes": "500Gi", "direct": true},
                      {"kind": "objects", "url": "s3://bucket/kv"}]}'

SGLang calls from two threads, which wait; an agent on a loop of its own moves the bytes.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from nixl_async import Agent, ClosedError, ConfigurationError
from nixl_async.integrations.sglang_hicache.config import read_options
from nixl_async.integrations.sglang_hicache.hybrid import restorable
from nixl_async.integrations.sglang_hicache.loop import OPEN, LoopThread
from nixl_async.integrations.sglang_hicache.pages import names_of_pages, page_hash
from nixl_async.integrations.sglang_hicache.pool import PoolStore, together
from nixl_async.tiers import Outcome, TiersStatistics

if TYPE_CHECKING:
    import torch
    from sglang.srt.observability.metrics_collector import StorageMetrics

T = TypeVar("T")
logger = logging.getLogger("nixl_async.sglang_hicache")
_numbers = itertools.count(1)
KEPT_SAMPLES = 1024
"""How many calls `get_stats` tells of at most: what nobody asks for must not grow."""


class HiCacheNixlAsync(HiCacheStorage):
    """Keeps SGLang's KV pages, and what hybrid models keep beside them, in tiers: memory, files, object stores.

    The extra config has SGLang's own entries (`backend_name`, `module_path`, `class_name`, `interface_v1`, …) and:

    - `tiers`: a list, the fastest first, of
      `{"kind": "dram", "nbytes": …}` (first only),
      `{"kind": "files", "path": "/nvme/kv", "nbytes": …, "direct": false, "segment_nbytes": "256Mi"}`: segment files by io_uring,
      past the page cache with `direct`; the processes of a host share a directory,
      `{"kind": "gds", "path": …, "nbytes": …}`: the same with `direct`; pools that are in a GPU's memory go by GPUDirect Storage
      and without checksums, those in the host's by io_uring,
      `{"kind": "objects", "url": "s3://bucket/kv", "nbytes": null, "listing": true, "ask": true, "options": {…}}`: `s3://`,
      `az://`, `gs://` or `file:///directory`, shared by any number of hosts; `options` are those of `S3Backend`, `AzureBackend`
      and `GCSBackend`.
      Each may have `ttl`, in seconds, and `name`. `nbytes` bounds a tier: the least recently used pages go first. A model's pools
      share it as their pages' bytes are: those pools that are registered when the tiers are opened.
    - `zero_copy` (true): with `interface_v1`, bytes move between the tiers and the host pool itself, whatever its layout. If false,
      and for pools that do not tell where their pages are, through bounce buffers of `bounce_nbytes` (128Mi) each.
    - `namespace` (""): keeps apart what must not be shared. Model, ranks, layout, type and sizes of pages are told apart anyway.
    - `durable` (false): a page counts as stored when it would survive the machine, not when it is in the first tier.
    - `timeout` (30): seconds after which a call is given up; its pages are missed or not stored, and the memory is quiet.
    - `checksum`, `verify`, `promote` (true), `queue_nbytes` ("256Mi"): as of `Tiers`.

    Sizes are integers or strings like "64Gi". All methods may be called from any thread, and block. A page that is lost, damaged
    or late is a miss, never wrong bytes; errors of storage are logged, and counted in `statistics()`.

    Raises:
        ConfigurationError: an entry is unknown or wrong; the message lists what may be there.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        self._config = storage_config
        self._options = read_options(storage_config.extra_config)
        self._pools: dict[str, PoolStore] = {}
        self._lock = threading.RLock()
        self._loop: LoopThread | None = None
        self._agent: Agent | None = None
        self._opened: set[str] = set()
        self._closed = False
        self._samples: dict[str, deque[tuple[int, float]]] = {
            name: deque(maxlen=KEPT_SAMPLES) for name in ("prefetch", "backup")
        }

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._loop else "not opened"
        return f"<HiCacheNixlAsync, {state}: {', '.join(map(repr, self._pools.values()))}>"

    # Host pools.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool of the KV cache.

        Raises:
            ConfigurationError: its pages cannot be moved.
        """
        super().register_mem_pool_host(mem_pool_host)
        self._take(PoolName.KV, mem_pool_host, zero_copy=self._options.zero_copy and self._options.interface_v1)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Take another host pool, of what a hybrid model keeps beside its KV cache.

        Raises:
            ConfigurationError: its pages cannot be moved.
        """
        if host_pool_name != PoolName.KV:
            super().register_mem_host_pool_v2(host_pool, host_pool_name)
            self._take(host_pool_name, host_pool, zero_copy=self._options.zero_copy)

    def on_host_pools_registered(self) -> None:
        """Open the tiers, so that what is wrong with them is known before the first request.

        Raises:
            ConfigurationError, TransferError: a tier cannot be opened.
        """
        self._open()

    def _take(self, name: str, pool: Any, *, zero_copy: bool) -> None:
        store = PoolStore(
            pool,
            str(name),
            names_of_pages(self._config, self._options.namespace, str(name), pool),
            self._options,
            zero_copy=zero_copy,
        )
        with self._lock:
            old = self._pools.get(str(name))
            if old is not None and str(name) in self._opened:
                self._opened.discard(str(name))
                self._run(old.aclose())
            self._pools[str(name)] = store
            if self._loop is not None:
                self._open()

    # The loop and what lives on it.

    def _open(self) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("this HiCacheNixlAsync is closed; attach the storage backend again")
            todo = {name: store for name, store in self._pools.items() if name not in self._opened}
            if self._loop is None:
                self._loop = LoopThread("nixl-async-hicache")
                OPEN.add(self)
            try:
                if self._agent is None:
                    backends = self._options.backends
                    if any(store.on_device for store in self._pools.values()):
                        backends += ["cuda", "gds"] if self._options.gds else ["cuda"]
                    agent = Agent(f"hicache-{os.getpid()}-{next(_numbers)}", backends=backends, authenticate=False)
                    self._agent = self._loop.run(agent.__aenter__())
                total = sum(store.page_nbytes for store in self._pools.values())
                for name, store in todo.items():
                    self._loop.run(store.open(self._agent, total))
                    self._opened.add(name)
            except BaseException:
                if not self._opened:
                    self._close_loop()
                raise

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        loop = self._loop
        if loop is None:
            work.close()
            raise ClosedError("this HiCacheNixlAsync is closed, or was never opened")
        return loop.run(work)

    def close(self) -> None:
        """Write what is queued, close the tiers, end the thread. Idempotent; SGLang calls it when the backend is detached."""
        with self._lock:
            self._closed = True
            self._close_loop()

    def _close_loop(self) -> None:
        loop, self._loop = self._loop, None
        agent, self._agent = self._agent, None
        if loop is None:
            return
        OPEN.discard(self)
        try:
            for store in self._pools.values():
                loop.run(store.aclose())
            if agent is not None:
                loop.run(agent.aclose())
        finally:
            self._opened.clear()
            loop.close()

    def _store(self, name: str = PoolName.KV.value) -> PoolStore:
        if self._loop is None or str(name) not in self._opened:
            self._open()
        try:
            return self._pools[str(name)]
        except KeyError:
            had = ", ".join(self._pools) or "none"
            raise ConfigurationError(f"no host pool {str(name)!r} was registered; there are: {had}") from None

    # Pages of the KV cache.

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages of the host pool; tell of each whether it is stored. `host_indices`: a page's slots for each key."""
        if not self._config.is_storage_writer:
            # The pages are the same on all ranks, and another one stores them.
            return [True] * len(keys)
        return self._move(self._store(), "backup", keys, host_indices)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Read pages into the host pool; tell of each whether it is there now. What a missed page had is undefined."""
        return self._move(self._store(), "prefetch", keys, host_indices)

    def _move(self, store: PoolStore, what: str, keys: Sequence[str], indices: torch.Tensor | None) -> list[bool]:
        if not keys:
            return []
        checked = self._check(store, keys, indices)
        if checked is None:
            return [False] * len(keys)
        began = time.perf_counter()
        found = self._bounded(lambda run: store.move(run, _hashes(keys), checked, put=what == "backup"), len(keys))
        return self._told(store, what, found, began)

    def _check(self, store: PoolStore, keys: Sequence[str], indices: torch.Tensor | None) -> torch.Tensor | None:
        n_slots = 0 if indices is None else indices.numel()
        if indices is None or n_slots != len(keys) * store.page_size:
            logger.error(
                "pool %s: %d keys need %d slots, but %d are given", store.name, len(keys), len(keys) * store.page_size, n_slots
            )
            return None
        return indices.reshape(-1).cpu()

    def _bounded(self, work: Callable[[Any], list[Outcome]], n: int) -> list[Outcome]:
        """Have `work` move pages by what it is given, which gives up in time; what is given up is missed."""
        try:
            return work(self._within)
        except TimeoutError:
            logger.warning("storage did not answer within %g s; %d pages are given up", self._options.timeout, n)
            return [Outcome()] * n

    def _within(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop for as long as a call may take; afterwards the memory it uses is quiet.

        Raises:
            TimeoutError: it took longer.
        """

        async def limited() -> T:
            async with asyncio.timeout(self._options.timeout):
                return await work

        try:
            return self._run(limited())
        finally:
            # Nothing to do unless it was never begun.
            work.close()

    def _told(self, store: PoolStore, what: str, found: Sequence[Outcome], began: float) -> list[bool]:
        """Note what a call took, log its errors once, return what SGLang wants to know."""
        good = [one.ok for one in found]
        self._samples[what].append(
            (len(good), sum(good) * store.page_nbytes / max(1e-9, time.perf_counter() - began) / (1 << 30))
        )
        errors = [one.error for one in found if one.error is not None and not one.ok]
        if errors:
            logger.warning(
                "%s of pool %s: %d of %d pages failed, the first: %s", what, store.name, len(errors), len(good), errors[0]
            )
        return good

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """Return how many of the first pages are there."""
        if not keys:
            return 0
        store = self._store()
        return 0 if store.logical else self._asked(store.prefix(_hashes(keys)), 0)

    def exists(self, key: str) -> bool:
        """Tell whether a page is there."""
        return self.batch_exists([key]) == 1

    def _asked(self, work: Coroutine[Any, Any, T], otherwise: T) -> T:
        try:
            return self._within(work)
        except TimeoutError:
            logger.warning("storage did not tell what is there within %g s", self._options.timeout)
            return otherwise

    # Pages as tensors: what SGLang calls without interface_v1.

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store a flat tensor for each key; tell whether all are stored."""
        if not self._config.is_storage_writer or not keys:
            return True
        store = self._of_values(keys, values)
        assert values is not None
        began = time.perf_counter()
        found = self._bounded(lambda run: store.put_values(run, _hashes(keys), values), len(keys))
        return all(self._told(store, "backup", found, began))

    def batch_get(
        self, keys: list[str], target_locations: Sequence[torch.Tensor] | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        """Read pages into tensors, the given ones or new ones; `None` for those that are not there."""
        if not keys:
            return []
        store = self._of_values(keys, target_locations or keys)
        targets = target_locations or [store.new_value() for _ in keys]
        began = time.perf_counter()
        found = self._bounded(lambda run: store.get_values(run, _hashes(keys), targets), len(keys))
        good = self._told(store, "prefetch", found, began)
        return [target if here else None for target, here in zip(targets, good, strict=True)]

    def set(
        self, key: str, value: torch.Tensor | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        """Store a flat tensor."""
        return self.batch_set([key], None if value is None else [value])

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """Read a page into a tensor; `None` if it is not there."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def _of_values(self, keys: Sequence[str], values: Sequence[Any] | None) -> PoolStore:
        store = self._store()
        if store.logical or store.zero_copied:
            raise ConfigurationError(
                "set, get, batch_set and batch_get are for extra configs without interface_v1, or with zero_copy=false;"
                " this backend moves pages of the host pool itself: call batch_set_v1 and batch_get_v1"
            )
        if values is None or len(values) != len(keys):
            raise ValueError(f"{len(keys)} keys, but {0 if values is None else len(values)} tensors; give one for each")
        return store

    # Several pools.

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """Tell how long a prefix can be restored with all that these pools need for it, and every length that can.

        Raises:
            ValueError: a pool's hit policy is neither "all_pages" nor "trailing_pages".
        """
        transfers = list(pool_transfers or [])
        for transfer in transfers:
            if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
                raise ValueError(
                    f"hit policy {transfer.hit_policy} of pool {transfer.name}; all_pages and trailing_pages are known"
                )
        anchor = self._store()
        if not keys or (anchor.logical and not transfers):
            return PoolTransferResult(0, {}, [])
        unknown = [str(transfer.name) for transfer in transfers if str(transfer.name) not in self._pools]
        if unknown:
            logger.error("host pools %s were not registered: nothing of them is there", ", ".join(unknown))
            return PoolTransferResult(0, {}, [])
        stores = [self._store(transfer.name) for transfer in transfers]
        return self._asked(restorable(anchor, _hashes(keys), transfers, stores), PoolTransferResult(0, {}, []))

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Store pages of several host pools; tell of each pool's pages whether they are stored."""
        return self._move_all(transfers, "backup")

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """Read pages into several host pools; tell of each pool's pages whether they are there now."""
        return self._move_all(transfers, "prefetch")

    def _move_all(self, transfers: Sequence[PoolTransfer], what: str) -> dict[str, list[bool]]:
        results: dict[str, list[bool]] = {}
        at_once: dict[str, tuple[PoolStore, list[str], torch.Tensor]] = {}
        for transfer in transfers:
            name, keys = transfer.name, list(transfer.keys or [])
            results[name] = [False] * len(keys)
            if str(name) not in self._pools:
                logger.error("host pool %s was not registered; there are: %s", name, ", ".join(self._pools))
                continue
            store = self._store(name)
            if store.logical or not store.zero_copied:
                results[name] = self._move(store, what, keys, transfer.host_indices)
            elif keys and (checked := self._check(store, keys, transfer.host_indices)) is not None:
                at_once[name] = store, keys, checked
        if at_once:
            began = time.perf_counter()
            works = [store.moving(_hashes(keys), indices, put=what == "backup") for store, keys, indices in at_once.values()]
            found = self._asked(together(works), [[Outcome()] * len(keys) for _, keys, _ in at_once.values()])
            for (name, (store, _, _)), outcomes in zip(at_once.items(), found, strict=True):
                results[name] = self._told(store, what, outcomes, began)
        return results

    # Everything.

    def clear(self) -> None:
        """Delete this model's and rank's pages of all pools from all tiers; those of others stay.

        Raises:
            TransferError: a tier failed.
        """
        with self._lock:
            self._open()
            assert self._agent is not None
            for store in self._pools.values():
                self._run(store.clear(self._agent))

    def flush(self) -> None:
        """Wait until what is queued for lower tiers is written; what one of them did not take is logged."""
        with self._lock:
            self._open()
            stores = list(self._pools.values())
        for store in stores:
            failed = self._run(store.flush())
            if failed:
                logger.warning("pool %s: %d blocks were not written, the first: %s", store.name, len(failed), failed[0])

    def get_stats(self) -> StorageMetrics:
        """Return pages and GiB/s of each call since this was last asked, of the last 1024 at most."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        metrics = StorageMetrics()
        for name, samples in self._samples.items():
            while samples:
                n_pages, speed = samples.popleft()
                getattr(metrics, f"{name}_pgs").append(n_pages)
                getattr(metrics, f"{name}_bandwidth").append(speed)
        return metrics

    def statistics(self) -> dict[str, TiersStatistics]:
        """Return the counters of the tiers of each pool's parts: hits, misses, bytes, evictions, errors."""
        with self._lock:
            self._open()
            stores = list(self._pools.values())

        async def counted() -> dict[str, TiersStatistics]:
            return {name: found for store in stores for name, found in store.statistics().items()}

        return self._run(counted())


def _hashes(keys: Sequence[str]) -> list[bytes]:
    return [page_hash(key) for key in keys]
