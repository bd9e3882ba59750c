"""Links that can be cut: network namespaces of the drill's own, joined by a bridge in one more; and what stands in for them.

Nothing is changed outside these namespaces. Their names carry this process's id; what a killed run has left is removed by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import socket
import struct
from pathlib import Path

PREFIX = "nixl-churn"
SUBNET = "10.197"
_NAMED = Path("/run/netns")
_BRIDGE = "02:00:0a:c5:00:01"
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
DEAF_SECONDS = 0.05


class NetworkError(RuntimeError):
    """The machine does not let this process make networks; the message is what `ip` said."""


class Network:
    """A hub, where etcd and most members are, and members with a namespace and a link of their own."""

    def __init__(self) -> None:
        self._hub = f"{PREFIX}-{os.getpid()}-hub"
        self._made: list[str] = []
        self._links: dict[str, tuple[str, str, str]] = {}

    @property
    def hub(self) -> str:
        """The hub's address."""
        return f"{SUBNET}.0.1"

    async def open(self) -> None:
        """Make the hub.

        Raises:
            NetworkError: this process may not, or there is no `ip`.
        """
        if shutil.which("ip") is None:
            raise NetworkError("there is no program `ip` (iproute2)")
        for space in await asyncio.to_thread(_stale):
            with contextlib.suppress(NetworkError):
                await _ip("netns", "del", space)
        try:
            await self._add(self._hub)
            inside = ("-n", self._hub)
            await _ip(*inside, "link", "add", "br0", "type", "bridge")
            # Else the bridge takes a port's address, and what comes by that port after it was cut is still for this host.
            await _ip(*inside, "link", "set", "br0", "address", _BRIDGE)
            await _ip(*inside, "addr", "add", f"{self.hub}/16", "dev", "br0")
            await _ip(*inside, "link", "set", "br0", "up")
        except NetworkError:
            await self.close()
            raise

    async def attach(self, name: str) -> str:
        """Give a member a namespace and a link; return its address. It keeps them for all its lives."""
        if name in self._links:
            return self._links[name][2]
        number = len(self._links) + 1
        space, port, address = (
            f"{PREFIX}-{os.getpid()}-{number}",
            f"port{number}",
            f"{SUBNET}.{1 + number // 250}.{1 + number % 250}",
        )
        await self._add(space)
        await _ip("-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        await _ip("-n", self._hub, "link", "set", port, "master", "br0", "up")
        await _ip("-n", space, "addr", "add", f"{address}/16", "dev", "eth0")
        await _ip("-n", space, "link", "set", "eth0", "up")
        self._links[name] = (space, port, address)
        return address

    def command(self, name: str | None) -> list[str]:
        """Return what a program is started with to run where a member is, `None`: in the hub."""
        space = self._links[name][0] if name in self._links else self._hub
        return ["ip", "netns", "exec", space]

    async def cut(self, name: str, *, unplug: bool) -> None:
        """Let a member's packets vanish; or take the carrier away, which its kernel sees."""
        port = self._links[name][1]
        await _ip("-n", self._hub, "link", "set", port, *(("down",) if unplug else ("nomaster",)))

    async def heal(self, name: str) -> None:
        """Join a member's link again."""
        await _ip("-n", self._hub, "link", "set", self._links[name][1], "master", "br0", "up")

    async def close(self) -> None:
        """Remove all of it; processes inside must have ended."""
        for space in self._made:
            with contextlib.suppress(NetworkError):
                await _ip("netns", "del", space)
        self._made = []

    async def _add(self, space: str) -> None:
        await _ip("netns", "add", space)
        self._made.append(space)
        await _ip("-n", space, "link", "set", "lo", "up")


def _stale() -> list[str]:
    """Return the namespaces of runs whose process is gone."""
    found = _NAMED.glob(f"{PREFIX}-*") if _NAMED.is_dir() else ()
    return [path.name for path in found if not Path(f"/proc/{path.name.split('-')[2]}").exists()]


async def _ip(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "ip", *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise NetworkError(f"ip {' '.join(arguments)}: {said.decode(errors='replace').strip()}")


class Deafness:
    """Without namespaces: a process that drops whatever arrives at its TCP sockets, as if its link were cut one way."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))

    def begin(self) -> None:
        """Hear nothing from here on."""
        self._task = asyncio.get_running_loop().create_task(self._again_and_again())

    def end(self) -> None:
        """Hear again."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
            _each_socket(lambda sock: sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0))

    async def _again_and_again(self) -> None:
        option = struct.pack("HL", 1, ctypes.addressof(self._program))
        while True:
            _each_socket(lambda sock: sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option))
            # Sockets that are opened meanwhile are to be deaf, too.
            await asyncio.sleep(DEAF_SECONDS)


def _each_socket(do: object) -> None:
    assert callable(do)
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as sock:
                if sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM:
                    do(sock)
