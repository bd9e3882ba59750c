"""The route through our memory: what goes where, what fails by itself, what memory it takes, and what cancelling leaves."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async import (
    Agent,
    BackendError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    Op,
    OutOfSpace,
    PartsFailed,
    PeerLost,
    Upload,
)
from nixl_async.backends.directory import DirectoryBackend
from nixl_async.backends.memory import MemoryBackend
from nixl_async.backends.tcp import TCPBackend
from nixl_async.cuda import DeviceBytes
from nixl_async.descriptors import MemoryKind, Side, make_plan
from nixl_async.memory import RemoteRegion
from nixl_async.staging import StagingBackend
from nixl_async.testing import Canary, assert_same, cancel_after, pattern
from nixl_async.testing.servers import Server
from tests.agents import TOKEN, agent_process, connect
from tests.stores import fresh_prefix, s3_options

PAGE = 16384
PATIENCE_SECONDS = 30


@asynccontextmanager
async def staging_agent(
    *others: Any, buffer_nbytes: int = 64 << 10, n_buffers: int = 4, name: str = "near"
) -> AsyncIterator[tuple[Agent, StagingBackend]]:
    """Open an agent with little staging memory; check in the end that all of it came back."""
    staging = StagingBackend(buffer_nbytes=buffer_nbytes, n_buffers=n_buffers)
    async with Agent(name, token=TOKEN, backends=["memory", "posix", *others, staging]) as agent:
        yield agent, staging
        assert lent(staging) == 0
        assert staging.peak_nbytes <= buffer_nbytes * n_buffers


def lent(staging: StagingBackend) -> int:
    return 0 if staging._arena is None else staging._arena.lent_nbytes


def left_over(directory: Path) -> list[str]:
    """Return the files of unfinished writes."""
    return [str(path) for path in directory.rglob("*.part")]


async def put(agent: Agent, target: Any, content: Any) -> None:
    async with await agent.register(content) as region:
        await agent.transfer(region, target)


async def get(agent: Agent, source: Any, nbytes: int) -> Any:
    content = np.zeros(nbytes, np.uint8)
    async with await agent.register(content) as region:
        await agent.transfer(source, region)
    return content


class Watched(DirectoryBackend):
    """A directory whose uploads can be held, and made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.hold_from = 0
        self.n_held = 0
        self.four_held = asyncio.Event()
        self.fail_put: int | None = None
        self.fail_finish = False
        self.uploads: list[WatchedUpload] = []

    async def upload(self, *args: Any, **options: Any) -> Upload:
        made = WatchedUpload(self, await super().upload(*args, **options))
        self.uploads.append(made)
        return made


class WatchedUpload(Upload):
    def __init__(self, backend: Watched, inner: Upload) -> None:
        self._backend, self._inner = backend, inner
        self.piece_nbytes = inner.piece_nbytes
        self.puts: list[int] = []
        self.finished = self.aborted = 0

    async def put(self, number: int, *args: Any) -> None:
        self.puts.append(number)
        self._backend.began.set()
        if number >= self._backend.hold_from:
            self._backend.n_held += 1
            if self._backend.n_held == 4:
                self._backend.four_held.set()
            await self._backend.go_on.wait()
        if number == self._backend.fail_put:
            raise BackendError("the piece is refused, on purpose")
        await self._inner.put(number, *args)

    async def finish(self) -> None:
        self.finished += 1
        if self._backend.fail_finish:
            raise BackendError("no end, on purpose")
        await self._inner.finish()

    async def abort(self) -> None:
        self.aborted += 1
        await self._inner.abort()


# A peer's memory.


@pytest.mark.parametrize("route", ["samehost", "tcp"])
@pytest.mark.parametrize("place", ["file", "directory"])
async def test_between_a_peers_pages_and_storage(route: str, place: str, tmp_path: Path) -> None:
    await _there_and_back(route, place, tmp_path, {})


@pytest.mark.parametrize("route", ["samehost", "tcp"])
async def test_between_a_peers_pages_and_s3(route: str, seaweed: Server, tmp_path: Path) -> None:
    await _there_and_back(route, "s3", tmp_path, s3_options(seaweed))


