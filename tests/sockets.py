"""Small servers on the loopback address for tests: a handler for each connection, a relay that listens in, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from nixl_async.http import Pool, PoolOptions

HOST = "127.0.0.1"
Handler: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, context: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[int]:
    """Call `handler` for each connection, and end the connection with it; yield the port. Errors of sockets are nobody's."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, HOST, port, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        # What was accepted just before gets its handler a step or two later.
        for _ in range(3):
            await asyncio.sleep(0)
        while tasks:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await server.wait_closed()


@dataclass
class Relay:
    """Passes bytes on to a server; `sent` is what clients sent."""

    port: int = 0
    connections: int = 0
    sent: bytearray = field(default_factory=bytearray)

    def heads(self) -> list[str]:
        """Return the heads of the requests, lower-case."""
        found = re.findall(rb"(?:GET|HEAD|PUT|POST|DELETE) /[^ ]* HTTP/1\.1\r\n.*?\r\n\r\n", bytes(self.sent), re.DOTALL)
        return [head.decode("latin-1").lower() for head in found]


@asynccontextmanager
async def relay(to_port: int, context: ssl.SSLContext | None = None) -> AsyncIterator[Relay]:
    """Relay connections to a port of the loopback address; with `context`, clients speak TLS."""
    found = Relay()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.connections += 1
        upstream_reader, upstream_writer = await asyncio.open_connection(HOST, to_port)

        async def back() -> None:
            try:
                while piece := await upstream_reader.read(1 << 18):
                    writer.write(piece)
                    await writer.drain()
                writer.close()
            except OSError:
                writer.transport.abort()

        answering = asyncio.create_task(back())
        try:
            while piece := await reader.read(1 << 18):
                found.sent += piece
                upstream_writer.write(piece)
                await upstream_writer.drain()
        finally:
            upstream_writer.close()
            answering.cancel()
            await asyncio.wait([answering])
            if not answering.cancelled():
                answering.exception()

    async with listening(handler, context) as found.port:
        yield found


def certificate(directory: Path, *names: str) -> tuple[ssl.SSLContext, str]:
    """Make a certificate for `names` (addresses or host names); return a server's context, and the file that clients trust."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nixl_async test")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = directory / "certificate.pem", directory / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, str(public)


@asynccontextmanager
async def pool_of(handler: Handler, **options: Any) -> AsyncIterator[Pool]:
    """Call `handler` for each connection; yield a pool of connections to it."""
    async with listening(handler) as port:
        pool = Pool(PoolOptions(HOST, port, **options), asyncio.get_running_loop())
        try:
            yield pool
        finally:
            await pool.aclose()
