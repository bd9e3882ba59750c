"""This library's process in the benchmark: one agent, whose transfers tasks await."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Generator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nixl_async.agent import Agent
from nixl_async.benchmarks.transfer import control
from nixl_async.benchmarks.transfer.peers.plain import (
    PROGRESS_SECONDS,
    SECRET_VARIABLE,
    Flow,
    Measured,
    Mover,
    die_with_parent,
)
from nixl_async.demo.stall import TimedSelector, p999_seconds
from nixl_async.errors import MissingDependency

if TYPE_CHECKING:
    from nixl_async.descriptors import Descriptor, Places
    from nixl_async.handle import PreparedTransfer
    from nixl_async.memory import MemoryRegion
    from nixl_async.peers import Peer
    from nixl_async.transfer import TransferResult

REGION = "bench"
ARRIVED = b"arrived"


class Posted:
    """Awaits a coroutine, and notes when it first gave way to the loop, or ended: until then the call has kept the caller."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.at = 0.0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._call.__await__()
        step: Any = steps.__next__
        arguments: tuple[Any, ...] = ()
        while True:
            try:
                pending = step(*arguments)
            except StopIteration as end:
                return end.value
            finally:
                if not self.at:
                    self.at = time.perf_counter()
            try:
                arguments = ((yield pending),)
                step = steps.send
            except BaseException as error:
                step, arguments = steps.throw, (error,)


class Request:
    """What one slot sends again and again: a transfer for each of its flows."""

    def __init__(self, worker: Ours, slot: int) -> None:
        self._worker, self._slot = worker, slot
        self._sides: list[tuple[Places, Places]] = []
        self._prepared: list[PreparedTransfer] = []
        self.route = ""

    def describe(self) -> None:
        """Make the descriptors."""
        self._sides = [self._worker.sides(flow, self._slot) for flow in self._worker.flows]

    async def prepare(self) -> None:
        """Pair, check and route them."""
        agent, backend = self._worker.agent, self._worker.backend
        self._prepared = [await agent.prepare(*sides, backend=backend) for sides in self._sides]

    async def send(self, notify: bytes | None) -> Posted:
        """Send it once; return when every byte is in place."""
        if len(self._prepared) == 1:
            posted = Posted(self._prepared[0].transfer(notify=notify))
            self.route = (await posted).route
            return posted
        posted = Posted(self._send_all(notify))
        await posted
        return posted

    async def _send_all(self, notify: bytes | None) -> None:
        transfers = [prepared.submit(notify=notify) for prepared in self._prepared]
        results: list[TransferResult] = [await transfer for transfer in transfers]
        self.route = results[0].route


