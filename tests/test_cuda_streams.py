"""Signals from foreign threads to an event loop, and what is said where there is no CUDA driver; tests/gpu has the rest."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nixl_async import MissingDependency
from nixl_async.cuda import device_count
from nixl_async.native import ffi, lib
from nixl_async.streams import Streams


class Stream:
    """A CUDA stream as `__cuda_stream__` shows it."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 1


class Event:
    """A CUDA event as torch has it."""

    cuda_event = 1


@pytest.mark.skipif(device_count() > 0, reason="there is a CUDA device: tests/gpu uses it")
@pytest.mark.parametrize("point", [Stream(), Event()])
async def test_without_a_driver_cuda_points_are_refused(point: object) -> None:
    streams = Streams(asyncio.get_running_loop())
    with pytest.raises(MissingDependency, match=r"there is no CUDA driver \(libcuda.so.1\)"):
        streams.reached(point)
    with pytest.raises(MissingDependency if isinstance(point, Stream) else TypeError):
        streams.hold(point)
    streams.close()


# What a driver's thread does, done by a thread of ours.


def test_signals_come_from_another_thread_in_order() -> None:
    signals = lib.nx_signals_open()
    tokens = ffi.new("uint64_t[]", 64)
    arguments = [lib.nx_signals_add(signals, token) for token in range(1, 201)]
    thread = threading.Thread(target=lambda: [lib.nx_signal_fire(argument) for argument in arguments])
    thread.start()
    thread.join()
    got: list[int] = []
    while n := lib.nx_signals_collect(signals, tokens, 64):
        got += list(tokens[0:n])
    assert got == list(range(1, 201))
    lib.nx_signals_close(signals)


def test_a_signal_may_fire_or_be_dropped_after_its_loop_is_gone() -> None:
    signals = lib.nx_signals_open()
    late, dropped = lib.nx_signals_add(signals, 1), lib.nx_signals_add(signals, 2)
    lib.nx_signals_close(signals)
    lib.nx_signal_fire(late)
    lib.nx_signal_drop(dropped)
