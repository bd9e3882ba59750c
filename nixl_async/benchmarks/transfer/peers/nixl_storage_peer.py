"""Stock NIXL's storage plugins, POSIX for files and OBJ for S3: descriptors prepared beforehand, completion by polling."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from nixl_peer import load
from plain import Array, Files, Measured, Stored, allocate, serve

NAME = "bench"
PLUGINS = {"FILE": "POSIX", "OBJ": "OBJ"}


class NixlStored(Stored):
    def opened(self) -> Any:
        api = load()
        self.kind = self.options["target_seg_type"]
        self.plugin = PLUGINS[self.kind]
        self.agent = api.nixl_agent(NAME, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self.agent.create_backend(self.plugin, self._parameters() if self.kind == "OBJ" else {})
        self.agent.register_memory([(self.buffer.ctypes.data, len(self.buffer), 0, "")], "DRAM")
        if self.kind == "FILE":
            self.files = Files(self.options, "nixl", self.index, len(self.buffer))
            self.fds = np.array(self.files.opened())
            self.agent.register_memory([(0, self.files.nbytes, int(fd), "") for fd in self.fds], "FILE", [self.plugin])
        self.registered: Any = None

    def _parameters(self) -> dict[str, str]:
        given, url = self.options["store_options"], urlsplit(self.options["store_url"])
        if url.scheme != "s3":
            raise RuntimeError(f"NIXL's OBJ plugin is measured with S3, not {url.scheme}://")
        found = {
            "access_key": given.get("access_key"),
            "secret_key": given.get("secret_key"),
            "session_token": given.get("session_token"),
            "bucket": url.netloc,
            "endpoint_override": given.get("endpoint_url"),
            "scheme": urlsplit(given.get("endpoint_url", "")).scheme or "https",
            "region": given.get("region"),
            "use_virtual_addressing": "true" if given.get("addressing") == "virtual" else "false",
            "req_checksum": self.options["obj_req_checksum"],
        }
        return {name: value for name, value in found.items() if value}

    def aim(self) -> None:
        if self.kind != "OBJ":
            return
        if self.registered is not None:
            self.agent.deregister_memory(self.registered)
        prefix = f"nixl-async-bench-{self.options['run']}/nixl/{self.index}/{self.point.block}"
        rows = [(0, self.point.block, number, f"{prefix}/{number}") for number in range(self.n_blocks)]
        self.registered = self.agent.register_memory(rows, "OBJ", [self.plugin])

    def _far(self, numbers: Array) -> Any:
        if self.kind == "OBJ":
            return _table(np.zeros(len(numbers), np.int64), self.point.block, numbers)
        files, offsets = self.files.locate(numbers, self.point.block)
        return _table(offsets, self.point.block, self.fds[files])

    def _request(self, op: str, address: int, offsets: Array, numbers: Array) -> Any:
        near = self.agent.get_xfer_descs(_table(address + offsets, self.point.block, 0), "DRAM")
        far = self.agent.get_xfer_descs(self._far(numbers), self.kind)
        return self.agent.initialize_xfer(op, near, far, NAME, b"", [self.plugin])

    def put(self, content: Array) -> None:
        self._all("WRITE", content)

    def fetch(self) -> Array:
        content = allocate(self.n_blocks * self.point.block)
        self._all("READ", content)
        return content

    def _all(self, op: str, content: Array) -> None:
        if self.kind == "FILE":
            (self.files.put if op == "WRITE" else self.files.fetch)(content, self.point.block)
            return
        registered = self.agent.register_memory([(content.ctypes.data, len(content), 0, "")], "DRAM")
        numbers = np.arange(self.n_blocks)
        handle = self._request(op, content.ctypes.data, numbers * self.point.block, numbers)
        self._finish(handle, self.agent.transfer(handle))
        self.agent.release_xfer_handle(handle)
        self.agent.deregister_memory(registered)

    def aimed(self) -> None:
        self.handles = [self._make(slot) for slot in range(self.point.slots)]

    def _make(self, slot: int) -> Any:
        near = self.point.near(self.flows[0], slot)
        return self._request(self.point.op, self.buffer.ctypes.data, near, self.numbers(slot))

    def _finish(self, handle: Any, state: str) -> None:
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"transfer ended as {state}")

    def run(self, iterations: int) -> Any:
        """Post and poll, all slots in turn, without pause."""
        measured = Measured()
        left = [iterations // len(self.handles)] * len(self.handles)
        busy: dict[int, tuple[float, float, float]] = {}
        measured.begin()
        while any(left) or busy:
            for slot in range(len(self.handles)):
                if slot not in busy and left[slot]:
                    left[slot] -= 1
                    begun = time.perf_counter()
                    if self.options["recreate_xfer"]:
                        self.agent.release_xfer_handle(self.handles[slot])
                        self.handles[slot] = self._make(slot)
                    called = time.perf_counter()
                    state = self.agent.transfer(self.handles[slot])
                    busy[slot] = (called - begun, time.perf_counter() - called, called)
                elif slot in busy:
                    state = self.agent.check_xfer_state(self.handles[slot])
                else:
                    continue
                if state == "DONE":
                    prep, post, called = busy.pop(slot)
                    measured.add(prep, post, time.perf_counter() - called)
                    measured.nbytes += self.point.block * self.point.batch
                    self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]
                elif state != "PROC":
                    raise RuntimeError(f"transfer ended as {state}")
        measured.end()
        return measured.as_dict(route=self.plugin.lower())


def _table(addresses: Array, nbytes: int, device: Any) -> Any:
    table = np.zeros((len(addresses), 3), np.uint64)
    table[:, 0] = addresses.astype(np.uint64)
    table[:, 1] = nbytes
    table[:, 2] = device
    return table


if __name__ == "__main__":
    serve(NixlStored())
