"""The samehost backend: it must never mistake one process for another; its two ways, and when it takes which."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import mmap
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import AccessError, Agent, BackendError, ConfigurationError, MemoryRegion, PeerLost, Quarantined, Transfer
from nixl_async.backend import Host, PeerInfo
from nixl_async.backends import samehost
from nixl_async.backends.samehost import DIRECT, PACKED, SameHostBackend
from nixl_async.costs import Ways
from nixl_async.descriptors import make_plan
from nixl_async.memory import RemoteRegion
from nixl_async.native import ffi, int64, lib
from nixl_async.testing import Canary, assert_same, pattern
from nixl_async.testing.pair import HOST, THEIRS, Pair, open_pair
from tests.agents import TOKEN, AgentProcess, agent_process

LARGE = 24 << 20
WAYS = ["direct", "packed", None]


async def _opened() -> SameHostBackend:
    backend = SameHostBackend()
    await backend.open(Host("a", "1", asyncio.get_running_loop()))
    return backend


def _changed(backend: SameHostBackend, **changes: object) -> PeerInfo:
    return PeerInfo("b", "1", json.dumps(json.loads(backend.describe()) | changes).encode())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"nonce": "00" * 16}, "is not peer 'b'"),
        ({"nonce": "00"}, "described itself wrongly"),
        ({"pid": -1}, "described itself wrongly"),
        ({"pid": "x"}, "described itself wrongly"),
        ({"address": 0}, "described itself wrongly"),
        ({"address": 4096}, "cannot read from"),
        ({"pid": 1 << 22}, "not on this host"),
    ],
)
async def test_who_is_not_the_peer_is_refused(changes: dict[str, object], text: str) -> None:
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match=text):
            await backend.connect(_changed(backend, **changes))
    finally:
        await backend.aclose()


async def test_a_description_that_is_no_json_is_refused() -> None:
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match="wrongly"):
            await backend.connect(PeerInfo("b", "1", b"\xff"))
    finally:
        await backend.aclose()


async def test_a_process_that_ended_is_told_at_once() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, backends=["samehost"]) as near:
        here = await near.register(pattern(1 << 20, 1))
        remote = (await near.connect(far.address)).region("memory")
        ready = await near.prepare(here[0:4096], remote[0:4096])
        far.kill()
        await far.process.wait()
        # Before the loop has heard of it: the pidfd is asked before each copy.
        with pytest.raises(PeerLost):
            await ready.transfer()


async def test_a_number_of_nobody_is_refused() -> None:
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await ended.wait()
    backend = await _opened()
    try:
        with pytest.raises(BackendError, match="not on this host"):
            await backend.connect(_changed(backend, pid=ended.pid))
    finally:
        await backend.aclose()


# The two ways.


def _near(way: str | None) -> Agent:
    return Agent("near", token=TOKEN, backends=[SameHostBackend(way=way)])


async def _connected(near: Agent, far: AgentProcess) -> RemoteRegion:
    """Connect, and wait until the other side serves us too."""
    region = (await near.connect(far.address)).region("memory")
    while "near" not in (await far.order("statistics"))["peers"]:
        pass
    return region


def _mixed(nbytes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lengths of 1 byte to 100 KiB, where they come from (overlapping), and where they go (apart), in random order."""
    random = np.random.default_rng(seed)
    lengths = np.concatenate(
        [random.integers(1, 100, 300), random.integers(1000, 5000, 300), random.integers(1, 100 << 10, 100)]
    )
    random.shuffle(lengths)
    order = random.permutation(len(lengths))
    gaps = random.integers(0, 100, len(lengths))
    dst = np.empty(len(lengths), np.int64)
    dst[order] = np.concatenate([[0], np.cumsum(lengths[order] + gaps[order])[:-1]])
    assert dst.max() + (100 << 10) < nbytes
    return lengths, random.integers(0, nbytes - (100 << 10), len(lengths)), dst


