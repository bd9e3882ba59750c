"""Mooncake's transfer engine over its TCP transport, with its synchronous batch calls; a thread for each slot."""

from __future__ import annotations

import threading
import time
from typing import Any

from plain import Measured, Mover, serve

MOST = 256
"""Descriptors a call; the engine refuses batches beyond about 1,000, and 64, 256 and 900 perform alike."""


class Mooncake(Mover):
    def opened(self) -> Any:
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        _expect_zero("initialize", self.engine.initialize(self.host, "P2PHANDSHAKE", "tcp", ""))
        _expect_zero("register_memory", self.engine.register_memory(self.buffer.ctypes.data, len(self.buffer)))
        return {"name": f"{self.host}:{self.engine.get_rpc_port()}", "address": self.buffer.ctypes.data}

    def met(self, peers: dict[str, Any]) -> None:
        self.peers = peers

    def prepared(self) -> None:
        self.calls = [self._calls(slot) for slot in range(self.point.slots)] if self.role == "initiator" else []

    def _calls(self, slot: int) -> list[tuple[str, list[int], list[int], list[int]]]:
        """Make the address lists of a slot's request."""
        found = []
        for flow in self.flows:
            peer = self.peers[f"target {flow.target}"]
            near = (self.buffer.ctypes.data + self.point.near(flow, slot)).tolist()
            far = (peer["address"] + self.point.far(flow, slot)).tolist()
            for first in range(0, len(near), MOST):
                part = near[first : first + MOST]
                found.append((peer["name"], part, far[first : first + MOST], [self.point.nbytes(flow)] * len(part)))
        return found

    def run(self, iterations: int) -> Any:
        """Have every slot's thread make its share of the requests."""
        measured = Measured()
        failed: list[BaseException] = []
        share = iterations // len(self.calls)

        def work(slot: int) -> None:
            try:
                self._work(slot, share, measured)
            except BaseException as error:
                failed.append(error)

        measured.begin()
        if len(self.calls) == 1:
            self._work(0, share, measured)
        else:
            threads = [threading.Thread(target=work, args=(slot,)) for slot in range(len(self.calls))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        measured.end()
        if failed:
            raise failed[0]
        nbytes = sum(self.point.nbytes(flow) for flow in self.flows) * self.point.batch
        measured.nbytes = nbytes * len(measured.latency)
        return measured.as_dict(route="tcp")

    def _work(self, slot: int, count: int, measured: Measured) -> None:
        send = self.engine.batch_transfer_sync_write if self.point.op == "WRITE" else self.engine.batch_transfer_sync_read
        for _ in range(count):
            begun = time.perf_counter()
            calls = self._calls(slot) if self.options["recreate_xfer"] else self.calls[slot]
            called = time.perf_counter()
            for call in calls:
                _expect_zero("batch", send(*call))
            ended = time.perf_counter()
            # The call returns when the bytes are there.
            measured.add(called - begun, ended - called, ended - called)


def _expect_zero(what: str, code: int) -> None:
    if code != 0:
        raise RuntimeError(f"mooncake {what} returned {code}")


if __name__ == "__main__":
    serve(Mooncake())
