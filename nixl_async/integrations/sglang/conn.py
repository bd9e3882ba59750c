"""The classes that SGLang asks a disaggregation backend for, on its common ones.

One agent for each scheduler process, on a loop thread of its own that sleeps while nothing happens. A decode rank serves its agent
and tells prefill ranks how to reach it when it registers; they connect to it, write its pages and notify it. A rank that is lost
fails its rooms at once, on either side. SGLang holds an aborted room's pages on the decode side until every prefill rank has said
that it writes no more, or is lost.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import secrets
from typing import Any

import zmq.asyncio  # type: ignore[import-not-found, unused-ignore]
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import (
    AckTarget,
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.disaggregation.common.utils import TransferKVChunk
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs

from nixl_async.agent import TOKEN_VARIABLE, Agent
from nixl_async.errors import NixlError
from nixl_async.integrations.sglang.decode import DecodeSide
from nixl_async.integrations.sglang.loop import LoopThread
from nixl_async.integrations.sglang.messages import (
    Geometry,
    MalformedMessage,
    Registration,
    TransferInfo,
    agent_name,
    as_indices,
    note,
)
from nixl_async.integrations.sglang.places import Buffers
from nixl_async.integrations.sglang.prefill import PrefillSide

logger = logging.getLogger(__name__)

BACKENDS_VARIABLE = "NIXL_ASYNC_SGLANG_BACKENDS"
"""The agent's backends by name, separated by commas."""
LEAVE_SECONDS = 5.0
"""How long the end of a manager, or of the process, waits for peers to say that they are quiet."""
WITHDRAW_SECONDS = 30.0
"""How long SGLang waits for its pools to be free of transfers before it gives their memory away."""


