"""Transfers that are compared end to end: what is found, what is refused, and what happens when somebody goes meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import (
    Agent,
    ConfigurationError,
    IntegrityError,
    MemoryKind,
    MemoryRegion,
    MissingDependency,
    Peer,
    PeerLost,
    RemoteRegion,
    TransferState,
    load_backend,
)
from nixl_async.backend import Op
from nixl_async.backends.posix import PosixBackend
from nixl_async.checksums import MAX_PIECES, PAGE_NBYTES, RANGE, Request, decode_answer, encode_sums
from nixl_async.peers import encode_announcement
from nixl_async.staging import StagingBackend
from nixl_async.testing import FaultyBackend, assert_same, pattern
from nixl_async.verification import MAX_ASKED, MAX_LISTED, _Stop
from nixl_async.wire import FrameType, encode_frame
from tests.agents import TOKEN, AgentProcess, agent_process, connect, known
from tests.strangers import Stranger, stranger

PAGE = 4096
N_PAGES = 256
NBYTES = PAGE * N_PAGES
ROUTES = ["samehost", "tcp"]


class Both:
    """An agent here with a backend that can be made to err, one in another process, and a region of each."""

    def __init__(
        self, near: Agent, far: AgentProcess, peer: Peer, backend: FaultyBackend, memory: Any, here: MemoryRegion
    ) -> None:
        self.near, self.far, self.peer, self.backend, self.memory, self.here = near, far, peer, backend, memory, here
        self.there: RemoteRegion = peer.region("memory")
        rng = np.random.default_rng(1)
        self.mine, self.theirs = rng.permutation(here.nbytes // PAGE), rng.permutation(here.nbytes // PAGE)

    def places(self, put: bool) -> tuple[Any, Any]:
        """Return pages in an order in which no two are neighbours on both sides: each is a segment."""
        sides = self.here.pages(self.mine, PAGE), self.there.pages(self.theirs, PAGE)
        return sides if put else sides[::-1]


@asynccontextmanager
async def both(route: str = "samehost", nbytes: int = NBYTES, **options: Any) -> AsyncIterator[Both]:
    backend = FaultyBackend(load_backend(route))
    memory = await asyncio.to_thread(pattern, nbytes, 5)
    async with agent_process("far", nbytes=nbytes, **options) as far, Agent("near", token=TOKEN, backends=[backend]) as near:
        here = await near.register(memory)
        yield Both(near, far, await near.connect(far.address), backend, memory, here)


@contextmanager
def raises_pages(*pages: int) -> Any:
    with pytest.raises(IntegrityError) as caught:
        yield caught
    assert caught.value.pages == tuple(sorted(pages))
    assert caught.value.count == len(pages)


@pytest.mark.parametrize("algorithm", ["crc32c", "xxh3"])
@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("route", ROUTES)
async def test_what_is_right_passes(route: str, put: bool, algorithm: str) -> None:
    async with both(route) as it:
        await it.far.order("connect", host="127.0.0.1", port=(await it.near.serve())[1])
        result = await it.near.transfer(*it.places(put), verify=algorithm, notify=b"there")
        assert (result.nbytes, result.route, result.attempts) == (NBYTES, route, 1)
        assert (await it.far.order("listen", prefix="there"))["from"] == "near"
        again = await it.near.prepare(*it.places(put))
        await again.transfer(verify=algorithm)
        transfer = again.submit(verify=algorithm)
        await transfer
        assert transfer.state is TransferState.DONE
        assert [event for _, _, event, _ in transfer.history] == ["admit", "complete"]


@pytest.mark.parametrize("put", [True, False])
@pytest.mark.parametrize("route", ROUTES)
async def test_misdirected_and_missing_pages_are_named(route: str, put: bool) -> None:
    async with both(route) as it:
        notes = it.near.serve()
        await it.far.order("connect", host="127.0.0.1", port=(await notes)[1])
        with it.backend.misdirect(17, 200):
            transfer = it.near.submit(*it.places(put), verify="crc32c", notify=b"no")
            with raises_pages(17, 200) as caught:
                await transfer
        error = caught.value
        assert (transfer.state, error.algorithm, error.peer, error.transfer_id) == (
            TransferState.FAILED,
            "crc32c",
            "far",
            transfer.id,
        )
        assert (error.backend, error.retryable) == (route, False)
        assert error.history[-1][3] == "FAILED"
        first = int(it.mine[17]) * PAGE
        assert f"2 of {N_PAGES} pages differ" in str(error)
        assert f"page 17: 'region-1' [{first}:{first + PAGE}]" in str(error) or f"and 'region-1' [{first}:" in str(error)
        assert it.backend.copies == 1
        # Other bytes than those that are there already, or nobody could tell.
        it.memory[:] = pattern(NBYTES, 6)
        with it.backend.leave_out(99), raises_pages(99):
            await it.near.transfer(*it.places(put), verify="xxh3", notify=b"no")
        await it.near.transfer(*it.places(put), verify="xxh3", notify=b"yes")
        assert bytes.fromhex((await it.far.order("listen"))["payload"]) == b"yes"


@pytest.mark.parametrize("put", [True, False])
async def test_a_page_that_is_written_to_meanwhile_is_torn(put: bool) -> None:
    async with both() as it:
        at = 0

        async def write(op: Op) -> None:
            await it.far.order("flip", at=at)

        for page in (0, 77, N_PAGES - 1):
            at = int(it.theirs[page]) * PAGE + PAGE - 1
            with it.backend.afterwards(write), raises_pages(page):
                await it.near.transfer(*it.places(put), verify="crc32c")
        await it.near.transfer(*it.places(put), verify="crc32c")


async def test_whole_regions_are_compared_by_the_mebibyte() -> None:
    async with both("tcp", nbytes=(5 << 20) + 10) as it:

        async def write(op: Op) -> None:
            for at in (2 << 20, (5 << 20) + 9):
                await it.far.order("flip", at=at)

        limits = it.backend.limits
        assert limits.max_op_nbytes >= it.here.nbytes
        with it.backend.afterwards(write), raises_pages(2, 5) as caught:
            await it.near.transfer(it.here, it.there, verify="xxh3")
        assert "2 of 6 pages" in str(caught.value)
        assert f"'memory' of 'far' [{5 << 20}:{(5 << 20) + 10}]" in str(caught.value)


@pytest.mark.parametrize("put", [True, False])
async def test_ten_thousand_pages_of_another_process(put: bool) -> None:
    async with both("tcp", nbytes=10_000 * PAGE) as it:
        prepared = await it.near.prepare(*it.places(put))
        left = len(prepared.pieces)

        async def write_when_all_is_there(op: Op) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                for page in (0, 4095, 4096, 9999):
                    await it.far.order("flip", at=int(it.theirs[page]) * PAGE)

        with it.backend.afterwards(write_when_all_is_there), raises_pages(0, 4095, 4096, 9999) as caught:
            await prepared.transfer(verify="xxh3")
        assert "4 of 10000 pages" in str(caught.value)
        await prepared.transfer(verify="xxh3")


async def test_ten_thousand_pages_of_many_regions(agents: Any) -> None:
    a, b = await agents("a", backends=["samehost"]), await agents("b", backends=["samehost"])
    peer = await connect(a, b)
    n_regions, n_pages, page = 50, 200, 1024
    source, target = pattern(n_regions * n_pages * page, 1), np.zeros(n_regions * n_pages * page, np.uint8)
    mine = [await a.register(part, name=f"layer {n}") for n, part in enumerate(np.split(source, n_regions))]
    for n, part in enumerate(np.split(target, n_regions)):
        await b.register(part, name=f"layer {n}")
    await known(a, peer, f"layer {n_regions - 1}")
    rng = np.random.default_rng(3)
    src = [one.pages(rng.permutation(n_pages), page) for one in mine]
    dst = [peer.region(f"layer {n}").pages(rng.permutation(n_pages), page) for n in rng.permutation(n_regions)]
    await a.transfer(src, dst, verify="crc32c")
    back = await a.transfer(dst, src, verify="xxh3")
    assert back.nbytes == len(source)
    wrong = [int(n) for n in rng.choice(n_regions * n_pages, 100, replace=False)]

    async def write() -> None:
        for number in wrong:
            place = dst[number // n_pages]
            layer = int(place.region.name.split()[1])
            target[layer * n_pages * page + int(place.offsets[number % n_pages])] ^= 1

    prepared = await a.prepare(src, dst)
    # What is in place is written to before it is compared: both happen in the next turns of the loop.
    transfer = a.submit(prepared, verify="crc32c")
    while transfer.nbytes_done < transfer.nbytes and not transfer.done():
        await asyncio.sleep(0)
    assert transfer.state is TransferState.ACTIVE
    await write()
    with pytest.raises(IntegrityError, match="100 of 10000 pages differ") as caught:
        await transfer
    assert caught.value.count == 100
    assert caught.value.pages == tuple(sorted(wrong)[:MAX_LISTED])


async def test_within_one_process(agents: Any) -> None:
    backend = FaultyBackend(load_backend("memory"))
    agent = await agents("alone", backends=[backend], verify="crc32c")
    source, target = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
    src, dst = await agent.register(source), await agent.register(target)
    order = np.random.default_rng(1).permutation(N_PAGES)
    await agent.transfer(src.pages(order, PAGE), dst.pages(range(N_PAGES), PAGE))
    assert_same(target, source.reshape(N_PAGES, PAGE)[order].ravel())
    with backend.misdirect(1, 2):
        with raises_pages(1, 2):
            await agent.transfer(src.pages(order, PAGE), dst.pages(range(N_PAGES), PAGE))
        await agent.transfer(src.pages(order, PAGE), dst.pages(range(N_PAGES), PAGE), verify=False)
    await agent.transfer(src[:0], dst[:0])


# Files and objects.


class ErringFiles(PosixBackend):
    """Writes two segments of each op in each other's place if it is told to, and lets somebody act when it has written."""

    swapped: tuple[int, int] | None = None
    written: Any = None

    def copy_now(self, op: Op) -> Any:
        return False if self.swapped or self.written else super().copy_now(op)

    async def copy(self, op: Op) -> None:
        writing = op.plan.dst.kind is MemoryKind.FILE
        if self.swapped and writing:
            order = np.arange(len(op.plan.lengths))
            order[list(self.swapped)] = self.swapped[::-1]
            op = replace(op, plan=replace(op.plan, dst=op.plan.dst.choose(order)))
        await super().copy(op)
        if self.written and writing:
            await self.written()


