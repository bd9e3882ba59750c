"""Opening files, and giving them their names: whole or not at all, whatever happens in between."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import (
    Agent,
    ConfigurationError,
    ConflictError,
    FileRegion,
    NotFoundError,
)
from nixl_async import files as files_module
from nixl_async.errors import AccessError, BackendError, OutOfSpace
from nixl_async.files import FileOptions, open_file, os_error
from nixl_async.testing import pattern
from nixl_async.testing.cancelling import cancel_at_await
from nixl_async.testing.patterns import assert_same
from tests.agents import ROOT


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with Agent("files", backends=["posix", "memory"]) as agent:
        yield agent


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture(params=["unnamed", "parts"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with files that have no name, and one without."""
    if request.param == "parts":
        monkeypatch.setattr(files_module, "_open_unnamed", lambda directory: None)
    return str(request.param)


async def write(agent: Agent, file: FileRegion, content: Any) -> None:
    async with await agent.register(content) as memory:
        await agent.transfer(memory, file)


@pytest.mark.parametrize("mode", ["w", "x"])
@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("direct", [False, True])
async def test_a_published_file_appears_whole(
    agent: Agent, tmp_path: Path, way: str, mode: str, fsync: bool, direct: bool
) -> None:
    async with agent.file(tmp_path / "f", mode, publish=True, fsync=fsync, direct=direct) as file:
        await write(agent, file, pattern(50_000))
        assert names(tmp_path) == ([] if way == "unnamed" else [".f.0.part"])
    assert names(tmp_path) == ["f"]
    umask = os.umask(0o022)
    os.umask(umask)
    assert os.stat(tmp_path / "f").st_mode & 0o777 == 0o666 & ~umask
    assert_same(np.fromfile(tmp_path / "f", np.uint8), pattern(50_000))


async def test_a_block_that_raises_leaves_the_old_file(agent: Agent, tmp_path: Path, way: str) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError, match="mine"):
        async with agent.file(tmp_path / "f", "w", publish=True) as file:
            await write(agent, file, pattern(5000))
            raise RuntimeError("mine")
    assert names(tmp_path) == ["f"]
    assert (tmp_path / "f").read_text() == "old"


async def test_x_refuses_a_name_that_is_taken_before_and_at_the_end(agent: Agent, tmp_path: Path, way: str) -> None:
    (tmp_path / "f").write_text("old")
    for publish in (False, True):
        with pytest.raises(ConflictError, match="exists"):
            await agent.file(tmp_path / "f", "x", publish=publish)
    file = await agent.file(tmp_path / "g", "x", publish=True)
    await write(agent, file, pattern(100))
    (tmp_path / "g").write_text("somebody was faster")
    with pytest.raises(ConflictError, match="closing"):
        await file.aclose()
    assert names(tmp_path) == ["f", "g"]
    assert (tmp_path / "g").read_text() == "somebody was faster"


async def test_what_cannot_be_published_leaves_nothing(
    agent: Agent, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await agent.file(tmp_path / "f", "w", publish=True)
    (tmp_path / "f").mkdir()
    with pytest.raises(BackendError, match="closing"):
        await file.aclose()
    assert names(tmp_path) == ["f"]

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    file = await agent.file(tmp_path / "g", "w", publish=True, fsync=True)
    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(BackendError, match="Input/output error"):
        await file.aclose()
    assert names(tmp_path) == ["f"]


async def test_fsync_comes_before_the_name_and_the_directory_after(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, bool]] = []
    for name in ("fdatasync", "fsync"):
        real = getattr(os, name)

        def watched(fd: int, name: str = name, real: Any = real) -> None:
            done.append((name, (tmp_path / "f").exists()))
            real(fd)

        monkeypatch.setattr(os, name, watched)
    async with agent.file(tmp_path / "f", "w", publish=True, fsync=True) as file:
        await write(agent, file, pattern(100))
    assert done == [("fdatasync", False), ("fsync", True)]
    done.clear()
    async with agent.file(tmp_path / "f", fsync=True):
        pass
    async with agent.file(tmp_path / "f", "w", publish=True):
        pass
    assert done == []


