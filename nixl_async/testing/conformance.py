"""The conformance suite: what every backend must do, whatever it moves bytes with. See `BackendTests`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from nixl_async.backend import Backend, Begun, Op, PeerInfo, Revocation
from nixl_async.errors import AccessError, NixlError, PeerLost, TransferError
from nixl_async.testing.cancelling import cancel_after, cancel_at_await
from nixl_async.testing.pair import HOST, THEIRS, Copy, Pair, open_pair
from nixl_async.testing.patterns import CANARY, Canary, assert_same, pattern
from nixl_async.testing.process import make_backend, process_peer

if TYPE_CHECKING:
    from nixl_async.testing.patterns import Bytes

PROMPT_SECONDS = 1.0
PATIENCE_SECONDS = 30.0
MAX_AWAITS = 20


class BackendTests:
    """Subclass this in a test file and set `backend`; a backend is right when all of it passes.

    class TestMine(BackendTests):
        backend = "mine"                        # what load_backend takes, or "module:Class"
        options = {"port": 0}                   # given to its constructor
        directions = ("put", "get", "local")    # which of them it offers

    The promises that not every transport can keep are switched off by the attributes below; say why where you do.
    """

    backend: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    directions: ClassVar[tuple[str, ...]] = ("put", "get")
    processes: ClassVar[bool] = True
    """It reaches peers in other processes of this host."""
    refuses_unregistered: ClassVar[bool] = True
    """The peer's side refuses memory that it has unregistered."""
    checks_bounds: ClassVar[bool] = True
    """The peer's side refuses addresses outside what it registered."""
    serves_while_stuck: ClassVar[bool] = True
    """A peer whose interpreter is stuck in Python code still serves."""
    large_nbytes: ClassVar[int] = 24 << 20
    """Enough that a copy can be cancelled halfway."""

    def make_backend(self) -> Backend:
        """Make one instance; called several times a test."""
        return make_backend(self.backend, self.options)

    @pytest.fixture
    async def pair(self) -> AsyncIterator[Pair]:
        """Connect two instances within this process."""
        async with open_pair(self.make_backend) as pair:
            yield pair

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test that has a direction in every direction that the backend offers."""
        if "direction" in metafunc.fixturenames:
            metafunc.parametrize("direction", self.directions)

    # Bytes arrive.

    async def test_whole_region(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 3 << 20)
        await pair.copy(memory.src, memory.dst)
        memory.check()

    async def test_odd_sizes_and_offsets(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 1 << 18)
        for nbytes in (1, 2, 3, 7, 63, 64, 65, 4095, 4096, 4097, 65537):
            for src, dst in ((0, 0), (1, 0), (0, 1), (4093, 777)):
                memory.dst_bytes[:] = CANARY
                expected = memory.dst_bytes.copy()
                expected[dst : dst + nbytes] = memory.src_bytes[src : src + nbytes]
                await pair.copy(memory.src[src : src + nbytes], memory.dst[dst : dst + nbytes])
                assert_same(memory.dst_bytes, expected, f"{nbytes} bytes from {src} to {dst}")

    async def test_first_and_last_byte(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 70_001)
        expected = memory.dst_bytes.copy()
        expected[0], expected[-1] = memory.src_bytes[-1], memory.src_bytes[0]
        await pair.copy(memory.src.ranges([0, 70_000], 1), memory.dst.ranges([70_000, 0], 1))
        assert_same(memory.dst_bytes, expected)

    @pytest.mark.parametrize("page_nbytes", [1, 1000, 4096, 9_000])
    async def test_a_thousand_random_pages(self, pair: Pair, direction: str, page_nbytes: int) -> None:
        memory = await pair.memory(direction, 1500 * page_nbytes)
        random = np.random.default_rng(page_nbytes)
        mine, theirs = random.permutation(1500)[:1000], random.permutation(1500)[:1000]
        expected = memory.dst_bytes.copy().reshape(1500, -1)
        expected[theirs] = memory.src_bytes.reshape(1500, -1)[mine]
        await pair.copy(memory.src.pages(mine, page_nbytes), memory.dst.pages(theirs, page_nbytes))
        assert_same(memory.dst_bytes, expected.ravel())

    async def test_pages_of_different_sizes_on_the_two_sides(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 96 * 4096)
        random = np.random.default_rng(5)
        small, large = random.permutation(96 * 4), random.permutation(6)
        expected = memory.dst_bytes.copy().reshape(6, -1)
        expected[large] = memory.src_bytes.reshape(96 * 4, -1)[small].reshape(6, -1)
        await pair.copy(memory.src.pages(small, 1024), memory.dst.pages(large, 16 * 4096))
        assert_same(memory.dst_bytes, expected.ravel())

    async def test_several_regions_on_each_side(self, pair: Pair, direction: str) -> None:
        first, second, third = [await pair.memory(direction, n, seed=n) for n in (50_000, 30_001, 20_003)]
        src = [first.src[:], third.src[100:], second.src[1:], third.src[:100], second.src[:1]]
        dst = [third.dst[:], second.dst[:], first.dst[:]]
        await pair.copy(src, dst)
        sent = [first.src_bytes, third.src_bytes[100:], second.src_bytes[1:], third.src_bytes[:100], second.src_bytes[:1]]
        received = [third.dst_bytes, second.dst_bytes, first.dst_bytes]
        assert_same(np.concatenate(received), np.concatenate(sent))

    async def test_many_ops_at_once(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 64 * 20_000)
        order = np.random.default_rng(1).permutation(64)
        ops = [op for i in order for op in pair.ops(memory.src.pages([i], 20_000), memory.dst.pages([i], 20_000))]
        room = asyncio.Semaphore(pair.ours.limits.max_ops)

        async def copy(op: Any) -> None:
            async with room:
                await pair.ours.copy(op)

        await asyncio.gather(*(copy(op) for op in ops))
        memory.check()

    async def test_both_directions_at_once(self, pair: Pair) -> None:
        memories = [await pair.memory(direction, 4 << 20, seed=i) for i, direction in enumerate(self.directions)]
        await asyncio.gather(*(pair.copy(memory.src, memory.dst) for memory in memories))
        for memory in memories:
            memory.check()

    async def test_small_copies_at_once(self, pair: Pair, direction: str) -> None:
        nbytes = min(pair.ours.limits.inline_nbytes, 64 << 10)
        if nbytes == 0:
            pytest.skip("this backend copies nothing at once")
        memory = await pair.memory(direction, nbytes)
        (op,) = pair.ops(memory.src, memory.dst)
        await _copy_at_once(pair.ours, op)
        memory.check()

    async def test_a_prepared_plan_is_copied_as_often_as_asked(self, pair: Pair, direction: str) -> None:
        n = 400
        memory, order = await pair.memory(direction, n * 1000), np.random.default_rng(2).permutation(n)
        ops = pair.ops(memory.src.pages(order, 1000), memory.dst.pages(order, 1000))
        for op in ops:
            await pair.ours.prepare(op)
        for _ in range(2):
            memory.dst_bytes[:] = 0
            for op in ops:
                await _copy_at_once(pair.ours, op)
            memory.check()

    async def test_it_offers_its_directions(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 4096)
        (op,) = pair.ops(memory.src, memory.dst)
        assert pair.ours.refusal(op.plan.src, op.plan.dst) is None

    # Promise 2: quiet when `copy` ends, however it ends.

    async def test_cancel_at_every_await(self, pair: Pair, direction: str) -> None:
        memory = await self._large(pair, direction)
        for at in range(MAX_AWAITS):
            for times in (1, 3):
                ops = pair.ops(memory.src, memory.dst)
                reached = await cancel_at_await(pair.ours.copy(ops[0]), at, times=times)
                await Canary(memory.dst_bytes, memory.src_bytes).watch()
            if not reached:
                break
        await self._still_works(pair, direction)

    async def test_cancel_while_bytes_move(self, pair: Pair, direction: str) -> None:
        memory = await self._large(pair, direction)
        began = time.perf_counter()
        await pair.copy(memory.src, memory.dst)
        seconds = time.perf_counter() - began
        cancelled = 0
        for step in range(8):
            cancelled += await cancel_after(pair.copy(memory.src, memory.dst), seconds * step / 8)
            await Canary(memory.dst_bytes, memory.src_bytes).watch()
        assert cancelled, "no copy was cancelled halfway; raise large_nbytes"
        await self._still_works(pair, direction)

    async def test_timeout_while_bytes_move(self, pair: Pair, direction: str) -> None:
        memory = await self._large(pair, direction)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.0005):
                while True:
                    await pair.copy(memory.src, memory.dst)
        await Canary(memory.dst_bytes, memory.src_bytes).watch()
        await self._still_works(pair, direction)

    async def test_cancelling_one_op_leaves_the_others(self, pair: Pair, direction: str) -> None:
        memory = await self._large(pair, direction)
        other = await pair.memory(direction, 1 << 20, seed=7)
        victim = asyncio.create_task(pair.copy(memory.src, memory.dst))
        survivor = asyncio.create_task(pair.copy(other.src, other.dst))
        await asyncio.sleep(0)
        victim.cancel()
        await asyncio.wait([victim, survivor])
        survivor.result()
        other.check()
        await Canary(memory.dst_bytes, memory.src_bytes).watch()

    # Misuse and failure.

    async def test_a_closed_backend_refuses(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 4096)
        ops = pair.ops(memory.src, memory.dst)
        await pair.close_ours()
        with pytest.raises(NixlError):
            await pair.ours.copy(ops[0])
        assert_same(memory.dst_bytes, np.full(4096, CANARY, np.uint8))

    async def test_an_unknown_peer_is_refused(self, pair: Pair, direction: str) -> None:
        if direction == "local":
            pytest.skip("there is no peer")
        memory = await pair.memory(direction, 4096)
        for region in (memory.src, memory.dst):
            region.peer = None if region.peer is None else "stranger"
        (op,) = pair.ops(memory.src, memory.dst)
        if pair.ours.refusal(op.plan.src, op.plan.dst) is None:
            with pytest.raises(TransferError):
                await pair.ours.copy(op)

    async def test_unregistered_memory_is_refused(self, pair: Pair, direction: str) -> None:
        if direction == "local" or not self.refuses_unregistered:
            pytest.skip("nobody else's memory, or the backend says it cannot")
        memory = await pair.memory(direction, 4096)
        await pair.unregister(memory.src if direction == "get" else memory.dst)
        with pytest.raises(TransferError):
            await pair.copy_first(memory)
        assert_same(memory.dst_bytes, np.full(4096, CANARY, np.uint8))
        await self._still_works(pair, direction)

    async def test_addresses_outside_the_registered_are_refused(self, pair: Pair, direction: str) -> None:
        if direction == "local" or not self.checks_bounds:
            pytest.skip("nobody else's memory, or the backend says it cannot")
        whole = pattern(8192)
        mine = np.full(8192, CANARY, np.uint8)
        theirs = await pair.register(whole[:4096], remote=True, claim_nbytes=8192)
        ours = await pair.register(mine)
        before = whole.copy()
        src, dst = (theirs, ours) if direction == "get" else (ours, theirs)
        with pytest.raises(TransferError):
            await pair.copy_first(Copy(mine, whole, src, dst))
        assert_same(whole[4096:], before[4096:], "memory behind the region")
        await self._still_works(pair, direction)

    async def test_malformed_descriptions_are_refused(self, pair: Pair) -> None:
        if not pair.ours.remote:
            pytest.skip("it connects to nobody")
        good = pair.theirs.describe_to("ours", pair.our_incarnation)
        for description in (b"", b"\0", b"{}", b"[]", b"\xff" * 64, good[:-1][: len(good) // 2], b"x" * 100_000):
            with pytest.raises(NixlError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await pair.ours.connect(PeerInfo("malformed", "1", description, HOST))
        await self._still_works(pair, self.directions[0])

    async def test_a_peer_that_comes_back(self, pair: Pair, direction: str) -> None:
        await self._still_works(pair, direction)
        for _ in range(2):
            if direction == "local":
                return
            await pair.replace_theirs(self.make_backend())
            await self._still_works(pair, direction)
        assert all(peer != THEIRS for peer, _ in pair.lost), "parting was reported as a loss"

    async def test_a_parted_peer_is_refused(self, pair: Pair, direction: str) -> None:
        if direction == "local":
            pytest.skip("there is no peer")
        memory = await pair.memory(direction, 4096)
        (op,) = pair.ops(memory.src, memory.dst)
        await asyncio.gather(pair.ours.disconnect(THEIRS), pair.theirs.disconnect("ours"))
        if pair.ours.refusal(op.plan.src, op.plan.dst) is None:
            with pytest.raises(TransferError):
                await pair.ours.copy(op)
        assert_same(memory.dst_bytes, np.full(4096, CANARY, np.uint8))

    # Keys that are one peer's.

    async def test_a_granted_key_copies_until_it_is_revoked(self, pair: Pair, direction: str) -> None:
        far, near = self._far(direction)
        granted, revoke = await pair.lend(far)
        here = await pair.register(near)
        sides = (here, granted) if direction == "put" else (granted, here)
        await pair.copy(*sides)
        assert_same(near, far)
        await revoke()
        canary = Canary(far)
        if pair.theirs.revocation is Revocation.ENFORCED:
            for op in pair.ops(*sides):
                with pytest.raises(AccessError):
                    await pair.ours.copy(op)
        canary.check()
        # What was registered for all is there as before.
        memory = await pair.memory(direction, 4096)
        await pair.copy(memory.src, memory.dst)
        memory.check()

    async def test_nothing_moves_once_a_key_is_revoked(self, pair: Pair, direction: str) -> None:
        far, near = self._far(direction, self.large_nbytes)
        granted, revoke = await pair.lend(far)
        here = await pair.register(near)
        sides = (here, granted) if direction == "put" else (granted, here)
        if pair.theirs.revocation is not Revocation.ENFORCED:
            pytest.skip("it is the peer that stops")
        task = asyncio.ensure_future(pair.copy(*sides))
        await asyncio.wait([task], timeout=0.003)
        await revoke()
        await Canary(far).watch()
        with contextlib.suppress(ExceptionGroup):
            await task

    async def test_a_key_granted_for_reading(self, pair: Pair) -> None:
        if "put" not in self.directions:
            pytest.skip("it never writes to a peer")
        far, near = self._far("put")
        granted, revoke = await pair.lend(far, writable=False)
        here, canary = await pair.register(near), Canary(far)
        if pair.theirs.revocation is Revocation.ENFORCED:
            (op, *_) = pair.ops(here, granted)
            with pytest.raises(AccessError):
                await pair.ours.copy(op)
        canary.check()
        await revoke()

    async def test_a_dismissed_peer_is_let_in_no_more(self, pair: Pair) -> None:
        if pair.theirs.revocation is not Revocation.ENFORCED:
            pytest.skip("whoever was told of it can reach it")
        description = pair.theirs.describe_to("ours", pair.our_incarnation)
        await pair.theirs.dismiss("ours", pair.our_incarnation)
        await pair.ours.disconnect(THEIRS)
        with pytest.raises(NixlError):
            await pair.ours.connect(PeerInfo(THEIRS, pair.incarnation, description, HOST))
        other = pair.theirs.describe_to("another", pair.our_incarnation)
        with pytest.raises(NixlError):
            await pair.ours.connect(PeerInfo(THEIRS, pair.incarnation, other, HOST))

    # Peers in other processes.

    async def test_another_process(self, pair: Pair) -> None:
        self._needs_processes()
        async with process_peer(pair, self.backend, self.options, 2 << 20) as peer:
            got = np.zeros(2 << 20, np.uint8)
            await pair.copy(peer.region, await pair.register(got))
            assert_same(got, pattern(2 << 20, 1), "what was read")
            sent = pattern(2 << 20, 2)
            await pair.copy(await pair.register(sent), peer.region)
            assert await peer.digest() == hashlib.sha256(sent.tobytes()).hexdigest()

    @pytest.mark.parametrize("when", ["before", "during"])
    @pytest.mark.parametrize("put", [True, False])
    async def test_a_killed_peer_is_lost_promptly(self, pair: Pair, put: bool, when: str) -> None:
        self._needs_processes()
        async with process_peer(pair, self.backend, self.options, self.large_nbytes) as peer:
            memory = pattern(self.large_nbytes)
            region = await pair.register(memory)
            sides = (region, peer.region) if put else (peer.region, region)

            async def copy_on_and_on() -> None:
                while True:
                    for op in pair.ops(*sides):
                        await pair.ours.copy(op)

            task = asyncio.create_task(copy_on_and_on())
            if when == "during":
                await asyncio.wait([task], timeout=0.02)
            else:
                task.cancel()
                await asyncio.wait([task])
            peer.kill()
            await peer.process.wait()
            if when == "before":
                task = asyncio.create_task(copy_on_and_on())
            done, _ = await asyncio.wait([task], timeout=PROMPT_SECONDS)
            task.cancel()
            assert done, f"the copy did not fail within {PROMPT_SECONDS} s of the peer's death"
            assert isinstance(task.exception(), PeerLost), task.exception()
            await Canary(memory).watch()

    async def test_a_stuck_peer_still_serves(self, pair: Pair) -> None:
        self._needs_processes()
        if not self.serves_while_stuck:
            pytest.skip("the backend says it cannot")
        async with process_peer(pair, self.backend, self.options, 8 << 20) as peer:
            memory = np.zeros(8 << 20, np.uint8)
            region = await pair.register(memory)
            spun = await peer.spin(2.0)
            await pair.copy(peer.region, region)
            assert_same(memory, pattern(8 << 20, 1))
            await pair.copy(region, peer.region)
            assert not spun.done(), "the copies waited for the peer's interpreter"
            await spun

    # Cost.

    async def test_idle_costs_nothing(self, pair: Pair) -> None:
        await self._still_works(pair, self.directions[0])
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(0.5)
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        assert spent < 0.05, f"two idle backends spent {spent:.3f} s of CPU in 0.5 s"

    async def test_closing_leaves_nothing_behind(self) -> None:
        counts = []
        for _ in range(4):
            async with open_pair(self.make_backend) as pair:
                await self._still_works(pair, self.directions[0])
            counts.append(_footprint())
        deadline = time.monotonic() + 2.0
        # The first time, libraries open what they keep for good. A thread that was joined is listed a moment longer.
        while any(now > then for now, then in zip(counts[-1], counts[1], strict=True)) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            counts[-1] = _footprint()
        left = [now - then for now, then in zip(counts[-1], counts[1], strict=True)]
        assert max(left) <= 0, f"file descriptors, Python's threads and all threads after each round: {counts}"

    # Inside.

    async def _large(self, pair: Pair, direction: str) -> Copy:
        return await pair.memory(direction, self.large_nbytes, seed=3)

    async def _still_works(self, pair: Pair, direction: str) -> None:
        memory = await pair.memory(direction, 100_003, seed=9)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await pair.copy(memory.src, memory.dst)
        memory.check()

    @staticmethod
    def _far(direction: str, nbytes: int = 3 << 20) -> tuple[Bytes, Bytes]:
        """Return memory for the peer, and as much of ours, to be copied from or to it."""
        if direction == "local":
            pytest.skip("there is no peer")
        full, empty = pattern(nbytes), np.zeros(nbytes, np.uint8)
        return (empty, full) if direction == "put" else (full, empty)

    def _needs_processes(self) -> None:
        if not self.processes:
            pytest.skip("the backend reaches no other process")


async def _copy_at_once(backend: Backend, op: Op) -> None:
    copied = backend.copy_now(op)
    if isinstance(copied, Begun):
        await copied.future
    elif not copied:
        await backend.copy(op)


def _footprint() -> tuple[int, int, int]:
    """Return how many file descriptors, threads of Python's, and threads this process has, but for those of the loop's executor."""
    lasting = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    n_threads = len(os.listdir("/proc/self/task"))
    return len(os.listdir("/proc/self/fd")), threading.active_count() - lasting, n_threads - lasting
