"""The data path of the s3 backend: signed GETs into registered memory and PUTs out of it.

Signatures are AWS Signature Version 4 (docs.aws.amazon.com/IAM, "Create a signed AWS API request"); their hashes and HMACs are the
standard library's. Botocore's signer takes ten times as long, more than a 64 KiB object does; the tests hold the two equal.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from nixl_async.backend import quiesce
from nixl_async.errors import (
    AccessError,
    BackendError,
    ConflictError,
    IntegrityError,
    MissingDependency,
    NotFoundError,
    OutOfSpace,
    TransferError,
)
from nixl_async.http import DamagedError, HTTPError, Pool, Request, Response
from nixl_async.http.retry import Retry
from nixl_async.native import ffi, lib

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"
MARK = "x-amz-meta-nixl-put"
"""Marks who put an object, where a second attempt must find out whether the first one did."""
HASH_ON_LOOP_NBYTES = 128 << 10
"""Bodies up to this size are hashed on the loop, a tenth of a millisecond; larger ones on a thread."""
WARMED_NBYTES = 256 << 10
"""So much is read into the processor's cache before it is hashed: a hash reads one line after the other, and waits for each."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A key pair, and the session's token if it is temporary."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str = field(default="", repr=False)


@dataclass(slots=True)
class Signer:
    """Signs requests for one region; remembers the day's key."""

    region: str
    service: str = "s3"
    _key: tuple[Credentials | None, str, bytes] = (None, "", b"")

    def authorization(
        self, credentials: Credentials, method: str, path: str, query: str, headers: Sequence[tuple[str, str]], amz_date: str
    ) -> str:
        """Return the Authorization header's value. `headers` are sorted, lower-case, and include x-amz-content-sha256."""
        names = ";".join(name for name, _ in headers)
        payload = next(value for name, value in headers if name == "x-amz-content-sha256")
        lines = "".join(f"{name}:{value}\n" for name, value in headers)
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{payload}"
        day = amz_date[:8]
        scope = self.scope(day)
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{amz_date}\n{scope}\n{digest}"
        signature = hmac.digest(self.key_of(credentials, day), text.encode(), "sha256").hex()
        return f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"

    def scope(self, day: str) -> str:
        """Return what a signature holds for."""
        return f"{day}/{self.region}/{self.service}/aws4_request"

    def key_of(self, credentials: Credentials, day: str) -> bytes:
        """Return the key that signs on a day."""
        if self._key[0] is not credentials or self._key[1] != day:
            key = b"AWS4" + credentials.secret_key.encode()
            for part in (day, self.region, self.service, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key = (credentials, day, key)
        return self._key[2]


@dataclass(slots=True, eq=False)
class Endpoint:
    """Where a bucket is: its server's pool, the Host header, the path before keys, and the region."""

    pool: Pool
    host: str
    base_path: str
    signer: Signer
    secure: bool


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that was sent already: where to, signed with what, and what came of it."""

    endpoint: Endpoint
    credentials: Credentials | None
    outcome: Response | HTTPError

    def result(self) -> Response:
        """Return the response, or raise what came instead."""
        if isinstance(self.outcome, HTTPError):
            raise self.outcome
        return self.outcome


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What goes with requests: see `S3Options`. The headers of gets, of puts of whole objects, and of puts of parts."""

    sign_payload: bool = False
    checksum: str | None = None
    of_get: tuple[tuple[str, str], ...] = ()
    of_put: tuple[tuple[str, str], ...] = ()
    of_part: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, eq=False)
