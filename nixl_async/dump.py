"""What an agent is doing at this moment, as values for JSON: its live transfers with their histories, queues, peers and routes."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from nixl_async.transfer import TrafficClass, TransferRecord

if TYPE_CHECKING:
    from nixl_async.dispatch import Dispatcher
    from nixl_async.membership import Membership

MAX_TRANSFERS = 1000
_CLASSES = tuple(TrafficClass)


def dump(dispatcher: Dispatcher, membership: Membership, limit: int = MAX_TRANSFERS) -> dict[str, Any]:
    """Describe at most `limit` transfers, the oldest, and as many peers; `omitted` says how many of each are left out."""
    now = dispatcher.loop.time()
    records = [transfer._record for transfer in dispatcher.transfers.values()]
    oldest = heapq.nsmallest(limit, records, key=lambda record: record.submitted)
    peers = list(membership.peers.values())
    scheduler = dispatcher._scheduler
    return {
        "transfers": [_transfer(record, now, record.id in scheduler._held) for record in oldest],
        "peers": [
            {
                "name": peer.name,
                "incarnation": peer.incarnation,
                "suspect": peer.suspect,
                "backends": sorted(peer.backends),
                "refusals": peer.refusals,
                "regions": len(peer.regions),
                "down": {backend: outage.reason for backend, outage in scheduler.outages.of(peer.name).items()},
            }
            for peer in peers[:limit]
        ],
        "omitted": {"transfers": len(records) - len(oldest), "peers": max(0, len(peers) - limit)},
        "queues": [
            {
                "backend": queue.name,
                "ops": queue.ops,
                "bytes": queue.nbytes,
                "waiting": {
                    traffic_class.value: sum(account.waiting[at] for account in queue.peers.values())
                    for at, traffic_class in enumerate(_CLASSES)
                },
            }
            for queue in scheduler.queues()
        ],
        "moved": [
            {
                "backend": backend,
                "peer": peer or "",
                "class": traffic_class.value,
                "direction": direction,
                "bytes": moved.nbytes,
                "transfers": moved.transfers,
            }
            for (backend, peer, traffic_class, direction), moved in dispatcher.traffic.by_peer().items()
        ],
        "counts": {**dispatcher.counts, **dispatcher.resent(), "live": len(records), "draining": scheduler.draining},
        "errors": dict(membership.counters.errors),
        "regions": len(membership.regions),
        "unread_notifications": membership.inbox.unread,
        "leases": [repr(lease) for lease in membership.leases.all()[:limit]],
    }


def _transfer(record: TransferRecord, now: float, held: bool) -> dict[str, Any]:
    return {
        "id": record.id,
        "state": record.state.value,
        "waits_for": _waits_for(record, held),
        "peer": record.peer or "",
        "put": record.put,
        "bytes": record.plan.nbytes,
        "bytes_done": record.nbytes_done,
        "segments": len(record.plan.lengths),
        "routes": list(record.routes),
        "tried": list(record.tried),
        "class": record.traffic_class.value,
        "priority": record.priority,
        "deadline_in": None if record.deadline is None else round(record.deadline - now, 6),
        "age": round(now - record.submitted, 6),
        "active_for": None if record.started is None else round(now - record.started, 6),
        "ops": list(record.ops),
        "attempts": record.attempts,
        "resent": record.resent,
        "cancel_requested": record.cancel_requested,
        "error": None if record.error is None else f"{type(record.error).__name__}: {record.error}"[:500],
        "history": [[round(now - at, 6), *names] for at, *names in record.history],
    }


def _waits_for(record: TransferRecord, held: bool) -> str:
    """Return what a transfer waits for: a stream, a route, its ops, its turn, or its notification's."""
    if record.state.final:
        return "notification"
    if held:
        return "stream"
    if record.stranded is not None:
        return "route"
    return "ops" if record.ops else "turn"