async def _there_and_back(route: str, place: str, tmp_path: Path, options: dict[str, Any]) -> None:
    n = 96
    mine, theirs, other = (np.random.default_rng(seed).permutation(n) for seed in (1, 2, 3))
    sent = pattern(n * PAGE, 1)
    async with (
        agent_process("far", nbytes=n * PAGE, seed=1) as far,
        staging_agent(route, "directory", *(["s3"] if place == "s3" else [])) as (near, _),
    ):
        remote = (await near.connect(far.address)).region("memory")
        if place == "file":
            target: Any = await near.file(tmp_path / "f", "w", nbytes=n * PAGE)
            pages = target.pages(mine, PAGE)
            stored = sent.reshape(n, -1)[theirs][np.argsort(mine)].ravel()
        else:
            url = f"file://{tmp_path}/store" if place == "directory" else f"s3://bench/{fresh_prefix()}"
            target = (await near.store(url, **options)).objects([f"block-{i}" for i in range(n)], PAGE)
            pages = target.select(mine)
            stored = sent.reshape(n, -1)[theirs][np.argsort(mine)].ravel()
        explained = near.explain(remote.pages(theirs, PAGE), pages)
        assert explained.route == "staging"
        assert f"{route}, then {'posix' if place == 'file' else place}" in str(explained)
        result = await near.transfer(remote.pages(theirs, PAGE), pages)
        assert (result.nbytes, result.route) == (n * PAGE, "staging")
        assert_same(await get(near, target, n * PAGE), stored)
        await near.transfer(pages, remote.pages(other, PAGE))
        expected = sent.reshape(n, -1)[theirs][np.argsort(other)].ravel()
        assert_same(await get(near, remote, n * PAGE), expected)
        assert near.statistics().nbytes["staging"] == 2 * n * PAGE
        if place == "file":
            await target.aclose()


async def test_a_killed_peer_ends_the_transfer_and_the_upload(tmp_path: Path) -> None:
    watched = Watched()
    async with agent_process("far", nbytes=4 << 20) as far, staging_agent("tcp", watched) as (near, staging):
        remote = (await near.connect(far.address)).region("memory")
        store = await near.store(f"file://{tmp_path}/store")
        watched.go_on.clear()
        transfer = near.submit(remote, store.object("large"))
        await watched.began.wait()
        far.kill()
        await far.process.wait()
        watched.go_on.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            with pytest.raises(PeerLost):
                await transfer
        assert [(one.finished, one.aborted) for one in watched.uploads] == [(0, 1)]
        assert left_over(tmp_path) == []
        assert list(await store.exists(["large"])) == [False]
        assert lent(staging) == 0
        # The memory serves others.
        await put(near, store.object("a"), pattern(1 << 20))
        await near.transfer(store.object("a", 1 << 20), store.object("b"))


async def test_a_peer_that_leaves_before_the_transfer(tmp_path: Path) -> None:
    async with staging_agent("tcp", "directory") as (near, _), Agent("far", token=TOKEN, backends=["tcp"]) as far:
        peer = await connect(near, far)
        memory = pattern(100_000)
        async with near.file(tmp_path / "f", "w") as file:
            events = near.membership()
            await far.register(memory, name="theirs")
            await anext(events)
            remote = peer.region("theirs")
            await near.disconnect(peer)
            with pytest.raises(PeerLost):
                await near.transfer(remote, file)


# From storage to storage.


