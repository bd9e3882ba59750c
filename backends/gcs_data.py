"""The bytes of the gcs backend: downloads into registered memory and uploads by one request, options, retries and errors.

The protocol is that of cloud.google.com/storage/docs/json_api.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

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
from nixl_async.objects import off_loop

try:
    import aiohttp
    from aiohttp.http_exceptions import HttpProcessingError
    from gcloud.aio.storage.storage import init_api_root
except ImportError as error:
    raise MissingDependency(f"the gcs backend needs gcloud-aio-storage ({error}): pip install 'nixl-async[gcs]'") from error

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
    `api_root` another server's address, such as an emulator's, which is asked without credentials; with `authenticate` they go
    there too, as a private endpoint of Google's needs. `checksum="crc32c"` (needs awscrt) is sent with every put that we have all
    bytes of, and checked on gets of whole objects. Objects above `piece_nbytes` are got and put by several requests. `timeout` is
    each request's, in seconds.
    """

    service_file: str | None = None
    api_root: str | None = None
    authenticate: bool = False
    checksum: str | None = None
    concurrency: int = 16
    piece_nbytes: int = 8 << 20
    timeout: int = 60
    attempts: int = 5

    def check(self) -> GCSOptions:
        """Refuse values that mean nothing; return itself."""
        if not isinstance(self.authenticate, bool):
            raise ConfigurationError(f"gcs option authenticate={self.authenticate!r}; it must be True or False")
        if self.checksum not in (None, "crc32c"):
            raise ConfigurationError(f"gcs option checksum={self.checksum!r}; it must be None or 'crc32c'")
        for name in ("concurrency", "piece_nbytes", "timeout", "attempts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"gcs option {name}={getattr(self, name)!r}; it must be a positive integer")
        return self

    @property
    def server(self) -> tuple[bool, str]:
        """Whether requests go without credentials, and the server's address."""
        found: tuple[bool, str] = init_api_root(self.api_root, False if self.authenticate else None)
        return found


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
    """Calls up to `attempts` times with exponential back-off and full jitter; `counts` as of the other object stores.

    `token` is gcloud-aio-auth's: where the server refuses it (401), a call is made once more with the next one.
    """

    attempts: int = 5
    base_seconds: float = 0.1
    cap_seconds: float = 5.0
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "retries": 0, "failed": 0})
    token: Any = None

    async def __call__(self, call: Callable[[], Awaitable[Any]], what: str, *, damage: bool = True) -> tuple[Any, int]:
        """Return what `call` returns, and how often it was called; `damage`: bytes that arrived damaged are sent again.

        Raises:
            TransferError: the last attempt failed, or one that is not worth another.
        """
        renewed = self.token is None
        for attempt in range(1, self.attempts + 1):
            self.counts["requests"] += 1
            began = datetime.now(UTC)
            try:
                return await call(), attempt
            except NixlError as error:
                if not isinstance(error, DamagedError) or attempt == self.attempts:
                    self.counts["failed"] += 1
                    raise
            except aiohttp.ClientResponseError as error:
                if isinstance(error.__cause__, HttpProcessingError):
                    # What came is no answer; aiohttp gives it the status 400, and all its bytes as the message.
                    if attempt == self.attempts:
                        self.counts["failed"] += 1
                        raise BackendError(f"gcs: {what}: the answer is malformed", backend="gcs") from error
                elif error.status == 401 and not renewed and attempt < self.attempts:
                    renewed = True
                    await self._renew(began, what)
                    self.counts["retries"] += 1
                    continue
                elif (error.status not in RETRYABLE and not (_is_damage(error) and damage)) or attempt == self.attempts:
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

    async def _renew(self, began: datetime, what: str) -> None:
        """Get another token, unless that was done since `began`: of many that were refused at once, the first does it for all."""
        try:
            if self.token.acquiring is None and self.token.access_token_acquired_at < began:
                self.token.access_token = None
            await self.token.ensure_token()
        except Exception as error:
            self.counts["failed"] += 1
            raise AccessError(
                f"gcs: {what}: 401, and no other token: {type(error).__name__}: {error}", backend="gcs"
            ) from error


class DamagedError(IntegrityError):
    """Bytes that arrived damaged, and may not the next time."""


class RepeatedError(ConflictError):
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
        412: ConflictError if attempt == 1 else RepeatedError,
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
        return self.options.server[1]

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
        except RepeatedError:
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