async def test_files_are_read_back(agents: Any, tmp_path: Path) -> None:
    backend = ErringFiles()
    agent = await agents("alone", backends=[backend])
    memory = pattern(NBYTES, 1)
    region = await agent.register(memory)
    order, places = np.random.default_rng(1).permutation(N_PAGES), np.random.default_rng(2).permutation(N_PAGES)
    for direct in (False, True):
        async with agent.file(tmp_path / f"direct {direct}", "w", nbytes=NBYTES, direct=direct) as file:
            src, dst = region.pages(order, PAGE), file.pages(places, PAGE)
            await agent.transfer(src, dst, verify="crc32c")
            memory[:] = pattern(NBYTES, 2)
            backend.swapped = (3, 200)
            with pytest.raises(IntegrityError) as caught:
                await agent.transfer(src, dst, verify="xxh3")
            backend.swapped = None
            assert caught.value.pages == (3, 200)
            assert f"{file.name!r} [{int(places[3]) * PAGE}:" in str(caught.value)
            await agent.transfer(src, dst, verify="xxh3")
            memory[:] = 0
            await agent.transfer(dst, src, verify="crc32c")
            assert_same(memory, pattern(NBYTES, 2))


async def test_a_file_that_is_written_to_meanwhile_is_torn(agents: Any, tmp_path: Path) -> None:
    backend = ErringFiles()
    agent = await agents("alone", backends=[backend])
    memory = await asyncio.to_thread(pattern, (40 << 20) + 5, 1)
    region = await agent.register(memory)
    wrong = [(40 << 20) + 4, 7 << 20]

    async def write() -> None:
        for at in wrong:
            await asyncio.to_thread(os.pwrite, file.fd, bytes([memory[at] ^ 0xFF]), at)

    async with agent.file(tmp_path / "file", "w") as file:
        backend.written = write
        with pytest.raises(IntegrityError) as caught:
            await agent.transfer(region, file, verify="crc32c")
        assert caught.value.pages == (7, 40)
        backend.written = None
        await agent.transfer(region, file, verify="crc32c")
        staging = agent._backends["staging"]
        assert 0 < staging.peak_nbytes <= staging.buffer_nbytes * staging.n_buffers
        assert staging._arena.lent_nbytes == 0


