"""What is measured with a GPU, as rows of the same form as the other benches'."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.process import Contender, Pair, Single, Worker, WorkerError
from bench.report import Check, Figure, Row
from bench.session import NIXL, OURS, Settings, WrongBytes, alternate, check, pairs, singles, start_run

OURS_UCX = "nixl_async ucx"
UCX_MAX_PAGES, UCX_MAX_NBYTES = 16384, {"device": 256 << 20, "to-host": 64 << 20, "to-device": 64 << 20}
"""Through UCX a page costs microseconds, and a gigabyte to a host a second; more of them show nothing more."""
COPY_SHARES = {16384: 0.6, 65536: 0.75, 1 << 20: 0.85}
NIXL_FACTOR, NIXL_FACTOR_BELOW = 3.0, 65536
PREPARED = "prepared"
"""Ours again, without what turns block tables into a plan: `agent.prepare` was called before."""
LARGE = 4
"""How many times the usual bytes a long request has."""
SLOWER_PERCENT, HIDDEN_PERCENT = 5.0, 90.0
LAYERS = 80
_GB = 1e9


def _ours(memory: dict[str, str], label: str = OURS, module: str = "bench.gpu.mover", **options: Any) -> Contender:
    return Contender(label, module, options={"memory": memory, **options})


def _through_ucx(memory: dict[str, str]) -> Contender:
    return _ours(memory, OURS_UCX, backends=["ucx", "cuda", "memory"], backend="ucx")


def _nixl(settings: Settings, memory: dict[str, str]) -> list[Contender]:
    if not settings.nixl_python:
        return []
    options = {"memory": memory}
    return [Contender(NIXL, "bench.gpu.nixl", settings.nixl_python, {}, options, stopped_between_turns=True)]


def _raw(**options: Any) -> Contender:
    return Contender("raw", "bench.gpu.raw", options=options)


def _no_route(command: str, case: dict[str, Any], unit: str, label: str, refusals: dict[str, str]) -> Row:
    why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    row = Row(command, case, unit, Figure(label, (0.0,), f"no route: {why}"))
    row.checks.append(Check("a route", 0.0, False))
    return row


# Two processes.


Case = tuple[str, int, int]
"""`write` or `read`, bytes of a page, bytes in all."""


def pages(settings: Settings) -> Iterator[Row]:
    """Pages of a device's memory to and from another process's, in random order; the raw limit is the device's own copy."""
    cases: list[Case] = [(op, page, settings.nbytes) for op in ("write", "read") for page in settings.pages]
    if not settings.quick:
        cases += [("write", page, LARGE * settings.nbytes) for page in settings.pages if page in COPY_SHARES]
    yield from _between("gpu pages", settings, cases, {"initiator": "vram", "target": "vram"}, "device")


def peer_host(settings: Settings) -> Iterator[Row]:
    """Pages of a device's memory to and from host memory of another process; the raw limit is a copy to pinned memory."""
    cases: list[Case] = [(op, page, settings.nbytes) for op in ("write", "read") for page in settings.pages]
    yield from _between("gpu peer-host", settings, cases, {"initiator": "vram", "target": "pageable"}, "host")


def _between(command: str, settings: Settings, cases: list[Case], memory: dict[str, str], limit: str) -> Iterator[Row]:
    within = limit == "device"
    room = max(nbytes for _, _, nbytes in cases)
    contenders = [_ours(memory), *([_through_ucx(memory)] if _has_ucxx() else []), *_nixl(settings, memory)]
    with pairs(contenders, room, settings) as started, singles([_raw(host=not within)], room, settings) as raws:
        for case in cases:
            yield _measured(command, settings, case, started, raws["raw"].worker, within)


def _measured(command: str, settings: Settings, case: Case, started: dict[str, Pair], raw: Worker, within: bool) -> Row:
    op, page, nbytes = case
    kind = "device" if within else "to-host" if op == "write" else "to-device"
    shown = {"op": op, "page": page, "MiB": nbytes >> 20}
    fewer = min(nbytes, UCX_MAX_PAGES * page, UCX_MAX_NBYTES[kind])
    runs = {label: _Run(pair, op, page, nbytes if label == OURS else fewer) for label, pair in started.items()}
    told = {label: pair.initiator.call("explain") for label, pair in started.items() if label != NIXL}
    if told[OURS]["route"] is None:
        return _no_route(command, shown, "GB/s", OURS, told[OURS]["refusals"])
    moving = {label: pair for label, pair in started.items() if label == NIXL or told[label]["route"]}
    for label in [label for label in moving if label != OURS]:
        try:
            with moving[label].turn():
                runs[label].once()
        except (WorkerError, WrongBytes) as error:
            settings.warn(f"{label} is left out from here on: {error}")
            del moving[label], started[label]
    limits: list[float] = []
    prepared: list[float] = []

    def once(pair: Pair) -> float:
        if pair.contender.label == OURS:
            limits.append(raw.call("copy", kind=kind, nbytes=nbytes))
            prepared.append(runs[OURS].once("move_prepared"))
        return runs[pair.contender.label].once()

    samples = alternate(moving, settings, f"{command} {op}, {page} B pages", once)
    samples[PREPARED] = prepared[1:]
    row = _row(command, shown, samples, limits[1:], nbytes, "D2D copy" if within else "pinned copy")
    row.ours = Figure(OURS, row.ours.samples, told[OURS]["route"])
    if within and page in COPY_SHARES:
        share = COPY_SHARES[page]
        row.share_of_raw(share)
        assert row.raw is not None
        value = statistics.median(samples[PREPARED]) / row.raw.median
        row.checks.append(Check(f">= {share:.0%}, prepared", value, value >= share, "{:.0%}"))
    if within and page < NIXL_FACTOR_BELOW:
        row.at_least(NIXL, NIXL_FACTOR)
    return row


