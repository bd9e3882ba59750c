"""TLS in front of a server that has none, in a process of its own; who connects needs a certificate of the same authority.

Arguments: a directory with ca.pem, server.pem and server.key; host and port of the server. The port is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(65536):
            target.write(piece)
    target.close()


async def main(certificates: str, host: str, port: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=f"{certificates}/ca.pem")
    context.load_cert_chain(f"{certificates}/server.pem", f"{certificates}/server.key")
    context.verify_mode = ssl.CERT_REQUIRED

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        near, far = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, far), _copy(near, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as front:
        print(front.sockets[0].getsockname()[1], flush=True)
        await front.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
