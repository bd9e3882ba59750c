"""Routes to peers: the backends connect to a peer that joins, and let go of one that goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from nixl_async.backend import Backend, PeerInfo
from nixl_async.errors import ConfigurationError, NixlError
from nixl_async.link import Link
from nixl_async.memory import RemoteRegion
from nixl_async.peers import Announcement, Peer

logger = logging.getLogger("nixl_async.membership")


class Routes:
    """Tells the backends of one agent which peers there are.

    `backends` are the agent's, `links` its control connections.
    """

    def __init__(self, backends: Callable[[], Iterable[Backend]], links: Collection[Link]) -> None:
        self._backends, self._links = backends, links

    async def listen(self, host: str) -> None:
        """Have the backends be reached at an address of this machine."""
        for backend in self._backends():
            await backend.listen(host)

    async def connect(self, peer: Peer, announcement: Announcement, host: str | None) -> None:
        """Connect every backend that reaches a peer; `peer.refusals` tells why one does not."""
        for backend in self._backends():
            if not backend.remote:
                continue
            description = announcement.descriptions.get(backend.name)
            if description is None:
                peer.refusals[backend.name] = f"peer {peer.name!r} has no such backend"
                continue
            peer.infos[backend.name] = PeerInfo(peer.name, peer.incarnation, description, host)
            try:
                await backend.connect(peer.infos[backend.name])
            except NixlError as error:
                peer.refusals[backend.name] = str(error)
            else:
                peer.backends.add(backend.name)

    async def reconnect(self, backend: Backend, peer: Peer) -> None:
        """Let a backend connect again to a peer that it has lost.

        Raises:
            NixlError: the backend does not reach it.
        """
        info = peer.infos.get(backend.name)
        if info is None:
            raise ConfigurationError(f"backend {backend.name!r} was never connected to {peer.name!r}")
        await backend.connect(info)

    @staticmethod
    def hear_again(known: Peer, announcement: Announcement) -> None:
        """Take note of how a peer's backends are reached as it tells of them last: what let us in before may not do so any more."""
        for backend, info in known.infos.items():
            known.infos[backend] = replace(info, description=announcement.descriptions.get(backend, info.description))

    async def disconnect(self, peer: Peer) -> None:
        """Part every backend from a peer, and take back what lets it reach them."""
        for backend in self._backends():
            if backend.name in peer.backends:
                try:
                    await backend.disconnect(peer.name)
                except NixlError as error:
                    logger.warning("backend %s failed to part from %s: %s", backend.name, peer.name, error)
        await self.dismiss(peer.name, peer.incarnation)

    async def dismiss(self, name: str, incarnation: str) -> None:
        """Take back what a peer was told that lets it reach our backends, unless it has another connection."""
        who = name, incarnation
        if any(link.told and not link.closed and (link.other.name, link.other.incarnation) == who for link in self._links):
            return
        for backend in self._backends():
            if backend.remote:
                await backend.dismiss(name, incarnation)

    async def fence(self, name: str, incarnation: str, host: str | None) -> None:
        """Fence off whatever a life of a peer has begun with our backends.

        Raises:
            NixlError: a backend cannot.
        """
        for backend in self._backends():
            if backend.remote:
                # A peer that never joined here may have connected to our backends.
                await backend.fence(PeerInfo(name, incarnation, b"", host), b"")

    async def forget(self, peer: Peer, region: RemoteRegion) -> None:
        """Have the backends let go of a peer's region."""
        for backend in self._backends():
            if backend.name in peer.backends:
                try:
                    await backend.forget(region)
                except NixlError as error:
                    logger.warning("backend %s failed to let go of %r: %s", backend.name, region, error)
