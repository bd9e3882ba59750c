"""How large a drill is, and what is expected of it."""

from __future__ import annotations

from dataclasses import dataclass

INJECTED = ("wrong-byte", "hang", "leak")


@dataclass(frozen=True)
class Options:
    """How large the fleet is, and what is expected of it."""

    seconds: float = 300.0
    prefill: int = 24
    decode: int = 8
    seed: int = 1
    rate: float = 120.0
    """Requests a second of the whole fleet."""
    limit: float = 5.0
    """How long each step of a request may take before it is given up, in seconds."""
    allowance: float = 1.0
    """What the machine may add to what the library promises, in seconds."""
    namespaces: str = "auto"
    only: tuple[str, ...] = ()
    """What is done; empty: everything."""
    inject: tuple[str, ...] = ()
    """What one member does wrong on purpose."""
