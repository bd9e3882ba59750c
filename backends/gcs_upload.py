"""Resumable uploads of the gcs backend, by pieces (cloud.google.com/storage/docs/performing-resumable-uploads)."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from nixl_async.backend import Upload
from nixl_async.backends.gcs_data import BucketData, DamagedError, RepeatedError
from nixl_async.descriptors import Side
from nixl_async.errors import BackendError
from nixl_async.objects import off_loop, views

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

QUANTUM_NBYTES = 256 << 10
"""Of which the pieces of a resumable upload are multiples, all but the last."""


class PieceUpload(Upload):
    """A resumable upload. Pieces go out in order, one at a time; the last one waits for `finish`, which makes the object appear."""

    def __init__(self, bucket: BucketData, key: str, nbytes: int, only_new: bool, max_piece_nbytes: int | None = None) -> None:
        wanted = min(bucket.options.piece_nbytes, max_piece_nbytes or bucket.options.piece_nbytes)
        self.piece_nbytes = max(QUANTUM_NBYTES, wanted // QUANTUM_NBYTES * QUANTUM_NBYTES)
        self._bucket, self._key, self._nbytes, self._only_new = bucket, key, nbytes, only_new
        self._promised: Sequence[memoryview] = ()
        self._mark = ""
        self._session: URL | None = None
        self._next = 0
        self._turn = asyncio.Condition()
        self._last = b""
        self._ended = False

    def promise(self, body: Sequence[memoryview]) -> None:
        """Tell the checksum of all bytes, before the first piece."""
        self._promised = body

    async def put(self, number: int, source: Side, lengths: Array) -> None:
        """Send a piece when those before it are there."""
        await self.put_views(number, views(source, lengths, 0, len(lengths)))

    async def put_views(self, number: int, body: Sequence[memoryview]) -> None:
        """Send a piece out of these views."""
        nbytes = sum(map(len, body))
        async with self._turn:
            await self._turn.wait_for(lambda: self._next == number)
            data = await off_loop(nbytes, b"".join, body)
            first = number * self.piece_nbytes
            if first + nbytes == self._nbytes:
                self._last = data
            else:
                await self._send(first, data)
            self._next += 1
            self._turn.notify_all()

    async def finish(self) -> None:
        """Send the last piece.

        Raises:
            ConflictError: there is an object already, and there must not be one.
        """
        try:
            await self._send(self._nbytes - len(self._last), self._last)
        except DamagedError:
            self._ended = True
            raise
        except RepeatedError:
            if not await self._bucket.is_ours(self._key, self._mark):
                raise
        self._ended = True

    async def abort(self) -> None:
        """End the session, and with it what it has got; a cancellation meanwhile waits for that."""
        if self._ended or self._session is None:
            return
        self._ended = True
        task = asyncio.ensure_future(self._request("DELETE", {}, b""))
        while not task.done():
            with suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(task)
        if not task.cancelled():
            # The service answers 499, and forgets sessions after a week anyway.
            task.exception()

    async def _send(self, first: int, data: bytes) -> None:
        if self._session is None:
            await self._begin()
        attempts = 0

        async def once() -> None:
            nonlocal attempts
            attempts += 1
            start = first
            if attempts > 1:
                # What has arrived of the piece must not be sent again.
                status, arrived = await self._request("PUT", {"Content-Range": f"bytes */{self._nbytes}"}, b"")
                if status != 308:
                    return
                start = min(max(first, arrived // QUANTUM_NBYTES * QUANTUM_NBYTES), first + len(data))
                if start == first + len(data) < self._nbytes:
                    return
            place = f"bytes {start}-{first + len(data) - 1}/{self._nbytes}"
            status, _ = await self._request("PUT", {"Content-Range": place}, data[start - first :])
            if status == 308 and first + len(data) == self._nbytes:
                raise aiohttp.ClientPayloadError("the server has not got all bytes")

        await self._bucket.retry(once, f"putting bytes {first} to {first + len(data)} of {self._key!r}", damage=False)

    async def _begin(self) -> None:
        bucket = self._bucket
        self._mark, description = await bucket.describe(self._promised, self._only_new)
        client, url = bucket.client, f"{bucket.root}/upload/storage/v1/b/{quote(bucket.name, safe='')}/o"
        parameters = {"uploadType": "resumable", "name": self._key}
        if self._only_new:
            parameters["ifGenerationMatch"] = "0"

        async def once() -> Any:
            headers = {
                **await self._authorization(),
                "X-Upload-Content-Type": "application/octet-stream",
                "X-Upload-Content-Length": str(self._nbytes),
            }
            return await client.session.session.post(
                url,
                params=parameters,
                headers=headers,
                json={"name": self._key, **description},
                timeout=aiohttp.ClientTimeout(bucket.options.timeout),
                raise_for_status=True,
            )

        answer, _ = await bucket.retry(once, f"beginning to put {self._key!r}")
        async with answer:
            location = answer.headers.get("Location")
        if not location:
            raise BackendError(f"gcs: the server names no session for {self._key!r}", backend="gcs")
        self._session = URL(location, encoded=True)

    async def _request(self, method: str, headers: dict[str, str], data: bytes) -> tuple[int, int]:
        """Send a request to the session; return its status, and how many bytes have arrived."""
        assert self._session is not None
        lines = {**await self._authorization(), **headers, "Content-Length": str(len(data))}
        async with self._bucket.client.session.session.request(
            method,
            self._session,
            headers=lines,
            data=io.BytesIO(data) if data else None,
            timeout=aiohttp.ClientTimeout(self._bucket.options.timeout),
            allow_redirects=False,
        ) as answer:
            if answer.status >= 400:
                text = await answer.text(errors="replace")
                raise aiohttp.ClientResponseError(
                    answer.request_info, answer.history, status=answer.status, message=f"{answer.reason}: {text}"
                )
            await answer.read()
            end = answer.headers.get("Range", "").rpartition("-")[2]
            return answer.status, int(end) + 1 if end.isdecimal() else 0

    async def _authorization(self) -> dict[str, str]:
        if self._bucket.options.server[0]:
            return {}
        return {"Authorization": f"Bearer {await self._bucket.client.token.get()}"}
