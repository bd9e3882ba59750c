"""Stock NIXL, as its own examples use it: UCX backend, progress thread on, completion by polling."""

from __future__ import annotations

import asyncio
import base64
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.loops import TimedSelector, Watch
from bench.worker import reset_rss_peak, rss_peak, serve, silence
from bench.workers.mover import Mover

MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")


def load() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.split(".")[0]):
                raise
    raise ModuleNotFoundError(f"none of {', '.join(MODULES)} is installed in this interpreter")


class Nixl(Mover):
    """One NIXL agent."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, str]:
        """Create the agent and register the buffer."""
        self.allocate(nbytes)
        with silence():
            api = load()
            self.agent = api.nixl_agent(role, api.nixl_agent_config(backends=[]))
            self.agent.create_backend("UCX", {})
            self.agent.register_memory([(self.buffer.ctypes.data, nbytes, 0, "kv")], "DRAM")
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return {"name": role, "metadata": metadata, "address": str(self.buffer.ctypes.data)}

    def connect(self, peer: dict[str, str]) -> None:
        """Load the peer's metadata."""
        self.peer, self.remote = peer["name"], int(peer["address"])
        with silence():
            self.agent.add_remote_agent(base64.b64decode(peer["metadata"]))

    accept = connect

    def _table(self, address: int, order: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        table = np.zeros((len(order), 3), np.uint64)
        table[:, 0] = np.uint64(address) + order.astype(np.uint64) * np.uint64(self.page_nbytes)
        table[:, 1] = self.page_nbytes
        return self.agent.get_xfer_descs(table, "DRAM")

    def prepare(self) -> None:
        """Prepare both descriptor lists, which NIXL's users do once for a whole pool."""
        self.indices = np.arange(len(self.order))
        if not hasattr(self, "peer"):
            return
        self.near = self.agent.prep_xfer_dlist("", self._table(self.buffer.ctypes.data, self.indices))
        self.far = self.agent.prep_xfer_dlist(self.peer, self._table(self.remote, self.order))

    def prepare_slices(self) -> None:
        """Prepare both lists of slices."""
        if not hasattr(self, "peer"):
            return
        request = self.request
        self.indices = np.arange(request.count)
        self.page_nbytes = request.slice_nbytes
        sides = ((self.buffer.ctypes.data, self.near_tp), (self.remote, self.far_tp))
        near, far = (self._slices(address, request.offsets(tp)) for address, tp in sides)
        self.near, self.far = self.agent.prep_xfer_dlist("", near), self.agent.prep_xfer_dlist(self.peer, far)

    def _slices(self, address: int, offsets: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        table = np.zeros((len(offsets), 3), np.uint64)
        table[:, 0] = np.uint64(address) + offsets.astype(np.uint64)
        table[:, 1] = self.page_nbytes
        return self.agent.get_xfer_descs(table, "DRAM")

    def move_slices(self, whole: bool) -> dict[str, float]:
        """Move the request's slices once."""
        return self.move()

    def _make(self) -> Any:
        operation = "WRITE" if self.write else "READ"
        return self.agent.make_prepped_xfer(operation, self.near, self.indices, self.far, self.indices, b"")

    def _finish(self, handle: Any, state: str) -> None:
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"transfer ended as {state}")

    def move(self) -> dict[str, float]:
        """Move every page once; timed from page indices to the state DONE, polled without pause."""
        cpu, start = time.process_time(), time.perf_counter()
        handle = self._make()
        self._finish(handle, self.agent.transfer(handle))
        seconds = time.perf_counter() - start
        self.agent.release_xfer_handle(handle)
        return {"seconds": seconds, "cpu": time.process_time() - cpu}

    def latency(self, nbytes: int, count: int, prepared: bool) -> list[float]:
        """Write `nbytes` bytes `count` times; prepared means posting the same handle again."""
        seconds = []
        handle = self._small(nbytes) if prepared else None
        for _ in range(count):
            start = time.perf_counter()
            current = handle or self._small(nbytes)
            self._finish(current, self.agent.transfer(current))
            seconds.append(time.perf_counter() - start)
            if handle is None:
                self.agent.release_xfer_handle(current)
        if handle is not None:
            self.agent.release_xfer_handle(handle)
        return seconds

    def _small(self, nbytes: int, place: int = 0, message: bytes = b"") -> Any:
        near = self.agent.get_xfer_descs([(self.buffer.ctypes.data + place, nbytes, 0)], "DRAM")
        far = self.agent.get_xfer_descs([(self.remote + place, nbytes, 0)], "DRAM")
        return self.agent.initialize_xfer("WRITE", near, far, self.peer, message)

    def respond(self, count: int) -> None:
        """Answer `count` notifications, polling without pause."""
        answered = 0
        while answered < count:
            for messages in self.agent.get_new_notifs().values():
                for _ in messages:
                    self.agent.send_notif(self.peer, b"ack")
                    answered += 1

    def round_trips(self, nbytes: int, count: int) -> list[float]:
        """Write, notify, and wait for the answer, `count` times, polling from a coroutine as an async server would."""
        return asyncio.run(self._round_trips(nbytes, count))

    async def _round_trips(self, nbytes: int, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            handle = self._small(nbytes, message=b"go")
            self._finish(handle, self.agent.transfer(handle))
            while not self.agent.get_new_notifs():  # noqa: ASYNC110 - NIXL can only be polled
                await asyncio.sleep(0)
            seconds.append(time.perf_counter() - start)
            self.agent.release_xfer_handle(handle)
        return seconds

    def move_watched(self, ticker: bool) -> dict[str, list[float]]:
        """Move every page once from a coroutine that polls with `sleep(0)`, while the loop is watched."""
        selector = TimedSelector()

        async def run() -> dict[str, list[float]]:
            watch = Watch(selector)
            watch.start(ticker=ticker)
            await asyncio.sleep(0)
            handle = self._make()
            state = self.agent.transfer(handle)
            while state == "PROC":
                await asyncio.sleep(0)
                state = self.agent.check_xfer_state(handle)
            result = await watch.stop()
            self.agent.release_xfer_handle(handle)
            self.agent.send_notif(self.peer, b"end")
            return result

        return _run(selector, run())

    def be_watched(self, ticker: bool) -> dict[str, list[float]]:
        """Poll for notifications every millisecond on a watched loop until the initiator's run has ended."""
        selector = TimedSelector()

        async def run() -> dict[str, list[float]]:
            watch = Watch(selector)
            watch.start(ticker=ticker)
            while not self.agent.get_new_notifs():  # noqa: ASYNC110 - NIXL can only be polled
                await asyncio.sleep(0.001)
            return await watch.stop()

        return _run(selector, run())

    def many(self, count: int, nbytes: int) -> dict[str, float]:
        """Keep `count` writes of `nbytes` bytes in flight at once."""
        before = reset_rss_peak()
        start = time.perf_counter()
        handles = [self._small(nbytes, i * nbytes) for i in range(count)]
        pending = [(handle, self.agent.transfer(handle)) for handle in handles]
        for handle, state in pending:
            self._finish(handle, state)
        seconds = time.perf_counter() - start
        growth = rss_peak() - before
        for handle in handles:
            self.agent.release_xfer_handle(handle)
        return {"seconds": seconds, "rss_growth": growth}

    def calls(self, count: int) -> dict[str, float]:
        """Time what a caller does for each pool and for each request: seconds for one call, the median of `count` samples of 16."""
        size = self.page_nbytes
        table = self._table(self.buffer.ctypes.data, self.indices)
        runs = np.array([(self.buffer.ctypes.data, size, 0, size, len(self.indices))], np.uint64)
        listed = self.indices.tolist()

        def make(indices: Any) -> Any:
            return self.agent.make_prepped_xfer("WRITE", self.near, indices, self.far, indices, b"")

        works = {
            "prepare a list": lambda: self.agent.prep_xfer_dlist("", table),
            "prepare a run": lambda: self.agent.prep_xfer_dlist("", runs, "DRAM"),
            "make, indices an array": lambda: make(self.indices),
            "make, indices a list": lambda: make(listed),
        }
        return {name: _median(work, count) for name, work in works.items()}

    def prepare_again(self, count: int) -> dict[str, list[float]]:
        """Time what NIXL does for the same descriptors a second time: make a transfer of the prepared lists."""
        make = []
        for _ in range(count):
            start = time.perf_counter()
            handle = self._make()
            make.append(time.perf_counter() - start)
            self.agent.release_xfer_handle(handle)
        return {"again": make}


def _median(work: Callable[[], Any], count: int) -> float:
    """Return what one call takes; what it returns is released outside the timing."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        made = [work() for _ in range(16)]
        samples.append((time.perf_counter() - start) / 16)
        for one in made:
            one.release()
    return sorted(samples)[len(samples) // 2]


def _run(selector: TimedSelector, coroutine: Any) -> dict[str, list[float]]:
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        result: dict[str, list[float]] = runner.run(coroutine)
    return result


if __name__ == "__main__":
    serve(Nixl())