class NixlAsyncKVManager(CommonKVManager):
    """SGLang's KV manager over an agent. `agent`, `buffers` and `loop` belong together; `side` is what the role does."""

    kv_status_msg_tag = b"KV_STATUS"
    kv_status_msg_carries_reason = True
    reports_transfer_latency = True
    supports_deferred_decode_kv_release = True
    supports_role_switch = True
    enable_staging = False

    def __init__(
        self, args: Any, disaggregation_mode: DisaggregationMode, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.enable_staging = False
        prefill = disaggregation_mode == DisaggregationMode.PREFILL
        self.agent_name = agent_name("prefill" if prefill else "decode", self.local_ip, self.rank_port)
        self.side: Any = PrefillSide(self) if prefill else DecodeSide(self)
        self.buffers = Buffers(args)
        self._own_token = b"" if os.environ.get(TOKEN_VARIABLE) else secrets.token_hex(16).encode()
        self.loop = LoopThread(f"nixl-async-{self.agent_name}")
        try:
            self.loop.run(self._open(), envs.SGLANG_DISAGGREGATION_ENGINE_INIT_TIMEOUT.get())
        except BaseException:
            self.loop.close(self._close(), LEAVE_SECONDS)
            raise
        atexit.register(self.teardown)
        if not prefill:
            self._start_heartbeat_checker_thread()
        logger.info("%s moves KV caches by %s", self.agent_name, ", ".join(sorted(self._registered_with())))

    def _registered_with(self) -> set[str]:
        return {backend for region in self.buffers.regions.values() for backend in region.keys}

    async def _open(self) -> None:
        chosen = [name.strip() for name in os.environ.get(BACKENDS_VARIABLE, "").split(",") if name.strip()]
        self.agent = Agent(self.agent_name, backends=chosen or None, token=self._own_token or None)
        await self.agent.__aenter__()
        if isinstance(self.side, DecodeSide):
            await self.agent.serve(self.local_ip, 0)
            self.loop.spawn(self.side.listen())
        await self._register()
        self.loop.spawn(self._follow_peers())
        self.loop.spawn(self._receive())

    async def _register(self) -> None:
        await self.buffers.register(self.agent)
        self._metadata = self.agent.metadata()

    async def _receive(self) -> None:
        """Give what comes to SGLang's control socket to this role's side, until cancelled."""
        control = zmq.asyncio.Socket.from_socket(self.server_socket)
        while True:
            frames = await control.recv_multipart()
            try:
                self.side.take(frames)
            except MalformedMessage as error:
                logger.error("a control message is dropped: %s", error)
            except Exception:
                # Whoever can reach the socket can send anything: the next message may be a good one.
                logger.exception("a control message of %d frames is dropped", len(frames))

    async def _follow_peers(self) -> None:
        async for event in self.agent.membership():
            if event.kind in ("lost", "left"):
                self.side.lost(event.peer, event.reason, event.kind == "left")

    # Memory.

    def register_buffer_to_engine(self) -> None:
        """Register the pools again that `deregister_buffer_to_engine` took back."""
        self.loop.run(self._register(), envs.SGLANG_DISAGGREGATION_ENGINE_INIT_TIMEOUT.get())

    def deregister_buffer_to_engine(self) -> None:
        """Take the pools' registrations back: when this returns no peer writes to them."""
        self.loop.run(self.buffers.deregister(), WITHDRAW_SECONDS)

    def teardown(self) -> None:
        """Part from the peers, and release the agent, its thread and SGLang's sockets. Idempotent."""
        if getattr(self, "_torn_down", False):
            return
        self._torn_down = True
        atexit.unregister(self.teardown)
        if self.disaggregation_mode == DisaggregationMode.DECODE:
            self._heartbeat_shutdown.set()
        self.loop.close(self._close(), LEAVE_SECONDS)
        self._zmq_ctx.destroy(linger=0)

    async def _close(self) -> None:
        if hasattr(self, "agent"):
            await self.agent.aclose()

    # From decode to prefill.

    def build_receiver_registration_message(self) -> list[bytes]:
        """Return what this decode rank tells each prefill rank once."""
        args = self.kv_args
        geometry = Geometry(
            tp_size=self.attn_tp_size,
            tp_rank=args.engine_rank,
            dcp_size=self.dcp_size,
            dcp_rank=self.dcp_rank,
            page_size=args.page_size,
            kv_item_lens=_ints(args.kv_item_lens),
            kv_layer_ids=_ints(args.kv_layer_ids),
            aux_item_lens=_ints(args.aux_item_lens),
            state_types=[kind.value for kind in getattr(args, "state_types", None) or ()],
            state_item_lens=_int_lists(args.state_item_lens),
            state_dims=_int_lists(getattr(args, "state_dim_per_tensor", None)),
            state_layer_ids=_int_lists(args.state_layer_ids),
        )
        return Registration(self.local_ip, self.rank_port, self.agent_name, geometry, self._metadata, self._own_token).encode()

    def build_receiver_metadata_message(
        self,
        *,
        bootstrap_room: int,
        required_dst_info_num: int,
        kv_indices: Any,
        aux_index: int | None,
        state_indices: list[Any] | None,
        decode_prefix_len: int | None,
        is_dummy: bool,
        device_kv_indices: Any = None,
    ) -> list[bytes]:
        """Return what this decode rank tells a prefill rank of one room."""
        if device_kv_indices is not None:
            raise NotImplementedError("HiSparse device pages besides host pages are SGLang's mooncake backend's")
        states = [] if is_dummy else [None if one is None else as_indices(one) for one in state_indices or ()]
        return TransferInfo(
            bootstrap_room,
            self.local_ip,
            self.rank_port,
            self.agent_name,
            required_dst_info_num,
            as_indices([] if is_dummy else kv_indices),
            None if aux_index is None else int(aux_index),
            states,
            decode_prefix_len or 0,
            is_dummy,
        ).encode()

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        """Hold an aborted room's pages no longer."""
        super().clear_deferred_abort_state(bootstrap_room)
        self.loop.call(self.side.disarm, bootstrap_room)

    def should_verify_kv_checksum(self, bootstrap_addr: str) -> bool:
        """Tell whether a prefill server's checksum covers what this rank gets: not where heads are sliced."""
        info = self.prefill_info_table.get(bootstrap_addr)
        return self.is_mla_backend or info is None or info.attn_tp_size == self.attn_tp_size

    # From prefill to decode.

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: Any,
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,
        indices_event: Any = None,
        trace_ctx: Any = None,
    ) -> None:
        """Let a chunk of a room go once `wait_event` is reached; returns at once."""
        if bootstrap_room not in self.transfer_infos:
            # A dummy rank's, or one that is over.
            return
        chunk = TransferKVChunk(
            room=bootstrap_room,
            prefill_kv_indices=kv_indices,
            index_slice=index_slice,
            is_last_chunk=is_last_chunk,
            prefill_aux_index=aux_index,
            state_indices=state_indices,
            num_kv_tokens=num_kv_tokens,
            wait_event=wait_event,
            indices_event=indices_event,
        )
        self.side.add(chunk)

    def check_status(self, bootstrap_room: int) -> int:
        """Return a room's status; one that is cleared waits for input, as with SGLang's NIXL backend."""
        status: int = self.request_status.get(bootstrap_room, KVPoll.WaitingForInput)
        return status

    def send_kv_status_message(
        self, *, targets: list[tuple[str, int]], bootstrap_room: int, status: int, failure_reason: str | None = None
    ) -> None:
        """Tell decode ranks a room's status: by notification, which never blocks, where they are connected."""
        said = note(
            "status", room=bootstrap_room, status=int(status), rank=self._prefill_unique_rank(), reason=failure_reason or ""
        )
        for target in targets:
            otherwise = super().send_kv_status_message
            self._say(
                target,
                said,
                lambda target=target, send=otherwise: send(
                    targets=[target], bootstrap_room=bootstrap_room, status=status, failure_reason=failure_reason
                ),
            )

    def _send_abort_ack(self, room: int, target: AckTarget) -> None:
        said = note("ack", room=room, rank=self._prefill_unique_rank(), generation=target.generation)
        otherwise = super()._send_abort_ack
        self._say((target.ip, target.port), said, lambda: otherwise(room, target))

    def _say(self, target: tuple[str, int], said: bytes, otherwise: Any) -> None:
        self.loop.call(lambda: self.loop.spawn(self._notify(agent_name("decode", *target), said, otherwise)))

    async def _notify(self, name: str, said: bytes, otherwise: Any) -> None:
        if name in self.agent.peers:
            try:
                await self.agent.notify(name, said)
                return
            except NixlError as error:
                logger.info("peer %s: %s", name, error)
        # SGLang's socket to a rank that is gone blocks for as long as it may.
        await asyncio.to_thread(otherwise)


