"""nixl_async with routes that can be cut: a stream of transfers, and how soon it goes on by another route."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from typing import TYPE_CHECKING, Any

from bench.worker import serve_made
from bench.workers.ours import Ours
from nixl_async import AccessError, BackendError, PeerLost
from nixl_async.backend import Backend
from nixl_async.backends.samehost import SameHostBackend
from nixl_async.backends.tcp import TCPBackend
from nixl_async.backends.ucx import UCXBackend
from nixl_async.native import lib
from nixl_async.testing.faults import reset_connections

if TYPE_CHECKING:
    import socket

    from nixl_async.backend import PeerInfo

AT_ONCE = 4
HEAL_SECONDS = 30.0


class Guarded(SameHostBackend):
    """Copies within the host until the kernel refuses, as it does when a container's rights are taken away."""

    refused = False

    def _again(self, *arguments: Any) -> int:
        return -errno.EPERM if self.refused else super()._again(*arguments)

    def _direct(self, *arguments: Any) -> int:
        return -errno.EPERM if self.refused else super()._direct(*arguments)

    def _packed(self, *arguments: Any) -> int:
        return -errno.EPERM if self.refused else super()._packed(*arguments)

    def _probe(self, pid: int, peer: str, *arguments: Any, **options: Any) -> None:
        if self.refused:
            raise AccessError(f"process {pid} may not be traced", backend=self.name, peer=peer)
        super()._probe(pid, peer, *arguments, **options)


class Severed(TCPBackend):
    """Copies over TCP until its connections are reset; while `refused`, it reaches nobody."""

    refused = False
    port = 0

    async def connect(self, peer: PeerInfo) -> None:
        """Connect, unless it is refused."""
        self.port = json.loads(peer.description)["at"][0][1]
        if self.refused:
            raise BackendError("the network is cut", backend=self.name, peer=peer.name)
        await super().connect(peer)

    async def _greet(self, *arguments: Any) -> socket.socket:
        if self.refused:
            raise OSError(errno.ENETUNREACH, "the network is cut")
        return await super()._greet(*arguments)


class Failed(UCXBackend):
    """Copies over UCX until its endpoint fails; while `refused`, it makes no other."""

    refused = False

    async def connect(self, peer: PeerInfo) -> None:
        """Connect, unless it is refused."""
        if self.refused:
            raise BackendError("no endpoint is to be had", backend=self.name, peer=peer.name)
        await super().connect(peer)

    def let_fail(self, peer: str) -> None:
        """Let the endpoint to a peer fail."""
        lib.nx_ucx_fail(self._peers[peer].pointer)


MADE = {"samehost": Guarded, "tcp": Severed, "ucx": Failed}


class Failing(Ours):
    """Commands of the suite `failover`."""

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, Any]:
        """Open the agent with backends that can be made to fail."""
        self.made: dict[str, Backend] = {name: MADE[name]() for name in options["backends"]}
        return await super().open(role, nbytes, {"backends": list(self.made.values())})

    async def stream(self, first: str, second: str, after: int) -> float:
        """Move every page in a transfer of its own, four at a time; cut the route `first` when `after` of them have ended.

        Return the seconds from the cut to the end of the first transfer that goes by `second`. Where both are one route, it is the
        first that began later or was sent again.
        """
        near = [self.region[at : at + self.page_nbytes] for at in range(0, len(self.buffer), self.page_nbytes)]
        far = [self.remote[int(at) * self.page_nbytes : (int(at) + 1) * self.page_nbytes] for at in self.order]
        places = iter(range(len(near)))
        ended = 0
        cut = found = 0.0

        async def some() -> None:
            nonlocal ended, cut, found
            for at in places:
                sides = (near[at], far[at]) if self.write else (far[at], near[at])
                began = time.perf_counter()
                result = await self.agent.transfer(*sides)
                now, ended = time.perf_counter(), ended + 1
                if cut and not found and result.route == second and (first != second or began > cut or result.attempts > 1):
                    found = now - cut
                if ended == after:
                    # Those that are under way are in their middle.
                    await asyncio.sleep(0)
                    cut = time.perf_counter()
                    self._cut(first, stays=first != second)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(some())
        if not found:
            raise AssertionError(f"no transfer went by {second} after {first} was cut")
        await self._heal(first)
        return found

    def _cut(self, route: str, *, stays: bool) -> None:
        backend = self.made[route]
        assert isinstance(backend, Guarded | Severed | Failed)
        backend.refused = stays
        if isinstance(backend, Failed):
            backend.let_fail(self.peer.name)
        if isinstance(backend, Severed) and not reset_connections(backend.port):
            raise AssertionError("there is no connection to reset")

    async def _heal(self, route: str) -> None:
        """Wait until the route is the first again."""
        backend = self.made[route]
        assert isinstance(backend, Guarded | Severed | Failed)
        backend.refused = False
        end = time.monotonic() + HEAL_SECONDS
        while (explained := self.agent.explain(self.region, self.remote)).route != route or explained.outages:
            if time.monotonic() > end:
                raise PeerLost(f"route {route} did not come back within {HEAL_SECONDS:g} s: {explained}")
            await asyncio.sleep(0.002)


if __name__ == "__main__":
    asyncio.run(serve_made(lambda: Failing(None)))
