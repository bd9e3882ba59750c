"""Servers of objects for the length of a suite: started here on the loopback address, and ended with the suite or the bench."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from bench.process import WorkerError
from bench.session import Settings
from nixl_async import MissingDependency
from nixl_async.testing import servers
from nixl_async.testing.servers import ACCESS_KEY, SECRET_KEY, Server

MEMORY = Path("/dev/shm")
SPARE_NBYTES = 1 << 30
BUCKET = "bench"
SIGNED_SECONDS = 6 * 3600
NGINX, JUICEFS, AZURITE = "nginx", "juicefs", "azurite"


@contextmanager
def room(nbytes: int, *, memory: bool = True) -> Iterator[Path]:
    """Make a directory for about `nbytes` bytes, in memory if that is wanted and has room; remove it afterwards."""
    in_memory = memory and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > nbytes + SPARE_NBYTES
    with tempfile.TemporaryDirectory(prefix="nixl-async-bench-", dir=MEMORY if in_memory else None) as name:
        yield Path(name)


@dataclass(frozen=True)
class Place:
    """A bucket or container of a server: its address for clients, and request targets for plain sockets."""

    kind: str
    server: Server

    @property
    def key_id(self) -> str:
        """Who clients are; a server that asks for no signature gets one all the same."""
        return self.server.key_id or ACCESS_KEY

    @property
    def secret(self) -> str:
        """The secret that belongs to `key_id`."""
        return self.server.secret or SECRET_KEY

    @property
    def s3(self) -> dict[str, Any]:
        """What every S3 client needs to know."""
        return {
            "endpoint": self.server.endpoint,
            "bucket": BUCKET,
            "access_key": self.key_id,
            "secret_key": self.secret,
            "region": self.server.region,
        }

    def where(self, keys: Sequence[str]) -> dict[str, Any]:
        """Name objects for every kind of client; the signatures that plain sockets need are made here, beforehand."""
        if self.kind == JUICEFS:
            gets, puts = (self._presigned(method, keys) for method in ("get_object", "put_object"))
        else:
            base = urlsplit(self.server.endpoint).path
            query = f"?{self._sas()}" if self.kind == AZURITE else ""
            gets = puts = [f"{base}/{BUCKET}/{quote(key)}{query}" for key in keys]
        headers = {"x-ms-blob-type": "BlockBlob"} if self.kind == AZURITE else {}
        return {"keys": list(keys), "gets": gets, "puts": puts, "put_headers": headers}

    def _presigned(self, method: str, keys: Sequence[str]) -> list[str]:
        import botocore.session
        from botocore.config import Config

        client = botocore.session.get_session().create_client(
            "s3",
            region_name=self.server.region,
            endpoint_url=self.server.endpoint,
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        made = (
            urlsplit(client.generate_presigned_url(method, Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=SIGNED_SECONDS))
            for key in keys
        )
        return [f"{url.path}?{url.query}" for url in made]

    def _sas(self) -> str:
        from datetime import UTC, datetime, timedelta

        from azure.storage.blob import ContainerSasPermissions, generate_container_sas

        sas: str = generate_container_sas(
            self.server.key_id,
            BUCKET,
            account_key=self.server.secret,
            permission=ContainerSasPermissions(read=True, write=True, create=True),
            expiry=datetime.now(UTC) + timedelta(seconds=SIGNED_SECONDS),
        )
        return sas


@contextmanager
def serving(kind: str, nbytes: int, settings: Settings) -> Iterator[Place | None]:
    """Run a server with room for `nbytes` bytes of objects; without its program there is a warning, and None."""
    makers: dict[str, Callable[[Path], AbstractAsyncContextManager[Server]]] = {
        NGINX: servers.nginx_dav,
        JUICEFS: lambda directory: servers.juicefs(directory, BUCKET),
        AZURITE: lambda directory: servers.azurite(directory, in_memory=True, memory_limit_mb=(nbytes >> 20) + 1024),
    }
    settings.progress(f"starting {kind}")
    with ExitStack() as stack:
        directory = stack.enter_context(room(nbytes))
        try:
            server = stack.enter_context(_running(lambda: makers[kind](directory)))
            if kind == AZURITE:
                _make_container(server)
        except MissingDependency as error:
            settings.warn(f"{kind} is left out: {error}")
            place = None
        except RuntimeError as error:
            raise WorkerError(str(error)) from error
        else:
            place = Place(kind, server)
        yield place


def _make_container(server: Server) -> None:
    try:
        from azure.storage.blob import ContainerClient
    except ImportError as error:
        raise MissingDependency(f"azure-storage-blob is not installed ({error}): pip install 'nixl-async[azure]'") from error
    with ContainerClient.from_connection_string(server.connection_string, BUCKET) as client:
        client.create_container()


@contextmanager
def _running(make: Callable[[], AbstractAsyncContextManager[Server]]) -> Iterator[Server]:
    ready = threading.Event()
    found: list[Server] = []
    failed: list[BaseException] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with make() as server:
                found.append(server)
                ready.set()
                await stop.wait()
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    # The server dies with the thread that starts it, should this process end without a word.
    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        ready.wait()
        if failed:
            raise failed[0]
        yield found[0]
    finally:
        # Its loop is closed already where the server failed.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)
        thread.join()
