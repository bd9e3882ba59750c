"""What a prefill and a decode process have in common: an agent, a pool of pages, and a task for each request."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nixl_async.agent import Agent
from nixl_async.benchmarks.kv.contents import WrongBytes
from nixl_async.benchmarks.serve.contents import Array, Pages
from nixl_async.errors import NixlError
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.memory import MemoryRegion
from nixl_async.planner import Pair, plan_pairs
from nixl_async.tiers.context import Slots

if TYPE_CHECKING:
    from nixl_async.benchmarks.kv.worker import Parent

REGION = "kv"
TABLE = b"serve table "
"""What a notification begins with by which decode tells prefill where a request's pages go."""
AXES = ("layer", "block", "kv", "token", "head")
N_THREADS = 2


class Side:
    """One process. `setup` is what the parent said first; messages are answered by `parent.say`."""

    def __init__(self, setup: dict[str, Any], parent: Parent) -> None:
        self.setup, self.parent = setup, parent
        geometry = KVGeometry(**setup["geometry"])
        sharding = Sharding(page_tokens=setup["page_tokens"], axes=AXES)
        self.pair: Pair = plan_pairs(geometry, sharding, sharding)[0]
        self.pages = Pages(geometry, setup["pages"], setup["page_tokens"], setup["block_tokens"])
        self.agent: Agent
        self.region: MemoryRegion
        self.slots: Slots
        self.leg: dict[str, Any] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._moved: dict[str, int] = {}
        self._cpu = 0.0
        self._stack = contextlib.AsyncExitStack()
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix="serve")

    async def __aenter__(self) -> Self:
        setup = self.setup
        self.agent = await self._stack.enter_async_context(
            Agent(setup["name"], backends=setup["backends"], token=setup["token"])
        )
        self.region = await self.agent.register(self.pages.buffer, name=REGION)
        self.slots = Slots(self.region, self.pages.page_nbytes * self.pages.layers)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self.tasks.values():
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks.values())
        await self.leave_leg()
        await self._stack.aclose()
        self._threads.shutdown()

    # What the parent asks for.

    async def begin(self, leg: dict[str, Any]) -> None:
        """Begin a leg: all requests by one schedule, one backend."""
        self.leg = leg
        self._moved, self._cpu = dict(self.agent.statistics().nbytes), time.process_time()
        await self.enter_leg()

    def take(self, request: dict[str, Any]) -> None:
        """Serve a request, in a task of its own."""
        number = request["number"]
        task = asyncio.create_task(self._serve(request))
        self.tasks[number] = task
        task.add_done_callback(lambda _: self.tasks.pop(number, None))

    def cancel(self, number: int) -> None:
        """Give a request up."""
        if (task := self.tasks.get(number)) is not None:
            task.cancel()

    async def finish(self) -> dict[str, Any]:
        """End the leg once all its requests have ended; return what was counted."""
        while self.tasks:
            await asyncio.wait(list(self.tasks.values()))
        found = await self.leave_leg()
        now = self.agent.statistics().nbytes
        moved = {name: nbytes - self._moved.get(name, 0) for name, nbytes in now.items()}
        cpu = time.process_time() - self._cpu
        return found | {"routes": {name: nbytes for name, nbytes in moved.items() if nbytes}, "cpu_seconds": cpu}

    async def _serve(self, request: dict[str, Any]) -> None:
        number = request["number"]
        try:
            await self.serve(request)
        except asyncio.CancelledError:
            # The parent gave it up, and knows.
            return
        except WrongBytes as error:
            self.parent.say(event="error", text=f"request {number}: {error}")
        except (NixlError, OSError) as error:
            self.parent.say(event="failed", number=number, text=f"{type(error).__name__}: {error}")
        except Exception as error:
            traceback.print_exception(error)
            self.parent.say(event="error", text=f"request {number}: {type(error).__name__}: {error}")

    # What a side is.

    async def enter_leg(self) -> None:
        """Open what one leg alone uses."""

    async def leave_leg(self) -> dict[str, Any]:
        """Close it; return what it counted."""
        return {}

    async def serve(self, request: dict[str, Any]) -> None:
        """Do this side's part of a request."""
        raise NotImplementedError

    # For both.

    async def on_thread(self, work: Any, *arguments: Any) -> None:
        """Run what copies or compares; wait for its end even when cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    async def reserve(self, pages: int) -> Array:
        """Wait until so many pages are free, in turn, and take them."""
        return np.asarray(await self.slots.take(pages), np.int32)

    def release(self, table: Array) -> None:
        """Give pages back."""
        self.slots.give(table.tolist())


def request_name(leg: int, number: int) -> str:
    """Name a request for both sides."""
    return f"{leg}/{number}"
