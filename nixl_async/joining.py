"""How peers join, for the first time, again, or by two connections at once: one at a time by each name.

Before a life of a peer is told how our backends are reached, and before it is used, nothing from before may be written any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from nixl_async.announcer import Announcer
from nixl_async.errors import AuthenticationError, NixlError, PeerLost, ProtocolError
from nixl_async.link import Link
from nixl_async.members import Members
from nixl_async.memory import RemoteRegion
from nixl_async.peers import Announcement, Peer
from nixl_async.questions import Questions
from nixl_async.routes import Routes
from nixl_async.superseding import Superseding
from nixl_async.wire import FrameType, decode_json, encode_json

PROBE_SECONDS = 1.0
"""How long a connected peer has to show that it is alive when somebody else claims its name without proving it."""


@dataclass(slots=True, eq=False)
class _Turns:
    """Who comes by one name, one at a time: `users` waits or has its turn."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Joining:
    """Lets peers join the agent called `name`.

    `confirm_seconds`: how long a peer that was given up has to confirm that nothing from then is written any more; `spawn` runs a
    coroutine as a task that the agent ends.
    """

    def __init__(
        self,
        name: str,
        confirm_seconds: float,
        members: Members,
        routes: Routes,
        announcer: Announcer,
        questions: Questions,
        superseding: Superseding,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._name, self._confirm_seconds = name, confirm_seconds
        self._members, self._routes, self._announcer = members, routes, announcer
        self._questions, self._superseding, self._spawn = questions, superseding, spawn
        self._turns: dict[str, _Turns] = {}
        # What peers that were given up before were asked to confirm.
        self._rejoins: dict[Link, asyncio.Future[str | None]] = {}
        # Connections of peers that had given us up, by the life of the peer; those where that is not seen to yet, or cannot be.
        self._returned: dict[tuple[str, str], list[Link]] = {}
        self._rejoining: set[Link] = set()

    def greet(self, link: Link) -> None:
        """Tell a peer that has proved who it is of ourselves, as soon as that is right."""
        name = link.other.name
        known = self._members.peers.get(name)
        if link.connecting and known is not None and known.link is not None and known.incarnation == link.other.incarnation:
            self._superseding.yield_to(link, known)
            return
        if known is not None and known.incarnation != link.other.incarnation:
            # It uses our backends once it is told of them: by then nothing of its life before may be written any more.
            link.hold()
            self._spawn(self._replace(known, link))
            return
        if name in self._members.going:
            # What it is told to reach us by must not be taken back with what its life before was told.
            link.hold()
            self._spawn(self._tell_later(link, self._members.going[name]))
            return
        self._tell(link)

    def confirming(self, link: Link) -> bool:
        """Tell whether the other side has been asked, and has not been heard, to confirm that nothing from before is written."""
        return link in self._rejoins

    def announced(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        """Let a peer join that has told all of itself on a link."""
        link.announced = True
        if link not in self._rejoins or self._rejoins[link].done():
            # Else the confirmation is still to be read; what comes before it is kept.
            link.hold()
        self._spawn(self._join(link, announcement, regions))

    def take_rejoin(self, link: Link, payload: bytes) -> None:
        """Act on a REJOIN frame: part from a peer that had given us up, and confirm that.

        Raises:
            ProtocolError: it is malformed, or comes at the wrong time.
        """
        value = decode_json(payload, id=int, number=int)
        if link.announced or link.their_loss:
            raise ProtocolError("REJOIN comes twice, or after METADATA")
        if not 0 < value["number"] < 1 << 63:
            raise ProtocolError(f"the number of a REJOIN is {value['number']}; it must be above 0")
        link.their_loss = value["number"]
        self._returned.setdefault((link.other.name, link.other.incarnation), []).append(link)
        self._rejoining.add(link)
        self._spawn(self._rejoined(link, value["id"]))

    def link_closed(self, link: Link) -> None:
        """Take note of a link's end."""
        self._rejoins.pop(link, None)
        if link.their_loss:
            who = link.other.name, link.other.incarnation
            self._returned[who].remove(link)
            self._rejoining.discard(link)
            if not self._returned[who]:
                del self._returned[who]

    def _tell(self, link: Link) -> None:
        link.our_loss = self._members.losses.number(link.other.name, link.other.incarnation)
        if link.our_loss:
            self._ask_rejoin(link)
        self._announcer.tell(link)

    async def _tell_later(self, link: Link, dropped: asyncio.Future[None]) -> None:
        await asyncio.shield(dropped)
        if not link.closed and not self._members.closing:
            self._tell(link)
            link.unhold()

    async def _replace(self, known: Peer, link: Link) -> None:
        if await self._give_way(known, link) and not link.closed and not self._members.closing:
            self._tell(link)
            link.unhold()

    async def _give_way(self, known: Peer, link: Link) -> bool:
        """Forget a peer for another incarnation of it, or another attempt of it; return whether that is right."""
        # Whoever knows a shared token can claim any name: not that of one who is there.
        if not link.names_proved and known.link is not None and await known.link.answers(PROBE_SECONDS):
            link.fail(AuthenticationError(f"the name {known.name!r} belongs to an agent that is connected and alive"))
            return False
        why = (
            "was replaced by a new incarnation"
            if known.incarnation != link.other.incarnation
            else "had given this agent up, and connects again"
        )
        await self._members.drop(known, PeerLost(f"peer {known.name!r} {why}", peer=known.name), "lost", alone=False)
        if known.link is not None:
            known.link.abort()
        # It may have been on its way out already.
        await self._members.gone(known.name)
        return True

    async def _join(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        if link.closed or (link in self._rejoins and not await self._confirmed(link)):
            return
        async with self._alone(announcement.name):
            if link in self._rejoining:
                # What it asked for cannot be confirmed, of which it has been told.
                link.fail(
                    PeerLost(
                        f"peer {announcement.name!r} cannot join: what it sent before cannot be fenced off",
                        peer=announcement.name,
                    )
                )
                return
            await self._join_alone(link, announcement, regions)

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Let one at a time come by a name: two connections of one peer must not both find it absent."""
        turns = self._turns.setdefault(name, _Turns())
        turns.users += 1
        try:
            async with turns.lock:
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                del self._turns[name]

    async def _join_alone(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        who = announcement.name, announcement.incarnation
        if link.our_loss != self._members.losses.number(*who) or any(
            one.their_loss > link.their_loss for one in self._siblings(link)
        ):
            # One side has lost the other since they told each other of themselves here.
            link.fail(PeerLost(f"peer {announcement.name!r} was lost while it joined", peer=announcement.name, retryable=True))
            return
        known = self._members.peers.get(announcement.name)
        if known is not None and known.incarnation == announcement.incarnation and known.link is not None:
            # Both sides dialled at once: both keep the link that the agent with the smaller name began.
            old = known.link
            self._routes.hear_again(known, announcement)
            if not old.closed and self._initiator(old) < self._initiator(link):
                self._superseding.yield_to(link, known)
                return
            self._members.relink(known, link)
            self._superseding.supersede(old)
            link.joined.set_result(known) if not link.joined.done() else None
            link.unhold()
            return
        if known is not None and not await self._give_way(known, link):
            return
        await self._members.gone(announcement.name)
        peer = Peer(announcement.name, announcement.incarnation, regions, link=link, checksums=announcement.checksums)
        peer.traces = announcement.traces
        try:
            await self._routes.connect(peer, announcement, link.host)
        except NixlError as error:
            link.fail(error)
        if link.closed or self._members.closing:
            await self._routes.disconnect(peer)
            self._members.losses.add(peer.name, peer.incarnation)
            link.close()
            return
        self._members.admit(peer, announcement)
        link.joined.set_result(peer) if not link.joined.done() else None
        try:
            link.unhold()
        except NixlError as error:
            link.fail(error)

    def _initiator(self, link: Link) -> str:
        return self._name if link.connecting else link.other.name

    def _ask_rejoin(self, link: Link) -> None:
        """Tell a peer that it was given up before, and ask it to see to it that nothing from then is written any more."""
        asked = self._rejoins[link] = self._questions.ask(link, FrameType.REJOIN, number=link.our_loss)
        seconds = self._confirm_seconds
        why = (
            f"peer {link.other.name!r} did not confirm within {seconds:g} s that nothing of the connections before is written"
        )
        late = PeerLost(why, peer=link.other.name, retryable=True)
        timer = asyncio.get_running_loop().call_later(seconds, link.fail, late)
        asked.add_done_callback(lambda _: timer.cancel())

    async def _confirmed(self, link: Link) -> bool:
        """Wait for what `_ask_rejoin` asked for; return whether a peer may join."""
        error = await self._rejoins[link]
        if self._rejoins.pop(link, None) is None or error is None:
            return False
        link.hold()
        if error:
            name = link.other.name
            why = f"peer {name!r} cannot confirm that nothing of the connections before is written: {error}"
            link.fail(PeerLost(why, peer=name, retryable=True))
        return not error

    def _siblings(self, link: Link) -> list[Link]:
        """Return the other connections of the same life of a peer that come after it had given us up."""
        return [one for one in self._returned.get((link.other.name, link.other.incarnation), ()) if one is not link]

    async def _rejoined(self, link: Link, number: int) -> None:
        """Part from a peer that had given us up: what it has sent on the connections of that time is not written after this."""
        answer: dict[str, Any] = {"id": number}
        name, incarnation = link.other.name, link.other.incarnation
        try:
            async with self._alone(name):
                if not any(one.their_loss >= link.their_loss for one in self._siblings(link) if one not in self._rejoining):
                    known = self._members.peers.get(name)
                    if known is not None and not await self._give_way(known, link):
                        return
                    await self._members.gone(name)
                    await self._routes.fence(name, incarnation, link.host)
        except NixlError as error:
            answer["error"] = str(error) or type(error).__name__
        else:
            self._rejoining.discard(link)
        link.send(encode_json(FrameType.FENCED, answer))
