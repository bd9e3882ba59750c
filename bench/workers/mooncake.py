"""Mooncake's transfer engine over its TCP transport, with its synchronous batch calls."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.worker import serve, silence
from bench.workers.mover import Mover

BATCH = 256
"""Descriptors a call; the engine refuses batches beyond about 1,000, and 64, 256 and 900 perform alike."""


class Mooncake(Mover):
    """One transfer engine."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, Any]:
        """Start the engine and register the buffer."""
        self.allocate(nbytes)
        with silence():
            from mooncake.engine import TransferEngine  # type: ignore[import-not-found]

            self.engine = TransferEngine()
            _expect_zero("initialize", self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
            _expect_zero("register_memory", self.engine.register_memory(self.buffer.ctypes.data, nbytes))
        return {"port": self.engine.get_rpc_port(), "address": self.buffer.ctypes.data}

    def connect(self, peer: dict[str, Any]) -> None:
        """Remember where the peer is; the engine connects at the first transfer."""
        self.peer, self.remote = f"127.0.0.1:{peer['port']}", peer["address"]

    accept = connect

    def prepare(self) -> None:
        """Make the address lists."""
        self.near = (self.buffer.ctypes.data + np.arange(len(self.order)) * self.page_nbytes).tolist()
        self.far = (self.remote + self.order * self.page_nbytes).tolist()

    def move(self) -> dict[str, float]:
        """Move every page once, batch after batch."""
        call = self.engine.batch_transfer_sync_write if self.write else self.engine.batch_transfer_sync_read
        cpu, start = time.process_time(), time.perf_counter()
        for first in range(0, len(self.near), BATCH):
            near = self.near[first : first + BATCH]
            _expect_zero("batch", call(self.peer, near, self.far[first : first + BATCH], [self.page_nbytes] * len(near)))
        return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def _expect_zero(what: str, code: int) -> None:
    if code != 0:
        raise RuntimeError(f"mooncake {what} returned {code}")


if __name__ == "__main__":
    serve(Mooncake())