async def test_files_objects_and_stores_in_all_pairs(tmp_path: Path, seaweed: Server) -> None:
    nbytes = 700_001
    sent = pattern(nbytes)
    async with staging_agent("directory", "s3") as (agent, _):
        local = await agent.store(f"file://{tmp_path}/store")
        remote = await agent.store(f"s3://bench/{fresh_prefix()}", **s3_options(seaweed), part_nbytes=5 << 20)
        async with agent.file(tmp_path / "a", "w") as file, agent.file(tmp_path / "b", "w") as other:
            await put(agent, file, sent)
            await agent.transfer(file[:nbytes], other)
            assert_same(await get(agent, other, nbytes), sent)
            await agent.transfer(file[:nbytes], local.object("one"))
            assert_same(await get(agent, local.object("one"), nbytes), sent)
        async with agent.file(tmp_path / "c", "w") as file:
            await agent.transfer(local.object("one", nbytes), file)
            assert_same(await get(agent, file, nbytes), sent)
        # In one piece each: a part of an S3 upload has at least 5 MiB.
        blocks = sent[:640_000]
        for scattered in ([f"block/{i}" for i in range(64)], ["x"]):
            each = len(blocks) // len(scattered)
            await put(agent, local.objects(scattered, each), blocks)
            if each <= 64 << 10:
                await agent.transfer(local.objects(scattered, each), remote.objects(scattered, each))
                assert_same(await get(agent, remote.objects(scattered, each), len(blocks)), blocks)
                back = [f"{name}-back" for name in scattered]
                await agent.transfer(remote.objects(scattered, each), local.objects(back, each))
                assert_same(await get(agent, local.objects(back, each), len(blocks)), blocks)


async def test_a_large_object_to_another_kind_of_store_and_back(tmp_path: Path, seaweed: Server) -> None:
    nbytes = (17 << 20) + 12_345
    sent = pattern(nbytes)
    async with staging_agent("directory", "s3", buffer_nbytes=5 << 20, n_buffers=2) as (agent, staging):
        local = await agent.store(f"file://{tmp_path}/store")
        remote = await agent.store(f"s3://bench/{fresh_prefix()}", **s3_options(seaweed))
        await put(agent, local.object("a"), sent)
        transfer = agent.submit(local.object("a", nbytes), remote.object("b"))
        parts = [part async for part in transfer.parts()]
        assert [(part.index, part.nbytes, part.error) for part in parts] == [(0, nbytes, None)]
        # A part that is told of is there to be read.
        assert (await remote.stat("b")).nbytes == nbytes
        assert transfer.nbytes_done == nbytes
        await transfer
        await agent.transfer(remote.object("b", nbytes), local.object("c"))
        assert_same(await get(agent, local.object("c"), nbytes), sent)
        assert staging.peak_nbytes <= 10 << 20


async def test_memory_is_bounded(tmp_path: Path) -> None:
    nbytes = 192 << 20
    staging = StagingBackend(buffer_nbytes=1 << 20, n_buffers=4)
    async with Agent("near", backends=["memory", "posix", "directory", staging]) as agent:
        path = tmp_path / "sparse"
        make_sparse(path, nbytes, 150 << 20, b"something")
        store = await agent.store(f"file://{tmp_path}/store")
        async with agent.file(path) as file:
            before = resident_nbytes()
            async with asyncio.timeout(PATIENCE_SECONDS):
                await asyncio.gather(*(agent.transfer(file, store.object(f"copy-{i}")) for i in range(2)))
            assert resident_nbytes() - before < 24 << 20
        assert staging.peak_nbytes <= 4 << 20
        for i in range(2):
            found = await get(agent, store.object(f"copy-{i}", nbytes)[150 << 20 : (150 << 20) + 10], 10)
            assert found.tobytes() == b"something\0"


def make_sparse(path: Path, nbytes: int, at: int, content: bytes) -> None:
    with path.open("wb") as made:
        made.truncate(nbytes)
        made.seek(at)
        made.write(content)


def resident_nbytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@given(data=st.data())
@settings(max_examples=25)
def test_any_sizes_arrive(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.one_of(st.integers(1, 9000), st.integers(1, 100_000)), min_size=1, max_size=12))
    order = data.draw(st.permutations(range(len(sizes))))
    cuts = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=10))
    buffer = data.draw(st.sampled_from([4096, 8192, 32768]))
    lanes = data.draw(st.integers(1, 3))
    asyncio.run(_any_sizes(tmp_path_factory.mktemp("sizes"), sizes, order, sorted(cuts), buffer, lanes))


