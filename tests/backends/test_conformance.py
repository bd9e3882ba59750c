"""Every backend of ours passes the suite that plugin authors use."""

from __future__ import annotations

from typing import ClassVar

import pytest

from nixl_async.errors import MissingDependency
from nixl_async.testing import BackendTests

try:
    # Loaded here and not by the first test: it takes longer than a test may hold the loop.
    import nixl_async.backends.ucx  # noqa: F401

    HAS_UCX = True
except MissingDependency:
    HAS_UCX = False


class TestMemory(BackendTests):
    backend = "memory"
    directions: ClassVar = ("local", "put", "get")
    # Another process's memory is what the other backends are for; within one process an address is all it takes.
    processes = False
    refuses_unregistered = False
    checks_bounds = False


class TestSameHost(BackendTests):
    backend = "samehost"
    # The kernel asks whether the process may be traced, not what it registered; both sides are the same user.
    refuses_unregistered = False
    checks_bounds = False


class TestSameHostDirect(TestSameHost):
    options: ClassVar = {"way": "direct"}


class TestSameHostPacked(BackendTests):
    backend = "samehost"
    options: ClassVar = {"way": "packed"}


class TestTCP(BackendTests):
    backend = "tcp"


@pytest.mark.skipif(not HAS_UCX, reason="needs ucxx: pip install nixl-async[ucx-cu12]")
class TestUCX(BackendTests):
    backend = "ucx"
    # Keys and bounds are checked by RDMA hardware; over TCP and shared memory UCX emulates one-sided copies and checks neither.
    refuses_unregistered = False
    checks_bounds = False
