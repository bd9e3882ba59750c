"""Objects of an S3 server, got and put: many in one transfer, into and out of one registered buffer."""

from __future__ import annotations

from collections.abc import Iterator

from bench.report import Row
from bench.served import serving
from bench.session import OURS, Settings
from bench.storage import (
    AWSCRT,
    OBSTORE,
    SIGNED,
    Samples,
    Work,
    field,
    measure,
    nixl_label,
    nixl_s3,
    ours_s3,
    raw_http,
    rows,
    stock_s3,
    uvloop_s3,
)

KIB, MIB = 1 << 10, 1 << 20
COUNTS = {64 * KIB: 256, 256 * KIB: 256, MIB: 64, 8 * MIB: 16, 64 * MIB: 4}
QUICK_SIZES, QUICK_COUNT = (64 * KIB, MIB), 4
GET_FACTOR = {64 * KIB: 2.5, 256 * KIB: 1.8, MIB: 1.4, 8 * MIB: 1.2, 64 * MIB: 1.2}
GET_SIZES, PUT_SIZES = tuple(GET_FACTOR), (MIB, 8 * MIB, 64 * MIB)
CPU_FACTOR = 2.0
PUT_FACTOR, PUT_SIGNED_FACTOR = 1.4, 1.05
THREADS = (8, 16)
NIXLS = tuple(map(nixl_label, THREADS))
WHOM = "NIXL's best"


def counted(sizes: tuple[int, ...], settings: Settings) -> dict[int, int]:
    """Return how many objects of each size make a turn."""
    if settings.quick:
        return dict.fromkeys(QUICK_SIZES, QUICK_COUNT)
    return {size: COUNTS.get(size) or max(4, min(256, settings.nbytes // size)) for size in settings.sizes or sizes}


def get(settings: Settings, kind: str) -> Iterator[Row]:
    """Get objects of each size; the raw limit is blocking sockets on two threads."""
    counts = counted(GET_SIZES, settings)
    nbytes = max(size * count for size, count in counts.items())
    with serving(kind, sum(size * count for size, count in counts.items()), settings) as place:
        if place is None:
            return
        contenders = [ours_s3(place), *uvloop_s3(place), *nixl_s3(settings, place, THREADS), *stock_s3(place)]
        with field(contenders, raw_http(place), nbytes, settings) as players:
            for size, count in counts.items():
                work = Work("read", size, count, place.where([f"get-{size}/{n:06}" for n in range(count)]))
                samples = measure(players, work, f"s3-get {kind}, {size} B")
                speed, cost = rows("s3-get", {"server": kind, "page": size, "objects": count}, work, samples)
                speed.at_least_best(NIXLS, GET_FACTOR.get(size, 1.0), WHOM)
                speed.at_least(OBSTORE, 1.0)
                speed.at_least(AWSCRT, 1.0)
                cost.at_least_best(NIXLS, CPU_FACTOR, WHOM)
                yield speed
                yield cost


def put(settings: Settings, kind: str) -> Iterator[Row]:
    """Put objects of each size, the payload hashed into the signature or not; NIXL always hashes it."""
    counts = counted(PUT_SIZES, settings)
    nbytes = max(size * count for size, count in counts.items())
    with serving(kind, 2 * sum(size * count for size, count in counts.items()), settings) as place:
        if place is None:
            return
        mine = [ours_s3(place, payload="unsigned"), ours_s3(place, label=SIGNED, payload="signed")]
        with field([*mine, *nixl_s3(settings, place, THREADS)], raw_http(place), nbytes, settings) as players:
            for size, count in counts.items():
                work = Work("write", size, count, place.where([f"put-{size}/{n:06}" for n in range(count)]))
                samples = measure(players, work, f"s3-put {kind}, {size} B")
                signed = {label: taken for label, taken in samples.items() if label != OURS}
                signed[OURS] = signed.pop(SIGNED)
                del samples[SIGNED]
                yield from _put_rows(work, kind, samples, "unsigned", PUT_FACTOR)
                yield from _put_rows(work, kind, signed, "signed", PUT_SIGNED_FACTOR)


def _put_rows(work: Work, kind: str, samples: Samples, payload: str, factor: float) -> Iterator[Row]:
    case = {"server": kind, "page": work.nbytes, "objects": work.count, "payload": payload}
    speed, cost = rows("s3-put", case, work, samples)
    speed.at_least_best(NIXLS, factor, WHOM)
    yield speed
    yield cost