@pytest.mark.parametrize("way", WAYS)
async def test_ranges_of_all_lengths_in_any_order_and_nothing_beside_them(way: str | None) -> None:
    nbytes = 12 << 20
    lengths, src, dst = _mixed(nbytes, 1)
    async with agent_process("far", nbytes=nbytes, seed=1) as far, _near(way) as near:
        mine, theirs = pattern(nbytes, 2), pattern(nbytes, 1)
        here = await near.register(mine)
        remote = await _connected(near, far)
        await near.transfer(here.ranges(src, lengths), remote.ranges(dst, lengths))
        for start, to, n in zip(src, dst, lengths, strict=True):
            theirs[to : to + n] = mine[start : start + n]
        assert (await far.order("digest"))["digest"] == hashlib.sha256(theirs.tobytes()).hexdigest()
        await near.transfer(remote.ranges(src, lengths), here.ranges(dst, lengths))
        expected = pattern(nbytes, 2)
        for start, to, n in zip(src, dst, lengths, strict=True):
            expected[to : to + n] = theirs[start : start + n]
        assert_same(mine, expected)


async def test_many_regions_in_one_op() -> None:
    async with open_pair(lambda: SameHostBackend(way="packed")) as pair:
        memories = [await pair.memory("put", 40_000 + i, seed=i) for i in range(40)]
        # More of them in one slot than it has room for keys.
        src = [memory.src[start : start + 500] for start in range(0, 40_000, 500) for memory in memories]
        dst = [memory.dst[start : start + 500] for start in range(0, 40_000, 500) for memory in memories]
        await pair.copy(src, dst)
        for memory in memories:
            assert_same(memory.dst_bytes[:40_000], memory.src_bytes[:40_000])


@pytest.mark.parametrize("put", [True, False])
async def test_a_packed_copy_to_another_process_is_cancelled_quietly(put: bool) -> None:
    async with agent_process("far", nbytes=LARGE) as far, _near("packed") as near:
        mine = await asyncio.to_thread(pattern, LARGE, 5)
        here = await near.register(mine)
        remote = await _connected(near, far)
        sides = (here, remote) if put else (remote, here)
        cancelled = 0
        for step in range(6):
            task = asyncio.ensure_future(near.transfer(*sides))
            await asyncio.wait([task], timeout=0.001 * step)
            cancelled += task.cancel()
            await asyncio.wait([task])
            if put:
                before = (await far.order("digest"))["digest"]
                mine[:] = step
                assert (await far.order("digest"))["digest"] == before
            else:
                await Canary(mine).watch()
        assert cancelled
        await near.transfer(*sides)


async def test_a_stopped_peer_is_copied_to_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ways, "choose", lambda *_, **__: PACKED)
    async with agent_process("far", nbytes=LARGE) as far, _near(None) as near:
        here = await near.register(np.zeros(LARGE, np.uint8))
        remote = await _connected(near, far)
        await near.transfer(here, remote)
        far.stop()
        try:
            async with asyncio.timeout(20):
                await near.transfer(here, remote)
        finally:
            far.resume()
        assert (await far.order("digest"))["digest"] == hashlib.sha256(bytes(LARGE)).hexdigest()


async def test_a_packed_copy_to_a_stopped_peer_is_cancelled_and_the_peer_goes_on() -> None:
    async with agent_process("far", nbytes=LARGE) as far, _near("packed") as near:
        here = await near.register(np.zeros(LARGE, np.uint8))
        remote = await _connected(near, far)
        await near.transfer(here, remote)
        here.owner[:] = 1  # type: ignore[index]
        far.stop()
        try:
            task = asyncio.ensure_future(near.transfer(here, remote))
            done, _ = await asyncio.wait([task], timeout=0.2)
            assert not done
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=10)
            assert done
            assert task.cancelled()
        finally:
            far.resume()
        # What had been posted was taken back.
        assert (await far.order("digest"))["digest"] == hashlib.sha256(bytes(LARGE)).hexdigest()
        await near.transfer(here, remote)
        assert (await far.order("digest"))["digest"] == hashlib.sha256(b"\1" * LARGE).hexdigest()


async def _stuck(near: Agent, far: AgentProcess, here: MemoryRegion, remote: RemoteRegion) -> Transfer:
    """Stop the peer while its thread copies what we have posted; return the transfer, cancelled, that waits for it."""
    for step in range(200):
        transfer = near.submit(here, remote)
        await _ended(transfer, 0.0005 + 0.0001 * (step % 30))
        far.stop()
        transfer.cancel()
        if not await _ended(transfer, 0.15):
            return transfer
        far.resume()
    pytest.fail("the peer was never stopped while it copied")


