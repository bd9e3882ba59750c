"""The conductor's side of its processes: where they connect, how they are commanded, and how they are started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nixl_async.benchmarks.transfer.peers.plain import SECRET_VARIABLE, proof
from nixl_async.errors import NixlError

HERE = Path(__file__).resolve().parent
PACKAGE_PARENT = HERE.parents[2]
HELLO_SECONDS = 5.0
START_SECONDS = 90.0
LINE_NBYTES = 512 << 20
LAST_LINES = 6
LEAVE_SECONDS = 1.0
AFTERMATH_SECONDS = 0.5
"""How long after a failure it is waited for a process's end, which may be the cause of it."""


class BenchmarkFailed(NixlError):
    """Report a process of the benchmark that failed or ended, with the last lines that it wrote, or bytes that arrived wrong."""


class PeerAbsent(BenchmarkFailed):
    """Report another library that is not there or does not start; it is left out."""


class ProcessEnded(BenchmarkFailed):
    """Report a process that has ended before its work."""


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class Refused(Exception):
    """The process answered with an error."""


class Channel:
    """A connection over which commands and answers go as JSON lines; one command at a time.

    `on_progress(bytes)` hears of bytes that have moved while a command is carried out. `gone` is set when the other end has gone.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._reading = asyncio.ensure_future(self._read())
        self.gone = asyncio.Event()
        self.on_progress: Callable[[int], None] = lambda nbytes: None

    async def call(self, do: str, **arguments: Any) -> Any:
        """Send a command and return its answer.

        Raises:
            ChannelClosed: the other end is gone.
            Refused: the answer is an error.
        """
        await self.send({"do": do, **arguments})
        while (message := await self.receive()) is not None:
            if "progress" in message:
                self.on_progress(int(message["progress"]))
            elif "error" in message:
                raise Refused(message["error"])
            else:
                return message["ok"]
        raise ChannelClosed

    async def send(self, message: dict[str, Any]) -> None:
        """Send a line."""
        try:
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosed from error

    async def receive(self) -> dict[str, Any] | None:
        """Receive the next message; `None` when the other end is gone."""
        if self.gone.is_set() and self._inbox.empty():
            return None
        return await self._inbox.get()

    @property
    def local_host(self) -> str:
        """The address of this end."""
        return str(self._writer.get_extra_info("sockname")[0])

    async def aclose(self) -> None:
        """Hang up."""
        self._reading.cancel()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await asyncio.wait({self._reading})

    async def _read(self) -> None:
        try:
            while (line := await self._reader.readline()).endswith(b"\n"):
                found = json.loads(line)
                if isinstance(found, dict):
                    self._inbox.put_nowait(found)
        except (OSError, ValueError):
            # What is no JSON, or longer than any answer, comes from nobody of ours.
            pass
        finally:
            self.gone.set()
            self._inbox.put_nowait(None)


class ControlServer:
    """Where processes of a run connect; whoever does not know its secret is sent away."""

    def __init__(self, secret: str = "") -> None:
        self.secret = secret or secrets.token_hex(16)
        self._arrivals: dict[str, asyncio.Future[Channel]] = {}
        self._channels: list[Channel] = []
        self._server: asyncio.Server | None = None
        self.address = ("127.0.0.1", 0)

    async def open(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; return the address."""
        self._server = await asyncio.start_server(self._greet, host, port, limit=LINE_NBYTES)
        bound = self._server.sockets[0].getsockname()
        self.address = (str(bound[0]), int(bound[1]))
        return self.address

    def arrival(self, name: str) -> asyncio.Future[Channel]:
        """Return a future of the channel of the process that calls itself `name`."""
        if name not in self._arrivals:
            self._arrivals[name] = asyncio.get_running_loop().create_future()
        return self._arrivals[name]

    async def aclose(self) -> None:
        """Hang up on everyone and listen no more."""
        if self._server is not None:
            self._server.close()
        for channel in self._channels:
            await channel.aclose()
        for future in self._arrivals.values():
            future.cancel()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer)
        nonce = secrets.token_hex(16)
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await channel.send({"nonce": nonce})
                hello = await channel.receive() or {}
        except (TimeoutError, ChannelClosed, ValueError):
            hello = {}
        name, shown = str(hello.get("name", "")), str(hello.get("proof", ""))
        arrival = self.arrival(name) if hmac.compare_digest(shown, proof(self.secret, nonce, name)) else None
        if arrival is None or arrival.done():
            await channel.aclose()
            return
        self._channels.append(channel)
        arrival.set_result(channel)


