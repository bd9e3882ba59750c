"""Loop hygiene for every test: debug mode, nothing left behind, the loop never blocked. And agents in pairs and processes."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from nixl_async import Agent
from nixl_async.testing.servers import Server, azurite, gcs_emulator, seaweedfs
from tests.agents import ROOT, TOKEN
from tests.loops import LOOPS, debug_loop
from tests.stores import running
from tests.turns import LONG_SECONDS, LONGEST, Turns, file_of, join, longest_first

settings.register_profile("suite", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

ITERATION_CPU_SECONDS = 1.0
ITERATION_SECONDS = 2.0


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marks mean that only this file knows."""
    # It serves every spawned process and keeps a pipe for as long as this one lives.
    resource_tracker.ensure_running()
    # libuv starts its four threads at the first name it looks up, and keeps them.
    uvloop.run(_look_up())
    config.addinivalue_line("markers", "keeps: the first use of a library that keeps descriptors or threads for good")
    config.stash[TURNS] = join(config)
    # Files go to the processes in the order of `longest_first`, and not in one of pytest-xdist's.
    config.option.loadscopereorder = False


TURNS = pytest.StashKey[Turns | None]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the files of a run of several processes."""
    if config.stash[TURNS] is not None:
        longest_first(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the files that took long and are not known to."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[file_of(report)] += report.duration
    for name, taken in seconds.most_common():
        if taken > LONG_SECONDS and name not in LONGEST:
            terminalreporter.write_line(f"{name} took {taken:.0f} s: it belongs to LONGEST in tests/turns.py")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let tests of several processes run side by side, except those marked `alone`."""
    if (turns := item.config.stash[TURNS]) is None:
        return (yield)
    with turns.turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


async def _look_up() -> None:
    await asyncio.get_running_loop().getaddrinfo("localhost", 0)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    """Offer the loops: each that the test's mark asks for, else the one in debug mode."""
    mark = item.get_closest_marker("asyncio")
    return LOOPS if mark is not None and "loop_factories" in mark.kwargs else {"debug": debug_loop}


# What a test must not leave behind.


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    # libuv holds a /dev/null from a loop's first listening socket on, to close connections when descriptors run out; older
    # awscrt keeps /dev/urandom open.
    return {fd: target for fd, target in found.items() if target not in ("/dev/null", "/dev/urandom")}


@dataclass
class Footprint:
    """What of this process outlives a test that does not clean up."""

    fds: dict[str, str]
    threads: set[str]
    n_native: int
    shared: set[str]

    @classmethod
    def take(cls) -> Footprint:
        # The threads of a loop's default executor live as long as the loop, which ends after this fixture.
        lasting = [t.name for t in threading.enumerate() if t.name.startswith(("asyncio_", "uvloop_"))]
        n_native = len(os.listdir("/proc/self/task")) - len(lasting)
        return cls(
            _descriptors(), {t.name for t in threading.enumerate()} - set(lasting), n_native, set(os.listdir("/dev/shm"))
        )

    def grown(self, now: Footprint) -> list[str]:
        extra = [f"fd {fd} -> {target}" for fd, target in now.fds.items() if self.fds.get(fd) != target]
        found = extra if len(now.fds) > len(self.fds) else []
        found += [f"thread {name}" for name in now.threads - self.threads]
        if now.n_native > self.n_native:
            found.append(f"{now.n_native - self.n_native} native threads")
        if shared := now.shared - self.shared:
            others = _mapped_by_others()
            found += [f"shared memory {name}" for name in sorted(shared) if _inode(name) not in others]
        return found


def _inode(name: str) -> int:
    try:
        return os.stat(f"/dev/shm/{name}").st_ino
    except OSError:
        return -1


def _mapped_by_others() -> set[int]:
    """Return the inodes of shared memory that processes of other sessions have mapped: others may be at work on the machine.

    Not the names: sem_open maps a semaphore under a name that it then gives up for the final one.
    """
    found = {-1}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == os.getsid(0):
                continue
            maps = (process / "maps").read_text()
        except OSError:
            continue
        found.update(int(line.split(maxsplit=5)[4]) for line in maps.splitlines() if "/dev/shm/" in line)
    return found


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves file descriptors, threads or shared memory; `keeps` marks a library's first use."""
    before = Footprint.take()
    yield
    deadline = time.monotonic() + 2.0
    while left := before.grown(Footprint.take()):
        # Threads end, and the kernel closes what they held, a moment after they were told.
        if time.monotonic() > deadline or request.node.get_closest_marker("keeps"):
            break
        gc.collect()
        time.sleep(0.01)
    if not left or request.node.get_closest_marker("keeps"):
        return
    if (turns := request.config.stash[TURNS]) is not None:
        # What tests beside this one work with is gone when they are.
        with turns.pause():
            left = before.grown(Footprint.take())
    assert not left, f"the test left behind: {left}"