async def _ended(transfer: Transfer, seconds: float) -> bool:
    done = asyncio.Event()
    transfer.add_done_callback(lambda _: done.set())
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await done.wait()
    return transfer.done()


async def test_a_put_that_a_stopped_peer_cannot_end_keeps_the_peer_s_memory_and_not_ours() -> None:
    async with agent_process("far", nbytes=LARGE) as far, _near("packed") as near:
        backend = near._backends["samehost"]
        here, remote = await near.register(np.zeros(LARGE, np.uint8)), await _connected(near, far)
        near._dispatcher._scheduler._backends["samehost"].limits = replace(backend.limits, drain_seconds=0.3)
        stuck = await _stuck(near, far, here, remote)
        async with asyncio.timeout(5):
            with pytest.raises(Quarantined, match=r"memory of \['memory'\] is quarantined"):
                await stuck
        assert not here.quarantined
        far.resume()
        await near.transfer(here, remote)
        assert (await far.order("digest"))["digest"] == hashlib.sha256(bytes(LARGE)).hexdigest()


async def test_a_stopped_peer_that_dies_is_quiet_at_once() -> None:
    async with agent_process("far", nbytes=LARGE) as far, _near("packed") as near:
        here, remote = await near.register(np.zeros(LARGE, np.uint8)), await _connected(near, far)
        stuck = await _stuck(near, far, here, remote)
        far.kill()
        async with asyncio.timeout(1):
            with pytest.raises(asyncio.CancelledError):
                await stuck
        assert not here.quarantined


async def test_unregistering_waits_for_copies_and_refuses_those_to_come() -> None:
    async with open_pair(lambda: SameHostBackend(way="packed")) as pair:
        memory = await pair.memory("put", LARGE)

        async def on_and_on() -> None:
            while True:
                for op in pair.ops(memory.src, memory.dst):
                    await pair.ours.copy(op)

        for _ in range(3):
            task = asyncio.create_task(on_and_on())
            await asyncio.wait([task], timeout=0.01)
            await pair.unregister(memory.dst)
            await Canary(memory.dst_bytes, memory.src_bytes).watch()
            with pytest.raises(AccessError, match="it has no such region"):
                await asyncio.wait_for(task, 10)
            memory = await pair.memory("put", LARGE)


async def test_a_peer_that_parts_serves_no_more() -> None:
    async with open_pair(lambda: SameHostBackend(way="packed")) as pair:
        memory = await pair.memory("get", LARGE)

        async def on_and_on() -> None:
            while True:
                for op in pair.ops(memory.src, memory.dst):
                    await pair.ours.copy(op)

        task = asyncio.create_task(on_and_on())
        await asyncio.wait([task], timeout=0.01)
        await pair.theirs.disconnect("ours")
        with pytest.raises((PeerLost, BackendError)):
            await asyncio.wait_for(task, 10)


async def _copied(pair: Pair, text: str, **changes: Any) -> None:
    """Connect anew with a changed description; copies must go the direct way, and `how` must say why."""
    value = {key: item for key, item in (json.loads(pair.theirs.describe()) | changes).items() if item is not None}
    await pair.ours.connect(PeerInfo(THEIRS, pair.incarnation, json.dumps(value).encode(), HOST))
    memory = await pair.memory("put", 1 << 20)
    await pair.copy(memory.src, memory.dst)
    memory.check()
    plan = make_plan(memory.src, memory.dst)
    assert text in pair.ours.how(plan.src, plan.dst)
    assert [cost.way for cost in pair.ours.predict(plan)] == [DIRECT]


async def test_without_the_shared_memory_there_is_the_direct_way() -> None:
    async with open_pair(SameHostBackend) as pair:
        await _copied(pair, "does not offer it", packed=None, identity=None)
        await _copied(pair, "cannot be opened", packed=1_000_000)
        with open(os.devnull, "rb") as other:
            await _copied(pair, "cannot be opened", packed=other.fileno())
        await _copied(pair, "does not offer it", identity=-5)
        await _copied(pair, "does not offer it", packed="17", identity=0)


