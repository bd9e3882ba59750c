"""What stands in for a CUDA device where there is none: lanes that copy this process's memory, and a driver that only signals.

What copies and what a device does with it is tested in tests/gpu; here is what is around it: threads, chunks, signals, failures.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.errors import BackendError
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    import pytest

NOT_READY, FAILED = 600, 700


class HostBuffer:
    """As much memory as a lane stages at a time."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.zeros(nbytes, np.uint8)
        self.address = self._bytes.ctypes.data


class HostLane:
    """Copies at once what it is to enqueue. `Host` says what goes wrong."""

    def __init__(self, host: Host, device: int, staging_nbytes: int, urgent: bool = False) -> None:
        self.host, self.device, self.urgent = host, device, urgent
        self.pinned, self._buffer = HostBuffer(staging_nbytes), HostBuffer(staging_nbytes)
        self.stream, self.waited = 0, True
        host.lanes.append(self)

    @property
    def buffer(self) -> int:
        return self._buffer.address

    def copy(
        self, src: Any, dst: Any, lengths: Any, *, moves: tuple[int, int] = (0, 0), far: Any = None, max_blocks: int = 0
    ) -> None:
        self.host.copying(self)
        arrays = [np.ascontiguousarray(array) for array in (dst + moves[1], src + moves[0], lengths)]
        lib.nx_copy_segments(*map(int64, arrays), len(lengths), ffi.NULL)
        self.waited = False

    def describe(
        self,
        src: Any,
        dst: Any,
        lengths: Any,
        *,
        moves: tuple[int, int] = (0, 0),
        far: Any = None,
        take: Callable[[int], int | None],
    ) -> Any:
        if (at := take(16 * len(lengths))) is None:
            return None
        self.host.described.append(at)
        return (src.copy(), dst.copy(), lengths.copy(), moves)

    def send(self, described: Any) -> None:
        src, dst, lengths, moves = described
        self.host.n_sent += 1
        self.copy(src, dst, lengths, moves=moves)

    def allocate(self, nbytes: int) -> int:
        if self.host.is_full:
            raise BackendError("cuda: out of memory (2)", backend="cuda")
        self.host.allocated[self.device] = nbytes
        return 0x1000 * (1 + self.device)

    def copy_run(self, dst: int, src: int, nbytes: int) -> None:
        self.host.copying(self)
        ctypes.memmove(dst, src, nbytes)
        self.waited = False

    def copy_to_peer(self, other: HostLane, nbytes: int) -> None:
        self.copy_run(other.buffer, self.buffer, nbytes)

    def wait(self) -> None:
        self.waited = True

    def query(self) -> int:
        return self.host.state

    def quiet(self) -> bool:
        self.waited = True
        return True

    def free(self) -> None:
        self.host.lanes.remove(self)


class Host:
    """The stand-in for the driver, and what is to go wrong."""

    def __init__(self) -> None:
        self.lanes: list[HostLane] = []
        self.state = 0
        self.signals = True
        self.kept: list[int] = []
        self.n_copies = self.n_sent = 0
        self.is_full = False
        self.described: list[int] = []
        self.allocated: dict[int, int] = {}
        self.freed: list[int] = []
        self.fail_at: int | None = None
        self.gate: threading.Event | None = None
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def copying(self, lane: HostLane) -> None:
        with self._lock:
            self.n_copies += 1
            number = self.n_copies
            self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait(10)
        if number == self.fail_at:
            raise BackendError("cuda: copying: the device is on fire (700)", backend="cuda")

    def cuLaunchHostFunc(self, stream: int, function: int, argument: int) -> int:
        if self.signals:
            call: Callable[[Any], None] = lib.nx_signal_fire
            thread = threading.Thread(target=call, args=(ffi.cast("void *", argument),))
            thread.start()
            thread.join()
        else:
            self.kept.append(argument)
        return 0

    def cuMemFree_v2(self, address: int) -> int:
        self.freed.append(address)
        return 0

    def drop(self) -> None:
        """Let go of signals that never came: a driver that has failed keeps them."""
        for argument in self.kept:
            lib.nx_signal_drop(ffi.cast("void *", argument))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Host:
    """Put the stand-in into the place of the driver and of lanes."""
    host = Host()

    @contextmanager
    def entered(device: int) -> Iterator[Host]:
        yield host

    module = "nixl_async.cuda_lanes"
    monkeypatch.setattr(f"{module}.Lane", lambda *arguments: HostLane(host, *arguments))
    monkeypatch.setattr(f"{module}.load_driver", lambda: host)
    monkeypatch.setattr(f"{module}.entered", entered)
    monkeypatch.setattr("nixl_async.cuda_kept.entered", entered)
    monkeypatch.setattr(f"{module}.kernels", lambda device: None)
    monkeypatch.setattr(f"{module}.is_compiled", lambda device: True)
    # So that a test sees how many are made.
    monkeypatch.setattr(f"{module}.READY_LANES", 0)

    def check(code: int, what: str) -> None:
        if code:
            raise BackendError(f"cuda: {what}: error {code}", backend="cuda")

    monkeypatch.setattr(f"{module}.check", check)
    return host
