"""`nixl._api`: NIXL's Python API, by its names, on nixl_async.

Every call goes through `nixl_agent.agent`, the low layer, which programs may replace. Where NIXL logs an error and returns None,
so does this; everything else that is wrong raises one of the exceptions in `nixlBind`, with a note that says what.
"""

from __future__ import annotations

import contextlib
import sys
from enum import Enum
from typing import Any

import numpy as np

from nixl_async.compat import bindings as nixlBind
from nixl_async.compat.lists import dump_list, load_list
from nixl_async.compat.log import get_logger

logger = get_logger(__name__)

DEFAULT_COMM_PORT = nixlBind.DEFAULT_COMM_PORT
nixl_backend_handle = int
_OWN_NAMES = frozenset({"", b"", "NIXL_INIT_AGENT", b"NIXL_INIT_AGENT"})
_THREAD_PARAMETERS = {"UCX": "num_threads", "OBJ": "num_threads", "GDS_MT": "thread_count"}


class nixl_thread_sync_t(Enum):
    """How NIXL guards an agent against threads; here any number of threads may always use one."""

    NIXL_THREAD_SYNC_NONE = nixlBind.NIXL_THREAD_SYNC_NONE
    NIXL_THREAD_SYNC_STRICT = nixlBind.NIXL_THREAD_SYNC_STRICT
    NIXL_THREAD_SYNC_RW = nixlBind.NIXL_THREAD_SYNC_RW
    NIXL_THREAD_SYNC_DEFAULT = nixlBind.NIXL_THREAD_SYNC_DEFAULT


