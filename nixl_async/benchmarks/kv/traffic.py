"""What a rank does in traffic patterns: it sends to each of the others, or pulls from them, what the matrices say.

The sequence is that of KVBench's sequential-ct-perftest: warming up, each pattern alone, then all of them one after the other; in
it ranks wait only for those that start transfers in the same pattern: patterns without common ranks run at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nixl_async.agent import Agent
from nixl_async.benchmarks.kv.contents import Memory, WrongBytes, check_words, fill_words
from nixl_async.benchmarks.kv.matrices import WRITE, Matrix, Pattern
from nixl_async.handle import PreparedTransfer, Transfer

if TYPE_CHECKING:
    from nixl_async.benchmarks.kv.worker import Parent

ALIGNMENT = 64
SEND, RECEIVE = "send", "receive"


def padded(nbytes: int) -> int:
    """Return the bytes that a message takes in a buffer: each begins at a multiple of 64."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def send_offset(matrix: Matrix, src: int, dst: int) -> int:
    """Return where in the sender's buffer a message begins."""
    return sum(padded(matrix[src][other]) for other in range(dst))


def receive_offset(matrix: Matrix, src: int, dst: int) -> int:
    """Return where in the receiver's part of a pattern a message begins."""
    return sum(padded(matrix[other][dst]) for other in range(src))


@dataclass(frozen=True)
class Buffers:
    """How much a rank needs: to send as much as the largest pattern takes, to receive each pattern's share, apart if checked."""

    send_nbytes: int
    receive_nbytes: int
    receive_starts: tuple[int, ...]
    """Where in the receiving buffer each pattern begins."""

    @classmethod
    def of(cls, patterns: Iterable[Pattern], rank: int, *, apart: bool) -> Buffers:
        """Reckon them; `apart`: no pattern receives where another does, so that all can be checked after all have run."""
        send = receive = 0
        starts = []
        for pattern in patterns:
            send = max(send, sum(map(padded, pattern.matrix[rank])))
            got = sum(padded(row[rank]) for row in pattern.matrix)
            starts.append(receive if apart else 0)
            receive = receive + got if apart else max(receive, got)
        return cls(send, receive, tuple(starts))


