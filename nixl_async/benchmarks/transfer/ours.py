"""This library's process in the benchmark: one agent, whose transfers tasks await."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nixl_async.agent import Agent
from nixl_async.benchmarks.transfer import control
from nixl_async.benchmarks.transfer.peers.plain import (
    PROGRESS_SECONDS,
    SECRET_VARIABLE,
    Array,
    Flow,
    Measured,
    Mover,
    die_with_parent,
    need,
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


class Rest:
    """Awaits what is left of a coroutine that has given way to the loop, to wait for `pending`."""

    def __init__(self, call: Coroutine[Any, Any, TransferResult], pending: Any) -> None:
        self._call, self._pending = call, pending

    def __await__(self) -> Generator[Any, Any, TransferResult]:
        pending, call = self._pending, self._call
        while True:
            step: Callable[[Any], Any] = call.send
            argument: Any = None
            try:
                argument = yield pending
            except BaseException as error:
                step, argument = call.throw, error
            try:
                pending = step(argument)
            except StopIteration as end:
                result: TransferResult = end.value
                return result


class Request:
    """What one slot sends again and again: a transfer for each of its flows."""

    def __init__(self, worker: Ours, slot: int) -> None:
        self._worker, self._slot = worker, slot
        self._sides: list[tuple[Places, Places]] = []
        self._prepared: list[PreparedTransfer] = []
        self.route = ""
        """By which its last transfer went."""

    def describe(self) -> None:
        """Make the descriptors."""
        self._sides = [self._worker.sides(flow, self._slot) for flow in self._worker.flows]

    async def prepare(self) -> None:
        """Pair, check and route them."""
        agent, backend = self._worker.agent, self._worker.backend
        self._prepared = [await agent.prepare(*sides, backend=backend) for sides in self._sides]

    def sender(self) -> Callable[..., Coroutine[Any, Any, TransferResult]]:
        """Return what sends it once, and returns when every byte is in place."""
        return self._prepared[0].transfer if len(self._prepared) == 1 else self._send_all

    async def _send_all(self, *, notify: bytes | None) -> TransferResult:
        results = await asyncio.gather(*(prepared.transfer(notify=notify) for prepared in self._prepared))
        return results[0]


class Ours(Mover):
    """One agent, as initiator or target."""

    def __init__(self, selector: TimedSelector, tell: Any) -> None:
        self.selector, self._tell = selector, tell
        self.moved = 0
        self.regions: list[MemoryRegion] = []

    async def opened(self) -> dict[str, Any]:
        """Open the agent, register the memory, and listen."""
        self.backend: str | None = self.options["backend"] or None
        backends = None if self.backend is None else [self.backend]
        self.devices: list[Any] = self._on_devices() if self.options[f"{self.role}_seg_type"] == "VRAM" else []
        self.agent = await Agent(f"{self.role}-{self.index}", token=self.options["token"], backends=backends).__aenter__()
        await self._register()
        if self.role != "target":
            return {}
        host, port = await self.agent.serve(self.host, 0)
        return {"host": host, "port": port}

    async def _register(self) -> None:
        memories = self.devices or [self.buffer]
        self.regions = [await self.agent.register(one, name=f"{REGION} {n}") for n, one in enumerate(memories)]

    def _on_devices(self) -> list[Any]:
        """Take as much memory of devices; the host's is what it is filled from and checked in."""
        try:
            cupy: Any = import_module("cupy")
        except ImportError as error:
            raise MissingDependency(f"VRAM needs cupy: pip install 'nixl-async[cu12]' ({error})") from error
        n, there = self._n_memories(self.role), cupy.cuda.runtime.getDeviceCount()
        found = []
        for number in range(n):
            with cupy.cuda.Device((self.index + number) % there):
                found.append(cupy.zeros(len(self.buffer) // n, cupy.uint8))
        return found

    def _n_memories(self, role: str) -> int:
        """Return how many equal parts the memory of a process is in: one process may have several devices."""
        apart = self.options["mode"] == "MG" and self.options[f"{role}_seg_type"] == "VRAM"
        return int(self.options[f"num_{role}_dev"]) if apart else 1

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
        if not self.is_source:
            for part, device in self._parts():
                with device.device:
                    part[:] = device[: len(part)].get()
        return super().check()

    def _upload(self) -> None:
        for part, device in self._parts():
            with device.device:
                device[: len(part)].set(part)
                device.device.synchronize()

    def _parts(self) -> Iterator[tuple[Array, Any]]:
        """Yield what lies on each device, as it is here and there."""
        span = self.used // max(1, len(self.devices))
        for number, device in enumerate(self.devices):
            yield self.buffer[number * span : (number + 1) * span], device

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
        point, nbytes = self.point, self.point.nbytes(flow)
        number, offsets = _part(point.near(flow, slot), self.used, len(self.regions))
        near, far = self.regions[number].ranges(offsets, nbytes), self.far(flow, slot)
        return (near, far) if point.op == "WRITE" else (far, near)

    def far(self, flow: Flow, slot: int) -> Descriptor:
        """Describe a slot's blocks at the target."""
        # Where that has several devices, this is the one process that moves to and from it.
        used = need(self.point, self.flows, "target", flow.target)
        number, offsets = _part(self.point.far(flow, slot), used, self._n_memories("target"))
        return self.peers[flow.target].region(f"{REGION} {number}").ranges(offsets, self.point.nbytes(flow))

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
        clock, send = time.perf_counter, request.sender()
        for _ in range(count):
            begun = clock()
            if recreate or reregister:
                if reregister:
                    await self._register_again()
                if describe:
                    request.describe()
                await request.prepare()
                send = request.sender()
            called = clock()
            call = send(notify=notify)
            # As an await would, but noting when the call gives way to the loop: until then it has kept the caller.
            try:
                pending = call.send(None)
            except StopIteration as end:
                ended = posted = clock()
                result: TransferResult = end.value
            else:
                posted = clock()
                result = await Rest(call, pending)
                ended = clock()
            measured.add(called - begun, posted - called, ended - called)
            self.moved += nbytes
            if (now := time.monotonic()) - told > PROGRESS_SECONDS:
                told = now
                await self._tell(self.moved)
            request.route = result.route

    async def _register_again(self) -> None:
        for region in self.regions:
            await region.aclose()
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
        if self.regions:
            await self.agent.aclose()


def _part(offsets: Array, used: int, n: int) -> tuple[int, Array]:
    """Return in which of `n` equal parts of `used` bytes the offsets lie, and where in it."""
    span = used // n
    number = int(offsets[0]) // span
    return number, offsets - number * span


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
