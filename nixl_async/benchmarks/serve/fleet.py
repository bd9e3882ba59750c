"""The processes of a simulation: start them, tell them things, hear what they say and when one is gone, leave none behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nixl_async.benchmarks.kv.processes import RanksFailed, start
from nixl_async.demo.run import Side, end

# -P: a checkout in the working directory must not take the place of the package that is running.
PROGRAM = ("-P", "-m", "nixl_async.benchmarks.serve.worker")
ANSWER_SECONDS = 120.0
PING_SECONDS = 3.0
PREFILL, DECODE = "prefill", "decode"
OF_REQUESTS = frozenset({"prefilled", "done", "failed"})


@dataclass(eq=False)
class Process(Side):
    """One process; `tokens` are those that it has been given and has not done with, `given` how many requests."""

    kind: str = ""
    alive: bool = True
    tokens: int = 0
    given: int = 0
    answers: dict[str, asyncio.Future[dict[str, Any] | None]] = field(default_factory=dict)

    def tell(self, **message: Any) -> None:
        """Send it a line, without waiting until it reads it."""
        if self.alive and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def answer(self, event: str) -> asyncio.Future[dict[str, Any] | None]:
        """Return what it says next of that event, None if it ends before."""
        return self.answers.setdefault(event, asyncio.get_running_loop().create_future())


class Fleet:
    """All processes, for as long as an `async with` block lasts; `setups` are by name, `prefill-0` and so on.

    `on_message(process, message)` hears what is said of requests, `on_lost(process)` of a process's end.
    """

    def __init__(self, setups: list[dict[str, Any]]) -> None:
        self._setups = setups
        self.processes: list[Process] = []
        self.on_message: Callable[[Process, dict[str, Any]], None] = lambda process, message: None
        self.on_lost: Callable[[Process], None] = lambda process: None
        self._followers: list[asyncio.Task[None]] = []
        self.broken: asyncio.Future[None]

    async def __aenter__(self) -> Fleet:
        self.broken = asyncio.get_running_loop().create_future()
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            await end(self.processes)
        finally:
            for follower in self._followers:
                follower.cancel()
            if self._followers:
                await asyncio.wait(self._followers)
            if self.broken.done():
                # Who should hear of it may have been cancelled.
                self.broken.exception()

    async def _start(self) -> None:
        for setup in self._setups:
            process = await start(PROGRAM)
            one = Process(setup["name"], process, kind=setup["role"])
            self.processes.append(one)
            one.tell(**setup)
            self._followers.append(asyncio.create_task(self._follow(one)))
        ready = await self.heard("ready", all_of_them=True)
        addresses = [ready[one]["address"] for one in self.processes if one.kind == DECODE]
        for one in self.living(PREFILL):
            one.tell(do="connect", addresses=addresses)
        await self.heard("connected", PREFILL, all_of_them=True)

    def living(self, kind: str | None = None) -> list[Process]:
        """Return the processes that live."""
        return [one for one in self.processes if one.alive and kind in (None, one.kind)]

    async def heard(
        self, event: str, kind: str | None = None, *, all_of_them: bool = False, seconds: float = ANSWER_SECONDS
    ) -> dict[Process, dict[str, Any]]:
        """Wait until every living process has said something of an event, and return what.

        One that has not after `seconds` is killed: at once if it does not even answer a call, else after as long again.

        Raises:
            RanksFailed: one has reported an error; or, if `all_of_them` are needed, one has ended.
        """
        asked = self.living(kind)
        waits = {one: one.answer(event) for one in asked}
        pending = set(waits.values())
        asked_why = False
        while pending:
            every: set[asyncio.Future[Any]] = {*pending, self.broken}
            done, _ = await asyncio.wait(every, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if self.broken in done:
                self.broken.result()
            if not done:
                # The end of a process is an answer, too. Others may be waiting for one that is stopped.
                silent = [one for one, wait in waits.items() if not wait.done()]
                hung = silent if asked_why else await self._hung(silent)
                asked_why = True
                for one in hung:
                    one.process.kill()
            pending -= done
        for one in asked:
            one.answers.pop(event, None)
        if all_of_them and (gone := [one for one in self.processes if not one.alive]):
            raise RanksFailed("; ".join(one.error or one.ending() for one in gone))
        return {one: answer for one, wait in waits.items() if (answer := wait.result()) is not None}

    async def _hung(self, silent: list[Process]) -> list[Process]:
        """Return those whose loop does not run."""
        calls = {one: one.answer("pong") for one in silent}
        for one in silent:
            one.tell(do="ping")
        await asyncio.wait(calls.values(), timeout=PING_SECONDS)
        for one in silent:
            one.answers.pop("pong", None)
        return [one for one, call in calls.items() if not call.done()]

    async def _follow(self, one: Process) -> None:
        while (message := await one.receive()) is not None:
            event = message.get("event")
            if event == "error":
                one.error = f"{one.role}: {message['text']}"
                self._break(one.error)
            elif event in OF_REQUESTS:
                self.on_message(one, message)
            else:
                future = one.answer(str(event))
                if not future.done():
                    future.set_result(message)
        await one.process.wait()
        one.alive = False
        for future in one.answers.values():
            if not future.done():
                future.set_result(None)
        self.on_lost(one)

    def _break(self, text: str) -> None:
        if not self.broken.done():
            self.broken.set_exception(RanksFailed(text))
