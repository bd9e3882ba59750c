"""Transfers as NVTX ranges, for Nsight Systems: `nvtx_ranges.mark(agent)`; needs NVIDIA's package `nvtx`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nixl_async.descriptors import Plan
from nixl_async.errors import MissingDependency
from nixl_async.transfer import TrafficClass, TransferRecord

if TYPE_CHECKING:
    from nixl_async.agent import Agent


class NVTXRanges:
    """An observer that opens a range for each transfer, in a domain called like its agent; `close` ends it."""

    def __init__(self, agent: Agent, nvtx: Any) -> None:
        self._agent, self._nvtx = agent, nvtx
        self._domain = f"nixl_async {agent.name}"
        self._open: dict[int, Any] = {}

    def close(self) -> None:
        """Open no more ranges; end those that are open. Idempotent."""
        self._agent._observers.remove(self)
        for opened in self._open.values():
            self._nvtx.end_range(opened)
        self._open.clear()

    def __enter__(self) -> NVTXRanges:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submitted(self, record: TransferRecord) -> None:
        """Open a transfer's range."""
        what = f"{'put' if record.put else 'get' if record.peer is not None else 'copy'} {record.peer or ''}".rstrip()
        self._open[record.id] = self._nvtx.start_range(what, domain=self._domain, payload=record.plan.nbytes)

    def finished(self, record: TransferRecord) -> None:
        """End it."""
        if record.id in self._open:
            self._nvtx.end_range(self._open.pop(record.id))

    def copied(self, plan: Plan, peer: str | None, route: str, traffic_class: TrafficClass, seconds: float) -> None:
        """Mark a transfer that was copied at once."""
        self._nvtx.mark(f"copied at once by {route}", domain=self._domain, payload=plan.nbytes)


def mark(agent: Agent) -> NVTXRanges:
    """Open a range for each transfer of an agent from here on.

    Raises:
        MissingDependency: there is no package `nvtx`.
    """
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError as error:
        raise MissingDependency("NVTX ranges need NVIDIA's package: pip install nvtx") from error
    ranges = NVTXRanges(agent, nvtx)
    agent._observers.add(ranges)
    return ranges
