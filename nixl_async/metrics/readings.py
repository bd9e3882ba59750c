"""What an agent's counters say at this moment, as samples of the metrics in `families`. Any thread may read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from nixl_async import errors
from nixl_async.counters import OTHER, RX, TX
from nixl_async.metrics.families import STATUSES
from nixl_async.metrics.timings import Histogram, Key, Timings
from nixl_async.transfer import TrafficClass

if TYPE_CHECKING:
    from nixl_async.agent import Agent

_CLASSES = tuple(TrafficClass)


class Sample(NamedTuple):
    """A value of a metric, or a histogram, with the values of its own labels."""

    family: str
    labels: tuple[str, ...]
    value: float | Histogram


def read(agent: Agent, timings: Timings) -> Iterator[Sample]:
    """Yield every sample of an agent; none before it is opened.

    Raises:
        RuntimeError: something came or went meanwhile, on the agent's thread; read again.
    """
    if agent._state not in ("open", "closing", "closed"):
        return
    yield from _moved(agent)
    yield from _ended(agent)
    yield from _waiting(agent)
    yield from _failures(agent)
    yield from _members(agent)
    for backend, (read_nbytes, written_nbytes) in list(timings.served.items()):
        yield Sample("agent_served_bytes", (backend, TX), read_nbytes)
        yield Sample("agent_served_bytes", (backend, RX), written_nbytes)
    for name, found in (("agent_xfer_time", timings.transfers()), ("agent_xfer_post_time", timings.posts())):
        yield from _histograms(f"{name}_us", found)
        yield Sample(name, (), sum(one.total for one in found.values()))
    yield from _histograms("agent_queue_time_us", timings.waits)
    yield Sample("agent_loop_stall_us", (), timings.stalls)


def _histograms(family: str, found: dict[Key, Histogram]) -> Iterator[Sample]:
    for (backend, traffic_class), histogram in list(found.items()):
        yield Sample(family, (backend, traffic_class.value), histogram)


def _moved(agent: Agent) -> Iterator[Sample]:
    traffic = agent._dispatcher.traffic
    totals = traffic.totals()
    for way in (TX, RX):
        mine = [moved for (_, _, direction), moved in totals.items() if direction == way]
        yield Sample(f"agent_{way}_bytes", (), sum(moved.nbytes for moved in mine))
        yield Sample(f"agent_{way}_requests_num", (), sum(moved.transfers for moved in mine))
    for (backend, peer, traffic_class, direction), moved in traffic.by_peer().items():
        labels = backend, peer or "", traffic_class.value, direction
        yield Sample("agent_moved_bytes", labels, moved.nbytes)
        yield Sample("agent_moved_transfers", labels, moved.transfers)


def _ended(agent: Agent) -> Iterator[Sample]:
    dispatcher, scheduler = agent._dispatcher, agent._dispatcher._scheduler
    for state in ("done", "failed", "cancelled"):
        yield Sample("agent_transfers", (state,), dispatcher.counts[state])
    yield Sample("agent_inline_transfers", (), dispatcher.counts["inline"])
    for traffic_class, count in scheduler.counts().items():
        yield Sample("agent_live_transfers", (traffic_class.value,), count.live)
        yield Sample("agent_late_transfers", (traffic_class.value,), count.late)
    yield Sample("agent_draining_transfers", (), scheduler.draining)
    yield Sample("agent_retries", (), scheduler.retries)
    yield Sample("agent_failovers", (), scheduler.failovers)
    yield Sample("agent_routes_lost", (), scheduler.outages.era)


def _waiting(agent: Agent) -> Iterator[Sample]:
    traffic = agent._dispatcher.traffic
    named = traffic.named()
    ops: dict[tuple[str, ...], int] = {}
    nbytes: dict[tuple[str, ...], int] = {}
    queued: dict[tuple[str, ...], int] = {}
    for queue in agent._dispatcher._scheduler.queues():
        for peer, account in list(queue.peers.items()):
            if peer is not None and peer not in named and len(named) < traffic.max_peers:
                named.add(peer)
            labels: tuple[str, ...] = queue.name, "" if peer is None else peer if peer in named else OTHER
            ops[labels] = ops.get(labels, 0) + account.ops
            nbytes[labels] = nbytes.get(labels, 0) + account.nbytes
            for traffic_class, waiting in zip(_CLASSES, account.waiting, strict=True):
                each = (*labels, traffic_class.value)
                queued[each] = queued.get(each, 0) + waiting
    for family, found in (("agent_inflight_ops", ops), ("agent_inflight_bytes", nbytes), ("agent_queued_transfers", queued)):
        for labels, value in found.items():
            yield Sample(family, labels, value)


def _failures(agent: Agent) -> Iterator[Sample]:
    counters = agent._membership.counters
    for name, count in list(counters.errors.items()):
        yield Sample("agent_errors", (_status(name), name), count)
    cancelled = agent._dispatcher.counts["cancelled"]
    if cancelled:
        yield Sample("agent_errors", ("canceled", "CancelledError"), cancelled)
    yield Sample("agent_quarantines", (), counters.quarantines)
    quarantined = 0
    if counters.quarantines or any(not lease.active for lease in agent._membership.leases.all()):
        quarantined = sum(region.quarantined for region in list(agent._membership.regions.values()))
    yield Sample("agent_quarantined_regions", (), quarantined)
    down = dict.fromkeys(agent._backends, 0)
    for outage in agent._dispatcher._scheduler.outages.all():
        down[outage.backend] = down.get(outage.backend, 0) + 1
    for backend, count in down.items():
        yield Sample("agent_routes_down", (backend,), count)


def _status(name: str) -> str:
    if name in STATUSES:
        return STATUSES[name]
    known: Any = getattr(errors, name, None)
    return "backend" if inspect.isclass(known) and issubclass(known, errors.TransferError) else "unknown"


def _members(agent: Agent) -> Iterator[Sample]:
    membership = agent._membership
    counters, inbox = membership.counters, membership.inbox
    peers = list(membership.peers.values())
    suspect = sum(peer.suspect for peer in peers)
    yield Sample("agent_peers", ("connected",), len(peers) - suspect)
    yield Sample("agent_peers", ("suspect",), suspect)
    yield Sample("agent_regions", (), len(membership.regions))
    leases = membership.leases.all()
    active = sum(lease.active for lease in leases)
    yield Sample("agent_leases", ("active",), active)
    yield Sample("agent_leases", ("draining",), len(leases) - active)
    for kind, count in list(counters.events.items()):
        yield Sample("agent_membership_events", (kind,), count)
    yield Sample("agent_memory_registered", (), counters.registered_nbytes)
    yield Sample("agent_memory_registered_last_bytes", (), counters.registered_last_nbytes)
    yield Sample("agent_memory_deregistered", (), counters.deregistered_nbytes)
    yield Sample("agent_memory_deregistered_last_bytes", (), counters.deregistered_last_nbytes)
    yield Sample("agent_notifications_sent", (), counters.notifications_sent)
    yield Sample("agent_notifications_sent_bytes", (), counters.notifications_sent_nbytes)
    yield Sample("agent_notifications_received", (), inbox.received)
    yield Sample("agent_notifications_received_bytes", (), inbox.received_nbytes)
    yield Sample("agent_notifications_unread", (), inbox.unread)
