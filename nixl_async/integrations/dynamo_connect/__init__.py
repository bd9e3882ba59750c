"""Dynamo's `nixl_connect` on this library: the same names and calls, which finish by events, can fail, and can be awaited.

    from nixl_async.integrations import dynamo_connect as nixl_connect

One worker exposes memory and gives the operation's metadata to another, by whatever way the application has; the other moves the
bytes. What differs from `dynamo.nixl_connect` (of ai-dynamo/dynamo 1.6): an operation begins when it is made; its end is an event;
the passive side fails when its peer does, gives up, or is late; operations are awaitables and async context managers; cancelling
a wait cancels the transfer and returns when the memory is quiet; a descriptor's registration is kept as long as the descriptor;
errors are this library's (`PeerLost`, `NotFoundError`, `RegistrationError`, …, all `NixlError`). Dynamo itself is not needed, and
the metadata is one for both: workers on either module, and on stock NIXL, read and write each other's memory.

Whoever has an operation's metadata may connect to the worker, unless `token` or NIXL_ASYNC_TOKEN gives both sides a secret.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from typing import Any

from nixl_async.cuda import device_count
from nixl_async.integrations.dynamo_connect.connection import Connection, Remote
from nixl_async.integrations.dynamo_connect.descriptors import (
    Descriptor,
    Device,
    DeviceKind,
    OperationError,
    OperationKind,
    OperationStatus,
    RdmaMetadata,
    SerializedDescriptor,
)
from nixl_async.integrations.dynamo_connect.endpoint import OperationTimeout
from nixl_async.integrations.dynamo_connect.operations import (
    AbstractOperation,
    ActiveOperation,
    PassiveOperation,
    ReadableOperation,
    ReadOperation,
    WritableOperation,
    WriteOperation,
)

__all__ = [
    "AbstractOperation",
    "ActiveOperation",
    "Connection",
    "Connector",
    "Descriptor",
    "Device",
    "DeviceKind",
    "OperationError",
    "OperationKind",
    "OperationStatus",
    "OperationTimeout",
    "PassiveOperation",
    "RdmaMetadata",
    "ReadOperation",
    "ReadableOperation",
    "Remote",
    "SerializedDescriptor",
    "WritableOperation",
    "WriteOperation",
]


class Connector:
    """A worker's way to read from and write to others: it makes operations.

    `worker_id` names the worker and must be unique (default: a random one). `timeout` is how long passive operations wait for
    their peer, in seconds (default: without end). `token`, `host` (the address to serve at and to tell peers) and `backends` are
    the agent's. Use it as `async with Connector() as connector:`, or call `aclose`: both wait until no byte moves.
    One connector belongs to one event loop that runs.
    """

    def __init__(
        self,
        worker_id: str | None = None,
        *,
        timeout: float | None = None,
        token: str | bytes | None = None,
        host: str | None = None,
        backends: Sequence[Any] | None = None,
    ) -> None:
        if worker_id is None:
            worker_id = uuid.uuid4().hex
        if not isinstance(worker_id, str) or not worker_id:
            raise TypeError(f"worker_id is {worker_id!r}; it must be a string that is not empty, or None")
        self._worker_id = worker_id
        self._hostname = socket.gethostname()
        self._timeout = timeout
        self._endpoint_options: dict[str, Any] = {"token": token, "host": host, "backends": backends}
        self._connection_count = 0
        self._shared_connection: Connection | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Connector) and self._worker_id == other._worker_id

    def __hash__(self) -> int:
        return hash(self._worker_id)

    def __repr__(self) -> str:
        return f"Connector(worker_id={self._worker_id!r}, hostname={self._hostname})"

    def __str__(self) -> str:
        return self._worker_id

    async def __aenter__(self) -> Connector:
        await (await self._create_connection()).initialize()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End what is under way, wait until no byte moves, and close the agent. The next operation opens another one."""
        connection, self._shared_connection = self._shared_connection, None
        if connection is not None:
            await connection.aclose()

    @property
    def hostname(self) -> str:
        """The name of this host."""
        return self._hostname

    @property
    def is_cuda_available(self) -> bool:
        """Whether this process sees a CUDA device."""
        return device_count() > 0

    @property
    def name(self) -> str:
        """The worker's name."""
        return self._worker_id

    async def initialize(self) -> None:
        """Do nothing: the first operation opens the agent."""

    async def begin_read(
        self, remote_metadata: RdmaMetadata, local_descriptors: Descriptor | list[Descriptor]
    ) -> ReadOperation:
        """Start to read what another worker's readable operation exposes; the bytes move when this returns.

        Raises:
            OperationError: the metadata is of a writable operation.
            RegistrationError: the local memory cannot be registered.
            PeerLost: the other worker cannot be reached.
            NotFoundError: the other worker has withdrawn the memory.
        """
        self._check(remote_metadata, OperationKind.READ)
        return await ReadOperation(await self._create_connection(), remote_metadata, local_descriptors)._begun()

    async def begin_write(
        self, local_descriptors: Descriptor | list[Descriptor], remote_metadata: RdmaMetadata
    ) -> WriteOperation:
        """Start to write to what another worker's writable operation exposes; the bytes move when this returns.

        Raises:
            OperationError: the metadata is of a readable operation.
            RegistrationError: the local memory cannot be registered.
            PeerLost: the other worker cannot be reached.
            NotFoundError: the other worker has withdrawn the memory.
        """
        self._check(remote_metadata, OperationKind.WRITE)
        return await WriteOperation(await self._create_connection(), local_descriptors, remote_metadata)._begun()

    async def create_readable(
        self, local_descriptors: Descriptor | list[Descriptor], *, timeout: float | None = None
    ) -> ReadableOperation:
        """Expose memory to be read by whoever gets the operation's metadata; `timeout` in seconds, else the connector's.

        Raises:
            RegistrationError: the memory cannot be registered.
        """
        bound = self._timeout if timeout is None else timeout
        return await ReadableOperation(await self._create_connection(), local_descriptors, timeout=bound)._begun()

    async def create_writable(
        self, local_descriptors: Descriptor | list[Descriptor], *, timeout: float | None = None
    ) -> WritableOperation:
        """Expose memory to be written by whoever gets the operation's metadata; `timeout` in seconds, else the connector's.

        Raises:
            OperationError: the memory is read-only.
            RegistrationError: the memory cannot be registered.
        """
        bound = self._timeout if timeout is None else timeout
        return await WritableOperation(await self._create_connection(), local_descriptors, timeout=bound)._begun()

    @staticmethod
    def _check(metadata: RdmaMetadata, kind: OperationKind) -> None:
        if not isinstance(metadata, RdmaMetadata):
            raise TypeError(f"remote_metadata is {type(metadata).__name__}; it must be RdmaMetadata")
        if metadata.operation_kind != kind:
            wanted = "readable" if kind is OperationKind.READ else "writable"
            raise OperationError(f"the metadata is not of a {wanted} operation of another worker")

    async def _create_connection(self) -> Connection:
        """Return the connector's one connection. It opens with the first operation, on that operation's loop."""
        if self._shared_connection is None:
            self._connection_count += 1
            self._shared_connection = Connection(self, self._connection_count)
        return self._shared_connection