async def _any_sizes(
    directory: Path, sizes: list[int], order: Sequence[int], cuts: list[int], buffer: int, lanes: int
) -> None:
    total = sum(sizes)
    sent = pattern(total)
    edges = [0, *cuts, total]
    ranges = list(zip(edges, np.diff(edges).tolist(), strict=False))
    np.random.default_rng(total).shuffle(ranges)
    expected = np.concatenate([sent[at : at + n] for at, n in ranges])
    async with staging_agent("directory", buffer_nbytes=buffer, n_buffers=lanes) as (agent, _):
        store = await agent.store(f"file://{directory}/store")
        objects = store.objects([f"o{i}" for i in range(len(sizes))], sizes)
        async with agent.file(directory / "f", "w", nbytes=total) as file, agent.file(directory / "g", "w", nbytes=total) as g:
            await put(agent, file, sent)
            transfer = agent.submit(file.ranges(*map(list, zip(*ranges, strict=True))), objects.select(order))
            parts = [part async for part in transfer.parts()]
            assert sorted(part.index for part in parts) == list(range(len(sizes)))
            await transfer
            assert_same(await get(agent, objects.select(order), total), expected)
            await agent.transfer(objects.select(order), g.ranges(*map(list, zip(*ranges, strict=True))))
            assert_same(await get(agent, g, total), sent)


async def test_progress_is_told_before_the_end(tmp_path: Path) -> None:
    nbytes = 1 << 20
    watched = Watched()
    async with staging_agent(watched) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.object("a"), pattern(nbytes))
        watched.hold_from = 8
        watched.go_on.clear()
        transfer = agent.submit(store.object("a", nbytes), store.object("b"))
        # All four lanes have come to a piece behind the eighth: those before it are in place.
        await watched.four_held.wait()
        assert transfer.nbytes_done == nbytes // 2
        assert not transfer.done()
        watched.go_on.set()
        await transfer
        assert transfer.nbytes_done == nbytes


# What fails by itself.


async def test_objects_that_are_missing_keep_no_others_from_their_places(tmp_path: Path) -> None:
    async with staging_agent("directory") as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        sent = pattern(30_000)
        await put(agent, store.objects(["a", "c", "d"], 10_000), sent)
        source, target = store.objects(["a", "b", "c", "d"], 10_000), store.objects(["w", "x", "y", "z"], 10_000)
        transfer = agent.submit(source, target)
        errors = {part.index: part.error async for part in transfer.parts()}
        assert isinstance(errors.pop(1), NotFoundError)
        assert errors == {0: None, 2: None, 3: None}
        with pytest.raises(PartsFailed, match="1 object failed") as caught:
            await transfer
        assert list(caught.value.parts) == [1]
        assert transfer.nbytes_done == 30_000
        assert list(await store.exists(["w", "x", "y", "z"])) == [True, False, True, True]
        assert_same(await get(agent, store.objects(["w", "y", "z"], 10_000), 30_000), sent)
        assert left_over(tmp_path) == []


async def test_missing_objects_leave_a_file_as_it_was(tmp_path: Path) -> None:
    async with staging_agent("directory") as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.objects(["a", "c"], 10_000), pattern(20_000))
        async with agent.file(tmp_path / "f", "w", nbytes=30_000) as file:
            await put(agent, file, np.full(30_000, 7, np.uint8))
            with pytest.raises(PartsFailed) as caught:
                await agent.transfer(store.objects(["a", "b", "c"], 10_000), file)
            assert list(caught.value.parts) == [1]
            found = await get(agent, file, 30_000)
        assert_same(found[:10_000], pattern(20_000)[:10_000])
        assert (found[10_000:20_000] == 7).all()
        assert_same(found[20_000:], pattern(20_000)[10_000:])


@pytest.mark.parametrize("nbytes", [10_000, 1 << 20])
async def test_a_missing_object_alone_is_not_found(tmp_path: Path, nbytes: int) -> None:
    async with staging_agent("directory") as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        with pytest.raises(NotFoundError, match="missing"):
            await agent.transfer(store.object("missing", nbytes), store.object("to"))
        assert list(await store.exists(["to"])) == [False]
        assert left_over(tmp_path) == []


