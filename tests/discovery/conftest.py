"""Real stores for every test: an etcd, a TCPStore in a process of its own, directories; each test has a namespace of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.etcd_server import INSTALL, EtcdServer, program
from tests.discovery.tcp_server import TCPServer, has_torch

_numbers = itertools.count()


@pytest.fixture(scope="session")
def etcd_or_none(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer | None]:
    if program() is None:
        yield None
        return
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def etcd(etcd_or_none: EtcdServer | None) -> EtcdServer:
    if etcd_or_none is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    return etcd_or_none


@pytest.fixture(scope="session")
def tcp_or_none() -> Iterator[TCPServer | None]:
    if not has_torch():
        yield None
        return
    server = TCPServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def tcp(tcp_or_none: TCPServer | None) -> TCPServer:
    if tcp_or_none is None:
        pytest.skip("torch is not installed")
    return tcp_or_none


@pytest.fixture(params=["memory", "file", "etcd", "tcpstore"])
def url(request: pytest.FixtureRequest, tmp_path: Path, etcd_or_none: EtcdServer | None, tcp_or_none: TCPServer | None) -> str:
    number = next(_numbers)
    match request.param:
        case "memory":
            return f"memory://test-{number}"
        case "file":
            return f"file://{tmp_path}/agents?ttl=2"
        case "etcd":
            if etcd_or_none is None:
                pytest.skip(f"etcd is not installed: {INSTALL}")
            return f"{etcd_url(etcd_or_none)}/test-{number}?ttl=2"
        case _:
            if tcp_or_none is None:
                pytest.skip("torch is not installed")
            return f"tcpstore://127.0.0.1:{tcp_or_none.port}/test-{number}"


def etcd_url(server: EtcdServer) -> str:
    return server.url.replace("http://", "etcd://")
