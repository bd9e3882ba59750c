"""A client of etcd, by the JSON gateway that each of its servers has beside gRPC (etcd's Documentation/dev-guide/api_grpc_gateway).

Keys and values are bytes. A call goes to the server that answered last, and where that does not answer, to the others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from nixl_async.errors import BackendError, ConfigurationError
from nixl_async.http.messages import ChunkReader, HTTPError, parse_head

CALL_SECONDS = 5.0
CONNECT_SECONDS = 1.0
MAX_ANSWER_NBYTES = 64 << 20
_PIECE_NBYTES = 64 << 10
_PORT = 2379
_CRLF = "\r\n"
# A server that vanished without a word is noticed after about half a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


PAGE_ENTRIES = 256
"""How many keys are asked for at once: reading more would hold the loop for longer than a millisecond."""


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a key at a revision: its new value, or `None` where it was deleted."""

    key: bytes
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    server: SplitResult


class CompactedError(BackendError):
    """The revision to watch from is so old that etcd has forgotten what came after it; `revision` is the first it knows."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"etcd remembers nothing before revision {revision}", backend="etcd")
        self.revision = revision


class _SignInEnded(BackendError):
    """The token that etcd gave for the password is valid no more."""


class LeaseLost(BackendError):
    """The lease has run out, or etcd has lost it: what was put under it is gone."""


class Etcd:
    """Servers of one cluster: URLs with commas or semicolons between them, `http://host:2379` or `https://…`.

    `user` and `password` are for a cluster that asks for them; `tls` is for https, by default what Python trusts. `keep`: whether a
    connection is kept between calls, until `close`; renewing a lease again and again is then a round trip, and no handshake.

    Raises:
        ConfigurationError: one of them is no such URL.
    """

    def __init__(
        self, endpoints: str, *, user: str = "", password: str = "", tls: ssl.SSLContext | None = None, keep: bool = False
    ) -> None:
        self._user, self._password, self._tls = user, password, tls
        self._pass = ""
        self._keep = keep
        self._kept: _Connection | None = None
        self._servers = [_split(one.strip()) for one in endpoints.replace(";", ",").split(",") if one.strip()]
        if not self._servers:
            raise ConfigurationError(f"{endpoints!r} names no etcd server; give URLs such as http://127.0.0.1:2379")

    def close(self) -> None:
        """End the connection that is kept, and keep none from here on."""
        self._keep = False
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.writer.close()

    @property
    def first(self) -> tuple[str, int]:
        """Host and port of the server that is asked first."""
        server = self._servers[0]
        return server.hostname or "", server.port or _PORT

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> None:
        """Set a key; with a lease, until that ends.

        Raises:
            LeaseLost: there is no such lease any more.
        """
        await self._call("kv/put", {"key": _text(key), "value": _text(value)} | ({"lease": str(lease)} if lease else {}))

    async def create(self, key: bytes, value: bytes, *, lease: int = 0) -> bool:
        """Set a key that does not exist; return whether it did not.

        Raises:
            LeaseLost: there is no such lease any more.
        """
        put = {"key": _text(key), "value": _text(value)} | ({"lease": str(lease)} if lease else {})
        absent = {"key": _text(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        answer = await self._call("kv/txn", {"compare": [absent], "success": [{"request_put": put}]})
        return bool(answer.get("succeeded", False))

    async def grant(self, seconds: int) -> int:
        """Return a lease that ends `seconds` after it was renewed last."""
        return int((await self._call("lease/grant", {"TTL": str(seconds)}))["ID"])

    async def renew(self, lease: int) -> None:
        """Renew a lease.

        Raises:
            LeaseLost: there is no such lease any more.
        """
        answer = await self._call("lease/keepalive", {"ID": str(lease)})
        if int(answer.get("result", {}).get("TTL", 0)) <= 0:
            raise LeaseLost(f"etcd has no lease {lease:x} any more", backend="etcd")

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it what was put under it."""
        with contextlib.suppress(LeaseLost):
            await self._call("lease/revoke", {"ID": str(lease)})

    async def entries(self, prefix: bytes) -> tuple[dict[bytes, bytes], int]:
        """Return the keys that begin so with their values, and the revision at which that holds."""
        found: dict[bytes, bytes] = {}
        begin, revision = prefix, 0
        while True:
            body = {"key": _text(begin), "range_end": _text(_after(prefix)), "limit": str(PAGE_ENTRIES)}
            answer = await self._call("kv/range", body | ({"revision": str(revision)} if revision else {}))
            revision = revision or int(answer["header"]["revision"])
            listed = answer.get("kvs") or []
            found.update({_bytes(one["key"]): _bytes(one.get("value", "")) for one in listed})
            if not answer.get("more") or not listed:
                return found, revision
            begin = _bytes(listed[-1]["key"]) + b"\0"

    async def get(self, key: bytes) -> tuple[bytes | None, int]:
        """Return a key's value, `None` if there is none, and the revision at which that holds."""
        answer = await self._call("kv/range", {"key": _text(key)})
        found = answer.get("kvs") or [None]
        value = None if found[0] is None else _bytes(found[0].get("value", ""))
        return value, int(answer["header"]["revision"])

    async def delete_prefix(self, prefix: bytes) -> int:
        """Delete all keys that begin so; return how many there were."""
        answer = await self._call("kv/deleterange", {"key": _text(prefix), "range_end": _text(_after(prefix))})
        return int(answer.get("deleted", 0))

    async def watch(
        self, key: bytes, revision: int, *, prefix: bool = False, deletes_only: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yield what becomes of a key, or of all that begin so, from a revision on, until the connection is lost.

        Raises:
            CompactedError: the revision is too old.
            BackendError: no server can be asked.
            OSError: the connection is lost.
        """
        await self._sign_in()
        create: dict[str, Any] = {"key": _text(key), "start_revision": str(revision)}
        if prefix:
            create["range_end"] = _text(_after(key))
        if deletes_only:
            create["filters"] = ["NOPUT"]
        async with contextlib.aclosing(self._stream("watch", {"create_request": create})) as lines:
            async for line in lines:
                result = line.get("result")
                if result is None:
                    raise BackendError(f"etcd ends the watch: {line.get('error', line)}", backend="etcd")
                if compacted := int(result.get("compact_revision", 0)):
                    raise CompactedError(compacted)
                if result.get("canceled"):
                    raise BackendError(f"etcd ends the watch: {result.get('cancel_reason', 'no reason')}", backend="etcd")
                for one in result.get("events", ()):
                    found = one["kv"]
                    value = None if one.get("type") == "DELETE" else _bytes(found.get("value", ""))
                    yield Event(_bytes(found["key"]), value, int(found["mod_revision"]))

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        await self._sign_in()
        try:
            return await self._call_once(path, body)
        except _SignInEnded:
            self._pass = ""
            await self._sign_in()
            return await self._call_once(path, body)

    async def _sign_in(self) -> None:
        if self._user and not self._pass:
            answer = await self._call_once("auth/authenticate", {"name": self._user, "password": self._password})
            self._pass = str(answer["token"])

    async def _call_once(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        kept, self._kept = self._kept, None
        try:
            async with asyncio.timeout(CALL_SECONDS):
                if kept is not None:
                    try:
                        return await self._ask(kept, path, body)
                    except ConnectionError:
                        # The server ended it meanwhile, which says nothing about another.
                        pass
                return await self._ask(await self._connected(), path, body)
        except TimeoutError:
            raise BackendError(f"etcd has not answered within {CALL_SECONDS:g} s", backend="etcd") from None

    async def _ask(self, connection: _Connection, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = None
        async with contextlib.aclosing(self._exchange(connection, path, body, keep=self._keep)) as lines:
            async for line in lines:
                answer = line if answer is None else answer
                if not self._keep:
                    break
        if answer is None:
            raise BackendError("etcd answers nothing", backend="etcd")
        return answer

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the JSON objects of an answer that goes on and on."""
        async with contextlib.aclosing(self._exchange(await self._connected(), path, body, keep=False)) as lines:
            async for line in lines:
                yield line

    async def _exchange(
        self, connection: _Connection, path: str, body: dict[str, Any], *, keep: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the JSON objects of an answer; after the last the connection is closed, or kept."""
        server, over = connection.server, False
        try:
            sent = json.dumps(body).encode()
            head = f"POST /v3/{path} HTTP/1.1\r\nHost: {server.netloc}\r\nContent-Type: application/json\r\n"
            if self._pass:
                head += f"Authorization: {self._pass}\r\n"
            head += f"Content-Length: {len(sent)}\r\n{'' if keep else f'Connection: close{_CRLF}'}\r\n"
            connection.writer.write(head.encode() + sent)
            async for line in _lines(connection.reader):
                yield line
            over = keep
        except HTTPError as error:
            raise BackendError(f"{server.netloc} does not answer as etcd does: {error}", backend="etcd") from error
        finally:
            if over and self._keep and self._kept is None:
                self._kept = connection
            else:
                connection.writer.close()

    async def _connected(self) -> _Connection:
        failures = []
        for server in list(self._servers):
            context = (self._tls or ssl.create_default_context()) if server.scheme == "https" else None
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(
                        server.hostname,
                        server.port or _PORT,
                        ssl=context,
                        # A server that is gone does not return the farewell.
                        ssl_shutdown_timeout=CONNECT_SECONDS if context else None,
                    )
            except (OSError, TimeoutError) as error:
                failures.append(f"{server.netloc}: {error or 'no answer'}")
                self._servers.remove(server)
                self._servers.append(server)
                continue
            found = writer.get_extra_info("socket")
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                found.setsockopt(socket.IPPROTO_TCP, option, value)
            return _Connection(reader, writer, server)
        raise BackendError(f"no etcd server can be reached: {'; '.join(failures)}", backend="etcd")


_REFUSALS = {"requested lease not found": LeaseLost, "invalid auth token": _SignInEnded, "user name is empty": _SignInEnded}


async def _lines(reader: asyncio.StreamReader) -> AsyncGenerator[dict[str, Any], None]:
    try:
        head = parse_head((await reader.readuntil(b"\r\n\r\n"))[:-4], "POST")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ConnectionError(f"etcd ends the connection instead of answering: {error}") from error
    chunks, kept, taken = ChunkReader(), bytearray(), 0
    while not (chunks.done if head.chunked else taken == head.nbytes):
        piece = await reader.read(_PIECE_NBYTES)
        if not piece:
            if head.chunked or head.nbytes is not None:
                raise ConnectionError("etcd ended the connection")
            break
        taken += len(piece)
        for part in chunks.feed(memoryview(piece)) if head.chunked else [piece]:
            kept += part
        if len(kept) > MAX_ANSWER_NBYTES:
            raise BackendError(f"etcd answers more than {MAX_ANSWER_NBYTES} bytes", backend="etcd")
        *whole, rest = kept.split(b"\n")
        for line in whole:
            if line:
                yield _read(line, head.status)
        kept = bytearray(rest)
    if kept:
        yield _read(kept, head.status)


def _read(line: bytes | bytearray, status: int) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise BackendError(f"etcd answers {bytes(line[:80])!r} (HTTP status {status})", backend="etcd")
    if status != 200:
        said = str(answer.get("message") or answer.get("error") or answer)
        kind = next((kind for words, kind in _REFUSALS.items() if words in said), BackendError)
        raise kind(f"etcd refuses: {said}", backend="etcd")
    return answer


def _split(url: str) -> SplitResult:
    found = urlsplit(url if "://" in url else f"http://{url}")
    try:
        usable = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(f"{url!r} is no URL of an etcd server; give one such as http://127.0.0.1:2379")
    return found


def _after(prefix: bytes) -> bytes:
    """Return the first key behind all that begin so; etcd reads a zero byte as the end of all keys."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\0"


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
