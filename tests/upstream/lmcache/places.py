"""Places to keep chunks in, and adapters on them, for the tests of our plug-ins: a directory, S3, Azure, and tiers of them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.platform import consume_fd

from nixl_async.integrations.lmcache import NixlAsyncL2Adapter, NixlAsyncStorageBackend
from nixl_async.integrations.lmcache.loop import LoopThread
from nixl_async.testing.servers import Server, azurite, seaweedfs

WAIT_SECONDS = 30.0
"""Longer than anything takes: a test that waits as long fails."""
URLS = ["directory", "past the page cache", "s3", "azure"]
TIERS = ["tiers", "tiers, unaligned", "tiers to s3"]


class Derived(NixlAsyncStorageBackend):
    """Lets a configuration have the storage plug-in a second time."""


@contextmanager
def served(making: AbstractAsyncContextManager[Server]) -> Iterator[Server]:
    """Run a server until the block ends."""
    thread = LoopThread("server")
    server = thread.submit(making.__aenter__()).result()
    try:
        yield server
    finally:
        # It keeps nothing, and would wait for connections.
        server.kill()
        thread.submit(making.__aexit__(None, None, None)).result()
        thread.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run SeaweedFS for all tests."""
    with served(seaweedfs(tmp_path_factory.mktemp("s3"))) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run Azurite for all tests, with a container "bench"."""
    from azure.storage.blob import ContainerClient

    with served(azurite(tmp_path_factory.mktemp("azure"))) as server:
        with ContainerClient.from_connection_string(server.connection_string, "bench") as client:
            client.create_container()
        yield server


def s3_options(server: Server) -> dict[str, Any]:
    """Return what an adapter needs to use the server."""
    return {
        "endpoint_url": server.endpoint,
        "access_key": server.key_id,
        "secret_key": server.secret,
        "region": server.region,
        "addressing": "path",
    }


@pytest.fixture
def parameters(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Return what makes the parameters of a place that nobody else uses."""

    def make(place: str) -> dict[str, Any]:
        prefix = tmp_path.name
        files = {"type": "files", "path": str(tmp_path / "tier"), "nbytes": 16 << 20, "segment_nbytes": 4 << 20}
        dram = {"type": "dram", "nbytes": 1 << 20}
        if place == "directory":
            return {"url": f"file://{tmp_path}/kv"}
        if place == "past the page cache":
            return {"url": f"file://{tmp_path}/kv", "options": {"direct": True}}
        if place == "s3":
            return {"url": f"s3://bench/{prefix}/", "options": s3_options(request.getfixturevalue("s3"))}
        if place == "azure":
            connection = request.getfixturevalue("azure").connection_string
            return {"url": f"az://bench/{prefix}/", "options": {"connection_string": connection}}
        if place == "tiers":
            return {"tiers": [dram, files], "block_nbytes": 4096}
        if place == "tiers, unaligned":
            # No chunk is a multiple of it.
            return {"tiers": [files | {"direct": True}], "block_nbytes": 3000}
        if place == "tiers to s3":
            options = s3_options(request.getfixturevalue("s3"))
            return {
                "tiers": [dram, {"type": "objects", "url": f"s3://bench/{prefix}/", "options": options}],
                "block_nbytes": 4096,
            }
        raise AssertionError(place)

    return make


@pytest.fixture
def adapters() -> Iterator[Callable[..., NixlAsyncL2Adapter]]:
    """Return what makes an adapter from parameters; all are closed at the end."""
    made: list[NixlAsyncL2Adapter] = []

    def make(given: dict[str, Any], arena: torch.Tensor | None = None) -> NixlAsyncL2Adapter:
        desc = None if arena is None else L1MemoryDesc(arena.data_ptr(), arena.numel(), 4096)
        made.append(NixlAsyncL2Adapter(given, l1_memory_desc=desc))
        return made[-1]

    yield make
    for adapter in made:
        adapter.close()


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which an adapter's thread or event descriptor lives on."""
    if "s3" in request.fixturenames or "azure" in request.fixturenames:
        for server in {"s3", "azure"} & set(request.fixturenames):
            request.getfixturevalue(server)
    before = _event_descriptors()
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("lmcache-") and thread.is_alive()]
    assert not left, f"threads are left: {left}"
    assert _event_descriptors() <= before


def _event_descriptors() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += "eventfd" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return found


# Keys, objects, and waiting for what an adapter is told to do.


def key_of(number: int, model: str = "org/model", **fields: Any) -> ObjectKey:
    """Return a key."""
    return ObjectKey(chunk_hash=number.to_bytes(8, "big"), model_name=model, kv_rank=0x02010201, **fields)


def object_of(memory: torch.Tensor) -> TensorMemoryObj:
    """Return a memory object of these bytes."""
    assert memory.dtype == torch.uint8
    metadata = MemoryObjMetadata(
        shape=memory.shape,
        dtype=torch.uint8,
        address=memory.data_ptr(),
        phy_size=memory.numel(),
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
    )
    return TensorMemoryObj(memory, metadata, parent_allocator=None)


def random_bytes(n_bytes: int) -> torch.Tensor:
    """Return bytes that no two tests share."""
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)


def layouts(n_bytes: int) -> dict[int, MemoryLayoutDesc]:
    """Return what LMCache says with a lookup about objects of that size."""
    return {0: MemoryLayoutDesc(shapes=[torch.Size([n_bytes])], dtypes=[torch.uint8])}


def wait_for(fd: int) -> None:
    """Wait until a descriptor is signalled, and take the signal."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(WAIT_SECONDS * 1000), "nothing is signalled"
    consume_fd(fd)


def store(adapter: NixlAsyncL2Adapter, keys: list[ObjectKey], objects: list[Any]) -> Any:
    """Store; return the result."""
    task = adapter.submit_store_task(keys, objects)
    wait_for(adapter.get_store_event_fd())
    done = adapter.pop_completed_store_tasks()
    assert list(done) == [task]
    return done[task]


def look_up(adapter: NixlAsyncL2Adapter, keys: list[ObjectKey], n_bytes: int = 0) -> list[bool]:
    """Look up and lock; return each key's bit."""
    task = adapter.submit_lookup_and_lock_task(keys, layouts(n_bytes) if n_bytes else {})
    wait_for(adapter.get_lookup_and_lock_event_fd())
    bitmap = adapter.query_lookup_and_lock_result(task)
    assert bitmap is not None
    assert adapter.query_lookup_and_lock_result(task) is None
    return [bitmap.test(at) for at in range(len(keys))]


def load(adapter: NixlAsyncL2Adapter, keys: list[ObjectKey], objects: list[Any]) -> list[bool]:
    """Load; return each key's bit."""
    task = adapter.submit_load_task(keys, objects)
    wait_for(adapter.get_load_event_fd())
    bitmap = adapter.query_load_result(task)
    assert bitmap is not None
    assert adapter.query_load_result(task) is None
    return [bitmap.test(at) for at in range(len(keys))]