class NixlAsyncKVSender(CommonKVSender):
    """A room on the prefill side. Its failure shows once nothing of it moves."""

    def __init__(
        self,
        mgr: NixlAsyncKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        why = mgr.side.open(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        if why is not None:
            mgr.record_failure(bootstrap_room, why)
            mgr.update_status(bootstrap_room, KVPoll.Failed)

    def _poll_with_status(self, check_status: Any) -> int:
        status: int = super()._poll_with_status(check_status)
        if status == KVPoll.Failed and self.kv_mgr.side.moving(self.bootstrap_room):
            return int(KVPoll.Transferring)
        return status

    def clear(self) -> None:
        """Forget the room."""
        super().clear()
        self.kv_mgr.side.close(self.bootstrap_room)

    def abort(self) -> None:
        """Give the room up; the decode ranks hear of it when its bytes are quiet."""
        super().abort()
        self.kv_mgr.loop.call(self.kv_mgr.side.fail, self.bootstrap_room, "Aborted by AbortReq.")


class NixlAsyncKVReceiver(CommonKVReceiver):
    """A room on the decode side."""

    def _sources(self) -> dict[str, str]:
        """Return the prefill ranks that write for this room, with their server's bootstrap address."""
        infos = getattr(self, "bootstrap_infos", None) or ()
        return {agent_name("prefill", one["rank_ip"], int(one["rank_port"])): self.bootstrap_addr for one in infos}

    def send_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Tell the prefill ranks where the room's pages are."""
        if (sources := self._sources()) and self.conclude_state is None:
            self.kv_mgr.loop.call(self.kv_mgr.side.expect, self.bootstrap_room, sources)
        super().send_metadata(*args, **kwargs)

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        super()._send_abort_notification(force_arm=force_arm)
        if self._abort_generation is not None:
            self.kv_mgr.loop.call(self.kv_mgr.side.arm, self.bootstrap_room, self._abort_generation, self._sources())

    def _clear(self) -> None:
        super()._clear()
        self.kv_mgr.loop.call(self.kv_mgr.side.forget, self.bootstrap_room)


class NixlAsyncKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own registry of prefill ranks."""


def _ints(values: Any) -> list[int]:
    return [int(one) for one in values or ()]


def _int_lists(lists: Any) -> list[list[int]]:
    return [_ints(one) for one in lists or ()]
