"""The samples of agents as `prometheus_client` takes them: `AgentCollector(agent)`, for a registry."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from nixl_async.metrics.families import BUCKETS_US, COMMON, COUNTER, FAMILIES, GAUGE, Family
from nixl_async.metrics.readings import Sample, read
from nixl_async.metrics.timings import Histogram, Timings

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from nixl_async.agent import Agent

_ATTEMPTS = 10
_BOUNDS = [floatToGoString(bound) for bound in (*BUCKETS_US, float("inf"))]  # type: ignore[no-untyped-call]


class AgentCollector(Collector):
    """Collects the metrics of agents, each under its name; from any thread, while the event loop goes on.

    Counters count from when an agent was opened. Histograms are filled from `start` to `stop`, both on the agents' loop; or use it
    as `with AgentCollector(agent) as collector`.
    """

    def __init__(self, *agents: Agent) -> None:
        self._agents = [(agent, Timings.of(agent)) for agent in agents]
        self._host = socket.gethostname()

    def start(self) -> None:
        """Begin to fill the histograms."""
        for _, timings in self._agents:
            timings.start()

    def stop(self) -> None:
        """End it; what was counted stays."""
        for _, timings in self._agents:
            timings.stop()

    def __enter__(self) -> AgentCollector:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def describe(self) -> Iterable[Metric]:
        """Return every metric without samples, so that a registry can tell which names are taken."""
        return [_metric(family) for family in FAMILIES.values()]

    def collect(self) -> Iterable[Metric]:
        """Return every metric with what it is at this moment."""
        metrics = {name: _metric(family) for name, family in FAMILIES.items()}
        for name, labels, value in self.samples():
            _add(metrics[name], labels, value)
        return metrics.values()

    def samples(self) -> Iterable[Sample]:
        """Return every sample, with the values of the labels common to all before those of its own."""
        for agent, timings in self._agents:
            for family, labels, value in _settled(agent, timings):
                yield Sample(family, (self._host, agent.name, *labels), value)


def _settled(agent: Agent, timings: Timings) -> list[Sample]:
    # The loop's thread goes on meanwhile; that something came or went while it was being looked through is rare.
    for _ in range(_ATTEMPTS - 1):
        try:
            return list(read(agent, timings))
        except RuntimeError:
            continue
    return list(read(agent, timings))


def _metric(family: Family) -> Metric:
    labels = (*COMMON, *family.labels)
    if family.kind == COUNTER:
        return CounterMetricFamily(family.name, family.help, labels=labels)
    if family.kind == GAUGE:
        return GaugeMetricFamily(family.name, family.help, labels=labels)
    return HistogramMetricFamily(family.name, family.help, labels=labels)


def _add(metric: Metric, labels: tuple[str, ...], value: float | Histogram) -> None:
    if isinstance(metric, HistogramMetricFamily) and isinstance(value, Histogram):
        metric.add_metric(labels, list(zip(_BOUNDS, accumulate(value.counts), strict=True)), value.total)
    elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily) and not isinstance(value, Histogram):
        metric.add_metric(labels, value)
