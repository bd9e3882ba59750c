"""Blobs of Azure Storage. The SDK owns configuration, credentials and signatures; requests take our own HTTP connections.

The SDK downloads through one connection in blocks of 4 MiB and hands over copies. Ours sends every request with a shared access
signature that the SDK makes, or with its bearer token, and receives bodies straight into registered memory. Where HTTPS_PROXY or
HTTP_PROXY names a proxy, aiohttp sends them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nixl_async.backend import Host, Stat, StoreAddress, Upload
from nixl_async.backends.azure_config import (
    DEFAULT_CREDENTIAL,
    Authority,
    AzureOptions,
    create_client,
    default_credential,
    tls_context,
    with_options,
)
from nixl_async.backends.azure_data import RANGE_CHECKED_NBYTES, ContainerData, block_name, crc64, new_mark
from nixl_async.backends.azure_proxy import ProxyPool, proxy_for
from nixl_async.descriptors import Plan, Side
from nixl_async.errors import BackendError
from nixl_async.http import Pool, PoolOptions
from nixl_async.http.retry import Retry
from nixl_async.objects import ObjectBackend, Run, cut_views, gather, gather_bounded, store_of, views

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

ASKED_AT_ONCE = 32
MAX_BLOCKS = 50_000
MAX_BLOCK_NBYTES = 4000 << 20


@dataclass(slots=True, eq=False)
class _Container:
    options: AzureOptions
    client: Any
    data: ContainerData


class AzureBackend(ObjectBackend):
    """Serves `az://container/…` stores. Options are those of `AzureOptions`; a store's own go before the backend's.

    A blob above `block_threshold_nbytes` is put in blocks, none of which is visible before all are committed at once. Those of a
    put that failed or was cancelled vanish with the next put of the blob, or after a week: the service has no request to drop them.
    A blob that is got by several requests while somebody puts it is got again, so that the bytes are of one version.
    """

    name = "azure"
    schemes = ("az",)
    rank = 63

    def __init__(self, **options: Any) -> None:
        self._options = with_options(AzureOptions(), options)
        self.concurrency = self._options.concurrency
        self._containers: dict[tuple[str, tuple[tuple[str, Any], ...]], _Container] = {}
        self._pools: dict[tuple[Any, ...], Pool | ProxyPool] = {}
        self._stack = AsyncExitStack()
        self._credential: Any = None
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop

    async def open(self, host: Host) -> None:
        """Make ready; clients are made when a store is opened."""
        self._loop = host.loop
        self.closed = False

    async def aclose(self) -> None:
        """Close every connection."""
        self.closed = True
        for pool in self._pools.values():
            await pool.aclose()
        await self._stack.aclose()
        self._credential = None
        self._containers.clear()
        self._pools.clear()

    def how(self, src: Side, dst: Side) -> str:
        """Tell where the bytes go."""
        address = store_of(src, dst)
        container = self._containers.get((address.bucket, address.options))
        if container is None:
            return "store not open"
        if isinstance(container.data.pool, ProxyPool):
            return "aiohttp, because of a proxy"
        return f"zero-copy HTTP to {container.data.host}"

    @property
    def counts(self) -> dict[str, int]:
        """Requests sent, sent again, failed for good, and connections opened, since the backend was opened."""
        found = {"requests": 0, "retries": 0, "failed": 0}
        for container in self._containers.values():
            for name, value in container.data.retry.counts.items():
                found[name] += value
        found["connections"] = sum(pool.opened for pool in self._pools.values())
        return found

    async def open_store(self, address: StoreAddress) -> None:
        """Find out where the container is and who we are; no request is made to the server."""
        self.check_open()
        async with self._opening:
            at = (address.bucket, address.options)
            if at not in self._containers:
                self._containers[at] = await self._open_container(address)

    async def _open_container(self, address: StoreAddress) -> _Container:
        options = with_options(self._options, dict(address.options))
        if options.checksum == "crc64":
            crc64()
        credential = options.credential
        if credential == DEFAULT_CREDENTIAL:
            if self._credential is None:
                self._credential = await self._stack.enter_async_context(default_credential())
            credential = self._credential
        client = create_client(options, address.bucket, credential)
        self._stack.push_async_callback(client.close)
        parts = urlsplit(client.url)
        authority = Authority(client)
        pool = await self._pool(parts.hostname or "", parts.port, parts.scheme == "https", options)
        data = ContainerData(pool, parts.netloc, parts.path, authority, options.checksum, Retry(options.attempts))
        return _Container(options, client, data)

    async def _pool(self, host: str, port: int | None, secure: bool, options: AzureOptions) -> Pool | ProxyPool:
        port = port or (443 if secure else 80)
        proxy = proxy_for(host, port, secure)
        at = (proxy, host, port, secure, options.verify, options.concurrency, options.connect_timeout, options.read_timeout)
        if at not in self._pools:
            # The system's certificates take tens of milliseconds to read.
            context = await asyncio.to_thread(tls_context, options.verify) if secure else None
            pool_options = PoolOptions(
                host, port, context, host, options.concurrency, options.connect_timeout, options.read_timeout
            )
            self._pools[at] = Pool(pool_options, self._loop) if proxy is None else ProxyPool(pool_options, proxy)
        return self._pools[at]

    def _container(self, address: StoreAddress) -> _Container:
        self.check_open()
        return self._containers[(address.bucket, address.options)]

    # Bytes.

    async def get_run(self, run: Run, plan: Plan) -> None:
        """Get a run, a large one by several requests."""
        container = self._container(run.region.store)
        options, data = container.options, container.data
        sink = views(plan.dst, plan.lengths, run.start, run.stop)
        step = options.range_nbytes if options.checksum is None else min(options.range_nbytes, RANGE_CHECKED_NBYTES)
        size = run.size if run.region.exact else None
        if run.nbytes <= step:
            await data.get(run.key, run.offset, sink, size)
            return
        pieces = cut_views(sink, step)
        for _ in range(options.attempts):
            tags: set[str] = set()

            async def get(number: int, piece: list[memoryview], tags: set[str] = tags) -> None:
                tags.add(await data.get(run.key, run.offset + number * step, piece, size))

            await gather(get(number, piece) for number, piece in enumerate(pieces))
            if len(tags) == 1:
                return
        raise BackendError(
            f"azure: {run.key!r} was put again each of the {options.attempts} times that it was got", backend=self.name
        )

    async def put_run(self, run: Run, plan: Plan) -> None:
        """Put a blob, a large one in blocks."""
        container = self._container(run.region.store)
        body = views(plan.src, plan.lengths, run.start, run.stop)
        only_new = run.region.if_none_match
        if run.nbytes <= container.options.block_threshold_nbytes:
            await container.data.put(run.key, body, only_new=only_new)
            return
        for _ in range(container.options.attempts):
            upload = _BlockUpload(container, run.key, run.nbytes, only_new)
            pieces = cut_views(body, upload.piece_nbytes)
            await gather(upload.put_views(number, piece) for number, piece in enumerate(pieces))
            if await upload.commit():
                return
        raise _discarded(run.key)

    async def upload(
        self, address: StoreAddress, key: str, nbytes: int, *, if_none_match: bool = False, max_piece_nbytes: int | None = None
    ) -> Upload:
        """Begin a blob of blocks; those that are never committed vanish by themselves."""
        return _BlockUpload(self._container(address), key, nbytes, if_none_match, max_piece_nbytes)

    # Questions.

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        """Ask for blobs' properties, many at once."""
        data = self._container(address).data
        found: list[Stat | None] = [None] * len(keys)

        async def look(position: int) -> None:
            found[position] = await data.stat(keys[position])

        await gather_bounded((look(position) for position in range(len(keys))), ASKED_AT_ONCE)
        return found

    async def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        """Page through the listing."""
        async for found in self._container(address).data.list(prefix):
            yield found

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Delete blobs, many at once."""
        data = self._container(address).data
        await gather_bounded((data.delete(key) for key in keys), ASKED_AT_ONCE)


class _BlockUpload(Upload):
    def __init__(
        self, container: _Container, key: str, nbytes: int, only_new: bool, max_piece_nbytes: int | None = None
    ) -> None:
        wanted = min(container.options.block_nbytes, max_piece_nbytes or MAX_BLOCK_NBYTES)
        self.piece_nbytes = max(wanted, -(-nbytes // MAX_BLOCKS))
        self._data, self._key, self._only_new = container.data, key, only_new
        self._mark = new_mark()
        self._blocks: dict[int, str] = {}

    async def put(self, number: int, source: Side, lengths: Array) -> None:
        """Send a block."""
        await self.put_views(number, views(source, lengths, 0, len(lengths)))

    async def put_views(self, number: int, body: list[memoryview]) -> None:
        """Send a block out of these views."""
        name = block_name(self._mark, number)
        await self._data.put_block(self._key, name, body)
        self._blocks[number] = name

    async def commit(self) -> bool:
        """Commit the blocks; False if another put of the blob has made the service drop them."""
        return await self._data.commit(self._key, [name for _, name in sorted(self._blocks.items())], only_new=self._only_new)

    async def finish(self) -> None:
        """Commit the blocks.

        Raises:
            BackendError: another put of the blob has made the service drop them.
        """
        if not await self.commit():
            raise _discarded(self._key)

    async def abort(self) -> None:
        """Leave the blocks to the service, which drops what is not committed."""


def _discarded(key: str) -> BackendError:
    return BackendError(f"azure: the blocks of {key!r} are gone: somebody else has put it meanwhile", backend="azure")
