"""Multipart uploads of the s3 backend (docs.aws.amazon.com/AmazonS3, "Uploading and copying objects using multipart upload")."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nixl_async.backend import Upload, quiesce
from nixl_async.backends.s3_bucket import Bucket
from nixl_async.backends.s3_config import MIN_PART_NBYTES, get_arguments, payer, put_arguments
from nixl_async.backends.s3_data import MARK
from nixl_async.descriptors import Side
from nixl_async.errors import ConflictError, NotFoundError, TransferError
from nixl_async.objects import views

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from nixl_async.descriptors import Array

MAX_PARTS = 10_000
LATE_PARTS_SECONDS = (0.1, 0.3, 0.6)
ABORT_SECONDS = 2.0
"""How long a failed or cancelled transfer waits for its upload to be dropped; it goes on being dropped behind its back."""


class Aborts:
    """What is cleaned up behind transfers."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def drop(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do what cleans up behind a transfer; wait for it a while."""

        async def quietly() -> None:
            with suppress(TransferError):
                await work

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await quiesce(asyncio.ensure_future(asyncio.wait([task], timeout=ABORT_SECONDS)))

    async def aclose(self) -> None:
        """Wait a while for what is being cleaned up, then end it."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=ABORT_SECONDS)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


async def begin_upload(
    bucket: Bucket, aborts: Aborts, key: str, nbytes: int, *, if_none_match: bool, max_piece_nbytes: int | None = None
) -> S3Upload:
    """Begin an upload of `nbytes` bytes. One that begins while its caller is cancelled is aborted."""
    wanted = bucket.options.part_nbytes
    # But for the last, S3 takes no part below its minimum.
    piece = max(min(wanted, max_piece_nbytes or wanted), MIN_PART_NBYTES, -(-nbytes // MAX_PARTS))
    mark = uuid.uuid4().hex
    arguments = put_arguments(bucket.options) | {"Metadata": {MARK.removeprefix("x-amz-meta-"): mark}}
    if bucket.options.checksum:
        # A checksum of the parts' checksums is one that no reader can compare with.
        arguments["ChecksumType"] = "FULL_OBJECT"
    making = asyncio.ensure_future(bucket.ask("create_multipart_upload", key, Key=key, **arguments))
    try:
        made = await quiesce(making)
    except asyncio.CancelledError:
        if not making.cancelled() and making.exception() is None:
            await S3Upload(bucket, aborts, key, making.result()["UploadId"], piece, if_none_match, mark).abort()
        raise
    return S3Upload(bucket, aborts, key, made["UploadId"], piece, if_none_match, mark)


class S3Upload(Upload):
    """A multipart upload. Its parts may be sent at once; `mark` tells its object from another's."""

    def __init__(
        self, bucket: Bucket, aborts: Aborts, key: str, upload_id: str, piece_nbytes: int, if_none_match: bool, mark: str
    ) -> None:
        self.piece_nbytes = piece_nbytes
        self._bucket, self._aborts, self._key, self._id, self._mark = bucket, aborts, key, upload_id, mark
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
            head = await self._bucket.ask("head_object", self._key, Key=self._key)
            return bool(head.get("Metadata", {}).get(MARK.removeprefix("x-amz-meta-")) == self._mark)
        return False

    async def abort(self) -> None:
        """Drop the parts; a cancellation meanwhile waits for that."""
        if not self._ended:
            self._ended = True
            await self._aborts.drop(self._abandon())

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
        return await self._bucket.ask(operation, self._key, Key=self._key, UploadId=self._id, **more)
