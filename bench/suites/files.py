"""Blocks of a file, read and written: past the page cache and through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.process import Contender
from bench.report import Row
from bench.served import room
from bench.session import OURS, Settings
from bench.storage import Work, field, measure, rows

KIB, MIB = 1 << 10, 1 << 20
COUNTS = {16 * KIB: 1024, 64 * KIB: 1024, 256 * KIB: 256, MIB: 64}
QUICK_SIZES, QUICK_COUNT = (64 * KIB,), 16
ENGINES = {"NIXL, io_uring": "use_uring", "NIXL, linux aio": "use_aio", "NIXL, posix aio": "use_posix_aio"}
WHOM = "NIXL's best"
DIRECT, CACHE = "direct", "page-cache"


@dataclass(frozen=True)
class Way:
    """Past the page cache or through it: the block sizes, what is promised, and who sets the limit."""

    name: str
    sizes: Sequence[int]
    factor: dict[str, dict[int, float]]
    cpu_factor: float | None
    raw: str
    raw_share: float | None


WAYS = {
    DIRECT: Way(DIRECT, (64 * KIB, 256 * KIB, MIB), {}, 4.0, "fio", 0.9),
    CACHE: Way(
        CACHE, (16 * KIB, 64 * KIB, MIB), {"read": {16 * KIB: 1.5, 64 * KIB: 1.5, MIB: 1.1}}, None, "preadv, 1 thread", None
    ),
}
DIRECT_FACTOR, WRITE_FACTOR = 0.95, 1.0


def blocks(settings: Settings, name: str) -> Iterator[Row]:
    """Read and write blocks in the file's order to and from shuffled memory pages, and for information in random order."""
    way = WAYS[name]
    counts = {size: COUNTS.get(size) or max(4, settings.nbytes // size) for size in settings.sizes or way.sizes}
    if settings.quick:
        counts = dict.fromkeys(QUICK_SIZES, QUICK_COUNT)
    nbytes = max(size * count for size, count in counts.items())
    raw = Contender(way.raw, "bench.workers.raw_files")
    mine = Contender(OURS, "bench.workers.ours_files")
    with room(nbytes, memory=False) as directory, field([mine, *_nixl(settings)], raw, nbytes, settings) as players:
        players.checkable = name == CACHE
        players.limited = name == CACHE or players.raw.worker.call("has_fio")
        if not players.limited:
            settings.warn("fio is left out, it is not installed: apt-get install -y fio")
        for size, count in counts.items():
            path = str(directory / f"blocks-{size}")
            for op in ("write", "read"):
                for contiguous in (True, False):
                    where = {"path": path, "direct": name == DIRECT, "contiguous": contiguous}
                    work = Work(op, size, count, where)
                    order = "as in the file" if contiguous else "random"
                    samples = measure(players, work, f"files {name} {op}, {size} B, {order}")
                    case = {"way": name, "op": op, "page": size, "blocks": count, "order": order}
                    speed, cost = rows("files", case, work, samples, raw=way.raw)
                    if contiguous:
                        _promise(way, op, size, speed, cost)
                    yield speed
                    yield cost


def _promise(way: Way, op: str, size: int, speed: Row, cost: Row) -> None:
    engines = tuple(ENGINES)
    if way.name == DIRECT:
        speed.at_least_best(engines, DIRECT_FACTOR, WHOM)
    else:
        speed.at_least_best(engines, WRITE_FACTOR if op == "write" else way.factor["read"].get(size, 1.0), WHOM)
    if way.raw_share is not None:
        speed.share_of_raw(way.raw_share)
    if way.cpu_factor is not None:
        cost.at_least_best(engines, way.cpu_factor, WHOM)


def _nixl(settings: Settings) -> list[Contender]:
    if not settings.nixl_python:
        return []
    found = []
    for label, choice in ENGINES.items():
        parameters = {name: "true" if name == choice else "false" for name in ENGINES.values()}
        options = {"backend": "POSIX", "parameters": parameters, "poll_seconds": 0}
        module = "bench.workers.nixl_storage"
        found.append(Contender(label, module, settings.nixl_python, options=options, stopped_between_turns=True))
    return found
