"""The fleet as the drill sees it: starts members, tells them what to do, breaks them, and takes down what they report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.churn import ledger
from bench.churn.etcd import EtcdServer
from bench.churn.network import Network, NetworkError
from bench.churn.options import Options
from bench.churn.plan import STOPPED_SECONDS, is_remote, names
from bench.churn.records import Event, Failure, First, Life, Records

ROOT = Path(__file__).resolve().parent.parent.parent
TTL_SECONDS = 5
START_AT_ONCE = 4
"""How many interpreters start at the same time: more only wait for each other's CPU."""
LEAVE_SECONDS = 30.0


@dataclass(eq=False)
class Process:
    """A member's process."""

    life: Life
    process: asyncio.subprocess.Process
    reader: asyncio.Task[None]
    ready: asyncio.Event
    path: Path
    stopped: bool = False
    rate: int = 0

    def order(self, do: str, **arguments: Any) -> None:
        """Tell it something; one that has ended is told nothing."""
        stdin = self.process.stdin
        if stdin is not None and not stdin.is_closing():
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


@dataclass
class Fleet:
    """All members. `tell` is called with what is to be shown."""

    options: Options
    directory: Path
    records: Records
    tell: Callable[[str], None]
    spoilt: str = ""
    """Who does what `options.inject` says."""
    processes: dict[str, Process] = field(default_factory=dict)
    """The present life of each member."""
    etcd: EtcdServer | None = None
    network: Network | None = None

    def __post_init__(self) -> None:
        self._token = secrets.token_hex(16)
        self._lives: dict[str, int] = {}
        self._starting = asyncio.Semaphore(START_AT_ONCE)
        self._cut: set[str] = set()
        self._going = False

    # Coming and going.

    async def open(self) -> None:
        """Make the network, start etcd and every member; return when all are ready."""
        began = time.monotonic()
        await self._open_network()
        host = self.network.hub if self.network else "127.0.0.1"
        (self.directory / "etcd").mkdir()
        self.etcd = EtcdServer(self.directory / "etcd", host, self.network.command(None) if self.network else [])
        await self.etcd.start()
        self.tell(f"etcd answers at {self.etcd.address}")
        members = names(self.options.prefill, self.options.decode)
        await asyncio.gather(*(self.start(name) for name in members))
        self.records.start_seconds = time.monotonic() - began

    def go(self) -> None:
        """Let the work begin."""
        self._going = True
        for process in self.processes.values():
            process.order("go")

    async def _open_network(self) -> None:
        if self.options.namespaces == "no":
            self.records.network = "none: links are cut one way, by filters on the members' own sockets"
            return
        self.network = Network()
        try:
            await self.network.open()
        except NetworkError as error:
            self.network = None
            if self.options.namespaces == "yes":
                raise
            self.records.network = f"none ({error}): links are cut one way, by filters on the members' own sockets"
            self.tell(f"no network namespaces: {error}; links are cut one way, by filters on the members' own sockets")
            return
        self.records.network = "a namespace and a veth link for every third member, a bridge between them"

    async def start(self, name: str) -> Process:
        """Start a member's next life; return when it is ready."""
        async with self._starting:
            process = await self._spawn(name)
            ready = asyncio.create_task(process.ready.wait())
            await asyncio.wait([ready, process.reader], return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
        return process

    async def _spawn(self, name: str) -> Process:
        options, network = self.options, self.network
        assert self.etcd is not None
        number = self._lives[name] = self._lives.get(name, 0) + 1
        path = self.directory / f"{name}.{number}"
        ledger.create(path)
        host, prefix = "127.0.0.1", []
        if network is not None:
            host = await network.attach(name) if is_remote(name) else network.hub
            prefix = network.command(name)
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            "-m",
            "bench.churn.member",
            stdin=pipe,
            stdout=pipe,
            stderr=(self.directory / f"{name}.{number}.stderr").open("wb"),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
            # Ctrl-C is the drill's alone.
            start_new_session=True,
            limit=1 << 20,
        )
        life = Life(name, number, child.pid, time.monotonic())
        self.records.lives.append(life)
        process = Process(life, child, asyncio.create_task(asyncio.sleep(0)), asyncio.Event(), path)
        process.reader = asyncio.create_task(self._read(process))
        self.processes[name] = process
        assert child.stdin is not None
        setup = {
            "name": name,
            "host": host,
            "token": self._token,
            "discovery": f"etcd://{self.etcd.address}/churn?ttl={TTL_SECONDS}",
            "backends": ["tcp"] if is_remote(name) else ["samehost", "tcp"],
            "stopped_seconds": STOPPED_SECONDS,
            "ledger": str(path),
            "limit": options.limit,
            "slack": options.allowance + 1.0,
            "rate": options.rate / options.decode,
            "seed": f"{options.seed}/{name}/{number}",
            "inject": options.inject if name == self.spoilt else [],
        }
        child.stdin.write(json.dumps(setup).encode() + b"\n")
        if self._going:
            process.order("go")
        return process

    def up(self, name: str) -> Process | None:
        """Return a member's process if it is at work."""
        process = self.processes.get(name)
        if process is None or process.life.ready is None or process.life.ended is not None or process.stopped:
            return None
        return process

    async def kill(self, name: str) -> None:
        """End a member by SIGKILL; return when it is gone."""
        process = self.processes[name]
        process.life.ended, process.life.killed, process.life.expected_end = time.monotonic(), True, True
        process.signal(signal.SIGKILL)
        await process.reader

    async def leave(self, name: str) -> None:
        """Tell a member to leave; return when its process has ended."""
        process = self.processes[name]
        life = process.life
        life.ended, life.expected_end = time.monotonic(), True
        process.order("leave")
        done, _ = await asyncio.wait([process.reader], timeout=LEAVE_SECONDS)
        if not done:
            life.unheard = True
            process.signal(signal.SIGKILL)
            await process.reader

    def stop(self, name: str) -> None:
        """Send SIGSTOP to a member."""
        self.processes[name].stopped = True
        self.processes[name].signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """Send SIGCONT to a member."""
        self.processes[name].signal(signal.SIGCONT)
        self.processes[name].stopped = False

    async def cut(self, name: str, *, unplug: bool) -> None:
        """Cut a member's link."""
        self._cut.add(name)
        if self.network is not None:
            await self.network.cut(name, unplug=unplug)
        else:
            self.processes[name].order("deaf")

    async def heal(self, name: str) -> None:
        """Join a member's link again."""
        if self.network is not None:
            await self.network.heal(name)
        else:
            self.processes[name].order("hear")
        self._cut.discard(name)

    def watch(self, name: str, since: float) -> None:
        """Ask to be told when requests with a member succeed again that were begun after `since`."""
        for other, process in self.processes.items():
            if self.up(other) and other.startswith("decode") and (other == name or not name.startswith("decode")):
                self.records.watches.append((other, name, since))
                process.order("watch", peer=name, since=since)

    def unwatch(self, name: str) -> None:
        """Stop asking: something else is done to that member."""
        for process in self.processes.values():
            process.order("unwatch", peer=name)

    async def close(self) -> None:
        """Let everyone leave, and end what is left: no process and no namespace stays. Also after a failure."""
        try:
            for name in list(self._cut):
                with contextlib.suppress(NetworkError):
                    await self.heal(name)
            for name, process in self.processes.items():
                if process.stopped:
                    self.go_on(name)
                process.order("pause")
            # What is under way may end.
            await asyncio.sleep(min(2.0, self.options.limit))
            await asyncio.gather(*(self.leave(name) for name in self.processes if self.up(name)))
        finally:
            for process in self.processes.values():
                if process.process.returncode is None:
                    process.life.expected_end = True
                    process.signal(signal.SIGCONT)
                    process.signal(signal.SIGKILL)
                await process.reader
            if self.etcd is not None:
                await self.etcd.kill()
            if self.network is not None:
                await self.network.close()

    # What they report.

    async def _read(self, process: Process) -> None:
        child, life = process.process, process.life
        assert child.stdout is not None
        while line := await child.stdout.readline():
            try:
                self._take(process, json.loads(line))
            except (ValueError, KeyError) as error:
                # A process that is killed while it writes leaves half a line.
                if not life.killed:
                    self.records.logged.append(f"{life.label} reports {line[:200]!r}: {error!r}")
        life.code = await child.wait()
        if child.stdin is not None:
            child.stdin.close()
        life.count = ledger.read(process.path)
        if life.ended is None:
            life.ended = time.monotonic()
            self.tell(f"{life.label} ended by itself, exit status {life.code}")
        said = (self.directory / f"{life.name}.{life.number}.stderr").read_text(errors="replace").strip()
        if said:
            self.records.logged.append(f"{life.label} wrote: {said[-2000:]}")

    def _take(self, process: Process, message: dict[str, Any]) -> None:
        life, records = process.life, self.records
        match next(iter(message)):
            case "ready":
                life.ready = message["ready"]
                process.ready.set()
            case "event":
                records.events.append(
                    Event(life.name, life.number, message["event"], message["peer"], message["at"], message["reason"])
                )
            case "failed":
                what = message.pop("failed")
                records.failures.append(Failure(life.name, life.number, what, **message))
            case "first":
                records.firsts.append(First(life.name, message["first"], message["at"]))
            case "beat":
                life.beats.append((message["beat"], message["rss"], message["fds"], message["peers"]))
            case "wrong":
                way = "pushed" if message["push"] else "pulled"
                records.wrong.append(
                    f"{life.label}: {message['wrong']} of {message['of']} pages {way} from {message['peer']} hold wrong bytes,"
                    f" {message['at'] - records.began:.1f} s from the start"
                )
            case "hang":
                records.hangs.append(
                    f"{life.label}: {message['hang']} with {message['peer']} has no end after {message['seconds']:.1f} s:"
                    f" {message['stack']}"
                )
            case "log":
                records.logged.append(f"{life.label}: {message['log']}")
            case "gone":
                life.left, life.overwritten, life.routes = message["left"], message["overwritten"], message["routes"]
                life.quarantined_pages = message["quarantined_pages"]
                life.quarantined_region = message["quarantined_region"]
