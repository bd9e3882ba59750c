"""What peers tell of their regions: all of them, in pieces where they are many, and every change to them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from nixl_async.errors import ProtocolError
from nixl_async.link import Link
from nixl_async.memory import RemoteRegion
from nixl_async.peers import Announcement, Peer, check_revision, describe_region, read_regions
from nixl_async.routes import Routes
from nixl_async.wire import FrameType, decode_json, encode_json

MAX_PEER_REGIONS = 1 << 20


class PeerRegions:
    """Keeps peers' regions as they tell of them.

    `changed(name)` is told whose regions are others; `spawn` runs a coroutine as a task that the agent ends.
    """

    def __init__(
        self, routes: Routes, changed: Callable[[str], None], spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._routes, self._changed, self._spawn = routes, changed, spawn
        # Peers that tell their regions in pieces, and what they have told.
        self._gathering: dict[Link, tuple[Announcement, dict[str, RemoteRegion]]] = {}

    def gathers(self, link: Link) -> bool:
        """Tell whether pieces are still to come by a link."""
        return link in self._gathering

    def begin(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        """Take the metadata of a peer whose regions follow."""
        self._gathering[link] = announcement, regions

    def gather(self, link: Link, payload: bytes) -> tuple[Announcement, dict[str, RemoteRegion]] | None:
        """Take a piece of a peer's regions; return all that it has told with the last, else `None`.

        Raises:
            ProtocolError: it is malformed, one too many, or too large.
        """
        if link.leaving:
            return None
        if link not in self._gathering:
            raise ProtocolError("a piece of metadata comes after its end")
        announcement, regions = self._gathering[link]
        value = decode_json(payload, piece=list, last=bool)
        for region in read_regions(announcement.name, announcement.incarnation, value["piece"]):
            regions[region.name] = region
        if len(regions) > MAX_PEER_REGIONS:
            raise ProtocolError(f"{announcement.name!r} has more than {MAX_PEER_REGIONS} regions")
        return self._gathering.pop(link) if value["last"] else None

    def link_closed(self, link: Link) -> None:
        """Take note of a link's end."""
        self._gathering.pop(link, None)

    def load(self, peer: Peer, announcement: Announcement) -> None:
        """Take the regions of metadata that came out of band."""
        if announcement.revision is not None and announcement.revision <= peer.revision:
            # The peer has told all of it; what is not there any more it has withdrawn since.
            return
        added = [region for region in announcement.regions if region.name not in peer.regions]
        for region in added:
            peer.add(region)
        if added:
            self._changed(peer.name)

    def add(self, peer: Peer, payload: bytes) -> None:
        """Act on a REGIONS frame of a peer that has joined.

        Raises:
            ProtocolError: it is malformed, or those are too many.
        """
        value = decode_json(payload, added=list)
        if len(peer.regions) + len(value["added"]) > MAX_PEER_REGIONS:
            raise ProtocolError(f"{peer.name!r} has more than {MAX_PEER_REGIONS} regions")
        for region in read_regions(peer.name, peer.incarnation, value["added"]):
            known = peer.regions.get(region.name)
            if known is None or describe_region(known) != describe_region(region):
                peer.add(region)
        peer.revision = max(peer.revision, check_revision(value.get("revision", 0)))
        self._changed(peer.name)

    def withdraw(self, link: Link, peer: Peer, payload: bytes) -> None:
        """Act on a WITHDRAW frame: answer when no transfer of ours touches the region any more.

        Raises:
            ProtocolError: it is malformed.
        """
        value = decode_json(payload, id=int, name=str)
        peer.revision = max(peer.revision, check_revision(value.get("revision", 0)))
        # At once: the name may be given to another region in the next frame.
        self._spawn(self._withdrawn(link, peer, peer.take(value["name"]), value["id"]))

    async def _withdrawn(self, link: Link, peer: Peer, region: RemoteRegion | None, number: int) -> None:
        if region is not None:
            region.withdrawn = "its owner deregistered it"
            self._changed(peer.name)
            await region.wait_unused()
            await self._routes.forget(peer, region)
        link.send(encode_json(FrameType.WITHDRAWN, {"id": number}))
