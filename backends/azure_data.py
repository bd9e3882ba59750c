"""Requests to one container of Azure Blob Storage (learn.microsoft.com/rest/api/storageservices), bodies from and to memory.

Get Blob, Put Blob, Put Block and Put Block List move bytes; Get Blob Properties, Delete Blob and List Blobs are here as well: the
SDK's own take more than a millisecond of the loop each, and a page of a listing most of a second.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from nixl_async.backend import Stat
from nixl_async.backends.azure_proxy import ProxyPool
from nixl_async.errors import (
    AccessError,
    BackendError,
    ConflictError,
    IntegrityError,
    MissingDependency,
    NotFoundError,
    TransferError,
)
from nixl_async.http import DamagedError, HTTPError, Pool, Request, Response
from nixl_async.http.retry import Retry
from nixl_async.objects import off_loop, slices

API_VERSION = "2021-12-02"
RANGE_CHECKED_NBYTES = 4 << 20
"""The longest range for which the service tells a checksum."""
LISTED_AT_ONCE = 128
"""What fits into the mebibyte that is kept of an answer, whatever the names: they may have 1024 characters."""
LISTING_SLICE_NBYTES = 12 << 10
"""How much of a listing is read in one iteration of the loop, about half a millisecond."""
MARK = "x-ms-meta-nixlasyncput"
"""Metadata by which a conditional put that was sent twice recognises itself."""


@dataclass(slots=True, eq=False)
class ContainerData:
    """Sends requests to one container. `authorise(refused)` yields a query or a header line that authorises them."""

    pool: Pool | ProxyPool
    host: str
    path: str
    authorise: Callable[[tuple[str, str] | None], Awaitable[tuple[str, str]]]
    checksum: str | None
    retry: Retry = field(default_factory=Retry)

    async def send(
        self,
        method: str,
        key: str | None,
        query: str = "",
        lines: str = "",
        *,
        body: Sequence[memoryview] = (),
        body_nbytes: int | None = None,
        sink: Sequence[memoryview] = (),
        sink_nbytes: int = 0,
        check: Callable[[Response], Awaitable[None]] | None = None,
    ) -> tuple[Response, int]:
        """Send a request for a blob, or for the container itself; return the response, and how often it was sent.

        `check` raises `HTTPError` for a response that is to be asked for again. What the server refuses as expired is authorised
        anew, once.

        Raises:
            BackendError: no attempt got a response.
            IntegrityError: the last attempt got damaged bytes.
        """
        path = self.path if key is None else f"{self.path}/{quote(key, safe='/~')}"
        if body_nbytes is not None:
            lines += f"content-length: {body_nbytes}\r\n"
        refused: tuple[str, str] | None = None
        used = ("", "")
        sent = 0

        async def once() -> Response:
            nonlocal used, sent
            used = signature, token = await self.authorise(refused)
            both = "&".join(one for one in (query, signature) if one)
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            head = (
                f"{method} {path}{'?' if both else ''}{both} HTTP/1.1\r\nhost: {self.host}\r\n"
                f"x-ms-version: {API_VERSION}\r\nx-ms-date: {date}\r\n{token}{lines}\r\n"
            )
            sent += 1
            response = await self.pool.request(Request(method, head.encode(), body, sink, sink_nbytes, body_nbytes or 0))
            if check is not None and 200 <= response.status < 300:
                await check(response)
            return response

        while True:
            try:
                response = await self.retry.send(once, _again)
            except HTTPError as error:
                kind = IntegrityError if isinstance(error, DamagedError) else BackendError
                raise kind(f"azure: {self._name(key)}: {error}", backend="azure") from error
            if refused is None and _is_expired(response):
                refused = used
                if await self.authorise(refused) != refused:
                    continue
            return response, sent

    def _name(self, key: str | None) -> str:
        return repr(unquote(self.path) if key is None else key)

    # Bytes.

    async def get(self, key: str, first: int, sink: Sequence[memoryview], exact_nbytes: int | None) -> str:
        """Get the bytes from `first` on that fill `sink`; return the entity tag of the blob that they are of.

        With `exact_nbytes`, the blob must be as long as that.

        Raises:
            IntegrityError: the blob is shorter than asked for or not `exact_nbytes` long, or the bytes arrive damaged.
        """
        nbytes = sum(map(len, sink))
        lines = f"x-ms-range: bytes={first}-{first + nbytes - 1}\r\n"
        if self.checksum is not None:
            lines += "x-ms-range-get-content-md5: true\r\n"

        async def check(response: Response) -> None:
            start, stop, total = _range_of(response)
            if response.status == 200 and first == 0 and response.sunk:
                return
            if response.status != 206:
                raise HTTPError(f"the server ignored the range of {key!r} (status {response.status})", retryable=False)
            if (start, stop) != (first, first + nbytes):
                if start == first and stop == total:
                    # The blob is shorter: asking again does not help.
                    return
                raise HTTPError(f"asked for bytes {first} to {first + nbytes} of {key!r}, got {start} to {stop}")
            if not response.sunk:
                length = response.headers.get("content-length")
                raise HTTPError(f"{nbytes} bytes of {key!r} come with Content-Length {length}")
            await self._verify(key, sink, nbytes, response)

        response, _ = await self.send("GET", key, "", lines, sink=sink, sink_nbytes=nbytes, check=check)
        total = _range_of(response)[2] if response.status in (206, 416) else nbytes if response.sunk else None
        if response.status == 416 or (response.status == 206 and not response.sunk):
            raise IntegrityError(
                f"azure: asked for {nbytes} bytes at {first} of {key!r}, a blob of {'?' if total is None else total} bytes",
                backend="azure",
            )
        if not 200 <= response.status < 300:
            raise explain(response, f"getting {key!r}")
        if exact_nbytes is not None and total != exact_nbytes:
            raise IntegrityError(f"azure: {key!r} has {total} bytes, not {exact_nbytes}", backend="azure")
        return response.headers.get("etag", "")

    async def _verify(self, key: str, sink: Sequence[memoryview], nbytes: int, response: Response) -> None:
        if self.checksum is None:
            return
        told = response.headers.get("content-md5")
        if told is None:
            raise HTTPError(f"the server tells no MD5 of {nbytes} bytes of {key!r}", retryable=False)
        if (found := await off_loop(nbytes, digest, "md5", sink)) != told:
            raise DamagedError(f"{key!r} arrived damaged: its MD5 is {found}, the server says {told}")

    async def put(self, key: str, body: Sequence[memoryview], *, only_new: bool) -> None:
        """Put a whole blob by one request; `only_new` refuses to replace one.

        Raises:
            ConflictError: there is a blob already.
            IntegrityError: the bytes arrived damaged, each time.
        """
        nbytes = sum(map(len, body))
        mark, condition = _condition(only_new)
        lines = f"x-ms-blob-type: BlockBlob\r\ncontent-type: application/octet-stream\r\n{condition}"
        lines += await self._sums(body, nbytes)
        response, sent = await self.send("PUT", key, "", lines, body=body, body_nbytes=nbytes)
        await self._accept(response, sent, key, mark, f"putting {key!r}")

    async def put_block(self, key: str, block: str, body: Sequence[memoryview]) -> None:
        """Put a block of a blob under a name in base64; it is part of nothing until it is committed."""
        nbytes = sum(map(len, body))
        lines = await self._sums(body, nbytes)
        query = f"comp=block&blockid={quote(block, safe='')}"
        response, _ = await self.send("PUT", key, query, lines, body=body, body_nbytes=nbytes)
        if not 200 <= response.status < 300:
            what = f"putting a block of {key!r}"
            if _code(response) == "InvalidBlobOrBlock":
                what += (
                    ", of which there are uncommitted blocks of another program (they end after a week, or as it is put whole)"
                )
            raise explain(response, what)

    async def commit(self, key: str, blocks: Sequence[str], *, only_new: bool) -> bool:
        """Make a blob of blocks; False when blocks are gone, as they are when somebody else puts the blob meanwhile."""
        mark, condition = _condition(only_new)
        # Latest are committed ones too: an attempt whose answer was lost may have worked.
        listed = "".join(f"<Latest>{block}</Latest>" for block in blocks)
        text = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
        lines = f"x-ms-blob-content-type: application/octet-stream\r\ncontent-type: application/xml\r\n{condition}"
        response, sent = await self.send("PUT", key, "comp=blocklist", lines, body=(memoryview(text),), body_nbytes=len(text))
        if response.status == 400 and _code(response) == "InvalidBlockList":
            return False
        await self._accept(response, sent, key, mark, f"committing the blocks of {key!r}")
        return True

    async def _sums(self, body: Sequence[memoryview], nbytes: int) -> str:
        if self.checksum is None:
            return ""
        name = "content-md5" if self.checksum == "md5" else "x-ms-content-crc64"
        return f"{name}: {await off_loop(nbytes, digest, self.checksum, body)}\r\n"

    async def _accept(self, response: Response, sent: int, key: str, mark: str, what: str) -> None:
        if 200 <= response.status < 300:
            return
        error = explain(response, what)
        if mark and sent > 1 and isinstance(error, ConflictError):
            # An attempt without an answer may have been the one that the condition finds.
            found, _ = await self.send("HEAD", key)
            if found.status == 200 and found.headers.get(MARK) == mark:
                return
        raise error

    # Questions.

    async def stat(self, key: str) -> Stat | None:
        """Look up a blob; None if it does not exist. A container that does not exist is an error."""
        response, _ = await self.send("HEAD", key)
        if response.status == 404 and _code(response) in ("BlobNotFound", ""):
            return None
        if response.status != 200:
            raise explain(response, f"looking at {key!r}")
        found = response.headers
        return _stat(key, found.get("content-length", "0"), found.get("etag", ""), found.get("last-modified", ""))

    async def delete(self, key: str) -> None:
        """Delete a blob and its snapshots; one that does not exist is deleted already."""
        response, _ = await self.send("DELETE", key, "", "x-ms-delete-snapshots: include\r\n")
        if not 200 <= response.status < 300 and not (response.status == 404 and _code(response) == "BlobNotFound"):
            raise explain(response, f"deleting {key!r}")

    async def list(self, prefix: str) -> AsyncIterator[Stat]:
        """Page through the blobs whose names begin with `prefix`."""
        query = f"restype=container&comp=list&prefix={quote(prefix, safe='')}"
        marker = ""
        while True:
            page = f"{query}&maxresults={LISTED_AT_ONCE}&marker={quote(marker, safe='')}"
            response, _ = await self.send("GET", None, page)
            if response.status != 200:
                raise explain(response, "listing")
            try:
                found, marker = await _read_listing(response.body)
            except ElementTree.ParseError as error:
                raise BackendError(f"azure: the listing cannot be read: {error}", backend="azure") from error
            for one in found:
                yield one
            if not marker:
                return


async def _read_listing(text: bytes) -> tuple[list[Stat], str]:
    parser: Any = ElementTree.XMLPullParser(["end"])
    found: list[Stat] = []
    marker = ""
    async for piece in slices(text, LISTING_SLICE_NBYTES):
        parser.feed(piece)
        for _, element in parser.read_events():
            if element.tag == "Blob":
                found.append(_listed(element))
                element.clear()
            elif element.tag == "NextMarker":
                marker = element.text or ""
    parser.close()
    return found, marker


def _listed(blob: Any) -> Stat:
    name = blob.find("Name")
    key = name.text or ""
    if name.get("Encoded") == "true":
        # What XML cannot hold.
        key = unquote(key)
    properties = {one.tag: one.text or "" for one in blob.iterfind("Properties/*")}
    size = properties.get("Content-Length", "0")
    return _stat(key, size, properties.get("Etag", ""), properties.get("Last-Modified", ""))


def _stat(key: str, nbytes: str, etag: str, modified: str) -> Stat:
    seconds = parsedate_to_datetime(modified).timestamp() if modified else 0.0
    return Stat(key, int(nbytes), etag.strip('"'), seconds)


def new_mark() -> str:
    """Return a name that nobody else has."""
    return os.urandom(8).hex()


def block_name(mark: str, number: int) -> str:
    """Name a block: all names of a blob's blocks must be equally long, and others' uploads of it must not have the same."""
    return base64.b64encode(f"{mark}-{number:08d}".encode()).decode()


def _condition(only_new: bool) -> tuple[str, str]:
    mark = new_mark() if only_new else ""
    return mark, f"if-none-match: *\r\n{MARK}: {mark}\r\n" if only_new else ""


_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


def _range_of(response: Response) -> tuple[int, int, int | None]:
    """Return what part of the blob a response has, from its first byte to behind its last, and the blob's size."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if found is None:
        return -1, -1, None
    return int(found[1] or -1), int(found[2] or -2) + 1, int(found[3])


