"""The decode side of SGLang's disaggregation: what prefill ranks say of this rank's rooms, and what it means when one is lost.

Everything here runs on the loop of the rank's agent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver
from sglang.srt.utils.network import NetworkAddress

from nixl_async.errors import ClosedError
from nixl_async.integrations.sglang.messages import PREFIX, MalformedMessage, read_note
from nixl_async.integrations.sglang.prefill import CONNECT_SECONDS

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.5
"""How long after the end of a connection its last bytes may still be on the way from the network into memory."""


class DecodeSide:
    """Follows the rooms of a decode rank. `manager` is SGLang's KV manager, `manager.agent` the agent.

    A source is a prefill rank that a room gets bytes from, by the name of its agent.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.rooms: dict[int, dict[str, str]] = {}
        """The sources of each room, with the bootstrap address by which SGLang knows their server."""
        self._armed: dict[int, tuple[int, frozenset[str]]] = {}
        """Rooms whose pages SGLang holds until every source is quiet: the generation it waits for, and the sources."""
        self._ranks: dict[str, int] = {}
        self._arriving: dict[str, asyncio.Task[None]] = {}

    # Rooms.

    def expect(self, room: int, sources: dict[str, str]) -> None:
        """Follow a room that the sources are being asked for."""
        self.rooms[room] = sources
        for name in sources:
            if name not in self.manager.agent.peers and name not in self._arriving:
                self._arriving[name] = self.manager.loop.spawn(self._await(name))

    async def _await(self, name: str) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.manager.agent.wait_peer(name)
        except ClosedError:
            return
        except TimeoutError:
            self._lose(name, f"it has not connected within {CONNECT_SECONDS:g} s")
        finally:
            del self._arriving[name]

    def forget(self, room: int) -> None:
        """Follow a room no longer: it is over."""
        self.rooms.pop(room, None)

    def arm(self, room: int, generation: int, sources: Iterable[str]) -> None:
        """Take note that a room's pages are held until every source has said that it is quiet; one that is lost has."""
        self._armed[room] = generation, frozenset(sources)
        for name in self._armed[room][1]:
            if name not in self.manager.agent.peers and name not in self._arriving:
                self._absolve(room, generation, name)

    def disarm(self, room: int) -> None:
        """Take note that a room's pages are held no longer."""
        self._armed.pop(room, None)

    def _absolve(self, room: int, generation: int, name: str) -> None:
        # Who never said its rank has never acknowledged anything: any other value counts it once.
        rank: Any = self._ranks.get(name, name)
        asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.manager.note_abort_ack, room, rank, generation)

    # Messages.

    def take(self, frames: list[bytes]) -> None:
        """Act on a message that came to the control socket: what SGLang sends, or a prefill rank that has no connection to us."""
        if self.manager.handle_abort_ack_message(frames):
            return
        parsed = self.manager.parse_kv_status_message(frames)
        if parsed is None:
            raise MalformedMessage(f"a message begins with {frames[0][:32]!r}")
        room, status, rank, reason = parsed
        self._status(room, status, rank, reason)

    async def listen(self) -> None:
        """Act on what prefill ranks notify, until cancelled."""
        async with self.manager.agent.notifications(prefix=PREFIX) as arriving:
            async for one in arriving:
                try:
                    self._noted(one.peer, read_note(one.payload))
                except (MalformedMessage, KeyError, TypeError, ValueError) as error:
                    logger.error("peer %s: %r", one.peer, error)

    def _noted(self, peer: str, said: dict[str, Any]) -> None:
        match said["k"]:
            case "hello":
                self._ranks[peer] = int(said["rank"])
            case "status":
                self._status(int(said["room"]), int(said["status"]), int(said["rank"]), said["reason"])
            case "ack":
                self.manager.note_abort_ack(int(said["room"]), int(said["rank"]), int(said["generation"]))
            case kind:
                raise MalformedMessage(f"unknown notification {kind!r}")

    def _status(self, room: int, status: int, rank: int, reason: str | None) -> None:
        self.manager.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=rank, failure_reason=reason)

    # Peers.

    def lost(self, name: str, why: str, orderly: bool) -> None:
        """Take note that the connection to a prefill rank is over."""
        if name not in self.manager.agent.peers:
            self._lose(name, why, orderly)

    def _lose(self, name: str, why: str, orderly: bool = False) -> None:
        manager, rank = self.manager, self._ranks.get(name)
        affected, addresses = 0, set()
        for room, sources in list(self.rooms.items()):
            if name not in sources:
                continue
            addresses.add(sources[name])
            status = manager.request_status.get(room)
            delivered = rank is not None and rank in manager.prefill_response_tracker.get(room, ())
            if status in (None, KVPoll.Success, KVPoll.Failed) or delivered:
                continue
            affected += 1
            manager.record_failure(room, f"Lost connection with prefill rank {name}: {why}")
            manager.update_status(room, KVPoll.Failed)
        for room, (generation, names) in self._armed.items():
            if name in names:
                self._absolve(room, generation, name)
        self._ranks.pop(name, None)
        level = logging.INFO if orderly and not affected else logging.WARNING
        logger.log(level, "Lost connection with prefill rank %s (%d rooms affected): %s", name, affected, why)
        if addresses:
            # Closing SGLang's sockets takes locks that are held while others send.
            manager.loop.spawn(asyncio.to_thread(self._reset, addresses))

    def _reset(self, addresses: set[str]) -> None:
        """Let the next request to these servers ask for their ranks, and register with them, again."""
        manager, stale = self.manager, set()
        with manager.connection_lock:
            # SGLang's keys: the address, and the ranks for data, context and tensor parallelism.
            for key in [key for key in manager.connection_pool if key.rsplit("_", 3)[0] in addresses]:
                for info in manager.connection_pool.pop(key):
                    stale.add(NetworkAddress(info["rank_ip"], int(info["rank_port"])).to_tcp())
            for address in addresses:
                manager.prefill_info_table.pop(address, None)
                manager.heartbeat_failures.pop(address, None)
        for endpoint in stale:
            CommonKVReceiver.disconnect_endpoint(endpoint)