@pytest.mark.parametrize("nbytes", [10_000, 300_000], ids=["whole", "in pieces"])
async def test_conditional_writes_stay_conditional(tmp_path: Path, nbytes: int) -> None:
    async with staging_agent("directory") as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        sent = pattern(3 * nbytes)
        await put(agent, store.objects(["a", "b", "c"], nbytes), sent)
        await put(agent, store.object("y"), np.full(5, 5, np.uint8))
        target = store.objects(["x", "y", "z"], nbytes, if_none_match=True)
        with pytest.raises(PartsFailed) as caught:
            await agent.transfer(store.objects(["a", "b", "c"], nbytes), target)
        assert {index: type(error) for index, error in caught.value.parts.items()} == {1: ConflictError}
        assert (await store.stat("y")).nbytes == 5
        assert_same(await get(agent, store.object("z"), nbytes), sent[2 * nbytes :])
        assert left_over(tmp_path) == []


async def test_s3_conditional_uploads(seaweed: Server, tmp_path: Path) -> None:
    nbytes = 6 << 20
    async with staging_agent("directory", "s3", buffer_nbytes=5 << 20, n_buffers=2) as (agent, _):
        local = await agent.store(f"file://{tmp_path}/store")
        remote = await agent.store(f"s3://bench/{fresh_prefix()}", **s3_options(seaweed))
        await put(agent, local.object("a"), pattern(nbytes))
        await agent.transfer(local.object("a", nbytes), remote.object("b", if_none_match=True))
        with pytest.raises(ConflictError):
            await agent.transfer(local.object("a", nbytes), remote.object("b", if_none_match=True))


async def test_a_piece_that_fails_aborts_its_upload_only(tmp_path: Path) -> None:
    watched = Watched()
    async with staging_agent(watched) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        sent = pattern(4_000_000)
        await put(agent, store.objects(["a", "b"], 2_000_000), sent)
        watched.fail_put = 3
        transfer = agent.submit(store.objects(["a", "b"], 2_000_000), store.objects(["x", "y"], 2_000_000))
        errors = [part.error async for part in transfer.parts()]
        assert [type(error) for error in errors] == [BackendError, BackendError]
        with pytest.raises(PartsFailed, match="2 objects"):
            await transfer
        assert [(one.finished, one.aborted) for one in watched.uploads] == [(0, 1), (0, 1)]
        # The pieces behind the one that failed were not read any more.
        assert all(len(one.puts) < 2_000_000 // (64 << 10) for one in watched.uploads)
        assert left_over(tmp_path) == []
        watched.fail_put = None
        await agent.transfer(store.objects(["a", "b"], 2_000_000), store.objects(["x", "y"], 2_000_000))
        assert_same(await get(agent, store.objects(["x", "y"], 2_000_000), 4_000_000), sent)


async def test_an_upload_that_cannot_be_finished(tmp_path: Path) -> None:
    watched = Watched()
    async with staging_agent(watched) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.object("a"), pattern(1 << 20))
        watched.fail_finish = True
        transfer = agent.submit(store.object("a", 1 << 20), store.object("x"))
        assert [type(part.error) async for part in transfer.parts()] == [BackendError]
        with pytest.raises(BackendError, match="no end"):
            await transfer
        assert [(one.finished, one.aborted) for one in watched.uploads] == [(1, 1)]
        assert list(await store.exists(["x"])) == [False]


async def test_pieces_that_fit_no_buffer_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    class Stubborn(DirectoryBackend):
        async def upload(self, *args: Any, **options: Any) -> Upload:
            return await super().upload(*args, **(options | {"max_piece_nbytes": None}))

    async with staging_agent(Stubborn()) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.object("a"), pattern(1 << 20))
        with pytest.raises(BackendError, match="buffer_nbytes"):
            await agent.transfer(store.object("a", 1 << 20), store.object("x"))
        assert left_over(tmp_path) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file of this process grow beyond a mebibyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
