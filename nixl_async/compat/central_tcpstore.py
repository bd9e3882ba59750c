"""The exchange of metadata through torch's TCPStore that NIXL's agents have: `nixl/agents/<label>/<agent>/NULL_AGENT` are its keys.

A TCPStore tells nobody what was deleted: whoever has fetched of an agent that is invalidated keeps it, and only later fetches find
nothing (src/core/nixl_tcpstore_metadata_backend.cpp of ai-dynamo/nixl). It needs no torch here.
"""

from __future__ import annotations

import asyncio

from nixl_async.compat.central import Central
from nixl_async.compat.core import Core
from nixl_async.compat.errors import nixlNotFoundError, refusal
from nixl_async.compat.log import get_logger
from nixl_async.compat.settings import number
from nixl_async.discovery.c10d_client import C10dStore
from nixl_async.errors import BackendError, ConfigurationError

logger = get_logger(__name__)

ENDPOINT_VARIABLE = "NIXL_TCPSTORE_ENDPOINT"
WAIT_VARIABLE = "NIXL_TCPSTORE_TIMEOUT_MS"
CALL_VARIABLE = "NIXL_TCPSTORE_OP_TIMEOUT_MS"
WAIT_MS = 30_000
"""How long the first connection may take, and a fetch waits for metadata that is not there yet."""
CALL_MS = 5_000
_TO_ALL = "NULL_AGENT"


class TCPStoreCentral(Central):
    """One agent's end of it.

    Raises:
        ConfigurationError: the endpoint is not of the form host:port.
    """

    def __init__(self, core: Core, endpoint: str) -> None:
        super().__init__(core, "a TCPStore")
        host, _, port = endpoint.strip().rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ConfigurationError(f"{ENDPOINT_VARIABLE} is {endpoint!r}; it must be of the form host:port")
        self._wait_seconds = number(WAIT_VARIABLE, WAIT_MS, 1) / 1e3
        call_seconds = number(CALL_VARIABLE, CALL_MS, 1) / 1e3
        self._store = C10dStore(host.strip("[]"), int(port), connect_seconds=self._wait_seconds, call_seconds=call_seconds)
        # What this agent writes goes in the order of the calls.
        self._writing = asyncio.Lock()
        self._written: set[str] = set()

    def _key(self, agent: str, label: str) -> str:
        return f"nixl/agents/{label}/{agent}/{_TO_ALL}"

    async def _begin(self) -> None:
        await self._store.connect()

    async def _send(self, metadata: bytes, label: str) -> None:
        async with self._writing:
            key = self._key(self._core.name, label)
            # Even if the answer is lost it may have been written.
            self._written.add(key)
            await self._store.set(key, metadata)

    async def _fetch(self, agent: str, label: str) -> None:
        key = self._key(agent, label)
        try:
            value = await self._store.get(key)
        except BackendError as error:
            logger.warning("agent %s: metadata of %s is waited for: %s", self._core.name, agent, error)
            value = None
        if value is None:
            try:
                async with asyncio.timeout(self._wait_seconds):
                    value = await self._store.appearing(key)
            except TimeoutError:
                raise refusal(nixlNotFoundError, f"nothing was under {key!r} for {self._wait_seconds:g} s") from None
        await self._load(agent, key, value)

    async def _invalidate(self) -> None:
        async with self._writing:
            for key in list(self._written):
                await self._store.delete(key)
                self._written.discard(key)

    async def _aclose(self) -> None:
        await super()._aclose()
        await self._store.aclose()