async def test_one_that_switched_it_off_is_copied_to_directly() -> None:
    pair = Pair(SameHostBackend(), SameHostBackend(way="direct"))
    try:
        await pair.open()
        memory = await pair.memory("get", 1 << 20)
        await pair.copy(memory.src, memory.dst)
        memory.check()
        plan = make_plan(memory.src, memory.dst)
        assert "does not offer it" in pair.ours.how(plan.src, plan.dst)
        strict = SameHostBackend(way="packed")
        await strict.open(Host("strict", "1", asyncio.get_running_loop()))
        await strict.connect(PeerInfo(THEIRS, pair.incarnation, pair.theirs.describe(), HOST))
        with pytest.raises(BackendError, match="there is no packed way"):
            await strict.copy(pair.ops(memory.src, memory.dst)[0])
        await strict.aclose()
    finally:
        await pair.aclose()


def test_there_are_two_ways() -> None:
    with pytest.raises(ConfigurationError, match="'direct', 'packed'"):
        SameHostBackend(way="sideways")


async def test_explain_tells_both_ways_and_what_was_learnt() -> None:
    async with agent_process("far", nbytes=16 << 20) as far, _near(None) as near:
        here = await near.register(np.zeros(16 << 20, np.uint8))
        remote = await _connected(near, far)
        pages = here.pages(np.arange(0, 8192, 2), 1024), remote.pages(np.arange(0, 8192, 2), 1024)
        explained = near.explain(*pages)
        assert [cost.way for cost in explained.costs] == [PACKED, DIRECT]
        assert explained.how == PACKED
        assert f"by samehost ({PACKED})" in str(explained)
        assert f"expected: {PACKED}" in str(explained)
        assert f"otherwise: {DIRECT}" in str(explained)
        for _ in range(4):
            await near.transfer(*pages)
        learnt = near.explain(*pages).costs
        # Packed ops that map the shared memory are not learnt from, and each transfer may be cut for every lane.
        assert 3 <= sum(cost.samples for cost in learnt) < 4 * SameHostBackend().limits.lanes
        assert {cost.way: cost.cost for cost in learnt} != {cost.way: cost.cost for cost in explained.costs}
        assert near.explain(here[0:4096], remote[0:4096]).how == DIRECT


async def test_small_copies_of_very_many_segments_do_not_hold_up_the_loop() -> None:
    async with open_pair(SameHostBackend) as pair:
        memory = await pair.memory("put", 64 << 10)
        (op,) = pair.ops(memory.src.pages(np.arange(0, 32 << 10)[::-1], 1), memory.dst.pages(np.arange(0, 64 << 10, 2), 1))
        assert pair.ours.copy_now(op) is False
        await pair.ours.copy(op)
        assert_same(memory.dst_bytes[::2], memory.src_bytes[: 32 << 10][::-1])


async def test_what_should_take_too_long_for_the_loop_is_tried_there_again_and_again_and_more_and_more_seldom() -> None:
    async with open_pair(SameHostBackend) as pair:
        memory = await pair.memory("put", samehost.NOW_NBYTES)
        (op,) = pair.ops(memory.src, memory.dst)
        process = pair.ours._processes[THEIRS]
        assumed = samehost._assumed(op)

        def until_tried(seconds: float) -> int:
            """Let threads take what a loop's copy may not; then try all that may be tried; return how many went to threads."""
            handed = 0
            while not process.is_short(op.put, assumed):
                process.took(op, samehost.TRY_SECONDS * 0.9, on_loop=False)
                handed += 1
            for number in range(samehost.TRIES):
                assert number == 0 or process.is_short(op.put, assumed)
                # What comes before the last says nothing.
                process.took(op, seconds if number == samehost.TRIES - 1 else samehost.TRY_SECONDS, on_loop=True)
            return handed

        process.pace[op.put] = samehost.TRY_SECONDS * 0.9 / assumed
        slow = samehost.NOW_SECONDS * 1.5
        assert [until_tried(slow) for _ in range(4)] == [8, 16, 32, 64]
        assert until_tried(samehost.NOW_SECONDS / 2) == 128
        assert process.is_short(op.put, assumed)
        assert pair.ours.copy_now(op) is True
        assert_same(memory.dst_bytes, memory.src_bytes)
        # What is hopeless is not tried.
        process.pace[op.put] = 1.01 * samehost.TRY_SECONDS / assumed
        assert not any(process.is_short(op.put, assumed) for _ in range(3 * samehost.TRY_AFTER))


