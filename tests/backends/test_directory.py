"""A directory as a store: keys stay inside, listings are in order, names appear whole or not at all."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nixl_async import Agent, ConfigurationError, ConflictError, DescriptorError
from nixl_async.backend import StoreAddress
from nixl_async.backends.directory import DirectoryBackend, path_of
from nixl_async.errors import AccessError, BackendError, PartsFailed, TransferError
from nixl_async.testing import pattern
from nixl_async.testing.cancelling import cancel_after, cancel_at_await
from nixl_async.testing.patterns import assert_same
from tests.agents import ROOT


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with Agent("directory", backends=["directory", "memory"]) as agent:
        yield agent


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


PART = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=6)


@given(st.lists(st.one_of(PART, st.sampled_from(["..", ".", "", "a"])), min_size=1, max_size=5))
def test_no_key_leaves_the_directory(parts: list[str]) -> None:
    address, key = StoreAddress("file", "/some/where"), "/".join(parts)
    if any(part in ("", ".", "..") for part in key.split("/")):
        with pytest.raises(DescriptorError, match=re.escape(repr(key))):
            path_of(address, key)
    else:
        path = path_of(address, key)
        assert os.path.normpath(path) == path == f"/some/where/{key}"


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd", "a//b", "a/", "./a", "..", "nul\0"])
async def test_keys_that_would_leave_are_refused_by_every_call(agent: Agent, tmp_path: Path, key: str) -> None:
    (tmp_path / "out").write_text("precious")
    store = await agent.store(f"file://{tmp_path}/store")
    memory = await agent.register(np.zeros(8, np.uint8))
    for call in (
        lambda: agent.transfer(memory, store.object(key)),
        lambda: agent.transfer(store.object(key), memory),
        lambda: store.exists([key]),
        lambda: store.delete([key]),
    ):
        with pytest.raises((DescriptorError, BackendError)):
            await call()
    assert (tmp_path / "out").read_text() == "precious"
    assert everything(tmp_path) == ["out"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(st.text("ab-/.0", min_size=1, max_size=5), max_size=12), prefix=st.text("ab-/.", max_size=3))
def test_listings_are_in_the_order_of_keys(tmp_path_factory: pytest.TempPathFactory, keys: set[str], prefix: str) -> None:
    directory = tmp_path_factory.mktemp("listing")
    made = set()
    for key in sorted(keys):
        if any(part in ("", ".", "..") for part in key.split("/")):
            continue
        path = directory / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        except OSError:
            # A file is where a directory should be, or the other way round.
            continue
        made.add(key)

    async def listed() -> list[str]:
        async with Agent("lists", backends=["directory"]) as agent:
            return [found.key async for found in (await agent.store(f"file://{directory}")).list(prefix)]

    assert asyncio.run(listed()) == sorted(key for key in made if key.startswith(prefix))


async def test_a_listing_shows_no_file_that_is_being_written_and_all_others(agent: Agent, tmp_path: Path) -> None:
    store = await agent.store(f"file://{tmp_path}")
    memory = await agent.register(pattern(100))
    await agent.transfer(memory, store.object("mine.part"))
    (tmp_path / f".{'0' * 24}.part").write_bytes(b"half")
    assert [found.key async for found in store.list()] == ["mine.part"]
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone").rmdir()
    assert [found.key async for found in store.list("gone/")] == []


async def test_a_key_as_long_as_names_may_be(agent: Agent, tmp_path: Path) -> None:
    store = await agent.store(f"file://{tmp_path}")
    memory = await agent.register(pattern(100))
    await agent.transfer(memory, store.object("k" * 255))
    with pytest.raises(TransferError, match="name too long"):
        await agent.transfer(memory, store.object("k" * 256))
    assert everything(tmp_path) == ["k" * 255]


async def test_of_many_conditional_writes_one_wins(agent: Agent, tmp_path: Path) -> None:
    store = await agent.store(f"file://{tmp_path}")
    memories = [await agent.register(np.full(50_000, n, np.uint8)) for n in range(12)]
    ended = await asyncio.gather(
        *(agent.transfer(memory, store.object("once", if_none_match=True)) for memory in memories), return_exceptions=True
    )
    won = [n for n, end in enumerate(ended) if not isinstance(end, BaseException)]
    assert len(won) == 1
    assert sum(isinstance(end, ConflictError) for end in ended) == 11
    assert (tmp_path / "once").read_bytes() == bytes([won[0]]) * 50_000
    assert everything(tmp_path) == ["once"]


@pytest.mark.parametrize("options", [{}, {"direct": True, "fsync": True}])
async def test_cancelled_writes_leave_whole_objects_only(agent: Agent, tmp_path: Path, options: dict[str, Any]) -> None:
    n, nbytes = 200, 60_000
    store = await agent.store(f"file://{tmp_path}", **options)
    content = pattern(n * nbytes)
    memory = await agent.register(content)
    objects = store.objects([f"{i:03d}" for i in range(n)], nbytes)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await agent.transfer(memory, objects)
    seconds = loop.time() - began
    cancelled = 0
    for step in range(6):
        await store.delete([f"{i:03d}" for i in range(n)])
        cancelled += await cancel_after(agent.transfer(memory, objects), seconds * step / 6)
        for name in everything(tmp_path):
            assert_same(np.fromfile(tmp_path / name, np.uint8), content[int(name) * nbytes : (int(name) + 1) * nbytes], name)
    assert cancelled


@pytest.mark.parametrize("times", [1, 3])
async def test_an_upload_cancelled_while_it_begins_leaves_nothing(tmp_path: Path, times: int) -> None:
    async with Agent("uploads", backends=["directory"]) as agent:
        store = await agent.store(f"file://{tmp_path}")
        backend = store._backend
        fds = len(os.listdir("/proc/self/fd"))
        assert await cancel_at_await(backend.upload(store.address, "key", 10), 0, times=times)
        assert everything(tmp_path) == []
        assert len(os.listdir("/proc/self/fd")) == fds


async def test_one_object_that_fails_does_not_keep_the_others(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    store = await agent.store(f"file://{tmp_path}")
    memory = await agent.register(pattern(3000))
    with pytest.raises(PartsFailed, match="1 object failed") as caught:
        await agent.transfer(memory, store.objects(["a", "taken", "b"], 1000))
    assert list(caught.value.parts) == [1]
    assert everything(tmp_path) == ["a", "b"]


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system needs root")
async def test_a_full_file_system_fails_what_does_not_fit(agent: Agent, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("mounting is forbidden here")
    try:
        store = await agent.store(f"file://{mount}")
        memory = await agent.register(pattern(2 << 20))
        with pytest.raises(PartsFailed, match="No space left"):
            await agent.transfer(memory, store.objects(["a", "b"], [100_000, (2 << 20) - 100_000]))
        assert everything(mount) == ["a"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("options", [{}, {"direct": True}], ids=["buffered", "direct"])
@pytest.mark.parametrize(("n_threads", "left"), [(2, 48), (1, 5)])
async def test_few_descriptors_are_enough(tmp_path: Path, n_threads: int, left: int, options: dict[str, Any]) -> None:
    n, page = 300, 4096
    backend = DirectoryBackend(n_threads=n_threads)
    async with Agent("directory", backends=[backend, "memory"]) as agent:
        store = await agent.store(f"file://{tmp_path}", **options)
        source, target = pattern(n * page, 1), np.zeros(n * page, np.uint8)
        here, back = await agent.register(source), await agent.register(target)
        keys = [f"k{number}" for number in range(n)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        try:
            # What the threads use of their own is opened before.
            await agent.transfer(here[0:page], store.object(keys[0], page))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + left, hard))
            await agent.transfer(here.pages(np.arange(n), page), store.objects(keys, page))
            await agent.transfer(store.objects(keys, page), back.pages(np.arange(n), page))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert_same(target, source)
        assert everything(tmp_path) == sorted(keys)


async def test_no_descriptor_at_all_is_an_error_that_says_so(agent: Agent, tmp_path: Path) -> None:
    store = await agent.store(f"file://{tmp_path}")
    here = await agent.register(pattern(64, 1))
    await agent.transfer(here, store.object("k", 64))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        with pytest.raises(BackendError, match="RLIMIT_NOFILE allows 1 descriptors") as raised:
            await agent.transfer(store.object("k", 64), here)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "opening" in str(raised.value)


async def test_what_is_no_directory(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store_url = f"file://{tmp_path}/file"
    with pytest.raises((ConfigurationError, BackendError, AccessError)):
        store = await agent.store(store_url)
        await agent.transfer(await agent.register(np.zeros(1, np.uint8)), store.object("x"))
    with pytest.raises(ConfigurationError, match="direct='yes'"):
        await agent.store(f"file://{tmp_path}", direct="yes")
    assert "closed" in DirectoryBackend().how(None, None)  # type: ignore[arg-type]


KILLED = """
import asyncio, sys
import numpy as np
from nixl_async import Agent

