"""Start the demo's two processes, follow them, and make one result of what they say."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nixl_async.demo.job import Job
from nixl_async.errors import ConfigurationError

LEAVE_SECONDS = 0.7
REASON_SECONDS = 1.0
LINE_NBYTES = 64 << 20
# -P: a checkout in the working directory must not take the place of the package that is running.
PROGRAM = ("-P", "-m", "nixl_async.demo")
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class DemoFailed(RuntimeError):
    """Say why the job did not come to its end."""


@dataclass(eq=False)
class Side:
    """One of the two processes."""

    role: str
    process: asyncio.subprocess.Process
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    async def send(self, message: dict[str, Any]) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        await self.process.stdin.drain()

    async def receive(self) -> dict[str, Any] | None:
        """Receive its next message, None when it has ended."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            try:
                message = json.loads(line)
            except ValueError:
                # A library that prints to standard output.
                continue
            if isinstance(message, dict):
                return message
        return None

    def ending(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"{self.role} (process {self.process.pid}) was killed by {signal.Signals(-code).name}"
        return f"{self.role} (process {self.process.pid}) ended with exit status {code}"


def check_memory(job: Job) -> None:
    """Refuse a job that does not fit into memory.

    Raises:
        ConfigurationError: the two pools need more than is available; the message has both numbers.
    """
    require_memory(2 * job.pool_nbytes + (256 << 20), "the job needs", "give fewer --tokens")


def require_memory(needed: int, who: str, advice: str) -> None:
    """Refuse what does not fit into memory; `who` says in the message who needs it, `advice` what to do.

    Raises:
        ConfigurationError: `needed` bytes are more than is available; the message has both numbers.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            if needed > available:
                raise ConfigurationError(
                    f"{who} {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are available: {advice}"
                )


async def run_job(
    job: Job,
    backends: list[str] | None = None,
    on_event: Callable[[str, dict[str, Any]], None] = lambda role, message: None,
) -> dict[str, Any]:
    """Move one request's KV cache between two processes of ours; return the result.

    `on_event(role, message)` hears of every push and every check.

    Raises:
        DemoFailed: a process died, or bytes arrived wrong.
    """
    common = {**job.as_dict(), "backends": backends, "token": secrets.token_hex(16)}
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return summarise(job, await run_sides([sys.executable, *PROGRAM], {"PYTHONPATH": path}, common, on_event))


async def run_sides(
    program: list[str],
    environment: dict[str, str],
    common: dict[str, Any],
    on_event: Callable[[str, dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Start decode, then prefill with what decode said of itself; return each side's result."""
    sides: list[Side] = []
    try:
        for role in ("decode", "prefill"):
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *program, role, stdin=pipe, stdout=pipe, env=os.environ | environment, limit=LINE_NBYTES
            )
            sides.append(Side(role, process))
        decode, prefill = sides
        await decode.send(common)
        hello = await decode.receive()
        if hello is None or hello.get("event") != "serving":
            await decode.process.wait()
            raise DemoFailed(f"decode did not start: {(hello or {}).get('text') or decode.ending()}")
        on_event("decode", hello | {"pid": decode.process.pid})
        on_event("prefill", {"event": "started", "pid": prefill.process.pid})
        await prefill.send({**common, **hello})
        followers = [asyncio.create_task(_follow(side, sides, on_event)) for side in sides]
        try:
            await asyncio.wait(followers, return_when=asyncio.FIRST_EXCEPTION)
            if any(not side.result for side in sides):
                await asyncio.wait(followers, timeout=REASON_SECONDS)
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.wait(followers)
        if reasons := _reasons(sides):
            raise DemoFailed("; ".join(reasons))
        return {side.role: side.result for side in sides}
    finally:
        await end(sides)


async def _follow(side: Side, sides: list[Side], on_event: Callable[[str, dict[str, Any]], None]) -> None:
    while (message := await side.receive()) is not None:
        match message.get("event"):
            case "result":
                side.result = message
            case "error":
                side.error = f"{side.role} says: {message['text']}"
            case "relay":
                # What a side has to tell the other one, where they have no connection of their own for that.
                await next(other for other in sides if other is not side).send(message["message"])
            case _:
                on_event(side.role, message)
    await side.process.wait()
    if side.process.returncode or not side.result:
        raise DemoFailed(side.ending())


def _reasons(sides: list[Side]) -> list[str]:
    if all(side.result and not side.error and side.process.returncode in (0, None) for side in sides):
        return []
    killed = [side.ending() for side in sides if (side.process.returncode or 0) < 0]
    said = [side.error for side in sides if side.error]
    return killed + said or [side.ending() for side in sides if side.process.returncode]


async def end(sides: Sequence[Side]) -> None:
    """Let the processes go: standard input ends, they leave in order; who has not after a moment is killed."""
    waits = []
    for side in sides:
        if side.process.stdin is not None:
            side.process.stdin.close()
        waits.append(asyncio.ensure_future(side.process.wait()))
    if not waits:
        return
    try:
        _, late = await asyncio.wait(waits, timeout=LEAVE_SECONDS)
    finally:
        for side in sides:
            if side.process.returncode is None:
                side.process.kill()
    if late:
        await asyncio.wait(late)


def summarise(job: Job, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Make one result of what the two sides measured. Seconds, bytes, and GB of 10^9 bytes."""
    prefill, decode = results["prefill"], results["decode"]
    speed = job.nbytes / prefill["transfer_seconds"] / 1e9
    result = {
        "bytes": job.nbytes,
        "pages": job.pages,
        "gb_per_second": speed,
        "memcpy_share": speed / prefill["memcpy_gb_per_second"],
        "transfer_seconds": prefill["transfer_seconds"],
        "exposed_seconds": prefill["exposed_seconds"],
        "ttft_seconds": decode["arrived"] - prefill["started"],
        "loop_stall_p999_seconds": max(prefill["loop_stall_p999_seconds"], decode["loop_stall_p999_seconds"]),
        "cpu_seconds_per_gb": (prefill["cpu_seconds"] + decode["cpu_seconds"]) / (job.nbytes / 1e9),
        "route": prefill["route"],
        "verified": bool(decode["verified"]),
    }
    return result | {"model": job.model, "tokens": job.tokens, "page_nbytes": job.page_nbytes}
