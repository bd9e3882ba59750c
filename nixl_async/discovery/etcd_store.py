"""`etcd://host:port[,host:port]/namespace`: entries under a lease, watched; beside them metadata where NIXL's agents keep theirs.

NIXL's agents write an empty value to `<namespace>/<agent>/` and their metadata to `<namespace>/<agent>/metadata`, and forget an
agent whose first key is deleted (src/core/nixl_etcd_metadata_backend.cpp of ai-dynamo/nixl). Ours write both, under a lease, and
their entry to `<namespace>.entries/<agent>`: small values in a range of their own, so that watching a thousand agents does not
bring every region of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncGenerator

from nixl_async.discovery.etcd_client import CompactedError, Etcd, LeaseLost
from nixl_async.discovery.store import FAILURES, DiscoveryStore, Seen, StoreURL
from nixl_async.errors import BackendError, ConfigurationError

NAMESPACE = "/nixl/agents/"
"""NIXL's namespace where NIXL_ETCD_NAMESPACE does not name another."""
LABEL = "metadata"
PORT = 2379
MAX_METADATA_NBYTES = 1 << 20
"""The largest blob that is written; etcd takes requests of 1.5 MiB by default."""
AGAIN_SECONDS = (0.2, 1.0)
"""How long to wait before a lease is renewed again that could not be: at first, and at most."""


class EtcdStore(DiscoveryStore):
    """Entries in etcd version 3.

    Options: `ttl` (seconds, 10), `stock` (allow or refuse: see the package), and with `etcds://`, which is TLS: `ca`, `cert` and
    `key`, paths of PEM files.

    Raises:
        ConfigurationError: the URL names no server, or an option is wrong.
    """

    holds_metadata = True

    def __init__(self, url: StoreURL) -> None:
        secure = url.scheme == "etcds"
        url.check_options("ttl", "stock", *(("ca", "cert", "key") if secure else ()))
        if not url.hosts:
            raise ConfigurationError(f"{url} names no server; give etcd://host:{PORT}/namespace")
        self.lease_seconds = url.lease_seconds
        self._etcd = Etcd(
            ",".join(f"{'https' if secure else 'http'}://{host}" for host in url.hosts),
            user=url.user,
            password=url.password,
            tls=_context(url) if secure else None,
            keep=True,
        )
        self.server = self._etcd.first
        self._namespace = url.path if url.path.strip("/") else NAMESPACE
        self._entries = f"{self._namespace.rstrip('/')}.entries/"
        self._lease = 0
        self._granting = asyncio.Lock()
        self._newest = 0

    async def put(self, name: str, value: bytes) -> None:
        """Publish a value under the lease."""
        await self._put(f"{self._entries}{name}", value)

    async def put_metadata(self, name: str, blob: bytes) -> None:
        """Publish a blob under the lease, as NIXL's agents do.

        Raises:
            ConfigurationError: it is larger than `MAX_METADATA_NBYTES`.
        """
        if len(blob) > MAX_METADATA_NBYTES:
            raise ConfigurationError(f"metadata of {len(blob)} bytes does not go into etcd; at most {MAX_METADATA_NBYTES} do")
        await self._put(f"{self._namespace}/{name}/", b"")
        await self._put(f"{self._namespace}/{name}/{LABEL}", blob)

    async def keep(self) -> None:
        """Renew the lease; return when etcd has it no more."""
        again = AGAIN_SECONDS[0]
        while self._lease:
            # Agents that started at once should not ask at once for ever.
            await asyncio.sleep(self.lease_seconds / 3 * random.uniform(0.9, 1.0))
            while True:
                try:
                    await self._etcd.renew(self._lease)
                except LeaseLost:
                    self._lease = 0
                    return
                except FAILURES:
                    await asyncio.sleep(again)
                    again = min(2 * again, AGAIN_SECONDS[1])
                else:
                    again = AGAIN_SECONDS[0]
                    break

    async def remove(self, name: str) -> None:
        """End the lease: etcd deletes what was put under it, and not what another has put in its place."""
        lease, self._lease = self._lease, 0
        if lease:
            await self._etcd.revoke(lease)

    async def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all entries, then each change."""
        prefix = self._entries.encode()
        found, revision = await self._etcd.entries(prefix)
        yield Seen({_name(key, prefix): value for key, value in found.items()}, whole=True)
        async with contextlib.aclosing(self._etcd.watch(prefix, revision + 1, prefix=True)) as events:
            async for event in events:
                yield Seen({_name(event.key, prefix): event.value})

    async def watch_metadata(self, name: str) -> AsyncGenerator[bytes | None, None]:
        """Yield the metadata that an agent keeps where NIXL's do, then what it becomes.

        etcd that has lost what it knew is no news: that an agent is not in it then says nothing of the agent.
        """
        key = f"{self._namespace}/{name}/{LABEL}".encode()
        value, revision = await self._etcd.get(key)
        if value is not None or revision >= self._newest:
            yield value or None
        self._newest = revision
        try:
            async with contextlib.aclosing(self._etcd.watch(key, revision + 1)) as events:
                async for event in events:
                    self._newest = max(self._newest, event.revision)
                    yield event.value or None
        except CompactedError as error:
            raise BackendError(f"etcd was not listened to for too long: {error}", backend="etcd") from error

    async def aclose(self) -> None:
        """End the lease, and the connection."""
        try:
            await self.remove("")
        finally:
            self._etcd.close()

    async def _put(self, key: str, value: bytes) -> None:
        async with self._granting:
            if not self._lease:
                self._lease = await self._etcd.grant(max(1, round(self.lease_seconds)))
        lease = self._lease
        try:
            await self._etcd.put(key.encode(), value, lease=lease)
        except LeaseLost:
            if self._lease == lease:
                self._lease = 0
            raise


def _name(key: bytes, prefix: bytes) -> str:
    return key.removeprefix(prefix).decode(errors="replace")


def _context(url: StoreURL) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=url.options.get("ca"))
        if "cert" in url.options:
            context.load_cert_chain(url.options["cert"], url.options.get("key"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the certificates of {url} cannot be read: {error}") from error
    return context
