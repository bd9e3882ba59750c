"""CUDA streams and an event loop: signals from the driver to the loop, and flags in memory that a stream waits for.

A point of a stream is told by a host function that the driver runs behind the work (`cuLaunchHostFunc`). It is compiled code that
writes to an eventfd: Python there would need the interpreter's lock while the driver holds its own, and deadlock with a thread that
holds that lock inside the driver. A stream waits for the host with `cuStreamWaitValue32` on pinned memory, which keeps no thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nixl_async.cuda import check, need_driver, primary_context
from nixl_async.errors import BackendError
from nixl_async.native import ffi, lib

# CUDA Driver API: CU_STREAM_NON_BLOCKING, CU_STREAM_WAIT_VALUE_EQ, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP,
# CUDA_ERROR_NOT_READY.
_NON_BLOCKING = 1
_WAIT_VALUE_EQ = 1
_PORTABLE_AND_MAPPED = 3
_NOT_READY = 600
_FLAGS = 1024
"""How many streams may wait for transfers at one time, in a process."""
_TOKENS = 256


def _driver() -> Any:
    return need_driver("a CUDA stream or event was given")


@contextmanager
def _context_of(stream: int) -> Iterator[None]:
    """Make a stream's context current; for handle 0 and other defaults, and for events, the current one, or device 0's."""
    driver, context = _driver(), ctypes.c_void_p()
    if stream > 2:
        check(driver.cuStreamGetCtx(stream, ctypes.byref(context)), f"stream {stream:#x}")
    else:
        driver.cuCtxGetCurrent(ctypes.byref(context))
        if not context:
            context = ctypes.c_void_p(primary_context(0))
    check(driver.cuCtxPushCurrent_v2(context), "making a context current")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))


class _Flags:
    """Words of pinned memory that streams wait for; kept for good, since a stream may still look when its agent is gone."""

    def __init__(self) -> None:
        driver, host, device = _driver(), ctypes.c_void_p(), ctypes.c_uint64()
        with _context_of(0):
            nbytes = 4 * _FLAGS
            check(driver.cuMemHostAlloc(ctypes.byref(host), nbytes, _PORTABLE_AND_MAPPED), "pinned memory for flags")
            check(driver.cuMemHostGetDevicePointer_v2(ctypes.byref(device), host, 0), "the device's address of flags")
        assert host.value is not None
        self.words = (ctypes.c_uint32 * _FLAGS).from_address(host.value)
        self.device_address = device.value
        self._free = list(range(_FLAGS))
        self._lock = threading.Lock()

    def take(self) -> int:
        """Take a word, and clear it."""
        with self._lock:
            if not self._free:
                raise BackendError(f"cuda: {_FLAGS} streams wait for transfers already", backend="cuda", retryable=True)
            index = self._free.pop()
        self.words[index] = 0
        return index

    def give_back(self, index: int) -> None:
        """Let others use a word that no stream waits for any more."""
        with self._lock:
            self._free.append(index)


@lru_cache(maxsize=1)
def _flags() -> _Flags:
    return _Flags()


class CUDAStreams:
    """What one event loop waits for on CUDA streams, and lets them wait for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        _driver()
        self._loop = loop
        self._signals = lib.nx_signals_open()
        if self._signals == ffi.NULL:
            raise OSError("no eventfd for signals from CUDA streams; too many open files?")
        self._fd = lib.nx_signals_fd(self._signals)
        self._tokens = ffi.new("uint64_t[]", _TOKENS)
        self._waiting: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._streams: list[int] = []
        loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stop listening; signals that come later are dropped, and flags that are still looked at are not used again."""
        self._loop.remove_reader(self._fd)
        lib.nx_signals_close(self._signals)
        self._waiting.clear()
        for stream in self._streams:
            _driver().cuStreamDestroy_v2(stream)
        self._streams.clear()

    def reached(self, handle: int, is_stream: bool) -> asyncio.Future[None] | None:
        """Return a future that ends when a stream has done all that is on it, or an event is reached; `None` if it has been.

        Raises:
            BackendError: the driver refuses the handle, or an earlier work of the stream has failed.
        """
        driver = _driver()
        with _context_of(handle if is_stream else 0):
            code = driver.cuStreamQuery(handle) if is_stream else driver.cuEventQuery(handle)
            if code != _NOT_READY:
                check(code, "the stream" if is_stream else "the event")
                return None
            if is_stream:
                return self._behind(handle)
            stream = self._take_stream()
            check(driver.cuStreamWaitEvent(stream, handle, 0), "waiting for the event")
            return self._behind(stream, stream_back=stream)

    def hold(self, stream: int) -> Callable[[], None]:
        """Let later work of a stream wait until the returned function is called."""
        flags = _flags()
        index = flags.take()
        with _context_of(stream):
            code = _driver().cuStreamWaitValue32_v2(stream, flags.device_address + 4 * index, 1, _WAIT_VALUE_EQ)
            if code:
                flags.give_back(index)
                check(code, "letting the stream wait for a transfer")
            # Behind the wait: from then on the word is nobody's.
            self._launch(stream, lambda: flags.give_back(index))

        def release() -> None:
            flags.words[index] = 1

        return release

    def _behind(self, stream: int, stream_back: int | None = None) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()

        def settle() -> None:
            if stream_back is not None:
                self._streams.append(stream_back)
            if not future.done():
                future.set_result(None)

        self._launch(stream, settle)
        return future

    def _launch(self, stream: int, reached: Callable[[], None]) -> None:
        self._next += 1
        token = self._next
        argument = lib.nx_signals_add(self._signals, token)
        if argument == ffi.NULL:
            raise MemoryError("no memory for a signal from a CUDA stream")
        self._waiting[token] = reached
        code = _driver().cuLaunchHostFunc(stream, lib.nx_signal_function(), int(ffi.cast("uintptr_t", argument)))
        if code:
            del self._waiting[token]
            lib.nx_signal_drop(argument)
            check(code, "a host function on the stream")

    def _take_stream(self) -> int:
        if self._streams:
            return self._streams.pop()
        stream = ctypes.c_void_p()
        check(_driver().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "a stream to wait for an event")
        assert stream.value is not None
        return stream.value

    def _readable(self) -> None:
        n = _TOKENS
        while n == _TOKENS:
            n = lib.nx_signals_collect(self._signals, self._tokens, _TOKENS)
            for index in range(n):
                if (reached := self._waiting.pop(self._tokens[index], None)) is not None:
                    reached()