class BucketData:
    """Sends data requests to one bucket.

    `credentials(refused)` yields what to sign with: others than those that the server has refused, if there are any.
    `moved(endpoint, response)` tells where else to send what that endpoint answered so, if anywhere.
    """

    bucket: str
    endpoint: Endpoint
    options: DataOptions
    credentials: Callable[[Credentials | None], Awaitable[Credentials | None]]
    moved: Callable[[Endpoint, Response], Awaitable[Endpoint | None]]
    retry: Retry = field(default_factory=Retry)
    _second: tuple[int, str] = (0, "")

    def amz_date(self) -> str:
        """Return the time as signatures tell it."""
        now = int(time.time())
        if self._second[0] != now:
            self._second = (now, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)))
        return self._second[1]

    def head(
        self,
        endpoint: Endpoint,
        credentials: Credentials | None,
        method: str,
        key: str,
        query: str = "",
        headers: Sequence[tuple[str, str]] = (),
        payload: str = EMPTY_SHA256,
        body_nbytes: int | None = None,
    ) -> bytes:
        """Build a signed request's head. `headers` have lower-case names; `query` is encoded and sorted."""
        path = f"{endpoint.base_path}/{quote(key, safe='/~')}"
        signed = [("host", endpoint.host), *headers]
        if credentials is not None:
            amz_date = self.amz_date()
            signed += [("x-amz-content-sha256", payload), ("x-amz-date", amz_date)]
            if credentials.token:
                signed.append(("x-amz-security-token", credentials.token))
            signed.sort()
            value = endpoint.signer.authorization(credentials, method, path, query, signed, amz_date)
            signed.append(("authorization", value))
        if body_nbytes is not None:
            signed.append(("content-length", str(body_nbytes)))
        lines = "".join(f"{name}: {value}\r\n" for name, value in signed)
        return f"{method} {path}{'?' if query else ''}{query} HTTP/1.1\r\n{lines}\r\n".encode()

    # Getting.

    async def get(
        self,
        key: str,
        first: int,
        sink: Sequence[memoryview],
        nbytes: int,
        exact_nbytes: int | None,
        made: Attempt | None = None,
    ) -> Response:
        """Get `nbytes` bytes from `first` on into `sink`; `made` is an attempt at the same request, which counts as the first.

        With `exact_nbytes`, the object must have that size. The whole of such an object is asked for without a range, which is
        what servers tell checksums for.
        """
        whole = first == 0 and exact_nbytes == nbytes
        headers = [*self.options.of_get]
        span = f"bytes {first}-{first + nbytes - 1}/"
        if not whole:
            headers.append(("range", f"bytes={first}-{first + nbytes - 1}"))
        verify = whole and self.options.checksum is not None
        if verify:
            headers.append(("x-amz-checksum-mode", "ENABLED"))

        first_attempt = made

        async def once(endpoint: Endpoint, credentials: Credentials | None) -> Response:
            nonlocal first_attempt
            if first_attempt is not None:
                attempt, first_attempt = first_attempt, None
                response = attempt.result()
            else:
                started = endpoint.pool.may_work() or await endpoint.pool.turn()
                head = self.head(endpoint, credentials, "GET", key, "", headers)
                endpoint.pool.worked(started)
                response = await endpoint.pool.request(Request("GET", head, sink=sink, sink_nbytes=nbytes))
            if response.sunk and not whole:
                if response.status != 206:
                    raise HTTPError(f"the server ignored the range (status {response.status})", retryable=False)
                told = response.headers.get("content-range", "")
                if not told.startswith(span):
                    raise DamagedError(f"the server sent {told!r} where {span}* was asked for")
            if verify and response.sunk:
                await self._verify(sink, nbytes, response)
            return response

        response = await self._send(once, key, made)
        if not 200 <= response.status < 300:
            raise self.explain(response, f"getting {key!r}")
        total = _total(response)
        if not response.sunk:
            size = (
                f"of {total} bytes" if total is not None else f"with Content-Length {response.headers.get('content-length')}"
            )
            raise IntegrityError(f"s3: asked for {nbytes} bytes at {first} of {key!r}, an object {size}", backend="s3")
        if exact_nbytes is not None and total is not None and total != exact_nbytes:
            raise IntegrityError(f"s3: {key!r} has {total} bytes, not {exact_nbytes}", backend="s3")
        return response

    async def verify_whole(self, key: str, sink: Sequence[memoryview], nbytes: int) -> None:
        """Compare a whole object that came in several pieces with the checksum that the server tells for it."""
        response = await self.ask_head(key, (("x-amz-checksum-mode", "ENABLED"),))
        if response.status == 200:
            try:
                await self._verify(sink, nbytes, response)
            except DamagedError as error:
                raise IntegrityError(f"s3: {key!r}: {error}", backend="s3") from error

    async def _verify(self, sink: Sequence[memoryview], nbytes: int, response: Response) -> None:
        for name in ("crc32c", "crc64nvme"):
            told = response.headers.get(f"x-amz-checksum-{name}")
            # A checksum of checksums, of an object uploaded in parts, says nothing about the bytes that a reader can check.
            if told and "-" not in told:
                found = await off_loop(nbytes, checksum, name, sink)
                if found != told:
                    raise DamagedError(f"the bytes arrived damaged: their {name} is {found}, the server says {told}")

    async def ask_head(self, key: str, headers: Sequence[tuple[str, str]] = ()) -> Response:
        """Send a HEAD request; the response may be an error's, which has no body."""
        lines = [*self.options.of_get, *headers]

        async def once(endpoint: Endpoint, credentials: Credentials | None) -> Response:
            started = endpoint.pool.may_work() or await endpoint.pool.turn()
            head = self.head(endpoint, credentials, "HEAD", key, "", lines)
            endpoint.pool.worked(started)
            return await endpoint.pool.request(Request("HEAD", head))

        return await self._send(once, key)

    # Putting.

    async def put(
        self, key: str, body: Sequence[memoryview], nbytes: int, *, query: str = "", if_none_match: bool = False
    ) -> Response:
        """Put a whole object, or with `query` a part of an upload."""
        options = self.options
        headers = [*(options.of_part if query else options.of_put)]
        mark = ""
        if if_none_match:
            mark = uuid.uuid4().hex
            headers += [("if-none-match", "*"), (MARK, mark)]
        if options.checksum is not None:
            headers.append((f"x-amz-checksum-{options.checksum}", await off_loop(nbytes, checksum, options.checksum, body)))
        payload = await off_loop(nbytes, sha256, body) if options.sign_payload else UNSIGNED
        sent: list[Request] = []

        async def once(endpoint: Endpoint, credentials: Credentials | None) -> Response:
            started = endpoint.pool.may_work() or await endpoint.pool.turn()
            head = self.head(endpoint, credentials, "PUT", key, query, headers, payload, nbytes)
            endpoint.pool.worked(started)
            request = Request("PUT", head, body=body, body_nbytes=nbytes)
            sent.append(request)
            return await endpoint.pool.request(request)

        response = await self._send(once, key)
        if not 200 <= response.status < 300:
            # An earlier attempt may have arrived, and its answer been lost.
            again = len(sent) > 1 or sent[0].resent
            if not (mark and again and response.status == 412 and await self.is_marked(key, mark)):
                raise self.explain(response, f"putting {key!r}")
        return response

    async def is_marked(self, key: str, mark: str) -> bool:
        """Tell whether an object was put with this mark."""
        response = await self.ask_head(key)
        return response.status == 200 and response.headers.get(MARK) == mark

    # Both.

    async def _send(
        self, once: Callable[[Endpoint, Credentials | None], Awaitable[Response]], key: str, made: Attempt | None = None
    ) -> Response:
        """Send with retries, of which `made` is the first, which `once` knows; renew credentials once; follow the bucket once."""
        refused: Credentials | None = None
        other: Endpoint | None = None
        credentials: Credentials | None = None
        endpoint = self.endpoint

        async def attempt() -> Response:
            nonlocal credentials, endpoint, made
            if made is not None:
                credentials, endpoint, made = made.credentials, made.endpoint, None
            else:
                credentials, endpoint = await self.credentials(refused), other or self.endpoint
            return await once(endpoint, credentials)

        while True:
            try:
                response = await self.retry.send(attempt, _again)
            except DamagedError as error:
                raise IntegrityError(f"s3: {key!r}: {error}", backend="s3") from error
            except HTTPError as error:
                raise BackendError(f"s3: {key!r}: {error}", backend="s3") from error
            if response.status < 300:
                return response
            if refused is None and credentials is not None and _is_refusal(response, credentials):
                refused = credentials
                if await self.credentials(refused) != refused:
                    continue
            if other is None and response.status in (301, 307, 308, 400):
                other = await self.moved(endpoint, response)
                if other is not None:
                    continue
            return response

    def explain(self, response: Response, what: str) -> TransferError:
        """Turn an error's response into an exception."""
        code, message = error_of(response)
        text = f"s3: {what} in {self.bucket!r}: {response.status} {code} {message}".rstrip()
        return error_for(response.status, code)(text, backend="s3")


