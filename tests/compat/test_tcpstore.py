"""Agents that find each other through a real TCPStore: the drop-in's, NIXL's own, and one of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compat.test_behaviours import NIXL_PYTHON, dropin, names, needs_nixl, run
from tests.discovery.tcp_server import TCPServer, has_torch

FILE, COMMON = "through_tcpstore.py", "through_store.py"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    if not has_torch():
        pytest.skip("torch is not installed")
    server = TCPServer()
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture(scope="module")
def ours(endpoint: str) -> dict[str, str]:
    return dropin(FILE, NIXL_TCPSTORE_ENDPOINT=endpoint)


@pytest.fixture(scope="module")
def stock(endpoint: str) -> dict[str, str]:
    return run(FILE, python=NIXL_PYTHON, NIXL_PYTHON=NIXL_PYTHON, NIXL_TCPSTORE_ENDPOINT=endpoint)


@pytest.fixture(scope="module")
def mixed(endpoint: str) -> dict[str, str]:
    return dropin(FILE, NIXL_PYTHON=NIXL_PYTHON, NIXL_TCPSTORE_ENDPOINT=endpoint)


@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_drop_in_agents(name: str, ours: dict[str, str]) -> None:
    assert not ours[name], ours[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_nixl_agents(name: str, stock: dict[str, str]) -> None:
    assert not stock[name], stock[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_a_drop_in_agent_and_one_of_nixl(name: str, mixed: dict[str, str]) -> None:
    assert not mixed[name], mixed[name]
