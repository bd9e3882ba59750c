"""What an agent offers for files and objects: opening, asking, listing, deleting, and what it refuses before anything moves."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import (
    Agent,
    ClosedError,
    ConfigurationError,
    ConflictError,
    DescriptorError,
    FileRegion,
    MemoryKind,
    MissingDependency,
    NoRoute,
    NotFoundError,
    PartsFailed,
    Quarantined,
    TransferError,
    load_backend,
)
from nixl_async.backend import Op, Stat, StorageBackend, StoreAddress
from nixl_async.backends.directory import DirectoryBackend
from nixl_async.descriptors import Side
from nixl_async.storage import ObjectRegion, object_parts
from nixl_async.stores import Opening
from nixl_async.testing import FaultyBackend, assert_same, pattern
from nixl_async.testing.servers import Server
from tests.stores import fresh_prefix, s3_options

BACKENDS = ["memory", "posix", "directory"]


def agent() -> Agent:
    return Agent("storage", backends=BACKENDS)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


# Files.


async def test_a_file_there_and_back(tmp_path: Path) -> None:
    sent, got = pattern(100_000), np.zeros(100_000, np.uint8)
    async with agent() as one:
        source, target = await one.register(sent), await one.register(got)
        async with one.file(tmp_path / "f", "w", nbytes=100_000) as file:
            await one.transfer(source.pages(range(24, -1, -1), 4000), file)
        assert file.closed
        file = await one.file(str(tmp_path / "f"))
        assert (file.nbytes, file.readonly) == (100_000, True)
        await one.transfer(file.pages(range(24, -1, -1), 4000), target)
        with pytest.raises(DescriptorError, match="read-only"):
            await one.transfer(source, file)
        await file.aclose()
        await file.aclose()
        with pytest.raises(ClosedError):
            await one.transfer(file, target)
    assert_same(got, sent)
    assert_same(np.frombuffer((tmp_path / "f").read_bytes(), np.uint8), sent.reshape(25, -1)[::-1].ravel())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "rw"}, ConfigurationError),
        ({"mode": "r", "nbytes": 5}, ConfigurationError),
        ({"mode": "w", "nbytes": -1}, ConfigurationError),
        ({"mode": "r+", "publish": True}, ConfigurationError),
        ({"mode": "r"}, NotFoundError),
        ({"mode": "r+"}, NotFoundError),
    ],
    ids=repr,
)
async def test_files_that_cannot_be_opened(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    async with agent() as one:
        with pytest.raises(error):
            await one.file(tmp_path / "missing", **options)
        with pytest.raises(error):
            async with one.file(tmp_path / "missing", **options):
                pass
    assert names(tmp_path) == []


async def test_a_published_file_gets_its_name_at_the_end_or_never(tmp_path: Path) -> None:
    async with agent() as one:
        memory = await one.register(pattern(1000))
        async with one.file(tmp_path / "f", "w", publish=True, fsync=True) as file:
            await one.transfer(memory, file)
            assert not (tmp_path / "f").exists()
        assert (tmp_path / "f").read_bytes() == pattern(1000).tobytes()
        with suppress(ZeroDivisionError):
            async with one.file(tmp_path / "g", "w", publish=True) as file:
                await one.transfer(memory, file)
                print(1 / 0)
        with pytest.raises(ConflictError):
            async with one.file(tmp_path / "f", "x", publish=True) as file:
                await one.transfer(memory[:10], file)
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").stat().st_size == 1000


async def test_files_left_open_are_closed_with_the_agent_and_not_published(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"content")
    before = len(os.listdir("/proc/self/fd"))
    async with agent() as one:
        await one.file(tmp_path / "r")
        for _ in range(3):
            # Not kept by the caller: the agent keeps them.
            await one.file(tmp_path / "w", "w", publish=True)
        async with one.file(tmp_path / "r"):
            pass
        assert len(one._files) == 4
    assert len(os.listdir("/proc/self/fd")) == before
    assert names(tmp_path) == ["r"]


async def test_a_closed_agent_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"content")
    one = agent()
    async with one:
        opening = asyncio.create_task(_opened(one.file(tmp_path / "r")))
        for _ in range(2):
            await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await opening
    for call in (
        one.file(tmp_path / "r"),
        one.store(f"file://{tmp_path}"),
        one.exists(["a"]),
        one.delete(["a"]),
        one.stat("a"),
    ):
        with pytest.raises(ClosedError):
            await call  # type: ignore[attr-defined]
    with pytest.raises(ClosedError):
        await anext(one.list("."))


async def _opened(opening: Opening[FileRegion]) -> FileRegion:
    return await opening


async def test_files_of_a_quarantined_transfer_stay_open(tmp_path: Path) -> None:
    faulty = FaultyBackend(load_backend("posix"))
    limits = faulty.limits
    faulty.limits = type(limits)(max_ops=limits.max_ops, max_op_nbytes=limits.max_op_nbytes, drain_seconds=0.05)
    async with Agent("storage", backends=["memory", "directory", faulty]) as one:
        memory = await one.register(pattern(1 << 20))
        region = FileRegion(
            str(tmp_path / "f"), os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT), -1, 1 << 20, False, _never_called
        )
        with faulty.hang(stubborn=True) as gate:
            transfer = one.submit(memory, region)
            await gate.reached()
            transfer.cancel()
            with pytest.raises(Quarantined):
                await transfer
            assert region.quarantined
            with pytest.raises(TransferError, match="stays open"):
                await region.aclose()
            os.fstat(region.fd)
        gate.release()
        await asyncio.gather(*one._dispatcher._ops.values(), return_exceptions=True)
        assert faulty.in_flight == 0
    os.close(region.fd)


async def _never_called(publish: bool) -> None:
    raise AssertionError("a quarantined file was closed")


# Objects by URL and by store.


async def test_stores_and_urls_name_the_same_objects(tmp_path: Path) -> None:
    sent, got = pattern(1000), np.zeros(1000, np.uint8)
    async with agent() as one:
        store = await one.store(f"file://{tmp_path}/room")
        await one.transfer(await one.register(sent), store.object("deep/key"))
        source = await one.object(f"file://{tmp_path}/room/deep/key")
        await one.transfer(source, await one.register(got))
        assert_same(got, sent)
        by_path = await one.object(tmp_path / "room" / "deep" / "key", 1000)
        await one.transfer(by_path[500:], (await one.register(got))[:500])
        assert_same(got[:500], sent[500:])
        target = await one.object(tmp_path / "new" / "room" / "key", if_none_match=True)
        await one.transfer(by_path, target)
        with pytest.raises(ConflictError):
            await one.transfer(by_path, target)
        found = await store.stat("deep/key")
        assert (found.key, found.nbytes) == ("deep/key", 1000)
        assert "file" in repr(store)


async def test_asking_about_files_makes_no_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_bytes(b"12345")
    async with agent() as one:
        wanted = ["there", "./there", str(tmp_path / "no" / "where"), "no/../there", tmp_path / "there", "there/below"]
        assert list(await one.exists(wanted)) == [True, True, False, True, True, False]
        found = await one.stat("there")
        assert (found.key, found.nbytes) == ("there", 5)
        with pytest.raises(NotFoundError, match="where"):
            await one.stat("no/where")
        assert [one async for one in one.list(tmp_path / "nowhere")] == []
        assert [one.key async for one in one.list(tmp_path)] == ["there"]
        await one.delete(["no/where", "there"])
    assert names(tmp_path) == []


async def test_what_is_no_list_of_urls_or_keys(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    async with agent() as one:
        store = await one.store(f"file://{tmp_path}")
        wrong: Any
        for wrong in ("s", b"s", tmp_path / "s"):
            with pytest.raises(TypeError, match="list"):
                await one.exists(wrong)
            with pytest.raises(TypeError, match="list"):
                await one.delete(wrong)
        for wrong in ("s", [b"s"], [None]):
            with pytest.raises(TypeError, match="key"):
                await store.exists(wrong)
            with pytest.raises(TypeError, match="key"):
                await store.delete(wrong)
            with pytest.raises(TypeError, match="key"):
                store.objects(wrong, 5)
        for wrong in ([""], []):
            with pytest.raises(DescriptorError):
                store.objects(wrong, 5)
        with pytest.raises(DescriptorError):
            await store.exists([""])
        assert list(await store.exists([])) == []
        await store.delete([])
        assert list(await one.exists([])) == []
        for url in ("file:///", f"{tmp_path}/", "s3://bucket", "gopher://x/y"):
            with pytest.raises(ConfigurationError):
                await one.object(url)
    assert (tmp_path / "s").exists()


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "/absolute", "a//b", "."])
async def test_keys_do_not_leave_the_store(tmp_path: Path, key: str) -> None:
    async with agent() as one:
        store = await one.store(f"file://{tmp_path}/room")
        memory = await one.register(pattern(10))
        with pytest.raises((DescriptorError, TransferError, PartsFailed)):
            await one.transfer(memory, store.object(key))
        with pytest.raises(DescriptorError):
            await store.exists([key])
    assert names(tmp_path) == ["room"]


# Which backends there are.


async def test_backends_of_servers_are_loaded_when_they_are_asked_for(seaweed: Server) -> None:
    async with Agent("default") as one:
        assert "s3" not in one._backends
        memory = await one.register(pattern(1000))
        stores = await asyncio.gather(*(one.store(f"s3://bench/{fresh_prefix()}", **s3_options(seaweed)) for _ in range(3)))
        assert list(one._backends).count("s3") == 1
        assert "s3" not in memory.keys
        for store in stores:
            await one.transfer(memory, store.object("x"))
        assert one.statistics().nbytes["s3"] == 3000
        plan = one.explain(memory, stores[0].object("y"))
        assert (plan.route, "zero-copy HTTP" in plan.how) == ("s3", True)


async def test_an_agent_that_closes_while_a_backend_is_loaded() -> None:
    async with Agent("default") as one:
        opening = asyncio.create_task(
            one.store("s3://bench/", endpoint_url="http://127.0.0.1:9", access_key="a", secret_key="b")
        )
        await asyncio.sleep(0)
    with pytest.raises((ClosedError, TransferError)):
        await opening


async def test_backends_that_were_not_asked_for_are_not_added(tmp_path: Path) -> None:
    async with Agent("small", backends=["memory"]) as one:
        with pytest.raises(ConfigurationError, match="posix"):
            await one.file(tmp_path / "f", "w")
        with pytest.raises(ConfigurationError, match="'s3'"):
            await one.store("s3://bucket/")
    assert names(tmp_path) == []


async def test_a_backend_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Agent("default") as one:
        monkeypatch.setattr("nixl_async.agent.load_backend", _missing)
        for _ in range(2):
            with pytest.raises(MissingDependency, match="pip install"):
                await one.store("gs://bucket/")
        assert "gcs" not in one._backends


def _missing(name: str) -> None:
    raise MissingDependency(f"the {name} backend needs a package: pip install 'nixl-async[{name}]'")


async def test_a_backend_that_does_not_open_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Broken(DirectoryBackend):
        name = "gcs"

        async def open(self, host: Any) -> None:
            raise MissingDependency("no, on purpose")

        async def aclose(self) -> None:
            closed.append(self.name)

    async with Agent("default") as one:
        monkeypatch.setattr("nixl_async.agent.load_backend", lambda name: Broken())
        with pytest.raises(MissingDependency):
            await one.store("gs://bucket/")
        assert "gcs" not in one._backends
    assert closed == ["gcs"]


async def test_two_kinds_of_storage_without_a_way(tmp_path: Path) -> None:
    async with agent() as one:
        file = await one.file(tmp_path / "f", "w", nbytes=10)
        with pytest.raises(NoRoute, match="was asked for"):
            await one.transfer(file, file, backend="posix")
        with pytest.raises(ConfigurationError, match="'s3'"):
            await one.transfer(file, file, backend="s3")


# Stores of somebody else's.


class Shelf(StorageBackend):
    """A store as a plug-in brings it: objects in this process, under a URL scheme of its own."""

    name = "shelf"
    kinds = frozenset()
    schemes = ("shelf", "crate")
    reports = True

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], bytes] = {}
        self.opened: list[StoreAddress] = []

    def refusal(self, src: Side, dst: Side) -> str | None:
        if {src.kind, dst.kind} != {MemoryKind.DRAM, MemoryKind.OBJECT} or src.peer or dst.peer:
            return "it copies between DRAM of this process and objects"
        region = (src if src.kind is MemoryKind.OBJECT else dst).regions[0]
        assert isinstance(region, ObjectRegion)
        return None if region.store.scheme in self.schemes else f"it serves no {region.store.scheme}://"

    async def open_store(self, address: StoreAddress) -> None:
        if address.options:
            raise ConfigurationError(f"{address} takes no options")
        self.opened.append(address)

    async def copy(self, op: Op) -> None:
        plan, put = op.plan, op.plan.dst.kind is MemoryKind.OBJECT
        for region, number, start, stop, offset in object_parts(plan.dst if put else plan.src, plan.lengths):
            key = region.store.scheme, region.store.bucket, region.objects[number]
            memory = (plan.src if put else plan.dst).addresses
            pieces = [(int(memory[at]), int(plan.lengths[at])) for at in range(start, stop)]
            if put:
                self.objects[key] = b"".join(ctypes.string_at(*piece) for piece in pieces)
            else:
                for address, nbytes in pieces:
                    ctypes.memmove(address, self.objects[key][offset:], nbytes)
                    offset += nbytes
        op.report(0, op.nbytes, None)

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        found = [(key, self.objects.get((address.scheme, address.bucket, key))) for key in keys]
        return [None if held is None else Stat(key, len(held)) for key, held in found]

    async def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        for (scheme, bucket, key), held in sorted(self.objects.items()):
            if (scheme, bucket) == (address.scheme, address.bucket) and key.startswith(prefix):
                yield Stat(key, len(held))

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        for key in keys:
            self.objects.pop((address.scheme, address.bucket, key), None)


async def test_a_backend_of_somebody_elses_serves_its_own_url_scheme() -> None:
    sent, got = pattern(4 * 1000), np.zeros(4 * 1000, np.uint8)
    keys = ["a", "b", "c", "d"]
    shelf = Shelf()
    async with Agent("storage", backends=[shelf, "directory"]) as one:
        source, target = await one.register(sent), await one.register(got)
        store = await one.store("shelf://top/kv/")
        assert "shelf" in repr(store)
        assert [str(address) for address in shelf.opened] == ["shelf://top/kv/"]
        places = store.objects(keys, 1000)
        result = await one.transfer(source.pages([3, 2, 1, 0], 1000), places)
        assert (result.route, shelf.objects["shelf", "top", "kv/a"]) == ("shelf", sent[3000:].tobytes())
        await one.transfer(places[:], target.pages([3, 2, 1, 0], 1000))
        assert_same(got, sent)
        assert await store.exists(["a", "e"]) == [True, False]
        await one.transfer(source[:10], await one.object("shelf://top/kv/e", 10))
        assert (await one.stat("shelf://top/kv/e")).nbytes == 10
        await one.delete(["shelf://top/kv/e"])
        assert [stat.key async for stat in one.list("shelf://top/kv/")] == keys
        # Each scheme is a kind of store of its own, as ours are.
        other = await one.object("crate://top/x", 1000)
        with pytest.raises(DescriptorError, match="mixes"):
            await one.transfer(source[:2000], [other[:], places.select([0])])
        with pytest.raises(ConfigurationError, match="known are .*s3://.*shelf://, crate://"):
            await one.store("shelves://top/")
        with pytest.raises(ConfigurationError, match="takes no options"):
            await one.store("shelf://top/", region="here")


async def test_a_backend_that_is_given_goes_before_ours_and_in_the_order_given(tmp_path: Path) -> None:
    class Own(DirectoryBackend):
        name = "own"

    async with Agent("storage", backends=["memory", Own(), "directory"]) as one:
        assert "by own" in repr(await one.store(f"file://{tmp_path}/"))
    async with Agent("storage", backends=["memory", "directory", Own()]) as one:
        assert "by directory" in repr(await one.store(f"file://{tmp_path}/"))
