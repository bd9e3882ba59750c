"""Servers of objects for a whole test run, each on a thread and loop of its own, and stores in them that nobody else uses; etcd."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

import pytest

from nixl_async import MissingDependency
from nixl_async.testing.servers import Server
from tests.compat.etcd_server import INSTALL, EtcdServer, program

_numbers = itertools.count(1)


@contextmanager
def etcd_running(directory: Path) -> Iterator[EtcdServer]:
    """Run an etcd until the block ends; skip the test that asks for it when it is not here."""
    if program() is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    server = EtcdServer(directory)
    server.start()
    yield server
    server.stop()


@contextmanager
def running(make: Callable[[], AbstractAsyncContextManager[Server]]) -> Iterator[Server]:
    """Run a server on a thread until the block ends; skip the test that asks for it when its program is not here."""
    ready = threading.Event()
    stops: list[Callable[[], object]] = []
    found: list[Server] = []
    failed: list[BaseException] = []

    async def serve() -> None:
        try:
            async with make() as server:
                stop, loop = asyncio.Event(), asyncio.get_running_loop()
                stops.append(lambda: loop.call_soon_threadsafe(stop.set))
                found.append(server)
                ready.set()
                await stop.wait()
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="server")
    thread.start()
    ready.wait()
    if failed:
        thread.join()
        if isinstance(failed[0], MissingDependency):
            pytest.skip(str(failed[0]))
        raise failed[0]
    try:
        yield found[0]
    finally:
        stops[0]()
        thread.join()


def fresh_prefix() -> str:
    """Return a prefix that no other test uses."""
    return f"test-{next(_numbers)}/"


def s3_options(server: Server) -> dict[str, object]:
    """Return the options for a server that speaks S3."""
    return {
        "endpoint_url": server.endpoint,
        "access_key": server.key_id,
        "secret_key": server.secret,
        "region": server.region,
        "addressing": "path",
    }
