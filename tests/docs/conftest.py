"""The servers that pages of the documentation ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.compat.etcd_server import EtcdServer
from tests.docs.pages import SITE, parse
from tests.docs.stand_ins import FIXTURES
from tests.stores import etcd_running


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Run an etcd."""
    with etcd_running(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Start what the pages that are run ask for, before the first of them: a server, or why there is none, by name."""
    asking = [item for item in request.session.items if item.path == request.path and "servers" in item.fixturenames]
    pages = [item.callspec.params["page"] for item in asking]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for page in pages for name in parse((SITE / page).read_text()).servers):
        try:
            found[name] = request.getfixturevalue(FIXTURES[name])
        except pytest.skip.Exception as skipped:
            found[name] = str(skipped)
    return found
