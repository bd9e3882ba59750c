"""The backend of examples/custom_backend.py keeps every promise that a backend makes."""

from __future__ import annotations

from nixl_async.testing import BackendTests


class TestProcMem(BackendTests):
    backend = "examples.custom_backend:ProcMem"
    # The kernel knows nothing of what is registered: whoever may trace the process may read and write all of its memory.
    refuses_unregistered = False
    checks_bounds = False
