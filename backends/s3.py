"""Objects of Amazon S3 and what speaks its protocol: MinIO, Ceph, SeaweedFS, R2, Google's XML interface with HMAC keys.

aiobotocore owns configuration, credentials and their renewal, endpoints, listing, and the control of multipart uploads. The bytes
take our own HTTP connections, straight into registered memory and out of it; where a proxy is configured, aiobotocore takes them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from nixl_async.backend import Host, Stat, StoreAddress, Upload, quiesce
from nixl_async.backends.s3_config import (
    MIN_PART_NBYTES,
    CredentialSource,
    S3Options,
    create_client,
    get_arguments,
    get_headers,
    make_session,
    payer,
    put_arguments,
    put_headers,
    tls_context,
    with_options,
)
from nixl_async.backends.s3_data import (
    EXPIRED,
    MARK,
    BucketData,
    Credentials,
    DataOptions,
    Endpoint,
    Signer,
    document_of,
    error_for,
)
from nixl_async.descriptors import Plan, Side
from nixl_async.errors import (
    AccessError,
    BackendError,
    ConfigurationError,
    ConflictError,
    IntegrityError,
    MissingDependency,
    NotFoundError,
    TransferError,
)
from nixl_async.http import Pool, PoolOptions, Response
from nixl_async.http.retry import Retry
from nixl_async.objects import ObjectBackend, Run, cut_views, gather_bounded, store_of, views

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine

    from nixl_async.descriptors import Array

try:
    from aiohttp import ClientPayloadError
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

DELETED_AT_ONCE = 1000
MAX_PART_NBYTES = 5 << 30
ASKED_AT_ONCE = 32
PIECES_AT_ONCE = 16
"""Of one large object: those that are hashed or on their way when a transfer is cancelled are waited for, or sent again."""
TORN_ATTEMPTS = 3
LATE_PARTS_SECONDS = (0.1, 0.3, 0.6)
ABORT_SECONDS = 2.0
"""How long a failed or cancelled transfer waits for its upload to be dropped; it goes on being dropped behind its back."""


class _NotSentError(Exception):
    """Ends a request before it is sent."""


@dataclass(slots=True, eq=False)
class _Bucket:
    options: S3Options
    client: Any
    source: CredentialSource
    data: BucketData
    proxied: bool
    client_credentials: Credentials | None


class S3Backend(ObjectBackend):
    """Serves `s3://` stores. Options are those of `S3Options`; a store's own go before the backend's."""

    name = "s3"
    schemes = ("s3",)
    rank = 62

    def __init__(self, **options: Any) -> None:
        self._options = with_options(S3Options(), options)
        self.concurrency = self._options.concurrency
        self._stack: AsyncExitStack | None = None
        self._loop: asyncio.AbstractEventLoop
        self._sessions: dict[str | None, Any] = {}
        self._clients: dict[S3Options, Any] = {}
        self._buckets: dict[tuple[str, tuple[tuple[str, Any], ...]], _Bucket] = {}
        self._pools: dict[tuple[Any, ...], Pool] = {}
        self._contexts: dict[bool | str, ssl.SSLContext] = {}
        self._retries: list[Retry] = []
        self._opening = asyncio.Lock()
        self._aborts: set[asyncio.Task[None]] = set()

    async def open(self, host: Host) -> None:
        """Make ready; clients are made when a store is opened."""
        self._stack = AsyncExitStack()
        self.closed = False
        self._loop = host.loop

    async def aclose(self) -> None:
        """Close every connection."""
        stack, self._stack = self._stack, None
        self.closed = True
        if self._aborts:
            _, late = await asyncio.wait(self._aborts, timeout=ABORT_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for pool in self._pools.values():
            await pool.aclose()
        if stack is not None:
            await stack.aclose()
        self._buckets.clear()
        self._clients.clear()
        self._pools.clear()

    def how(self, src: Side, dst: Side) -> str:
        """Tell whether bytes go straight to the server, or through aiobotocore to a proxy."""
        address = store_of(src, dst)
        bucket = self._buckets.get((address.bucket, address.options))
        if bucket is None:
            return "store not open"
        endpoint = bucket.data.endpoint
        return "aiobotocore, because of a proxy" if bucket.proxied else f"zero-copy HTTP to {endpoint.host}"

    @property
    def counts(self) -> dict[str, int]:
        """Requests sent, sent again, failed for good, and connections opened, since the backend was opened."""
        found = {"requests": 0, "retries": 0, "failed": 0}
        for retry in self._retries:
            for name, value in retry.counts.items():
                found[name] += value
        found["connections"] = sum(pool.opened for pool in self._pools.values())
        return found

    # Clients.

    async def open_store(self, address: StoreAddress) -> None:
        """Find the bucket's endpoint and credentials; no request is made to the server."""
        async with self._opening:
            if (address.bucket, address.options) not in self._buckets:
                self._buckets[(address.bucket, address.options)] = await self._open_bucket(address)

    async def _open_bucket(self, address: StoreAddress) -> _Bucket:
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
        self._retries.append(data.retry)
        return _Bucket(options, client, source, data, proxied, credentials)

    async def _client(self, options: S3Options) -> Any:
        self.check_open()
        assert self._stack is not None
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
            self._pools[at] = Pool(pool_options, self._loop)
        return self._pools[at]

    async def _moved(self, address: StoreAddress, endpoint: Endpoint, response: Response) -> Endpoint | None:
        """Follow a bucket to its region, or a redirect to another server; return where to, `None` if there is nowhere to go."""
        async with self._opening:
            bucket = self._bucket(address)
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

    def _bucket(self, address: StoreAddress) -> _Bucket:
        self.check_open()
        return self._buckets[(address.bucket, address.options)]

    # Bytes.

    async def get_run(self, run: Run, plan: Plan) -> None:
        """Get a run, a large one by several requests."""
        bucket = self._bucket(run.region.store)
        options = bucket.options
        sink = views(plan.dst, plan.lengths, run.start, run.stop)
        verified = options.checksum is not None and run.offset == 0 and run.nbytes == run.size
        size = run.size if run.region.exact or verified else None
        if run.nbytes <= options.range_nbytes and not bucket.proxied:
            await bucket.data.get(run.key, run.offset, sink, run.nbytes, size)
            return
        # An object that is replaced meanwhile would come in pieces of both.
        for _ in range(TORN_ATTEMPTS):
            if len(await self._get_pieces(bucket, run, sink, size)) == 1:
                break
        else:
            raise IntegrityError(f"s3: {run.key!r} was replaced again and again while it was read", backend=self.name)
        if verified and not bucket.proxied:
            await bucket.data.verify_whole(run.key, sink, run.nbytes)

    async def _get_pieces(self, bucket: _Bucket, run: Run, sink: list[memoryview], size: int | None) -> set[str]:
        """Get a run piece by piece; return the entity tags that the pieces came with."""
        step = bucket.options.range_nbytes
        tags = set()

        async def get(number: int, piece: list[memoryview]) -> None:
            first, nbytes = run.offset + number * step, sum(map(len, piece))
            if bucket.proxied:
                tags.add(await self._plain_get(bucket, run.key, first, piece, nbytes, size))
            else:
                response = await bucket.data.get(run.key, first, piece, nbytes, size)
                tags.add(response.headers.get("etag", ""))

        pieces = cut_views(sink, step)
        await gather_bounded((get(number, piece) for number, piece in enumerate(pieces)), min(PIECES_AT_ONCE, len(pieces)))
        return tags

    async def put_run(self, run: Run, plan: Plan) -> None:
        """Put an object, a large one in parts."""
        bucket = self._bucket(run.region.store)
        body = views(plan.src, plan.lengths, run.start, run.stop)
        if run.nbytes > bucket.options.multipart_nbytes:
            await self._put_parts(bucket, run, body)
        elif bucket.proxied:
            only_new = {"IfNoneMatch": "*"} if run.region.if_none_match else {}
            arguments = put_arguments(bucket.options) | only_new
            await self._ask(bucket, "put_object", run.key, Key=run.key, Body=b"".join(body), **arguments)
        else:
            await bucket.data.put(run.key, body, run.nbytes, if_none_match=run.region.if_none_match)

    async def _put_parts(self, bucket: _Bucket, run: Run, body: list[memoryview]) -> None:
        upload = await self._begin(bucket, run.key, run.nbytes, run.region.if_none_match)
        try:
            pieces = cut_views(body, upload.piece_nbytes)
            await gather_bounded(
                (upload.put_views(number, piece) for number, piece in enumerate(pieces)), min(PIECES_AT_ONCE, len(pieces))
            )
            await upload.finish()
        except BaseException:
            await upload.abort()
            raise

    async def upload(
        self, address: StoreAddress, key: str, nbytes: int, *, if_none_match: bool = False, max_piece_nbytes: int | None = None
    ) -> Upload:
        """Begin a multipart upload."""
        return await self._begin(self._bucket(address), key, nbytes, if_none_match, max_piece_nbytes)

    async def _begin(
        self, bucket: _Bucket, key: str, nbytes: int, if_none_match: bool, max_piece_nbytes: int | None = None
    ) -> _S3Upload:
        wanted = bucket.options.part_nbytes
        # S3 takes ten thousand parts at most, and but for the last none below its minimum.
        piece = max(min(wanted, max_piece_nbytes or wanted), MIN_PART_NBYTES, -(-nbytes // 10_000))
        mark = uuid.uuid4().hex
        arguments = put_arguments(bucket.options) | {"Metadata": {MARK.removeprefix("x-amz-meta-"): mark}}
        if bucket.options.checksum:
            # A checksum of the parts' checksums is one that no reader can compare with.
            arguments["ChecksumType"] = "FULL_OBJECT"
        making = asyncio.ensure_future(self._ask(bucket, "create_multipart_upload", key, Key=key, **arguments))
        try:
            made = await quiesce(making)
        except asyncio.CancelledError:
            if not making.cancelled() and making.exception() is None:
                await _S3Upload(self, bucket, key, making.result()["UploadId"], piece, if_none_match, mark).abort()
            raise
        return _S3Upload(self, bucket, key, made["UploadId"], piece, if_none_match, mark)

    async def _plain_get(
        self, bucket: _Bucket, key: str, first: int, sink: list[memoryview], nbytes: int, size: int | None
    ) -> str:
        arguments = {"Range": f"bytes={first}-{first + nbytes - 1}", **get_arguments(bucket.options)}

        async def get() -> tuple[dict[str, Any], bytes]:
            got = await self._ask(bucket, "get_object", key, Key=key, **arguments)
            async with got["Body"] as body:
                return got, await body.read()

        for attempt in range(1, bucket.options.attempts + 1):
            try:
                got, content = await get()
                break
            except (BotoCoreError, ClientPayloadError, OSError, TimeoutError) as error:
                # aiobotocore sends again what got no answer, not what breaks in the middle of one.
                if attempt == bucket.options.attempts:
                    raise _mapped(error, repr(key)) from error
        span = got.get("ContentRange", "")
        total = span.rpartition("/")[2]
        if len(content) != nbytes or not span.startswith(f"bytes {first}-") or (size is not None and total != str(size)):
            raise IntegrityError(f"s3: {key!r} has {total or len(content)} bytes, not {size or nbytes}", backend=self.name)
        data = memoryview(content)
        for piece in sink:
            piece[:] = data[: len(piece)]
            data = data[len(piece) :]
        return str(got.get("ETag", ""))

    # Questions.

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        """Send HEAD requests, many at once."""
        bucket = self._bucket(address)
        found: list[Stat | None] = [None] * len(keys)

        async def look(position: int, key: str) -> None:
            with suppress(NotFoundError):
                found[position] = await self._look(bucket, key)

        await gather_bounded((look(*one) for one in enumerate(keys)), min(ASKED_AT_ONCE, len(keys)))
        return found

    async def _look(self, bucket: _Bucket, key: str) -> Stat:
        if bucket.proxied:
            head = await self._ask(bucket, "head_object", key, Key=key, **get_arguments(bucket.options))
            return _stat(key, head["ContentLength"], head)
        response = await bucket.data.ask_head(key)
        if response.status != 200:
            raise bucket.data.explain(response, f"looking up {key!r}")
        headers = response.headers
        modified = 0.0
        with suppress(ValueError):
            modified = parsedate_to_datetime(headers.get("last-modified", "")).timestamp()
        return Stat(key, int(headers.get("content-length", "0")), headers.get("etag", "").strip('"'), modified)

    async def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        """Page through ListObjectsV2."""
        bucket = self._bucket(address)
        arguments = {"Prefix": prefix, **payer(bucket.options)}
        while True:
            page = await self._ask(bucket, "list_objects_v2", prefix, **arguments)
            for item in page.get("Contents", ()):
                yield _stat(item["Key"], item["Size"], item)
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Delete a thousand at once, or one by one where the server cannot."""
        bucket = self._bucket(address)
        more = payer(bucket.options)
        if len(keys) > 1:
            try:
                for start in range(0, len(keys), DELETED_AT_ONCE):
                    await self._delete_many(bucket, keys[start : start + DELETED_AT_ONCE], more)
            except BackendError:
                # JuiceFS's gateway and others want a Content-MD5 here; every server knows DeleteObject.
                pass
            else:
                return
        await gather_bounded(
            (self._ask(bucket, "delete_object", key, Key=key, **more) for key in keys), min(ASKED_AT_ONCE, len(keys))
        )

    async def _delete_many(self, bucket: _Bucket, keys: Sequence[str], more: dict[str, Any]) -> None:
        listed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = await self._ask(bucket, "delete_objects", keys[0], Delete=listed, **more)
        for error in answer.get("Errors", ()):
            if error.get("Code") == "AccessDenied":
                raise AccessError(f"s3: deleting {error.get('Key')!r}: {error.get('Message')}", backend=self.name)
            raise BackendError(f"s3: deleting {error.get('Key')!r}: {error.get('Code')}", backend=self.name)

    # aiobotocore.

    async def _ask(self, bucket: _Bucket, operation: str, what: str, **arguments: Any) -> Any:
        """Call an operation of the bucket's client; look for other credentials once when these have ended."""
        client = bucket.client
        for last in (False, True):
            try:
                return await getattr(client, operation)(Bucket=bucket.data.bucket, **arguments)
            except (ClientError, BotoCoreError, OSError, TimeoutError) as error:
                code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
                if last or code not in EXPIRED or not await self._renew(bucket, client):
                    raise _mapped(error, repr(what)) from error
                client = bucket.client

    async def _renew(self, bucket: _Bucket, client: Any) -> bool:
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

    async def _drop(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do what cleans up behind a transfer; wait for it a while."""

        async def quietly() -> None:
            with suppress(TransferError):
                await work

        task = asyncio.create_task(quietly())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
        await quiesce(asyncio.ensure_future(asyncio.wait([task], timeout=ABORT_SECONDS)))


class _S3Upload(Upload):
    def __init__(
        self, backend: S3Backend, bucket: _Bucket, key: str, upload_id: str, piece_nbytes: int, if_none_match: bool, mark: str
    ) -> None:
        self.piece_nbytes = piece_nbytes
        self._backend, self._bucket, self._key, self._id, self._mark = backend, bucket, key, upload_id, mark
        self._only_new = {"IfNoneMatch": "*"} if if_none_match else {}
        self._parts: dict[int, dict[str, Any]] = {}
        self._ended = self._broken_off = False

    async def put(self, number: int, source: Side, lengths: Array) -> None:
        """Send a part."""
        await self.put_views(number, views(source, lengths, 0, len(lengths)))

    async def put_views(self, number: int, body: list[memoryview]) -> None:
        """Send a part out of these views."""
        try:
            self._parts[number] = await self._put_views(number, body)
        except BaseException:
            self._broken_off = True
            raise

    async def _put_views(self, number: int, body: list[memoryview]) -> dict[str, Any]:
        options = self._bucket.options
        checksum = f"Checksum{options.checksum.upper()}" if options.checksum else ""
        part: dict[str, Any] = {"PartNumber": number + 1}
        if self._bucket.proxied:
            arguments = get_arguments(options)
            if options.checksum:
                arguments["ChecksumAlgorithm"] = options.checksum.upper()
            told = await self._ask("upload_part", PartNumber=number + 1, Body=b"".join(body), **arguments)
            part |= {name: told[name] for name in ("ETag", checksum) if name in told}
        else:
            query = f"partNumber={number + 1}&uploadId={quote(self._id, safe='~')}"
            response = await self._bucket.data.put(self._key, body, sum(map(len, body)), query=query)
            part["ETag"] = response.headers.get("etag", "")
            if found := response.headers.get(f"x-amz-checksum-{options.checksum}"):
                part[checksum] = found
        return part

    async def finish(self) -> None:
        """Complete the upload; a cancellation meanwhile waits for that."""
        await quiesce(asyncio.ensure_future(self._complete()))

    async def _complete(self) -> None:
        parts = [part for _, part in sorted(self._parts.items())]
        try:
            await self._ask("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self._only_new)
        except (NotFoundError, ConflictError):
            # An earlier attempt may have arrived, and its answer been lost.
            if not await self._is_there():
                raise
        self._ended = True

    async def _is_there(self) -> bool:
        with suppress(TransferError):
            if not self._bucket.proxied:
                return await self._bucket.data.is_marked(self._key, self._mark)
            head = await self._backend._ask(self._bucket, "head_object", self._key, Key=self._key)
            return bool(head.get("Metadata", {}).get(MARK.removeprefix("x-amz-meta-")) == self._mark)
        return False

    async def abort(self) -> None:
        """Drop the parts; a cancellation meanwhile waits for that."""
        if not self._ended:
            self._ended = True
            await self._backend._drop(self._abandon())

    async def _abandon(self) -> None:
        await self._ask("abort_multipart_upload")
        # A server may take a part, and with it the upload, that it had received when its connection was closed.
        for seconds in LATE_PARTS_SECONDS if self._broken_off else ():
            await asyncio.sleep(seconds)
            try:
                await self._ask("list_parts")
            except NotFoundError:
                return
            await self._ask("abort_multipart_upload")

    async def _ask(self, operation: str, **arguments: Any) -> Any:
        more = payer(self._bucket.options) | arguments
        return await self._backend._ask(self._bucket, operation, self._key, Key=self._key, UploadId=self._id, **more)


def _stat(key: str, nbytes: int, found: dict[str, Any]) -> Stat:
    modified = found.get("LastModified")
    return Stat(key, nbytes, str(found.get("ETag", "")).strip('"'), modified.timestamp() if modified else 0.0)


def _mapped(error: Exception, what: str) -> TransferError:
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
