"""`nixl._bindings`: the low layer of NIXL's Python API, by its names and numbers, on nixl_async.

Backends and prepared things are integers here. `nixl_async.compat.api` is the layer above, whose agent holds one of these.
"""

from __future__ import annotations

import asyncio
import datetime
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from nixl_async.compat.central import Central
from nixl_async.compat.central_stores import CHOICE, central_of
from nixl_async.compat.core import Core
from nixl_async.compat.engine import ENGINE
from nixl_async.compat.enums import nixl_cost_t, nixl_mem_t, nixl_status_t, nixl_thread_sync_t, nixl_xfer_op_t
from nixl_async.compat.errors import (
    nixlBackendError,
    nixlCancelledError,
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotAllowedError,
    nixlNoTelemetryError,
    nixlNotFoundError,
    nixlNotPostedError,
    nixlNotSupportedError,
    nixlRemoteDisconnectError,
    nixlRepostActiveError,
    nixlUnknownError,
    refusal,
)
from nixl_async.compat.listener import DEFAULT_COMM_PORT, Listener
from nixl_async.compat.lists import nixlRegDList, nixlRemoteDList, nixlXferDList
from nixl_async.compat.log import get_logger
from nixl_async.compat.plugins import PLUGINS
from nixl_async.compat.polled import Calls
from nixl_async.compat.requests import Request
from nixl_async.compat.settings import switch
from nixl_async.compat.telemetry import open_telemetry
from nixl_async.errors import NixlError

logger = get_logger(__name__)

NIXL_INIT_AGENT = ""
HAVE_UCX_GPU_DEVICE_API = False
"""Kernels that start transfers by themselves are out of reach of this library."""
DRAM_SEG, VRAM_SEG, BLK_SEG, OBJ_SEG, FILE_SEG = nixl_mem_t
NIXL_READ, NIXL_WRITE = nixl_xfer_op_t
NIXL_COST_ANALYTICAL_BACKEND = nixl_cost_t.NIXL_COST_ANALYTICAL_BACKEND
NIXL_IN_PROG = nixl_status_t.NIXL_IN_PROG
NIXL_SUCCESS = nixl_status_t.NIXL_SUCCESS
NIXL_ERR_NOT_POSTED = nixl_status_t.NIXL_ERR_NOT_POSTED
NIXL_ERR_INVALID_PARAM = nixl_status_t.NIXL_ERR_INVALID_PARAM
NIXL_ERR_BACKEND = nixl_status_t.NIXL_ERR_BACKEND
NIXL_ERR_NOT_FOUND = nixl_status_t.NIXL_ERR_NOT_FOUND
NIXL_ERR_MISMATCH = nixl_status_t.NIXL_ERR_MISMATCH
NIXL_ERR_NOT_ALLOWED = nixl_status_t.NIXL_ERR_NOT_ALLOWED
NIXL_ERR_REPOST_ACTIVE = nixl_status_t.NIXL_ERR_REPOST_ACTIVE
NIXL_ERR_UNKNOWN = nixl_status_t.NIXL_ERR_UNKNOWN
NIXL_ERR_NOT_SUPPORTED = nixl_status_t.NIXL_ERR_NOT_SUPPORTED
NIXL_THREAD_SYNC_NONE = nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
NIXL_THREAD_SYNC_STRICT = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
NIXL_THREAD_SYNC_RW = nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
NIXL_THREAD_SYNC_DEFAULT = nixl_thread_sync_t.NIXL_THREAD_SYNC_DEFAULT

_ENABLE_VARIABLE = "NIXL_TELEMETRY_ENABLE"


