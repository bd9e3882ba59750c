"""A request that moves layer by layer while it is computed: how much of the transfer is left when the compute has ended."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.process import Pair
from bench.report import Check, Figure, Row
from bench.session import OURS, Path, Settings, check, ours, pairs, start_run

WORKER = "bench.workers.layers"
LAYERS = (80, 32)
PAGE, SMALL_PAGE = 65536, 4096
EXPOSED_LAYERS, HIDDEN = 1.2, 0.95


def layers(settings: Settings, path: Path) -> Iterator[Row]:
    """Push, and pull, with a compute that needs no CPU, as a GPU's, and takes as long as the transfer.

    That is, for each layer, as long as its transfer takes alone; and, beside it, a layer's share of the time that all take at once,
    with which whatever delays one layer delays all that follow.
    """
    contender = replace(ours(path), module=WORKER)
    with pairs([contender], settings.nbytes, settings) as started:
        for n_layers in LAYERS:
            for push in (True, False):
                yield _row(settings, path, started[OURS], n_layers, push)


def _row(settings: Settings, path: Path, pair: Pair, n_layers: int, push: bool) -> Row:
    page_nbytes = PAGE if settings.nbytes // PAGE >= n_layers else SMALL_PAGE
    n_pages = settings.nbytes // page_nbytes // n_layers * n_layers
    mode = "push" if push else "pull"
    run = 0

    def moved(salt: int, **how: Any) -> float:
        """Move the request once; return the seconds from the start, or from the end of the compute, to the last arrival."""
        nonlocal run
        run += 1
        common = {"n_layers": n_layers, "request": f"{mode}-{n_layers}-{run}", "push": push}
        pair.target.call("blank", salt=salt)
        pair.target.send("consume", **common, one_by_one=how.get("one_by_one", False))
        times = pair.initiator.call("produce", **common, **how)
        arrived = pair.target.receive()
        check(pair, pair.target, salt)
        return float(arrived - times["computed" if "layer_seconds" in how else "started"])

    alone, exposed, at_once, exposed_at_once = [], [], [], []
    for turn in range(settings.rounds + 1):
        settings.progress(f"{path.name} {mode}, {n_layers} layers: round {turn} of {settings.rounds}")
        start_run(pair, "write", page_nbytes, n_pages, turn + 1)
        # The compute of a layer takes what its transfer took a moment ago.
        alone.append(moved(turn + 1, one_by_one=True) / n_layers)
        exposed.append(moved(turn + 1, layer_seconds=alone[-1]) / alone[-1])
        at_once.append(moved(turn + 1) / n_layers)
        exposed_at_once.append(moved(turn + 1, layer_seconds=at_once[-1]) / at_once[-1])
    share, fast = statistics.median(alone[1:]), statistics.median(at_once[1:])
    note = f"{n_pages * page_nbytes / n_layers / 2**20:.1f} MiB a layer, {share * 1e3:.2f} ms alone"
    note += f"; {fast * 1e3:.2f} ms as one of all at once: then {statistics.median(exposed_at_once[1:]):.1f}"
    case = {"path": path.name, "mode": mode, "layers": n_layers}
    row = Row("layers", case, "layers exposed", Figure(OURS, tuple(exposed[1:]), note))
    row.at_most(EXPOSED_LAYERS)
    hidden = 1 - row.ours.median / n_layers
    row.checks.append(Check(f"hidden >= {HIDDEN:.0%}", hidden, hidden >= HIDDEN, "{:.1%}"))
    return row
