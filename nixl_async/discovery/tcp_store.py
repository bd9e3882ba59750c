"""`tcpstore://host:port[/prefix]`: the c10d TCPStore that torch's processes meet in.

A TCPStore tells nobody of changes, but lets one wait for a key. So every change is an entry of a log, numbered by a counter, and
who watches waits for the next number. The last entry of each agent holds its value; those before are emptied by who wrote
them. There are no leases: an agent that dies stays in it until another of its name replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from functools import cached_property, partial
from importlib import import_module
from typing import Any, TypeVar

from nixl_async.discovery.store import DiscoveryStore, Seen, StoreURL
from nixl_async.errors import BackendError, ConfigurationError, MissingDependency

PREFIX = "nixl_async/agents"
CALL_SECONDS = 5.0
WAIT_SECONDS = 3600.0
"""How long the server is asked to wait for the next change before it is asked again; torch logs each time."""
CHECK_SECONDS = 10.0
"""How often it is checked meanwhile that nothing was missed."""
_NOTHING = b"[]"
_BATCH = 512
T = TypeVar("T")
_silent: set[tuple[str, int]] = set()
"""Servers that did not answer when they were asked last."""


class TCPStoreStore(DiscoveryStore):
    """Entries in a TCPStore that runs already.

    Raises:
        ConfigurationError: the URL is not of that form.
        MissingDependency: torch is not installed.
    """

    lease_seconds = 0.0

    def __init__(self, url: StoreURL) -> None:
        url.check_options()
        host, colon, port = url.hosts[0].rpartition(":") if len(url.hosts) == 1 else ("", "", "")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigurationError(f"{url} is not of the form tcpstore://host:port/prefix")
        self.server: tuple[str, int] = (host.strip("[]"), int(port))
        self._prefix = url.path.strip("/") or PREFIX
        self._watching: _Client | None = None
        self._overdue = (-1, -1)
        self._closed = False
        self._owned: dict[str, tuple[int, bytes]] = {}

    @cached_property
    def _calls(self) -> _Client:
        # One client does one thing at a time, and a watch waits: what else is to be done has its own.
        return _Client(self.server)

    async def put(self, name: str, value: bytes) -> None:
        """Publish a value."""
        await self._calls.run(lambda store: self._append(store, name, value))

    async def keep(self) -> None:
        """Return when the server has lost what was put."""
        while True:
            await asyncio.sleep(CALL_SECONDS)
            with contextlib.suppress(OSError, BackendError):
                if not await self._calls.run(self._complete):
                    return

    async def remove(self, name: str) -> None:
        """Take back what this object has put, unless another has replaced it."""
        if name in self._owned:
            await self._calls.run(lambda store: self._remove(store, name))

    async def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all entries, then each change."""
        # Of its own: what waits on an abandoned one may never return.
        client = self._watching = _Client(self.server)
        try:
            at, values = await client.run(self._all)
            yield Seen(values, whole=True)
            while True:
                records = await self._records(client, at)
                at += len(records)
                if changed := _read(records):
                    yield Seen(changed)
        finally:
            client.close()

    async def aclose(self) -> None:
        """Take back what this object has put."""
        if self._closed:
            return
        self._closed = True
        try:
            for name in list(self._owned):
                await self.remove(name)
            # Whoever still waits for the next change gets one.
            await self._calls.run(lambda store: store.set(self._key(self._head(store, 1)), _NOTHING))
            if self._watching is not None:
                await self._watching.ended
        finally:
            self._calls.close()
            await self._calls.ended

    async def _records(self, client: _Client, at: int) -> list[bytes]:
        """Return the records that come after `at`."""
        waiting = asyncio.ensure_future(client.run(partial(self._next, at=at)))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=CHECK_SECONDS)
                if done:
                    return waiting.result()
                try:
                    await self._calls.run(partial(self._check, at=at))
                except BackendError:
                    if not waiting.done():
                        raise
        finally:
            waiting.cancel()

    # On a client's thread.

    def _key(self, number: int) -> str:
        return f"{self._prefix}/log/{number}"

    def _head(self, store: Any, more: int = 0) -> int:
        return int(store.add(f"{self._prefix}/head", more))

    def _append(self, store: Any, name: str, value: bytes | None) -> None:
        before = self._owned.get(name)
        record = json.dumps([name, None if value is None else value.decode()]).encode()
        number = self._head(store, 1)
        store.set(self._key(number), record)
        if value is None:
            del self._owned[name]
        else:
            self._owned[name] = (number, record)
        if before is not None and before[0] < number:
            # After a restart of the server the old number may be another's.
            store.compare_set(self._key(before[0]), before[1].decode(), _NOTHING.decode())

    def _complete(self, store: Any) -> bool:
        for number, record in self._owned.values():
            if not store.check([self._key(number)]) or store.get(self._key(number)) != record:
                return False
        return True

    def _remove(self, store: Any, name: str) -> None:
        _, values = self._all(store)
        mine = json.loads(self._owned[name][1])[1]
        found = values.get(name)
        if found is not None and found.decode() == mine:
            self._append(store, name, None)
        else:
            del self._owned[name]

    def _all(self, store: Any) -> tuple[int, dict[str, bytes | None]]:
        head = self._head(store)
        values: dict[str, bytes | None] = {}
        for begin in range(1, head + 1, _BATCH):
            keys = [self._key(number) for number in range(begin, min(begin + _BATCH, head + 1))]
            if not store.check(keys):
                keys = [key for key in keys if store.check([key])]
            if keys:
                values.update(_read(store.multi_get(keys)))
        return head, {name: value for name, value in values.items() if value is not None}

    def _next(self, store: Any, at: int) -> list[bytes]:
        """Return the records after `at`, waiting for the first."""
        first = self._key(at + 1)
        if not store.check([first]):
            store.wait([first], timedelta(seconds=WAIT_SECONDS))
        keys = [self._key(number) for number in range(at + 1, min(self._head(store), at + _BATCH) + 1)]
        keys = keys if store.check(keys) else [first]
        return list(store.multi_get(keys))

    def _check(self, store: Any, at: int) -> None:
        """See whether it is right that nothing has come after `at` for so long."""
        head = self._head(store)
        if head < at:
            raise BackendError("the TCPStore has begun anew", backend="tcpstore")
        if head > at:
            # Who took the numbers has died before it wrote, or could not write; or the watch's own connection is dead.
            since, until = self._overdue
            if since != at:
                self._overdue = at, head
                return
            self._overdue = at, head
            numbers = range(at + 1, min(until, at + _BATCH) + 1)
            missing = [number for number in numbers if not store.check([self._key(number)])]
            for number in missing:
                store.compare_set(self._key(number), "", _NOTHING.decode())
            if at + 1 not in missing:
                raise BackendError("changes do not come through", backend="tcpstore")


