"""A drop-in for NIXL's Python API: programs written against `nixl` run on nixl_async without being changed.

`path()` names a directory with the packages `nixl`, `nixl_cu12` and `nixl_cu13`; put first on PYTHONPATH it takes NIXL's place
for a process and all that it starts. `nixl-async run-as-nixl -- COMMAND` does that. The names and calls are those of NIXL 1.5.
Who wants them installed installs the distribution in `distribution/`, which is called nixl-async-compat.

NIXL's settings hold, from the environment or from its TOML file (`settings`): NIXL_ETCD_ENDPOINTS and NIXL_ETCD_NAMESPACE
(`central_etcd`), NIXL_TCPSTORE_ENDPOINT and its timeouts (`central_tcpstore`), NIXL_TELEMETRY_* (`telemetry`, `prometheus`),
NIXL_LOG_LEVEL (`log`). Ours are NIXL_ASYNC_HOST and NIXL_ASYNC_VRAM_ON_HOST (`lane`), and NIXL_ASYNC_TOKEN, in place of the secret
that is in the metadata else. What tunes NIXL's threads, delays and UCX is taken and ignored.
"""

from __future__ import annotations

from pathlib import Path


def path() -> str:
    """Return the directory whose packages stand for NIXL's, to be put first on PYTHONPATH."""
    return str(Path(__file__).parent / "shim")
