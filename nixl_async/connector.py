"""The dialling side of control connections: finds the address of a served agent, connects, and tries again if it has no room."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import random
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from nixl_async.acceptor import SHUTDOWN_SECONDS
from nixl_async.errors import AuthenticationError, NixlError, PeerLost, ProtocolError
from nixl_async.link import Link
from nixl_async.peers import Peer
from nixl_async.security import ConnectionLimits, Credentials

TURNED_AWAY_RETRIES = 5
TURNED_AWAY_SECONDS = 0.02
"""An agent under attack closes connections for want of room: then others are tried, after this time, twice that, and so on."""


class Connector:
    """Connects to served agents.

    `make(credentials, name)` makes the link of a connection to the agent called `name`, or to any; `drop(link)` lets go of one
    that was never connected; `listen(host)` has the backends be reached at the interface that leads to the agent.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        credentials: Credentials,
        make: Callable[[Credentials, str | None], Link],
        drop: Callable[[Link], None],
        listen: Callable[[str], Awaitable[None]],
    ) -> None:
        self._limits, self._credentials = limits, credentials
        self._make, self._drop, self._listen = make, drop, listen

    async def connect(self, host: str, port: int, token: bytes | None = None, *, name: str | None = None) -> Peer:
        """Connect to a served agent and wait until both sides know each other's regions.

        `token` is that agent's, if not ours; `name` the one that it must have.

        Raises:
            PeerLost: nobody answers there, or the connection ends before.
        """
        credentials = self._credentials if token is None else Credentials(token, self._credentials.tls)
        for attempt in itertools.count():
            try:
                sock = await _dial(host, port)
            except OSError as error:
                if not isinstance(error, ConnectionResetError) or attempt == TURNED_AWAY_RETRIES:
                    raise PeerLost(f"cannot connect to {host}:{port}: {error}", retryable=True) from error
            else:
                link = self._make(credentials, name)
                try:
                    return await self._connect(link, sock, host)
                except PeerLost:
                    if not link.turned_away or attempt == TURNED_AWAY_RETRIES:
                        raise
            await asyncio.sleep(TURNED_AWAY_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    async def _connect(self, link: Link, sock: socket.socket, host: str) -> Peer:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        try:
            # What we tell the peer of our backends must be where it can reach them: the interface that led to it.
            await self._listen(sock.getsockname()[0])
            if self._credentials.tls is not None:
                context = self._credentials.tls.client_context()
                options = {
                    "ssl": context,
                    "server_hostname": host if context.check_hostname else "",
                    "ssl_handshake_timeout": self._limits.handshake_seconds,
                    "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
                }
            await loop.create_connection(lambda: link, sock=sock, **options)
        except BaseException as error:
            self._drop(link)
            sock.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise AuthenticationError(
                    f"the certificate of whoever answers at {host} is not believed: {error.verify_message}"
                ) from error
            if isinstance(error, ssl.SSLError):
                raise ProtocolError(f"TLS fails with whoever answers at {host}: {error}") from error
            if isinstance(error, OSError) and not isinstance(error, NixlError):
                # Of these asyncio aborts the one whose TLS handshake takes too long.
                link.turned_away = isinstance(error, ConnectionError) and not isinstance(
                    error, TimeoutError | ConnectionAbortedError
                )
                raise PeerLost(f"the connection to {host} ended before it was set up: {error}", retryable=True) from error
            raise
        try:
            peer: Peer = await asyncio.shield(link.joined)
        except asyncio.CancelledError:
            link.close()
            raise
        return peer


async def _dial(host: str, port: int) -> socket.socket:
    """Return a socket connected to the first of the host's addresses that answers."""
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host!r} has no address")
    for family, kind, protocol, _, address in await _addresses(host, port):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, Any]]:
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        return [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    return list(await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))
