"""Bytes per second of many pages in random order, one transfer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.process import Pair, Worker
from bench.report import Figure, Row
from bench.session import (
    MOONCAKE,
    NIXL,
    NIXL_SAME,
    OURS,
    SAME_HOST,
    TCP,
    UCX_TCP,
    Settings,
    alternate,
    mooncake,
    move_checked,
    nixl,
    ours,
    pairs,
    raw,
    start_run,
)

OURS_UCX = "nixl_async ucx"
SAME_HOST_FACTOR = {4096: 4.0, 16384: 3.0, 65536: 2.0, 262144: 1.5, 1 << 20: 1.3}
MEMCPY_SHARE, MEMCPY_SHARE_FROM = 0.8, 65536
TCP_FACTOR, TCP_FACTOR_BIG = 2.0, {"write": 1.4, "read": 2.5}
BIG_PAGE = 1 << 20
MOONCAKE_FACTOR, MOONCAKE_PAGES = 1.2, 8192
_GB = 1e9


def same_host(settings: Settings) -> Iterator[Row]:
    """Two processes of one host, every route allowed to the peer, `samehost` for us; the raw limit is memcpy."""
    contenders = [ours(SAME_HOST), *nixl(settings, SAME_HOST)]
    with pairs(contenders, settings.nbytes, settings) as started, pairs([raw()], settings.nbytes, settings) as limit:
        initiator = limit["raw"].initiator
        for op in ("write", "read"):
            for page in settings.pages:
                samples, memcpy = _measure(started, settings, "same host", op, page, lambda: initiator.call("memcpy"))
                row = _row(samples, {"path": "same host", "op": op, "page": page})
                row.raw = Figure("memcpy", tuple(settings.nbytes / seconds / _GB for seconds in memcpy))
                row.at_least(NIXL, SAME_HOST_FACTOR.get(page, 1.0))
                if page >= MEMCPY_SHARE_FROM:
                    row.share_of_raw(MEMCPY_SHARE)
                yield row


def tcp(settings: Settings) -> Iterator[Row]:
    """Loopback TCP only; the raw limit is one plain connection."""
    contenders = [ours(TCP), ours(UCX_TCP, OURS_UCX), *nixl(settings, TCP), *mooncake(settings)]
    with pairs(contenders, settings.nbytes, settings) as started, pairs([raw()], settings.nbytes, settings) as limit:
        for op in ("write", "read"):
            write = op == "write"

            def stream(write: bool = write, pair: Pair = limit["raw"]) -> float:
                pair.target.call("serve_stream", send=not write)
                seconds: float = pair.initiator.call("stream_once", write=write)
                return seconds

            for page in settings.pages:
                samples, plain = _measure(started, settings, "tcp", op, page, stream)
                row = _row(samples, {"path": "tcp", "op": op, "page": page})
                row.raw = Figure("socket", tuple(settings.nbytes / seconds / _GB for seconds in plain))
                row.at_least(NIXL, TCP_FACTOR_BIG[op] if page >= BIG_PAGE else TCP_FACTOR)
                row.at_least(NIXL_SAME, 1.0)
                row.at_least(MOONCAKE, MOONCAKE_FACTOR)
                yield row


def _measure(
    started: dict[str, Pair], settings: Settings, path: str, op: str, page: int, limit: Callable[[], float]
) -> tuple[dict[str, list[float]], list[float]]:
    seed = page + (op == "write")
    n_pages = {label: _n_pages(label, settings.nbytes, page) for label in started}
    destinations: dict[str, Worker] = {}
    for label, pair in started.items():
        settings.progress(f"{path} {op}: filling {label}")
        _, destinations[label] = start_run(pair, op, page, n_pages[label], seed)
    turn, limits = 0, list[float]()

    def once(pair: Pair) -> float:
        nonlocal turn
        turn += 1
        label = pair.contender.label
        if label == OURS:
            limits.append(limit())
        result = move_checked(pair, destinations[label], seed, turn)
        return float(n_pages[label] * page / result["seconds"] / _GB)

    samples = alternate(started, settings, f"{path} {op}, {page} B pages", once)
    return samples, limits[1:]


def _n_pages(label: str, nbytes: int, page: int) -> int:
    n_pages = nbytes // page
    return min(n_pages, MOONCAKE_PAGES) if label == MOONCAKE else n_pages


def _row(samples: dict[str, list[float]], case: dict[str, object]) -> Row:
    figures = {label: Figure(label, tuple(values)) for label, values in samples.items()}
    mine = figures.pop(OURS)
    return Row("throughput", case, "GB/s", mine, list(figures.values()))
