"""The bytes of the gcs backend: downloads into registered memory, uploads by one request, and resumable ones by pieces.

The protocol is that of cloud.google.com/storage/docs/json_api and …/docs/performing-resumable-uploads.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nixl_async.backend import Upload
from nixl_async.descriptors import Side
from nixl_async.errors import (
    AccessError,
    BackendError,
    ConfigurationError,
    ConflictError,
    IntegrityError,
    MissingDependency,
    NixlError,
    NotFoundError,
    TransferError,
)
from nixl_async.objects import off_loop, views

try:
    import aiohttp
    from gcloud.aio.storage.storage import init_api_root
    from yarl import URL
except ImportError as error:
    raise MissingDependency(f"the gcs backend needs gcloud-aio-storage ({error}): pip install 'nixl-async[gcs]'") from error

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

QUANTUM_NBYTES = 256 << 10
"""Of which the pieces of a resumable upload are multiples, all but the last."""
DESCRIBED_NBYTES = 1 << 20
"""Up to this size, bytes are sent in one message with what is said of them: the library copies both together on the loop."""
READ_NBYTES = 256 << 10
RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
MARK = "nixl-async-put"
"""Metadata by which a conditional put that was sent twice recognises itself."""


@dataclass(frozen=True, slots=True)
class GCSOptions:
    """What `GCSBackend` and `agent.store("gs://…")` take.

    `service_file` is a service account's key file (default: GOOGLE_APPLICATION_CREDENTIALS, or the machine's own account);
    `api_root` another server's address, such as an emulator's, which is asked without credentials. `checksum="crc32c"` (needs
    awscrt) is sent with every put that we have all bytes of, and checked on gets of whole objects. Objects above `piece_nbytes` are
    got and put by several requests. `timeout` is each request's, in seconds.
    """

    service_file: str | None = None
    api_root: str | None = None
    checksum: str | None = None
    concurrency: int = 16
    piece_nbytes: int = 8 << 20
    timeout: int = 60
    attempts: int = 5

    def check(self) -> GCSOptions:
        """Refuse values that mean nothing; return itself."""
        if self.checksum not in (None, "crc32c"):
            raise ConfigurationError(f"gcs option checksum={self.checksum!r}; it must be None or 'crc32c'")
        for name in ("concurrency", "piece_nbytes", "timeout", "attempts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"gcs option {name}={getattr(self, name)!r}; it must be a positive integer")
        return self


def with_options(options: GCSOptions, given: dict[str, Any]) -> GCSOptions:
    """Replace those that are given; refuse unknown ones."""
    known = [one.name for one in fields(GCSOptions)]
    for name in given:
        if name not in known:
            raise ConfigurationError(f"gcs has no option {name!r}; it has {', '.join(known)}")
    return replace(options, **given).check()


def new_session() -> aiohttp.ClientSession:
    """Return the session that all requests take; proxies are those of the environment."""
    # Compressed objects are got as they are stored: their sizes and checksums are of that.
    return aiohttp.ClientSession(trust_env=True, auto_decompress=False, headers={"Accept-Encoding": "gzip"})


@dataclass(slots=True)
class Retry:
    """Calls up to `attempts` times with exponential back-off and full jitter; `counts` as of the other object stores."""

    attempts: int = 5
    base_seconds: float = 0.1
    cap_seconds: float = 5.0
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "retries": 0, "failed": 0})

    async def __call__(self, call: Callable[[], Awaitable[Any]], what: str, *, damage: bool = True) -> tuple[Any, int]:
        """Return what `call` returns, and how often it was called; `damage`: bytes that arrived damaged are sent again.

        Raises:
            TransferError: the last attempt failed, or one that is not worth another.
        """
        for attempt in range(1, self.attempts + 1):
            self.counts["requests"] += 1
            try:
                return await call(), attempt
            except NixlError as error:
                if not isinstance(error, DamagedError) or attempt == self.attempts:
                    self.counts["failed"] += 1
                    raise
            except aiohttp.ClientResponseError as error:
                if (error.status not in RETRYABLE and not (_is_damage(error) and damage)) or attempt == self.attempts:
                    self.counts["failed"] += 1
                    raise _mapped(error, what, attempt) from error
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                if attempt == self.attempts:
                    self.counts["failed"] += 1
                    raise BackendError(f"gcs: {what}: {type(error).__name__}: {error}", backend="gcs") from error
            except Exception as error:
                # Credentials that the library cannot make use of.
                self.counts["failed"] += 1
                raise BackendError(f"gcs: {what}: {type(error).__name__}: {error}", backend="gcs") from error
            self.counts["retries"] += 1
            await asyncio.sleep(random.uniform(0, min(self.cap_seconds, self.base_seconds * 2 ** (attempt - 1))))
        raise AssertionError("attempts is less than one")


class DamagedError(IntegrityError):
    """Bytes that arrived damaged, and may not the next time."""


class _AgainError(ConflictError):
    """A condition that does not hold at the second attempt, perhaps because the first one worked."""


def _is_damage(error: aiohttp.ClientResponseError) -> bool:
    """Tell whether the server got other bytes than those whose checksum it was told."""
    return error.status == 400 and "doesn't match calculated" in error.message


def _mapped(error: aiohttp.ClientResponseError, what: str, attempt: int) -> TransferError:
    kinds: dict[int, type[TransferError]] = {
        404: NotFoundError,
        401: AccessError,
        403: AccessError,
        409: ConflictError,
        412: ConflictError if attempt == 1 else _AgainError,
        416: IntegrityError,
    }
    message = " ".join(error.message.split())[:300]
    if _is_damage(error):
        return DamagedError(f"gcs: {what}: {error.status} {message}", backend="gcs")
    return kinds.get(error.status, BackendError)(f"gcs: {what}: {error.status} {message}", backend="gcs")


@dataclass(slots=True, eq=False)
class BucketData:
    """Sends requests to one bucket; `client` is gcloud-aio-storage's."""

    name: str
    options: GCSOptions
    client: Any
    retry: Retry

    @property
    def root(self) -> str:
        """The server's address."""
        return init_api_root(self.options.api_root)[1]

    async def ask(self, what: str, call: Callable[..., Awaitable[Any]], *arguments: Any, **named: Any) -> Any:
        """Call a method of the client, with retries."""
        answer, _ = await self.retry(lambda: call(*arguments, timeout=self.options.timeout, **named), what)
        return answer

    async def metadata(self, key: str) -> dict[str, Any]:
        """Ask for what is known of an object."""
        found: dict[str, Any] = await self.ask(f"looking at {key!r}", self.client.download_metadata, self.name, key)
        return found

    # Getting.

    async def get(self, key: str, first: int, sink: Sequence[memoryview], exact_nbytes: int | None) -> str:
        """Get the bytes from `first` on that fill `sink`; return the version of the object that they are of.

        With `exact_nbytes`, the object must be as long as that.

        Raises:
            IntegrityError: the object is shorter than asked for or not `exact_nbytes` long, or the bytes arrive damaged.
        """
        nbytes = sum(map(len, sink))
        # The checksum is told with whole objects only.
        whole = self.options.checksum is not None and first == 0 and exact_nbytes == nbytes
        lines = {} if whole else {"Range": f"bytes={first}-{first + nbytes - 1}"}

        async def once() -> str:
            headers = dict(lines)
            stream = await self.client.download_stream(self.name, key, headers=headers, timeout=self.options.timeout)
            async with stream as response:
                total = _total_of(response)
                if exact_nbytes is not None and total != exact_nbytes:
                    raise IntegrityError(f"gcs: {key!r} has {total} bytes, not {exact_nbytes}", backend="gcs")
                if total is not None and total < first + nbytes:
                    text = f"gcs: asked for {nbytes} bytes at {first} of {key!r}, an object of {total} bytes"
                    raise IntegrityError(text, backend="gcs")
                if response.status != 206 and not (first == 0 and total == nbytes):
                    raise BackendError(f"gcs: the server ignored the range of {key!r}", backend="gcs")
                await _receive(response, sink, key)
                if whole:
                    await _verify(response, sink, nbytes, key)
                # Emulators do not tell the generation.
                return str(response.headers.get("x-goog-generation", ""))

        version: str = (await self.retry(once, f"getting {key!r}"))[0]
        return version

    # Putting.

    def is_large(self, nbytes: int, only_new: bool) -> bool:
        """Tell whether an object is put by pieces."""
        described = only_new or self.options.checksum is not None
        return nbytes > (min(DESCRIBED_NBYTES, self.options.piece_nbytes) if described else self.options.piece_nbytes)

    async def put(self, key: str, body: Sequence[memoryview], *, only_new: bool) -> None:
        """Put a whole object by one request; `only_new` refuses to replace one."""
        nbytes = sum(map(len, body))
        data = await off_loop(nbytes, b"".join, body)
        mark, description = await self.describe(body, only_new)

        async def once() -> None:
            await self.client.upload(
                self.name,
                key,
                data,
                content_type="application/octet-stream",
                parameters={"ifGenerationMatch": "0"} if only_new else {},
                metadata=description or None,
                force_resumable_upload=False,
                timeout=self.options.timeout,
            )

        try:
            await self.retry(once, f"putting {key!r}")
        except _AgainError:
            if not await self.is_ours(key, mark):
                raise

    async def describe(self, body: Sequence[memoryview], only_new: bool) -> tuple[str, dict[str, Any]]:
        """Return a mark, and the metadata to be put with a body."""
        mark = os.urandom(8).hex() if only_new else ""
        found: dict[str, Any] = {"metadata": {MARK: mark}} if mark else {}
        if self.options.checksum is not None and body:
            found["crc32c"] = await off_loop(sum(map(len, body)), digest, body)
        return mark, found

    async def is_ours(self, key: str, mark: str) -> bool:
        """Tell whether the object that a condition has found was put by an earlier attempt."""
        found = await self.metadata(key)
        return bool(mark) and found.get("metadata", {}).get(MARK) == mark