def _has_ucxx() -> bool:
    import importlib.util

    return importlib.util.find_spec("ucxx") is not None


class _Run:
    """One contender's pages of one size: filled once, blanked, moved and checked each time."""

    def __init__(self, pair: Pair, op: str, page: int, nbytes: int) -> None:
        self.pair, self.page, self.seed, self.turn = pair, page, page + (op == "write"), 0
        self.n = nbytes // page
        _, self.destination = start_run(pair, op, page, self.n, self.seed)

    def once(self, how: str = "move") -> float:
        self.turn += 1
        self.destination.call("blank", salt=self.turn)
        result = self.pair.initiator.call(how)
        check(self.pair, self.destination, self.seed)
        return float(self.n * self.page / result["seconds"] / _GB)


def _row(
    command: str, case: dict[str, Any], samples: dict[str, list[float]], limits: list[float], nbytes: int, name: str
) -> Row:
    figures = {label: Figure(label, tuple(values)) for label, values in samples.items()}
    row = Row(command, case, "GB/s", figures.pop(OURS), list(figures.values()))
    row.raw = Figure(name, tuple(nbytes / seconds / _GB for seconds in limits))
    return row


# One process.


def host(settings: Settings) -> Iterator[Row]:
    """A device's pages to and from pinned and pageable memory of the same process; the raw limit is one copy of pinned memory."""
    memories = {"vram": "vram", "pinned": "pinned", "pageable": "pageable"}
    for op in ("to-host", "to-device"):
        for memory in ("pinned", "pageable"):
            cases = [
                ({"op": op, "host memory": memory, "page": page or settings.nbytes}, page)
                for page in (0, 1 << 20, 65536, 4096)
                if page == 0 or page in settings.pages
            ]
            src, dst = ("vram", memory) if op == "to-host" else (memory, "vram")
            yield from _local("gpu host", settings, memories, cases, src, dst, False, op, "pinned copy")


def gather(settings: Settings) -> Iterator[Row]:
    """Pages in random order into one block of the same device, and back; the raw limit is the device's own copy."""
    memories = {"vram": "vram", "block": "vram"}
    for op in ("gather", "scatter"):
        cases = [({"op": op, "page": page, "MiB": settings.nbytes >> 20}, page) for page in (1024, *settings.pages)]
        src, dst = ("vram", "block") if op == "gather" else ("block", "vram")
        yield from _local("gpu gather", settings, memories, cases, src, dst, op == "scatter", "device", "D2D copy")


def _local(
    command: str,
    settings: Settings,
    memories: dict[str, str],
    cases: list[tuple[dict[str, Any], int]],
    src: str,
    dst: str,
    scattered: bool,
    limit: str,
    limit_name: str,
) -> Iterator[Row]:
    nbytes = settings.nbytes
    contender = Contender(OURS, "bench.gpu.local", options={"memories": memories})
    within = limit == "device"
    with singles([contender], nbytes, settings) as started, singles([_raw(host=not within)], nbytes, settings) as raws:
        ours, raw = started[OURS].worker, raws["raw"].worker
        for case, page in cases:
            ours.call("ready", src=src, dst=dst, page_nbytes=page, scattered=scattered, seed=page + scattered)
            told = ours.call("explain")
            if told["route"] is None:
                yield _no_route(command, case, "GB/s", OURS, told["refusals"])
                continue
            taken: list[float] = []
            limits: list[float] = []

            def once(single: Single, page: int = page, taken: list[float] = taken, limits: list[float] = limits) -> float:
                limits.append(raw.call("copy", kind=limit))
                if within:
                    taken.append(raw.call("take", page_nbytes=page, seed=page, gather=not scattered))
                seconds = single.worker.call("move", turn=len(limits))
                if seconds < 0:
                    raise WrongBytes(f"{command}, pages of {page} bytes: the destination holds wrong bytes")
                return float(nbytes / seconds / _GB)

            samples = alternate(started, settings, f"{command} {case}", once)
            if taken:
                samples["cupy indexing"] = [nbytes / seconds / _GB for seconds in taken[1:]]
            row = _row(command, case, samples, limits[1:], nbytes, limit_name)
            row.ours = Figure(OURS, row.ours.samples, f"{told['route']}: {told['how']}" if told["how"] else told["route"])
            yield row


