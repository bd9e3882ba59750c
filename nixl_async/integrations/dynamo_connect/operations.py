"""Operations of `dynamo_connect`: a passive one exposes memory, an active one at another worker moves the bytes.

Both begin when they are made, end by events, are awaited any number of times, and are final only when no byte moves any more.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, Self

from nixl_async.handle import Transfer
from nixl_async.integrations.dynamo_connect.connection import Connection, Remote
from nixl_async.integrations.dynamo_connect.descriptors import (
    FINAL,
    Descriptor,
    OperationError,
    OperationKind,
    OperationStatus,
    RdmaMetadata,
)
from nixl_async.integrations.dynamo_connect.endpoint import BEGIN, FAIL, OURS, Endpoint, Exposure, Registration

logger = logging.getLogger("nixl_async.integrations.dynamo_connect")

BEGIN_SECONDS = 1e-3
BEGIN_NBYTES = 4 << 20
"""The passive side is told at once that a larger transfer has begun, and of others when they have taken that long."""


class AbstractOperation(ABC):
    """What the four operations have in common: awaitable, an (async) context manager, final once.

    `await operation` raises `CancelledError` for one that was cancelled; `wait_for_completion()` returns then, as Dynamo's does.
    """

    def __init__(
        self,
        connection: Connection,
        operation_kind: OperationKind,
        local_descriptors: Descriptor | list[Descriptor],
        remote_descriptors: Descriptor | list[Descriptor] | None,
        notification_key: str | None,
    ) -> None:
        if not isinstance(connection, Connection):
            raise TypeError(f"connection is {type(connection).__name__}; it must be a Connection")
        if operation_kind not in (OperationKind.READ, OperationKind.WRITE):
            raise ValueError(f"operation_kind is {operation_kind!r}; it must be READ or WRITE")
        if notification_key is not None and not isinstance(notification_key, str):
            raise TypeError(f"notification_key is {type(notification_key).__name__}; it must be a str")
        if notification_key == "":
            raise ValueError("notification_key is empty; the other worker knows the operation by it")
        self._connection = connection
        self._operation_kind = operation_kind
        self._local_desc_list = local_descriptors
        self._remote_desc_list = remote_descriptors
        self._locals = _listed("local_descriptors", local_descriptors)
        if remote_descriptors is not None:
            self._remotes = _listed("remote_descriptors", remote_descriptors)
            _check_equal(self._locals, self._remotes)
        self._notification_key = notification_key or ""
        self._status = OperationStatus.UNINITIALIZED
        self._error: BaseException | None = None
        self._final: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starting: asyncio.Task[None] | None = None
        for descriptor in self._locals:
            descriptor._bind(connection)
        for descriptor in self._locals:
            descriptor._operations += 1

    # What kinds of operations do differently.

    @abstractmethod
    def _start_now(self, endpoint: Endpoint, registrations: list[Registration]) -> bool:
        """Begin without waiting, if all that it takes is there; return whether it is begun."""

    @abstractmethod
    async def _start(self, endpoint: Endpoint, registrations: list[Registration]) -> None:
        """Begin."""

    @abstractmethod
    def cancel(self) -> None:
        """Give the operation up; it is final when no byte moves any more. No effect on one that is final."""

    # Beginning.

    def _begin(self) -> None:
        try:
            endpoint = self._connection._here()
            assert endpoint is not None
            registrations = [descriptor._registered_at(endpoint) for descriptor in self._locals]
            ready = endpoint.opened and all(one.region is not None for one in registrations)
            if not (ready and self._start_now(endpoint, registrations)):
                self._starting = endpoint.spawn(self._prepare(endpoint, registrations))
                self._starting.add_done_callback(self._started)
        except BaseException as error:
            self._end(OperationStatus.ERRORED, error)
            raise

    async def _prepare(self, endpoint: Endpoint, registrations: list[Registration]) -> None:
        await endpoint.ready()
        for registration in registrations:
            await endpoint.registered(registration)
        await self._start(endpoint, registrations)

    def _started(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._end(OperationStatus.CANCELLED)
        elif (error := task.exception()) is not None:
            self._end(OperationStatus.ERRORED, error)

    async def _begun(self) -> Self:
        """Wait until it has begun; raise why it could not."""
        starting = self._starting
        if starting is not None and not starting.done():
            try:
                await asyncio.wait([starting])
            except asyncio.CancelledError:
                self.cancel()
                await self._quiet()
                raise
        if self._status is OperationStatus.ERRORED and self._error is not None:
            raise self._error
        return self

    # Ending.

    def _end(self, status: OperationStatus, error: BaseException | None = None) -> None:
        if self._status in FINAL:
            return
        self._status, self._error = status, error
        for descriptor in self._locals:
            descriptor._operations -= 1
        if not self._final.done():
            self._final.set_result(None)

    async def _quiet(self) -> None:
        """Wait until it is final, however often the waiting task is cancelled; then raise that cancellation."""
        cancelled: asyncio.CancelledError | None = None
        while not self._final.done():
            try:
                await asyncio.shield(self._final)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _wait(self) -> None:
        if not self._final.done():
            await asyncio.shield(self._final)
        if self._error is not None:
            raise self._error

    def __await__(self) -> Generator[Any, None, list[Descriptor]]:
        return self._result().__await__()

    async def _result(self) -> list[Descriptor]:
        await self.wait_for_completion()
        if self._status is OperationStatus.CANCELLED:
            raise asyncio.CancelledError
        return list(self._locals)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Give the operation up if it is not final, and return when it is: its memory is the caller's again."""
        self.cancel()
        await self._quiet()
        if self._status is OperationStatus.ERRORED and exc[0] is None:
            logger.warning("%r is left behind, failed: %s", self, self._error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the operation up if it is not final; what moves yet ends in the background: `async with` waits for that."""
        self.cancel()

    @property
    def connection(self) -> Connection:
        """The local connection."""
        return self._connection

    @property
    def operation_kind(self) -> OperationKind:
        """Which way the bytes go, as the active side sees it."""
        return self._operation_kind

    @property
    def status(self) -> OperationStatus:
        """Where the operation is in its life."""
        return self._status

    @abstractmethod
    async def wait_for_completion(self) -> None:
        """Wait until the operation is final; raise its error if it failed, return if it was cancelled."""


def _listed(what: str, given: Descriptor | list[Descriptor]) -> list[Descriptor]:
    listed = [given] if isinstance(given, Descriptor) else given
    if not isinstance(listed, list) or not all(isinstance(one, Descriptor) for one in listed):
        raise TypeError(f"{what} must be a Descriptor or a list of them, not {type(given).__name__}")
    if not listed:
        raise ValueError(f"{what} is an empty list; give at least one descriptor")
    if len(listed) > 1 and len(kinds := {str(one.device.kind) for one in listed}) > 1:
        raise ValueError(f"{what} are in memory of the kinds {sorted(kinds)}; an operation has one kind on each side")
    return listed


def _check_equal(ours: list[Descriptor], theirs: list[Descriptor]) -> None:
    if len(ours) != len(theirs):
        raise ValueError(f"there are {len(ours)} local and {len(theirs)} remote descriptors; give as many of each")
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.size != other.size:
            raise ValueError(f"local descriptor {index} has {one.size} bytes, its remote one {other.size}; make them equal")


class ActiveOperation(AbstractOperation):
    """An operation that moves the bytes: it starts when it is made.

    Cancelling a task that waits for it cancels the transfer; the wait returns when no byte moves any more.

    Raises:
        ValueError: the two sides differ in the number of descriptors, or in the bytes of one.
    """

    def __init__(
        self,
        remote: Remote,
        operation_kind: OperationKind,
        local_descriptors: Descriptor | list[Descriptor],
        remote_descriptors: Descriptor | list[Descriptor],
        notification_key: str,
    ) -> None:
        if not isinstance(remote, Remote):
            raise TypeError(f"remote is {type(remote).__name__}; it must be a Remote")
        if not notification_key:
            raise ValueError("notification_key is empty; the other worker knows the operation by it")
        super().__init__(remote.connection, operation_kind, local_descriptors, remote_descriptors, notification_key)
        self._remote = remote
        self._transfer: Transfer | None = None
        self._beginning: asyncio.TimerHandle | None = None
        self._begin()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(operation_kind={self._operation_kind}, local_descriptors={self._local_desc_list},"
            f" remote_descriptors={self._remote_desc_list}, notification_key={self._notification_key!r},"
            f" remote={self._remote.name!r}, status={self._status})"
        )

    @property
    def remote(self) -> Remote:
        """The other worker."""
        return self._remote

    def _wanted(self) -> list[tuple[int, int]]:
        return [(one.ptr, one.size) for one in self._remotes]

    def _start_now(self, endpoint: Endpoint, registrations: list[Registration]) -> bool:
        known = self._remote._known
        peer = endpoint.peer_now(known)
        theirs = None if peer is None else endpoint.places_now(peer, known, self._wanted())
        if theirs is None:
            return False
        self._submit(endpoint, registrations, theirs)
        return True

    async def _start(self, endpoint: Endpoint, registrations: list[Registration]) -> None:
        known = self._remote._known
        peer = await endpoint.reach(known)
        self._submit(endpoint, registrations, await endpoint.places(peer, known, self._wanted()))

    def _submit(self, endpoint: Endpoint, registrations: list[Registration], theirs: list[Any]) -> None:
        ours = [
            one.bytes_at(descriptor.ptr, descriptor.size) for one, descriptor in zip(registrations, self._locals, strict=True)
        ]
        key = self._notification_key.encode()
        self._transfer = endpoint.move(ours, theirs, write=self._operation_kind is OperationKind.WRITE, key=key)
        self._status = OperationStatus.IN_PROGRESS
        self._transfer.add_done_callback(lambda transfer: self._ended(endpoint, transfer))
        if self._notification_key.startswith(OURS):
            # Most small transfers are over by then, and their end tells it all.
            delay = BEGIN_SECONDS if self._transfer.nbytes <= BEGIN_NBYTES else 0
            self._beginning = endpoint.loop.call_later(delay, endpoint.tell, self._remote.name, BEGIN + key)

    def _ended(self, endpoint: Endpoint, transfer: Transfer) -> None:
        if self._beginning is not None:
            self._beginning.cancel()
        if transfer.cancelled():
            self._tell_failed(endpoint, "it was cancelled")
            self._end(OperationStatus.CANCELLED)
        elif (error := transfer.exception()) is not None:
            self._tell_failed(endpoint, error)
            self._end(OperationStatus.ERRORED, error)
        else:
            self._end(OperationStatus.COMPLETE)

    def _tell_failed(self, endpoint: Endpoint, why: object) -> None:
        # What failed before it began is the caller's to try again: the passive side knows nothing of it.
        if self._notification_key.startswith(OURS) and not endpoint.closed:
            endpoint.tell(self._remote.name, FAIL + f"{self._notification_key} {why}".encode())

    def cancel(self) -> None:
        """Cancel the transfer; the operation is final when no byte moves any more. No effect on one that is final."""
        if self._transfer is not None:
            self._transfer.cancel()
        elif self._starting is not None:
            self._starting.cancel()

    async def wait_for_completion(self) -> None:
        """Wait until the operation is final; raise its error if it failed, return if it was cancelled.

        When the waiting task is cancelled, a timeout included, so is the transfer: no byte moves any more when this raises.

        Raises:
            TransferError: the transfer failed; `PeerLost` if the other worker is gone.
        """
        try:
            await self._wait()
        except asyncio.CancelledError:
            self.cancel()
            await self._quiet()
            raise


class PassiveOperation(AbstractOperation):
    """An operation that another worker carries out: its metadata says how, and goes to that worker by the application.

    It fails when the worker that began it is gone or gives it up (if that runs this library), or when `timeout` seconds are
    over. From then on no peer can touch the memory. Cancelling a task that waits for it leaves it as it is.
    """

    def __init__(
        self,
        connection: Connection,
        operation_kind: OperationKind,
        local_descriptors: Descriptor | list[Descriptor],
        *,
        timeout: float | None = None,
    ) -> None:
        self._exposure: Exposure | None = None
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}; give seconds, or None to wait without end")
        super().__init__(connection, operation_kind, local_descriptors, None, None)
        self._timeout = timeout
        self._endpoint: Endpoint | None = None
        self._serialized_request: dict[bool, RdmaMetadata] = {}
        self._begin()

    def __del__(self) -> None:
        exposure = self._exposure
        if exposure is not None and not exposure.ending and self._endpoint is not None:
            self._endpoint.abandon_soon(exposure)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(operation_kind={self._operation_kind}, local_descriptors={self._local_desc_list},"
            f" notification_key={self._notification_key!r}, status={self._status})"
        )

    def _start_now(self, endpoint: Endpoint, registrations: list[Registration]) -> bool:
        if self._operation_kind is OperationKind.WRITE:
            for registration in registrations:
                if registration.place.readonly:
                    raise OperationError(
                        f"{registration.place.nbytes} bytes to be written are read-only; give writable memory"
                    )
        self._endpoint = endpoint
        self._exposure = exposure = endpoint.expose(registrations, self._timeout)
        self._notification_key = exposure.key.decode()
        self._status = OperationStatus.INITIALIZED
        # Not by a reference of its own: an operation that nobody holds any more is given up.
        this = weakref.ref(self)
        exposure.ended.add_done_callback(lambda _: None if (operation := this()) is None else operation._over(exposure))
        return True

    async def _start(self, endpoint: Endpoint, registrations: list[Registration]) -> None:
        self._start_now(endpoint, registrations)

    def _over(self, exposure: Exposure) -> None:
        if exposure.complete:
            self._end(OperationStatus.COMPLETE)
        elif exposure.error is not None:
            self._end(OperationStatus.ERRORED, exposure.error)
        else:
            self._end(OperationStatus.CANCELLED)

    @property
    def status(self) -> OperationStatus:
        """Where the operation is in its life; in progress from when a worker has begun it, as far as that says so."""
        if self._status is OperationStatus.INITIALIZED and self._exposure is not None and self._exposure.peer is not None:
            return OperationStatus.IN_PROGRESS
        return self._status

    def cancel(self) -> None:
        """Withdraw the memory; the operation is final when no peer can touch it any more. No effect on one that is final."""
        if self._exposure is not None and self._endpoint is not None:
            self._endpoint.fail(self._exposure, None)
        elif self._starting is not None:
            self._starting.cancel()

    def metadata(self, hex_encode: bool = False) -> RdmaMetadata:
        """Return what the other worker needs; `hex_encode` writes the agent's part in hex, as earlier versions of Dynamo do.

        Raises:
            OperationError: the memory is not registered yet: make the operation by the connector.
        """
        if self._exposure is None or self._endpoint is None:
            raise OperationError(f"{type(self).__name__} has not begun; make it by awaiting the connector")
        made = self._serialized_request.get(hex_encode)
        if made is None:
            text = self._endpoint.encode(self._exposure.registrations)
            made = RdmaMetadata(
                descriptors=[one.metadata for one in self._locals],
                nixl_metadata=_as_hex(text) if hex_encode else text,
                notification_key=self._notification_key,
                operation_kind=int(self._operation_kind),
            )
            self._serialized_request[hex_encode] = made
        return made

    async def wait_for_completion(self) -> None:
        """Wait until the operation is final; raise its error if it failed, return if it was cancelled.

        Raises:
            PeerLost: the worker that began it is gone.
            Aborted: the worker that began it gave it up.
            OperationTimeout: nobody completed it in time.
        """
        await self._wait()


def _as_hex(text: str) -> str:
    return base64.b64decode(text[len("b64:") :]).hex()


class ReadOperation(ActiveOperation):
    """A read of the memory that another worker's `ReadableOperation` exposes.

    Raises:
        ValueError: the metadata is of a writable operation.
    """

    def __init__(
        self, connection: Connection, remote_metadata: RdmaMetadata, local_descriptors: Descriptor | list[Descriptor]
    ) -> None:
        remote = _remote_of(connection, remote_metadata, OperationKind.READ)
        theirs = remote_metadata.to_descriptors()
        super().__init__(remote, OperationKind.READ, local_descriptors, theirs, remote_metadata.notification_key)

    def results(self) -> list[Descriptor]:
        """Return the descriptors of the bytes that were read.

        Raises:
            OperationError: the read is not complete.
        """
        if self._status is not OperationStatus.COMPLETE:
            raise OperationError(f"the read is {self._status.name}; its results are there when it is COMPLETE")
        return list(self._locals)


class WriteOperation(ActiveOperation):
    """A write to the memory that another worker's `WritableOperation` exposes.

    Raises:
        ValueError: the metadata is of a readable operation.
    """

    def __init__(
        self, connection: Connection, local_descriptors: Descriptor | list[Descriptor], remote_metadata: RdmaMetadata
    ) -> None:
        remote = _remote_of(connection, remote_metadata, OperationKind.WRITE)
        theirs = remote_metadata.to_descriptors()
        super().__init__(remote, OperationKind.WRITE, local_descriptors, theirs, remote_metadata.notification_key)


class ReadableOperation(PassiveOperation):
    """Memory that another worker reads, once."""

    def __init__(
        self, connection: Connection, local_descriptors: Descriptor | list[Descriptor], *, timeout: float | None = None
    ) -> None:
        super().__init__(connection, OperationKind.READ, local_descriptors, timeout=timeout)


class WritableOperation(PassiveOperation):
    """Memory that another worker writes, once."""

    def __init__(
        self, connection: Connection, local_descriptors: Descriptor | list[Descriptor], *, timeout: float | None = None
    ) -> None:
        super().__init__(connection, OperationKind.WRITE, local_descriptors, timeout=timeout)


def _remote_of(connection: Connection, metadata: RdmaMetadata, kind: OperationKind) -> Remote:
    if not isinstance(metadata, RdmaMetadata):
        raise TypeError(f"remote_metadata is {type(metadata).__name__}; it must be RdmaMetadata")
    if metadata.operation_kind != kind:
        has = OperationKind(metadata.operation_kind)
        raise ValueError(f"the metadata is of an operation to {has.name}; a {kind.name} needs one of its own kind")
    return Remote(connection, metadata.nixl_metadata)
