"""The s3 backend's buckets: aiobotocore's clients of them, where their servers are, and what is asked through aiobotocore."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nixl_async.backend import StoreAddress
from nixl_async.backends.s3_config import (
    CredentialSource,
    S3Options,
    create_client,
    get_headers,
    make_session,
    put_headers,
    tls_context,
    with_options,
)
from nixl_async.backends.s3_data import (
    EXPIRED,
    BucketData,
    Credentials,
    DataOptions,
    Endpoint,
    Signer,
    document_of,
    error_for,
)
from nixl_async.errors import AccessError, BackendError, ConfigurationError, MissingDependency, TransferError
from nixl_async.http import Pool, PoolOptions, Response
from nixl_async.http.retry import Retry

if TYPE_CHECKING:
    import ssl

try:
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        MetadataRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        TokenRetrievalError,
    )
    from botocore.utils import get_environ_proxies
except ImportError as error:
    raise MissingDependency(f"the s3 backend needs aiobotocore ({error}): pip install 'nixl-async[s3]'") from error


class _NotSentError(Exception):
    """Ends a request before it is sent."""


@dataclass(slots=True, eq=False)
class Bucket:
    """A bucket as a store's options see it: aiobotocore's client, and the data path beside it unless `proxied`."""

    options: S3Options
    client: Any
    source: CredentialSource
    data: BucketData
    proxied: bool
    client_credentials: Credentials | None
    buckets: Buckets

    async def ask(self, operation: str, what: str, **arguments: Any) -> Any:
        """Call an operation of the bucket's client; look for other credentials once when these have ended."""
        client = self.client
        for last in (False, True):
            try:
                return await getattr(client, operation)(Bucket=self.data.bucket, **arguments)
            except (ClientError, BotoCoreError, OSError, TimeoutError) as error:
                code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
                if last or code not in EXPIRED or not await self.buckets.renew(self, client):
                    raise mapped(error, repr(what)) from error
                client = self.client


