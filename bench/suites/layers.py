"""A request that moves layer by layer while it is computed: how much of the transfer is left when the compute has ended."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from bench.process import Pair
from bench.report import Check, Figure, Row
from bench.session import OURS, Path, Settings, check, ours, pairs, start_run

WORKER = "bench.workers.layers"
LAYERS = (80, 32)
PAGE = 65536
EXPOSED_LAYERS, HIDDEN = 1.2, 0.95


def layers(settings: Settings, path: Path) -> Iterator[Row]:
    """Push, and pull, with a compute that takes as long as the transfer, and needs no CPU, as a GPU's."""
    contender = replace(ours(path), module=WORKER)
    with pairs([contender], settings.nbytes, settings) as started:
        for n_layers in LAYERS:
            for push in (True, False):
                yield _row(settings, path, started[OURS], n_layers, push)


def _row(settings: Settings, path: Path, pair: Pair, n_layers: int, push: bool) -> Row:
    n_pages = settings.nbytes // PAGE // n_layers * n_layers
    page_nbytes = PAGE
    if not n_pages:
        page_nbytes = 4096
        n_pages = settings.nbytes // page_nbytes // n_layers * n_layers
    mode = "push" if push else "pull"
    whole: list[float] = []
    exposed: list[float] = []
    for turn in range(settings.rounds + 1):
        settings.progress(f"{path.name} {mode}, {n_layers} layers: round {turn} of {settings.rounds}")
        _, destination = start_run(pair, "write", page_nbytes, n_pages, turn + 1)
        seconds = []
        for compute in (False, True):
            destination.call("blank", salt=turn + 1)
            # The compute takes what the transfer alone took a moment ago.
            layer_seconds = seconds[0] / n_layers if compute else 0.0
            request = f"{mode}-{n_layers}-{turn}-{compute}"
            pair.target.send("consume", n_layers=n_layers, request=request, push=push)
            times = pair.initiator.call("produce", n_layers=n_layers, layer_seconds=layer_seconds, request=request, push=push)
            arrived = pair.target.receive()
            seconds.append(arrived - times["computed" if compute else "started"])
            check(pair, destination, turn + 1)
        if turn:
            whole.append(seconds[0])
            exposed.append(seconds[1] / (seconds[0] / n_layers))
    nbytes = n_pages * page_nbytes
    note = f"a layer: {nbytes / n_layers / 2**20:.1f} MiB, {statistics.median(whole) / n_layers * 1e3:.2f} ms"
    case = {"path": path.name, "mode": mode, "layers": n_layers}
    row = Row("layers", case, "layers exposed", Figure(OURS, tuple(exposed), note))
    row.at_most(EXPOSED_LAYERS)
    hidden = 1 - row.ours.median / n_layers
    row.checks.append(Check(f"hidden >= {HIDDEN:.0%}", hidden, hidden >= HIDDEN, "{:.1%}"))
    return row
