"""The prefill side of SGLang's disaggregation: which decode ranks there are, and the rooms whose KV caches go to them.

Everything here runs on the loop of the rank's agent, but `add`, which SGLang's scheduler calls. A room's bytes are quiet before
the room is told to have failed, to SGLang here and to the decode ranks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification

from nixl_async.agent import Agent
from nixl_async.errors import Aborted, NixlError, PeerLost, Quarantined
from nixl_async.handle import PreparedTransfer
from nixl_async.integrations.sglang.layers import LayerEvents
from nixl_async.integrations.sglang.messages import (
    REGISTRATION,
    REQUEST,
    MalformedMessage,
    Registration,
    TransferInfo,
    as_indices,
    note,
)
from nixl_async.integrations.sglang.places import Places, Route, aux_places, by_memory, layers_of, plan_route
from nixl_async.integrations.sglang.state import state_places
from nixl_async.peers import Peer

if TYPE_CHECKING:
    from sglang.srt.disaggregation.common.utils import TransferKVChunk

T = TypeVar("T", bound=Hashable)
logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""How long a rank tries to reach one that has registered, or waits for one that it has registered with."""
ON_LOOP_TOKENS = 1024
"""What moves for chunks of more tokens is found on a thread."""
REMEMBERED_FAILURES = 4096
"""Of how many rooms that failed a rank knows it, to tell a decode rank that asks for one later."""


class _Target:
    """A decode rank that has registered: its registration, and how far the connection to its agent is."""

    def __init__(self, registration: Registration, connecting: asyncio.Task[tuple[Peer, Route]]) -> None:
        self.registration, self.connecting = registration, connecting

    @property
    def good(self) -> bool:
        """Whether it is connected, or about to be."""
        return not self.connecting.done() or self.peer is not None

    @property
    def peer(self) -> Peer | None:
        """The connected peer, if it is one by now."""
        done = self.connecting
        if not done.done() or done.cancelled() or done.exception() is not None:
            return None
        peer = done.result()[0]
        return peer if peer.connected else None


