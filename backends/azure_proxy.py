"""Azure's requests where a proxy is configured: through aiohttp, which the SDK takes too; bodies are copied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

from nixl_async.errors import MissingDependency
from nixl_async.http import HTTPError, PoolOptions, Request, Response

try:
    import aiohttp
    from yarl import URL
except ImportError as error:
    raise MissingDependency(f"the azure backend needs aiohttp ({error}): pip install 'nixl-async[azure]'") from error

if TYPE_CHECKING:
    import ssl

COPIED_NBYTES = 256 << 10
"""What is copied at once on the loop."""
KEPT_NBYTES = 1 << 20


def proxy_for(host: str, port: int, secure: bool) -> str | None:
    """Return the proxy that HTTPS_PROXY or HTTP_PROXY names for a server, unless NO_PROXY excepts it."""
    found = getproxies().get("https" if secure else "http")
    # NO_PROXY may name the port too.
    return None if not found or proxy_bypass(host) or proxy_bypass(f"{host}:{port}") else found


class ProxyPool:
    """Sends requests to one server through a proxy; takes the place of a `Pool`."""

    def __init__(self, options: PoolOptions, proxy: str) -> None:
        self._options, self._proxy = options, proxy
        self._context: ssl.SSLContext | bool = options.context or True
        self._base = f"{'https' if options.context else 'http'}://"
        self._session: aiohttp.ClientSession | None = None
        self.opened = 0

    async def request(self, request: Request) -> Response:
        """Send a request and return the response; when cancelled, nothing is written to its sink any more.

        Raises:
            HTTPError: there was no response, or none that could be used.
        """
        first, *lines = request.head.decode().split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = dict(line.split(": ", 1) for line in lines)
        url = URL(f"{self._base}{headers['host']}{target}", encoded=True)
        try:
            async with self._open().request(
                method,
                url,
                headers=headers,
                data=_pieces(request.body) if request.body else None,
                proxy=self._proxy,
                ssl=self._context,
                allow_redirects=False,
            ) as answer:
                return await _receive(answer, request)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HTTPError(f"through the proxy {URL(self._proxy).host}: {type(error).__name__}: {error}") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            options = self._options
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=options.max_connections),
                timeout=aiohttp.ClientTimeout(None, sock_connect=options.connect_timeout, sock_read=options.read_timeout),
                auto_decompress=False,
                skip_auto_headers=("Accept-Encoding", "Content-Type"),
            )
        return self._session

    async def aclose(self) -> None:
        """Close every connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


async def _pieces(body: Sequence[memoryview]) -> AsyncIterator[bytes]:
    for piece in body:
        for at in range(0, len(piece), COPIED_NBYTES):
            yield bytes(piece[at : at + COPIED_NBYTES])


async def _receive(answer: aiohttp.ClientResponse, request: Request) -> Response:
    headers: dict[str, str] = {}
    for name, value in answer.headers.items():
        headers.setdefault(name.lower(), value)
    if not (request.sink and 200 <= answer.status < 300 and headers.get("content-length") == str(request.sink_nbytes)):
        body = b"" if request.sink and answer.status < 300 else (await answer.content.read(KEPT_NBYTES) or b"")
        while body and len(body) < KEPT_NBYTES and (more := await answer.content.read(KEPT_NBYTES - len(body))):
            body += more
        return Response(answer.status, headers, body)
    for piece in request.sink:
        at = 0
        while at < len(piece):
            data = await answer.content.read(min(COPIED_NBYTES, len(piece) - at))
            if not data:
                raise aiohttp.ClientPayloadError("the answer ends early")
            piece[at : at + len(data)] = data
            at += len(data)
            await asyncio.sleep(0)
    return Response(answer.status, headers, b"", True)
