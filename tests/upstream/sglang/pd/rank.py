"""One rank of a prefill or decode server without the server: SGLang's KV manager, sender or receiver, in a process of its own.

The process does what it is told through a pipe, a call at a time, as SGLang's scheduler would do it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

POLL_SECONDS = 0.001
"""SGLang's scheduler polls its senders and receivers once for each step of the model."""


def main(pipe: Connection) -> None:
    """Serve calls until the pipe ends."""
    import stubs

    stubs.install()
    if os.environ["RANK_BACKEND"] == "nixl_async":
        from sglang.srt.plugins import load_plugins

        load_plugins()
    rank: Any = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            if name == "open":
                rank = Rank(**arguments)
                result = None
            else:
                result = getattr(rank, name)(**arguments)
            pipe.send((True, result))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    os._exit(0)


class Rank:
    """A rank of a role with its pools and its KV manager."""

    def __init__(
        self,
        role: str,
        backend: str,
        tp: int,
        rank: int,
        mla: bool,
        states: tuple[str, ...],
        memory: str,
        port: int,
        slots: int,
        route: str,
        token: str,
    ) -> None:
        from model import Pools, Side
        from sglang.srt.disaggregation import utils

        self.role, self.memory = role, memory
        os.environ["NIXL_ASYNC_VRAM_ON_HOST"] = "1" if memory == "VRAM" else "0"
        os.environ["NIXL_ASYNC_SGLANG_BACKENDS"] = route
        os.environ.pop("NIXL_ASYNC_TOKEN", None)
        if token:
            os.environ["NIXL_ASYNC_TOKEN"] = token
        self.address = f"127.0.0.1:{port}"
        self.pools = Pools(Side(tp, rank, mla, states, slots), memory)
        self.rooms: dict[int, Any] = {}
        self.pages: dict[int, int] = {}
        chosen = utils.TransferBackend(backend)
        kinds = utils.KVClassType
        self.kinds = {kind.value: utils.get_kv_class(chosen, kind) for kind in kinds}
        server_args = publish(role, tp, rank, port, backend)
        self.server = None
        if role == "prefill" and rank == 0:
            self.server = self.kinds["bootstrap_server"]("127.0.0.1", port)
            serving("127.0.0.1", port)
        self.manager = self.kinds["manager"](
            self.pools.kv_args(self.kinds["kvargs"]), utils.DisaggregationMode(role), server_args, mla
        )

    def close(self) -> None:
        """End the manager, as far as its backend can."""
        if self.manager.supports_role_switch:
            self.manager.teardown()
            deadline = time.monotonic() + 2
            while left := [thread.name for thread in threading.enumerate() if "nixl" in thread.name]:
                assert time.monotonic() < deadline, left
                time.sleep(POLL_SECONDS)
        if self.server is not None:
            self.server.close()

    # A room.

    def begin(self, room: int, pages: int) -> None:
        """Make a sender or a receiver, as for a request that has come."""
        self.pages[room] = pages
        if self.role == "prefill":
            self.pools.fill(room, pages)
            self.rooms[room] = self.kinds["sender"](self.manager, self.address, room)
        else:
            deadline = time.monotonic() + 10
            while not self.manager.try_ensure_parallel_info(self.address):
                if time.monotonic() > deadline:
                    raise TimeoutError("the prefill server's ranks have not registered")
                time.sleep(POLL_SECONDS)
            self.rooms[room] = self.kinds["receiver"](self.manager, self.address, room)
            self.rooms[room].init(0)

    def ask(self, room: int) -> None:
        """Tell the prefill ranks where a room's bytes belong."""
        where = self.pools.where(room, self.pages[room])
        states = [where[kind] for kind in self.pools.states] or None
        self.rooms[room].send_metadata(where["kv"], int(where["aux"][0]), states, decode_prefix_len=0)

    def ready(self, room: int, seconds: float) -> None:
        """Wait until the decode ranks have asked for a room, and prepare its sender."""
        self.until(room, ["WaitingForInput"], seconds)
        where = self.pools.where(room, self.pages[room])
        self.rooms[room].init(self.pages[room], int(where["aux"][0]))

    def send(self, room: int, first: int, last: int, after: str = "") -> None:
        """Send pages `first` to `last` - 1 of a room; after the `event`, or each of the `layers`, that `let_go` lets happen."""
        where = self.pools.where(room, self.pages[room])
        if after == "event":
            from nixl_async import CPUEvent

            self.event = CPUEvent()
            self.rooms[room]._early_send_wait_event = self.event
        elif after == "layers":
            from model import LAYERS

            from nixl_async.integrations.sglang.layers import LayerEvents

            self.event = LayerEvents(LAYERS)
            self.rooms[room]._early_send_wait_event = self.event
        final = last == self.pages[room]
        states = [where[kind] for kind in self.pools.states] if final and self.pools.states else None
        self.rooms[room].send(where["kv"][first:last], states, num_kv_tokens=None)

    def let_go(self, layer: int | None = None) -> None:
        """Let the event of the last `send` happen."""
        if layer is None:
            self.event.set()
        else:
            self.event.announce(layer)

    def landed(self, room: int, seconds: float) -> None:
        """Wait until what was sent of a room is in place."""
        self.until(room, ["Transferring"], seconds)
        deadline = time.monotonic() + seconds
        while self.manager._staging_outstanding.get(room, 0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"chunks of room {room} are under way after {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def until(self, room: int, names: list[str], seconds: float) -> tuple[str, float]:
        """Poll a room until its status is one of `names`; return it and the seconds that took."""
        from sglang.srt.disaggregation.base.conn import KVPoll

        of = {value: name for name, value in vars(KVPoll).items() if not name.startswith("_")}
        began = time.monotonic()
        while (name := of[int(self.rooms[room].poll())]) not in names:
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"room {room} is {name} after {seconds:g} s, not {' or '.join(names)}")
            if name in ("Failed", "Success"):
                raise AssertionError(f"room {room} is {name}, not {' or '.join(names)}: {self.why(room)}")
            time.sleep(POLL_SECONDS)
        return name, time.monotonic() - began

    def why(self, room: int) -> str:
        """Return why a room failed, as SGLang's scheduler asks."""
        try:
            self.rooms[room].failure_exception()
        except Exception as error:
            return str(error)
        raise AssertionError("failure_exception raised nothing")

    def abort(self, room: int) -> None:
        self.rooms[room].abort()

    def hold_pages(self, room: int) -> None:
        """Hold a failed room's pages, as SGLang does until every prefill rank says that it is quiet."""
        self.rooms[room].ensure_abort_notified(force_arm=True)

    def quiet(self, room: int, seconds: float) -> float:
        """Wait until a failed room's pages may be used again; return the seconds that took."""
        began = time.monotonic()
        needed = len(self.rooms[room].bootstrap_infos)
        while not self.manager.is_abort_release_safe(room, needed):
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"the pages of room {room} are not known to be quiet after {seconds:g} s")
            time.sleep(POLL_SECONDS)
        self.manager.clear_deferred_abort_state(room)
        return time.monotonic() - began

    def end(self, room: int) -> None:
        """Forget a room that is over."""
        self.rooms.pop(room).clear()
        self.pools.release(room)

    def wrong(self, rooms: list[int]) -> list[str]:
        """Return what is not as it must be if exactly these rooms have arrived."""
        return self.pools.wrong({room: self.pages[room] for room in rooms})

    def missing(self, room: int) -> list[str]:
        """Return what is not as it must be of a room's own items."""
        return self.pools.missing(room, self.pages[room])

    def layers_there(self, room: int, count: int, seconds: float) -> list[int]:
        """Wait until so many layers of a room are in place, and return those that are."""
        deadline = time.monotonic() + seconds
        while len(found := self.pools.layers_there(room, self.pages[room])) < count and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return found

    def pool_memory(self, there: bool) -> None:
        """Take the pools' registrations back and zero them, as when their memory is given away; or register them again."""
        if there:
            self.manager.register_buffer_to_engine()
            return
        self.manager.deregister_buffer_to_engine()
        self.pools.wipe()

    def digest(self) -> int:
        return self.pools.digest()

    def disturb(self) -> None:
        """Send to the rank's control socket what no peer would."""
        import zmq

        for frames in (
            [b"x"],
            [b""],
            [b"ABORT"],
            [b"ABORT", b"x"],
            [b"nixl_async.request.1", b"[]"],
            [b"KV_STATUS", b"x", b"y", b"z"],
        ):
            with self.manager._zmq_ctx.socket(zmq.PUSH) as sock:
                sock.linger = 1000
                sock.connect(f"tcp://{self.manager.local_ip}:{self.manager.rank_port}")
                sock.send_multipart(frames)

    def idle(self, seconds: float) -> float:
        """Return the share of a core that the process takes while nothing happens."""
        before = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - before) / seconds

    def left(self, seconds: float) -> dict[str, int]:
        """Return how much of the rooms is still known after so long: all of it must be 0 when they are over."""
        deadline = time.monotonic() + seconds
        while any((found := self._left()).values()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return found

    def _left(self) -> dict[str, int]:
        manager = self.manager
        names = ["request_status", "transfer_infos", "_staging_outstanding", "prefill_response_tracker", "failure_records"]
        found = {name: len(getattr(manager, name)) for name in names if hasattr(manager, name)}
        # SGLang's NIXL backend leaves zeros there.
        found["_staging_outstanding"] = sum(manager._staging_outstanding.values())
        side = getattr(manager, "side", None)
        return found | ({"rooms": len(side.rooms)} if side is not None else {})


def serving(host: str, port: int) -> None:
    """Wait until SGLang's bootstrap server, which starts on a thread, is there."""
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as sock:
            if sock.connect_ex((host, port)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody serves {host}:{port}")
        time.sleep(POLL_SECONDS)


def publish(role: str, tp: int, rank: int, port: int, backend: str) -> Any:
    """Publish the configuration of a rank to SGLang's own context; return the server's arguments."""
    from sglang.srt import runtime_context

    runtime_context.reset_context()
    context = runtime_context.get_context()
    server_args = context.override_server_args(
        host="127.0.0.1",
        port=port + 1,
        device="cpu",
        tp_size=tp,
        disaggregation_mode=role,
        disaggregation_transfer_backend=backend,
        disaggregation_bootstrap_port=port,
    ).install()
    runtime_context.get_parallel().override_permanently(
        tp_rank=rank,
        attn_tp_size=tp,
        attn_tp_rank=rank,
        attn_dp_size=1,
        attn_dp_rank=0,
        attn_cp_size=1,
        attn_cp_rank=0,
        attn_dcp_rank=0,
        pp_rank=0,
        dp_rank=None,
        pp_group=None,
        world_group=None,
    )
    return server_args
