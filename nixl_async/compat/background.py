"""Work of an agent that nobody waits for: tasks on the engine's loop, whose failures are logged, and which end with the agent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nixl_async.compat.log import get_logger
from nixl_async.errors import NixlError

logger = get_logger(__name__)


class Background:
    """The tasks of one agent, which `what` names in the log."""

    def __init__(self, agent: str, what: str) -> None:
        self._agent, self._what = agent, what
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start work; on the loop."""

        async def run() -> None:
            try:
                await work()
            except (OSError, TimeoutError, NixlError) as error:
                logger.error("agent %s: %s: %s %s", self._agent, self._what, error, getattr(error, "__notes__", ""))

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Cancel what is still going on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