class _Rank:
    def __init__(self, setup: dict[str, Any], parent: Parent) -> None:
        self.parent, self.rank = parent, parent.rank
        self.patterns = [Pattern.read(values) for values in setup["patterns"]]
        self.verify: bool = setup["verify"]
        self.setup = setup
        self.memory = Memory(setup["memory"], self.rank)
        self.buffers = [Buffers.of(self.patterns, rank, apart=self.verify) for rank in range(parent.world)]
        mine = self.buffers[self.rank]
        # A region cannot be empty, whatever the matrices say.
        self.send = self.memory.allocate(max(ALIGNMENT, mine.send_nbytes))
        self.receive = self.memory.allocate(max(ALIGNMENT, mine.receive_nbytes))
        self.prepared: list[list[PreparedTransfer]] = []
        self.barriers = 0

    def others(self) -> set[int]:
        """Ranks that something goes to or comes from."""
        cells = (
            (src, dst)
            for pattern in self.patterns
            for src, row in enumerate(pattern.matrix)
            for dst, nbytes in enumerate(row)
            if nbytes and self.rank in (src, dst)
        )
        return {rank for cell in cells for rank in cell} - {self.rank}

    async def barrier(self, what: str, of: Iterable[int] | None = None) -> None:
        await self.parent.gather(what, of=of)

    async def connect(self, agent: Agent) -> None:
        """Join the ranks that have something to do with each other, and prepare every transfer that this one starts."""
        own = {SEND: await agent.register(self.send, name=SEND), RECEIVE: await agent.register(self.receive, name=RECEIVE)}
        address = await agent.serve("127.0.0.1", 0)
        addresses = await self.parent.gather("addresses", address)
        peers = {}
        for other in sorted(self.others()):
            if other > self.rank:
                peers[other] = await agent.connect(tuple(addresses[other]))
        for other in self.others():
            if other < self.rank:
                peers[other] = await agent.wait_peer(_name(other))
        await self.barrier("connected")

        def region(rank: int, name: str) -> Any:
            return own[name] if rank == self.rank else peers[rank].region(name)

        for number, pattern in enumerate(self.patterns):
            prepared = []
            for other in range(pattern.world):
                src, dst = (self.rank, other) if pattern.op == WRITE else (other, self.rank)
                if not (nbytes := pattern.matrix[src][dst]):
                    continue
                near = send_offset(pattern.matrix, src, dst)
                far = self.buffers[dst].receive_starts[number] + receive_offset(pattern.matrix, src, dst)
                sides = (region(src, SEND)[near : near + nbytes], region(dst, RECEIVE)[far : far + nbytes])
                prepared.append(await agent.prepare(*sides))
            self.prepared.append(prepared)

    async def move(self, number: int) -> None:
        """Start all of this rank's transfers of a pattern and wait for them."""
        transfers = [prepared.submit() for prepared in self.prepared[number]]
        try:
            for transfer in transfers:
                await transfer
        except BaseException:
            await _stop(transfers)
            raise

    async def fill(self, salt: int) -> None:
        if self.verify:
            await self.memory.run(lambda: fill_words(self.memory, self.send, self.rank, salt))

    async def check(self, number: int, salt: int) -> None:
        """Compare every byte that this rank received in a pattern."""
        if not self.verify:
            return
        pattern, start = self.patterns[number], self.buffers[self.rank].receive_starts[number]
        for src, row in enumerate(pattern.matrix):
            if not (nbytes := row[self.rank]):
                continue
            first = start + receive_offset(pattern.matrix, src, self.rank)
            offset = send_offset(pattern.matrix, src, self.rank)
            found = self.receive[first : first + nbytes]
            wrong = await self.memory.run(lambda f=found, s=src, o=offset: check_words(self.memory, f, s, salt, o))  # type: ignore[misc]
            if wrong:
                raise WrongBytes(f"{wrong} of {nbytes} bytes from rank {src} are wrong, in pattern {pattern.name}")

    async def single(self) -> dict[str, Any]:
        """Run one pattern again and again."""
        for _ in range(self.setup["warmup"]):
            await self.move(0)
        await self.barrier("warm")
        await self.fill(1)
        await self.barrier("filled")
        start = end = None
        if self.rank in self.patterns[0].initiators:
            await self.barrier("go", self.patterns[0].initiators)
            start = time.monotonic()
            for _ in range(self.setup["iters"]):
                await self.move(0)
            end = time.monotonic()
        await self.barrier("moved")
        await self.check(0, 1)
        return {"start": start, "end": end}

    async def sequence(self) -> dict[str, Any]:
        """Warm up, run each pattern alone, then the whole sequence several times."""
        await self.warm_up()
        salt, alone_from = 0, time.monotonic()
        alone: list[float | None] = []
        for number, pattern in enumerate(self.patterns):
            salt += 1
            await self.fill(salt)
            await self.barrier(f"filled {salt}")
            alone.append(await self.isolated(number) if self.rank in pattern.initiators else None)
            await self.barrier(f"moved {salt}")
            await self.check(number, salt)
            self.parent.say(event="isolated", number=number)
        iterations = []
        for turn in range(self.setup["iters"]):
            salt += 1
            await self.fill(salt)
            await self.barrier(f"filled {salt}")
            began = time.monotonic()
            spans = [await self.one(number, turn) for number in range(len(self.patterns))]
            await self.barrier(f"moved {salt}")
            for number in range(len(self.patterns)):
                await self.check(number, salt)
            iterations.append({"began": began, "spans": spans})
            self.parent.say(event="iteration", number=turn)
        return {"isolated": alone, "isolated_from": alone_from, "iterations": iterations}

    async def warm_up(self) -> None:
        """Run patterns that go to ranks which nothing has gone to yet, all ranks at once."""
        warm: set[int] = set()
        for number, pattern in enumerate(self.patterns):
            far = {other for other in range(pattern.world) if _cell(pattern, self.rank, other)}
            if not far <= warm:
                for _ in range(self.setup["warmup"]):
                    await self.move(number)
                warm |= far
        await self.barrier("warm")

    async def isolated(self, number: int) -> float:
        """Run a pattern while no other runs; return the mean seconds."""
        initiators = self.patterns[number].initiators
        await self.barrier(f"isolated {number}", initiators)
        total = 0.0
        for turn in range(self.setup["isolated_iters"]):
            began = time.monotonic()
            await self.move(number)
            total += time.monotonic() - began
            await self.barrier(f"isolated {number}, {turn}", initiators)
        mean: float = total / self.setup["isolated_iters"]
        return mean

    async def one(self, number: int, turn: int) -> tuple[float, float] | None:
        """Run a pattern in the sequence; return when this rank began and ended."""
        pattern = self.patterns[number]
        if self.rank not in pattern.initiators:
            return None
        await self.barrier(f"iteration {turn}, pattern {number}", pattern.initiators)
        if pattern.sleep_before:
            await asyncio.sleep(pattern.sleep_before)
        began = time.monotonic()
        await self.move(number)
        ended = time.monotonic()
        if pattern.sleep_after:
            await asyncio.sleep(pattern.sleep_after)
        return began, ended


def _cell(pattern: Pattern, rank: int, other: int) -> int:
    """Return the bytes that `rank` moves to or from `other` by its own doing."""
    return pattern.matrix[rank][other] if pattern.op == WRITE else pattern.matrix[other][rank]


def _name(rank: int) -> str:
    return f"rank-{rank}"


async def _stop(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        transfer.cancel()
    await asyncio.gather(*(transfer.watch() for transfer in transfers), return_exceptions=True)


async def run_rank(setup: dict[str, Any], parent: Parent) -> dict[str, Any]:
    """Do one rank's part of the patterns; return when it began and ended what."""
    rank = _Rank(setup, parent)
    async with Agent(_name(parent.rank), backends=setup["backends"], token=setup["token"]) as agent:
        began = time.monotonic()
        await rank.connect(agent)
        prepare_seconds = time.monotonic() - began
        result = await (rank.sequence() if setup["sequential"] else rank.single())
        await rank.barrier("done")
        routes = [route for route, nbytes in agent.statistics().nbytes.items() if nbytes]
    return {**result, "prepare_seconds": prepare_seconds, "routes": routes}
