"""The metrics by name: what each is, what it says, and its labels. Those that NIXL has too are called as NIXL calls them."""

from __future__ import annotations

from typing import NamedTuple

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
COMMON = ("hostname", "agent_name")
"""The labels of every metric."""
BUCKETS_US = (10, 25, 50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 5e6, 1e7)
"""The upper bounds of the histograms, in microseconds: NIXL's own."""


class Family(NamedTuple):
    """One metric; a counter's samples are called `<name>_total`."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


_PEER = ("backend", "peer", "class", "direction")
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # NIXL's.
        Family("agent_tx_bytes", COUNTER, "Bytes that this agent wrote to peers and to storage"),
        Family("agent_rx_bytes", COUNTER, "Bytes that this agent read from peers and from storage"),
        Family("agent_tx_requests_num", COUNTER, "Transfers to peers and to storage that are done"),
        Family("agent_rx_requests_num", COUNTER, "Transfers from peers and from storage that are done"),
        Family("agent_memory_registered", COUNTER, "Bytes registered"),
        Family("agent_memory_registered_last_bytes", GAUGE, "Bytes of the region that was registered last"),
        Family("agent_memory_deregistered", COUNTER, "Bytes deregistered"),
        Family("agent_memory_deregistered_last_bytes", GAUGE, "Bytes of the region that was deregistered last"),
        Family("agent_xfer_time_us", HISTOGRAM, "Microseconds from a transfer's submission to its end", ("backend", "class")),
        Family("agent_xfer_time", COUNTER, "Microseconds of all transfers together, from submission to end"),
        Family(
            "agent_xfer_post_time_us",
            HISTOGRAM,
            "Microseconds from the submission of a transfer that is done to its turn; all of what was copied at once",
            ("backend", "class"),
        ),
        Family("agent_xfer_post_time", COUNTER, "Microseconds of all transfers together, from submission to their turn"),
        Family(
            "agent_errors", COUNTER, "Transfers that failed, by NIXL's status and this library's error", ("status", "error")
        ),
        # What moves.
        Family("agent_moved_bytes", COUNTER, "Bytes moved; peers beyond the bound are called other", _PEER),
        Family("agent_moved_transfers", COUNTER, "Transfers done; peers beyond the bound are called other", _PEER),
        Family(
            "agent_served_bytes", COUNTER, "Bytes of this agent's memory moved at peers' request", ("backend", "direction")
        ),
        Family("agent_transfers", COUNTER, "Transfers that have ended, by how", ("state",)),
        Family("agent_inline_transfers", COUNTER, "Transfers that were copied at once, without waiting for a turn"),
        Family("agent_late_transfers", COUNTER, "Transfers that were done after their deadline", ("class",)),
        Family("agent_live_transfers", GAUGE, "Transfers that have not ended", ("class",)),
        Family("agent_draining_transfers", GAUGE, "Transfers whose outcome is decided and that are not quiet yet"),
        Family(
            "agent_inflight_bytes", GAUGE, "Bytes that a backend has been given and has not moved yet", ("backend", "peer")
        ),
        Family("agent_inflight_ops", GAUGE, "Ops that a backend has been given and has not ended yet", ("backend", "peer")),
        Family("agent_queued_transfers", GAUGE, "Transfers that wait for their turn", ("backend", "peer", "class")),
        Family("agent_queue_time_us", HISTOGRAM, "Microseconds that a transfer waited for its turn", ("backend", "class")),
        # What fails.
        Family("agent_retries", COUNTER, "Pieces sent again by the same backend"),
        Family("agent_failovers", COUNTER, "Transfers that moved to another backend"),
        Family("agent_routes_lost", COUNTER, "How often a backend lost a peer that was there"),
        Family("agent_routes_down", GAUGE, "Peers that a backend has lost and that are there", ("backend",)),
        Family("agent_quarantines", COUNTER, "Transfers that did not become quiet in time"),
        Family("agent_quarantined_regions", GAUGE, "Regions that must not be reused or freed"),
        # Who is there.
        Family("agent_peers", GAUGE, "Connected peers", ("state",)),
        Family("agent_regions", GAUGE, "Registered regions"),
        Family("agent_leases", GAUGE, "Memory lent to peers", ("state",)),
        Family("agent_membership_events", COUNTER, "What happened to peers", ("kind",)),
        Family("agent_notifications_sent", COUNTER, "Notifications sent"),
        Family("agent_notifications_sent_bytes", COUNTER, "Bytes of notifications sent"),
        Family("agent_notifications_received", COUNTER, "Notifications received"),
        Family("agent_notifications_received_bytes", COUNTER, "Bytes of notifications received"),
        Family("agent_notifications_unread", GAUGE, "Notifications that nobody has taken"),
        # The event loop.
        Family(
            "agent_loop_stall_us", HISTOGRAM, "Microseconds by which a timer of the event loop is late, ten times a second"
        ),
    )
}

STATUSES = {
    "PeerLost": "remote_disconnect",
    "NotFoundError": "not_found",
    "IntegrityError": "mismatch",
    "AccessError": "not_allowed",
    "NoRoute": "not_supported",
    "ConfigurationError": "invalid_param",
    "DescriptorError": "invalid_param",
    "Aborted": "canceled",
}
"""NIXL's status for each of this library's errors; for a TransferError that is not here, `backend`; else `unknown`."""