def error_for(status: int, code: str) -> type[TransferError]:
    """Return the class of our exceptions for an answer of S3's."""
    if code in _DAMAGED:
        return IntegrityError
    if code in _FULL or status == 507:
        return OutOfSpace
    kinds: dict[int, type[TransferError]] = {
        404: NotFoundError,
        401: AccessError,
        403: AccessError,
        409: ConflictError,
        412: ConflictError,
    }
    return AccessError if code in EXPIRED else kinds.get(status, BackendError)


EXPIRED = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired", "InvalidAccessKeyId"}
)
"""Error codes of credentials that held before, or may hold once they are looked up again."""
_DAMAGED = frozenset({"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"})
_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"})
_AGAIN = frozenset(
    {"RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "BadDigest", "XAmzContentSHA256Mismatch"}
)


def _again(response: Response) -> bool:
    return response.status in (400, 409) and error_of(response)[0] in _AGAIN


def _is_refusal(response: Response, credentials: Credentials) -> bool:
    if response.status not in (400, 401, 403):
        return False
    # The answer to a HEAD has no document that says why.
    return error_of(response)[0] in EXPIRED or (not response.body and credentials.token != "")


def error_of(response: Response) -> tuple[str, str]:
    """Return the code and message of S3's error document; two empty strings if there is none."""
    found = document_of(response)
    if not found and not response.body.lstrip().startswith(b"<"):
        return "", response.body[:200].decode("utf-8", "replace")
    return found.get("Code", ""), found.get("Message", "")


def document_of(response: Response) -> dict[str, str]:
    """Return what S3's error document says; nothing if there is none."""
    try:
        root = ElementTree.fromstring(response.body)
    except ElementTree.ParseError:
        return {}
    return {element.tag.rpartition("}")[2]: element.text or "" for element in root}


def _total(response: Response) -> int | None:
    total = response.headers.get("content-range", "").rpartition("/")[2]
    if total.isdecimal():
        return int(total)
    length = response.headers.get("content-length", "")
    return int(length) if response.status == 200 and length.isdecimal() else None


async def off_loop(nbytes: int, work: Callable[..., str], *arguments: Any) -> str:
    """Do work on `nbytes` bytes, on a thread if they are many; wait for it even if cancelled: it reads the caller's memory."""
    if nbytes <= HASH_ON_LOOP_NBYTES:
        return work(*arguments)
    return await quiesce(asyncio.get_running_loop().run_in_executor(None, work, *arguments))


def sha256(body: Sequence[memoryview]) -> str:
    """Return the hash that signs a payload."""
    state = hashlib.sha256()
    for piece in body:
        for at in range(0, len(piece), WARMED_NBYTES):
            some = piece[at : at + WARMED_NBYTES]
            lib.nx_http_warm(ffi.from_buffer(some), len(some))
            state.update(some)
    return state.hexdigest()


def checksum(name: str, body: Sequence[memoryview]) -> str:
    """Return the CRC called `name` as S3 writes it: base64 of the big-endian number."""
    try:
        from awscrt import checksums
    except ImportError as error:
        raise MissingDependency("checksums need awscrt: pip install 'nixl-async[s3]'") from error
    function = {"crc32c": checksums.crc32c, "crc64nvme": checksums.crc64nvme}[name]
    value = 0
    for piece in body:
        value = function(piece, value)
    return base64.b64encode(value.to_bytes(4 if name == "crc32c" else 8, "big")).decode()
