"""What the tests of HiCacheNixlAsync share: object stores, and backends that SGLang's factory makes and that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pools
import pytest
import torch
from azure.storage.blob import ContainerClient
from sglang.srt.mem_cache.storage import StorageBackendFactory

from nixl_async.testing.servers import Server, azurite, seaweedfs
from tests.stores import running

torch.set_num_threads(1)
CONTAINER = "bench"
DYNAMIC = {
    "backend_name": "nixl_async",
    "module_path": "nixl_async.integrations.sglang_hicache",
    "class_name": "HiCacheNixlAsync",
    "interface_v1": 1,
}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3 server with strict signatures."""
    with running(lambda: seaweedfs(tmp_path_factory.mktemp("seaweedfs"))) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A blob server with the container `CONTAINER`."""
    with running(lambda: azurite(tmp_path_factory.mktemp("azurite"))) as server:
        with ContainerClient.from_connection_string(server.connection_string, CONTAINER) as client:
            client.create_container()
        yield server


@pytest.fixture
def tiers(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], list[dict[str, Any]]]:
    """Return the tiers of a kind such as "dram+files+s3", in places that are this test's alone."""

    def make(kind: str) -> list[dict[str, Any]]:
        made = []
        for name in kind.split("+"):
            if name == "dram":
                made.append({"kind": "dram", "nbytes": "4Mi"})
            elif name in ("files", "direct"):
                path = str(tmp_path / "files")
                made.append(
                    {"kind": "files", "path": path, "nbytes": "64Mi", "segment_nbytes": "16Mi", "direct": name == "direct"}
                )
            elif name == "gds":
                made.append({"kind": "gds", "path": str(tmp_path / "files"), "nbytes": "64Mi", "segment_nbytes": "16Mi"})
            elif name == "directory":
                made.append({"kind": "objects", "url": f"file://{tmp_path}/objects"})
            elif name == "s3":
                server = request.getfixturevalue("s3")
                options = {"endpoint_url": server.endpoint, "access_key": server.key_id, "secret_key": server.secret}
                options |= {"region": server.region, "addressing": "path"}
                made.append({"kind": "objects", "url": f"s3://{server.bucket}/{tmp_path.name}", "options": options})
            else:
                assert name == "az", name
                server = request.getfixturevalue("azure")
                options = {"connection_string": server.connection_string}
                made.append({"kind": "objects", "url": f"az://{CONTAINER}/{tmp_path.name}", "options": options})
        return made

    return make


@pytest.fixture
def attach() -> Iterator[Callable[..., Any]]:
    """Make backends as SGLang's cache controller does: by the factory, then the host pools. They are closed at the end."""
    made: list[Any] = []

    def make(pool: Any, tiers: list[dict[str, Any]], *, hybrid: dict[str, Any] | None = None, **rest: Any) -> Any:
        changes = {name: rest.pop(name) for name in list(rest) if name in CONFIG}
        config = pools.config({**DYNAMIC, "tiers": tiers, **rest}, **changes)
        backend = StorageBackendFactory.create_backend("dynamic", config, pool)
        made.append(backend)
        backend.register_mem_pool_host(pool)
        for name, other in (hybrid or {}).items():
            backend.register_mem_host_pool_v2(other, name)
        backend.on_host_pools_registered()
        return backend

    yield make
    for backend in made:
        backend.close()


CONFIG = {"tp_rank", "tp_size", "pp_rank", "pp_size", "is_mla_model", "model_name", "tp_lcm_size", "should_split_heads"}
