"""What every kind of store promises, asked of each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from nixl_async.discovery import DiscoveryStore, Seen, StoreURL, open_store
from nixl_async.discovery.store import LEASE_SECONDS

PATIENCE_SECONDS = 20.0
NAMES = ["a", "a/b", "a.b", ".", "..", "~", "a b%2F", "ü" * 100, "x" * 255, "new\nline", "a.agent"]


async def value_of(seen: AsyncGenerator[Seen, None], name: str) -> bytes | None:
    """Return what the next batch that has that name says."""
    async for one in seen:
        if name in one.values:
            return one.values[name]
    raise AssertionError("the watch ended")


@contextlib.asynccontextmanager
async def stores(url: str, count: int) -> AsyncGenerator[list[DiscoveryStore], None]:
    opened = [open_store(url) for _ in range(count)]
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield opened
    finally:
        for store in opened:
            await store.aclose()


async def test_what_is_put_is_seen_replaced_and_removed(url: str) -> None:
    async with stores(url, 2) as (ours, theirs), contextlib.aclosing(theirs.watch()) as seen:
        first = await anext(seen)
        assert first.whole
        assert not first.values
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
        await ours.put("a", b"2")
        assert await value_of(seen, "a") == b"2"
        async with contextlib.aclosing(ours.watch()) as others:
            assert await anext(others) == Seen({"a": b"2"}, whole=True)
        await ours.remove("a")
        assert await value_of(seen, "a") is None
        await ours.remove("a")


async def test_what_another_has_replaced_is_not_removed(url: str) -> None:
    async with stores(url, 3) as (first, second, watching):
        await first.put("a", b"first")
        await second.put("a", b"second")
        await first.remove("a")
        await first.aclose()
        async with contextlib.aclosing(watching.watch()) as seen:
            assert (await anext(seen)).values == {"a": b"second"}


async def test_closing_removes(url: str) -> None:
    async with stores(url, 1) as (watching,), contextlib.aclosing(watching.watch()) as seen:
        await anext(seen)
        async with stores(url, 1) as (ours,):
            await ours.put("a", b"1")
            await ours.put("b", b"2")
            await value_of(seen, "b")
        gone: set[str] = set()
        async for one in seen:
            gone |= {name for name, value in one.values.items() if value is None}
            if gone == {"a", "b"}:
                break


async def test_names_of_every_kind(url: str) -> None:
    async with stores(url, 2) as (ours, theirs):
        for name in NAMES:
            await ours.put(name, name.encode())
        async with contextlib.aclosing(theirs.watch()) as seen:
            assert (await anext(seen)).values == {name: name.encode() for name in NAMES}


async def test_a_lease_is_kept_for_as_long_as_its_owner_lives(url: str) -> None:
    async with stores(url, 2) as (ours, theirs), contextlib.aclosing(theirs.watch()) as seen:
        await anext(seen)
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
        keeping = asyncio.create_task(ours.keep())
        # Twice the lease, where there is one.
        waiting = asyncio.create_task(value_of(seen, "a"))
        await asyncio.wait({keeping, waiting}, timeout=2 * ours.lease_seconds or 0.1)
        assert not keeping.done()
        assert not waiting.done()
        keeping.cancel()
        if ours.lease_seconds:
            assert await waiting is None
        else:
            waiting.cancel()
        await asyncio.gather(keeping, waiting, return_exceptions=True)


async def test_a_thousand_entries(url: str) -> None:
    async with stores(url, 2) as (ours, theirs):
        wanted = {f"agent-{i}": str(i).encode() for i in range(1000)}
        for name, value in wanted.items():
            await ours.put(name, value)
        async with contextlib.aclosing(theirs.watch()) as seen:
            assert (await anext(seen)).values == wanted


def test_urls_are_taken_apart() -> None:
    url = StoreURL.parse("etcd://me:p%40ss@[::1]:1,host:2/name%20space/?ttl=3.5")
    assert (url.hosts, url.path, url.user, url.password) == (("[::1]:1", "host:2"), "/name space/", "me", "p@ss")
    assert url.lease_seconds == 3.5
    assert "p@ss" not in f"{url} {url!r}"
    assert StoreURL.parse("memory://x").lease_seconds == LEASE_SECONDS


async def test_stores_without_metadata_refuse_it(url: str) -> None:
    async with stores(url, 1) as (store,):
        if not store.holds_metadata:
            with pytest.raises(NotImplementedError):
                await store.put_metadata("a", b"")
