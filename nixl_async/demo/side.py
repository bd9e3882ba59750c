"""The two processes of the demo: what prefill and decode do."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from typing import Any

import numpy as np

from nixl_async.agent import Agent
from nixl_async.demo.job import Job, busy_seconds, memcpy_gb_per_second
from nixl_async.demo.stall import TimedSelector, p999_seconds
from nixl_async.descriptors import BlockLayout
from nixl_async.errors import NixlError
from nixl_async.layers import LayerPlan, Push

TABLE, VERIFIED = b"table:", b"verified"
REQUEST = "demo"


def say(**message: Any) -> None:
    """Tell the process that started us."""
    print(json.dumps(message), flush=True)


def layout(job: Job) -> BlockLayout:
    """Return the pool's layout, the one that SGLang has: [layers, 2, blocks, page], without the 2 for MLA."""
    shape = job.shape
    if shape.kv == 1:
        return BlockLayout(("layer", "block"), (shape.layers, job.pool_blocks), job.page_nbytes)
    return BlockLayout(("layer", "kv", "block"), (shape.layers, shape.kv, job.pool_blocks), job.page_nbytes)


def allocate(job: Job) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a pool whose pages the kernel has mapped."""
    return np.full(job.pool_nbytes, 0x5A, np.uint8)


class Meter:
    """CPU of this process, and of its loop's iterations, from the start of the job to its end; without fill and verify."""

    def __init__(self, selector: TimedSelector) -> None:
        self._selector = selector
        self._cpu = 0.0
        self.aside = 0.0
        """CPU seconds that computing and checking took, which are not the transfer's."""

    def start(self) -> None:
        """Begin, as a server does that has started: what is loaded by then need not be walked by every collection."""
        gc.freeze()
        self._selector.iterations = []
        self._cpu = time.process_time()

    def finish(self) -> dict[str, float]:
        """Return `cpu_seconds` and `loop_stall_p999_seconds`."""
        cpu = time.process_time() - self._cpu - self.aside
        return {"cpu_seconds": max(cpu, 0.0), "loop_stall_p999_seconds": p999_seconds(self._selector.finish())}


async def prefill(setup: dict[str, Any], selector: TimedSelector) -> None:
    """Compute layer after layer, and push each group of them as soon as it is done."""
    job, meter = Job.read(setup), Meter(selector)
    loop = asyncio.get_running_loop()
    memcpy = await asyncio.to_thread(memcpy_gb_per_second)
    pool, table, kv = await asyncio.to_thread(allocate, job), job.table(0), layout(job)
    async with Agent("prefill", backends=setup["backends"], token=setup["token"]) as agent:
        region = await agent.register(pool, name="kv")
        notes = agent.notifications()
        peer = await agent.connect((setup["host"], setup["port"]))
        theirs = np.frombuffer((await anext(notes)).payload.removeprefix(TABLE), np.int64)
        remote = peer.region("kv")
        layers = (
            (kv.pages(region, layer=n, block=table), kv.pages(remote, layer=n, block=theirs)) for n in range(job.shape.layers)
        )
        ready = [0.0] * job.shape.layers
        intervals: list[tuple[float, float]] = []

        async def follow(push: Push) -> None:
            async for layer in push.sent():
                intervals.append((ready[layer], time.monotonic()))
                say(event="pushed", layers=1)

        async with asyncio.TaskGroup() as group, agent.push(peer, LayerPlan(REQUEST, layers)) as push:
            await push.wanted()
            group.create_task(follow(push))
            meter.start()
            started = time.monotonic()
            for first, last in job.pushes():
                due = time.monotonic() + job.compute_seconds * (last - first)
                meter.aside += await loop.run_in_executor(None, job.fill, pool, table, first, last)
                await asyncio.sleep(due - time.monotonic())
                ready[first:last] = [time.monotonic()] * (last - first)
                push.ready(*range(first, last))
            computed = time.monotonic()
        ended = time.monotonic()
        measured = meter.finish()
        answer = (await anext(notes)).payload
        assert answer == VERIFIED, answer
        say(
            event="result",
            started=started,
            transfer_seconds=busy_seconds(intervals),
            exposed_seconds=max(0.0, ended - computed),
            route="+".join(sorted(agent.statistics().nbytes)),
            memcpy_gb_per_second=memcpy,
            **measured,
        )


async def decode(setup: dict[str, Any], selector: TimedSelector) -> None:
    """Take layers as they come, and check every byte of them."""
    job, meter = Job.read(setup), Meter(selector)
    loop = asyncio.get_running_loop()
    pool, table = await asyncio.to_thread(allocate, job), job.table(1)
    async with Agent("decode", backends=setup["backends"], token=setup["token"]) as agent:
        await agent.register(pool, name="kv")
        host, port = await agent.serve("127.0.0.1", 0)
        say(event="serving", host=host, port=port)
        peer = await agent.wait_peer("prefill")
        await agent.notify(peer, TABLE + table.tobytes())
        meter.start()
        arrived = 0.0
        async with agent.incoming(REQUEST, peer=peer) as incoming:
            async for layer in incoming.layers():
                arrived = time.monotonic()
                wrong, cpu = await loop.run_in_executor(None, job.verify, pool, table, layer, layer + 1)
                meter.aside += cpu
                if wrong:
                    raise RuntimeError(f"wrong bytes arrived: {wrong}")
                say(event="verified", layers=1)
        measured = meter.finish()
        await agent.notify(peer, VERIFIED)
        say(event="result", arrived=arrived, verified=True, **measured)
        # Prefill has its answer when it leaves; leaving first would take the notification's connection away.
        async for event in agent.membership():
            if event.peer == "prefill":
                break


async def _until_told(work: Any) -> None:
    """Run a side's work until it ends or standard input does: the process that started us is gone, or wants us gone."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    task = asyncio.ensure_future(work)
    told = asyncio.ensure_future(reader.read())
    await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
    stopped = not task.done()
    task.cancel()
    told.cancel()
    await asyncio.wait([task, told])
    transport.close()
    if not stopped:
        task.result()


def _first_line() -> bytes:
    """Read up to the first line's end and no further: the rest is the loop's."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def main(role: str) -> int:
    """Run one side as a process of its own; the setup is the first line of standard input."""
    line = _first_line()
    if not line.endswith(b"\n"):
        # Whoever started us went away before there was work.
        return 1
    setup = json.loads(line)
    selector = TimedSelector()
    side = {"prefill": prefill, "decode": decode}[role]
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        try:
            runner.run(_until_told(side(setup, selector)))
        except (NixlError, RuntimeError, AssertionError, ExceptionGroup) as error:
            first: BaseException = error
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            say(event="error", error=type(first).__name__, text=str(first))
            return 1
    return 0