async def test_objects_are_read_back(agents: Any, tmp_path: Path) -> None:
    agent = await agents("alone", backends=["directory"], verify="crc32c")
    memory = pattern(NBYTES, 1)
    region = await agent.register(memory)
    store = await agent.store(f"file://{tmp_path}/store")
    objects = store.objects([f"key {n}" for n in range(64)], NBYTES // 64)
    whole = store.object("whole")
    await agent.transfer(region, objects)
    await agent.transfer(region, whole)
    (tmp_path / "store" / "key 17").write_bytes(bytes(NBYTES // 64))
    target = np.zeros(NBYTES, np.uint8)
    await agent.transfer(objects, await agent.register(target))
    transfer = agent.submit(region, objects)
    while transfer.nbytes_done < transfer.nbytes and not transfer.done():
        await asyncio.sleep(0)
    (tmp_path / "store" / "key 18").write_bytes(bytes(NBYTES // 64))
    with pytest.raises(IntegrityError, match=r"page 18: .* 'key 18' \[0:16384\]"):
        await transfer


async def test_between_a_file_and_a_peer(agents: Any, tmp_path: Path) -> None:
    async with agent_process("far", nbytes=NBYTES) as far:
        near = await agents("near", backends=["samehost", "posix"])
        peer = await near.connect(far.address)
        there = peer.region("memory")
        places = np.random.default_rng(1).permutation(N_PAGES)
        async with near.file(tmp_path / "file", "w") as file:
            await near.transfer(there, file, verify="xxh3")
            await near.transfer(file[:NBYTES], there.pages(places, PAGE), verify="crc32c")
        want = np.empty((N_PAGES, PAGE), np.uint8)
        want[places] = pattern(NBYTES, 1).reshape(N_PAGES, PAGE)
        assert (await far.order("digest"))["digest"] == hashlib.sha256(want).hexdigest()


async def test_files_without_buffers_to_read_them_into_are_refused(agents: Any, tmp_path: Path) -> None:
    staging = StagingBackend(buffer_nbytes=4096, n_buffers=2)
    agent = await agents("alone", backends=["posix", staging])
    region = await agent.register(pattern(NBYTES, 1))
    async with agent.file(tmp_path / "file", "w") as file:
        with pytest.raises(ConfigurationError, match="must read dst back.*less than 1048576 bytes"):
            await agent.transfer(region, file, verify="crc32c")


async def test_many_transfers_share_one_peers_patience(agents: Any) -> None:
    a, b = await agents("a", backends=["tcp"]), await agents("b", backends=["tcp"])
    peer = await connect(a, b)
    here = await a.register(pattern(NBYTES, 1))
    await b.register(np.zeros(NBYTES, np.uint8), name="there")
    await known(a, peer, "there")
    there = peer.region("there")
    cuts = [slice(n * PAGE, (n + 1) * PAGE) for n in range(N_PAGES)]
    await asyncio.gather(*(a.transfer(here[cut], there[cut], verify="crc32c") for cut in cuts))
    # And both ways at once.
    back = await b.wait_peer("a")
    await known(b, back, here.name)
    mine, theirs = b._membership.regions["there"], back.region(here.name)
    await asyncio.gather(
        *(a.transfer(there[cut], here[cut], verify="xxh3") for cut in cuts[:64]),
        *(b.transfer(theirs[cut], mine[cut], verify="xxh3") for cut in cuts[64:128]),
    )
    assert {"a", "b"} == {*a.peers, *b.peers}


# Who goes meanwhile.


async def comparing(it: Both, put: bool = True) -> Any:
    """Submit a transfer whose bytes are in place and whose comparison waits for the peer, which is stopped."""

    async def stop(op: Op) -> None:
        it.far.stop()

    with it.backend.afterwards(stop):
        transfer = it.near.submit(*it.places(put), verify="crc32c", notify=b"no")
        async with asyncio.timeout(10):
            while transfer.nbytes_done < transfer.nbytes and not transfer.done():
                await asyncio.sleep(0)
    assert transfer.state is TransferState.ACTIVE
    return transfer


async def test_cancelled_while_the_peer_says_nothing() -> None:
    async with both() as it:
        transfer = await comparing(it)
        # It waits for the peer by then, or is about to.
        waiting = asyncio.ensure_future(transfer.watch())
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        transfer.cancel()
        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await transfer
        await asyncio.wait([waiting])
        assert time.monotonic() - started < 1
        assert transfer.state is TransferState.CANCELLED
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await it.near.transfer(*it.places(True), verify="xxh3")
        it.far.resume()
        await it.near.transfer(*it.places(True), verify="xxh3")
        await it.here.aclose()


@pytest.mark.parametrize("put", [True, False])
async def test_a_peer_that_dies_meanwhile(put: bool) -> None:
    async with both() as it:
        transfer = await comparing(it, put)
        it.far.kill()
        started = time.monotonic()
        with pytest.raises(PeerLost):
            await transfer
        assert time.monotonic() - started < 1
        assert transfer.state is TransferState.FAILED
        assert "far" not in it.near.peers


async def test_an_agent_that_closes_meanwhile() -> None:
    async with both() as it:
        transfer = await comparing(it)
        closing = asyncio.ensure_future(it.near.aclose())
        with pytest.raises(asyncio.CancelledError):
            await transfer
        it.far.resume()
        await closing


@pytest.mark.parametrize("n", [1, 64])
async def test_a_region_that_is_deregistered_meanwhile_is_compared_first(agents: Any, n: int) -> None:
    backend = FaultyBackend(load_backend("samehost"))
    a, b = await agents("a", backends=[backend]), await agents("b", backends=["samehost"])
    peer = await connect(a, b)
    here, target = await a.register(pattern(NBYTES, 1)), np.zeros(NBYTES, np.uint8)
    region = await b.register(target, name="there")
    await known(a, peer, "there")
    closing: list[asyncio.Future[None]] = []

    async def deregister(op: Op) -> None:
        if not closing:
            closing.append(asyncio.ensure_future(region.aclose()))
            # Its name is free at once, and taken: the other one is not to be compared in its place.
            while "there" in b._membership.regions:
                await asyncio.sleep(0)
            await b.register(np.ones(NBYTES, np.uint8), name="there")

    there = peer.region("there")
    pages = np.random.default_rng(1).permutation(N_PAGES)
    with backend.afterwards(deregister):
        await asyncio.gather(
            *(a.transfer(here.pages(pages, PAGE), there.pages(pages, PAGE), verify="crc32c") for _ in range(n))
        )
    await closing[0]
    assert target.any()


async def test_agents_that_dial_each_other_at_once(agents: Any) -> None:
    """One of two connections is given up while requests are under way on it: they go by the other one."""
    for turns in range(12):
        a, b = [Agent(name, token=TOKEN, backends=["samehost"]) for name in ("a", "b")]
        async with a, b, asyncio.timeout(20):
            addresses = [await agent.serve() for agent in (a, b)]
            for agent in (a, b):
                await agent.register(pattern(NBYTES, 1), name="memory")

            async def use(agent: Agent, address: tuple[str, int], wait: int) -> None:
                for _ in range(wait):
                    await asyncio.sleep(0)
                peer, mine = await agent.connect(address), agent._membership.regions["memory"]
                cuts = [slice(n, n + PAGE) for n in range(0, NBYTES // 8, PAGE)]
                transfers = []
                for cut in cuts:
                    transfers.append(agent.submit(mine[cut], peer.region("memory")[cut], verify="crc32c"))
                    await asyncio.sleep(0)
                await asyncio.gather(*transfers)

            await asyncio.gather(use(a, addresses[1], turns), use(b, addresses[0], turns * 7 % 12))


@pytest.mark.parametrize("at", range(10))
async def test_cancelled_at_each_step_nothing_is_held_or_read_any_more(agents: Any, at: int) -> None:
    a, b = await agents("a", backends=["samehost"]), await agents("b", backends=["samehost"])
    peer = await connect(a, b)
    here = await a.register(await asyncio.to_thread(pattern, 8 << 20, 1))
    there = await b.register(np.zeros(8 << 20, np.uint8), name="there")
    await known(a, peer, "there")
    mine, theirs = np.random.default_rng(1).permutation(2048), np.random.default_rng(2).permutation(2048)
    transfer = a.submit(here.pages(mine, PAGE), peer.region("there").pages(theirs, PAGE), verify="crc32c")
    while transfer.nbytes_done < transfer.nbytes:
        await asyncio.sleep(0)
    for _ in range(at):
        await asyncio.sleep(0)
    assert transfer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await transfer
    assert here._holders == 0
    await there.aclose()


async def test_a_thread_that_reads_is_waited_for(agents: Any) -> None:
    verifier = (await agents("alone", backends=["memory"]))._dispatcher.verifier
    begun, told, over = threading.Event(), threading.Event(), threading.Event()
    stop = _Stop()

    def read() -> None:
        begun.set()
        while not stop.is_set():
            time.sleep(0.001)
        told.set()
        over.wait(10)

    task = asyncio.create_task(verifier._on_thread(stop, read))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    await asyncio.to_thread(told.wait, 10)
    await asyncio.wait([task], timeout=0.05)
    assert not task.done()
    over.set()
    with pytest.raises(asyncio.CancelledError):
        await task


# What is refused.


async def test_what_cannot_be_verified_is_refused_before_anything_moves(agents: Any) -> None:
    agent = await agents("alone", backends=["memory"])
    target = np.zeros(NBYTES, np.uint8)
    src, dst = await agent.register(pattern(NBYTES, 1)), await agent.register(target)
    with pytest.raises(ConfigurationError, match="'md5'.*'crc32c', 'xxh3'"):
        await agent.transfer(src, dst, verify="md5")
    with pytest.raises(ConfigurationError, match="verify is True"):
        agent.submit(src, dst, verify=True)
    with pytest.raises(ConfigurationError, match="verify is 'sha'"):
        Agent("other", verify="sha")
    assert not target.any()
    assert agent.statistics().done == 0


async def test_a_peer_without_the_library(agents: Any) -> None:
    async with both(without=["xxhash"]) as it:
        assert it.peer.checksums == {"crc32c"}
        with pytest.raises(ConfigurationError, match=r"'far' does not know it; it has: crc32c.*nixl-async\[verify\]"):
            await it.near.transfer(*it.places(True), verify="xxh3")
        await it.near.transfer(*it.places(True), verify="crc32c")
    async with both(without=["xxhash", "crc32c"]) as it:
        with pytest.raises(ConfigurationError, match="it has: none"):
            await it.near.transfer(*it.places(True), verify="crc32c")


async def test_a_library_that_is_absent_here(monkeypatch: pytest.MonkeyPatch, agents: Any) -> None:
    agent = await agents("alone", backends=["memory"])
    src, dst = await agent.register(pattern(PAGE, 1)), await agent.register(np.zeros(PAGE, np.uint8))
    monkeypatch.setitem(sys.modules, "crc32c", None)
    with pytest.raises(MissingDependency, match=r"nixl-async\[verify\]"):
        await agent.transfer(src, dst, verify="crc32c")


# Peers that break the rules.


async def join(one: Stranger, name: str = "mallory") -> None:
    await one.authenticate(name, TOKEN.encode())
    one.writer.write(encode_frame(FrameType.METADATA, encode_announcement(name, "1", None, [], [])))
    while (await one.frame())[0] is not FrameType.METADATA:
        pass


def question(number: int, address: int, ranges: list[tuple[int, int, int]], name: str = "there") -> bytes:
    request = Request("crc32c", [(address, name)], np.array(ranges, RANGE))
    return encode_frame(FrameType.VERIFY, request.encode(number))


async def test_only_what_is_offered_is_summed(agents: Any) -> None:
    agent = await agents("b", backends=["memory"])
    there = await agent.register(pattern(NBYTES, 1), name="there")
    address = await agent.serve()
    async with stranger(address) as one, asyncio.timeout(10):
        await join(one)
        wrong = [
            question(1, there.address, [(0, PAGE, 0)], name="elsewhere"),
            question(2, there.address + PAGE, [(0, PAGE, 0)]),
            question(3, there.address, [(0, PAGE, 0), (0, 1, NBYTES)]),
            question(4, there.address, [(0, PAGE, NBYTES - PAGE + 1)]),
            question(5, there.address, [(0, PAGE, (1 << 64) - PAGE)]),
            question(6, there.address, [(0, PAGE, 1 << 63)]),
        ]
        for number, frame in enumerate(wrong, 1):
            one.writer.write(frame)
            kind, payload = await one.frame()
            assert kind is FrameType.VERIFIED
            answered, why = decode_answer(payload)
            assert answered == number
            assert isinstance(why, str)
            assert "region" in why
        one.writer.write(question(7, there.address, [(0, PAGE, NBYTES - PAGE)]))
        answered, found = decode_answer((await one.frame())[1])
        assert (answered, len(found)) == (7, 1)
        assert not isinstance(found, str)
    assert there._holders == 0


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (encode_frame(FrameType.VERIFY, b"\x00"), "malformed"),
        (encode_frame(FrameType.VERIFY, Request("xxh3", [], np.zeros(1, RANGE)).encode(1)), "0 regions"),
        (encode_frame(FrameType.VERIFY, bytes(8) + b"\x09\0\0" + bytes(14)), "malformed"),
        (question(1, 1, [(0, PAGE_NBYTES + 1, 0)]), "together are allowed"),
        (question(1, 1, [(0, 1, 0)] * (MAX_PIECES + 1)), "are allowed"),
        (encode_frame(FrameType.VERIFY, bytes((256 << 10) + 1)), "at most 262144 are accepted"),
        (encode_frame(FrameType.VERIFIED, encode_sums(1, np.zeros(1, np.uint64))), "was not sent"),
        (encode_frame(FrameType.VERIFIED, b""), "malformed"),
    ],
)
async def test_frames_that_end_the_connection(agents: Any, frame: bytes, why: str) -> None:
    agent = await agents("b", backends=["memory"])
    async with stranger(await agent.serve()) as one:
        await join(one)
        one.writer.write(frame)
        kind, payload = (await one.ended())[-1]
        assert kind is FrameType.REFUSED
        assert why in payload.decode()


async def test_who_asks_for_too_much_at_once_is_thrown_out_and_others_are_served(agents: Any) -> None:
    agent = await agents("b", backends=["samehost"])
    memory = pattern(32 << 20, 1)
    there = await agent.register(memory, name="there")
    friend = await agents("a", backends=["samehost"])
    peer = await connect(friend, agent)
    here = await friend.register(np.zeros(NBYTES, np.uint8))
    async with stranger(agent.address) as one:  # type: ignore[arg-type]
        await join(one)
        full = [(0, PAGE_NBYTES, n << 20) for n in range(32)]
        one.writer.write(b"".join(question(n, there.address, full) for n in range(MAX_ASKED)))
        await friend.transfer(peer.region("there")[:NBYTES], here, verify="crc32c")
        async with asyncio.timeout(30):
            for _ in range(MAX_ASKED):
                assert (await one.frame())[0] is FrameType.VERIFIED
        one.writer.write(b"".join(question(n, there.address, full) for n in range(3 * MAX_ASKED)))
        kind, payload = (await one.ended())[-1]
        assert kind is FrameType.REFUSED
        assert f"more than {MAX_ASKED}" in payload.decode()
    await friend.transfer(peer.region("there")[:NBYTES], here, verify="xxh3")
    # What was asked by who is gone holds nothing.
    async with asyncio.timeout(10):
        await there.aclose()
