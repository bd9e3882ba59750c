"""The head slices of one request between engines of unequal tensor parallelism, beside as many bytes in one piece."""

from __future__ import annotations

from collections.abc import Iterator

from bench.process import Pair
from bench.report import Figure, Row
from bench.session import NIXL, OURS, Path, Settings, WrongBytes, alternate, nixl, ours, pairs
from bench.slices import DST_TP, SRC_TP, Request

SLICES = (1024, 2048, 4096)
LAYERS, TOKENS = 32, 470
WHOLE = "in one piece"
WHOLE_SHARE, NIXL_FACTOR = 1 / 1.5, 5.0
_GB = 1e9


def slices(settings: Settings, path: Path) -> Iterator[Row]:
    """Push from a rank of four to a rank of two, and pull; tokens in pages of 16, blocks in random order."""
    layers = 2 if settings.quick else LAYERS
    largest = Request(layers, TOKENS, max(SLICES))
    with pairs([ours(path), *nixl(settings, path)], largest.pool_nbytes(DST_TP), settings) as started:
        for op in ("write", "read"):
            for nbytes in SLICES:
                yield _row(settings, path, started, op, Request(layers, TOKENS, nbytes))


def _row(settings: Settings, path: Path, started: dict[str, Pair], op: str, request: Request) -> Row:
    moved = request.count * request.slice_nbytes
    arguments = {"op": op, "layers": request.layers, "tokens": request.tokens, "slice_nbytes": request.slice_nbytes}
    for pair in started.values():
        source = pair.initiator if op == "write" else pair.target
        with pair.turn():
            source.call("fill", salt=request.slice_nbytes)
            for side in (pair.initiator, pair.target):
                side.call("ready_slices", **arguments)
    turn, whole = 0, list[float]()

    def once(pair: Pair) -> float:
        nonlocal turn
        turn += 1
        target = pair.target if op == "write" else pair.initiator
        if pair.contender.label == OURS:
            whole.append(moved / pair.initiator.call("move_slices", whole=True)["seconds"] / _GB)
        target.call("blank", salt=turn)
        seconds = pair.initiator.call("move_slices", whole=False)["seconds"]
        if wrong := target.call("check_slices", salt=request.slice_nbytes):
            raise WrongBytes(f"{pair.contender.label}: {wrong} slices hold wrong bytes")
        return float(moved / seconds / _GB)

    samples = alternate(started, settings, f"{path.name} {op}, {request.count} slices of {request.slice_nbytes} B", once)
    figures = {label: Figure(label, tuple(values)) for label, values in samples.items()}
    mine = figures.pop(OURS)
    case = {"path": path.name, "op": op, "tp": f"{SRC_TP} to {DST_TP}", "slice": request.slice_nbytes, "slices": request.count}
    row = Row("slices", case, "GB/s", mine, list(figures.values()), Figure(WHOLE, tuple(whole[1:])))
    row.share_of_raw(WHOLE_SHARE)
    row.at_least(NIXL, NIXL_FACTOR)
    return row