async def connect(host: str, port: int, secret: str, name: str) -> Channel:
    """Connect to a control server as `name`.

    Raises:
        OSError: nobody listens there, or it hung up.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=LINE_NBYTES)
    channel = Channel(reader, writer)
    greeting = await channel.receive()
    if greeting is None:
        await channel.aclose()
        raise ConnectionError(f"{host}:{port} does not answer as a benchmark's conductor")
    await channel.send({"name": name, "proof": proof(secret, greeting["nonce"], name)})
    return channel


@dataclass(frozen=True)
class Contender:
    """Who takes part: its name in results, what is run by which interpreter, and what its processes are told.

    `program` is a module of this package, or a script's path. `spins`: idle, it keeps a core busy, so its processes are stopped
    (SIGSTOP) while it is not their turn. `absent` says why it cannot take part, "" if it can.
    """

    label: str
    program: str
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    spins: bool = False
    absent: str = ""

    def command(self) -> list[str]:
        """Return how its processes are started."""
        if self.program.endswith(".py"):
            return [self.python, self.program]
        # -P: a checkout in the working directory must not take the place of the package that is running.
        return [self.python, "-P", "-m", self.program]


class Launcher:
    """Starts and ends processes on this machine."""

    def __init__(self, server: tuple[str, int], secret: str) -> None:
        self._server, self._secret = server, secret
        self._processes: dict[str, tuple[asyncio.subprocess.Process, IO[bytes]]] = {}

    async def start(self, name: str, contender: Contender) -> None:
        """Start a process that will connect as `name`.

        Raises:
            PeerAbsent: its interpreter cannot be run.
        """
        environment = dict(os.environ)
        if contender.python != sys.executable:
            # Variables meant for our own UCX are no business of others'.
            environment = {key: value for key, value in environment.items() if not key.startswith("UCX_")}
        path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if not contender.program.endswith(".py"):
            environment["PYTHONPATH"] = path
        environment |= contender.environment | {SECRET_VARIABLE: self._secret, "PYTHONUNBUFFERED": "1"}
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `aclose`
        try:
            process = await asyncio.create_subprocess_exec(
                *contender.command(),
                *map(str, (*self._server, name)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        except OSError as error:
            log.close()
            raise PeerAbsent(f"{contender.python} cannot be run: {error.strerror}") from None
        self._processes[name] = process, log

    async def signal(self, name: str, number: int) -> None:
        """Send a signal to a process, if it still is there."""
        _signal(self._processes[name][0], number)

    async def ended(self, name: str) -> None:
        """Return when a process has ended."""
        await self._processes[name][0].wait()

    async def why(self, name: str) -> str:
        """Say how a process ended, and what it wrote last."""
        process, log = self._processes[name]
        await self.signal(name, signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await process.wait()
        code = process.returncode
        if code is None:
            how = "does not answer"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit status {code}"
        log.seek(0)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        last = "; it wrote nothing" if not lines else "; it wrote:\n    " + "\n    ".join(lines[-LAST_LINES:])
        return f"process {process.pid} {how}{last}"

    async def end(self, name: str) -> None:
        """Kill a process, stopped or not, and wait for it."""
        process, log = self._processes.pop(name)
        _signal(process, signal.SIGKILL)
        await process.wait()
        log.close()

    async def aclose(self) -> None:
        """End every process: those that have been hung up on have a moment to leave in order."""
        for name in self._processes:
            await self.signal(name, signal.SIGCONT)
        waits = [asyncio.ensure_future(process.wait()) for process, _ in self._processes.values()]
        try:
            if waits:
                await asyncio.wait(waits, timeout=LEAVE_SECONDS)
        finally:
            for process, _ in self._processes.values():
                _signal(process, signal.SIGKILL)
        for name in list(self._processes):
            await self.end(name)


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    # asyncio's own methods ask first whether the process has ended, and whoever asks takes its status from the loop.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


class RemoteLauncher:
    """Starts and ends processes where the rank called `name` runs `serve_launcher`."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel, self._name = channel, name
        self._busy = asyncio.Lock()

    async def start(self, name: str, contender: Contender) -> None:
        """Start a process there; the command is that machine's own."""
        await self._call("start", name=name, label=contender.label)

    async def signal(self, name: str, number: int) -> None:
        """Send a signal to a process there."""
        await self._call("signal", name=name, number=number)

    async def ended(self, name: str) -> None:
        """Never return: what ends there shows by its connection."""
        await asyncio.get_running_loop().create_future()

    async def why(self, name: str) -> str:
        """Say how a process there ended."""
        return str(await self._call("why", name=name))

    async def end(self, name: str) -> None:
        """Kill a process there."""
        with contextlib.suppress(BenchmarkFailed):
            await self._call("end", name=name)

    async def describe(self) -> dict[str, Any]:
        """Return the machine's description."""
        found: dict[str, Any] = await self._call("describe")
        return found

    async def aclose(self) -> None:
        """Let the machine go, and all that was started there."""
        with contextlib.suppress(ChannelClosed):
            await self._channel.send({"do": "leave"})

    async def _call(self, do: str, **arguments: Any) -> Any:
        try:
            async with self._busy:
                return await self._channel.call(do, **arguments)
        except ChannelClosed:
            raise BenchmarkFailed(f"{self._name} has gone, and with it the processes that it had started") from None
        except Refused as error:
            raise PeerAbsent(str(error)) from None


