"""The drop-in for NIXL's Python API, asked by the very calls that NIXL is asked by."""

from __future__ import annotations

import sys

from bench.worker import serve
from bench.workers.nixl import Nixl
from nixl_async.compat import path

if __name__ == "__main__":
    sys.path.insert(0, path())
    serve(Nixl())
