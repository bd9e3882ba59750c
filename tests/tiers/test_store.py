"""The block store as its callers see it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nixl_async import Agent, ClosedError, ConfigurationError, DescriptorError
from nixl_async.testing import Canary, cancel_at_await, pattern
from nixl_async.tiers import DRAM, Files, Objects, Tiers, hash_tokens
from tests.agents import known, two_agents
from tests.tiers.conftest import BLOCK, Bench, N

KINDS = ["dram", "files", "objects", "dram+files", "dram+objects", "files+objects", "dram+files+objects"]


def _tiers(kind: str, path: Path) -> list[Any]:
    made = {
        "dram": DRAM((N if kind == "dram" else 8) * BLOCK),
        "files": Files(path / "files", N * BLOCK, segment_nbytes=16 * BLOCK),
        "objects": Objects(f"file://{path}/objects"),
    }
    return [made[name] for name in kind.split("+")]


@pytest.mark.parametrize("kind", KINDS)
async def test_put_contains_prefix_get_delete(bench: Bench, tmp_path: Path, kind: str) -> None:
    async with Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
        half = N // 2
        assert await tiers.prefix(bench.keys) == 0
        assert not any(await tiers.get(bench.keys[:2], bench.dst(range(2))))
        assert all(await tiers.put(bench.keys[:half], bench.src(range(half))))
        assert tiers.contains(bench.keys) == [True] * half + [False] * half
        assert await tiers.prefix(bench.keys) == half
        got = await tiers.get(bench.keys, bench.dst())
        assert [one.ok for one in got] == [True] * half + [False] * half
        assert bench.right(range(half))
        await tiers.delete(bench.keys[3:5])
        assert await tiers.prefix(bench.keys) == 3
        counted = tiers.statistics()
        assert (counted.puts, counted.hits, counted.misses) == (half, half, half + 2)


@pytest.mark.parametrize("kind", ["files", "objects", "dram+files+objects"])
async def test_what_another_process_stored_exists_and_what_is_known_can_be_listed(
    bench: Bench, tmp_path: Path, kind: str
) -> None:
    async with (
        Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as one,
        Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as other,
    ):
        odd = list(range(1, N, 2))
        assert all(await one.put([bench.keys[at] for at in odd], bench.src(odd)))
        await one.flush()
        assert one.keys() == {bench.keys[at] for at in odd}
        assert other.keys() == set()
        assert await other.exists(bench.keys) == [at % 2 == 1 for at in range(N)]
        assert await other.exists([]) == []
        assert other.keys() == one.keys()
        with pytest.raises(DescriptorError, match="1 to 255"):
            await one.exists([b""])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dram"])
async def test_durable_blocks_are_there_when_it_is_opened_again(bench: Bench, tmp_path: Path, kind: str) -> None:
    async with Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
        assert all(await tiers.put(bench.keys, bench.src(), durable=True))
        assert all(await tiers.put(bench.keys[:3], bench.src(range(3)), durable=True)), "what is there is durable too"
    async with Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
        assert await tiers.prefix(bench.keys) == N
        assert all(await tiers.get(bench.keys, bench.dst()))
    assert bench.right()


async def test_two_stores_on_one_directory(bench: Bench, tmp_path: Path) -> None:
    async with (
        Tiers(bench.agent, _tiers("dram+files", tmp_path), block_nbytes=BLOCK) as a,
        Tiers(bench.agent, _tiers("dram+files", tmp_path), block_nbytes=BLOCK) as b,
    ):
        await a.put(bench.keys[:10], bench.src(range(10)), durable=True)
        assert not any(b.contains(bench.keys[:10]))
        await b.refresh()
        assert all(b.contains(bench.keys[:10]))
        await a.put(bench.keys[10:20], bench.src(range(10, 20)), durable=True)
        assert await b.prefix(bench.keys) == 20
        assert all(await b.get(bench.keys[:20], bench.dst(range(20))))
    assert bench.right(range(20))


@pytest.mark.parametrize("kind", ["dram", "files", "dram+files"])
async def test_a_block_may_be_several_pages_and_a_key_may_come_twice(bench: Bench, tmp_path: Path, kind: str) -> None:
    page = BLOCK // 4
    # Four layers, each with a page of every block, as SGLang and vLLM keep them.
    rows = np.arange(16)[:, None] + np.arange(4)[None, :] * 16
    which = [5, 1, 5, 9]
    keys = [bench.keys[at] for at in which]
    async with Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
        assert all(await tiers.put(keys, bench.source.pages(rows[which], page)))
        assert all(await tiers.get(keys, bench.target.pages(rows[[5, 1, 5, 9]], page)))
        assert all(await tiers.get(keys, bench.target.pages(rows[[5, 1, 11, 9]], page)))
    blank, data = bench.blank.reshape(-1, page), bench.data.reshape(-1, page)
    assert (blank[rows[[5, 1, 9]]] == data[rows[[5, 1, 9]]]).all()
    assert (blank[rows[11]] == data[rows[5]]).all()


@pytest.mark.parametrize("kind", ["dram", "files", "dram+files"])
async def test_a_peers_memory(tmp_path: Path, kind: str) -> None:
    """What this process cannot read where it is passes through memory of its own."""
    async with two_agents(backends=["memory", "tcp", "posix"]) as (a, b, _):
        theirs, mine = pattern(N * BLOCK, 5), np.zeros(N * BLOCK, np.uint8)
        await b.register(theirs, name="theirs")
        await b.register(mine, name="mine")
        peer = a.peers["b"]
        await known(a, peer, "theirs")
        await known(a, peer, "mine")
        keys = hash_tokens(range(N), 1)
        async with Tiers(a, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
            assert all(await tiers.put(keys, peer.region("theirs")))
            assert all(await tiers.get(keys, peer.region("mine")))
    assert (theirs == mine).all()


@pytest.mark.parametrize("kind", ["direct", "objects", "dram+objects"])
async def test_the_scheduler_sees_the_class_of_puts_and_of_gets(bench: Bench, tmp_path: Path, kind: str) -> None:
    tiers = {
        "direct": lambda: [Files(tmp_path / "files", 2 * N * BLOCK, direct=True, segment_nbytes=16 * BLOCK)],
        "objects": lambda: [Objects(f"file://{tmp_path}/objects")],
        "dram+objects": lambda: [DRAM(N * BLOCK), Objects(f"file://{tmp_path}/objects")],
    }[kind]

    def done() -> dict[str, bool]:
        return {name: count.done > 0 for name, count in bench.agent.statistics().classes.items()}

    async with Tiers(bench.agent, tiers(), block_nbytes=BLOCK, traffic_class="latency", put_class="bulk") as store:
        assert all(await store.put(bench.keys, bench.src()))
        assert not await store.flush()
        assert done() == {"latency": False, "normal": False, "bulk": True}
    async with Tiers(bench.agent, tiers(), block_nbytes=BLOCK, traffic_class="latency") as store:
        assert all(await store.get(bench.keys, bench.dst()))
    assert bench.right()
    assert done() == {"latency": True, "normal": False, "bulk": True}
    async with Tiers(bench.agent, tiers(), block_nbytes=BLOCK) as store:
        assert all(await store.get(bench.keys, bench.dst()))
    assert done()["normal"]
    for name in ("traffic_class", "put_class"):
        with pytest.raises(ConfigurationError, match=f"{name} is 'urgent'"):
            Tiers(bench.agent, tiers(), block_nbytes=BLOCK, **{name: "urgent"})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 2, 5, 9])
async def test_cancelled_the_memory_is_quiet_and_the_store_goes_on(bench: Bench, tmp_path: Path, kind: str, at: int) -> None:
    async with Tiers(bench.agent, _tiers(kind, tmp_path), block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys[: N // 2], bench.src(range(N // 2)))
        keep = bench.data.copy()
        if await cancel_at_await(tiers.put(bench.keys, bench.src()), at):
            bench.data[:] = 0xEE
            await asyncio.sleep(0.01)
            bench.data[:] = keep
        if await cancel_at_await(tiers.get(bench.keys[: N // 2], bench.dst(range(N // 2))), at):
            await Canary(bench.blank).watch()
        assert all(await tiers.put(bench.keys, bench.src()))
        assert all(await tiers.get(bench.keys, bench.dst()))
        assert bench.right()


async def test_checksums_can_be_left_out(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _tiers("files", tmp_path), block_nbytes=BLOCK, checksum=False) as tiers:
        await tiers.put(bench.keys, bench.src())
        assert all(await tiers.get(bench.keys, bench.dst()))
    # Those without one pass, with verification too.
    async with Tiers(bench.agent, _tiers("files", tmp_path), block_nbytes=BLOCK) as tiers:
        assert all(await tiers.get(bench.keys, bench.dst()))
    assert bench.right()


async def test_bad_input_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="tiers is empty"):
        Tiers(bench.agent, [], block_nbytes=BLOCK)
    async with Tiers(bench.agent, _tiers("dram", tmp_path), block_nbytes=BLOCK) as tiers:
        with pytest.raises(ConfigurationError, match="only DRAM"):
            await tiers.put(bench.keys, bench.src(), durable=True)
        with pytest.raises(DescriptorError, match="2 keys of 4096 bytes each need 8192"):
            await tiers.put(bench.keys[:2], bench.src())
        with pytest.raises(TypeError, match="a list of keys"):
            await tiers.get(b"key", bench.dst([0]))  # type: ignore[arg-type]
        with pytest.raises(DescriptorError, match="0 bytes"):
            await tiers.get([b""], bench.dst([0]))
        assert await tiers.get([], bench.target[0:0]) == []
        with pytest.raises(ClosedError, match="make a new one"):
            await tiers.__aenter__()


async def test_closed_it_refuses_and_what_was_queued_is_written(bench: Bench, tmp_path: Path) -> None:
    tiers = Tiers(bench.agent, _tiers("dram+files", tmp_path), block_nbytes=BLOCK)
    with pytest.raises(ClosedError, match="use it inside"):
        tiers.contains([b"a"])
    async with tiers:
        await tiers.put(bench.keys[:4], bench.src(range(4)))
    await tiers.aclose()
    for call in (tiers.put(bench.keys[:1], bench.src([0])), tiers.prefix(bench.keys), tiers.flush()):
        with pytest.raises(ClosedError):
            await call
    async with Tiers(bench.agent, _tiers("files", tmp_path), block_nbytes=BLOCK) as again:
        assert await again.prefix(bench.keys) == 4


async def test_a_block_that_raises_drops_what_is_queued(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Tiers(bench.agent, _tiers("dram+files", tmp_path), block_nbytes=BLOCK) as tiers:
            await tiers.put(bench.keys[:4], bench.src(range(4)))
            raise ZeroDivisionError
    assert len(bench.agent._membership.regions) == 2


async def test_a_directory_that_cannot_be_used_leaves_nothing_open(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "files").write_text("in the way")
    with pytest.raises(Exception, match="files"):
        async with Tiers(bench.agent, _tiers("dram+files", tmp_path), block_nbytes=BLOCK):
            pass
    assert len(bench.agent._membership.regions) == 2


async def test_the_oldest_time_wins_everywhere(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = [DRAM(8 * BLOCK, ttl=60.0), Files(tmp_path, N * BLOCK, ttl=60.0)]
    async with Tiers(bench.agent, limited, block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys[:4], bench.src(range(4)), durable=True)
        assert await tiers.prefix(bench.keys) == 4
        later = __import__("time").time() + 61
        monkeypatch.setattr("time.time", lambda: later)
        assert tiers.contains(bench.keys[:4]) == [False] * 4
        assert not any(await tiers.get(bench.keys[:4], bench.dst(range(4))))
        await tiers.sweep()
        assert [tier.blocks for tier in tiers.statistics().tiers] == [0, 0]


class StoreMachine(RuleBasedStateMachine):
    """Any order of puts, gets, deletes and reopenings: what is got is right, and with room for all nothing is lost."""

    @initialize()
    def open(self) -> None:
        self.loop = asyncio.Runner()
        self.here: set[int] = set()
        self.loop.run(self._open())

    async def _open(self) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.agent = await Agent("machine", backends=["memory", "posix", "directory"]).__aenter__()
        self.data, self.blank = pattern(N * BLOCK, 2), np.zeros(N * BLOCK, np.uint8)
        self.source, self.target = await self.agent.register(self.data), await self.agent.register(self.blank)
        await self._open_tiers()

    async def _open_tiers(self) -> None:
        path = Path(self.directory.name)
        self.tiers = await Tiers(self.agent, _tiers("dram+files+objects", path), block_nbytes=BLOCK).__aenter__()

    @rule(which=st.lists(st.integers(0, N - 1), max_size=20), durable=st.booleans())
    def put(self, which: list[int], durable: bool) -> None:
        keys = [b"%d" % at for at in which]
        given = self.source.pages(which, BLOCK) if which else self.source[0:0]
        assert all(self.loop.run(self.tiers.put(keys, given, durable=durable)))
        self.here |= set(which)

    @rule(which=st.lists(st.integers(0, N - 1), max_size=20, unique=True))
    def get(self, which: list[int]) -> None:
        self.blank[:] = 0
        keys = [b"%d" % at for at in which]
        given = self.target.pages(which, BLOCK) if which else self.target[0:0]
        found = self.loop.run(self.tiers.get(keys, given))
        assert [one.ok for one in found] == [at in self.here for at in which]
        rows = [at for at in which if at in self.here]
        assert (self.blank.reshape(N, BLOCK)[rows] == self.data.reshape(N, BLOCK)[rows]).all()

    @rule(which=st.lists(st.integers(0, N - 1), max_size=5))
    def delete(self, which: list[int]) -> None:
        self.loop.run(self.tiers.delete([b"%d" % at for at in which]))
        self.here -= set(which)

    @rule()
    def reopen(self) -> None:
        async def again() -> None:
            await self.tiers.aclose()
            await self._open_tiers()

        self.loop.run(again())

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if hasattr(self, "tiers"):
            assert set(np.flatnonzero(self.tiers.contains([b"%d" % at for at in range(N)])).tolist()) == self.here

    def teardown(self) -> None:
        async def end() -> None:
            await self.tiers.aclose()
            await self.agent.aclose()

        self.loop.run(end())
        self.loop.close()
        self.directory.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=12, stateful_step_count=25)
