"""A wrapper that makes any backend slow, failing, hanging or deserted, for as long as a `with` block lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from nixl_async.backend import Backend, Begun, Host, Op, PeerInfo, quiesce
from nixl_async.errors import PeerLost

if TYPE_CHECKING:
    from nixl_async.descriptors import Side
    from nixl_async.memory import MemoryRegion, RemoteRegion

Fault: TypeAlias = Callable[[Op], Awaitable[None]]


class Gate:
    """Where ops are held: wait until some have come, and let them go."""

    def __init__(self, *, stubborn: bool) -> None:
        self.stubborn = stubborn
        self.ops: list[Op] = []
        self._arrived = asyncio.Condition()
        self._open: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def reached(self, n_ops: int = 1) -> list[Op]:
        """Wait until `n_ops` ops in all have come; return them."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.ops) >= n_ops)
        return self.ops

    def release(self) -> None:
        """Let the ops go on, those held and those to come. Idempotent."""
        if not self._open.done():
            self._open.set_result(None)

    async def _hold(self, op: Op) -> None:
        self.ops.append(op)
        async with self._arrived:
            self._arrived.notify_all()
        if self.stubborn:
            await quiesce(asyncio.ensure_future(asyncio.shield(self._open)))
        else:
            await asyncio.shield(self._open)


class FaultyBackend(Backend):
    """Wraps a backend and passes everything on to it, except while one of its context managers is entered.

    `copies` counts the calls of `copy`, `inline` the copies made at once, `in_flight` the ops that have not ended.
    While a fault is on, nothing is copied at once: every op goes through `copy`.
    """

    name = "faulty"

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        # It takes the place of the inner one.
        self.name = inner.name  # type: ignore[misc]
        self.remote = inner.remote  # type: ignore[misc]
        self.limits = inner.limits
        self.rank = inner.rank
        self.copies = self.inline = self.in_flight = 0
        self._host: Host | None = None
        self._faults: list[Fault] = []

    # Faults.

    @contextmanager
    def delay(self, seconds: float) -> Iterator[None]:
        """Begin each op `seconds` later; an op that is cancelled meanwhile never begins."""

        async def wait(op: Op) -> None:
            await asyncio.sleep(seconds)

        with self._injected(wait):
            yield

    @contextmanager
    def fail_next(self, error: BaseException, times: int = 1, *, peer: str | None = None) -> Iterator[None]:
        """Raise `error` from the next `times` ops (of `peer`, if given) instead of copying; the op moves no byte."""
        left = times

        async def fail(op: Op) -> None:
            nonlocal left
            if left and peer in (None, op.peer):
                left -= 1
                raise error

        with self._injected(fail):
            yield

    @contextmanager
    def hang(self, *, stubborn: bool = False) -> Iterator[Gate]:
        """Hold every op at the gate that this yields, until it is released or the block ends.

        A cancelled op leaves the gate and is quiet; a `stubborn` one stays until the gate opens, like hardware that
        cannot be stopped.
        """
        gate = Gate(stubborn=stubborn)
        try:
            with self._injected(gate._hold):
                yield gate
        finally:
            gate.release()

    @contextmanager
    def lose_peer(self, peer: str, reason: str = "the test says so") -> Iterator[None]:
        """Report `peer` as lost, and fail every op of it that begins while the block lasts with `PeerLost`."""

        async def fail(op: Op) -> None:
            if op.peer == peer:
                raise PeerLost(f"peer {peer!r} is lost: {reason}", backend=self.name, peer=peer)

        with self._injected(fail):
            if self._host is not None:
                self._host.peer_lost(peer, reason)
            yield

    @contextmanager
    def _injected(self, fault: Fault) -> Iterator[None]:
        self._faults.append(fault)
        try:
            yield
        finally:
            self._faults.remove(fault)

    # Backend

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Ask the inner backend."""
        return self.inner.refusal(src, dst)

    def copy_now(self, op: Op) -> bool | Begun:
        """Let the inner backend copy at once if there is no fault."""
        done = False if self._faults else self.inner.copy_now(op)
        self.inline += bool(done)
        return done

    async def copy(self, op: Op) -> None:
        """Suffer the faults, then let the inner backend copy."""
        self.copies += 1
        self.in_flight += 1
        try:
            for fault in list(self._faults):
                await fault(op)
            await self.inner.copy(op)
        finally:
            self.in_flight -= 1

    async def open(self, host: Host) -> None:
        """Open the inner backend."""
        self._host = host
        await self.inner.open(host)

    async def aclose(self) -> None:
        """Close the inner backend."""
        await self.inner.aclose()

    async def register(self, region: MemoryRegion) -> bytes:
        """Register with the inner backend."""
        return await self.inner.register(region)

    async def unregister(self, region: MemoryRegion) -> None:
        """Unregister from the inner backend."""
        await self.inner.unregister(region)

    def describe(self) -> bytes:
        """Return the inner backend's description."""
        return self.inner.describe()

    async def connect(self, peer: PeerInfo) -> None:
        """Connect the inner backend."""
        await self.inner.connect(peer)

    async def listen(self, host: str) -> None:
        """Let the inner backend listen."""
        await self.inner.listen(host)

    async def send_notification(self, peer: str, payload: bytes) -> None:
        """Send through the inner backend."""
        await self.inner.send_notification(peer, payload)

    async def forget(self, region: RemoteRegion) -> None:
        """Let the inner backend forget."""
        await self.inner.forget(region)

    async def disconnect(self, peer: str) -> None:
        """Disconnect the inner backend."""
        await self.inner.disconnect(peer)
