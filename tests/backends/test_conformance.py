"""Every backend of ours passes the suite that plugin authors use."""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import pytest

from nixl_async.testing import BackendTests


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


class TestTCP(BackendTests):
    backend = "tcp"


@pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="needs ucxx: pip install nixl-async[ucx-cu12]")
class TestUCX(BackendTests):
    backend = "ucx"