class Buckets:
    """The buckets of a backend, and what they share: sessions and clients of aiobotocore's, pools of connections."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self.opened: dict[tuple[str, tuple[tuple[str, Any], ...]], Bucket] = {}
        self._stack = AsyncExitStack()
        self._closed = False
        self._sessions: dict[str | None, Any] = {}
        self._clients: dict[S3Options, Any] = {}
        self._pools: dict[tuple[Any, ...], Pool] = {}
        self._contexts: dict[bool | str, ssl.SSLContext] = {}
        self._opening = asyncio.Lock()

    async def aclose(self) -> None:
        """Close every connection."""
        self._closed = True
        for pool in self._pools.values():
            await pool.aclose()
        await self._stack.aclose()
        self.opened.clear()
        self._clients.clear()
        self._pools.clear()

    def find(self, address: StoreAddress) -> Bucket | None:
        """Return the bucket of a store, `None` before it is opened."""
        return self.opened.get((address.bucket, address.options))

    @property
    def counts(self) -> dict[str, int]:
        """Requests sent, sent again, failed for good, and connections opened."""
        found = {"requests": 0, "retries": 0, "failed": 0}
        for bucket in self.opened.values():
            for name, value in bucket.data.retry.counts.items():
                found[name] += value
        found["connections"] = sum(pool.opened for pool in self._pools.values())
        return found

    async def open(self, address: StoreAddress) -> None:
        """Find a bucket's endpoint and credentials; no request is made to the server.

        Raises:
            ConfigurationError: aiobotocore cannot make a client of the options.
            AccessError: there are no credentials.
        """
        async with self._opening:
            if (address.bucket, address.options) not in self.opened:
                self.opened[(address.bucket, address.options)] = await self._open(address)

    async def _open(self, address: StoreAddress) -> Bucket:
        options = with_options(self._options, dict(address.options))
        try:
            client = await self._client(options)
            source = CredentialSource(self._sessions[options.profile], options)
            credentials = await source()
            endpoint, proxied = await self._endpoint(client, address.bucket, options)
        except (BotoCoreError, ValueError) as error:
            raise ConfigurationError(f"s3: {address}: {error}") from error
        signed = options.payload == "signed" or (options.payload == "auto" and not endpoint.secure)
        data_options = DataOptions(
            signed and not options.anonymous,
            options.checksum,
            get_headers(options),
            put_headers(options),
            get_headers(options),
        )
        data = BucketData(
            address.bucket,
            endpoint,
            data_options,
            source,
            lambda endpoint, response: self._moved(address, endpoint, response),
            Retry(options.attempts),
        )
        return Bucket(options, client, source, data, proxied, credentials, self)

    async def _client(self, options: S3Options) -> Any:
        if self._closed:
            raise BackendError("the s3 backend is closed", backend="s3")
        client = self._clients.get(options)
        if client is None:
            session = self._sessions.get(options.profile)
            if session is None:
                session = await make_session(options)
                self._sessions[options.profile] = session
            client = await self._stack.enter_async_context(create_client(session, options))
            self._clients[options] = client
        return client

    async def _endpoint(self, client: Any, bucket: str, options: S3Options) -> tuple[Endpoint, bool]:
        """Let botocore say where a bucket is: in a request that is signed and never sent."""
        asked: list[Any] = []

        def stop(request: Any, **_: Any) -> None:
            asked.append(request)
            raise _NotSentError

        # A presigned URL would do, but botocore makes those for the global endpoint.
        event = "before-send.s3.GetObjectAcl"
        client.meta.events.register_first(event, stop)
        try:
            await client.get_object_acl(Bucket=bucket, Key="k")
        except _NotSentError:
            pass
        finally:
            client.meta.events.unregister(event, stop)
        (request,) = asked
        url, authorization = request.url, request.headers.get("Authorization", "")
        if isinstance(authorization, bytes):
            authorization = authorization.decode()
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        scope = authorization.partition("Credential=")[2].partition(",")[0].split("/")
        region = scope[-3] if len(scope) >= 4 else client.meta.region_name or "us-east-1"
        host = parts.hostname or ""
        port = parts.port or (443 if secure else 80)
        proxies = client.meta.config.proxies or get_environ_proxies(url)
        endpoint = Endpoint(
            await self._pool(host, port, secure, options),
            parts.netloc,
            parts.path.removesuffix("/k"),
            Signer(region),
            secure,
        )
        return endpoint, bool(proxies.get(parts.scheme))

    async def _pool(self, host: str, port: int, secure: bool, options: S3Options) -> Pool:
        at = (host, port, secure, options.verify, options.concurrency, options.connect_timeout, options.read_timeout)
        if at not in self._pools:
            if secure and options.verify not in self._contexts:
                self._contexts[options.verify] = await tls_context(self._sessions[options.profile], options.verify)
            pool_options = PoolOptions(
                host,
                port,
                self._contexts[options.verify] if secure else None,
                host,
                options.concurrency,
                options.connect_timeout,
                options.read_timeout,
            )
            self._pools[at] = Pool(pool_options, asyncio.get_running_loop())
        return self._pools[at]

    async def _moved(self, address: StoreAddress, endpoint: Endpoint, response: Response) -> Endpoint | None:
        """Follow a bucket to its region, or a redirect to another server; return where to, `None` if there is nowhere to go."""
        async with self._opening:
            bucket = self.opened[(address.bucket, address.options)]
            data = bucket.data
            if data.endpoint is not endpoint:
                # Another request was told before.
                return data.endpoint
            region = response.headers.get("x-amz-bucket-region") or document_of(response).get("Region")
            if region and region != endpoint.signer.region:
                client = await self._client(replace(bucket.options, region=region))
                data.endpoint, bucket.proxied = await self._endpoint(client, address.bucket, bucket.options)
                bucket.client = client
                return data.endpoint
            location = response.headers.get("location")
            if not location or response.status not in (301, 307, 308):
                return None
            parts = urlsplit(location)
            secure = parts.scheme == "https"
            if not parts.hostname or not (secure or (parts.scheme == "http" and not endpoint.secure)):
                return None
            pool = await self._pool(parts.hostname, parts.port or (443 if secure else 80), secure, bucket.options)
            base = endpoint.base_path if parts.path.startswith(f"/{address.bucket}/") else ""
            found = Endpoint(pool, parts.netloc, base, endpoint.signer, secure)
            if response.status != 307:
                data.endpoint = found
            return found

    async def renew(self, bucket: Bucket, client: Any) -> bool:
        """Look for other credentials than those of a bucket's client; return whether there are, or another has found some."""
        async with self._opening:
            if bucket.client is not client:
                return True
            found = await bucket.source(bucket.client_credentials)
            if found == bucket.client_credentials:
                return False
            bucket.client_credentials = found
            self._sessions[bucket.options.profile] = bucket.source.session
            self._clients.pop(bucket.options, None)
            bucket.client = await self._client(bucket.options)
            return True


def mapped(error: Exception, what: str) -> TransferError:
    """Return our exception for one of aiobotocore's."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        message = error.response.get("Error", {}).get("Message", "")
        return error_for(status, code)(f"s3: {what}: {status} {code} {message}".rstrip(), backend="s3")
    kind = AccessError if isinstance(error, _CREDENTIALS) else BackendError
    return kind(f"s3: {what}: {type(error).__name__}: {error}", backend="s3")


_CREDENTIALS = (
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)
