"""Stock NIXL's storage plugins (OBJ, AZURE_BLOB, POSIX): descriptors prepared beforehand, completion by polling."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from bench.worker import serve, silence
from bench.workers.nixl import load
from bench.workers.stored import Stored

NAME = "bench"


class NixlStorage(Stored):
    """One agent with one storage plugin; `poll_seconds` is slept between polls, 0 polls without pause."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Create the agent and the plugin's backend; register the buffer."""
        self.allocate(nbytes)
        self.backend, self.poll_seconds = options["backend"], options["poll_seconds"]
        self.registered: Any = None
        self.fd = -1
        with silence():
            api = load()
            self.agent = api.nixl_agent(NAME, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self.agent.create_backend(self.backend, options["parameters"])
            self.agent.register_memory([(self.whole.ctypes.data, nbytes, 0, "kv")], "DRAM")

    def prepare(self) -> None:
        """Register the objects or the file, and prepare both descriptor lists, which NIXL's users do once."""
        with silence():
            if self.registered is not None:
                self.agent.deregister_memory(self.registered)
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1
            far = self._file() if "path" in self.where else self._objects()
        places = np.arange(len(self.order))
        near = self._table(self.whole.ctypes.data + places * self.page_nbytes, 0)
        # Descriptors are listed in the order that the transfer takes them in.
        if self.where.get("contiguous"):
            listed = np.argsort(self.order)
            near, far = near[listed], far[listed]
        kind = "FILE" if "path" in self.where else "OBJ"
        self.near = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", near, "DRAM", [self.backend])
        self.far = self.agent.prep_xfer_dlist(NAME, far, kind, [self.backend])
        self.indices = places

    def _objects(self) -> Any:
        rows = [(0, self.page_nbytes, number, key) for number, key in enumerate(self.where["keys"])]
        self.registered = self.agent.register_memory(rows, "OBJ", [self.backend])
        return self._table(np.zeros(len(self.order), np.int64), self.order)

    def _file(self) -> Any:
        direct = os.O_DIRECT if self.where["direct"] else 0
        self.fd = os.open(self.where["path"], os.O_RDWR | direct)
        rows = [(0, len(self.order) * self.page_nbytes, self.fd, "file")]
        self.registered = self.agent.register_memory(rows, "FILE", [self.backend])
        return self._table(self.order * self.page_nbytes, self.fd)

    def _table(self, addresses: Any, device: Any) -> Any:
        table = np.zeros((len(self.order), 3), np.uint64)
        table[:, 0] = np.asarray(addresses).astype(np.uint64)
        table[:, 1] = self.page_nbytes
        table[:, 2] = device
        return table

    def _transfer(self) -> None:
        operation = "WRITE" if self.write else "READ"
        indices = self.indices
        handle = self.agent.make_prepped_xfer(operation, self.near, indices, self.far, indices, b"", [self.backend])
        state = self.agent.transfer(handle)
        while state == "PROC":
            if self.poll_seconds:
                time.sleep(self.poll_seconds)
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"transfer ended as {state}")
        self.agent.release_xfer_handle(handle)

    def move(self) -> dict[str, float]:
        """Move every object or block once; timed from indices to the state DONE."""
        with self.timed():
            self._transfer()
        return self.measured


if __name__ == "__main__":
    serve(NixlStorage())
