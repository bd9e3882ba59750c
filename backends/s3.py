"""Objects of Amazon S3 and what speaks its protocol: MinIO, Ceph, SeaweedFS, R2, Google's XML interface with HMAC keys.

aiobotocore owns configuration, credentials and their renewal, endpoints, listing, and the control of multipart uploads. The bytes
take our own HTTP connections, straight into registered memory and out of it; where a proxy is configured, aiobotocore takes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from nixl_async.backend import Host, Op, Stat, StoreAddress, Upload
from nixl_async.backends.s3_batch import Batch
from nixl_async.backends.s3_bucket import Bucket, Buckets, mapped
from nixl_async.backends.s3_config import S3Options, get_arguments, payer, put_arguments, with_options
from nixl_async.backends.s3_data import Attempt
from nixl_async.backends.s3_upload import Aborts, begin_upload
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import AccessError, BackendError, IntegrityError, MissingDependency, NotFoundError
from nixl_async.objects import ObjectBackend, Run, cut_runs, cut_views, gather_bounded, store_of, views
from nixl_async.storage import raise_failed

try:
    from aiohttp import ClientPayloadError
    from botocore.exceptions import BotoCoreError
except ImportError as error:
    raise MissingDependency(f"the s3 backend needs aiobotocore ({error}): pip install 'nixl-async[s3]'") from error

DELETED_AT_ONCE = 1000
ASKED_AT_ONCE = 32
PIECES_AT_ONCE = 16
"""Of one large object: those that are hashed or on their way when a transfer is cancelled are waited for, or sent again."""
TORN_ATTEMPTS = 3
MOST_RANGES = 4
"""How many times `range_nbytes` one request gets at most: one that breaks off is sent again for all of it."""


class S3Backend(ObjectBackend):
    """Serves `s3://` stores. Options are those of `S3Options`; a store's own go before the backend's."""

    name = "s3"
    schemes = ("s3",)
    rank = 62

    def __init__(self, **options: Any) -> None:
        self._options = with_options(S3Options(), options)
        self.concurrency = self._options.concurrency
        self._buckets = Buckets(self._options)
        self._aborts = Aborts()

    async def open(self, host: Host) -> None:
        """Make ready; clients are made when a store is opened."""
        self._buckets = Buckets(self._options)
        self.closed = False

    async def aclose(self) -> None:
        """Close every connection."""
        self.closed = True
        await self._aborts.aclose()
        await self._buckets.aclose()

    def how(self, src: Side, dst: Side) -> str:
        """Tell whether bytes go straight to the server, or through aiobotocore to a proxy."""
        bucket = self._buckets.find(store_of(src, dst))
        if bucket is None:
            return "store not open"
        endpoint = bucket.data.endpoint
        return "aiobotocore, because of a proxy" if bucket.proxied else f"zero-copy HTTP to {endpoint.host}"

    @property
    def counts(self) -> dict[str, int]:
        """Requests sent, sent again, failed for good, and connections opened, since the backend was opened."""
        return self._buckets.counts

    async def open_store(self, address: StoreAddress) -> None:
        """Find the bucket's endpoint and credentials; no request is made to the server."""
        await self._buckets.open(address)

    def _bucket(self, address: StoreAddress) -> Bucket:
        self.check_open()
        return self._buckets.opened[(address.bucket, address.options)]

    # Bytes.

    async def copy(self, op: Op) -> None:
        """Get or put every object; many that are got go together."""
        if op.plan.src.kind is MemoryKind.OBJECT:
            store = store_of(op.plan.src, op.plan.dst)
            bucket = self._bucket(store)
            options = bucket.options
            if not bucket.proxied and options.checksum is None and len(op.plan.lengths) > 1:
                step = _range_nbytes(bucket, op.plan)

                def may_start(run: Run) -> bool:
                    region = run.region
                    return 0 < run.nbytes <= step and not region.exact and region.store == store

                runs = cut_runs(op.plan, put=False)
                batch = Batch(
                    op, runs, bucket.data, self.concurrency, may_start, lambda run, made: self.get_run(run, op.plan, made)
                )
                await batch.run()
                raise_failed(batch.failed, op)
                return
        await super().copy(op)

    async def get_run(self, run: Run, plan: Plan, made: Attempt | None = None) -> None:
        """Get a run, a large one by several requests; `made` is an attempt at the one request of a small one."""
        bucket = self._bucket(run.region.store)
        options = bucket.options
        sink = views(plan.dst, plan.lengths, run.start, run.stop)
        verified = options.checksum is not None and run.offset == 0 and run.nbytes == run.size
        size = run.size if run.region.exact or verified else None
        step = _range_nbytes(bucket, plan)
        if made is not None or (run.nbytes <= step and not bucket.proxied):
            await bucket.data.get(run.key, run.offset, sink, run.nbytes, size, made)
            return
        # An object that is replaced meanwhile would come in pieces of both.
        for _ in range(TORN_ATTEMPTS):
            if len(await self._get_pieces(bucket, run, sink, size, step)) == 1:
                break
        else:
            raise IntegrityError(f"s3: {run.key!r} was replaced again and again while it was read", backend=self.name)
        if verified and not bucket.proxied:
            await bucket.data.verify_whole(run.key, sink, run.nbytes)

    async def _get_pieces(self, bucket: Bucket, run: Run, sink: list[memoryview], size: int | None, step: int) -> set[str]:
        """Get a run in pieces of `step` bytes; return the entity tags that the pieces came with."""
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
            await bucket.ask("put_object", run.key, Key=run.key, Body=b"".join(body), **arguments)
        else:
            await bucket.data.put(run.key, body, run.nbytes, if_none_match=run.region.if_none_match)

    async def _put_parts(self, bucket: Bucket, run: Run, body: list[memoryview]) -> None:
        upload = await begin_upload(bucket, self._aborts, run.key, run.nbytes, if_none_match=run.region.if_none_match)
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
        return await begin_upload(
            self._bucket(address), self._aborts, key, nbytes, if_none_match=if_none_match, max_piece_nbytes=max_piece_nbytes
        )

    async def _plain_get(
        self, bucket: Bucket, key: str, first: int, sink: list[memoryview], nbytes: int, size: int | None
    ) -> str:
        arguments = {"Range": f"bytes={first}-{first + nbytes - 1}", **get_arguments(bucket.options)}

        async def get() -> tuple[dict[str, Any], bytes]:
            got = await bucket.ask("get_object", key, Key=key, **arguments)
            async with got["Body"] as body:
                return got, await body.read()

        for attempt in range(1, bucket.options.attempts + 1):
            try:
                got, content = await get()
                break
            except (BotoCoreError, ClientPayloadError, OSError, TimeoutError) as error:
                # aiobotocore sends again what got no answer, not what breaks in the middle of one.
                if attempt == bucket.options.attempts:
                    raise mapped(error, repr(key)) from error
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

    async def _look(self, bucket: Bucket, key: str) -> Stat:
        if bucket.proxied:
            head = await bucket.ask("head_object", key, Key=key, **get_arguments(bucket.options))
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
            page = await bucket.ask("list_objects_v2", prefix, **arguments)
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
            (bucket.ask("delete_object", key, Key=key, **more) for key in keys), min(ASKED_AT_ONCE, len(keys))
        )

    async def _delete_many(self, bucket: Bucket, keys: Sequence[str], more: dict[str, Any]) -> None:
        listed = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = await bucket.ask("delete_objects", keys[0], Delete=listed, **more)
        for error in answer.get("Errors", ()):
            if error.get("Code") == "AccessDenied":
                raise AccessError(f"s3: deleting {error.get('Key')!r}: {error.get('Message')}", backend=self.name)
            raise BackendError(f"s3: deleting {error.get('Key')!r}: {error.get('Code')}", backend=self.name)


def _range_nbytes(bucket: Bucket, plan: Plan) -> int:
    """Return how many bytes of an object one request gets.

    More than `range_nbytes` where the plan has enough for all requests that are of use: servers read ahead, JuiceFS's gateway
    tens of MiB, and whatever they have read behind a range's end is lost.
    """
    least = bucket.options.range_nbytes
    if bucket.proxied:
        return least
    times = plan.nbytes // (least * bucket.data.endpoint.pool.useful(least))
    return least * max(1, min(times, MOST_RANGES))


def _stat(key: str, nbytes: int, found: dict[str, Any]) -> Stat:
    modified = found.get("LastModified")
    return Stat(key, nbytes, str(found.get("ETag", "")).strip('"'), modified.timestamp() if modified else 0.0)