async def test_no_room_at_the_target_fails_the_transfer(tmp_path: Path) -> None:
    async with (
        staging_agent("directory") as (agent, staging),
        agent.file(tmp_path / "from", "w", nbytes=1 << 20) as source,
        agent.file(tmp_path / "to", "w") as target,
    ):
        store = await agent.store(f"file://{tmp_path}/store")
        with pytest.raises(OutOfSpace):
            await agent.transfer(source, target[4096 : 4096 + (1 << 20)])
        # Two halves of an object that is too large together.
        with pytest.raises(OutOfSpace):
            await agent.transfer([source, source[:1]], store.object("large"))
        assert left_over(tmp_path) == []
        assert lent(staging) == 0
        await agent.transfer(source, store.object("large"))


def test_options_that_make_no_sense() -> None:
    for options in ({"buffer_nbytes": 1000}, {"buffer_nbytes": 0}, {"n_buffers": 0}):
        with pytest.raises(ConfigurationError):
            StagingBackend(**options)


# Many at once.


async def test_many_uploads_and_few_buffers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    large, small = 700_000, 9_000
    async with staging_agent("directory", buffer_nbytes=64 << 10, n_buffers=2) as (agent, staging):
        store = await agent.store(f"file://{tmp_path}/store")
        names = [f"{i:02d}" for i in range(40)]
        sent = pattern(40 * large)
        await put(agent, store.objects(names, large), sent)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(
                *(agent.transfer(store.object(name, large), store.object(f"copy-{name}")) for name in names),
                *(agent.transfer(store.object(name, large)[:small], store.object(f"small-{name}")) for name in names),
            )
        assert_same(await get(agent, store.objects([f"copy-{name}" for name in names], large), 40 * large), sent)
        assert staging.peak_nbytes <= 128 << 10
        assert left_over(tmp_path) == []


async def test_one_transfer_of_many_large_objects(tmp_path: Path) -> None:
    watched = Watched()
    async with staging_agent(watched, n_buffers=2) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        names = [f"{i:03d}" for i in range(60)]
        sent = pattern(60 * 100_000)
        await put(agent, store.objects(names, 100_000), sent)
        watched.go_on.clear()
        copies = store.objects([f"copy-{name}" for name in names], 100_000)
        transfer = agent.submit(store.objects(names, 100_000), copies)
        await watched.began.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        # Uploads are begun as buffers come free, not all at the start.
        assert len(watched.uploads) <= 3
        watched.go_on.set()
        await transfer
        assert_same(await get(agent, copies, 60 * 100_000), sent)


# Cancelling.


@pytest.mark.parametrize("direction", ["to storage", "to the peer"])
async def test_cancelled_at_many_moments(direction: str, tmp_path: Path) -> None:
    nbytes = 1 << 20
    async with (
        staging_agent("tcp", "directory", n_buffers=2) as (near, staging),
        Agent("far", token=TOKEN, backends=["tcp"]) as far,
    ):
        peer = await connect(near, far)
        theirs = pattern(nbytes)
        events = near.membership()
        await far.register(theirs, name="theirs")
        await anext(events)
        remote, store = peer.region("theirs"), await near.store(f"file://{tmp_path}/store")
        await put(near, store.object("full", nbytes), theirs)
        original = theirs.copy()
        sides: Any = (remote, store.object("to")) if direction == "to storage" else (store.object("full", nbytes), remote)
        cancelled = 0
        for turns in range(0, 120, 3):
            task = asyncio.create_task(near.transfer(*sides))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            cancelled += task.cancelled()
            assert lent(staging) == 0
            assert left_over(tmp_path) == []
            if direction == "to the peer":
                canary = Canary(theirs)
                await asyncio.sleep(0)
                canary.check()
        assert cancelled > 20
        if direction == "to the peer":
            await Canary(theirs).watch()
        theirs[:] = original
        await near.transfer(*sides)
        assert_same(await get(near, remote if direction == "to the peer" else store.object("to"), nbytes), original)


