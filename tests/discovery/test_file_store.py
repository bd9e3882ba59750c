"""Entries in files: strangers among them, clocks that differ, a directory that comes late or goes; how often it is read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from nixl_async.discovery import open_store
from nixl_async.discovery.file_store import MAX_FILE_NBYTES, FileStore, _Look
from tests.discovery.test_store import value_of

PATIENCE_SECONDS = 20.0


def store(directory: Path) -> FileStore:
    opened = open_store(f"file://{directory}?ttl=2")
    assert isinstance(opened, FileStore)
    return opened


async def test_strangers_in_the_directory(tmp_path: Path) -> None:
    ours = store(tmp_path)
    await ours.put("a", b"1")
    (tmp_path / "README").write_text("hello")
    (tmp_path / "no-life.agent").write_bytes(b'"no-life"\n1')
    (tmp_path / "sub.agent").mkdir()
    for stem, content in {
        "empty": b"",
        "torn": b'"to',
        "theft": b'"a"\nstolen',
        "large": b'"large"\n' + bytes(MAX_FILE_NBYTES),
        "deep": b"[" * 10000,
    }.items():
        (tmp_path / f"{stem}.agent").write_bytes(content)
        (tmp_path / f"{stem}.alive").touch()
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(ours.watch()) as seen:
        values = (await anext(seen)).values
    assert values["a"] == b"1"
    # Files that are malformed are entries that nobody can read: what reads values says so.
    assert {name: value for name, value in values.items() if value} == {"a": b"1"}
    assert "no-life" not in values
    await ours.aclose()


async def test_a_directory_that_comes_late_and_goes(tmp_path: Path) -> None:
    ours, theirs = store(tmp_path / "agents"), store(tmp_path / "agents")
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(theirs.watch()) as seen:
        assert (await anext(seen)).values == {}
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
        keeping = asyncio.create_task(ours.keep())
        shutil.rmtree(tmp_path / "agents")
        assert await value_of(seen, "a") is None
        await keeping
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
    await ours.aclose()
    await theirs.aclose()


def _put(directory: Path, name: str, stamp: float) -> None:
    (directory / f"{name}.agent").write_bytes(f'"{name}"\n{name}'.encode())
    (directory / f"{name}.alive").touch()
    os.utime(directory / f"{name}.alive", (stamp, stamp))


@pytest.mark.parametrize("skew", [-1e6, 0.0, 1e6])
def test_ages_do_not_depend_on_this_hosts_clock(tmp_path: Path, skew: float) -> None:
    now = time.time() + skew
    _put(tmp_path, "alive", now)
    _put(tmp_path, "recent", now - 1)
    _put(tmp_path, "dead", now - 100)
    look = _Look(tmp_path, 2.0)
    assert look.first() == {"alive": b"alive", "recent": b"recent"}
    # One that shows a sign of life is alive, whatever time it says.
    _put(tmp_path, "dead", now - 99)
    look._beats_at -= 100
    assert look.again() == {"dead": b"dead"}
    # Signs of life that stop count from when they were seen last.
    look._beats["alive"].seen_at -= 2.1
    assert look.again() == {"alive": None}


def test_a_replaced_file_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    _put(tmp_path, "a", time.time())
    look = _Look(tmp_path, 2.0)
    look.first()
    for i in range(20):
        fresh = tmp_path / ".fresh"
        fresh.write_bytes(f'"a"\n{i:03}'.encode())
        os.replace(fresh, tmp_path / "a.agent")
        changed: dict[str, bytes | None] = {}
        for _ in range(2):
            changed |= look.again()
        assert changed == {"a": f"{i:03}".encode()}


async def test_a_quiet_directory_is_looked_at_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    again = _Look.again

    def counted(self: _Look) -> dict[str, bytes | None]:
        looks.append(1)
        return again(self)

    monkeypatch.setattr(_Look, "again", counted)
    ours = store(tmp_path)
    async with contextlib.aclosing(ours.watch()) as seen:
        await anext(seen)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(4):
                await anext(seen)
        # 80 at the rate at which it begins.
        assert len(looks) < 20
        before = len(looks)
        ours.hurry()
    await ours.aclose()
    assert before
