"""What stores that all agents reach have in common for NIXL's exchange of metadata by name: etcd, and torch's TCPStore.

Calls return at once; what goes wrong is logged. Whoever can read the store can connect to the agents in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial

from nixl_async.compat import blobs
from nixl_async.compat.background import Background
from nixl_async.compat.core import Core
from nixl_async.compat.engine import ENGINE
from nixl_async.compat.errors import nixlMismatchError, refusal
from nixl_async.errors import ProtocolError

LABEL = "metadata"
"""The label of an agent's whole metadata."""


class Central(ABC):
    """One agent's end of it. Its coroutines run on the engine's loop."""

    def __init__(self, core: Core, store: str) -> None:
        self._core = core
        self._background = Background(core.name, f"metadata is not exchanged through {store}")

    async def open(self) -> None:
        """Begin, and end with the agent."""
        self._core.on_close.append(self._aclose)
        self._background.spawn(self._begin)

    # For any thread.

    def send_soon(self, metadata: bytes, label: str = LABEL) -> None:
        """Write metadata under a label."""
        self._soon(partial(self._send, metadata, label))

    def fetch_soon(self, agent: str, label: str = "") -> None:
        """Load an agent's metadata, as soon as it is there."""
        self._soon(partial(self._fetch, agent, label or LABEL))

    def invalidate_soon(self) -> None:
        """Delete all that this agent wrote."""
        self._soon(self._invalidate)

    def _soon(self, work: Callable[[], Awaitable[None]]) -> None:
        ENGINE.call(self._background.spawn, work)

    # Inside.

    async def _load(self, agent: str, where: str, value: bytes) -> None:
        """Load what was found; refuse what is another agent's."""
        try:
            found = blobs.read(value).name
        except (ProtocolError, UnicodeDecodeError) as error:
            raise refusal(nixlMismatchError, f"what is under {where!r} is no agent's metadata: {error}") from error
        if found != agent:
            raise refusal(nixlMismatchError, f"what is under {where!r} is the metadata of another agent, {found!r}")
        await self._core.load_soon(value)

    async def _aclose(self) -> None:
        await self._background.aclose()

    @abstractmethod
    async def _begin(self) -> None: ...

    @abstractmethod
    async def _send(self, metadata: bytes, label: str) -> None: ...

    @abstractmethod
    async def _fetch(self, agent: str, label: str) -> None: ...

    @abstractmethod
    async def _invalidate(self) -> None: ...