async def test_cancelled_uploads_to_s3_leave_none_behind(seaweed: Server, tmp_path: Path) -> None:
    nbytes = 16 << 20
    prefix = fresh_prefix()
    async with staging_agent("directory", "s3", buffer_nbytes=5 << 20, n_buffers=2) as (agent, staging):
        local = await agent.store(f"file://{tmp_path}/store")
        remote = await agent.store(f"s3://bench/{prefix}", **s3_options(seaweed))
        await put(agent, local.object("a"), pattern(nbytes))
        cancelled = 0
        for step in range(8):
            cancelled += await cancel_after(agent.transfer(local.object("a", nbytes), remote.object("b")), 0.01 * step)
            assert lent(staging) == 0
        assert cancelled
        client: Any = next(iter(agent._backends["s3"]._buckets.opened.values())).client  # type: ignore[attr-defined]
        listed = await client.list_multipart_uploads(Bucket="bench", Prefix=prefix)
        assert listed.get("Uploads", []) == []
        await agent.transfer(local.object("a", nbytes), remote.object("b"))
        assert (await remote.stat("b")).nbytes == nbytes


async def test_cancelling_while_waiting_for_memory(tmp_path: Path) -> None:
    watched = Watched()
    async with staging_agent(watched, n_buffers=1) as (agent, staging):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.object("a"), pattern(200_000))
        watched.go_on.clear()
        first = agent.submit(store.object("a", 200_000), store.object("x"))
        await watched.began.wait()
        second = agent.submit(store.object("a", 200_000), store.object("y"))
        for _ in range(50):
            await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        watched.go_on.set()
        await first
        assert left_over(tmp_path) == []
        assert lent(staging) == 0


async def test_an_agent_that_closes_meanwhile(tmp_path: Path) -> None:
    watched = Watched()
    async with staging_agent(watched) as (agent, _):
        store = await agent.store(f"file://{tmp_path}/store")
        await put(agent, store.object("a"), pattern(1 << 20))
        watched.go_on.clear()
        transfer = agent.submit(store.object("a", 1 << 20), store.object("x"))
        await watched.began.wait()
        await agent.aclose()
        assert transfer.cancelled()
        assert [one.aborted for one in watched.uploads] == [1]
        assert left_over(tmp_path) == []


async def test_what_is_refused(tmp_path: Path) -> None:
    async with staging_agent("directory") as (agent, staging):
        store = await agent.store(f"file://{tmp_path}/store")
        region = await agent.register(np.zeros(10, np.uint8))
        plan = make_plan(region, store.object("x"))
        assert "single backend" in (staging.refusal(plan.src, plan.dst) or "")
        assert "no storage" in (staging.refusal(plan.src, plan.src) or "")
        for other in (store.object("y"),):
            plan = make_plan(store.object("x", 10), other)
            assert staging.refusal(plan.src, plan.dst) is None
    with pytest.raises(BackendError, match="closed"):
        await staging.copy(Op(1, plan, None, False))


# A device's memory and a peer's. The device is pretended: what copies to and from a real one is tested in tests/gpu.


class PretendedDevice(MemoryBackend):
    """Takes memory of this process that is shown as a device's."""

    name = "device"
    kinds = frozenset({MemoryKind.DRAM, MemoryKind.VRAM})
    remote = False
    rank = 5

    def refusal(self, src: Side, dst: Side) -> str | None:
        if (src.peer or dst.peer) is not None:
            return "the memory is a peer's"
        return None if MemoryKind.VRAM in (src.kind, dst.kind) else "no device takes part"


def on_device(memory: Any) -> DeviceBytes:
    return DeviceBytes(memory.ctypes.data, memory.nbytes)


@pytest.mark.parametrize("route", ["samehost", "tcp"])
async def test_between_a_device_s_pages_and_a_peer_s_host_memory(route: str) -> None:
    n = 96
    mine, theirs = (np.random.default_rng(seed).permutation(n) for seed in (1, 2))
    sent, got = pattern(n * PAGE, 3), np.zeros(n * PAGE, np.uint8)
    async with (
        agent_process("far", nbytes=n * PAGE, seed=1) as far,
        staging_agent(route, PretendedDevice()) as (near, staging),
    ):
        remote = (await near.connect(far.address)).region("memory")
        source, target = await near.register(on_device(sent)), await near.register(on_device(got))
        explained = near.explain(source.pages(mine, PAGE), remote.pages(theirs, PAGE))
        assert (explained.route, explained.how) == ("staging", f"device, then {route}")
        result = await near.transfer(source.pages(mine, PAGE), remote.pages(theirs, PAGE))
        assert (result.route, result.nbytes) == ("staging", n * PAGE)
        assert near.explain(remote, target).how == f"{route}, then device"
        await near.transfer(remote.pages(theirs, PAGE), target.pages(mine, PAGE))
        assert staging.peak_nbytes > 0
    assert_same(got, sent)


