"""A real etcd for the benchmarks' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compat.etcd_server import INSTALL, EtcdServer, program


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Run etcd."""
    if program() is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.stop()
