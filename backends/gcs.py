"""Objects of Google Cloud Storage, through its JSON interface and gcloud-aio-storage.

The library copies each body once; where that matters, Google's XML interface with HMAC keys is served by the s3 backend:
`agent.store("s3://bucket/", endpoint_url="https://storage.googleapis.com", region="auto", addressing="path", access_key=…)`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Host, Stat, StoreAddress, Upload
from nixl_async.backends.gcs_data import (
    BucketData,
    DamagedError,
    GCSOptions,
    Retry,
    crc32c,
    new_session,
    with_options,
)
from nixl_async.backends.gcs_upload import PieceUpload
from nixl_async.descriptors import Plan, Side
from nixl_async.errors import BackendError, ConfigurationError, MissingDependency, NotFoundError
from nixl_async.objects import ObjectBackend, Run, cut_views, gather_bounded, store_of, views

try:
    from gcloud.aio.storage import Storage
except ImportError as error:
    raise MissingDependency(f"the gcs backend needs gcloud-aio-storage ({error}): pip install 'nixl-async[gcs]'") from error

if TYPE_CHECKING:
    from aiohttp import ClientSession

ASKED_AT_ONCE = 32
LISTED_AT_ONCE = 200
"""A page of a listing is read in one iteration of the loop, in less than a millisecond."""


class GCSBackend(ObjectBackend):
    """Serves `gs://` stores. Options are those of `GCSOptions`; a store's own go before the backend's.

    Objects above `piece_nbytes` are put by resumable uploads, which show nothing before their last piece. An object that is got by
    several requests while somebody puts it is got again, so that the bytes are of one version.
    """

    name = "gcs"
    schemes = ("gs",)
    rank = 64

    def __init__(self, **options: Any) -> None:
        self._options = with_options(GCSOptions(), options)
        self.concurrency = self._options.concurrency
        self._clients: dict[tuple[str | None, str | None, bool], Any] = {}
        self._buckets: dict[tuple[str, tuple[tuple[str, Any], ...]], BucketData] = {}
        self._session: ClientSession | None = None

    async def open(self, host: Host) -> None:
        """Make ready; the session is made when a store is opened."""
        self.closed = False

    async def aclose(self) -> None:
        """Close every connection."""
        self.closed = True
        for client in self._clients.values():
            await client.close()
        self._clients.clear()
        self._buckets.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def how(self, src: Side, dst: Side) -> str:
        """Tell the server."""
        address = store_of(src, dst)
        bucket = self._buckets.get((address.bucket, address.options))
        return "store not open" if bucket is None else f"gcloud-aio-storage to {bucket.root}"

    @property
    def counts(self) -> dict[str, int]:
        """Requests sent, sent again, and failed for good, since the backend was opened."""
        found = {"requests": 0, "retries": 0, "failed": 0}
        for bucket in self._buckets.values():
            for name, value in bucket.retry.counts.items():
                found[name] += value
        return found

    async def open_store(self, address: StoreAddress) -> None:
        """Make the client; no request is made to the server."""
        self.check_open()
        at = (address.bucket, address.options)
        if at in self._buckets:
            return
        options = with_options(self._options, dict(address.options))
        if options.checksum is not None:
            crc32c()
        if self._session is None:
            self._session = new_session()
        anonymous, _ = options.server
        key = (options.service_file, options.api_root, anonymous)
        if key not in self._clients:
            try:
                self._clients[key] = Storage(
                    service_file=options.service_file,
                    session=self._session,  # type: ignore[arg-type]
                    api_root=options.api_root,
                    api_is_dev=anonymous,
                )
            except Exception as error:
                # A key file that is not there or not one; the library raises whatever it meets.
                raise ConfigurationError(f"gcs: {address}: {type(error).__name__}: {error}") from error
        client = self._clients[key]
        token = None if anonymous else client.token
        self._buckets[at] = BucketData(address.bucket, options, client, Retry(options.attempts, token=token))

    def _bucket(self, address: StoreAddress) -> BucketData:
        self.check_open()
        return self._buckets[(address.bucket, address.options)]

    # Bytes.

    async def get_run(self, run: Run, plan: Plan) -> None:
        """Get a run, a large one by several requests."""
        bucket = self._bucket(run.region.store)
        pieces = cut_views(views(plan.dst, plan.lengths, run.start, run.stop), bucket.options.piece_nbytes)
        size = run.size if run.region.exact else None
        if len(pieces) == 1:
            await bucket.get(run.key, run.offset, pieces[0], size)
            return
        for _ in range(bucket.options.attempts):
            versions: set[str] = set()

            async def get(number: int, piece: list[memoryview], versions: set[str] = versions) -> None:
                versions.add(await bucket.get(run.key, run.offset + number * bucket.options.piece_nbytes, piece, size))

            await gather_bounded((get(number, piece) for number, piece in enumerate(pieces)), self.concurrency)
            if len(versions) == 1:
                return
        raise BackendError(
            f"gcs: {run.key!r} was put again each of the {bucket.options.attempts} times that it was got", backend=self.name
        )

    async def put_run(self, run: Run, plan: Plan) -> None:
        """Put an object, a large one in pieces."""
        bucket = self._bucket(run.region.store)
        body = views(plan.src, plan.lengths, run.start, run.stop)
        only_new = run.region.if_none_match
        if not bucket.is_large(run.nbytes, only_new):
            await bucket.put(run.key, body, only_new=only_new)
            return
        for attempt in range(1, bucket.options.attempts + 1):
            try:
                await _put_pieces(bucket, run, body)
            except DamagedError:
                # The session knows the checksum of all its bytes, and is over.
                if attempt == bucket.options.attempts:
                    raise
            else:
                return

    async def upload(
        self, address: StoreAddress, key: str, nbytes: int, *, if_none_match: bool = False, max_piece_nbytes: int | None = None
    ) -> Upload:
        """Begin a resumable upload; its pieces are sent one after another."""
        return PieceUpload(self._bucket(address), key, nbytes, if_none_match, max_piece_nbytes)

    # Questions.

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        """Ask for objects' metadata, many at once."""
        bucket = self._bucket(address)
        found: list[Stat | None] = [None] * len(keys)

        async def look(position: int) -> None:
            with suppress(NotFoundError):
                found[position] = _stat(await bucket.metadata(keys[position]))

        await gather_bounded((look(position) for position in range(len(keys))), ASKED_AT_ONCE)
        return found

    async def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        """Page through the listing."""
        bucket = self._bucket(address)
        parameters = {"prefix": prefix, "maxResults": str(LISTED_AT_ONCE)}
        while True:
            page = await bucket.ask(f"listing {bucket.name!r}", bucket.client.list_objects, bucket.name, params=parameters)
            for item in page.get("items", ()):
                yield _stat(item)
            if not (token := page.get("nextPageToken", "")):
                return
            parameters = {**parameters, "pageToken": token}

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Delete objects, many at once."""
        bucket = self._bucket(address)

        async def remove(key: str) -> None:
            with suppress(NotFoundError):
                await bucket.ask(f"deleting {key!r}", bucket.client.delete, bucket.name, key)

        await gather_bounded((remove(key) for key in keys), ASKED_AT_ONCE)


async def _put_pieces(bucket: BucketData, run: Run, body: Sequence[memoryview]) -> None:
    upload = PieceUpload(bucket, run.key, run.nbytes, run.region.if_none_match)
    try:
        if bucket.options.checksum is not None:
            upload.promise(body)
        # One after another: a session takes no two at once.
        for number, piece in enumerate(cut_views(body, upload.piece_nbytes)):
            await upload.put_views(number, piece)
        await upload.finish()
    except BaseException:
        await upload.abort()
        raise


def _stat(found: dict[str, Any]) -> Stat:
    modified = found.get("updated")
    seconds = datetime.fromisoformat(modified.replace("Z", "+00:00")).timestamp() if modified else 0.0
    return Stat(found["name"], int(found.get("size", 0)), found.get("etag", ""), seconds)