class _Handle:
    __slots__ = ("_agent", "_handle", "_released")

    def __init__(self, agent: Any, value: int) -> None:
        self._handle = value
        self._agent = agent
        self._released = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._handle:#x}, released={self._released})"

    def _free(self) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Give it up; a second time does nothing."""
        if not self._released:
            self._free()
            self._released = True

    def __del__(self) -> None:
        # At the interpreter's end names may be gone already; a transfer that is not quiet in time stays with its agent.
        with contextlib.suppress(Exception):
            self.release()


class nixl_prepped_dlist_handle(_Handle):
    """Prepared places to choose from; released by `release`, or when nobody holds it."""

    __slots__ = ()

    def _free(self) -> None:
        self._agent.releasedDlistH(self._handle)


class nixl_xfer_handle(_Handle):
    """A transfer; released by `release`, which cancels it if it is under way, or when nobody holds it."""

    __slots__ = ()

    def _free(self) -> None:
        self._agent.releaseXferReq(self._handle)


class nixl_agent_config:
    """How an agent is set up. `backends` are made with the agent; `num_threads` is theirs where they have such a parameter."""

    def __init__(
        self,
        enable_prog_thread: bool = True,
        enable_listen_thread: bool = False,
        listen_port: int = DEFAULT_COMM_PORT,
        capture_telemetry: bool = False,
        num_threads: int = 0,
        backends: list[str] | None = None,
        sync_mode: nixl_thread_sync_t | None = None,
    ) -> None:
        if sync_mode is not None and not isinstance(sync_mode, nixl_thread_sync_t):
            raise TypeError(f"sync_mode must be a nixl_thread_sync_t (got {type(sync_mode).__name__!r})")
        self.backends = ["UCX"] if backends is None else backends
        self.enable_pthread = enable_prog_thread
        self.enable_listen = enable_listen_thread
        self.port = listen_port
        self.capture_telemetry = capture_telemetry
        self.num_threads = num_threads
        self.sync_mode = sync_mode


class nixl_agent:
    """An agent: its backends, its registered memory, its transfers and notifications."""

    def __init__(self, agent_name: str, nixl_conf: nixl_agent_config | None = None, instantiate_all: bool = False) -> None:
        if nixl_conf and instantiate_all:
            instantiate_all = False
            logger.warning("instantiate_all is ignored: the configuration says which backends there are")
        conf = nixl_conf or nixl_agent_config()
        sync = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT if conf.enable_listen else nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
        low = nixlBind.nixlAgentConfig()
        low.useProgThread = conf.enable_pthread
        low.useListenThread = conf.enable_listen
        low.listenPort = conf.port
        low.syncMode = (conf.sync_mode or sync).value
        low.captureTelemetry = conf.capture_telemetry
        self.agent: Any = nixlBind.nixlAgent(agent_name, low)
        self.name = agent_name
        self._leaked_xfer_handles: list[int] = []
        self.notifs: dict[str, list[bytes]] = {}
        self.backends: dict[str, int] = {}
        self.backend_mems: dict[str, list[str]] = {}
        self.backend_options: dict[str, dict[str, str]] = {}
        self.plugin_list: list[str] = self.agent.getAvailPlugins()
        if not self.plugin_list:
            raise RuntimeError("No plugins available for NIXL, cannot start transfers!")
        self.plugin_b_options: dict[str, dict[str, str]] = {}
        self.plugin_mem_types: dict[str, list[str]] = {}
        self.nixl_mems = {
            "DRAM": nixlBind.DRAM_SEG,
            "VRAM": nixlBind.VRAM_SEG,
            "FILE": nixlBind.FILE_SEG,
            "BLOCK": nixlBind.BLK_SEG,
            "OBJ": nixlBind.OBJ_SEG,
            "cpu": nixlBind.DRAM_SEG,
            "cuda": nixlBind.VRAM_SEG,
        }
        self.nixl_ops = {"WRITE": nixlBind.NIXL_WRITE, "READ": nixlBind.NIXL_READ}
        if instantiate_all:
            conf.backends = [name for name in self.plugin_list if self.get_plugin_mem_types(name)]
        for name in conf.backends:
            if name not in self.plugin_list:
                logger.warning("backend %s is left out: there is no such plugin", name)
                continue
            threads = name in _THREAD_PARAMETERS and conf.num_threads > 0
            self.create_backend(name, {_THREAD_PARAMETERS[name]: str(conf.num_threads)} if threads else {})

    # Plugins and backends.

    def get_plugin_list(self) -> list[str]:
        """Return the names of all plugins."""
        return self.plugin_list

    def _load_plugin_params(self, plugin: str) -> None:
        if plugin in self.plugin_list and plugin not in self.plugin_b_options:
            try:
                self.plugin_b_options[plugin], self.plugin_mem_types[plugin] = self.agent.getPluginParams(plugin)
            except nixlBind.nixlNotFoundError as error:
                logger.warning("plugin %s cannot be used here: %s", plugin, error)

    def get_plugin_mem_types(self, backend: str) -> list[str]:
        """Return which memory a plugin takes; nothing for one that is not there."""
        self._load_plugin_params(backend)
        if backend not in self.plugin_mem_types:
            logger.warning("there is no plugin %s to ask for its memory types", backend)
        return self.plugin_mem_types.get(backend, [])

    def get_plugin_params(self, backend: str) -> dict[str, str]:
        """Return a plugin's parameters with their defaults; nothing for one that is not there."""
        self._load_plugin_params(backend)
        if backend not in self.plugin_b_options:
            logger.warning("there is no plugin %s to ask for its parameters", backend)
        return self.plugin_b_options.get(backend, {})

    def get_backend_mem_types(self, backend: str) -> list[str]:
        """Return which memory a backend of this agent takes."""
        if backend not in self.backend_mems:
            logger.warning("there is no backend %s to ask for its memory types", backend)
        return self.backend_mems.get(backend, [])

    def get_backend_params(self, backend: str) -> dict[str, str]:
        """Return the parameters of a backend of this agent."""
        if backend not in self.backend_options:
            logger.warning("there is no backend %s to ask for its parameters", backend)
        return self.backend_options.get(backend, {})

    def create_backend(self, backend: str, initParams: dict[str, str] | None = None) -> None:
        """Make a backend."""
        handle = self.agent.createBackend(backend, initParams or {})
        self.backends[backend] = handle
        self.backend_options[backend], self.backend_mems[backend] = self.agent.getBackendParams(handle)

    def make_connection(self, remote_agent: str, backends: list[str] | None = None) -> None:
        """Connect to a loaded agent before the first transfer."""
        self.agent.makeConnection(remote_agent, self._handles(backends))

    def _handles(self, backends: list[str] | None) -> list[int]:
        return [self.backends[name] for name in backends] if backends else []

    # Memory.

    def register_memory(self, reg_list: Any, mem_type: str | None = None, backends: list[str] | None = None) -> Any:
        """Register memory with all backends that take it, or with some; return what `deregister_memory` takes."""
        descs = self.get_reg_descs(reg_list, mem_type)
        self.agent.registerMem(descs, self._handles(backends))
        return descs

    def deregister_memory(self, dereg_list: Any, backends: list[str] | None = None) -> None:
        """Take registrations back."""
        self.agent.deregisterMem(dereg_list, self._handles(backends))

    def query_memory(self, reg_list: Any, backend: str, mem_type: str | None = None) -> list[dict[str, str] | None]:
        """Tell of each file or object whether there is one."""
        descs = self.get_reg_descs(reg_list, mem_type)
        if backend not in self.backends:
            raise ValueError(f"Backend {backend!r} not found. Available backends: {list(self.backends)}")
        found: list[dict[str, str] | None] = self.agent.queryMem(descs, self.backends[backend])
        return found

    # Transfers.

    def prep_xfer_dlist(
        self, agent_name: str, xfer_list: Any, mem_type: str | None = None, backends: list[str] | None = None
    ) -> nixl_prepped_dlist_handle:
        """Prepare places to choose from: of this agent ("" or "NIXL_INIT_AGENT"), of another, or of this one as the remote side.

        An Nx5 array of (address, length, device, stride, count) is taken as runs, and never expanded.
        """
        if agent_name in _OWN_NAMES:
            agent_name = nixlBind.NIXL_INIT_AGENT
        handles = self._handles(backends) if backends else []
        if type(xfer_list) is nixlBind.nixlXferDList:
            handle = self.agent.prepXferDlist(agent_name, xfer_list, handles)
        elif isinstance(xfer_list, np.ndarray) and xfer_list.ndim == 2 and xfer_list.shape[1] == 5:
            if mem_type is None:
                raise ValueError("Please specify a mem type for strided descriptors")
            handle = self.agent.prepXferDlist(agent_name, self.nixl_mems[mem_type], xfer_list, handles)
        else:
            handle = self.agent.prepXferDlist(agent_name, self.get_xfer_descs(xfer_list, mem_type), handles)
        return nixl_prepped_dlist_handle(self.agent, handle)

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: nixl_prepped_dlist_handle,
        local_indices: Any,
        remote_xfer_side: nixl_prepped_dlist_handle,
        remote_indices: Any,
        notif_msg: bytes = b"",
        backends: list[str] | None = None,
        skip_desc_merge: bool = False,
    ) -> nixl_xfer_handle:
        """Make a transfer of chosen places."""
        op = self.nixl_ops[operation]
        handle = self.agent.makeXferReq(
            op,
            local_xfer_side._handle,
            local_indices,
            remote_xfer_side._handle,
            remote_indices,
            notif_msg,
            self._handles(backends) if backends else [],
            skip_desc_merge,
        )
        return nixl_xfer_handle(self.agent, handle)

    def initialize_xfer(
        self,
        operation: str,
        local_descs: Any,
        remote_descs: Any,
        remote_agent: str,
        notif_msg: bytes = b"",
        backends: list[str] | None = None,
    ) -> nixl_xfer_handle:
        """Make a transfer of two lists."""
        op = self.nixl_ops[operation]
        handle = self.agent.createXferReq(op, local_descs, remote_descs, remote_agent, notif_msg, self._handles(backends))
        return nixl_xfer_handle(self.agent, handle)

    def transfer(self, handle: nixl_xfer_handle, notif_msg: bytes = b"") -> str:
        """Start a transfer: "DONE" or "PROC". What fails raises."""
        return "DONE" if self.agent.postXferReq(handle._handle, notif_msg) == 0 else "PROC"

    def check_xfer_state(self, handle: nixl_xfer_handle) -> str:
        """Return "DONE" or "PROC"; raise what the transfer failed with."""
        return "DONE" if self.agent.getXferStatus(handle._handle) == 0 else "PROC"

    def estimate_xfer_cost(self, req_handle: nixl_xfer_handle) -> tuple[int, int, str]:
        """Return how many microseconds a transfer should take, by how many that may be wrong, and how it was reckoned."""
        duration, margin, method = self.agent.estimateXferCost(req_handle._handle)
        return duration, margin, "ANALYTICAL_BACKEND" if method == nixlBind.NIXL_COST_ANALYTICAL_BACKEND else "UNKNOWN"

    def get_xfer_telemetry(self, handle: nixl_xfer_handle) -> Any:
        """Return what a transfer took."""
        return self.agent.getXferTelemetry(handle._handle)

    def query_xfer_backend(self, handle: nixl_xfer_handle) -> str:
        """Return the name of the backend that was chosen for a transfer."""
        found = self.agent.queryXferBackend(handle._handle)
        return next(name for name, backend in self.backends.items() if backend == found)

    def release_xfer_handle(self, handle: nixl_xfer_handle) -> None:
        """Give up a transfer; one that is under way is cancelled, and no byte of it moves afterwards."""
        handle.release()

    def release_dlist_handle(self, handle: nixl_prepped_dlist_handle) -> None:
        """Give up prepared places."""
        handle.release()

    def prep_mem_view(self, dlist: Any, *, backends: list[str] | None = None) -> int:
        """Refuse: there is no device API here."""
        view: int = self.agent.prepMemView(dlist, self._handles(backends))
        return view

    def release_mem_view(self, mvh: int) -> None:
        """Refuse: there is no device API here."""
        self.agent.releaseMemView(mvh)

    # Notifications.

    def get_new_notifs(self, backends: list[str] | None = None) -> dict[str, list[bytes]]:
        """Return what has come since the last call, by sender."""
        found: dict[str, list[bytes]] = self.agent.getNotifs({}, self._handles(backends))
        return found

    def update_notifs(self, backends: list[str] | None = None) -> dict[str, list[bytes]]:
        """Add what has come to `notifs`, and return all of it."""
        self.notifs = self.agent.getNotifs(self.notifs, self._handles(backends))
        return self.notifs

    def check_remote_xfer_done(
        self, remote_agent_name: str, lookup_tag: bytes, backends: list[str] | None = None, tag_is_prefix: bool = True
    ) -> bool:
        """Tell whether a notification that begins with (or contains) a tag has come from an agent; it is taken away."""
        kept = self.update_notifs(backends).get(
            remote_agent_name.decode() if isinstance(remote_agent_name, bytes) else remote_agent_name, []
        )
        tag = lookup_tag.encode() if isinstance(lookup_tag, str) else lookup_tag
        for at, message in enumerate(kept):
            if message.startswith(tag) if tag_is_prefix else tag in message:
                del kept[at]
                return True
        return False

    def send_notif(self, remote_agent_name: str, notif_msg: bytes, backend: str | None = None) -> None:
        """Send a notification that belongs to no transfer."""
        if backend is None:
            self.agent.genNotif(remote_agent_name, notif_msg)
        else:
            self.agent.genNotif(remote_agent_name, notif_msg, [self.backends[backend]])

    # Metadata.

    def get_agent_metadata(self) -> bytes:
        """Return what other agents load to reach this one."""
        found: bytes = self.agent.getLocalMD()
        return found

    def get_partial_agent_metadata(self, descs: Any, inc_conn_info: bool = False, backends: list[str] | None = None) -> bytes:
        """Return the metadata of some registrations; of none: what it takes to connect."""
        found: bytes = self.agent.getLocalPartialMD(descs, inc_conn_info, self._handles(backends))
        return found

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Load another agent's metadata; return its name, as bytes like NIXL does."""
        name: bytes = self.agent.loadRemoteMD(metadata)
        return name

    def remove_remote_agent(self, agent: str) -> None:
        """Forget another agent."""
        self.agent.invalidateRemoteMD(agent)

    def send_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Send this agent's metadata to another agent's listener; without `ip_addr`, write it to etcd."""
        self.agent.sendLocalMD(ip_addr, port)

    def send_partial_agent_metadata(
        self,
        descs: Any,
        inc_conn_info: bool = False,
        backends: list[str] | None = None,
        ip_addr: str = "",
        port: int = DEFAULT_COMM_PORT,
        label: str = "",
    ) -> None:
        """Send a part of this agent's metadata to another agent's listener; without `ip_addr`, write it to etcd, under `label`."""
        self.agent.sendLocalPartialMD(descs, inc_conn_info, self._handles(backends), ip_addr, port, label)

    def fetch_remote_metadata(
        self, remote_agent: str, ip_addr: str = "", port: int = DEFAULT_COMM_PORT, label: str = ""
    ) -> None:
        """Ask another agent's listener, or etcd, for its metadata; `check_remote_metadata` tells when it is there."""
        self.agent.fetchRemoteMD(remote_agent, ip_addr, port, label)

    def invalidate_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Tell another agent's listener to forget this agent; without `ip_addr`, take from etcd what it wrote."""
        self.agent.invalidateLocalMD(ip_addr, port)

    def check_remote_metadata(self, agent: str, descs: Any = None) -> bool:
        """Tell whether an agent's metadata is loaded, and has these places in it."""
        wanted = nixlBind.nixlXferDList(nixlBind.DRAM_SEG) if descs is None else descs
        return bool(self.agent.checkRemoteMD(agent, wanted) == nixlBind.NIXL_SUCCESS)

    # Descriptor lists.

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        """Make a nixlXferDList of 3-tuples, an Nx3 array, a tensor or tensors; None, and a logged error, for anything else."""
        if isinstance(descs, nixlBind.nixlXferDList):
            return descs
        if isinstance(descs, nixlBind.nixlRegDList):
            return _refuse("a registration list is given where a transfer list is needed")
        return self._descs(descs, mem_type, nixlBind.nixlXferDList, 3)

    def get_reg_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        """Make a nixlRegDList of 4-tuples, an Nx3 array, a tensor or tensors; None, and a logged error, for anything else."""
        if isinstance(descs, nixlBind.nixlRegDList):
            return descs
        if isinstance(descs, nixlBind.nixlXferDList):
            return _refuse("a transfer list is given where a registration list is needed")
        return self._descs(descs, mem_type, nixlBind.nixlRegDList, 4)

    def _descs(self, descs: Any, mem_type: str | None, kind: Any, width: int) -> Any:
        if not isinstance(descs, np.ndarray) and isinstance(descs[0], tuple):
            if mem_type is None:
                return _refuse("a memory type is needed, except with tensors")
            if len(descs[0]) != width:
                return _refuse(f"tuples of {width} are needed, not of {len(descs[0])}")
            return kind(self.nixl_mems[mem_type], descs)
        if isinstance(descs, np.ndarray):
            if mem_type is None:
                return _refuse("a memory type is needed, except with tensors")
            if descs.ndim != 2 or descs.shape[1] != 3:
                return _refuse(f"an Nx3 array is needed, not one of shape {descs.shape}")
            return kind(self.nixl_mems[mem_type], descs)
        if _is_tensor(descs):
            return self._tensors([descs], kind)
        if _is_tensor(descs[0]):
            return self._tensors(list(descs), kind)
        return None

    def _tensors(self, tensors: list[Any], kind: Any) -> Any:
        rows = np.zeros((len(tensors), 3), np.uint64)
        for at, tensor in enumerate(tensors):
            if tensor.device != tensors[0].device:
                return _refuse("all tensors of a list must be on one device")
            if not tensor.is_contiguous():
                return _refuse("a tensor is not contiguous")
            rows[at] = tensor.data_ptr(), tensor.numel() * tensor.element_size(), max(0, tensor.get_device())
        return kind(nixlBind.DRAM_SEG if tensors[0].get_device() == -1 else nixlBind.VRAM_SEG, rows)

    def get_remote_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        """Make a nixlRemoteDList of tuples (address, length, device, agent)."""
        if isinstance(descs, nixlBind.nixlRemoteDList):
            return descs
        if not isinstance(descs[0], tuple):
            return None
        if mem_type is None:
            return _refuse("a memory type is needed")
        if len(descs[0]) != 4:
            return _refuse("tuples of (address, length, device, agent) are needed")
        return nixlBind.nixlRemoteDList(self.nixl_mems[mem_type], descs)

    def get_serialized_descs(self, descs: Any) -> bytes:
        """Serialise a descriptor list; stock NIXL agents read it too."""
        return dump_list(descs)

    def deserialize_descs(self, serialized_descs: bytes) -> Any:
        """Read a serialised descriptor list, a stock NIXL agent's too; nothing in it is run."""
        return load_list(serialized_descs)


def _refuse(why: str) -> None:
    logger.error("%s", why)


def _is_tensor(obj: object) -> bool:
    # Nothing can be a tensor before torch is imported, which takes a second.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor)


__all__ = [
    "DEFAULT_COMM_PORT",
    "nixlBind",
    "nixl_agent",
    "nixl_agent_config",
    "nixl_backend_handle",
    "nixl_prepped_dlist_handle",
    "nixl_thread_sync_t",
    "nixl_xfer_handle",
]
