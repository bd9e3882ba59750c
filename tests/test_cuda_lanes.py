"""Launches and chunks of the CUDA backends: threads, signals, failures. Of a device: tests/gpu."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from nixl_async import BackendError, MemoryRegion, PeerLost
from nixl_async.cuda_lane import Lane
from nixl_async.cuda_lanes import BRIEF_NBYTES, LOOKS_AGAIN, PATIENCE, WATCHED_NBYTES, WATCHED_SECONDS, Lanes
from nixl_async.descriptors import Plan, make_plan
from nixl_async.memory import open_buffer
from tests.cuda_host import FAILED, NOT_READY, Host, HostLane, stand_in


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr("nixl_async.cuda_lanes._LOOK_SECONDS", 0.01)
    return stand_in(monkeypatch)


@pytest.fixture
async def lanes(host: Host) -> AsyncIterator[Lanes]:
    made = Lanes(asyncio.get_running_loop(), "test", n_threads=2, chunk_nbytes=4096)
    yield made
    await made.aclose()
    host.drop()


def run(lane: Lane) -> None:
    lane.copy_run(0, 0, 0)


@pytest.mark.parametrize("now", [True, False])
async def test_a_launch_ends_with_its_signal(host: Host, lanes: Lanes, now: bool) -> None:
    for number in range(3):
        future = lanes.launch(0, run, now=now)
        assert lanes.launched == 1
        await future
        assert (lanes.launched, host.n_copies) == (0, number + 1)
    # One lane serves all; where one is idle the loop's own thread launches, if it may.
    assert len(host.lanes) == 1
    assert (threading.current_thread().name in host.threads) is now


async def test_what_waits_for_streams_is_done_before_the_first_op(
    host: Host, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[int, str]] = []
    monkeypatch.setattr(
        "nixl_async.cuda_lanes.kernels", lambda device: compiled.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr("nixl_async.cuda_lanes.READY_LANES", 1)
    await asyncio.gather(lanes.prepare(0), lanes.prepare(0))
    await lanes.prepare(0)
    assert [device for device, _ in compiled] == [0]
    assert compiled[0][1] != threading.current_thread().name
    assert [(lane.device, lane.urgent) for lane in host.lanes] == [(0, False), (0, True)]
    await lanes.launch(0, run, now=True)
    assert len(host.lanes) == 2


async def test_what_is_brief_has_ended_when_it_is_launched(host: Host, lanes: Lanes) -> None:
    await lanes.launch(0, run)
    host.signals = False
    for _ in range(2 * PATIENCE):
        future = lanes.launch(0, run, now=True, nbytes=BRIEF_NBYTES)
        assert future.done()
        await future
    # What is more, or launched by the thread, is told by its signal.
    host.signals = True
    for nbytes, now in ((BRIEF_NBYTES + 1, True), (0, True), (1, False)):
        future = lanes.launch(0, run, now=now, nbytes=nbytes)
        assert not future.done()
        await future


async def test_a_busy_device_is_not_waited_for_again_and_again(
    host: Host, lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What looks for failed devices asks as well.
    monkeypatch.setattr("nixl_async.cuda_lanes._LOOK_SECONDS", 60.0)
    await lanes.launch(0, run)
    host.state = NOT_READY
    asked: list[int] = []
    monkeypatch.setattr("nixl_async.cuda_lanes.BRIEF_SECONDS", 0.0)
    monkeypatch.setattr(HostLane, "query", lambda lane: (asked.append(1), host.state)[1])
    for _ in range(PATIENCE + 2 * LOOKS_AGAIN):
        await lanes.launch(0, run, now=True, nbytes=1)
    assert len(asked) == PATIENCE + 2
    # Once a look has been worth it, all are looked after again.
    host.state = 0
    ended = 0
    for _ in range(2 * LOOKS_AGAIN):
        future = lanes.launch(0, run, now=True, nbytes=1)
        ended += future.done()
        await future
    assert ended > LOOKS_AGAIN


@pytest.mark.parametrize("now", [True, False])
async def test_what_should_end_soon_is_watched_between_other_callbacks(
    host: Host, lanes: Lanes, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    await lanes.launch(0, run)
    # No signal will come, nobody asks after failures.
    monkeypatch.setattr("nixl_async.cuda_lanes._LOOK_SECONDS", 60.0)
    host.signals, host.state = False, NOT_READY
    turns = 0

    async def others() -> None:
        nonlocal turns
        while turns < 20:
            turns += 1
            await asyncio.sleep(0)
        host.state = 0

    monkeypatch.setattr("nixl_async.cuda_lanes.UNKNOWN_SPEED", WATCHED_NBYTES / (WATCHED_SECONDS / 2))
    monkeypatch.setattr("nixl_async.cuda_lanes.BRIEF_SECONDS", 60.0)
    future = lanes.launch(0, run, now=now, nbytes=WATCHED_NBYTES)
    assert not future.done()
    await asyncio.gather(others(), future)
    assert (turns, host.kept, lanes.launched) == (20, [], 0)
    # What takes longer than that is not watched, nor is anything on a way that has been seen to be slow.
    host.signals = True
    for nbytes in (3 * WATCHED_NBYTES, WATCHED_NBYTES):
        host.state = NOT_READY
        lanes._speeds[0, "slow"] = WATCHED_NBYTES / (2 * WATCHED_SECONDS)
        await lanes.launch(0, run, now=now, nbytes=nbytes, way="slow")
        assert not lanes._watched


async def test_what_does_not_end_soon_is_told_by_its_signal(host: Host, lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    await lanes.launch(0, run)
    monkeypatch.setattr("nixl_async.cuda_lanes._LOOK_SECONDS", 60.0)
    monkeypatch.setattr("nixl_async.cuda_lanes.UNKNOWN_SPEED", 1e15)
    monkeypatch.setattr("nixl_async.cuda_lanes.BRIEF_SECONDS", 0.0)
    host.state = NOT_READY
    for _ in range(PATIENCE):
        # How fast these seemed depends on how busy this machine is.
        lanes._speeds.clear()
        await lanes.launch(0, run, now=True, nbytes=WATCHED_NBYTES)
    lanes._speeds.clear()
    # The device has other work: the loop sleeps at once.
    future = lanes.launch(0, run, now=True, nbytes=WATCHED_NBYTES)
    assert not lanes._watched
    await future


@pytest.mark.parametrize("fails", ["device", "signal"])
async def test_an_error_of_what_is_watched_is_raised(
    host: Host, lanes: Lanes, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    await lanes.launch(0, run)
    monkeypatch.setattr("nixl_async.cuda_lanes.UNKNOWN_SPEED", 1e15)
    if fails == "device":
        host.state = FAILED
    else:
        host.state = NOT_READY
        monkeypatch.setattr("nixl_async.cuda_lanes.BRIEF_SECONDS", 0.0)
        monkeypatch.setattr(host, "cuLaunchHostFunc", lambda *arguments: FAILED)
    with pytest.raises(BackendError, match="error 700"):
        await lanes.launch(0, run, now=True, nbytes=WATCHED_NBYTES)
    assert lanes.launched == 0


@pytest.mark.parametrize("idle", [True, False])
async def test_what_is_described_is_sent(host: Host, lanes: Lanes, idle: bool) -> None:
    if idle:
        await lanes.launch(0, run, urgent=True)
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
    places = [np.array([array.ctypes.data], np.int64) for array in (source, target)]
    described = (*places, np.array([64]), (0, 0))
    ended: list[BaseException | None] = []
    await lanes.send(0, described, urgent=True, nbytes=64, ended=lambda error: ended.append(error))  # type: ignore[arg-type]
    assert (target == source).all()
    assert ended == [None]
    host.fail_at = host.n_copies + 1
    lost = PeerLost("it has gone")
    with pytest.raises(PeerLost, match="it has gone"):
        await lanes.send(0, described, urgent=True, nbytes=64, ended=lambda error: lost)  # type: ignore[arg-type]


async def test_an_error_of_a_brief_launch_is_raised(host: Host, lanes: Lanes) -> None:
    await lanes.launch(0, run)
    host.state = FAILED
    with pytest.raises(BackendError, match="error 700"):
        await lanes.launch(0, run, now=True, nbytes=1)


async def test_lanes_are_of_a_device_and_an_urgency(host: Host, lanes: Lanes) -> None:
    await asyncio.gather(*(lanes.launch(device, run, urgent=urgent) for device in (0, 1) for urgent in (False, True)))
    assert sorted((lane.device, lane.urgent) for lane in host.lanes) == [(0, False), (0, True), (1, False), (1, True)]


@pytest.mark.parametrize("now", [True, False])
async def test_what_a_launch_raises_comes_when_the_lane_is_quiet(host: Host, lanes: Lanes, now: bool) -> None:
    await lanes.launch(0, run)
    host.fail_at = 3

    def twice(lane: Lane) -> None:
        run(lane)
        run(lane)

    with pytest.raises(BackendError, match="on fire"):
        await lanes.launch(0, twice, now=now)
    assert host.lanes[0].waited
    # The lane is as good as before.
    await lanes.launch(0, run)
    assert len(host.lanes) == 1


async def test_a_device_that_fails_signals_nothing_and_is_found_out(host: Host, lanes: Lanes) -> None:
    host.signals, host.state = False, NOT_READY
    future = lanes.launch(0, run)
    await asyncio.wait([future], timeout=0.05)
    assert not future.done()
    host.state = FAILED
    async with asyncio.timeout(5):
        with pytest.raises(BackendError, match="error 700"):
            await future
    # Its lane is not used again.
    host.signals, host.state = True, 0
    await lanes.launch(0, run)
    assert len(host.lanes) == 2


async def test_functions_are_called_behind_what_was_launched(host: Host, lanes: Lanes) -> None:
    host.gate = threading.Event()
    launched, called = lanes.launch(0, run), lanes.call(lambda: host.n_copies)
    await asyncio.wait([called], timeout=0.02)
    assert not called.done()
    host.gate.set()
    assert await called == 1
    await launched


# Chunks.


async def nothing(region: MemoryRegion) -> None:
    pass


def plan_of(n: int) -> tuple[Plan, MemoryRegion]:
    region = MemoryRegion("r", open_buffer(np.zeros(2 * n * 4096, np.uint8)), nothing)
    return make_plan(region[: n * 4096], region[n * 4096 :]), region


async def test_chunks_of_two_plans_take_turns(lanes: Lanes) -> None:
    order: list[str] = []
    lock, began = threading.Lock(), threading.Event()

    def copy(name: str, chunk: Plan) -> None:
        assert chunk.nbytes == 4096
        began.wait(10)
        with lock:
            order.append(name)

    (long, _), (short, _) = plan_of(40), plan_of(4)
    first, _ = lanes.in_chunks(long, lambda chunk: copy("long", chunk))
    second, _ = lanes.in_chunks(short, lambda chunk: copy("short", chunk))
    began.set()
    await asyncio.gather(first, second)
    assert (order.count("long"), order.count("short")) == (40, 4)
    # The last of the short one, among the chunks of both.
    assert max(at for at, name in enumerate(order) if name == "short") < 20


async def test_no_chunk_begins_after_a_stop_and_none_runs_after_the_end(lanes: Lanes) -> None:
    copied, gate = [], threading.Event()
    running = threading.Semaphore(0)

    def copy(chunk: Plan) -> None:
        running.release()
        gate.wait(10)
        copied.append(chunk.nbytes)

    plan, _ = plan_of(50)
    done, stop = lanes.in_chunks(plan, copy)
    for _ in range(2):
        await asyncio.to_thread(running.acquire)
    stop()
    await asyncio.wait([done], timeout=0.02)
    assert not done.done()
    gate.set()
    await done
    assert copied == [4096, 4096]


async def test_the_first_error_ends_the_plan(lanes: Lanes) -> None:
    copied: list[int] = []

    def copy(chunk: Plan) -> None:
        copied.append(int(chunk.src.addresses[0]))
        if len(copied) == 3:
            raise BackendError("broken", backend="cuda")

    plan, _ = plan_of(50)
    done, _ = lanes.in_chunks(plan, copy)
    with pytest.raises(BackendError, match="broken"):
        await done
    # Of the other thread at most one more.
    assert 3 <= len(copied) <= 5
