"""Stock NIXL with memory of a device on one side or both."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from bench.gpu.memory import Buffer, allocate
from bench.worker import serve, silence
from bench.workers.nixl import Nixl, load

DEVICE = 0


class GPUNixl(Nixl):
    """One NIXL agent."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, str]:
        """Create the agent and register the buffer."""
        self.memory: Buffer = allocate(options["memory"][role], nbytes)
        with silence():
            api = load()
            self.agent = api.nixl_agent(role, api.nixl_agent_config(backends=[]))
            self.agent.create_backend("UCX", {})
            self.agent.register_memory([(self.memory.address, nbytes, DEVICE, "kv")], self.memory.kind)
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"name": role, "metadata": metadata, "address": str(self.memory.address), "kind": self.memory.kind}

    def connect(self, peer: dict[str, str]) -> None:
        """Load the peer's metadata."""
        super().connect(peer)
        self.remote_kind = peer["kind"]

    accept = connect

    def fill(self, salt: int) -> None:
        """Write the source pattern of `salt` into the buffer."""
        self.memory.fill(salt)

    def blank(self, salt: int) -> None:
        """Overwrite the buffer with something that no source pattern holds."""
        self.memory.blank(salt)

    def check(self, salt: int) -> int:
        """Return how many words are wrong on the destination after a run."""
        return self.memory.count_wrong(self.order, self.page_nbytes, salt, scattered=self.write)

    def prepare(self) -> None:
        """Prepare both descriptor lists, which NIXL's users do once for a whole pool."""
        self.indices = np.arange(len(self.order))
        if not hasattr(self, "peer"):
            return
        near = self._descriptors(self.memory.address, self.indices, self.memory.kind)
        far = self._descriptors(self.remote, self.order, self.remote_kind)
        self.near, self.far = self.agent.prep_xfer_dlist("", near), self.agent.prep_xfer_dlist(self.peer, far)

    def _descriptors(self, address: int, order: Any, kind: str) -> Any:
        table = np.zeros((len(order), 3), np.uint64)
        table[:, 0] = np.uint64(address) + order.astype(np.uint64) * np.uint64(self.page_nbytes)
        table[:, 1] = self.page_nbytes
        table[:, 2] = DEVICE
        return self.agent.get_xfer_descs(table, kind)


if __name__ == "__main__":
    serve(GPUNixl())