class Ours(Mover):
    """One agent, as initiator or target."""

    def __init__(self, selector: TimedSelector, tell: Any) -> None:
        self.selector, self._tell = selector, tell
        self.moved = 0
        self.region: MemoryRegion | None = None

    async def opened(self) -> dict[str, Any]:
        """Open the agent, register the memory, and listen."""
        self.backend: str | None = self.options["backend"] or None
        backends = None if self.backend is None else [self.backend]
        self.device: Any = self._on_device() if self.options[f"{self.role}_seg_type"] == "VRAM" else None
        self.agent = await Agent(f"{self.role}-{self.index}", token=self.options["token"], backends=backends).__aenter__()
        await self._register()
        if self.role != "target":
            return {}
        host, port = await self.agent.serve(self.host, 0)
        return {"host": host, "port": port}

    async def _register(self) -> None:
        self.region = await self.agent.register(self.buffer if self.device is None else self.device, name=REGION)

    def _on_device(self) -> Any:
        """Take as much memory of a device; the host's is what it is filled from and checked in."""
        try:
            cupy: Any = import_module("cupy")
        except ImportError as error:
            raise MissingDependency(f"VRAM needs cupy: pip install 'nixl-async[cu12]' ({error})") from error
        cupy.cuda.Device(self.index % cupy.cuda.runtime.getDeviceCount()).use()
        return cupy.zeros(len(self.buffer), cupy.uint8)

    def fill(self) -> None:
        """Write the source's bytes."""
        super().fill()
        self._upload()

    def blank(self, value: int) -> None:
        """Overwrite the destination."""
        super().blank(value)
        if not self.is_source:
            self._upload()

    def check(self) -> Any:
        """Return how many blocks of the destination are wrong, and how many there are."""
        if self.device is not None and not self.is_source:
            self.buffer[: self.used] = self.device[: self.used].get()
        return super().check()

    def _upload(self) -> None:
        if self.device is not None:
            self.device[: self.used].set(self.buffer[: self.used])
            self.device.device.synchronize()

    async def met(self, peers: dict[str, Any]) -> None:
        """Dial the targets; wait for the initiators."""
        self.peers: dict[int, Peer] = {}
        for flow in self.flows:
            if self.role == "target":
                await self.agent.wait_peer(f"initiator-{flow.initiator}")
            else:
                there = peers[f"target {flow.target}"]
                self.peers[flow.target] = await self.agent.connect((there["host"], there["port"]))

    def sides(self, flow: Flow, slot: int) -> tuple[Places, Places]:
        """Describe a slot's blocks of a flow: source and destination."""
        point = self.point
        assert self.region is not None
        near = self.region.ranges(point.near(flow, slot), point.nbytes(flow))
        far = self.far(flow, slot)
        return (near, far) if point.op == "WRITE" else (far, near)

    def far(self, flow: Flow, slot: int) -> Descriptor:
        """Describe a slot's blocks at the target."""
        return self.peers[flow.target].region(REGION).ranges(self.point.far(flow, slot), self.point.nbytes(flow))

    async def prepared(self) -> None:
        """Make the slots' requests."""
        if self.role == "target":
            return
        self.requests = [Request(self, slot) for slot in range(self.point.slots)]
        for request in self.requests:
            request.describe()
            await request.prepare()

    async def run(self, iterations: int) -> dict[str, Any]:
        """Have every slot make its share of `iterations` requests; return what they took."""
        measured = Measured()
        before = self.moved
        self.selector.iterations = []
        # From here on an iteration of the loop is the run's.
        await asyncio.sleep(0)
        measured.begin()
        share = iterations // len(self.requests)
        if len(self.requests) == 1:
            await self._slot(self.requests[0], share, measured)
        else:
            async with asyncio.TaskGroup() as group:
                for request in self.requests:
                    group.create_task(self._slot(request, share, measured))
        measured.end()
        measured.nbytes = self.moved - before
        stall = p999_seconds(self.selector.finish())
        return measured.as_dict(stall=stall, route=self.requests[0].route)

    async def _slot(self, request: Request, count: int, measured: Measured) -> None:
        recreate, reregister = self.options["recreate_xfer"], self.options["reregister_mem"]
        describe = not self.options["prepared_xfer"]
        notify = ARRIVED if self.options["notify"] else None
        nbytes = sum(self.point.nbytes(flow) for flow in self.flows) * self.point.batch
        told = time.monotonic()
        for _ in range(count):
            begun = time.perf_counter()
            if recreate or reregister:
                if reregister:
                    await self._register_again()
                if describe:
                    request.describe()
                await request.prepare()
            called = time.perf_counter()
            posted = await request.send(notify)
            ended = time.perf_counter()
            measured.add(called - begun, posted.at - called, ended - called)
            self.moved += nbytes
            if (now := time.monotonic()) - told > PROGRESS_SECONDS:
                told = now
                await self._tell(self.moved)

    async def _register_again(self) -> None:
        assert self.region is not None
        await self.region.aclose()
        await self._register()

    async def attend(self, count: int) -> None:
        """Be the target of a run on a watched loop, until `count` notifications are there."""
        super().attend(count)
        self.selector.iterations = []
        arrivals = self.agent.notifications(prefix=ARRIVED)
        for _ in range(count):
            await anext(arrivals)

    def left(self) -> dict[str, Any]:
        """End being a target; return the CPU seconds, and how long the loop's iterations kept its thread busy."""
        return {**super().left(), "stall": p999_seconds(self.selector.finish())}

    async def close(self) -> None:
        """Leave in order."""
        if self.region is not None:
            await self.agent.aclose()


async def _answer(worker: Ours, channel: control.Channel) -> None:
    while (command := await channel.receive()) is not None:
        try:
            result = getattr(worker, command.pop("do"))(**command)
            if isinstance(result, Awaitable):
                result = await result
            answer = {"ok": result}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        await channel.send(answer)


async def _main(selector: TimedSelector, make: Any = Ours) -> None:
    channel = await control.connect(sys.argv[1], int(sys.argv[2]), os.environ[SECRET_VARIABLE], sys.argv[3])

    async def tell(nbytes: int) -> None:
        await channel.send({"progress": nbytes})

    worker = make(selector, tell)
    worker.reach = channel.local_host
    try:
        with contextlib.suppress(control.ChannelClosed):
            await _answer(worker, channel)
    finally:
        await worker.close()
        await channel.aclose()


def main(make: Any = Ours) -> None:
    """Answer the conductor's commands until it hangs up."""
    die_with_parent()
    # Ctrl-C reaches every process of a terminal; the conductor ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = TimedSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(_main(selector, make))


if __name__ == "__main__":
    main()
