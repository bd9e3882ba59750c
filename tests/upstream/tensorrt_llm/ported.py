"""TensorRT-LLM's Python transfer agent in the calls that it makes to NIXL, for where its own file is not at hand.

The calls, their arguments and their order are those of `tensorrt_llm/_torch/disaggregation/nixl/_agent_py.py` and `base/agent.py`
(NVIDIA/TensorRT-LLM); the code is ours.
"""

import importlib
import time
from dataclasses import dataclass


def nixl():
    """The module that it takes NIXL's names from: the one for a CUDA version goes first."""
    for name in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SystemExit("there is no NIXL")


@dataclass
class Descs:
    """`MemoryDescs` and `RegMemoryDescs`: tuples of (address, bytes, device), the latter with a name."""

    type: str
    descs: list


MemoryDescs = RegMemoryDescs = Descs


@dataclass
class TransferRequest:
    op: str
    src_descs: Descs
    dst_descs: Descs
    remote_name: str
    sync_message: str | None


class Status:
    def __init__(self, agent, handle):
        self._agent, self._handle = agent, handle

    def is_completed(self):
        return self._agent.check_xfer_state(self._handle) == "DONE"

    def wait(self, timeout_ms=None):
        began, pause = time.time(), 0.0001
        while True:
            state = self._agent.check_xfer_state(self._handle)
            if state not in ("PENDING", "PROC"):
                return state == "DONE"
            if timeout_ms is not None and time.time() - began > timeout_ms / 1000:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.01)


class NixlTransferAgent:
    def __init__(self, name, use_prog_thread=True, num_threads=1):
        api = nixl()
        assert isinstance(api.nixl_xfer_handle, type)
        self.name = name
        config = api.nixl_agent_config(enable_prog_thread=use_prog_thread, backends=["UCX"], num_threads=num_threads)
        self.agent = api.nixl_agent(name, config)

    def _registration(self, descs):
        return self.agent.get_reg_descs(descs.descs, descs.type)

    def register_memory(self, descs):
        self.agent.register_memory(self._registration(descs))

    def deregister_memory(self, descs):
        self.agent.deregister_memory(self._registration(descs))

    def load_remote_agent(self, name, agent_desc):
        self.agent.add_remote_agent(agent_desc)

    def get_local_agent_desc(self):
        return self.agent.get_agent_metadata()

    def invalidate_remote_agent(self, name):
        self.agent.remove_remote_agent(name)

    def submit_transfer_requests(self, request):
        source = self.agent.get_xfer_descs(request.src_descs.descs, request.src_descs.type)
        target = self.agent.get_xfer_descs(request.dst_descs.descs, request.dst_descs.type)
        message = request.sync_message or ""
        handle = self.agent.initialize_xfer(request.op, source, target, request.remote_name, message)
        assert self.agent.transfer(handle) != "ERROR"
        return Status(self.agent, handle)

    def shutdown(self):
        self.agent = None