class _Client:
    """One connection to a TCPStore and the thread that uses it: a daemon, for it may wait for ever."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._store: Any = None
        self._work: queue.SimpleQueue[tuple[Callable[[Any], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        threading.Thread(target=self._serve, name="nixl-discovery", daemon=True).start()

    async def run(self, work: Callable[[Any], T]) -> T:
        """Do something with the store.

        Raises:
            BackendError: it cannot be reached.
        """
        if self.ended.done():
            raise BackendError("the store is closed", backend="tcpstore")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._work.put((work, answer))
        return await answer

    def close(self) -> None:
        """End the thread when what it does is done."""
        self._work.put(None)

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, answer = item
            try:
                result, failure = self._do(work), None
            except Exception as error:
                result, failure = None, error
            self._tell(_resolve, answer, result, failure)
        self._store = None
        self._tell(_resolve, self.ended, None, None)

    def _tell(self, *call: Any) -> None:
        # The loop may have been closed while the server was waited for.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(*call)

    def _do(self, work: Callable[[Any], T]) -> T:
        distributed = _distributed()
        try:
            if self._store is None:
                if self._server in _silent:
                    # Torch would try for long, and log each time, where nobody listens. But a connection that says nothing
                    # keeps a TCPStore (torch 2.x) from everybody else for five seconds.
                    with socket.create_connection(self._server, timeout=CALL_SECONDS):
                        pass
                seconds = timedelta(seconds=CALL_SECONDS)
                self._store = distributed.TCPStore(*self._server, is_master=False, timeout=seconds, wait_for_workers=False)
                _silent.discard(self._server)
            return work(self._store)
        except (OSError, distributed.DistError, RuntimeError, ValueError) as error:
            self._store = None
            _silent.add(self._server)
            # Its frames hold the client, and whoever keeps the error would keep the connection.
            error.__traceback__ = None
            where = f"{self._server[0]}:{self._server[1]}"
            raise BackendError(f"TCPStore at {where}: {str(error).partition(chr(10))[0]}", backend="tcpstore") from error


def _resolve(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


def _distributed() -> Any:
    try:
        return import_module("torch.distributed")
    except ImportError as error:
        raise MissingDependency("tcpstore:// needs torch; install it with: pip install torch") from error


def _read(records: list[bytes]) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for record in records:
        try:
            listed = json.loads(record)
        except (ValueError, RecursionError):
            continue
        if isinstance(listed, list) and len(listed) == 2 and isinstance(listed[0], str) and isinstance(listed[1], str | None):
            # A later value comes last.
            found.pop(listed[0], None)
            found[listed[0]] = None if listed[1] is None else listed[1].encode()
    return found
