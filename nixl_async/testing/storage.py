"""The conformance suite of object stores: what every storage backend must do, against a real server. See `StorageBackendTests`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import numpy as np
import pytest

from nixl_async.agent import Agent
from nixl_async.errors import (
    ConfigurationError,
    ConflictError,
    DescriptorError,
    IntegrityError,
    NixlError,
    NotFoundError,
    PartsFailed,
    TransferError,
)
from nixl_async.stores import Store
from nixl_async.testing.cancelling import cancel_after
from nixl_async.testing.patterns import CANARY, Canary, assert_same, pattern

PATIENCE_SECONDS = 60.0


class StorageBackendTests:
    """Subclass this in a test file, set `backend`, and offer the fixture `store_url`: an empty store of a real server.

    class TestMine(StorageBackendTests):
        backend = "mine"
        @pytest.fixture
        def store_url(self): return "mine://bucket/prefix/"
        @pytest.fixture
        def options(self): return {"endpoint": ...}

    The promises that not every store can keep are switched off by the attributes below; say why where you do.
    """

    backend: ClassVar[str]
    conditional: ClassVar[bool] = True
    """The server refuses a conditional write of what exists."""
    atomic: ClassVar[bool] = True
    """The server shows no object of which it got a part only."""
    keys: ClassVar[tuple[str, ...]] = (
        "plain",
        "with space",
        "slash/in/it",
        "ünïcödé/日本",
        "a+b=c&d%41;e",
        "tilde~dot.dash-_",
        "(parens)!*'",
    )
    """Keys that the server keeps as they are."""
    large_nbytes: ClassVar[int] = 24 << 20
    large_options: ClassVar[Mapping[str, Any]] = {}
    """Options by which `large_nbytes` is written and read by several requests."""
    many: ClassVar[int] = 300

    @pytest.fixture
    def store_url(self) -> str:
        """Return the URL of an empty store."""
        raise NotImplementedError("offer a fixture store_url")

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        """Return the options that the store is opened with."""
        return {}

    @pytest.fixture
    async def agent(self) -> AsyncIterator[Agent]:
        """Open an agent with the backend under test."""
        async with Agent("storage", backends=[self.backend, "memory"]) as agent:
            yield agent

    @pytest.fixture
    async def store(self, agent: Agent, store_url: str, options: dict[str, Any]) -> Store:
        """Open the store."""
        return await agent.store(store_url, **options)

    # Bytes.

    @pytest.mark.parametrize("nbytes", [1, 2, 4095, 4096, 65537, 1 << 20])
    async def test_an_object_comes_back(self, agent: Agent, store: Store, nbytes: int) -> None:
        sent, got = pattern(nbytes), np.full(nbytes + 2, CANARY, np.uint8)
        await agent.transfer(await agent.register(sent), store.object("one"))
        await agent.transfer(store.object("one"), (await agent.register(got))[1 : nbytes + 1])
        assert_same(got[1:-1], sent)
        assert (got[0], got[-1]) == (CANARY, CANARY)
        assert (await store.stat("one")).nbytes == nbytes

    async def test_many_objects_in_one_transfer(self, agent: Agent, store: Store) -> None:
        sent, got = pattern(self.many * 5000), np.full(self.many * 5000, CANARY, np.uint8)
        order = np.random.default_rng(1).permutation(self.many)
        names = [f"blocks/{i:04d}" for i in range(self.many)]
        objects = store.objects(names, 5000)
        result = await agent.transfer((await agent.register(sent)).pages(order, 5000), objects)
        assert result.nbytes == self.many * 5000
        assert result.route == self.backend
        transfer = agent.submit(objects, (await agent.register(got)).pages(order, 5000))
        parts = [part async for part in transfer.parts()]
        assert sorted(part.index for part in parts) == list(range(self.many))
        assert all(part.error is None and part.nbytes == 5000 for part in parts)
        await transfer
        assert_same(got, sent)

    async def test_objects_of_different_sizes(self, agent: Agent, store: Store) -> None:
        sizes = [1, 70_000, 3, 4096, 123_457]
        total = sum(sizes)
        sent, got = pattern(total), np.full(total, CANARY, np.uint8)
        objects = store.objects([f"size-{n}" for n in sizes], sizes)
        await agent.transfer(await agent.register(sent), objects)
        target = await agent.register(got)
        await agent.transfer(objects.select([4, 0, 2, 1, 3]), target)
        starts = np.cumsum(sizes) - sizes
        assert_same(got, np.concatenate([sent[starts[i] : starts[i] + sizes[i]] for i in (4, 0, 2, 1, 3)]))
        assert [found.nbytes for found in await store.stats([f"size-{n}" for n in sizes]) if found] == sizes

    async def test_pages_and_ranges_of_an_object(self, agent: Agent, store: Store) -> None:
        sent, got = pattern(64 * 4096), np.full(64 * 4096, CANARY, np.uint8)
        await agent.transfer(await agent.register(sent), store.object("paged"))
        one = store.object("paged", 64 * 4096)
        target = await agent.register(got)
        pages = np.random.default_rng(2).permutation(64)
        await agent.transfer(one.pages(pages, 4096), target.pages(pages[::-1], 4096))
        assert_same(got.reshape(64, -1)[pages[::-1]].ravel(), sent.reshape(64, -1)[pages].ravel())
        got[:] = CANARY
        await agent.transfer(one.ranges([1, 100_000, 262_143], [10, 77, 1]), target[5:93])
        assert_same(got[5:93], np.concatenate((sent[1:11], sent[100_000:100_077], sent[-1:])))
        assert (got[:5] == CANARY).all()
        assert (got[93:] == CANARY).all()

    async def test_a_large_object_scattered_over_pages(self, agent: Agent, store_url: str, options: dict[str, Any]) -> None:
        store = await agent.store(store_url, **options, **self.large_options)
        n = self.large_nbytes // 50_000
        sent, got = pattern(n * 50_000), np.full(n * 50_000, CANARY, np.uint8)
        order = np.random.default_rng(3).permutation(n)
        await agent.transfer((await agent.register(sent)).pages(order, 50_000), store.object("large"))
        await agent.transfer(store.object("large"), (await agent.register(got)).pages(order, 50_000))
        assert_same(got, sent)

    async def test_writing_replaces(self, agent: Agent, store: Store) -> None:
        memory = await agent.register(pattern(10_000))
        await agent.transfer(memory, store.object("again"))
        await agent.transfer(memory[5000:5100], store.object("again"))
        assert (await store.stat("again")).nbytes == 100

    async def test_keys_of_any_kind(self, agent: Agent, store: Store) -> None:
        names = list(self.keys)
        memory = await agent.register(pattern(len(names) * 100))
        got = np.zeros(len(names) * 100, np.uint8)
        await agent.transfer(memory, store.objects(names, 100))
        await agent.transfer(store.objects(names, 100), await agent.register(got))
        assert_same(got, pattern(len(names) * 100))
        assert sorted([found.key async for found in store.list()]) == sorted(names)
        assert all(await store.exists(names))

    # What does not exist, or is not what it should be.

    async def test_a_missing_object(self, agent: Agent, store: Store) -> None:
        got = np.full(100, CANARY, np.uint8)
        with pytest.raises(NotFoundError, match="missing"):
            await agent.transfer(store.object("missing"), await agent.register(got))
        with pytest.raises(NotFoundError):
            await store.stat("missing")
        assert list(await store.exists(["missing"])) == [False]
        assert (got == CANARY).all()

    async def test_missing_objects_among_others(self, agent: Agent, store: Store) -> None:
        sent, got = pattern(2000), np.full(4000, CANARY, np.uint8)
        await agent.transfer(await agent.register(sent), store.objects(["b", "d"], 1000))
        transfer = agent.submit(store.objects(["a", "b", "c", "d"], 1000), await agent.register(got))
        errors = {part.index: part.error async for part in transfer.parts()}
        assert isinstance(errors[0], NotFoundError)
        assert isinstance(errors[2], NotFoundError)
        assert errors[1] is None
        assert errors[3] is None
        with pytest.raises(PartsFailed, match="2 objects") as caught:
            await transfer
        assert sorted(caught.value.parts) == [0, 2]
        assert_same(got[1000:2000], sent[:1000])
        assert_same(got[3000:], sent[1000:])
        assert (got[:1000] == CANARY).all()

    @pytest.mark.parametrize("wanted", [50, 200])
    async def test_an_object_of_another_size(self, agent: Agent, store: Store, wanted: int) -> None:
        await agent.transfer(await agent.register(pattern(100)), store.object("hundred"))
        with pytest.raises(IntegrityError, match="bytes"):
            await agent.transfer(store.object("hundred"), await agent.register(np.zeros(wanted, np.uint8)))

    async def test_a_range_behind_the_end(self, agent: Agent, store: Store) -> None:
        await agent.transfer(await agent.register(pattern(100)), store.object("hundred"))
        got = np.full(100, CANARY, np.uint8)
        with pytest.raises(TransferError):
            await agent.transfer(store.object("hundred", 1000)[500:600], await agent.register(got))
        with pytest.raises(TransferError):
            await agent.transfer(store.object("hundred", 1000)[50:150], await agent.register(np.zeros(100, np.uint8)))

    async def test_a_conditional_write(self, agent: Agent, store: Store) -> None:
        if not self.conditional:
            pytest.skip("the server overwrites where a condition says that it must not")
        first, second = await agent.register(pattern(100)), await agent.register(pattern(100, 5))
        await agent.transfer(first, store.object("once", if_none_match=True))
        with pytest.raises(ConflictError):
            await agent.transfer(second, store.object("once", if_none_match=True))
        got = np.zeros(100, np.uint8)
        await agent.transfer(store.object("once"), await agent.register(got))
        assert_same(got, pattern(100))

    async def test_parts_of_objects_are_not_written(self, agent: Agent, store: Store) -> None:
        memory = await agent.register(pattern(100))
        for target in (store.object("o", 200)[0:100], store.object("o", 200)[100:200], store.object("o")[1:101]):
            with pytest.raises(DescriptorError, match="whole"):
                await agent.transfer(memory, target)
        assert list(await store.exists(["o"])) == [False]

    # Questions.

    async def test_listing_and_deleting(self, agent: Agent, store: Store) -> None:
        names = [f"{room}/{i:03d}" for room in ("x", "y") for i in range(60)]
        await agent.transfer(await agent.register(pattern(len(names) * 10)), store.objects(names, 10))
        listed = [found async for found in store.list("x/")]
        assert [found.key for found in listed] == names[:60]
        assert {found.nbytes for found in listed} == {10}
        await store.delete([*names[:50], "never-was"])
        assert list(await store.exists(names[45:55])) == [False] * 5 + [True] * 5
        assert [found.key async for found in store.list()] == names[50:]
        await store.delete(["never-was"])
        assert [found async for found in store.list("nothing/")] == []

    async def test_asking_by_url(self, agent: Agent, store: Store, store_url: str, options: dict[str, Any]) -> None:
        await agent.transfer(await agent.register(pattern(10)), store.object("here"))
        urls = [f"{store_url.rstrip('/')}/{name}" for name in ("here", "there")]
        assert list(await agent.exists(urls, **options)) == [True, False]
        assert (await agent.stat(urls[0], **options)).nbytes == 10
        assert (await agent.stat(urls[0], **options)).modified > 1e9
        assert [found.key async for found in agent.list(store_url, **options)] == ["here"]
        await agent.delete(urls, **options)
        assert list(await agent.exists(urls, **options)) == [False, False]

    async def test_unknown_options_are_refused(self, agent: Agent, store_url: str) -> None:
        with pytest.raises(ConfigurationError, match="warp"):
            await agent.store(store_url, warp=9)

    # Promise 2.

    async def test_cancelled_reads_are_quiet(self, agent: Agent, store_url: str, options: dict[str, Any]) -> None:
        store = await agent.store(store_url, **options, **self.large_options)
        sent, got = pattern(self.large_nbytes), np.full(self.large_nbytes, CANARY, np.uint8)
        target = await agent.register(got)
        await agent.transfer(await agent.register(sent), store.object("large"))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await agent.transfer(store.object("large"), target)
        seconds = loop.time() - began
        cancelled = 0
        for step in range(8):
            cancelled += await cancel_after(agent.transfer(store.object("large"), target), seconds * step / 8)
            await Canary(got).watch()
        assert cancelled
        await agent.transfer(store.object("large"), target)
        assert_same(got, sent)

    async def test_cancelled_writes_leave_the_old_object_or_the_new(
        self, agent: Agent, store_url: str, options: dict[str, Any]
    ) -> None:
        if not self.atomic:
            pytest.skip("the server shows objects of which it got a part")
        store = await agent.store(store_url, **options, **self.large_options)
        old, new = pattern(self.large_nbytes, 1), pattern(self.large_nbytes, 2)
        got = np.zeros(self.large_nbytes, np.uint8)
        before, after, target = await agent.register(old), await agent.register(new), await agent.register(got)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await agent.transfer(before, store.object("large"))
        seconds = loop.time() - began
        for step in range(5):
            await cancel_after(agent.transfer(after, store.object("large")), seconds * step / 5)
            # Only a copy of what was to be sent may be on its way still.
            memory = new.copy()
            new[:] = CANARY
            await agent.transfer(store.object("large"), target)
            assert np.array_equal(got, old) or np.array_equal(got, memory), "neither the old object nor the new one"
            new[:] = memory
            await agent.transfer(before, store.object("large"))

    async def test_many_transfers_at_once_one_cancelled(self, agent: Agent, store: Store) -> None:
        sent, got = pattern(40 * 30_000), np.zeros(40 * 30_000, np.uint8)
        await agent.transfer(await agent.register(sent), store.objects([f"{i}" for i in range(40)], 30_000))
        target = await agent.register(got)
        tasks = [
            asyncio.create_task(agent.transfer(store.object(f"{i}"), target[i * 30_000 : (i + 1) * 30_000])) for i in range(40)
        ]
        await asyncio.sleep(0)
        tasks[7].cancel()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.wait(tasks)
        for i, task in enumerate(tasks):
            if not task.cancelled():
                task.result()
                assert_same(got[i * 30_000 : (i + 1) * 30_000], sent[i * 30_000 : (i + 1) * 30_000])

    async def test_a_closed_agent_refuses(self, store_url: str, options: dict[str, Any]) -> None:
        async with Agent("closing", backends=[self.backend, "memory"]) as agent:
            store = await agent.store(store_url, **options)
            region = await agent.register(np.zeros(10, np.uint8))
        with pytest.raises(NixlError):
            await agent.transfer(store.object("x"), region)
        with pytest.raises(NixlError):
            await store.exists(["x"])

    # Through us.

    async def test_from_store_to_store(self, agent: Agent, store_url: str, options: dict[str, Any]) -> None:
        store = await agent.store(store_url, **options, **self.large_options)
        sent, got = pattern(self.large_nbytes), np.zeros(self.large_nbytes, np.uint8)
        await agent.transfer(await agent.register(sent), store.object("from"))
        result = await agent.transfer(store.object("from", self.large_nbytes), store.object("to"))
        assert result.route == "staging"
        await agent.transfer(store.object("to"), await agent.register(got))
        assert_same(got, sent)
        names, others = [f"s{i}" for i in range(20)], [f"t{i}" for i in range(20)]
        memory = await agent.register(sent[:200_000])
        await agent.transfer(memory, store.objects(names, 10_000))
        await agent.transfer(store.objects(names, 10_000), store.objects(others, 10_000))
        got[:] = 0
        await agent.transfer(store.objects(others, 10_000), (await agent.register(got))[:200_000])
        assert_same(got[:200_000], sent[:200_000])

    async def test_opening_needs_no_server_and_closing_leaves_nothing(self, store_url: str, options: dict[str, Any]) -> None:
        for _ in range(2):
            async with _agent(self.backend) as agent:
                await agent.store(store_url, **options)


@asynccontextmanager
async def _agent(backend: str) -> AsyncIterator[Agent]:
    async with Agent("brief", backends=[backend, "memory"]) as agent:
        yield agent
