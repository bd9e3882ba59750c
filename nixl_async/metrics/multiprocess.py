"""Metrics of many processes behind one endpoint: each copies its own into `prometheus_client`'s multi-process files.

Such files hold counters, gauges and histograms of `prometheus_client`'s own and nothing that is collected when it is asked for. So
the samples are copied there now and then: a transfer costs no more than it does otherwise.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client import Histogram as PrometheusHistogram

from nixl_async.errors import ConfigurationError
from nixl_async.metrics.collector import AgentCollector
from nixl_async.metrics.families import BUCKETS_US, COMMON, COUNTER, FAMILIES, GAUGE, Family
from nixl_async.metrics.readings import Sample
from nixl_async.metrics.timings import Histogram

if TYPE_CHECKING:
    from nixl_async.agent import Agent

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = 2.0
Kept: TypeAlias = Counter | Gauge | PrometheusHistogram
_kept: dict[str, Kept] = {}
"""By metric, for the whole process: its files must not be opened twice."""
_told: dict[tuple[str, tuple[str, ...]], float] = {}
_counted: dict[tuple[str, tuple[str, ...]], tuple[list[int], float]] = {}
"""By metric and labels, what has been added to the files, whoever did it."""


class Mirror:
    """Copies a collector's samples every `seconds`, from `start` to `stop`, which copies once more."""

    def __init__(self, collector: AgentCollector, seconds: float = SECONDS) -> None:
        self._collector, self._seconds = collector, seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the agents' loop."""
        self._collector.start()
        self._tick()

    def stop(self) -> None:
        """Copy what there is, and end; gauges of this process become 0."""
        self._collector.stop()
        if self._timer is not None:
            self._timer.cancel()
        self.copy()
        for name, kept in _kept.items():
            if isinstance(kept, Gauge):
                for family, labels in [key for key in _told if key[0] == name]:
                    kept.labels(*labels).set(0)
                    del _told[family, labels]

    def copy(self) -> None:
        """Bring the files up to date."""
        seen = set()
        for sample in self._collector.samples():
            seen.add((sample.family, sample.labels))
            self._copy(sample)
        for key in [key for key in _told if key not in seen]:
            # A peer that is gone has nothing in flight.
            kept = _kept[key[0]]
            if isinstance(kept, Gauge):
                kept.labels(*key[1]).set(0)
                del _told[key]

    def _tick(self) -> None:
        self.copy()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._tick)

    def _copy(self, sample: Sample) -> None:
        name, labels, value = sample
        kept = _kept.get(name)
        if kept is None:
            kept = _kept[name] = _make(FAMILIES[name])
        if isinstance(value, Histogram):
            assert isinstance(kept, PrometheusHistogram)
            self._copy_histogram(kept, name, labels, value)
        elif isinstance(kept, Gauge):
            kept.labels(*labels).set(value)
            _told[name, labels] = value
        elif isinstance(kept, Counter):
            # A peer that came back counts from 0.
            before = _told.get((name, labels), 0)
            kept.labels(*labels).inc(value - before if value >= before else value)
            _told[name, labels] = value

    def _copy_histogram(self, kept: PrometheusHistogram, name: str, labels: Sequence[str], value: Histogram) -> None:
        key = name, tuple(labels)
        counts, total = list(value.counts), value.total
        before, before_total = _counted.get(key, ([0] * len(counts), 0.0))
        if sum(counts) < sum(before):
            # Another agent of the same name.
            before, before_total = [0] * len(counts), 0.0
        _counted[key] = counts, total
        child = kept.labels(*labels)
        # Its public method counts one at a time.
        for bucket, old, new in zip(child._buckets, before, counts, strict=True):
            if new > old:
                bucket.inc(new - old)
        if total > before_total:
            child._sum.inc(total - before_total)


def _make(family: Family) -> Kept:
    registry = CollectorRegistry()
    labels = (*COMMON, *family.labels)
    if family.kind == COUNTER:
        return Counter(family.name, family.help, labels, registry=registry)
    if family.kind == GAUGE:
        return Gauge(family.name, family.help, labels, registry=registry, multiprocess_mode="livesum")
    return PrometheusHistogram(family.name, family.help, labels, registry=registry, buckets=BUCKETS_US)


class Publication:
    """`async with publish(agent)`."""

    def __init__(self, agents: tuple[Agent, ...], seconds: float) -> None:
        if not os.environ.get(DIRECTORY_VARIABLE):
            raise ConfigurationError(
                f"{DIRECTORY_VARIABLE} is not set; set it to an empty directory before prometheus_client is imported,"
                " or use `serve` for a process alone"
            )
        self._mirror = Mirror(AgentCollector(*agents), seconds)

    async def __aenter__(self) -> Publication:
        self._mirror.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mirror.stop()


def publish(*agents: Agent, seconds: float = SECONDS) -> Publication:
    """Put the metrics of agents where another process serves them: PROMETHEUS_MULTIPROC_DIR, brought up to date every `seconds`.

    Of the processes that share the directory one serves it, by `serve` or as `prometheus_client` says; each series is the sum over
    processes, so give agents of different processes different names, or sum over `agent_name`.

    Raises:
        ConfigurationError: the variable is not set.
    """
    return Publication(agents, seconds)
