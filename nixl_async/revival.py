"""Routes that have lost a peer which is still there: connects them again in the background, at once, then later and later."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping

from nixl_async.backend import Backend
from nixl_async.errors import BackendError, NixlError
from nixl_async.membership import Membership
from nixl_async.outages import Outage

logger = logging.getLogger("nixl_async.agent")

FIRST_SECONDS = 0.01
LONGEST_SECONDS = 2.0
"""A second attempt comes about `FIRST_SECONDS` after the first, each later one after twice the time, up to `LONGEST_SECONDS`."""
TOLD_SECONDS = 1.0
"""A route that is down for so long is warned of; of a peer that has ended, its control connection tells sooner."""
STEADY_SECONDS = 0.2
RELAPSE_ATTEMPTS = 2
"""A route that fails again so soon after it came back is not tried at once, but as if it had been tried up to twice already."""


class Revival:
    """Connects routes again; `route_back(backend, peer)` is told when one can be used."""

    def __init__(
        self, backends: Mapping[str, Backend], membership: Membership, route_back: Callable[[str, str], None]
    ) -> None:
        self._backends, self._membership, self._route_back = backends, membership, route_back
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        # The attempts that the last outage of a route took, and when it ended.
        self._past: dict[tuple[str, str], tuple[int, float]] = {}

    def begin(self, outage: Outage) -> None:
        """Try a route until it is back."""
        key = outage.backend, outage.peer
        task = asyncio.get_running_loop().create_task(self._revive(outage))
        self._tasks[key] = task
        task.add_done_callback(lambda ended: self._ended(key, ended))

    def forget(self, peer: str) -> None:
        """Try no route to a peer any more: it is gone."""
        for key in [key for key in self._past if key[1] == peer]:
            del self._past[key]
        for (_, name), task in self._tasks.items():
            if name == peer:
                task.cancel()

    async def quiet(self, peer: str) -> None:
        """Wait until no attempt to reach a peer that was forgotten is under way."""
        while tasks := [task for (_, name), task in self._tasks.items() if name == peer]:
            await asyncio.wait(tasks)

    async def aclose(self) -> None:
        """Try nothing any more."""
        while self._tasks:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.wait(list(self._tasks.values()))

    def _check_relayed(self, backend: str, peer: str) -> None:
        """Raise unless the routes that a relay goes by are up: it has no connection of its own."""
        down = [name for name, whose in self._tasks if whose == peer and name != backend and not self._backends[name].relays]
        if down:
            raise BackendError(f"it goes by {', '.join(down)}, which {'are' if len(down) > 1 else 'is'} down", backend=backend)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("route %s to peer %s cannot be tried again", *key, exc_info=error)

    async def _revive(self, outage: Outage) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        key = outage.backend, outage.peer
        attempts, ended = self._past.pop(key, (0, 0.0))
        if loop.time() - ended > STEADY_SECONDS:
            attempts = 0
        logger.info("route %s to peer %s is down: %s", *key, outage.reason)
        backend, told = self._backends[outage.backend], False
        while True:
            if attempts:
                delay = min(FIRST_SECONDS * 2.0 ** min(attempts - 1, 16), LONGEST_SECONDS) * random.uniform(0.5, 1.5)
                outage.again_at = loop.time() + delay
                await asyncio.sleep(delay)
                outage.again_at = None
            attempts += 1
            try:
                if backend.relays:
                    self._check_relayed(*key)
                else:
                    await self._membership.reconnect(backend, outage.peer)
            except NixlError as error:
                outage.reason = str(error)
                if not told and loop.time() - began >= TOLD_SECONDS and outage.peer in self._membership.peers:
                    told = True
                    logger.warning("route %s to peer %s stays down and is tried again: %s", *key, outage.reason)
            else:
                break
        self._past[key] = min(attempts, RELAPSE_ATTEMPTS), loop.time()
        logger.log(logging.WARNING if told else logging.INFO, "route %s to peer %s is back", *key)
        self._route_back(*key)
