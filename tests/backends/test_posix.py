"""Files as one side of transfers: several files, both ways, whatever alignment; cancelled, nothing moves late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, ClosedError, ConfigurationError, MemoryKind
from nixl_async.backends.posix import PosixBackend
from nixl_async.errors import BackendError
from nixl_async.testing import pattern
from nixl_async.testing.cancelling import cancel_after
from nixl_async.testing.patterns import CANARY, POISON, Canary, assert_same
from tests.test_fileio import has_io_uring

ENGINES = [
    pytest.param("io_uring", marks=pytest.mark.skipif(not has_io_uring(), reason="the kernel refuses io_uring")),
    "threads",
]


@pytest.fixture(params=ENGINES)
async def agent(request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    async with Agent("posix", backends=[PosixBackend(engine=request.param, n_threads=2), "memory"]) as agent:
        yield agent


@pytest.mark.parametrize("direct", [False, True])
async def test_pages_of_several_files_go_both_ways(agent: Agent, tmp_path: Path, direct: bool) -> None:
    """One of the files goes through the page cache in any case."""
    n, page = 300, 20_000
    sent, got = pattern(3 * n * page), np.full(3 * n * page, CANARY, np.uint8)
    rng = np.random.default_rng(9)
    source, target = await agent.register(sent), await agent.register(got)
    async with AsyncExitStack() as stack:
        files = [
            await stack.enter_async_context(agent.file(tmp_path / f"f{i}", "w", nbytes=n * page, direct=direct and i != 1))
            for i in range(3)
        ]
        memory = rng.permutation(3 * n)
        places = [rng.permutation(n) for _ in files]
        sides = [file.pages(place, page) for file, place in zip(files, places, strict=True)]
        result = await agent.transfer(source.pages(memory, page), sides)
        assert (result.nbytes, result.route) == (3 * n * page, "posix")
        await agent.transfer(sides, target.pages(memory, page))
    assert_same(got, sent)
    for number in range(3):
        written = np.fromfile(tmp_path / f"f{number}", np.uint8).reshape(n, page)[places[number]]
        expected = sent.reshape(-1, page)[memory[number * n : (number + 1) * n]]
        assert np.array_equal(written, expected)


async def test_small_reads_are_made_at_once(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(pattern(10_000).tobytes())
    got = np.zeros(3000, np.uint8)
    target = await agent.register(got)
    async with agent.file(tmp_path / "f") as file:
        await agent.transfer(file[5000:8000], target)
        await agent.transfer(file[5000:8000], target)
    assert_same(got, pattern(10_000)[5000:8000])
    assert agent.statistics().inline >= 1


@pytest.mark.parametrize("nbytes", [100, 5 << 20])
async def test_a_file_that_shrinks(agent: Agent, tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "f").write_bytes(pattern(nbytes).tobytes())
    target = await agent.register(np.zeros(nbytes, np.uint8))
    async with agent.file(tmp_path / "f") as file:
        with (tmp_path / "f").open("r+b") as other:
            other.truncate(nbytes // 2)
        with pytest.raises(BackendError, match=r"posix: the file ends before \d+ bytes at \d+ of '.*f'"):
            await agent.transfer(file, target)
        await agent.transfer(file[: nbytes // 2], target[: nbytes // 2])


async def test_a_file_grows_by_what_is_written_to_it(agent: Agent, tmp_path: Path) -> None:
    content = pattern(3_000_001)
    source = await agent.register(content)
    async with agent.file(tmp_path / "f", "w", direct=True) as file:
        await agent.transfer(source[:1_500_000], file[:1_500_000])
        await agent.transfer(source[1_500_000:], file[1_500_000:3_000_001])
    assert_same(np.fromfile(tmp_path / "f", np.uint8), content)


@pytest.mark.parametrize("direct", [False, True])
async def test_transfers_that_share_pages_of_a_file_keep_each_others_bytes(agent: Agent, tmp_path: Path, direct: bool) -> None:
    page, n = 3000, 400
    content = pattern(page * n)
    source = await agent.register(content)
    async with agent.file(tmp_path / "f", "w", nbytes=page * n, direct=direct) as file:
        await asyncio.gather(
            *(agent.transfer(source[i * page : (i + 1) * page], file[i * page : (i + 1) * page]) for i in range(n))
        )
    assert_same(np.fromfile(tmp_path / "f", np.uint8), content)


@pytest.mark.parametrize("direct", [False, True])
async def test_cancelled_reads_are_quiet(agent: Agent, tmp_path: Path, direct: bool) -> None:
    n, page = 512, 65_536
    path = tmp_path / "f"
    path.write_bytes(pattern(n * page).tobytes())
    got = np.zeros(n * page, np.uint8)
    target = await agent.register(got)
    loop = asyncio.get_running_loop()
    async with agent.file(path, direct=direct) as file:
        side = file.pages(np.random.default_rng(4).permutation(n), page)
        began = loop.time()
        await agent.transfer(side, target)
        seconds = loop.time() - began
        cancelled = 0
        for step in range(10):
            cancelled += await cancel_after(agent.transfer(side, target), seconds * step / 10)
            await Canary(got).watch(0.01)
        assert cancelled
        await agent.transfer(file, target)
    assert_same(got, pattern(n * page))


@pytest.mark.parametrize("direct", [False, True])
async def test_cancelled_writes_take_no_byte_more(agent: Agent, tmp_path: Path, direct: bool) -> None:
    n, page = 512, 65_536
    path = tmp_path / "f"
    content = pattern(n * page)
    content[content == POISON] = 0
    memory = content.copy()
    source = await agent.register(memory)
    order = np.random.default_rng(4).permutation(n)
    loop = asyncio.get_running_loop()
    async with agent.file(path, "w", nbytes=n * page, direct=direct) as file:
        side = file.pages(order, page)
        began = loop.time()
        await agent.transfer(source, side)
        seconds = loop.time() - began
        cancelled = 0
        for step in range(8):
            memory[:] = content
            cancelled += await cancel_after(agent.transfer(source, side), seconds * step / 8)
            memory[:] = POISON
            await asyncio.sleep(0.01)
            # Whatever was written, was written before the memory was used for something else.
            assert not (await asyncio.to_thread(np.fromfile, path, np.uint8) == POISON).any()
        assert cancelled


async def test_what_it_does_is_told(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    target = await agent.register(np.zeros(10, np.uint8))
    for direct, word in ((None, "page cache"), (True, "direct")):
        async with agent.file(tmp_path / "f", direct=direct) as file:
            explained = agent.explain(file, target)
            assert explained.route == "posix"
            assert explained.how.endswith(f", {word}")
            assert explained.how.startswith(("io_uring", "threads, no io_uring (asked for)"))
            assert "it copies between DRAM and files" in agent.explain(target, target).refusals["posix"]
    with pytest.raises(ClosedError):
        await agent.transfer(file, target)
    assert target.kind is MemoryKind.DRAM


async def test_a_read_only_file_is_no_target(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    source = await agent.register(np.zeros(10, np.uint8))
    async with agent.file(tmp_path / "f") as file:
        with pytest.raises(ValueError, match="open it for writing"):
            await agent.transfer(source, file)


async def test_an_engine_that_does_not_exist() -> None:
    options: dict[str, Any] = {"engine": "warp"}
    with pytest.raises(ConfigurationError, match="warp"):
        async with Agent("posix", backends=[PosixBackend(**options)]):
            pass