async def test_many_threads_copy_at_once() -> None:
    async with open_pair(SameHostBackend) as pair:
        memory = await pair.memory("put", 64)
        (op,) = pair.ops(memory.src, memory.dst)

        def copy() -> None:
            for _ in range(3000):
                assert pair.ours.copy_now(op) is True

        await asyncio.gather(*(asyncio.to_thread(copy) for _ in range(4)))
        assert_same(memory.dst_bytes, memory.src_bytes)


async def test_closing_unmaps_the_shared_memory() -> None:
    async with open_pair(lambda: SameHostBackend(way="packed")) as pair:
        memory = await pair.memory("put", 1 << 20)
        await pair.copy(memory.src, memory.dst)
        assert "nixl-packed" in _maps()
    assert "nixl-packed" not in _maps()


def _maps() -> str:
    return Path("/proc/self/maps").read_text()


# The native engine, told what no caller of ours would say.

NONCE = b"0123456789abcdef"


class _Served:
    """A serving side and an asking one in this process; `memory` is registered under key 7, and read-only under 8."""

    def __init__(self) -> None:
        self.memory, self.mine = pattern(1 << 20, 1), pattern(1 << 20, 2)
        self.server = lib.nx_packed_open(1, NONCE)
        at = self.memory.ctypes.data
        assert lib.nx_packed_register(self.server, 7, at, 1 << 20, False) == 0
        assert lib.nx_packed_register(self.server, 8, at, 1 << 20, True) == 0
        assert lib.nx_packed_register(self.server, 7, at, 1 << 20, False) == -errno.EEXIST
        assert lib.nx_packed_accept(self.server, 5) == 0
        self.peer = self.dial(5)
        assert lib.nx_packed_ready(self.peer) == 1

    def dial(self, identity: int, nonce: bytes = NONCE, fd: int | None = None) -> Any:
        error = ffi.new("int *")
        found = lib.nx_packed_dial(os.getpid(), lib.nx_packed_fd(self.server) if fd is None else fd, nonce, identity, error)
        return ffi.gc(found, lib.nx_packed_hangup) if found else error[0]

    def move(self, put: bool, remote: list[int], lengths: list[int], key: int = 7) -> int:
        arrays = [np.array(column, np.int64) for column in (remote, lengths)]
        local = self.mine.ctypes.data + np.arange(len(remote), dtype=np.int64) * 4096
        keys, spent = struct.pack("<Q", key), ffi.new("int64_t *")
        pointers = int64(local), int64(arrays[0]), int64(arrays[1])
        return int(lib.nx_packed_move(self.peer, put, len(remote), *pointers, ffi.NULL, keys, ffi.NULL, 0, spent))

    def close(self) -> None:
        lib.nx_packed_close(self.server)
        self.peer = None


@pytest.fixture
def served() -> Any:
    served = _Served()
    yield served
    served.close()


@pytest.mark.parametrize("put", [True, False])
def test_what_lies_outside_is_refused_and_nothing_of_the_slot_is_copied(served: _Served, put: bool) -> None:
    at, whole, mine = served.memory.ctypes.data, served.memory.copy(), served.mine.copy()
    for remote, lengths in (
        ([at, at + (1 << 20) - 99], [100, 100]),
        ([at, at - 1], [100, 100]),
        ([at, -4096], [100, 100]),
        ([at, (1 << 63) - 50], [100, 100]),
        ([at, at + (1 << 20)], [100, 1]),
        ([at, 0], [100, 1]),
    ):
        assert served.move(put, remote, lengths) == 2
    assert served.move(put, [at], [100], key=9) == 1
    if put:
        assert served.move(put, [at], [100], key=8) == 3
    assert_same(served.memory, whole)
    assert_same(served.mine, mine)
    assert served.move(put, [at], [100]) == 0


