"""The exchange of metadata through etcd that NIXL's agents have: by name, under `<namespace>/<agent>/<label>`.

Each agent writes an empty value under its name, then its metadata under labels; when that empty value is deleted, whoever fetched
of the agent forgets it (src/core/nixl_etcd_metadata_backend.cpp of ai-dynamo/nixl, whose keys and order these are).
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from nixl_async.compat.central import Central
from nixl_async.compat.core import Core
from nixl_async.compat.errors import nixlNotFoundError, refusal
from nixl_async.compat.log import get_logger
from nixl_async.discovery.etcd_client import CompactedError, Etcd
from nixl_async.errors import BackendError

logger = get_logger(__name__)

ENDPOINTS_VARIABLE = "NIXL_ETCD_ENDPOINTS"
NAMESPACE_VARIABLE = "NIXL_ETCD_NAMESPACE"
NAMESPACE = "/nixl/agents/"
AGAIN_SECONDS = (0.1, 5.0)
"""How long to wait before a lost watch is begun again: at first, and at most."""


class EtcdCentral(Central):
    """One agent's end of it."""

    def __init__(self, core: Core, endpoints: str, namespace: str, wait_seconds: float) -> None:
        super().__init__(core, "etcd")
        self._etcd = Etcd(endpoints)
        self._namespace = namespace
        self._wait_seconds = wait_seconds
        # What this agent writes goes in the order of the calls.
        self._writing = asyncio.Lock()
        self._announced = False
        self._watching = False
        # Whom we fetched, or are about to; and at which revision one of them was deleted last.
        self._followed: set[str] = set()
        self._deleted: dict[str, int] = {}

    def _key(self, agent: str, label: str) -> bytes:
        return f"{self._namespace}/{agent}/{label}".encode()

    async def _begin(self) -> None:
        async with self._writing:
            await self._announce_once()

    async def _announce_once(self) -> None:
        if not self._announced:
            await self._etcd.put(self._key(self._core.name, ""), b"")
            self._announced = True

    async def _send(self, metadata: bytes, label: str) -> None:
        async with self._writing:
            await self._announce_once()
            await self._etcd.put(self._key(self._core.name, label), metadata)

    async def _invalidate(self) -> None:
        async with self._writing:
            if self._announced:
                await self._etcd.delete_prefix(self._key(self._core.name, ""))
                self._announced = False

    async def _fetch(self, agent: str, label: str) -> None:
        key = self._key(agent, label)
        self._followed.add(agent)
        value, revision = await self._etcd.get(key)
        if not self._watching:
            self._watching = True
            self._background.spawn(partial(self._watch, revision + 1))
        if not value:
            value, revision = await self._appearing(key, revision + 1)
        await self._load(agent, key.decode(), value)
        if self._deleted.get(agent, 0) > revision:
            await self._core.forget_soon(agent)

    async def _appearing(self, key: bytes, revision: int) -> tuple[bytes, int]:
        """Wait until a key has a value."""
        try:
            async with asyncio.timeout(self._wait_seconds), contextlib.aclosing(self._etcd.watch(key, revision)) as events:
                async for event in events:
                    if event.value:
                        return event.value, event.revision
        except TimeoutError:
            pass
        raise refusal(nixlNotFoundError, f"nothing was under {key.decode()!r} for {self._wait_seconds:g} s")

    async def _watch(self, revision: int) -> None:
        """Forget agents whose metadata is deleted."""
        again, most = AGAIN_SECONDS
        while True:
            try:
                events = self._etcd.watch(f"{self._namespace}/".encode(), revision, prefix=True, deletes_only=True)
                async with contextlib.aclosing(events):
                    async for event in events:
                        revision, again = event.revision + 1, AGAIN_SECONDS[0]
                        await self._gone(event.key, event.revision)
            except CompactedError as error:
                revision = max(error.revision, await self._look())
                continue
            except (OSError, BackendError) as error:
                logger.warning("agent %s: etcd is not watched for %g s: %s", self._core.name, again, error)
            await asyncio.sleep(again)
            again = min(2 * again, most)

    async def _gone(self, key: bytes, revision: int) -> None:
        name = key.decode(errors="replace").removeprefix(f"{self._namespace}/")
        agent, slash, label = name.rpartition("/")
        if slash and not label and agent in self._followed:
            self._deleted[agent] = revision
            await self._core.forget_soon(agent)

    async def _look(self) -> int:
        """Forget agents that were deleted while nobody watched; return the next revision to watch from."""
        seen = 0
        for agent in list(self._followed):
            value, revision = await self._etcd.get(self._key(agent, ""))
            seen = max(seen, revision)
            if value is None:
                self._deleted[agent] = revision
                await self._core.forget_soon(agent)
        return seen + 1