@pytest.mark.parametrize("options", [{"publish": True}, {"publish": True, "mode": "x"}, {"mode": "x"}])
async def test_cancelled_while_opening_no_file_is_left(tmp_path: Path, way: str, options: dict[str, Any]) -> None:
    wanted = FileOptions(**{"mode": "w", "nbytes": 1 << 20, "direct": True, **options})
    fds = len(os.listdir("/proc/self/fd"))
    assert await cancel_at_await(open_file(tmp_path / "f", wanted), 0, times=2)
    assert names(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) <= fds


async def test_cancelled_while_closing_the_file_is_published(agent: Agent, tmp_path: Path, way: str) -> None:
    file = await agent.file(tmp_path / "f", "w", publish=True, fsync=True)
    await write(agent, file, pattern(100))
    assert await cancel_at_await(file.aclose(), 0)
    await file.aclose()
    assert names(tmp_path) == ["f"]


async def test_opening_that_fails_half_way_leaves_nothing(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module, "_preallocate", full)
    for options in (FileOptions("x", 100), FileOptions("w", 100, publish=True, direct=True)):
        with pytest.raises(OutOfSpace, match="No space left"):
            await open_file(tmp_path / "f", options)
    assert names(tmp_path) == []


async def test_sizes(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "f"
    async with agent.file(path, "w", nbytes=10_000) as file:
        assert file.nbytes == 10_000
        assert os.stat(path).st_size == 10_000
        assert os.stat(path).st_blocks * 512 >= 10_000
    async with agent.file(path, "r+", nbytes=20_000) as file:
        assert file.nbytes == os.stat(path).st_size == 20_000
    async with agent.file(path, "r+", nbytes=5) as file:
        assert file.nbytes == os.stat(path).st_size == 20_000
    async with agent.file(path) as file:
        assert (file.nbytes, file.readonly) == (20_000, True)
    async with agent.file(path, "w") as file:
        assert not file.sized
        assert os.stat(path).st_size == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "a"}, "must be one of r, r\\+, w, x"),
        ({"mode": "r", "publish": True}, "needs mode 'w' or 'x'"),
        ({"mode": "r", "nbytes": 1}, "for the modes that write"),
        ({"mode": "w", "nbytes": -1}, "must not be negative"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        FileOptions(**options).check()


async def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFoundError):
        await open_file(tmp_path / "none", FileOptions())
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        # Opening a pipe must not wait for its other end.
        with pytest.raises(ConfigurationError, match="neither a file nor a block device"):
            await asyncio.wait_for(open_file(path, FileOptions()), 10)
    with pytest.raises(ConfigurationError, match="neither"):
        await open_file(tmp_path / "pipe", FileOptions("w"))
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (2, NotFoundError),
        (13, AccessError),
        (30, AccessError),
        (17, ConflictError),
        (28, OutOfSpace),
        (122, OutOfSpace),
        (5, BackendError),
    ],
)
def test_errors_of_the_operating_system(number: int, kind: type[Exception]) -> None:
    made = os_error(OSError(number, os.strerror(number)), "writing 'x'")
    assert type(made) is kind
    assert str(made) == f"writing 'x': {os.strerror(number)}"
    assert made.backend == "posix"


LIMITED = """
import asyncio, resource, sys
import numpy as np
from nixl_async import Agent
from nixl_async.errors import OutOfSpace

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

async def main():
    async with Agent("limited", backends=["posix", "memory"]) as agent:
        memory = await agent.register(np.zeros(1 << 20, np.uint8))
        for direct in (False, True):
            async with agent.file(sys.argv[1], "w", direct=direct) as file:
                try:
                    await agent.transfer(memory, file)
                except OutOfSpace as error:
                    print("OutOfSpace", error)
        try:
            await agent.file(sys.argv[1], "w", nbytes=200_000)
        except OutOfSpace as error:
            print("OutOfSpace", error)

asyncio.run(main())
"""


def test_a_limit_on_file_sizes_is_out_of_space(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "f")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OutOfSpace") == 3, done.stdout


