"""Stock NIXL, as its own examples use it: UCX backend, progress thread on, completion by polling without pause."""

from __future__ import annotations

import base64
import importlib
import time
from typing import Any

import numpy as np
from plain import Array, Flow, Measured, Mover, serve

MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")
ARRIVED = b"\xbe\xef"


def load() -> Any:
    """Import NIXL's Python API under whichever name it is installed."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(MODULES)} is installed in this interpreter")


class Slot:
    """Requests of one slot: a handle for each flow, and what is under way."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.pending: list[Any] = []
        self.left = 0
        self.prep = self.called = self.post = 0.0
        self.busy = False


class Nixl(Mover):
    def opened(self) -> Any:
        api = load()
        self.name = f"{self.role}-{self.index}"
        self.agent = api.nixl_agent(self.name, api.nixl_agent_config(backends=[]))
        self.agent.create_backend("UCX", {})
        self._register()
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"name": self.name, "metadata": metadata, "address": str(self.buffer.ctypes.data)}

    def _register(self) -> None:
        self.registered = self.agent.register_memory([(self.buffer.ctypes.data, len(self.buffer), 0, "bench")], "DRAM")

    def met(self, peers: dict[str, Any]) -> None:
        self.peers = {}
        for flow in self.flows:
            what = f"target {flow.target}" if self.role == "initiator" else f"initiator {flow.initiator}"
            self.peers[what] = peers[what]
            self.agent.add_remote_agent(base64.b64decode(peers[what]["metadata"]))

    def prepared(self) -> None:
        self.slots = [Slot() for _ in range(self.point.slots)] if self.role == "initiator" else []
        self.lists: dict[Any, Any] = {}
        for number, slot in enumerate(self.slots):
            slot.handles = self._make(number)

    def _make(self, slot: int) -> list[Any]:
        """Make a request for each flow; of prepared lists, if that is asked for."""
        handles = []
        op, notice = self.point.op, ARRIVED if self.options["notify"] else b""
        for number, flow in enumerate(self.flows):
            peer = self.peers[f"target {flow.target}"]
            if self.options["prepared_xfer"]:
                key = (slot, number)
                if key not in self.lists:
                    near, far = self._sides(flow, slot, peer)
                    self.lists[key] = self.agent.prep_xfer_dlist("", near), self.agent.prep_xfer_dlist(peer["name"], far)
                every = np.arange(self.point.batch)
                near, far = self.lists[key]
                handles.append(self.agent.make_prepped_xfer(op, near, every, far, every, notice))
            else:
                handles.append(self.agent.initialize_xfer(op, *self._sides(flow, slot, peer), peer["name"], notice))
        return handles

    def _sides(self, flow: Flow, slot: int, peer: dict[str, str]) -> tuple[Any, Any]:
        near = self._table(self.buffer.ctypes.data, self.point.near(flow, slot), flow)
        return near, self._table(int(peer["address"]), self.point.far(flow, slot), flow)

    def _table(self, address: int, offsets: Array, flow: Flow) -> Any:
        table = np.zeros((len(offsets), 3), np.uint64)
        table[:, 0] = np.uint64(address) + offsets.astype(np.uint64)
        table[:, 1] = self.point.nbytes(flow)
        return self.agent.get_xfer_descs(table, "DRAM")

    def run(self, iterations: int) -> Any:
        """Post and poll, all slots in turn, without pause."""
        measured = Measured()
        nbytes = sum(self.point.nbytes(flow) for flow in self.flows) * self.point.batch
        active = self.slots
        for slot in active:
            slot.left = iterations // len(active)
        measured.begin()
        while active:
            for number, slot in enumerate(self.slots):
                if slot.busy:
                    slot.pending = [handle for handle in slot.pending if not self._done(self.agent.check_xfer_state(handle))]
                elif slot.left:
                    self._post(number, slot)
                if slot.busy and not slot.pending:
                    measured.add(slot.prep, slot.post, time.perf_counter() - slot.called)
                    measured.nbytes += nbytes
                    slot.busy = False
                    self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]
            active = [slot for slot in active if slot.left or slot.busy]
        measured.end()
        return measured.as_dict(route="ucx")

    def _post(self, number: int, slot: Slot) -> None:
        begun = time.perf_counter()
        if self.options["recreate_xfer"] or self.options["reregister_mem"]:
            for handle in slot.handles:
                self.agent.release_xfer_handle(handle)
            if self.options["reregister_mem"]:
                self.agent.deregister_memory(self.registered)
                self._register()
            slot.handles = self._make(number)
        slot.called = time.perf_counter()
        slot.prep = slot.called - begun
        slot.pending = [handle for handle in slot.handles if not self._done(self.agent.transfer(handle))]
        slot.post = time.perf_counter() - slot.called
        slot.left -= 1
        slot.busy = True

    def _done(self, state: str) -> bool:
        if state not in ("DONE", "PROC"):
            raise RuntimeError(f"transfer ended as {state}")
        return state == "DONE"

    def attend(self, count: int) -> None:
        """Poll for `count` notifications without pause."""
        super().attend(count)
        while count > 0:
            count -= sum(len(found) for found in self.agent.get_new_notifs().values())


if __name__ == "__main__":
    serve(Nixl())