async def serve_launcher(
    channel: Channel, launcher: Launcher, contenders: dict[str, Contender], describe: Callable[[], dict[str, Any]]
) -> bool:
    """Start and end processes as a conductor elsewhere says; return whether it said good-bye.

    Only `contenders` are started, as this machine's own options define them.
    """
    try:
        while (message := await channel.receive()) is not None:
            do = message.pop("do")
            if do == "leave":
                return True
            try:
                if do == "start":
                    label = message["label"]
                    if label not in contenders:
                        raise BenchmarkFailed(f"{label} is not among this rank's contenders: give all ranks the same options")
                    if contenders[label].absent:
                        raise PeerAbsent(contenders[label].absent)
                    await launcher.start(message["name"], contenders[label])
                    result: Any = None
                elif do == "describe":
                    result = describe()
                else:
                    result = await getattr(launcher, {"signal": "signal", "why": "why", "end": "end"}[do])(**message)
                await channel.send({"ok": result})
            except (NixlError, KeyError) as error:
                await channel.send({"error": str(error)})
        return False
    finally:
        await launcher.aclose()


class Process:
    """One process of a contender: which rank it is, its role and its number among those, and how to command it."""

    def __init__(self, contender: Contender, rank: int, role: str, index: int, launcher: Launcher | RemoteLauncher) -> None:
        self.contender, self.rank, self.launcher = contender, rank, launcher
        self.role, self.index = role, index
        self.what = f"{contender.label}, {role} {index}"
        self.name = f"{contender.label}/{rank}"
        self.channel: Channel | None = None

    async def start(self, server: ControlServer) -> None:
        """Start it and wait until it has connected.

        Raises:
            PeerAbsent: it ended before.
        """
        arrival = server.arrival(self.name)
        await self.launcher.start(self.name, self.contender)
        ended = asyncio.ensure_future(self.launcher.ended(self.name))
        try:
            either: set[asyncio.Future[Any]] = {arrival, ended}
            await asyncio.wait(either, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not arrival.done():
            raise PeerAbsent(f"{self.what} does not start: {await self.launcher.why(self.name)}")
        self.channel = arrival.result()

    async def call(self, do: str, **arguments: Any) -> Any:
        """Send a command and return the answer.

        Raises:
            ProcessEnded: the process has ended.
            BenchmarkFailed: it answered with an error.
        """
        assert self.channel is not None
        try:
            return await self.channel.call(do, **arguments)
        except ChannelClosed:
            raise ProcessEnded(await self.why()) from None
        except Refused as error:
            raise BenchmarkFailed(f"{self.what}: {error}") from None

    async def why(self) -> str:
        """Say how it ended."""
        return f"{self.what}: {await self.launcher.why(self.name)}"


async def together(processes: Sequence[Process], works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Do all works at once; return their results in order.

    The first failure cancels the others. Where a process has ended that is the failure, whatever it made the others say.

    Raises:
        ProcessEnded: one of `processes` has ended.
        BenchmarkFailed: a work failed.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    gone: dict[asyncio.Future[Any], Process] = {
        asyncio.ensure_future(one.channel.gone.wait()): one for one in processes if one.channel is not None
    }
    pending: set[asyncio.Future[Any]] = set(tasks)
    try:
        while pending:
            watched: set[asyncio.Future[Any]] = {*pending, *gone}
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in done if task in pending and task.exception() is not None]
            if failed and gone:
                done, _ = await asyncio.wait(set(gone), timeout=AFTERMATH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task in gone:
                    raise ProcessEnded(await gone[task].why())
            if failed:
                failed[0].result()
            pending -= done
        return [task.result() for task in tasks]
    finally:
        for task in (*tasks, *gone):
            task.cancel()
        everything: list[asyncio.Future[Any]] = [*tasks, *gone]
        if everything:
            await asyncio.wait(everything)
        for task in tasks:
            if not task.cancelled():
                # One failure is raised; the others have been looked at.
                task.exception()
