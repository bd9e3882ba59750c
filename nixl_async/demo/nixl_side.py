"""The two processes of the demo as NIXL's users write them: a script for the interpreter of NIXL's own environment.

Imports nothing of the library, whose UCX must never share a process with the wheel's; `job.py` is loaded as a file.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")
_PR_SET_PDEATHSIG = 1


def _load_file(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_nixl() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise RuntimeError(f"NIXL's wheel is not installed for {sys.executable}")


class NixlSide:
    """One agent of NIXL with its pool."""

    def __init__(self, role: str, setup: dict[str, Any], answers: Any) -> None:
        self.job = _load_file("job").Job.read(setup)
        self.stall = _load_file("stall")
        self.answers = answers
        self.pool = np.full(self.job.pool_nbytes, 0x5A, np.uint8)
        api = _load_nixl()
        self.agent = api.nixl_agent(role, api.nixl_agent_config(backends=[]))
        self.agent.create_backend("UCX", {})
        self.agent.register_memory([(self.pool.ctypes.data, self.pool.nbytes, 0, "kv")], "DRAM")
        self.selector = self.stall.TimedSelector()
        self.cpu = self.aside = 0.0

    def say(self, **message: Any) -> None:
        print(json.dumps(message), file=self.answers, flush=True)

    def start(self) -> None:
        gc.freeze()
        self.selector.iterations = []
        self.cpu = time.process_time()

    def measured(self) -> dict[str, float]:
        cpu = time.process_time() - self.cpu - self.aside
        return {"cpu_seconds": max(cpu, 0.0), "loop_stall_p999_seconds": self.stall.p999_seconds(self.selector.finish())}

    def descriptors(self, address: int, table: Any, first: int, last: int) -> Any:
        job = self.job
        planes = np.arange(first * job.shape.kv, last * job.shape.kv, dtype=np.uint64)[:, None]
        places = (planes * np.uint64(job.pool_blocks) + table.astype(np.uint64)).ravel()
        listed = np.zeros((len(places), 3), np.uint64)
        listed[:, 0] = np.uint64(address) + places * np.uint64(job.page_nbytes)
        listed[:, 1] = job.page_nbytes
        return self.agent.get_xfer_descs(listed, "DRAM")

    async def prefill(self, peer: dict[str, Any]) -> None:
        job, loop = self.job, asyncio.get_running_loop()
        memcpy = sys.modules["job"].memcpy_gb_per_second()
        self.agent.add_remote_agent(bytes.fromhex(peer["metadata"]))
        self.say(event="relay", message={"metadata": self.agent.get_agent_metadata().hex()})
        mine, theirs = job.table(0), np.array(peer["table"])
        intervals: list[tuple[float, float]] = []

        async def push(first: int, last: int) -> None:
            near = self.descriptors(self.pool.ctypes.data, mine, first, last)
            far = self.descriptors(peer["address"], theirs, first, last)
            began = time.monotonic()
            handle = self.agent.initialize_xfer("WRITE", near, far, "decode", b"layers:%d %d" % (first, last))
            state = self.agent.transfer(handle)
            while state == "PROC":
                await asyncio.sleep(0)
                state = self.agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"a transfer ended as {state}")
            intervals.append((began, time.monotonic()))
            self.agent.release_xfer_handle(handle)
            self.say(event="pushed", layers=last - first)

        self.start()
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for first, last in job.pushes():
                due = time.monotonic() + job.compute_seconds * (last - first)
                self.aside += await loop.run_in_executor(None, job.fill, self.pool, mine, first, last)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(push(first, last))
            computed = time.monotonic()
        ended = time.monotonic()
        measured = self.measured()
        await self.next_notification()
        self.say(event="relay", message={"done": True})
        self.say(
            event="result",
            started=started,
            transfer_seconds=sys.modules["job"].busy_seconds(intervals),
            exposed_seconds=max(0.0, ended - computed),
            route="NIXL UCX",
            memcpy_gb_per_second=memcpy,
            **measured,
        )

    async def decode(self, peer: dict[str, Any]) -> None:
        job, loop, due, arrived = self.job, asyncio.get_running_loop(), self.job.shape.layers, 0.0
        self.agent.add_remote_agent(bytes.fromhex(peer["metadata"]))
        table = job.table(1)
        self.start()
        while due:
            for message in await self.next_notification():
                first, last = map(int, message.removeprefix(b"layers:").split())
                arrived = time.monotonic()
                wrong, cpu = await loop.run_in_executor(None, job.verify, self.pool, table, first, last)
                self.aside += cpu
                if wrong:
                    raise RuntimeError(f"wrong bytes arrived: {wrong}")
                due -= last - first
                self.say(event="verified", layers=last - first)
        measured = self.measured()
        self.agent.send_notif("prefill", b"verified")
        self.say(event="result", arrived=arrived, verified=True, **measured)
        # NIXL sends when it is progressed: until the other side has said that it is done, this one must stay.
        await loop.run_in_executor(None, sys.stdin.readline)

    async def next_notification(self) -> list[bytes]:
        while True:
            if found := self.agent.get_new_notifs():
                return [message for messages in found.values() for message in messages]
            await asyncio.sleep(0.001)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # NIXL's log goes to standard output, which is for answers here.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    role, setup = sys.argv[1], json.loads(sys.stdin.readline())
    try:
        side = NixlSide(role, setup, answers)
        if role == "decode":
            table = side.job.table(1).tolist()
            hello = {"metadata": side.agent.get_agent_metadata().hex(), "address": side.pool.ctypes.data, "table": table}
            side.say(event="serving", **hello)
            peer = json.loads(sys.stdin.readline() or "null")
        else:
            peer = setup
        if peer is None:
            return
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(side.selector)) as runner:
            if role == "prefill":
                # NIXL cannot be cancelled; when the process that started us lets go, this one ends as it is.
                threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
            runner.run(getattr(side, role)(peer))
    except Exception as error:
        print(json.dumps({"event": "error", "error": type(error).__name__, "text": str(error)}), file=answers, flush=True)
        sys.exit(1)
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
