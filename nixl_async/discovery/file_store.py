"""`file:///directory`: one file for each agent, on a file system that all of them see.

An entry is a file that is renamed into place; beside it lies an empty one whose modification time its owner renews. Who watches
looks at the directory again and again: every 50 ms while something changes or somebody waits, less often, down to once a second,
while nothing does; at the signs of life three times in a lease. Ages are measured between modification times and by the watcher's
own clock, so the clocks of hosts need not agree. Good for some hundred agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from nixl_async.discovery.store import DiscoveryStore, Seen, StoreURL
from nixl_async.errors import ConfigurationError

POLL_SECONDS = (0.05, 1.0)
"""How often the directory is looked at: while something happens, and while nothing does."""
MAX_FILE_NBYTES = 16384
_ENTRY, _ALIVE = ".agent", ".alive"
_LONGEST = 200
T = TypeVar("T")


@dataclass(slots=True)
class _Beat:
    """The modification time of an owner's file, and when by our clock it was last seen to change."""

    stamp: int
    seen_at: float


class FileStore(DiscoveryStore):
    """Entries as files. Option: `ttl` (seconds, 10).

    Raises:
        ConfigurationError: the URL has no absolute path.
    """

    def __init__(self, url: StoreURL) -> None:
        url.check_options("ttl")
        if url.hosts or not url.path.strip("/"):
            raise ConfigurationError(f"{url} is not of the form file:///directory")
        self.lease_seconds = url.lease_seconds
        self._directory = Path(url.path)
        self._owned: dict[str, bytes] = {}
        # Of its own: a file system that hangs must not take the loop's threads with it.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="nixl-discovery")
        self._hurry = asyncio.Event()

    async def put(self, name: str, value: bytes) -> None:
        """Publish a value."""
        content = json.dumps(name).encode() + b"\n" + value
        await self._run(partial(self._write, name, content))
        self._owned[name] = content

    async def keep(self) -> None:
        """Renew the modification times; return when one of the files is gone."""
        while True:
            await asyncio.sleep(self.lease_seconds / 3)
            with contextlib.suppress(OSError):
                if not await self._run(self._renew):
                    return

    async def remove(self, name: str) -> None:
        """Remove the files, unless another has replaced them."""
        content = self._owned.pop(name, None)
        if content is not None:
            await self._run(partial(self._unlink, name, content))

    async def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all entries, then each change."""
        look = _Look(self._directory, self.lease_seconds)
        yield Seen(await self._run(look.first), whole=True)
        least, most = POLL_SECONDS
        pause = least
        while True:
            self._hurry.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
                    # Whoever waits does so for several rounds: still not more often than this.
                    await asyncio.sleep(least)
            changed = await self._run(look.again)
            pause = least if changed or self._hurry.is_set() else min(1.5 * pause, most)
            if changed:
                yield Seen(changed)

    def hurry(self) -> None:
        """Look again soon."""
        self._hurry.set()

    async def aclose(self) -> None:
        """Remove what this object has put."""
        try:
            for name in list(self._owned):
                await self.remove(name)
        finally:
            self._threads.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # On a thread.

    def _path(self, name: str, ending: str) -> Path:
        return self._directory / (_stem(name) + ending)

    def _write(self, name: str, content: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        fresh = self._directory / f".{secrets.token_hex(8)}"
        try:
            fresh.write_bytes(content)
            # Alive first: an entry without a sign of life is none.
            self._path(name, _ALIVE).touch()
            os.replace(fresh, self._path(name, _ENTRY))
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def _renew(self) -> bool:
        for name in list(self._owned):
            try:
                if self._path(name, _ENTRY).stat().st_size == 0:
                    return False
                os.utime(self._path(name, _ALIVE))
            except FileNotFoundError:
                return False
        return True

    def _unlink(self, name: str, content: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path(name, _ENTRY).read_bytes() == content:
                self._path(name, _ENTRY).unlink()
                self._path(name, _ALIVE).unlink(missing_ok=True)


class _Look:
    """What a watch knows of a directory."""

    def __init__(self, directory: Path, lease_seconds: float) -> None:
        self._directory, self._lease_seconds = directory, lease_seconds
        self._stamp = 0
        self._changing = False
        self._beats_at = 0.0
        # By file stem: what the entry's file was when it was read, and what was in it; signs of life; what was told.
        self._files: dict[str, tuple[tuple[int, int, int], str, bytes]] = {}
        self._beats: dict[str, _Beat] = {}
        self._told: dict[str, bytes] = {}

    def first(self) -> dict[str, bytes | None]:
        self._scan(first=True)
        return dict(self._differences())

    def again(self) -> dict[str, bytes | None]:
        try:
            stamp = self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        # A directory can change twice within one tick of its clock: it is read once more after it has.
        changed = stamp != self._stamp
        if changed or self._changing or time.monotonic() - self._beats_at > self._lease_seconds / 3:
            self._stamp, self._changing = stamp, changed
            self._scan(first=False)
        return self._differences()

    def _scan(self, *, first: bool) -> None:
        now = self._beats_at = time.monotonic()
        entries: dict[str, tuple[int, int, int]] = {}
        beats: dict[str, int] = {}
        try:
            with os.scandir(self._directory) as found:
                for one in found:
                    stem, _, ending = one.name.rpartition(".")
                    with contextlib.suppress(FileNotFoundError):
                        if f".{ending}" == _ENTRY and one.is_file():
                            stat = one.stat()
                            entries[stem] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                        elif f".{ending}" == _ALIVE:
                            beats[stem] = one.stat().st_mtime_ns
        except FileNotFoundError:
            pass
        newest = max(beats.values(), default=0)
        for stem, stamp in beats.items():
            known = self._beats.get(stem)
            if known is None:
                # Nobody knows what the file system's clock shows; it is at least where the newest sign of life is.
                self._beats[stem] = _Beat(stamp, now - (newest - stamp) / 1e9 if first else now)
            elif known.stamp != stamp:
                known.stamp, known.seen_at = stamp, now
        self._beats = {stem: beat for stem, beat in self._beats.items() if stem in beats}
        self._files = {stem: file for stem, file in self._files.items() if stem in entries}
        for stem, identity in entries.items():
            known_file = self._files.get(stem)
            if known_file is None or known_file[0] != identity:
                self._read(stem, identity)

    def _read(self, stem: str, identity: tuple[int, int, int]) -> None:
        try:
            with open(self._directory / (stem + _ENTRY), "rb") as file:
                content = file.read(MAX_FILE_NBYTES + 1)
        except FileNotFoundError:
            return
        except PermissionError:
            content = b""
        first, _, value = content.partition(b"\n")
        try:
            name = json.loads(first)
        except (ValueError, RecursionError):
            name = None
        if not isinstance(name, str) or _stem(name) != stem or len(content) > MAX_FILE_NBYTES:
            # What is wrong with it is said where values are read.
            name, value = stem, b""
        self._files[stem] = (identity, name, value)

    def _differences(self) -> dict[str, bytes | None]:
        oldest = time.monotonic() - self._lease_seconds
        there = {
            name: value
            for stem, (_, name, value) in self._files.items()
            if stem in self._beats and self._beats[stem].seen_at >= oldest
        }
        changed: dict[str, bytes | None] = {n: v for n, v in there.items() if self._told.get(n) != v}
        changed.update({name: None for name in self._told if name not in there})
        self._told = there
        return changed


def _stem(name: str) -> str:
    plain = quote(name, safe="").replace(".", "%2E")
    return plain if len(plain) <= _LONGEST else f"~{hashlib.sha256(name.encode()).hexdigest()}"
