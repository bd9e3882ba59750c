"""A wrapper that makes any backend slow, failing, hanging, deserted or wrong, for as long as a `with` block lasts; and resets."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from nixl_async.backend import Backend, Begun, Host, Op, PeerInfo, quiesce
from nixl_async.descriptors import Plan
from nixl_async.errors import PeerLost

if TYPE_CHECKING:
    from nixl_async.descriptors import Side
    from nixl_async.memory import MemoryRegion, RemoteRegion

Fault: TypeAlias = Callable[[Op], Awaitable[None]]


def reset_connections(port: int) -> int:
    """Reset this process's TCP connections to `port`, whoever holds them, as a network does that forgets them; return how many."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            # The listing's own descriptor, or one closed meanwhile.
            continue
        with connection:
            try:
                if connection.type == socket.SOCK_STREAM and connection.getpeername()[1] == port:
                    # connect(2): AF_UNSPEC dissolves the association; TCP sends a reset.
                    found += libc.connect(connection.fileno(), bytes(16), 16) == 0
            except (OSError, IndexError):
                continue
    return found


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
        self.begins = inner.begins  # type: ignore[misc]
        self.revocation = inner.revocation  # type: ignore[misc]
        self.limits = inner.limits
        self.rank = inner.rank
        self.copies = self.inline = self.in_flight = 0
        self._host: Host | None = None
        self._faults: list[Fault] = []
        self._after: list[Fault] = []
        self._bends: list[Callable[[Plan], Plan]] = []

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
    def misdirect(self, first: int, second: int) -> Iterator[None]:
        """Write segment `first` of each op where `second` belongs and the other way round, and report success.

        The two must be equally long; an op without them is carried out as it is.
        """

        def swap(plan: Plan) -> Plan:
            if max(first, second) >= len(plan.lengths):
                return plan
            assert plan.lengths[first] == plan.lengths[second], "segments of unequal length cannot take each other's place"
            order = np.arange(len(plan.lengths))
            order[[first, second]] = order[[second, first]]
            return replace(plan, dst=plan.dst.choose(order))

        with self._bent(swap):
            yield

    @contextmanager
    def leave_out(self, segment: int) -> Iterator[None]:
        """Leave out one segment of each op that has more, and report success."""

        def drop(plan: Plan) -> Plan:
            if not segment < len(plan.lengths) > 1:
                return plan
            keep = np.arange(len(plan.lengths)) != segment
            lengths = plan.lengths[keep]
            return Plan(plan.src.choose(keep), plan.dst.choose(keep), lengths, int(lengths.sum()), plan.part_ends)

        with self._bent(drop):
            yield

    @contextmanager
    def afterwards(self, action: Fault) -> Iterator[None]:
        """Await `action(op)` when an op has been copied, before that is reported."""
        self._after.append(action)
        try:
            yield
        finally:
            self._after.remove(action)

    @contextmanager
    def _bent(self, bend: Callable[[Plan], Plan]) -> Iterator[None]:
        self._bends.append(bend)
        try:
            yield
        finally:
            self._bends.remove(bend)

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
        done = False if self._faults or self._after or self._bends else self.inner.copy_now(op)
        self.inline += bool(done)
        return done

    async def copy(self, op: Op) -> None:
        """Suffer the faults, then let the inner backend copy."""
        self.copies += 1
        self.in_flight += 1
        try:
            for fault in list(self._faults):
                await fault(op)
            plan = op.plan
            for bend in self._bends:
                plan = bend(plan)
            await self.inner.copy(op if plan is op.plan else replace(op, plan=plan))
            for action in list(self._after):
                await action(op)
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

    def describe_to(self, peer: str, incarnation: str) -> bytes:
        """Return what the inner backend tells that peer."""
        return self.inner.describe_to(peer, incarnation)

    async def dismiss(self, peer: str, incarnation: str) -> None:
        """Let the inner backend dismiss the peer."""
        await self.inner.dismiss(peer, incarnation)

    async def grant(self, region: MemoryRegion, peer: str, incarnation: str, *, writable: bool) -> bytes:
        """Let the inner backend grant."""
        return await self.inner.grant(region, peer, incarnation, writable=writable)

    async def revoke(self, region: MemoryRegion, key: bytes) -> None:
        """Let the inner backend revoke."""
        await self.inner.revoke(region, key)

    def pidfd(self, peer: str) -> int | None:
        """Ask the inner backend."""
        return self.inner.pidfd(peer)

    async def connect(self, peer: PeerInfo) -> None:
        """Connect the inner backend."""
        await self.inner.connect(peer)

    async def listen(self, host: str) -> None:
        """Let the inner backend listen."""
        await self.inner.listen(host)

    async def send_notification(self, peer: str, payload: bytes) -> None:
        """Send through the inner backend."""
        await self.inner.send_notification(peer, payload)

    async def fence(self, peer: PeerInfo, mark: bytes) -> None:
        """Let the inner backend fence."""
        await self.inner.fence(peer, mark)

    async def forget(self, region: RemoteRegion) -> None:
        """Let the inner backend forget."""
        await self.inner.forget(region)

    async def disconnect(self, peer: str) -> None:
        """Disconnect the inner backend."""
        await self.inner.disconnect(peer)
