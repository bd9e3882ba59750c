"""A drop-in agent: its lanes, the remote agents that it loaded, its transfers and notifications. Any thread may call it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nixl_async.agent import TOKEN_VARIABLE
from nixl_async.compat.engine import ENGINE, Bell
from nixl_async.compat.errors import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlNotSupportedError,
    nixlRemoteDisconnectError,
    refusal,
    translate,
)
from nixl_async.compat.exchange import Exchange, Remote, read_rows
from nixl_async.compat.lane import Lane, make_lane
from nixl_async.compat.lists import nixlRegDList
from nixl_async.compat.log import get_logger
from nixl_async.compat.making import Making
from nixl_async.compat.places import Places
from nixl_async.compat.plugins import EXCLUSIVE, PLUGINS
from nixl_async.compat.polled import Gate, Side
from nixl_async.compat.polled import Ranges as NativeRanges
from nixl_async.compat.requests import Request
from nixl_async.compat.telemetry import DEREGISTERED, REGISTERED, Telemetry
from nixl_async.errors import NixlError
from nixl_async.memory import RemoteRegion

T = TypeVar("T")
logger = get_logger(__name__)

MAX_UNREAD = 1_000_000
"""How many notifications of one sender are kept for a program that does not ask; then the oldest go."""
NAP_SECONDS = 100e-6
ASK_NS = 50_000
YIELD_NS = 500_000


class Core(Making, Exchange):
    """What stands behind `nixlAgent`; it never refers to that object, which is closed when nobody holds it any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        given = os.environ.get(TOKEN_VARIABLE)
        self._given_token = bool(given)
        self._token = given.encode() if given else secrets.token_bytes(16)
        self.lanes: dict[int, Lane] = {}
        self.remotes: dict[str, Remote] = {}
        self.requests: dict[int, Request] = {}
        self.places: dict[int, Places] = {}
        self._handles = itertools.count(0x1000_0000, 0x10)
        self._tasks: list[asyncio.Task[None]] = []
        self.on_close: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.sides: dict[int, Side] = {}
        self.native_ranges: dict[str, NativeRanges] = {}
        self._held: dict[str, set[RemoteRegion]] = {}
        # One who changes registrations keeps out those who copy on their own thread.
        self.gate = Gate()
        self._telemetry: Telemetry | None = None
        self._change = threading.RLock()
        self._notifications: dict[str, list[bytes]] = {}
        self._inbox = threading.Lock()
        self._arrived = Bell()
        self._asked_ns = self._polled_ns = self._slept_ns = 0
        self._reachable = asyncio.Event()
        self.close: Callable[[], Coroutine[Any, Any, None]] = self._aclose
        ENGINE.enter(self.close)

    async def _aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        for ending in self.on_close:
            await ending()
        self.gate.close()
        for request in list(self.requests.values()):
            request.cancel()
        for lane in list(self.lanes.values()):
            try:
                await lane.aclose()
            except Exception:
                logger.exception("agent %s: backend %s does not close", self.name, lane.plugin.name)
        self.lanes.clear()
        if self._telemetry is not None:
            await self._telemetry.aclose()
        # What is native in them hides the circle that they are part of from the garbage collector.
        self.requests.clear()
        self.sides.clear()
        self.native_ranges.clear()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait; our exceptions become NIXL's."""
        try:
            return ENGINE.run(work)
        except NixlError as error:
            raise translate(error) from error

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with self._change:
            self.gate.close()
            try:
                yield
            finally:
                self.gate.open()

    # Backends.

    def create_backend(self, name: str, params: Mapping[str, str]) -> int:
        """Make a backend; return its handle."""
        plugin = PLUGINS.get(name)
        if plugin is None:
            raise refusal(nixlNotFoundError, f"no plugin is called {name!r}; there are {', '.join(PLUGINS)}")
        with self._change:
            there = {lane.plugin.name for lane in self.lanes.values()}
            if name in there:
                raise refusal(nixlInvalidParamError, f"this agent has a backend {name} already")
            if name in EXCLUSIVE and there & EXCLUSIVE:
                raise refusal(nixlNotAllowedError, f"an agent has one of {', '.join(sorted(EXCLUSIVE))}, not both")
            if ignored := sorted(
                key for key, value in params.items() if key not in plugin.used and value != plugin.params.get(key)
            ):
                logger.info("agent %s: backend %s takes no notice of %s", self.name, name, ", ".join(ignored))
            lane = make_lane(plugin, next(self._handles), params, self.name, self._token, self.gate)
            try:
                self.run(self._open(lane))
            except NixlError as error:
                made = refusal(nixlBackendError, f"backend {name} cannot be made: {error} {getattr(error, '__notes__', '')}")
                raise made from error
            return lane.handle

    async def _open(self, lane: Lane) -> None:
        await lane.open()
        self.lanes[lane.handle] = lane
        if lane.plugin.remote:
            self._reachable.set()
            loop = asyncio.get_running_loop()
            self._tasks += [loop.create_task(self._listen(lane)), loop.create_task(self.follow(lane))]

    async def reachable(self, seconds: float) -> None:
        """Wait, on the loop, for a backend that reaches other agents; return when there is one, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._reachable.wait()

    async def _listen(self, lane: Lane) -> None:
        async with lane.agent.notifications() as arriving:
            async for notification in arriving:
                self.deliver(notification.peer, notification.payload)

    def lane(self, handle: int) -> Lane:
        """Return a backend by its handle."""
        lane = self.lanes.get(handle)
        if lane is None:
            raise refusal(nixlNotFoundError, f"{handle:#x} is no backend of agent {self.name!r}")
        return lane

    def chosen(self, handles: Sequence[int]) -> list[Lane]:
        """Return the backends with these handles, or all."""
        return [self.lane(handle) for handle in handles] if handles else list(self.lanes.values())

    def remote_lane(self) -> Lane:
        """Return the backend that reaches other agents."""
        for lane in self.lanes.values():
            if lane.plugin.remote:
                return lane
        raise refusal(nixlBackendError, f"agent {self.name!r} has no backend that reaches other agents, such as UCX")

    # Memory.

    def register(self, descs: nixlRegDList, handles: Sequence[int]) -> None:
        """Register with each of these backends, or with all that take such memory, of which one must succeed."""
        memory, rows = read_rows(descs)
        lanes = [lane for lane in self.chosen(handles) if lane.takes(memory)]
        if not lanes:
            raise refusal(nixlNotFoundError, f"agent {self.name!r} has no backend for {memory.name}")
        failures: list[NixlError] = []
        with self._undisturbed():
            for lane in lanes:
                try:
                    self.run(lane.register(memory, rows, descs.metas))
                except NixlError as error:
                    failures.append(error)
        if failures and (len(failures) == len(lanes) or handles):
            made = refusal(nixlBackendError, f"{memory.name} cannot be registered")
            for note in getattr(failures[0], "__notes__", ()):
                made.add_note(note)
            raise made from failures[0]
        if self._telemetry is not None:
            self._telemetry.add((REGISTERED, sum(nbytes for _, nbytes, _ in rows)))

    def deregister(self, descs: nixlRegDList, handles: Sequence[int]) -> None:
        """Take registrations back from each backend that has them."""
        memory, rows = read_rows(descs)
        keys = [(memory, device, address, nbytes) for address, nbytes, device in rows]
        with self._undisturbed():
            lanes = [lane for lane in self.chosen(handles) if lane.takes(memory)]
            if not handles:
                lanes = [lane for lane in lanes if any(key in lane.entries for key in keys)]
            if not lanes:
                raise refusal(nixlNotFoundError, f"{rows[:1]} of {memory.name} is not registered")
            failed: NixlError | None = None
            for lane in lanes:
                try:
                    self.run(lane.deregister(keys))
                except NixlError as error:
                    failed = failed or error
        if failed is not None:
            raise failed
        if self._telemetry is not None:
            self._telemetry.add((DEREGISTERED, sum(nbytes for _, nbytes, _ in rows)))

    def query(self, descs: nixlRegDList, handle: int) -> list[dict[str, str] | None]:
        """Tell of each object or file whether there is one."""
        lane = self.lane(handle)
        if lane.plugin.remote:
            raise refusal(nixlNotSupportedError, f"{lane.plugin.name} has no objects to ask for")
        memory, rows = read_rows(descs)
        return self.run(lane.exists(memory, rows, descs.metas)) if rows else []

    def spins(self, now: int) -> bool:
        """Tell whether somebody asks for many transfers without a pause, who is to let the loop run now and then."""
        gap, self._polled_ns = now - self._polled_ns, now
        if gap < ASK_NS and now - self._slept_ns > YIELD_NS:
            self._slept_ns = now
            return True
        return False

    # Telemetry.

    def export_to(self, telemetry: Telemetry) -> None:
        """Tell from now on what happens; to be called before anything does."""
        self.run(telemetry.open())
        self._telemetry = telemetry

    @property
    def exports(self) -> bool:
        """Whether each transfer is told of to others, who must be told by `completed`."""
        return self._telemetry is not None

    def completed(self, request: Request) -> None:
        """Take note of a transfer that is done."""
        if self._telemetry is not None:
            _, post_us, took_us = request.times()
            self._telemetry.transferred(bool(request.put), request.nbytes, post_us, took_us)

    def failed(self, error: NixlError) -> None:
        """Count an error."""
        if self._telemetry is not None:
            self._telemetry.failed(error)

    # Notifications.

    def deliver(self, sender: str, payload: bytes) -> None:
        """Take a notification."""
        with self._inbox:
            kept = self._notifications.setdefault(sender, [])
            kept.append(payload)
            if len(kept) > MAX_UNREAD:
                del kept[: MAX_UNREAD // 10]
                logger.error(
                    "agent %s: more than %d notifications of %s are unread; the oldest are dropped",
                    self.name,
                    MAX_UNREAD,
                    sender,
                )
        self._arrived.ring()

    def notify_soon(self, lane: Lane, remote: Remote | None, payload: bytes) -> None:
        """Send a notification; what becomes of it shows at the receiver."""
        if remote is None:
            self.deliver(self.name, payload)
        else:
            ENGINE.call(self._notify, lane, remote.name, payload)

    def _notify(self, lane: Lane, name: str, payload: bytes) -> None:
        task = asyncio.get_running_loop().create_task(lane.agent.notify(name, payload))
        task.add_done_callback(self._notified)

    def _notified(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("agent %s: a notification is lost: %s", self.name, error)

    def notify(self, agent: str, payload: bytes) -> None:
        """Send a notification to a loaded agent, or to this one."""
        lane = self.remote_lane()
        if agent == self.name:
            self.deliver(agent, payload)
            return
        remote = self.known(agent)
        if remote.peer.gone:
            raise refusal(nixlRemoteDisconnectError, remote.peer.gone)
        self.notify_soon(lane, remote, payload)

    def take_notifications(self, handles: Sequence[int]) -> dict[str, list[bytes]]:
        """Return what has come since the last time. Who asks without a pause waits a moment for more."""
        if not any(lane.plugin.remote for lane in self.chosen(handles)):
            raise refusal(nixlBackendError, f"agent {self.name!r} has no backend that carries notifications")
        if not self._notifications:
            now = time.perf_counter_ns()
            if now - self._asked_ns < ASK_NS:
                self._arrived.wait(NAP_SECONDS)
                now = time.perf_counter_ns()
            self._asked_ns = now
        with self._inbox:
            taken, self._notifications = self._notifications, {}
        return taken
