"""A process of the simulation: it does what the program that started it says, a JSON line each, until standard input ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import Any

from nixl_async.benchmarks.kv.worker import Parent, parent_of_us
from nixl_async.benchmarks.serve.decode import Decode
from nixl_async.benchmarks.serve.prefill import Prefill
from nixl_async.errors import NixlError

HOST = "127.0.0.1"
SWITCH_SECONDS = 5e-4
"""How long a thread that checks bytes may keep the loop from running."""


async def _main() -> int:
    async with parent_of_us() as parent:
        try:
            return await _serve(parent)
        except BrokenPipeError:
            # Who started us has gone.
            return 1
        except (NixlError, OSError) as error:
            parent.say(event="error", text=f"{type(error).__name__}: {error}")
            return 1


async def _serve(parent: Parent) -> int:
    setup = await parent.hear()
    if not setup:
        return 1
    made: Prefill | Decode = (Prefill if setup["role"] == "prefill" else Decode)(setup, parent)
    async with made as side:
        address = await side.agent.serve(HOST, 0) if isinstance(side, Decode) else None
        parent.say(event="ready", address=address)
        finishing: asyncio.Task[None] | None = None
        try:
            while message := await parent.hear():
                if message["do"] == "finish":
                    # Not awaited: whoever waits for a process that is stopped can still be told so.
                    finishing = asyncio.create_task(_finish(side))
                else:
                    await _do(side, message)
        finally:
            if finishing is not None:
                finishing.cancel()
                await asyncio.wait([finishing])
    return 0


async def _do(side: Prefill | Decode, message: dict[str, Any]) -> None:
    match message.pop("do"):
        case "connect":
            assert isinstance(side, Prefill)
            await side.connect(message["addresses"])
            side.parent.say(event="connected")
        case "begin":
            await side.begin(message)
            side.parent.say(event="begun")
        case "serve":
            side.take(message)
        case "cancel":
            side.cancel(message["number"])
        case "ping":
            side.parent.say(event="pong")


async def _finish(side: Prefill | Decode) -> None:
    try:
        side.parent.say(event="finished", **await side.finish())
    except (NixlError, OSError) as error:
        side.parent.say(event="error", text=f"{type(error).__name__}: {error}")


def main() -> int:
    """Run one process."""
    # Ctrl-C is for the program that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_SECONDS)
    # What tiers do not take is counted, and reported by the program that started us.
    logging.getLogger("nixl_async.tiers").addHandler(logging.NullHandler())
    return asyncio.run(_main())


if __name__ == "__main__":
    sys.exit(main())
