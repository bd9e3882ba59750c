"""The roster through outages, with a store that does what each test says; real stores are in the other files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import pytest  # noqa: TC002

from nixl_async.discovery import Discovered, DiscoveryStore, Roster, Seen, roster
from nixl_async.errors import BackendError

PATIENCE_SECONDS = 10.0
EMPTY = Seen({}, whole=True)


class Told(DiscoveryStore):
    """A store that is told what its watch sees; a failure ends the watch."""

    lease_seconds = 0.0

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Seen | Exception] = asyncio.Queue()
        self.puts: asyncio.Queue[bytes] = asyncio.Queue()
        self.removed: list[str] = []
        self.failing = False

    async def put(self, name: str, value: bytes) -> None:
        if self.failing:
            raise BackendError("away")
        self.puts.put_nowait(value)

    async def keep(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def remove(self, name: str) -> None:
        self.removed.append(name)

    async def watch(self) -> AsyncGenerator[Seen, None]:
        while True:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            yield item


def entry(name: str, incarnation: str = "1") -> bytes:
    return Discovered(name, incarnation, ("h", 1)).encode()


@contextlib.asynccontextmanager
async def opened(*items: Seen | Exception) -> AsyncIterator[tuple[Told, Roster, asyncio.Queue[tuple[str, str]]]]:
    store, told = Told(), asyncio.Queue[tuple[str, str]]()
    for item in items:
        store.queue.put_nowait(item)
    one = Roster(store, "told://", "me", "mine", lambda kind, name: told.put_nowait((kind, name)))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await one.open()
        yield store, one, told
        await one.aclose()


async def test_what_is_missing_after_an_outage_has_time_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "GRACE_SECONDS", 0.3)
    async with opened(Seen({"a": entry("a"), "b": entry("b")}, whole=True)) as (store, one, told):
        assert {await told.get(), await told.get()} == {("discovered", "a"), ("discovered", "b")}
        store.queue.put_nowait(BackendError("away"))
        store.queue.put_nowait(EMPTY)
        store.queue.put_nowait(Seen({"a": entry("a")}))
        store.queue.put_nowait(Seen({"c": entry("c")}))
        assert await told.get() == ("discovered", "c")
        assert one.known.keys() == {"a", "b", "c"}
        assert await told.get() == ("withdrawn", "b")
        assert one.known.keys() == {"a", "c"}
        assert told.empty()


async def test_trouble_is_known_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    async with opened(EMPTY) as (store, one, told):
        for _ in range(3):
            store.queue.put_nowait(OSError("no way"))
        while not one.trouble:
            await asyncio.sleep(0.01)
        store.queue.put_nowait(Seen({"a": entry("a")}))
        await told.get()
        assert one.trouble == ""
    # Once, however often it is tried.
    assert caplog.text.count("cannot be watched") == 1


async def test_other_lives_are_news_and_the_same_is_not() -> None:
    async with opened(EMPTY) as (store, _, told):
        for value in (entry("a"), entry("a"), entry("a", "2"), b"malformed", entry("a", "2")):
            store.queue.put_nowait(Seen({"a": value}))
        store.queue.put_nowait(Seen({"a": None}))
        assert [await told.get() for _ in range(3)] == [("discovered", "a"), ("discovered", "a"), ("withdrawn", "a")]
        assert told.empty()


async def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(roster, "MAX_ENTRIES", 3)
    values: dict[str, bytes | None] = {name: entry(name) for name in "abcdef"}
    async with opened(Seen(values, whole=True)) as (_, one, _told):
        assert len(one.known) == 3
    assert caplog.text.count("others are ignored") == 1


async def _nothing() -> None:
    return None


async def test_the_own_entry_is_put_when_it_vanishes_and_not_against_another() -> None:
    async with opened(EMPTY) as (store, one, told):
        store.failing = True
        publishing = asyncio.create_task(one.publish(("h", 1), _nothing))
        await asyncio.sleep(0.05)
        store.failing = False
        await publishing
        own = await store.puts.get()
        assert Discovered.decode("me", own) == Discovered("me", "mine", ("h", 1))
        store.queue.put_nowait(Seen({"me": own}))
        store.queue.put_nowait(Seen({"me": None}))
        assert await store.puts.get() == own
        # Another has the name: not until it is gone.
        store.queue.put_nowait(Seen({"me": entry("me", "theirs")}))
        store.queue.put_nowait(Seen({"a": entry("a")}))
        await told.get()
        assert store.puts.empty()
        store.queue.put_nowait(Seen({"me": None}))
        assert await store.puts.get() == own
        assert "me" not in one.known
    assert store.removed == ["me"]


async def test_a_store_that_hangs_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "OPEN_SECONDS", 0.05)
    monkeypatch.setattr(roster, "CLOSE_SECONDS", 0.05)

    class Hanging(Told):
        async def put(self, name: str, value: bytes) -> None:
            await asyncio.get_running_loop().create_future()

        async def remove(self, name: str) -> None:
            await asyncio.get_running_loop().create_future()

    one = Roster(Hanging(), "told://", "me", "mine", lambda kind, name: None)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await one.open()
        await one.publish(("h", 1), _nothing)
        await one.aclose()
