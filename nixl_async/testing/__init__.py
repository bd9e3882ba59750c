"""For authors of backends and for tests: byte patterns, injected faults, and the conformance suite every backend passes.

A backend's test file is a subclass of `BackendTests` that names the backend; pytest with pytest-asyncio in auto mode runs it.
Imports numpy, the standard library and pytest.
"""

from nixl_async.testing.cancelling import cancel_after, cancel_at_await
from nixl_async.testing.conformance import BackendTests
from nixl_async.testing.faults import FaultyBackend, Gate
from nixl_async.testing.pair import Pair, open_pair
from nixl_async.testing.patterns import Canary, assert_same, pattern
from nixl_async.testing.process import ProcessPeer, process_peer

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