async def test_several_at_once_and_the_last_one_counts(agent: Agent, tmp_path: Path, way: str) -> None:
    files = [await agent.file(tmp_path / "f", "w", publish=True) for _ in range(3)]
    for number, file in enumerate(files):
        await write(agent, file, np.full(1000, number, np.uint8))
    assert names(tmp_path) == ([] if way == "unnamed" else [f".f.{n}.part" for n in range(3)])
    for number in (1, 2, 0):
        await files[number].aclose()
        assert set((tmp_path / "f").read_bytes()) == {number}
    assert names(tmp_path) == ["f"]


async def test_parts_that_nobody_holds_are_removed_and_no_others(agent: Agent, tmp_path: Path, way: str) -> None:
    others = [".g.0.part", ".f.x.part", "f.0.part", f".f.{files_module.SWEPT}.part"]
    for name in [".f.0.part", ".f.7.part", *others]:
        (tmp_path / name).write_text("dead")
    (tmp_path / ".f.1.part").symlink_to(tmp_path / others[0])
    held = os.open(tmp_path / ".f.2.part", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with agent.file(tmp_path / "f", "w", publish=True) as file:
            await write(agent, file, pattern(100))
    finally:
        os.close(held)
    assert names(tmp_path) == sorted([".f.1.part", ".f.2.part", *others, "f"])


def test_a_part_that_was_swept_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = str(tmp_path / "f"), fcntl.flock
    swept = []

    def first_others(fd: int, how: int) -> None:
        if not how & fcntl.LOCK_NB and not swept:
            swept.append(names(tmp_path))
            files_module._sweep(path)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", first_others)
    fd, name = files_module._open_part(path, os.O_RDWR | os.O_CREAT)
    try:
        assert swept == [[".f.0.part"]]
        assert names(tmp_path) == [os.path.basename(name)]
        files_module._sweep(path)
        assert names(tmp_path) == [os.path.basename(name)]
    finally:
        os.close(fd)


async def test_a_long_name_of_many_bytes(agent: Agent, tmp_path: Path, way: str) -> None:
    path = tmp_path / ("ü" * 127)
    async with agent.file(path, "w", publish=True) as file:
        await write(agent, file, pattern(100))
    assert names(tmp_path) == [path.name]


KILLED = """
import asyncio, sys
import numpy as np
from nixl_async import Agent, files

if sys.argv[2] == "parts":
    files._open_unnamed = lambda directory: None

async def main():
    async with Agent("killed", backends=["posix", "memory"]) as agent:
        contents = [await agent.register(np.full(300_000, n, np.uint8)) for n in (1, 2)]
        print("ready", flush=True)
        while True:
            for memory in contents:
                async with agent.file(sys.argv[1], "w", publish=True) as file:
                    await agent.transfer(memory, file)

asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["unnamed", "parts"])
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path, way: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(300_000))
    found = set()
    for turn in range(6):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(path), way], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(5 + 7 * turn):
                content = path.read_bytes()
                assert len(content) == 300_000
                assert len(set(content)) == 1
            process.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
        found.add(content[0])
        # What the last one left, the next one has removed.
        assert len(names(tmp_path)) <= 2
    assert found <= {0, 1, 2}
    assert found & {1, 2}


STOPPED = KILLED.replace(
    "await agent.transfer(memory, file)", "await agent.transfer(memory, file); print('written', flush=True); input()"
)


@pytest.mark.parametrize("way", ["unnamed", "parts"])
async def test_what_a_killed_process_wrote_is_gone_at_the_next_opening(agent: Agent, tmp_path: Path, way: str) -> None:
    path = tmp_path / "f"

    def kill_in_the_middle() -> None:
        command = [sys.executable, "-c", STOPPED, str(path), way]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert process.stdout.readline() == b"written\n"
            # Alive, it keeps its part.
            files_module._sweep(str(path))
            assert names(tmp_path) == ([] if way == "unnamed" else [".f.0.part"])
            process.send_signal(signal.SIGKILL)

    await asyncio.to_thread(kill_in_the_middle)
    assert names(tmp_path) == ([] if way == "unnamed" else [".f.0.part"])
    async with agent.file(path, "x", publish=True) as file:
        assert names(tmp_path) == []
        await write(agent, file, pattern(100))
    assert names(tmp_path) == ["f"]
