"""What peers are told of this agent: its metadata, all of its regions, and every change to them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any

from nixl_async.backend import Backend
from nixl_async.errors import ConfigurationError
from nixl_async.link import Link
from nixl_async.memory import MemoryRegion
from nixl_async.peers import PIECE_PREFIX, PIECE_REGIONS, encode_announcement, pieces, region_record
from nixl_async.questions import Questions
from nixl_async.wire import FrameType, encode_frame, encode_json

LINKS_AT_ONCE = 32
"""To so many connections something is sent before the loop goes on with other things."""


class Announcer:
    """Tells peers of one agent, called `name`, in the life `incarnation`.

    `address()` is where it is served, `backends()` are its backends, `links` its control connections; `spawn` runs a coroutine as
    a task that the agent ends.
    """

    def __init__(
        self,
        name: str,
        incarnation: str,
        address: Callable[[], tuple[str, int] | None],
        backends: Callable[[], Iterable[Backend]],
        links: Collection[Link],
        questions: Questions,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self.regions: dict[str, MemoryRegion] = {}
        """The agent's regions, those that peers are not told of included."""
        self._name, self._incarnation, self._address, self._backends = name, incarnation, address, backends
        self._links, self._questions, self._spawn = links, questions, spawn
        self._withdrawing: dict[MemoryRegion, None] = {}
        # How many changes of our regions peers were told; who has news that were posted and not sent.
        self._revision = 0
        self._news: dict[Link, None] = {}

    def metadata(self, regions: Iterable[MemoryRegion] | None = None) -> bytes:
        """Return the blob that other agents, stock NIXL's among them, load."""
        chosen = list(self.regions.values()) if regions is None else list(regions)
        if regions is not None and (unoffered := [region.name for region in chosen if not region.offered]):
            raise ConfigurationError(f"the regions {unoffered} are not offered to every peer; lease them instead")
        told = [region for region in chosen if region.record]
        return encode_announcement(self._name, self._incarnation, self._address(), self._backends(), told, self._revision)

    def publish(self, region: MemoryRegion) -> None:
        """Tell a region to everyone who was sent the metadata, peers that are still joining included."""
        self.regions[region.name] = region
        if not region.offered:
            return
        region.record = region_record(region)
        self._revision += 1
        frame = encode_frame(FrameType.REGIONS, b'{"added":[%b],"revision":%d}' % (region.record, self._revision))
        self._post(frame)

    async def withdraw(self, region: MemoryRegion) -> None:
        """Take a region back: wait until everyone who was told of it says that none of their transfers touches it."""
        if self.regions.get(region.name) is region:
            del self.regions[region.name]
        if region.offered:
            region.record = b""
            self._revision += 1
            number = self._questions.number()
            frame = encode_json(FrameType.WITHDRAW, {"id": number, "name": region.name, "revision": self._revision})
            answers = [self._questions.expect(link, number) for link in self._post(frame)]
            self._withdrawing[region] = None
            try:
                await asyncio.gather(*answers)
            finally:
                del self._withdrawing[region]
        if not region.quarantined:
            # A peer may have asked for its checksums meanwhile.
            await region.wait_unused()

    def find(self, name: str, address: int) -> Iterable[MemoryRegion]:
        """Yield the regions of that name and address, those that are being withdrawn included."""
        found = self.regions.get(name)
        for region in self._withdrawing if found is None or found.address != address else (found,):
            if (region.name, region.address) == (name, address):
                yield region

    def tell(self, link: Link) -> None:
        """Send the metadata to the other side of a link; many regions follow it in pieces."""
        regions = [region for region in self.regions.values() if region.record]
        more = len(regions) > PIECE_REGIONS
        mine = self._name, self._incarnation, self._address(), self._backends()
        to = link.other.name, link.other.incarnation
        blob = encode_announcement(*mine, regions, self._revision, more=more, to=to)
        link.send(encode_frame(FrameType.METADATA, blob))
        link.told = True
        if more:
            self._spawn(self._tell_more(link, regions))

    def link_closed(self, link: Link) -> None:
        """Take note of a link's end."""
        self._news.pop(link, None)

    async def _tell_more(self, link: Link, regions: list[MemoryRegion]) -> None:
        """Send many regions a piece at a time. What is registered meanwhile is told besides; what is gone is left out."""
        waiting = pieces(region.record for region in regions if region.record)
        piece: bytes | None = next(waiting)
        while piece is not None and not (link.closed or link.superseded):
            after = next(waiting, None)
            link.send(
                encode_frame(FrameType.REGIONS, b'%b%b,"last":%b}' % (PIECE_PREFIX, piece, b"false" if after else b"true"))
            )
            piece = after
            await asyncio.sleep(0)
            await link.room()

    def _post(self, frame: bytes) -> list[Link]:
        """Let a frame go to everyone who was sent the metadata, before whatever else they are sent; return who that is."""
        links = [link for link in self._links if link.told]
        if links and not self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
        for link in links:
            link.post(frame)
            self._news[link] = None
        return links

    def _send_news(self) -> None:
        """Send what was posted to some connections, and go on with the others in the loop's next round."""
        for link in list(itertools.islice(self._news, LINKS_AT_ONCE)):
            del self._news[link]
            link.flush()
        if self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
