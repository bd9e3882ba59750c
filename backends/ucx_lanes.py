"""By which transports UCX reaches a peer, and what follows for the order of routes. Pure, and without UCX."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Lane: TypeAlias = tuple[str, str]
"""A transport and its device, as UCX names them: ("rc_mlx5", "mlx5_0:1")."""
RDMA_FAMILIES = frozenset({"rc", "dc", "ud", "gga", "srd", "efa"})
"""UCX's transports over InfiniBand, RoCE and EFA cards, by what comes before "_": rc_verbs, rc_mlx5, dc_mlx5, ud_verbs, …"""
RANK, RDMA_RANK = 40, 25
"""After `tcp` (30) and `staging` (38), which are faster than UCX over TCP; before both where a card moves the bytes."""


def is_rdma(transport: str) -> bool:
    """Tell whether a transport goes over an RDMA card."""
    return transport.partition("_")[0] in RDMA_FAMILIES


def rank_of(lanes: Iterable[Lane]) -> int:
    """Return the rank of an endpoint: UCX moves large copies by the fastest of its lanes, which is RDMA where there is any."""
    return RDMA_RANK if any(is_rdma(transport) for transport, _ in lanes) else RANK


def read_lanes(text: str) -> tuple[Lane, ...]:
    """Read lines of a transport and its device; RDMA comes first, and each pair once."""
    pairs = [(transport, device) for transport, _, device in (line.partition(" ") for line in text.splitlines()) if transport]
    return tuple(sorted(dict.fromkeys(pairs), key=lambda pair: not is_rdma(pair[0])))


def describe(lanes: Iterable[Lane]) -> str:
    """Return lanes as people read them: "rc_mlx5 on mlx5_0:1, tcp on eth0"."""
    return ", ".join(f"{transport} on {device}" for transport, device in lanes)
