"""What the loop of a rank tells the engine's thread, and the counters that vLLM logs and exports."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "failed_receives": "requests whose KV cache did not arrive in whole",
    "failed_blocks": "blocks that did not arrive",
    "failed_sends": "sends that failed although the decode side was there",
    "expired": "requests whose blocks were given back before all of them were taken",
    "cancelled": "requests that were aborted while their KV cache was arriving",
}
"""What is counted, and what each is."""
SERIES = {
    "seconds": "seconds for which a request's KV cache was on its way",
    "nbytes": "bytes of a request's KV cache that arrived",
}


@dataclass
class NixlAsyncStats(KVConnectorStats):
    """What happened since the last report: `data` has a list for each of `SERIES` and a number for each of `COUNTERS`."""

    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin at nothing, unless there are values."""
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.data = {**{name: [] for name in SERIES}, **dict.fromkeys(COUNTERS, 0)}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another rank, or a later interval, reports."""
        for name in SERIES:
            self.data[name].extend(other.data[name])
        for name in COUNTERS:
            self.data[name] += other.data[name]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the numbers that vLLM logs for an interval."""
        found: dict[str, int | float] = {"received requests": len(self.data["seconds"])}
        if self.data["seconds"]:
            seconds, nbytes = np.asarray(self.data["seconds"]), np.asarray(self.data["nbytes"])
            found["mean ms"] = round(float(seconds.mean()) * 1e3, 3)
            found["p90 ms"] = round(float(np.percentile(seconds, 90)) * 1e3, 3)
            found["mean MB"] = round(float(nbytes.mean()) / 1e6, 3)
            found["MB/s"] = round(float(nbytes.sum() / max(seconds.sum(), 1e-9)) / 1e6, 3)
        return found | {name.replace("_", " "): self.data[name] for name in COUNTERS if self.data[name]}

    def is_empty(self) -> bool:
        """Tell whether nothing has happened."""
        return not any(self.data.values())


class NixlAsyncPromMetrics(KVConnectorPromMetrics):
    """The same counters for Prometheus: `vllm:nixl_async_<name>`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[type, type],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        buckets = {"seconds": [1e-4 * 4**n for n in range(9)], "nbytes": [2.0 ** (12 + 3 * n) for n in range(9)]}
        made = {
            **{n: self._histogram_cls(f"vllm:nixl_async_{n}", t, labelnames, buckets=buckets[n]) for n, t in SERIES.items()},
            **{n: self._counter_cls(f"vllm:nixl_async_{n}", t, labelnames) for n, t in COUNTERS.items()},
        }
        self._of_engine = {
            engine: {name: metric.labels(*values) for name, metric in made.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record what `NixlAsyncStats.data` of an interval has."""
        metrics = self._of_engine[engine_idx]
        for name in SERIES:
            for value in transfer_stats_data[name]:
                metrics[name].observe(value)
        for name in COUNTERS:
            metrics[name].inc(transfer_stats_data[name])


class Reports:
    """A mailbox from the loop to the engine's thread. Thread-safe; what is taken is taken once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._bad: set[int] = set()
        self._stats = NixlAsyncStats()

    def sent(self, request: str) -> None:
        """Report a request whose blocks nothing reads any more."""
        with self._lock:
            self._sent.add(request)

    def received(self, request: str, seconds: float, nbytes: int) -> None:
        """Report a request whose blocks are all in place."""
        with self._lock:
            self._received.add(request)
            self._stats.data["seconds"].append(seconds)
            self._stats.data["nbytes"].append(nbytes)

    def loaded(self, seconds: float, nbytes: int) -> None:
        """Count a request that the engine's thread has waited for itself."""
        with self._lock:
            self._stats.data["seconds"].append(seconds)
            self._stats.data["nbytes"].append(nbytes)

    def failed(self, request: str, blocks: set[int] | None) -> None:
        """Report a request into whose blocks nothing writes any more: `blocks` are not in place; None: none may be used."""
        with self._lock:
            self._received.add(request)
            self._stats.data["failed_receives"] += 1
            if blocks is None:
                self._failed.add(request)
            else:
                self._bad |= blocks
                self._stats.data["failed_blocks"] += len(blocks)

    def broken(self, blocks: set[int]) -> None:
        """Report blocks that are not in place, of a request that the engine's thread waits for itself."""
        with self._lock:
            self._bad |= blocks
            self._stats.data["failed_receives"] += 1
            self._stats.data["failed_blocks"] += len(blocks)

    def cancelled(self, request: str) -> None:
        """Report a request that was aborted, into whose blocks nothing writes any more."""
        with self._lock:
            self._received.add(request)
            self._stats.data["cancelled"] += 1

    def count(self, name: str) -> None:
        """Count one more of `COUNTERS`."""
        with self._lock:
            self._stats.data[name] += 1

    def take(self) -> tuple[set[str], set[str], set[str]]:
        """Return the requests that are sent, received, and of the received those that failed as a whole."""
        with self._lock:
            taken = self._sent, self._received, self._failed
            self._sent, self._received, self._failed = set(), set(), set()
        return taken

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks that are not in place."""
        with self._lock:
            taken, self._bad = self._bad, set()
        return taken

    def take_stats(self) -> NixlAsyncStats | None:
        """Return what has been counted since the last time."""
        with self._lock:
            if self._stats.is_empty():
                return None
            taken, self._stats = self._stats, NixlAsyncStats()
        return taken