@pytest.fixture(autouse=True)
async def _no_task_left(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail a test that leaves tasks running."""
    before = asyncio.all_tasks()
    yield
    # The tasks that were told to end in the test's last step have until the loop has gone round a few times.
    for _ in range(10):
        if not (left := {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}):
            return
        await asyncio.sleep(0)
    raise AssertionError(f"the test left tasks: {left}")


def _queued() -> float:
    """Return for how many seconds the main thread was ready to run and the machine had no CPU for it (proc(5), schedstat)."""
    if _SCHEDSTAT is None or threading.current_thread() is not threading.main_thread():
        return 0.0
    return int(os.pread(_SCHEDSTAT, 100, 0).split()[1]) * 1e-9


try:
    _SCHEDSTAT = os.open("/proc/self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
except OSError:
    _SCHEDSTAT = None


@pytest.fixture(autouse=True)
def _unblocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test in which one callback held the loop: much CPU time, or very long by the clock. uvloop goes unwatched.

    The bounds are wide, as tests make and compare patterns on the loop; bench/ measures the promised millisecond.
    """
    run = asyncio.Handle._run
    slow: list[str] = []

    def watched(handle: asyncio.Handle) -> None:
        cpu, clock, queued = time.thread_time(), time.monotonic(), _queued()
        run(handle)
        cpu, clock = time.thread_time() - cpu, time.monotonic() - clock
        if clock > ITERATION_SECONDS:
            clock -= _queued() - queued
        if cpu > ITERATION_CPU_SECONDS or clock > ITERATION_SECONDS:
            slow.append(f"{handle!r}: {cpu:.3f} s of CPU, {clock:.3f} s")

    monkeypatch.setattr(asyncio.Handle, "_run", watched)
    yield
    assert not slow, f"the loop was blocked by {slow}"


@pytest.fixture(autouse=True)
def _own_errors_only(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test during which asyncio logged an error: a lost exception, a destroyed task, a transport never closed."""
    yield
    lost = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio" and r.levelno >= 40]
    assert not lost, lost


# Agents.


@pytest.fixture
async def agents() -> AsyncIterator[Callable[..., Awaitable[Agent]]]:
    """Open agents by name; they are closed when the test ends, the last one first."""
    async with AsyncExitStack() as stack:

        async def open_agent(name: str, **options: Any) -> Agent:
            return await stack.enter_async_context(Agent(name, **{"token": TOKEN, **options}))

        yield open_agent


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the checkout."""
    return ROOT


@pytest.fixture
def nixl_python() -> str:
    """Return the interpreter of the environment that holds NIXL's wheel."""
    python = os.environ.get("NIXL_ASYNC_NIXL_PYTHON") or str(ROOT / ".nixl-env/bin/python")
    if not Path(python).exists():
        pytest.skip("no environment with NIXL's wheel: .ci/test makes it")
    return python


# Servers of objects, one of each for the whole run.


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run SeaweedFS, the reference for S3's semantics; or take the server that NIXL_ASYNC_TEST_S3 names.

    It has an empty bucket "bench". NIXL_ASYNC_TEST_S3 is `http://key:secret@host:port`, NIXL_ASYNC_TEST_S3_REGION its region.
    """
    if given := os.environ.get("NIXL_ASYNC_TEST_S3"):
        parts = urlsplit(given)
        region = os.environ.get("NIXL_ASYNC_TEST_S3_REGION", "us-east-1")
        key, secret = unquote(parts.username or ""), unquote(parts.password or "")
        endpoint = f"{parts.scheme}://{parts.hostname}:{parts.port}"
        yield Server("given", endpoint, key, secret, "bench", region, 0, Path(os.devnull), None)  # type: ignore[arg-type]
        return
    with running(lambda: seaweedfs(tmp_path_factory.mktemp("seaweedfs"))) as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run Azurite, with a container "bench"."""
    blob = pytest.importorskip("azure.storage.blob")
    with running(lambda: azurite(tmp_path_factory.mktemp("azurite"), in_memory=True)) as server:
        with blob.ContainerClient.from_connection_string(server.connection_string, "bench") as client:
            client.create_container()
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run the emulator of Google Cloud Storage."""
    with running(lambda: gcs_emulator(tmp_path_factory.mktemp("gcs"))) as server:
        yield server
