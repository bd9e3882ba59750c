"""`Connection` and `Remote` of `dynamo_connect`: this worker's agent, and another worker as seen from it."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING

from nixl_async.errors import ConfigurationError
from nixl_async.integrations.dynamo_connect.descriptors import OperationError
from nixl_async.integrations.dynamo_connect.endpoint import Endpoint, read_metadata

if TYPE_CHECKING:
    from nixl_async.integrations.dynamo_connect import Connector


class Connection:
    """A connector's agent. It opens on the event loop that first uses it, and anew on another once that loop is closed.

    Raises:
        TypeError: `connector` is no connector, or `number` no integer.
        ValueError: `number` is not positive.
    """

    def __init__(self, connector: Connector, number: int) -> None:
        if not hasattr(connector, "_endpoint_options"):
            raise TypeError(f"connector is {type(connector).__name__}; it must be a Connector")
        if not isinstance(number, int):
            raise TypeError(f"number is {number!r}; it must be an int")
        if number <= 0:
            raise ValueError(f"number is {number}; it must be positive")
        self._connector = connector
        self._name = f"{connector.name}-{number}"
        self._endpoint: Endpoint | None = None
        self._remote_refs: dict[str, int] = {}
        self._closing: weakref.finalize[..., Connection] | None = None

    def __repr__(self) -> str:
        return f"Connection(is_initialized={self._endpoint is not None and self._endpoint.opened}, name={self._name!r})"

    def __str__(self) -> str:
        return self._name

    @property
    def connector(self) -> Connector:
        """The connector that it belongs to."""
        return self._connector

    @property
    def metadata(self) -> bytes:
        """What another agent needs to reach this one and all that is registered: NIXL's own form.

        Raises:
            OperationError: the connection is not open yet.
        """
        if self._endpoint is None or not self._endpoint.opened:
            raise OperationError(f"connection {self._name} is not open; await connection.initialize() first")
        return self._endpoint.metadata()

    @property
    def name(self) -> str:
        """The name of the agent."""
        return self._name

    def acquire_remote_ref(self, name: str) -> None:
        """Count one more holder of a remote worker."""
        self._remote_refs[name] = self._remote_refs.get(name, 0) + 1

    def release_remote_ref(self, name: str) -> bool:
        """Count one holder less; return whether it was the last."""
        count = self._remote_refs.get(name)
        if count is None:
            return False
        if count > 1:
            self._remote_refs[name] = count - 1
            return False
        del self._remote_refs[name]
        return True

    async def initialize(self) -> None:
        """Open the agent on the running event loop. Operations do it by themselves.

        Raises:
            ConfigurationError: it is open on another loop that still runs.
        """
        await self._opened()

    async def aclose(self) -> None:
        """Fail what is under way, wait until no byte moves, and close the agent."""
        if self._endpoint is not None:
            await self._endpoint.aclose()

    def _here(self) -> Endpoint | None:
        """Return the endpoint of the running loop, opening or open; `None` without a running loop.

        Raises:
            ConfigurationError: there is one on another loop that is not closed.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        endpoint = self._endpoint
        if endpoint is not None and endpoint.loop is not loop:
            if not endpoint.loop.is_closed():
                raise ConfigurationError(
                    f"connection {self._name} is open on another event loop; make a Connector for each loop that runs"
                )
            endpoint = None
        if endpoint is None:
            endpoint = self._endpoint = Endpoint(self._name, **self._connector._endpoint_options)
            if self._closing is not None:
                self._closing.detach()
            self._closing = weakref.finalize(self, endpoint.close_soon)
            self._closing.atexit = False
        return endpoint

    async def _opened(self) -> Endpoint:
        endpoint = self._here()
        assert endpoint is not None
        return await endpoint.ready()


class Remote:
    """Another worker, by its metadata: bytes as its agent gave them, or the text in an `RdmaMetadata`.

    The connection to it is made by the first operation with it, is shared by all, and lasts until one side ends.

    Raises:
        TypeError: `connection` or `nixl_metadata` is of another type.
        ProtocolError: the metadata is malformed.
    """

    def __init__(self, connection: Connection, nixl_metadata: bytes | str) -> None:
        self._released = True
        if not isinstance(connection, Connection):
            raise TypeError(f"connection is {type(connection).__name__}; it must be a Connection")
        if not isinstance(nixl_metadata, bytes | str):
            raise TypeError(f"nixl_metadata is {type(nixl_metadata).__name__}; it must be bytes or str")
        if not nixl_metadata:
            raise ValueError("nixl_metadata is empty; it must be what the other worker's connection gave")
        self._connection = connection
        self._known = read_metadata(nixl_metadata)
        connection.acquire_remote_ref(self._known.name)
        self._released = False

    def __del__(self) -> None:
        self._release()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self._release()

    def __repr__(self) -> str:
        return f"Remote(name={self.name}, connection={self._connection.name})"

    def __str__(self) -> str:
        return self.name

    @property
    def connection(self) -> Connection:
        """The connection by which it is reached."""
        return self._connection

    @property
    def name(self) -> str:
        """The other worker's agent's name."""
        return self._known.name

    def _release(self) -> None:
        if not self._released:
            self._released = True
            self._connection.release_remote_ref(self.name)
