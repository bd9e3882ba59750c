"""SGLang's own HiCacheNixl, its code untouched, on this library's drop-in: files, and an S3 server. 1,000 pages, bytes equal.

It is run with the drop-in first on PYTHONPATH; each case writes with one instance and reads with another, into other pages.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pools
import torch

# isort: split
import nixl
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE
from sglang.srt.mem_cache.storage import StorageBackendFactory

from nixl_async.testing.servers import Server, seaweedfs

PAGES = 1000


def _make(plugin: str, layout: str, mla: bool, options: dict[str, Any], pool: Any) -> Any:
    given = {name: value for name, value in options.items() if name != "direct"}
    extra = {"plugin": {plugin.lower(): {"active": True, **given}}, "use_direct_io": options.get("direct", False)}
    config = pools.config(extra, is_mla_model=mla, is_page_first_layout=layout == "page_first")
    backend = StorageBackendFactory.create_backend("nixl", config, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


def _case(plugin: str, layout: str, mla: bool, options: dict[str, Any]) -> str:
    make = pools.mla if mla else pools.mha
    pool, keys, order = make(layout, PAGES), pools.keys(PAGES), np.random.default_rng(7).permutation(PAGES)
    pools.fill(pool, 1)
    backend = _make(plugin, layout, mla, options, pool)
    assert type(backend.agent.agent).__module__.startswith("nixl_async.compat"), type(backend.agent.agent)
    zero_copy = backend.is_zero_copy
    assert backend.batch_exists(keys[:4]) == 0
    began = time.perf_counter()
    for at in range(0, PAGES, STORAGE_BATCH_SIZE):
        some = range(at, min(at + STORAGE_BATCH_SIZE, PAGES))
        assert all(backend.batch_set_v1(keys[at : some.stop], pools.slots(some))), "not stored"
    wrote = time.perf_counter() - began
    backend.close()

    other = make(layout, PAGES)
    pools.wipe(other)
    backend = _make(plugin, layout, mla, options, other)
    for at in range(0, PAGES, STORAGE_BATCH_SIZE):
        some = keys[at : at + STORAGE_BATCH_SIZE]
        assert backend.batch_exists(some) == len(some)
    assert backend.batch_exists([*keys[:5], *pools.keys(3, PAGES), *keys[5:9]]) == 5
    # It tells the log at length what is not there, and is to be believed here.
    logging.disable(logging.ERROR)
    assert not any(backend.batch_get_v1(pools.keys(2, PAGES), pools.slots([0, 1]))), "what was never stored is there"
    logging.disable(logging.NOTSET)
    began = time.perf_counter()
    for at in range(0, PAGES, STORAGE_BATCH_SIZE):
        some = order[at : at + STORAGE_BATCH_SIZE]
        assert all(backend.batch_get_v1(keys[at : at + len(some)], pools.slots(some))), "not read"
    read = time.perf_counter() - began
    wrong = [at for at in range(PAGES) if pools.page(pool, at) != pools.page(other, int(order[at]))]
    assert not wrong, f"{len(wrong)} pages differ, the first: {wrong[0]}"
    backend.clear()
    if plugin == "POSIX":
        assert backend.batch_exists(keys[:4]) == 0
    backend.close()
    way = "zero copy" if zero_copy else "bounce"
    return f"{way}; set {wrote:.2f} s, get {read:.2f} s"


async def _with_server(directory: Path, work: Any) -> None:
    async with seaweedfs(directory) as server:
        await asyncio.to_thread(work, server)


def _s3(server: Server) -> dict[str, Any]:
    return {
        "endpoint_override": server.endpoint,
        "scheme": "http",
        "bucket": server.bucket,
        "access_key": server.key_id,
        "secret_key": server.secret,
        "region": server.region,
    }


def main() -> None:
    """Run the cases of one plugin, or of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugin", choices=("POSIX", "OBJ"), action="append")
    plugins = parser.parse_args().plugin or ["POSIX", "OBJ"]
    assert nixl.__file__ is not None
    assert "compat" in nixl.__file__, f"nixl is {nixl.__file__}, not the drop-in"
    torch.set_num_threads(1)

    def run(plugin: str, options: dict[str, Any]) -> None:
        for mla in (False, True):
            for layout in ("page_first", "layer_first"):
                with tempfile.TemporaryDirectory(dir=os.environ.get("HICACHE_DIRECTORY")) as directory:
                    os.environ["SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR"] = directory
                    # Objects stay where they are: each case has a model of its own.
                    pools.MODEL = f"model-{plugin}-{layout}-{'mla' if mla else 'mha'}-{options.get('direct', False)}"
                    told = _case(plugin, layout, mla, options)
                extent = " O_DIRECT" if options.get("direct") else ""
                print(
                    f"ok HiCacheNixl {plugin}{extent} {layout} {'MLA' if mla else 'K/V'}: {PAGES} pages equal; {told}",
                    flush=True,
                )

    if "POSIX" in plugins:
        run("POSIX", {"direct": False})
        run("POSIX", {"direct": True})
    if "OBJ" in plugins:
        with tempfile.TemporaryDirectory() as directory:
            asyncio.run(_with_server(Path(directory), lambda server: run("OBJ", _s3(server))))


if __name__ == "__main__":
    main()