async def main():
    async with Agent("killed", backends=["directory", "memory"]) as agent:
        store = await agent.store("file://" + sys.argv[1])
        contents = [await agent.register(np.full(10 * 50_000, n, np.uint8)) for n in (1, 2)]
        objects = store.objects([str(i) for i in range(10)], 50_000)
        await agent.transfer(contents[0], objects)
        print("ready", flush=True)
        while True:
            for memory in contents:
                await agent.transfer(memory, objects)

asyncio.run(main())
"""


async def _names(directory: Path) -> list[str]:
    async with Agent("lists", backends=["directory"]) as agent:
        return [found.key async for found in (await agent.store(f"file://{directory}")).list()]


def test_killed_at_any_moment_every_object_is_whole(tmp_path: Path) -> None:
    for turn in range(5):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(3 + 5 * turn):
                (tmp_path / str(turn)).read_bytes()
            process.send_signal(signal.SIGKILL)
        for number in range(10):
            content = (tmp_path / str(number)).read_bytes()
            assert len(content) == 50_000
            assert set(content) in ({1}, {2})
    assert asyncio.run(_names(tmp_path)) == [str(number) for number in range(10)]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/x", "a//b", ".", "a/./b", "x\0"])
async def test_keys_that_leave_the_directory_are_refused_when_they_are_named(agent: Agent, tmp_path: Path, key: str) -> None:
    store = await agent.store(f"file://{tmp_path}/store")
    with pytest.raises(DescriptorError, match="is no file"):
        store.objects(["fine", key], 100)
    with pytest.raises(DescriptorError, match="is no file"):
        await store.exists([key])
    with pytest.raises(DescriptorError, match="is no file"):
        await store.delete([key])