class nixlAgentConfig:
    """How an agent is set up. Threads and delays change nothing here: one thread serves all agents, and sleeps when idle."""

    def __init__(
        self,
        useProgThread: bool = False,
        useListenThread: bool = False,
        listenPort: int = DEFAULT_COMM_PORT,
        syncMode: nixl_thread_sync_t = NIXL_THREAD_SYNC_NONE,
        numWorkers: int = 1,
        pthrDelay: int = 0,
        lthrDelay: int = 100_000,
        captureTelemetry: bool = False,
    ) -> None:
        self.useProgThread = useProgThread
        self.useListenThread = useListenThread
        self.listenPort = listenPort
        self.syncMode = syncMode
        self.pthrDelay = pthrDelay
        self.lthrDelay = lthrDelay
        self.captureTelemetry = captureTelemetry
        self.etcdWatchTimeout = datetime.timedelta(seconds=5)


class nixlXferTelemetry:
    """What a transfer took: `startTime` (since 1970), `postDuration`, `xferDuration` in microseconds, `totalBytes`, `descCount`."""

    def __init__(self) -> None:
        self.startTime = self.postDuration = self.xferDuration = self.totalBytes = self.descCount = 0


class nixlAgent(Calls):
    """An agent. It is closed when nobody holds it, or a handle made by it, any more."""

    def __init__(self, name: str, config: nixlAgentConfig) -> None:
        self._listener: Listener | None = None
        name = _text(name)
        if not name:
            raise ValueError("Agent needs a non-empty name")
        self._telemetry = _captures(config.captureTelemetry)
        self._core = core = Core(name)
        finalizer = weakref.finalize(self, ENGINE.leave, core.close)
        # The engine closes everybody at the end of the process.
        finalizer.atexit = False
        self.open_calls(
            core.requests,
            core.sides,
            core.native_ranges,
            core.gate,
            Request,
            nixlXferDList,
            DRAM_SEG,
            NIXL_SUCCESS,
            NIXL_IN_PROG,
            NIXL_WRITE,
            asyncio._get_running_loop,
            self._telemetry,
        )
        self._central: Central | None = None
        listener = Listener(core)
        try:
            if self._telemetry and (telemetry := open_telemetry(name)) is not None:
                core.export_to(telemetry)
            self._central = central_of(core, config.etcdWatchTimeout.total_seconds())
            if self._central is not None:
                core.run(self._central.open())
            core.run(listener.open(config.listenPort if config.useListenThread else None))
        except OSError as error:
            finalizer()
            raise RuntimeError(f"Failed to bind metadata listener socket: port {config.listenPort}: {error}") from error
        except NixlError:
            finalizer()
            raise
        self._listener = listener

    def __repr__(self) -> str:
        return f"<nixlAgent {self._core.name!r} of nixl_async>"

    # Plugins and backends.

    def getAvailPlugins(self) -> list[str]:
        """Return the plugins that there are."""
        return list(PLUGINS)

    def getPluginParams(self, plugin: str) -> tuple[dict[str, str], list[str]]:
        """Return a plugin's parameters with their defaults, and the memory that it takes."""
        found = PLUGINS.get(_text(plugin))
        if found is None or not found.usable():
            raise refusal(nixlNotFoundError, f"plugin {plugin!r} cannot be used here")
        return dict(found.params), [memory.name for memory in found.memory]

    def createBackend(self, plugin: str, params: Mapping[str, str]) -> int:
        """Make a backend; return its handle."""
        return self._core.create_backend(_text(plugin), {_text(key): _text(value) for key, value in params.items()})

    def getBackendParams(self, backend: int) -> tuple[dict[str, str], list[str]]:
        """Return the parameters that a backend was made with, and the memory that it takes."""
        lane = self._core.lane(backend)
        return dict(lane.params), [memory.name for memory in lane.plugin.memory]

    def makeConnection(self, agent: str, backends: Sequence[int] = ()) -> nixl_status_t:
        """Connect to a loaded agent; it was done when its metadata was loaded."""
        self._core.known(_text(agent))
        return NIXL_SUCCESS

    # Memory.

    def registerMem(self, descs: nixlRegDList, backends: Sequence[int] = ()) -> nixl_status_t:
        """Register memory, files or objects."""
        self._core.register(_expect(descs, nixlRegDList), backends)
        return NIXL_SUCCESS

    def deregisterMem(self, descs: nixlRegDList, backends: Sequence[int] = ()) -> nixl_status_t:
        """Take registrations back."""
        self._core.deregister(_expect(descs, nixlRegDList), backends)
        return NIXL_SUCCESS

    def queryMem(self, descs: nixlRegDList, backend: int) -> list[dict[str, str] | None]:
        """Tell of each file or object whether there is one: its description, or `None`."""
        return self._core.query(_expect(descs, nixlRegDList), backend)

    # Transfers.

    # What `Calls` does not do by itself: prepXferDlist, makeXferReq, createXferReq, postXferReq,
    # getXferStatus and releaseXferReq are its.

    def _prepare(self, agent_name: Any, descs: Any = (), *rest: Any, **named: Any) -> int:
        backends = named.pop("backend", None)
        if named:
            raise TypeError(f"prepXferDlist() got unexpected arguments {sorted(named)}")
        try:
            if isinstance(agent_name, nixlXferDList):
                return self._core.prepare_list(NIXL_INIT_AGENT, agent_name, backends or descs)
            if isinstance(descs, nixl_mem_t):
                runs, chosen = (*rest, (), ())[:2]
                return self._core.prepare_runs(_text(agent_name), descs, runs, backends or chosen)
            return self._core.prepare_list(
                _text(agent_name), _expect(descs, nixlXferDList), backends or (rest[0] if rest else ())
            )
        except NixlError as error:
            self._core.failed(error)
            raise

    def _make(
        self,
        operation: nixl_xfer_op_t,
        local_side: int,
        local_indices: Any,
        remote_side: int,
        remote_indices: Any,
        notif_msg: str | bytes = b"",
        backend: Sequence[int] = (),
        skip_desc_merg: bool = False,
    ) -> int:
        sides = local_side, local_indices, remote_side, remote_indices
        try:
            return self._core.make(operation, *sides, _bytes(notif_msg), backend, not skip_desc_merg)
        except NixlError as error:
            self._core.failed(error)
            raise

    def _create(
        self,
        operation: nixl_xfer_op_t,
        local_descs: nixlXferDList,
        remote_descs: nixlXferDList,
        remote_agent: str,
        notif_msg: str | bytes = b"",
        backend: Sequence[int] = (),
    ) -> int:
        lists = _expect(local_descs, nixlXferDList), _expect(remote_descs, nixlXferDList)
        try:
            return self._core.create(operation, *lists, _text(remote_agent), _bytes(notif_msg), backend)
        except NixlError as error:
            self._core.failed(error)
            raise

    def _told(self, reqh: int, notif_msg: str | bytes = b"") -> nixl_status_t:
        request = self._core.request(reqh)
        if notif_msg:
            request.notify = _bytes(notif_msg)
        return request.done_at_once()

    def _post(self, reqh: int, notif_msg: str | bytes = b"") -> nixl_status_t:
        request = self._core.request(reqh)
        try:
            return request.post(_bytes(notif_msg) if notif_msg else b"")
        except NixlError as error:
            # What a transfer fails with is counted when it does.
            if request.error is None:
                self._core.failed(error)
            raise

    def _status(self, reqh: int) -> nixl_status_t:
        return self._core.request(reqh).check()

    def getXferTelemetry(self, reqh: int) -> nixlXferTelemetry:
        """Return what a transfer took."""
        if not self._telemetry:
            raise refusal(nixlNoTelemetryError, f"set capture_telemetry, or {_ENABLE_VARIABLE}=y")
        request = self._core.request(reqh)
        found = nixlXferTelemetry()
        found.startTime, found.postDuration, found.xferDuration = request.times()
        found.totalBytes, found.descCount = request.nbytes, request.n_descs
        return found

    def estimateXferCost(self, req_handle: int) -> tuple[int, int, int]:
        """Return how many microseconds a transfer should take, by how many that may be wrong, and how it was reckoned."""
        seconds = self._core.estimate(req_handle)
        if seconds is None:
            return 0, 0, -1
        microseconds = max(1, round(seconds * 1e6))
        return microseconds, microseconds, NIXL_COST_ANALYTICAL_BACKEND

    def queryXferBackend(self, reqh: int) -> int:
        """Return the handle of the backend that was chosen for a transfer."""
        return self._core.request(reqh).lane.handle

    def _release(self, reqh: int) -> nixl_status_t:
        self._core.release_request(reqh)
        return NIXL_SUCCESS

    def releasedDlistH(self, handle: int) -> nixl_status_t:
        """Forget prepared places."""
        self._core.release_places(handle)
        return NIXL_SUCCESS

    def prepMemView(self, dlist: Any, backends: Sequence[int] = ()) -> int:
        """Refuse: the device API needs kernels that start transfers by themselves."""
        raise refusal(nixlBackendError, "there is no device API here: HAVE_UCX_GPU_DEVICE_API is False")

    def releaseMemView(self, mvh: int) -> None:
        """Refuse: there is none."""
        raise refusal(nixlBackendError, "there is no device API here: HAVE_UCX_GPU_DEVICE_API is False")

    # Notifications.

    def getNotifs(self, notif_map: dict[str, list[bytes]], backends: Sequence[int] = ()) -> dict[str, list[bytes]]:
        """Add what has come to `notif_map`, by sender, and return it."""
        for sender, payloads in self._core.take_notifications(backends).items():
            notif_map.setdefault(sender, []).extend(payloads)
        return notif_map

    def genNotif(self, remote_agent: str, msg: str | bytes, backends: int | Sequence[int] = ()) -> nixl_status_t:
        """Send a notification."""
        self._core.notify(_text(remote_agent), _bytes(msg))
        return NIXL_SUCCESS

    # Metadata.

    def getLocalMD(self) -> bytes:
        """Return this agent's metadata."""
        return self._core.metadata()

    def getLocalPartialMD(self, descs: nixlRegDList, inc_conn_info: bool = False, backends: Sequence[int] = ()) -> bytes:
        """Return the metadata of some registrations only."""
        return self._core.partial_metadata(_expect(descs, nixlRegDList), inc_conn_info, backends)

    def loadRemoteMD(self, metadata: bytes) -> bytes:
        """Load an agent's metadata and connect to it; return its name."""
        return self._core.load(_bytes(metadata)).encode()

    def invalidateRemoteMD(self, agent: str) -> nixl_status_t:
        """Forget an agent's metadata."""
        return NIXL_SUCCESS if self._core.forget(_text(agent)) else NIXL_ERR_NOT_FOUND

    def checkRemoteMD(self, agent: str, descs: nixlXferDList) -> nixl_status_t:
        """Tell whether an agent's metadata is loaded, and has these places in it."""
        known = self._core.covers(_text(agent), _expect(descs, nixlXferDList))
        return NIXL_SUCCESS if known else NIXL_ERR_NOT_FOUND

    def sendLocalMD(self, ip_addr: str = "", port: int = 0) -> None:
        """Send this agent's metadata to the listener of another; without its address, write it to the central store."""
        if ip_addr:
            self._listening().send_soon(_text(ip_addr), port, self.getLocalMD())
        else:
            self._stored().send_soon(self.getLocalMD())

    def sendLocalPartialMD(
        self,
        descs: nixlRegDList,
        inc_conn_info: bool = False,
        backends: Sequence[int] = (),
        ip_addr: str = "",
        port: int = 0,
        label: str = "",
    ) -> None:
        """Send a part of this agent's metadata to the listener of another, or write it to the central store under a label."""
        if ip_addr:
            part = self.getLocalPartialMD(descs, inc_conn_info, backends)
            self._listening().send_soon(_text(ip_addr), port, part)
            return
        store = self._stored()
        if not label:
            raise refusal(nixlInvalidParamError, "a part of the metadata goes to the central store under a label; give one")
        store.send_soon(self.getLocalPartialMD(descs, inc_conn_info, backends), _text(label))

    def fetchRemoteMD(self, remote_agent: str, ip_addr: str = "", port: int = 0, label: str = "") -> None:
        """Ask the listener of an agent, or the central store, for its metadata; `checkRemoteMD` tells when it is loaded."""
        if ip_addr:
            self._listening().fetch_soon(_text(ip_addr), port)
        else:
            self._stored().fetch_soon(_text(remote_agent), _text(label))

    def invalidateLocalMD(self, ip_addr: str = "", port: int = 0) -> None:
        """Tell the listener of another agent to forget this one; without its address, delete what is in the central store."""
        if ip_addr:
            self._listening().invalidate_soon(_text(ip_addr), port)
        else:
            self._stored().invalidate_soon()

    def _listening(self) -> Listener:
        assert self._listener is not None
        return self._listener

    def _stored(self) -> Central:
        if self._central is None:
            raise refusal(
                nixlInvalidParamError, f"give the ip_addr of the agent: {CHOICE} was not set when this agent was made"
            )
        return self._central


