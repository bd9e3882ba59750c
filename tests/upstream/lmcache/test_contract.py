"""LMCache's own tests of what an L2 adapter must do, run on ours: its classes as they are, with our adapter as their fixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from places import TIERS, URLS
from tests.v1.distributed import test_mock_l2_adapter as contract
from tests.v1.distributed import test_native_connector_l2_adapter as more

from nixl_async.integrations.lmcache import NixlAsyncL2Adapter

Make = Callable[..., NixlAsyncL2Adapter]
Parameters = Callable[[str], dict[str, Any]]


@pytest.fixture
def adapter(place: str, parameters: Parameters, adapters: Make) -> NixlAsyncL2Adapter:
    """Return an adapter on a place."""
    return adapters(parameters(place))


everywhere = pytest.mark.parametrize("place", URLS + TIERS)
at_urls = pytest.mark.parametrize("place", URLS)


@everywhere
class TestEventDescriptors(contract.TestEventFdInterface):
    pass


@everywhere
class TestStore(contract.TestStoreInterface):
    pass


@everywhere
class TestLookup(contract.TestLookupAndLockInterface):
    pass


@everywhere
class TestUnlock(contract.TestUnlockInterface):
    pass


@everywhere
class TestLoad(contract.TestLoadInterface):
    pass


@everywhere
class TestEndToEnd(contract.TestEndToEndWorkflow):
    pass


@everywhere
class TestEndToEndAgain(more.TestEndToEndWorkflow):
    pass


@everywhere
class TestDelete(more.TestDeleteInterface):
    pass


@at_urls
class TestEviction(contract.TestEvictionInterface):
    """Tiers evict by themselves, and count no bytes for each salt."""

    @pytest.fixture
    def adapter(self, place: str, parameters: Parameters, adapters: Make) -> NixlAsyncL2Adapter:
        """Return an adapter that LMCache's eviction keeps within a capacity."""
        return adapters(parameters(place) | {"max_capacity_gb": 0.001})


@at_urls
class TestUsage(more.TestUsageTracking):
    @pytest.fixture
    def adapter_with_capacity(self, place: str, parameters: Parameters, adapters: Make) -> NixlAsyncL2Adapter:
        """Return an adapter of 2000 bytes."""
        return adapters(parameters(place) | {"max_capacity_gb": 2000 / (1 << 30)})
