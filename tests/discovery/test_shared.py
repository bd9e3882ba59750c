"""One watch for all: what each is told, when it fails, and when the last one leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from nixl_async import Agent
from nixl_async.discovery import DiscoveryStore, Seen, SharedStore, StoreURL
from nixl_async.errors import BackendError, MissingDependency
from tests.agents import TOKEN

URL = StoreURL.parse("memory://shared")


class Scripted(DiscoveryStore):
    """Tells what it is given to tell; counts those that were made, watched and closed."""

    lease_seconds = 1.0
    made: list[Scripted]

    def __init__(self) -> None:
        self.script: asyncio.Queue[Seen | Exception] = asyncio.Queue()
        self.watched = self.hurried = 0
        self.closed = False
        Scripted.made.append(self)

    async def put(self, name: str, value: bytes) -> None:
        self.script.put_nowait(Seen({name: value}))

    async def keep(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def remove(self, name: str) -> None:
        self.script.put_nowait(Seen({name: None}))

    async def watch(self) -> AsyncGenerator[Seen, None]:
        self.watched += 1
        while True:
            item = await self.script.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def hurry(self) -> None:
        self.hurried += 1

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _none_made() -> None:
    Scripted.made = []


async def test_all_hear_the_same_and_the_last_one_closes_the_watch() -> None:
    first, second = SharedStore(Scripted, URL), SharedStore(Scripted, URL)
    async with contextlib.aclosing(first.watch()) as one:
        beginning = asyncio.ensure_future(anext(one))
        await asyncio.sleep(0)
        feed = Scripted.made[-1]
        feed.script.put_nowait(Seen({"a": b"1", "b": b"2"}, whole=True))
        assert (await beginning).values == {"a": b"1", "b": b"2"}
        feed.script.put_nowait(Seen({"a": None, "c": b"3"}))
        assert (await anext(one)).values == {"a": None, "c": b"3"}
        async with contextlib.aclosing(second.watch()) as two:
            # Who comes later is told what there is.
            whole = await anext(two)
            assert (whole.values, whole.whole) == ({"b": b"2", "c": b"3"}, True)
            feed.script.put_nowait(Seen({"d": b"4"}))
            assert (await anext(one)).values == (await anext(two)).values == {"d": b"4"}
            second.hurry()
            assert (feed.watched, feed.hurried) == (1, 1)
        assert not feed.closed
        feed.script.put_nowait(Seen({"d": None}))
        assert (await anext(one)).values == {"d": None}
    assert feed.closed
    # Each has a store of its own, which is still open, and there was one for the watch.
    assert [store.closed for store in Scripted.made] == [False, False, True]
    await first.aclose()
    assert [store.closed for store in Scripted.made] == [True, False, True]


@pytest.mark.parametrize(
    "failure", [OSError("away"), BackendError("away"), MissingDependency("away")], ids=lambda e: type(e).__name__
)
async def test_a_failure_is_everybodys_and_who_begins_anew_gets_another(failure: Exception) -> None:
    stores = [SharedStore(Scripted, URL) for _ in range(2)]
    watches = [store.watch() for store in stores]
    beginning = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    feed = Scripted.made[-1]
    feed.script.put_nowait(failure)
    for result in await asyncio.gather(*beginning, return_exceptions=True):
        assert isinstance(result, MissingDependency if isinstance(failure, MissingDependency) else BackendError)
        assert str(result) == "away"
    assert feed.closed
    async with contextlib.aclosing(stores[0].watch()) as again:
        beginning = [asyncio.ensure_future(anext(again))]
        await asyncio.sleep(0)
        assert Scripted.made[-1] is not feed
        Scripted.made[-1].script.put_nowait(Seen({}, whole=True))
        assert (await beginning[0]).whole


async def test_another_url_has_another_watch() -> None:
    stores = [SharedStore(Scripted, StoreURL.parse(url)) for url in ("memory://x", "memory://y", "memory://x?ttl=5")]
    watches = [store.watch() for store in stores]
    beginning = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0)
    assert len(Scripted.made) == 6
    for store in Scripted.made[3:]:
        store.script.put_nowait(Seen({}, whole=True))
    await asyncio.gather(*beginning)
    for watch in watches:
        await watch.aclose()
    assert all(store.closed for store in Scripted.made[3:])


async def test_agents_of_a_process_find_each_other_while_they_come_and_go(url: str) -> None:
    async with Agent("first", token=TOKEN, backends=["memory"], discovery=url) as first, asyncio.timeout(30):
        await first.serve()
        for number in range(3):
            name = f"other-{number}"
            async with Agent(name, token=TOKEN, backends=["memory"], discovery=url) as other:
                await other.serve()
                assert (await other.peer("first")).name == "first"
                assert (await first.peer(name)).name == name
                assert set(other.discovered) == {"first"}
            while name in first.discovered:
                await asyncio.sleep(0.01)
