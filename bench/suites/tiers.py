"""A block store's own cost: blocks by their keys in one tier, beside bare transfers of the same pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.process import Contender
from bench.report import Figure, Row
from bench.served import room
from bench.session import OURS, Settings, WrongBytes, alternate, singles
from bench.suites.files import CACHE, DIRECT

BLOCK = 64 << 10
QUICK_BLOCKS = 32
CALL_BLOCKS = 4096
"""Blocks of a call, as in the workers."""
MODULE = "bench.workers.tiers"
DRAM = "dram"
KINDS = (DRAM, CACHE, DIRECT)
RAW = "agent.transfer"
UNCHECKED = "nixl_async, no checksums"
SHARE = 0.8
CONTAINS_US = 2.0
PUT, DURABLE, GET = "put", "put, durable", "get"
_GB = 1e9


@dataclass
class _Turns:
    """What the contenders do in their turns; every block of a turn is one that was not there before."""

    n_blocks: int
    directory: str
    ops: tuple[str, ...]
    salt: int = 1

    def place(self, single: Any) -> str:
        """Return the contender's own directory."""
        return f"{self.directory}/{single.contender.label.replace(' ', '-')}"

    def take(self, single: Any) -> dict[str, dict[str, float]]:
        """Put every block, durably or not, and get it: seconds of each, and of asking for keys where there are any."""
        found: dict[str, dict[str, float]] = {}
        worker = single.worker
        for durable in (False, True):
            op = DURABLE if durable else PUT
            if op not in self.ops:
                continue
            # Calls count their own salts up from this one.
            self.salt += self.n_blocks
            found[op] = worker.call("put", salt=self.salt, durable=durable)
            found[GET] = got = worker.call("get", salt=self.salt)
            if got["wrong"]:
                raise WrongBytes(f"{single.contender.label}: {got['wrong']:.0f} of {self.n_blocks} blocks hold wrong bytes")
            worker.call("settle", directory=self.place(single))
        if single.contender.label == OURS:
            found["contains"] = worker.call("contains")
        return found


def blocks(settings: Settings, kind: str) -> Iterator[Row]:
    """Put and get blocks that no earlier turn had, in a tier that is full from the second turn on, and so evicts as many."""
    size = settings.sizes[0] if settings.sizes else BLOCK
    n_blocks = QUICK_BLOCKS if settings.quick else max(1, settings.nbytes // size)
    ops = (PUT, GET) if kind == DRAM else (PUT, DURABLE, GET)
    everyone = [Contender(OURS, MODULE), Contender(RAW, "bench.workers.raw_tiers")]
    if kind != DRAM:
        # What the checksums cost, for information: a tier of memory has none.
        everyone.append(Contender(UNCHECKED, MODULE, options={"checksums": False}))
    nbytes = min(n_blocks, CALL_BLOCKS) * size
    with room(len(everyone) * n_blocks * size, memory=False) as directory, singles(everyone, nbytes, settings) as started:
        turns = _Turns(n_blocks, str(directory), ops)
        for single in started.values():
            where = turns.place(single)
            aim = {"tier": DRAM if kind == DRAM else "files", "directory": where, "direct": kind == DIRECT}
            single.worker.call("aim", block_nbytes=size, n_blocks=n_blocks, **aim)
        samples = alternate(started, settings, f"tiers {kind}", turns.take)
    for op in ops:
        figures = {label: _speed(label, [one[op] for one in taken], n_blocks * size) for label, taken in samples.items()}
        case = {"tier": kind, "op": op, "page": size, "blocks": n_blocks}
        others = [figure for label, figure in figures.items() if label == UNCHECKED]
        row = Row("tiers", case, "GB/s", figures[OURS], others, figures[RAW])
        row.share_of_raw(SHARE)
        yield row
    asked = tuple(one["contains"]["seconds"] / one["contains"]["keys"] * 1e6 for one in samples[OURS])
    row = Row("tiers", {"tier": kind, "op": "contains", "page": size, "blocks": n_blocks}, "us", Figure(OURS, asked))
    row.at_most(CONTAINS_US, text=f"<= {CONTAINS_US:g} us a key")
    yield row


def _speed(label: str, taken: list[dict[str, float]], nbytes: int) -> Figure:
    cpu = sorted(one["cpu"] / nbytes * _GB for one in taken)[len(taken) // 2]
    return Figure(label, tuple(nbytes / one["seconds"] / _GB for one in taken), f"{cpu:.2f} CPU s/GB")