def _captures(asked: bool) -> bool:
    given = switch(_ENABLE_VARIABLE)
    if given is False and asked:
        logger.warning("%s goes before capture_telemetry: it is off", _ENABLE_VARIABLE)
    return asked if given is None else given


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode()
    raise TypeError(f"{value!r} must be str or bytes, not {type(value).__name__}")


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"{value!r} must be bytes or str, not {type(value).__name__}")


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is needed, not {value!r}")
    return value


__all__ = [
    "BLK_SEG",
    "DEFAULT_COMM_PORT",
    "DRAM_SEG",
    "FILE_SEG",
    "HAVE_UCX_GPU_DEVICE_API",
    "NIXL_COST_ANALYTICAL_BACKEND",
    "NIXL_ERR_BACKEND",
    "NIXL_ERR_INVALID_PARAM",
    "NIXL_ERR_MISMATCH",
    "NIXL_ERR_NOT_ALLOWED",
    "NIXL_ERR_NOT_FOUND",
    "NIXL_ERR_NOT_POSTED",
    "NIXL_ERR_NOT_SUPPORTED",
    "NIXL_ERR_REPOST_ACTIVE",
    "NIXL_ERR_UNKNOWN",
    "NIXL_INIT_AGENT",
    "NIXL_IN_PROG",
    "NIXL_READ",
    "NIXL_SUCCESS",
    "NIXL_THREAD_SYNC_DEFAULT",
    "NIXL_THREAD_SYNC_NONE",
    "NIXL_THREAD_SYNC_RW",
    "NIXL_THREAD_SYNC_STRICT",
    "NIXL_WRITE",
    "OBJ_SEG",
    "VRAM_SEG",
    "nixlAgent",
    "nixlAgentConfig",
    "nixlBackendError",
    "nixlCancelledError",
    "nixlInvalidParamError",
    "nixlMismatchError",
    "nixlNoTelemetryError",
    "nixlNotAllowedError",
    "nixlNotFoundError",
    "nixlNotPostedError",
    "nixlNotSupportedError",
    "nixlRegDList",
    "nixlRemoteDList",
    "nixlRemoteDisconnectError",
    "nixlRepostActiveError",
    "nixlUnknownError",
    "nixlXferDList",
    "nixlXferTelemetry",
    "nixl_cost_t",
    "nixl_mem_t",
    "nixl_status_t",
    "nixl_thread_sync_t",
    "nixl_xfer_op_t",
]
