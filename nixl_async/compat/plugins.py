"""NIXL's plugins by name: which memory each takes, its parameters, and which of our backends stand for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nixl_async.backend import Backend, load_backend
from nixl_async.compat.enums import nixl_mem_t
from nixl_async.compat.errors import nixlBackendError, refusal
from nixl_async.compat.log import get_logger
from nixl_async.cuda import device_count
from nixl_async.errors import NixlError

logger = get_logger(__name__)

DRAM, VRAM, FILE, OBJ = nixl_mem_t.DRAM_SEG, nixl_mem_t.VRAM_SEG, nixl_mem_t.FILE_SEG, nixl_mem_t.OBJ_SEG
DEVICE_BACKENDS = frozenset({"cuda", "cuda_ipc"})
"""Ours that are left out where there is no CUDA device."""
_TRUE = frozenset({"1", "true", "yes", "on", "y", "enable"})
_LARGE_OBJECT_NBYTES = 5 << 20


@dataclass(frozen=True, slots=True)
class Plugin:
    """What stands for one of NIXL's plugins. `params` are those it advertises, with their defaults."""

    name: str
    memory: tuple[nixl_mem_t, ...]
    params: Mapping[str, str]
    backends: tuple[str, ...]
    """Ours; those in `optional` may be absent. Which one moves what is decided by their ranks, as for an agent without a list."""
    optional: frozenset[str] = frozenset()
    remote: bool = False
    used: frozenset[str] = frozenset()
    """The parameters that have a counterpart here; the others are taken and change nothing."""
    store: Callable[[Mapping[str, str]], tuple[str, dict[str, Any]]] | None = None
    """The URL of the store that keys are in, and its options."""

    def load(self) -> list[Backend]:
        """Make our backends; what is optional and not here is left out."""
        found = []
        for name in self.backends:
            if name in DEVICE_BACKENDS and not device_count():
                continue
            try:
                found.append(load_backend(name))
            except NixlError as error:
                if name not in self.optional:
                    raise
                logger.debug("plugin %s goes without %s: %s", self.name, name, error)
        return found

    def usable(self) -> bool:
        """Tell whether what it cannot do without is installed."""
        try:
            self.load()
        except NixlError as error:
            logger.debug("plugin %s cannot be used: %s", self.name, error)
            return False
        return True


def _first(params: Mapping[str, str], key: str, *variables: str) -> str | None:
    given = params.get(key)
    return given if given else next((os.environ[name] for name in variables if os.environ.get(name)), None)


def _s3(params: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    bucket = _first(params, "bucket", "AWS_DEFAULT_BUCKET")
    if bucket is None:
        raise refusal(nixlBackendError, "OBJ needs parameter 'bucket', or AWS_DEFAULT_BUCKET in the environment")
    options: dict[str, Any] = {}
    endpoint = _first(params, "endpoint_override", "AWS_ENDPOINT_OVERRIDE")
    if endpoint is not None:
        scheme = params.get("scheme") or "https"
        options["endpoint_url"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    for theirs, ours in (
        ("access_key", "access_key"),
        ("secret_key", "secret_key"),
        ("session_token", "session_token"),
        ("region", "region"),
        ("ca_bundle", "verify"),
    ):
        if params.get(theirs):
            options[ours] = params[theirs]
    if "use_virtual_addressing" in params:
        options["addressing"] = "virtual" if params["use_virtual_addressing"].lower() in _TRUE else "path"
    elif endpoint is not None:
        options["addressing"] = "path"
    threshold = int(params.get("crtMinLimit") or 0)
    if threshold >= _LARGE_OBJECT_NBYTES:
        options["multipart_nbytes"] = options["part_nbytes"] = threshold
    return f"s3://{bucket}/", options


def _azure(params: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    container = _first(params, "container_name", "AZURE_STORAGE_CONTAINER_NAME")
    if container is None:
        raise refusal(
            nixlBackendError, "AZURE_BLOB needs 'container_name', or AZURE_STORAGE_CONTAINER_NAME in the environment"
        )
    options: dict[str, Any] = {}
    text = _first(params, "connection_string", "AZURE_STORAGE_CONNECTION_STRING")
    url = _first(params, "account_url", "AZURE_STORAGE_ACCOUNT_URL")
    if text is not None:
        options["connection_string"] = text
    elif url is not None:
        options["account_url"] = url
        options["credential"] = "default"
    else:
        raise refusal(
            nixlBackendError, "AZURE_BLOB needs 'account_url' or 'connection_string', as parameter or in the environment"
        )
    if bundle := _first(params, "ca_bundle", "AZURE_CA_BUNDLE"):
        options["verify"] = bundle
    return f"az://{container}/", options


_GPU = frozenset({"samehost", "ucx", "cuda", "cuda_ipc"})
PLUGINS = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            "AZURE_BLOB",
            (DRAM, OBJ),
            {"account_url": "", "container_name": "", "connection_string": "", "ca_bundle": ""},
            ("azure",),
            used=frozenset({"account_url", "container_name", "connection_string", "ca_bundle"}),
            store=_azure,
        ),
        Plugin(
            "GDS",
            (DRAM, VRAM, FILE),
            {"batch_pool_size": "16", "batch_limit": "128", "max_request_size": "16777216"},
            ("gds", "posix", "cuda"),
            frozenset({"cuda"}),
        ),
        Plugin(
            "GDS_MT",
            (DRAM, VRAM, FILE),
            {"thread_count": str(max(1, (os.cpu_count() or 2) // 2))},
            ("gds", "posix", "cuda"),
            frozenset({"cuda"}),
        ),
        Plugin(
            "OBJ",
            (DRAM, OBJ),
            {
                "access_key": "",
                "secret_key": "",
                "session_token": "",
                "bucket": "",
                "endpoint_override": "",
                "scheme": "https",
                "region": "",
                "use_virtual_addressing": "false",
                "ca_bundle": "",
                "crtMinLimit": "0",
                "num_threads": "0",
            },
            ("s3",),
            used=frozenset(
                {
                    "access_key",
                    "secret_key",
                    "session_token",
                    "bucket",
                    "endpoint_override",
                    "scheme",
                    "region",
                    "use_virtual_addressing",
                    "ca_bundle",
                    "crtMinLimit",
                }
            ),
            store=_s3,
        ),
        Plugin(
            "POSIX",
            (DRAM, FILE),
            {
                "use_aio": "false",
                "use_uring": "false",
                "use_posix_aio": "false",
                "ios_pool_size": "65536",
                "kernel_queue_size": "256",
            },
            ("posix",),
        ),
        Plugin(
            "UCX",
            (DRAM, VRAM),
            {"ucx_devices": "", "num_workers": "1", "ucx_error_handling_mode": "peer"},
            ("memory", "samehost", "tcp", "ucx", "cuda", "cuda_ipc"),
            _GPU,
            remote=True,
        ),
    )
}
"""In alphabetical order, as NIXL lists them. Parameters without a counterpart here are taken and change nothing, and the log names
them: those that tune UCX (`ucx_devices`, `device_list`, `num_workers`, `num_threads`, `split_batch_size`, `engine_config`), because
ways and threads are this library's to choose; the environment's UCX_* hold for its `ucx` backend."""
EXCLUSIVE = frozenset({"GDS", "GDS_MT"})
"""Plugins of which an agent has one."""
