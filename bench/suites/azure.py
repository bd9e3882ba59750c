"""Blobs of Azurite, the emulator of Azure Storage, got and put."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from bench.process import Contender
from bench.report import Row
from bench.served import AZURITE, BUCKET, Place, serving
from bench.session import Settings
from bench.storage import SDK, Work, field, measure, nixl_label, nixl_objects, ours_azure, raw_http, rows

NBYTES, COUNT = 8 << 20, 16
QUICK_NBYTES, QUICK_COUNT = 256 << 10, 4
THREADS = (None, 4)
FACTOR = {"read": 1.0, "write": 1.1}
CPU_FACTOR = 2.0
SDK_AT_ONCE = 4
PLAYERS = 6
"""Us, NIXL three times, the SDK and plain sockets."""


def blobs(settings: Settings) -> Iterator[Row]:
    """Get and put 16 blobs of 8 MiB each; the server is one Node process and sets the pace."""
    nbytes, count = (QUICK_NBYTES, QUICK_COUNT) if settings.quick else (NBYTES, COUNT)
    for op in ("read", "write"):
        # The emulator keeps what was overwritten for a while: memory for all of it, and a server of its own for writing.
        versions = 2 + (PLAYERS * (settings.rounds + 1) if op == "write" else 0)
        with serving(AZURITE, nbytes * count * versions, settings) as place:
            if place is None:
                return
            contenders = [ours_azure(place, BUCKET), *_nixl(settings, place), *_sdk(place)]
            with field(contenders, raw_http(place), nbytes * count, settings) as players:
                where = place.where([f"{op}/{n:03}" for n in range(count)])
                work = Work(op, nbytes, count, where)
                samples = measure(players, work, f"azure {op}")
        speed, cost = rows("azure", {"server": AZURITE, "op": op, "page": nbytes, "objects": count}, work, samples)
        speed.at_least_best(tuple(map(nixl_label, THREADS)), FACTOR[op], "NIXL's best")
        cost.at_least(SDK, CPU_FACTOR)
        yield speed
        yield cost


def _nixl(settings: Settings, place: Place) -> list[Contender]:
    parameters = {"connection_string": place.server.connection_string, "container_name": BUCKET}
    return nixl_objects(settings, "AZURE_BLOB", parameters, THREADS)


def _sdk(place: Place) -> list[Contender]:
    if find_spec("azure") is None:
        return []
    options = {"connection_string": place.server.connection_string, "container": BUCKET, "at_once": SDK_AT_ONCE}
    return [Contender(SDK, "bench.workers.stock_azure", options=options)]