def test_malformed_lists_are_refused_and_the_lane_goes_on(served: _Served) -> None:
    entries = {number: target for number in os.listdir("/proc/self/fd") if "nixl-packed" in (target := _target(number))}
    channel = max(map(int, entries))
    at, whole = served.memory.ctypes.data, served.memory.copy()
    with mmap.mmap(channel, 0) as shared:
        n_slots = 0
        for status, put, n_segments, n_keys, nbytes, segment in (
            (16, 1, 1 << 31, 1, 100, (at, 100, 0)),
            (16, 1, 0, 1, 100, (at, 100, 0)),
            (16, 1, 1, 17, 100, (at, 100, 0)),
            (16, 1, 1, 0, 100, (at, 100, 0)),
            (16, 2, 1, 1, 100, (at, 100, 0)),
            (16, 1, 1, 1, 1 << 40, (at, 100, 0)),
            (16, 1, 1, 1, 100, (at, 99, 0)),
            (16, 1, 1, 1, 100, (at, 101, 0)),
            (16, 1, 1, 1, 100, (at, 100, 1)),
            (16, 1, 1, 1, 100, (at, 0, 0)),
            (2, 1, 1, 1, 100, (at - 1, 100, 0)),
        ):
            slots = _slots(shared)
            slot = slots[n_slots % len(slots)]
            shared[slot + 256 : slot + 272] = struct.pack("<QII", *segment)
            shared[slot + 4 : slot + 40] = struct.pack("<IIIIIQQ", 99, put, n_segments, n_keys, 0, nbytes, 7)[:36]
            shared[slot : slot + 4] = struct.pack("<I", 1)
            n_slots += 1
            # The asking side goes on behind it, which wakes the serving thread.
            shared[LANE + 12 : LANE + 16] = struct.pack("<I", n_slots)
            served.peer = served.dial(5)
            assert lib.nx_packed_ready(served.peer) == 1
            assert served.move(True, [at], [100]) == 0
            n_slots += 1
            assert struct.unpack("<II", shared[slot : slot + 8]) == (3, status)
            shared[slot : slot + 4] = bytes(4)
    whole[:100] = served.mine[:100]
    assert_same(served.memory, whole)


LANE = 4096


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def _slots(shared: mmap.mmap) -> list[int]:
    slot_nbytes = 256 + (4096 * 16) + (256 << 10)
    return [LANE + 4096 + i * slot_nbytes for i in range((len(shared) - LANE - 4096) // slot_nbytes)]


def test_who_was_not_accepted_has_no_lane(served: _Served) -> None:
    assert lib.nx_packed_ready(served.dial(6)) == 0
    assert lib.nx_packed_dismiss(served.server, 5, False) == 0
    assert lib.nx_packed_ready(served.dial(5)) == 0
    assert served.move(True, [served.memory.ctypes.data], [100]) == -errno.ENOTCONN
    assert lib.nx_packed_ready(served.peer) == -errno.ENOTCONN
    assert lib.nx_packed_dismiss(served.server, 5, True) == 0


def test_a_file_that_is_not_the_peers_is_not_used(served: _Served) -> None:
    assert served.dial(5, nonce=b"x" * 16) == -errno.EPROTO
    assert served.dial(5, fd=1 << 20) == -errno.ENOENT
    made = os.memfd_create("other", os.MFD_CLOEXEC)
    try:
        os.ftruncate(made, 1 << 16)
        assert served.dial(5, fd=made) == -errno.EPROTO
    finally:
        os.close(made)


def test_a_lost_peer_ends_what_waits_for_it(served: _Served) -> None:
    lib.nx_packed_lost(served.peer)
    assert served.move(True, [served.memory.ctypes.data], [100]) == -errno.ESRCH


def test_an_unregistered_region_is_refused(served: _Served) -> None:
    at = served.memory.ctypes.data
    assert lib.nx_packed_unregister(served.server, 7, False) == 0
    assert served.move(False, [at], [100]) == 1
    assert served.move(False, [at], [100], key=8) == 0
    assert lib.nx_packed_unregister(served.server, 8, True) == 0
    assert lib.nx_packed_unregister(served.server, 8, True) == 0
    assert served.move(False, [at], [100], key=8) == 1


def test_the_assumed_costs_name_both_ways() -> None:
    assert [way.name for way in samehost.ASSUMED] == [DIRECT, PACKED]