# Checksums.


def digest(name: str, body: Sequence[memoryview]) -> str:
    """Return the checksum called `name` as Azure writes it, in base64.

    Its CRC64 is CRC-64/NVME, the bytes of the number in little-endian order.
    """
    if name == "md5":
        state = hashlib.md5(usedforsecurity=False)
        for piece in body:
            state.update(piece)
        return base64.b64encode(state.digest()).decode()
    function = crc64()
    value = 0
    for piece in body:
        value = function(piece, value)
    return base64.b64encode(value.to_bytes(8, "little")).decode()


def crc64() -> Callable[[Any, int], int]:
    """Return the function that computes CRC-64/NVME."""
    try:
        from awscrt.checksums import crc64nvme
    except ImportError as error:
        raise MissingDependency(f"checksum='crc64' needs awscrt: pip install awscrt ({error})") from error
    return crc64nvme  # type: ignore[no-any-return]


# Errors.


def _code(response: Response) -> str:
    return response.headers.get("x-ms-error-code", "")


def _is_expired(response: Response) -> bool:
    """Tell whether the server may take something newer; what we may not do is another matter, and has other codes."""
    refusals = ("AuthenticationFailed", "AuthorizationFailure", "")
    return response.status == 401 or (response.status == 403 and _code(response) in refusals)


def _again(response: Response) -> bool:
    """Tell whether the bytes of a put were damaged on their way."""
    return response.status == 400 and _code(response) in ("Md5Mismatch", "Crc64Mismatch")


def explain(response: Response, what: str) -> TransferError:
    """Turn an error's response into an exception."""
    code = _code(response)
    message = re.search(rb"<Message>([^<\n]*)", response.body)
    text = f"azure: {what}: {response.status} {code} {message[1].decode('utf-8', 'replace') if message else ''}".rstrip()
    kind: type[TransferError] = BackendError
    if response.status == 404:
        kind = NotFoundError
    elif response.status in (401, 403):
        kind = AccessError
    elif code in ("BlobAlreadyExists", "ConditionNotMet") or (not code and response.status in (409, 412)):
        kind = ConflictError
    elif _again(response):
        kind = IntegrityError
    return kind(text, backend="azure")
