"""What `python -m bench` can measure: the commands, each a table, and the suites that yield its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.report import Row
from bench.served import AZURITE, JUICEFS, NGINX
from bench.session import DEFAULT, SAME_HOST, TCP, UCX_TCP, Path, Settings
from bench.suites import (
    azure,
    busy,
    compat,
    descriptors,
    failover,
    files,
    idle,
    latency,
    layers,
    many,
    membership,
    planner,
    qos,
    s3,
    s3_many,
    scheduler,
    slices,
    stall,
    throughput,
    tiers,
    tracing,
    verify,
)

Suite = Callable[[Settings], Iterator[Row]]


@dataclass(frozen=True)
class Command:
    """A table: its title, and what yields its rows; the suites of a path run only if that path is wanted."""

    title: str
    suites: tuple[tuple[str, Suite], ...]
    mib: int = 256
    """What a sample moves, in MiB, unless it is told otherwise."""


def _servers(suite: Callable[[Settings, str], Iterator[Row]], *kinds: str) -> tuple[tuple[str, Suite], ...]:
    def on(kind: str) -> Suite:
        return lambda settings: suite(settings, kind)

    return tuple((kind, on(kind)) for kind in kinds)


def _paths(suite: Callable[[Settings, Path], Iterator[Row]], *paths: Path) -> tuple[tuple[str, Suite], ...]:
    def along(path: Path) -> Suite:
        return lambda settings: suite(settings, path)

    return tuple((path.name, along(path)) for path in paths)


COMMANDS = {
    "throughput": Command("Many pages in random order", ((SAME_HOST.name, throughput.same_host), (TCP.name, throughput.tcp))),
    "slices": Command("A request's head slices, TP 4 to TP 2", _paths(slices.slices, SAME_HOST, TCP)),
    "layers": Command("A request, layer by layer, while it is computed", _paths(layers.layers, SAME_HOST, TCP)),
    "latency": Command("One small write, call to awaited completion, p50", _paths(latency.page, SAME_HOST, TCP)),
    "notification": Command("Write, notification and answer, p50", _paths(latency.notification, SAME_HOST, TCP)),
    "stall": Command("Event loop while 1 GiB moves, p99.9", _paths(stall.stall, SAME_HOST, TCP)),
    "idle": Command("Nothing moves", ((DEFAULT.name, idle.idle),)),
    "busy-peer": Command("The peer spins in pure Python", _paths(busy.busy_peer, SAME_HOST, TCP, UCX_TCP)),
    "many": Command("Many transfers at once", _paths(many.many, SAME_HOST, TCP)),
    "membership": Command(
        "Finding each other, and telling of regions",
        (*_servers(membership.fleet, *membership.STORES), (membership.REGIONS_PATH, membership.table)),
    ),
    "compat": Command("NIXL's own API: the drop-in beside NIXL", ((DEFAULT.name, compat.compat),)),
    "descriptors": Command("Descriptors", ((DEFAULT.name, descriptors.descriptors),)),
    "planner": Command("Head slices out of block tables", ((DEFAULT.name, planner.planner),)),
    "qos": Command("Traffic classes", _paths(qos.qos, SAME_HOST, TCP)),
    "failover": Command("A route is cut", ((DEFAULT.name, failover.failover),)),
    "verify": Command("What comparing both sides costs", _paths(verify.verify, SAME_HOST, TCP)),
    "tracing": Command("What the spans of transfers cost", _paths(tracing.tracing, SAME_HOST, TCP)),
    "scheduler": Command("What the scheduler costs", ((DEFAULT.name, scheduler.scheduler),)),
    "s3-get": Command("Objects got from an S3 server", _servers(s3.get, NGINX, JUICEFS)),
    "s3-put": Command("Objects put to an S3 server", _servers(s3.put, NGINX, JUICEFS)),
    "s3-many": Command("Very many objects in one transfer", _servers(s3_many.many, NGINX, JUICEFS)),
    "azure": Command("Blobs of Azurite", ((AZURITE, azure.blobs),)),
    "files": Command("Blocks of a file", _servers(files.blocks, files.DIRECT, files.CACHE)),
    # A call of the tiers' is 256 MiB, and several show more than one.
    "tiers": Command("Blocks by their keys", _servers(tiers.blocks, *tiers.KINDS), mib=512),
}
