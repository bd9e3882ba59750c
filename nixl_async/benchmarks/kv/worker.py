"""A rank's process: it gets a job, does it, and says what it measured; see `processes`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from nixl_async.benchmarks.kv import profiling, traffic
from nixl_async.errors import NixlError

JOBS = {"prefill": profiling.prefill, "decode": profiling.decode, "traffic": traffic.run_rank}


class Parent:
    """The program that started this rank, and through it the other ranks."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._answers: dict[str, asyncio.Future[dict[int, Any]]] = {}
        self.rank, self.world = 0, 1

    def say(self, **message: Any) -> None:
        """Tell the program something."""
        print(json.dumps(message), flush=True)

    async def hear(self) -> dict[str, Any]:
        """Return the next line; nothing if standard input has ended."""
        line = await self._reader.readline()
        message: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        return message

    async def listen(self) -> None:
        """Take answers to `gather` until standard input ends."""
        while message := await self.hear():
            self._answers.pop(message["key"]).set_result({int(rank): value for rank, value in message["values"].items()})

    async def gather(self, key: str, value: Any = None, of: Iterable[int] | None = None) -> dict[int, Any]:
        """Wait until all ranks, or those `of`, have come to the same key; return what each brought."""
        self._answers[key] = asyncio.get_running_loop().create_future()
        self.say(event="gather", key=key, of=list(range(self.world) if of is None else of), value=value)
        return await self._answers[key]


@asynccontextmanager
async def parent_of_us() -> AsyncIterator[Parent]:
    """Listen to the program that started this process, by standard input."""
    reader = asyncio.StreamReader(limit=1 << 26)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        yield Parent(reader)
    finally:
        transport.close()


async def _main() -> int:
    async with parent_of_us() as parent:
        setup = await parent.hear()
        if not setup:
            # Whoever started us went away before there was work.
            return 1
        parent.rank, parent.world = setup["rank"], setup["world"]
        work = asyncio.ensure_future(JOBS[setup["job"]](setup, parent))
        told = asyncio.ensure_future(parent.listen())
        await asyncio.wait([work, told], return_when=asyncio.FIRST_COMPLETED)
        stopped = not work.done()
        work.cancel()
        told.cancel()
        await asyncio.wait([work, told])
        return 1 if stopped else _outcome(work, parent)


def _outcome(work: asyncio.Task[dict[str, Any]], parent: Parent) -> int:
    error = work.exception()
    if error is None:
        parent.say(event="result", **work.result())
        return 0
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if not isinstance(error, NixlError | profiling.WrongBytes):
        traceback.print_exception(error)
    parent.say(event="error", text=f"{type(error).__name__}: {error}")
    return 1


def main() -> int:
    """Run one rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return asyncio.run(_main())


if __name__ == "__main__":
    sys.exit(main())