async def test_the_half_that_crosses_goes_by_the_rank_towards_that_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nixl_async.agent.DEFAULT_BACKENDS", ("memory", "samehost", "tcp", "posix"))
    async with agent_process("far", backends=["samehost", "tcp"]) as far, Agent("near", token=TOKEN) as near:
        remote = (await near.connect(far.address)).region("memory")
        async with near.file(tmp_path / "kv", "w", nbytes=1 << 20) as file:
            assert near.explain(remote, file).how == "samehost, then posix"
            monkeypatch.setattr(TCPBackend, "rank_for", lambda self, src, dst: 1)
            assert near.explain(remote, file).how == "tcp, then posix"
            assert (await near.transfer(remote, file)).route == "staging"
        assert_same(np.fromfile(tmp_path / "kv", np.uint8), pattern(1 << 20, 1))


async def test_a_device_backend_brings_the_buffers_along() -> None:
    async with Agent("near", token=TOKEN, backends=["tcp", PretendedDevice()]) as near:
        assert "staging" in near._backends
    async with Agent("near", token=TOKEN, backends=["tcp"]) as near:
        assert "staging" not in near._backends


async def test_a_killed_peer_ends_the_transfer_of_a_device() -> None:
    vram = np.zeros(64 << 20, np.uint8)
    async with (
        agent_process("far", nbytes=vram.nbytes) as far,
        staging_agent("tcp", PretendedDevice()) as (near, staging),
    ):
        remote = (await near.connect(far.address)).region("memory")
        region = await near.register(on_device(vram))
        transfers = [near.submit(region, remote) for _ in range(4)]
        far.kill()
        async with asyncio.timeout(PATIENCE_SECONDS):
            for transfer in transfers:
                with pytest.raises(PeerLost):
                    await transfer
        assert lent(staging) == 0


async def test_cancelled_copies_of_a_device_are_quiet() -> None:
    nbytes = 32 << 20
    vram = np.zeros(nbytes, np.uint8)
    async with (
        agent_process("far", nbytes=nbytes, seed=5) as far,
        staging_agent("samehost", PretendedDevice(), buffer_nbytes=1 << 20) as (near, staging),
    ):
        remote = (await near.connect(far.address)).region("memory")
        region = await near.register(on_device(vram))
        cancelled = 0
        for step in range(8):
            cancelled += await cancel_after(near.transfer(remote, region), step * 0.001)
            await Canary(vram).watch()
            assert lent(staging) == 0
        assert cancelled
        await near.transfer(remote, region)
    assert_same(vram, pattern(nbytes, 5))


async def test_buffers_are_no_way_into_a_peer_s_device() -> None:
    host = np.zeros(PAGE, np.uint8)

    def place(region: Any) -> Side:
        return Side((region,), np.array([region.address]))

    async with staging_agent("tcp", PretendedDevice()) as (near, staging):
        dram = place(await near.register(host))
        vram = place(await near.register(on_device(host)))
        far = place(RemoteRegion("far", "1", "kv", 1 << 20, PAGE, kind=MemoryKind.VRAM))
        for src, dst, why in (
            (dram, far, "let the peer fetch the bytes"),
            (far, dram, "let the peer send the bytes"),
            (vram, far, "transfer to DRAM that it registers"),
            (far, vram, "transfer to DRAM that it registers"),
            (dram, vram, "no storage"),
            (vram, vram, "no storage"),
        ):
            assert why in (staging.refusal(src, dst) or "")