class _Sending:
    """A room some of whose chunks move: their tasks, and whether the last is among those that began."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.last = False
        self.why = ""


class PrefillSide:
    """Moves the chunks of a prefill rank's rooms. `manager` is SGLang's KV manager, `manager.agent` the agent."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.targets: dict[str, _Target] = {}
        self.rooms: dict[int, _Sending] = {}
        self._refusals: OrderedDict[str, str] = OrderedDict()
        self._failed: OrderedDict[int, str] = OrderedDict()
        # Rooms that have a sender, and of the others those that failed before they had one.
        self._senders: set[int] = set()
        self._given_up: OrderedDict[int, str] = OrderedDict()
        self._counting = threading.Lock()

    # What SGLang's scheduler asks for.

    def add(self, chunk: TransferKVChunk) -> None:
        """Let a chunk go; called by the scheduler's thread."""
        with self._counting:
            self.manager._staging_outstanding[chunk.room] += 1
        self.manager.loop.call(self._start, chunk)

    def moving(self, room: int) -> bool:
        """Tell whether bytes of a room may still move; any thread may ask."""
        return bool(self.manager._staging_outstanding.get(room, 0) > 0)

    def open(self, room: int) -> str | None:
        """Take note that a room has a sender; return why it has failed already, if decode ranks gave it up before."""
        self._senders.add(room)
        self._failed.pop(room, None)
        return self._given_up.pop(room, None)

    def close(self, room: int) -> None:
        """Take note that a room's sender is cleared."""
        self._senders.discard(room)

    # Messages.

    def take(self, frames: list[bytes]) -> None:
        """Act on a message that came to the control socket."""
        if self.manager._handle_bootstrap_message(frames):
            return
        if frames[0] == ABORT_TAG:
            self._abort(frames)
        elif frames[0] == REGISTRATION:
            self._register(Registration.decode(frames))
        elif frames[0] == REQUEST:
            self._request(TransferInfo.decode(frames))
        else:
            raise MalformedMessage(
                f"a message begins with {frames[0][:32]!r}; is the decode server's transfer backend nixl_async?"
            )

    def _register(self, registration: Registration) -> None:
        name = registration.agent
        known = self.targets.get(name)
        if known is not None and known.registration.metadata == registration.metadata and known.good:
            return
        if known is not None:
            known.connecting.cancel()
        self._refusals.pop(name, None)
        target = _Target(registration, self.manager.loop.spawn(self._connect(registration), watched=True))
        self.targets[name] = target
        self.manager.decode_kv_args_table[name] = registration
        target.connecting.add_done_callback(partial(self._connected, target))

    async def _connect(self, registration: Registration) -> tuple[Peer, Route]:
        manager, theirs = self.manager, registration.geometry
        if manager.requires_dcp_relayout(theirs.dcp_size, theirs.dcp_rank):
            raise ValueError("decode context parallelism that prefill has not, of pages to be relaid, is not supported")
        ours = [kind.value for kind in getattr(manager.kv_args, "state_types", None) or ()]
        if theirs.state_types[: len(ours)] != ours:
            raise ValueError(f"the decode rank keeps the states {theirs.state_types}, this prefill rank {ours}")
        manager.check_peer_aux_buffer_count(registration.agent, len(theirs.aux_item_lens))
        route = plan_route(manager, theirs)
        async with asyncio.timeout(CONNECT_SECONDS):
            peer = await manager.agent.add_peer(registration.metadata, token=registration.token or None)
            await manager.agent.notify(peer, note("hello", rank=manager._prefill_unique_rank()))
        return peer, route

    def _connected(self, target: _Target, task: asyncio.Task[tuple[Peer, Route]]) -> None:
        name = target.registration.agent
        if task.cancelled() or (error := task.exception()) is None or self.targets.get(name) is not target:
            return
        self._drop(name, f"decode rank {name} cannot be reached: {_words(error)}")

    def _request(self, info: TransferInfo) -> None:
        manager, room = self.manager, info.room
        if (why := self._failed.get(room)) is not None or (why := self._refusals.get(info.agent)) is not None:
            self._refuse(info, why)
            return
        if info.agent not in self.targets:
            self._refuse(
                info, f"decode rank {info.agent} is not registered with this prefill rank, or its connection was lost"
            )
            return
        infos = manager.transfer_infos.setdefault(room, {})
        infos[info.agent] = info
        if len(infos) == info.required_dst_info_num:
            manager.resolve_kv_replica_factor(infos)
            manager.req_to_decode_prefix_len[room] = next((one.decode_prefix_len for one in infos.values()), 0)
            manager.update_status(room, KVPoll.WaitingForInput)

    def _refuse(self, info: TransferInfo, why: str) -> None:
        """Tell a decode rank at once that it will not get what it asks for."""
        self.manager.send_kv_status_message(
            targets=[(info.endpoint, info.dst_port)], bootstrap_room=info.room, status=KVPoll.Failed, failure_reason=why
        )
        if info.room in self.manager.request_status:
            self.fail(info.room, why)

    def _abort(self, frames: list[bytes]) -> None:
        notification = AbortNotification.from_zmq(frames)
        if notification is None:
            return
        manager, room = self.manager, notification.room
        if manager.request_status.get(room) not in (None, KVPoll.Success):
            self.fail(room, "Aborted by decode-side abort notification.")
        target = notification.deferred_ack_target()
        if target is not None and manager.enable_deferred_decode_kv_release:
            manager.register_deferred_ack_target(room, target)
            manager._maybe_ack_drained_abort(room)

    # Peers.

    def lost(self, name: str, why: str, orderly: bool) -> None:
        """Take note that the connection to a peer is over: its rooms fail, and it must register again."""
        target = self.targets.get(name)
        if target is not None and target.connecting.done() and target.peer is None:
            self._drop(name, f"Lost connection with decode rank {name}: {why}", orderly)

    def _drop(self, name: str, why: str, orderly: bool = False) -> None:
        self.targets.pop(name, None)
        self.manager.decode_kv_args_table.pop(name, None)
        _remember(self._refusals, name, why)
        logger.log(logging.INFO if orderly else logging.WARNING, "%s", why)
        for room, infos in list(self.manager.transfer_infos.items()):
            if name in infos and not infos[name].is_dummy:
                self.fail(room, why)

    # Rooms.

    def fail(self, room: int, why: str) -> None:
        """Stop a room: nothing more of it begins, what moves is cancelled, and the decode ranks hear of it when all is quiet."""
        manager, sending = self.manager, self.rooms.get(room)
        status = manager.request_status.get(room)
        if status == KVPoll.Success:
            return
        _remember(self._failed, room, why)
        if status is None:
            # Its sender is cleared already. What moves must end, and who asks for the room later must be told.
            if sending is not None:
                self._stop(sending, why)
            return
        with manager.failure_lock:
            manager.failure_records.setdefault(room, why)
        manager.update_status(room, KVPoll.Failed)
        if sending is None:
            self._conclude_failure(room, why)
            if room not in self._senders:
                # Nobody would ever clear it.
                manager.request_status.pop(room, None)
                with manager.failure_lock:
                    manager.failure_records.pop(room, None)
                _remember(self._given_up, room, why)
        else:
            self._stop(sending, why)

    def _stop(self, sending: _Sending, why: str) -> None:
        sending.why = sending.why or why
        for task in sending.tasks:
            task.cancel()

    def _start(self, chunk: TransferKVChunk) -> None:
        sending = self.rooms.setdefault(chunk.room, _Sending())
        sending.last |= chunk.is_last_chunk
        task = self.manager.loop.spawn(self._move(chunk, sending))
        sending.tasks.add(task)
        task.add_done_callback(partial(self._moved, chunk.room, sending))

    async def _move(self, chunk: TransferKVChunk, sending: _Sending) -> None:
        """Move a chunk; what goes wrong is written down, and nothing moves any more at the end."""
        manager, room = self.manager, chunk.room
        status, infos = manager.request_status.get(room), manager.transfer_infos.get(room)
        if status in (None, KVPoll.Failed) or infos is None:
            self._stop(sending, "the room has failed or is cleared")
            return
        manager.update_status(room, KVPoll.Transferring)
        try:
            async with asyncio.TaskGroup() as moving:
                for info in list(infos.values()):
                    if not info.is_dummy:
                        moving.create_task(self._send(chunk, info))
        except BaseExceptionGroup as group:
            errors = list(_leaves(group))
            error = next((one for one in errors if isinstance(one, Quarantined)), errors[0])
            if isinstance(error, Quarantined):
                # Nobody can promise that its pages are not written any more.
                manager.poison_deferred_ack_room(room)
            level = logging.WARNING if isinstance(error, NixlError) else logging.ERROR
            logger.log(level, "room %s: %s", room, _words(error), exc_info=None if isinstance(error, NixlError) else error)
            self._stop(sending, _words(error))

    async def _send(self, chunk: TransferKVChunk, info: TransferInfo) -> None:
        target = self.targets.get(info.agent)
        if target is None:
            raise PeerLost(self._refusals.get(info.agent, f"decode rank {info.agent} is gone"), peer=info.agent)
        try:
            peer, route = await asyncio.shield(target.connecting)
        except asyncio.CancelledError:
            if target.connecting.cancelled():
                raise PeerLost(f"decode rank {info.agent} has registered anew", peer=info.agent) from None
            raise
        manager, theirs, after = self.manager, target.registration.geometry, chunk.wait_event
        src, dst = as_indices(chunk.prefill_kv_indices), info.kv_indices[chunk.index_slice]
        if len(dst) < len(src):
            logger.warning("room %s: %d pages go to %d; the rest stays here", chunk.room, len(src), len(dst))
        src, dst = src[: len(dst)], dst[: len(src)]
        layers = layers_of(manager) if isinstance(after, LayerEvents) else None
        async with asyncio.TaskGroup() as moving:
            if len(src):
                find = partial(route.places, manager.buffers, peer, src, dst, layers)
                # Slices of heads are many: not on the loop.
                batches = find() if len(src) * manager.kv_args.page_size <= ON_LOOP_TOKENS else await asyncio.to_thread(find)
                for layer, places in batches:
                    await self._begin(moving, places, after, layer)
            if chunk.is_last_chunk:
                if chunk.prefill_aux_index is None or info.aux_index is None:
                    raise ValueError(f"room {chunk.room} has no row in the aux buffers")
                rest = aux_places(manager.buffers, peer, theirs, chunk.prefill_aux_index, info.aux_index)
                if chunk.state_indices:
                    rest += state_places(manager, manager.buffers, peer, theirs, chunk.state_indices, info.state_indices)
                await self._begin(moving, rest, after, -1)

    async def _begin(self, moving: asyncio.TaskGroup, places: list[Places], after: Any, layer: int) -> None:
        agent = self.manager.agent
        for src, dst in by_memory(places):
            moving.create_task(_transfer(agent, await agent.prepare(src, dst, once=True), after, layer))

    def _moved(self, room: int, sending: _Sending, task: asyncio.Task[None]) -> None:
        """Count a chunk that is quiet; conclude its room if it was the last one."""
        manager = self.manager
        sending.tasks.discard(task)
        with self._counting:
            left = manager._staging_outstanding.get(room, 0) - 1
            if left > 0:
                manager._staging_outstanding[room] = left
            else:
                manager._staging_outstanding.pop(room, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stop(sending, _words(error))
        if not sending.tasks and self.rooms.get(room) is sending:
            del self.rooms[room]
            if sending.why or task.cancelled():
                self._conclude_failure(room, sending.why or "it was cancelled")
            elif sending.last:
                manager.conclude_transfer(bootstrap_room=room, status=KVPoll.Success)
                manager.transfer_infos.pop(room, None)
                manager.req_to_decode_prefix_len.pop(room, None)
        manager._maybe_ack_drained_abort(room)

    def _conclude_failure(self, room: int, why: str) -> None:
        manager = self.manager
        manager.conclude_failure(bootstrap_room=room, failure_reason=why)
        manager.transfer_infos.pop(room, None)
        manager.req_to_decode_prefix_len.pop(room, None)


async def _transfer(agent: Agent, prepared: PreparedTransfer, after: Any, layer: int) -> None:
    try:
        if isinstance(after, LayerEvents):
            after = await after.event_of(layer)
        await agent.transfer(prepared, after=after)
    except asyncio.CancelledError:
        # A task group takes a child that ends so for one that it has cancelled itself.
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise Aborted("the agent has cancelled the transfer") from None
        raise


def _remember(failures: OrderedDict[T, str], what: T, why: str) -> None:
    failures[what] = why
    if len(failures) > REMEMBERED_FAILURES:
        failures.popitem(last=False)


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