# Beside compute.


def overlap(settings: Settings) -> Iterator[Row]:
    """80 layers that are sent as a stream of matrix products reaches them: what that costs the products, what is left to wait."""
    for target, layer_mib in (("vram", 32), ("pinned", 8)):
        layer_nbytes = (1 if settings.quick else layer_mib) << 20
        layers = 8 if settings.quick else LAYERS
        nbytes = layers * layer_nbytes
        contender = _ours({"initiator": "vram", "target": target}, module="bench.gpu.overlap")
        with pairs([contender], nbytes, settings) as started:
            pair = started[OURS]
            sizes = {"layers": layers, "layer_nbytes": layer_nbytes, "seed": 7}
            compute = pair.initiator.call("prepare_layers", **sizes)
            pair.target.call("follow", **sizes)
            pair.initiator.call("fill", salt=1)
            yield from _overlapped(pair, settings, target, {"layers": layers, "layer MiB": layer_nbytes >> 20}, compute)


def _overlapped(pair: Pair, settings: Settings, target: str, sizes: dict[str, Any], compute: str) -> Iterator[Row]:
    initiator: Worker = pair.initiator
    alone: list[float] = []
    bare: list[float] = []
    both: list[dict[str, float]] = []
    case = {"to": f"a peer's {'VRAM' if target == 'vram' else 'pinned memory'}", **sizes}

    def once(which: Single | Pair) -> float:
        computed = initiator.call("run", compute=True, transfer=False)["compute"]
        sent = initiator.call("run", compute=False, transfer=True)["transfer"]
        pair.target.call("blank", salt=len(both))
        found = initiator.call("run", compute=True, transfer=True)
        check(pair, pair.target, 1)
        again = initiator.call("run", compute=True, transfer=False)["compute"]
        # Clocks and temperatures drift: what the products take alone is measured before and after.
        alone.append((computed + again) / 2)
        bare.append(sent)
        both.append(found)
        return 0.0

    alternate({OURS: pair}, settings, f"gpu overlap {target}", once)
    alone, bare, both = alone[1:], bare[1:], both[1:]
    note = f"{compute}: {statistics.median(alone) * 1e3:.0f} ms alone, transfers {statistics.median(bare) * 1e3:.1f} ms alone"
    slower = [(one["compute"] / before - 1) * 100 for one, before in zip(both, alone, strict=True)]
    hidden = [(1 - one["exposed"] / before) * 100 for one, before in zip(both, bare, strict=True)]
    row = Row("gpu overlap", case | {"figure": "products slowed by"}, "%", Figure(OURS, tuple(slower), note))
    row.at_most(SLOWER_PERCENT, text=f"<= {SLOWER_PERCENT:g} % slower")
    yield row
    row = Row("gpu overlap", case | {"figure": "transfer hidden"}, "%", Figure(OURS, tuple(hidden)))
    row.at_least_value(HIDDEN_PERCENT, f">= {HIDDEN_PERCENT:g} % hidden")
    yield row
    row = Row(
        "gpu overlap", case | {"figure": "left to wait"}, "ms", Figure(OURS, tuple(one["exposed"] * 1e3 for one in both))
    )
    yield row


def wake(settings: Settings) -> Iterator[Row]:
    """How soon the loop goes on after a stream, and a stream after a transfer."""
    count = 20 if settings.quick else 200
    with singles([Contender(OURS, "bench.gpu.wake")], 1 << 20, settings) as started:
        worker = started[OURS].worker

        def measure(how: str) -> Callable[[], list[float]]:
            return lambda: [one * 1e6 for one in worker.call("after", how=how, count=count)]

        samples: dict[str, list[float]] = {"ours": [], "thread": [], "spin": [], "loop": []}
        for turn in range(3):
            for how, kept in samples.items():
                found = measure(how)()
                kept.extend(found if turn else [])
        case = {"from": "an event is reached", "to": "a 4 KiB transfer after it is awaited"}
        row = Row("gpu wake", case, "us", Figure(OURS, tuple(samples["ours"])))
        row.others.append(Figure("a thread in synchronize()", tuple(samples["thread"])))
        row.others.append(Figure("a future of the loop", tuple(samples["loop"])))
        row.raw = Figure("spinning", tuple(samples["spin"]))
        yield row
        worker.call("wait_on", count=5)
        waits = [one * 1e6 for one in worker.call("wait_on", count=count)]
        case = {"from": "a transfer is awaited", "to": "a stream that waits for it goes on"}
        yield Row("gpu wake", case, "us", Figure(OURS, tuple(waits)))
