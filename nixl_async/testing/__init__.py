"""For authors of backends and for tests: byte patterns, injected faults, and the conformance suite every backend passes.

A backend's test file is a subclass of `BackendTests` that names the backend; pytest with pytest-asyncio in auto mode runs it.
Imports numpy and the standard library, and pytest with the suite.
"""

from typing import TYPE_CHECKING, Any

from nixl_async.testing.cancelling import cancel_after, cancel_at_await
from nixl_async.testing.faults import FaultyBackend, Gate
from nixl_async.testing.pair import Pair, open_pair
from nixl_async.testing.patterns import Canary, assert_same, pattern
from nixl_async.testing.process import ProcessPeer, process_peer

if TYPE_CHECKING:
    from nixl_async.testing.conformance import BackendTests

__all__ = [
    "BackendTests",
    "Canary",
    "FaultyBackend",
    "Gate",
    "Pair",
    "ProcessPeer",
    "assert_same",
    "cancel_after",
    "cancel_at_await",
    "open_pair",
    "pattern",
    "process_peer",
]


def __getattr__(name: str) -> Any:
    # Peers in processes of their own, servers and faults are of use without pytest, which takes longer than they do.
    if name == "BackendTests":
        from nixl_async.testing.conformance import BackendTests

        return BackendTests
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