def _total_of(response: Any) -> int | None:
    if response.status == 206:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if total.isdecimal() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


async def _receive(response: Any, sink: Sequence[memoryview], key: str) -> None:
    for piece in sink:
        at = 0
        while at < len(piece):
            data = await response.content.read(min(READ_NBYTES, len(piece) - at))
            if not data:
                raise aiohttp.ClientPayloadError(f"the answer with {key!r} ends early")
            piece[at : at + len(data)] = data
            at += len(data)
    # Also what a connection needs to be used again.
    if await response.content.read(1):
        raise aiohttp.ClientPayloadError(f"the answer with {key!r} has more than was asked for")


async def _verify(response: Any, sink: Sequence[memoryview], nbytes: int, key: str) -> None:
    told = ",".join(response.headers.getall("x-goog-hash", ()))
    sums = dict(one.strip().split("=", 1) for one in told.split(",") if "=" in one)
    if "crc32c" in sums and (found := await off_loop(nbytes, digest, sink)) != sums["crc32c"]:
        raise DamagedError(
            f"gcs: {key!r} arrived damaged: its CRC32C is {found}, the server says {sums['crc32c']}", backend="gcs"
        )


def digest(body: Sequence[memoryview]) -> str:
    """Return the CRC32C as Google writes it: base64 of the big-endian number."""
    function = crc32c()
    value = 0
    for piece in body:
        value = function(piece, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def crc32c() -> Callable[[Any, int], int]:
    """Return the function that computes CRC32C."""
    try:
        from awscrt.checksums import crc32c as function
    except ImportError as error:
        raise MissingDependency(f"checksum='crc32c' needs awscrt: pip install awscrt ({error})") from error
    return function  # type: ignore[no-any-return]


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
        except _AgainError:
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
        if init_api_root(self._bucket.options.api_root)[0]:
            return {}
        return {"Authorization": f"Bearer {await self._bucket.client.token.get()}"}
