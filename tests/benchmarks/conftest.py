"""A real etcd for the benchmarks' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compat.etcd_server import EtcdServer
from tests.stores import etcd_running


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Run etcd."""
    with etcd_running(tmp_path_factory.mktemp("etcd")) as server:
        yield server
