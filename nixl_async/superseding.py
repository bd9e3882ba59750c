"""Two agents that dial each other at once keep one of two connections: the other is superseded."""

from __future__ import annotations

import asyncio

from nixl_async.errors import NixlError, PeerLost
from nixl_async.link import Link
from nixl_async.peers import Peer
from nixl_async.wire import FrameType, encode_frame

SUPERSEDED_SECONDS = 5.0
"""How long a superseded connection waits for the other side to close it, and a peer for the one that takes its place."""


class Superseding:
    """Ends connections in favour of others, and knows who waits for the link in the place of one that was superseded."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def yield_to(self, link: Link, known: Peer) -> None:
        """End a link in favour of the one that its peer has already."""
        if not link.joined.done():
            link.joined.set_result(known)
        self.supersede(link)
        try:
            link.unhold()
        except NixlError as error:
            link.fail(error)

    def supersede(self, link: Link) -> None:
        """Tell the other side that a link is not used any more, and end it."""
        link.leaving = True
        link.send(encode_frame(FrameType.SUPERSEDED))
        # The other side closes it when it has read that: what it has sent before is still to be read here.
        asyncio.get_running_loop().call_later(SUPERSEDED_SECONDS, link.close)

    async def replaced(self, peer: Peer, link: Link) -> None:
        """Wait until another link has taken the place of one that was superseded.

        Raises:
            PeerLost: the peer went before.
        """
        while peer.link is link:
            if peer.gone:
                raise PeerLost(peer.gone, peer=peer.name)
            future = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(peer.name, []).append(future)
            await future

    def settled(self, peer: Peer) -> None:
        """Take note that a peer has another link, or is gone."""
        for future in self._waiting.pop(peer.name, []):
            if not future.done():
                future.set_result(None)

    async def current_link(self, peer: Peer) -> Link:
        """Return a peer's control connection; wait for the other one if it is being replaced.

        Raises:
            PeerLost: the peer is gone, or has none.
        """
        while (link := peer.link) is not None:
            if not link.superseded:
                return link
            await self.replaced(peer, link)
        raise PeerLost(f"peer {peer.name!r} has no control connection", peer=peer.name)
