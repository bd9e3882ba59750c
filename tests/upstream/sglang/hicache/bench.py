"""1,000 pages set and got again: `HiCacheNixlAsync` beside SGLang's HiCacheNixl on stock NIXL, in processes of their own, in turn.

Both get SGLang's batches of 128 pages, and start each round with nothing stored. A ratio above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = {
    "page_first, past the page cache": ("page_first", True),
    "page_first, page cache": ("page_first", False),
    "layer_first, past the page cache": ("layer_first", True),
    "layer_first, page cache": ("layer_first", False),
}
PAGES = 1000
GEOMETRY = {"layers": 32, "heads": 4, "dim": 128, "page_size": 8}
"""K and V of 256 KiB each."""


class Worker:
    """One side's process: it is told a round, and answers with what it took."""

    def __init__(self, side: str, case: str, directory: str, stock: str) -> None:
        layout, direct = CASES[case]
        env = dict(os.environ)
        if side == "theirs":
            env["PYTHONPATH"] = stock + os.pathsep + env["PYTHONPATH"]
        command = [sys.executable, __file__, "--worker", side, "--layout", layout, "--directory", directory]
        command += ["--direct"] if direct else []
        # Stock NIXL says much there that is no failure.
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=env, text=True, **pipes)

    def round(self, number: int) -> dict[str, float]:
        """Have it set and get; return the seconds of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            ended = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"a worker ended with {ended}:\n{self._log.read()[-4000:]}")
        told: dict[str, float] = json.loads(line)
        return told

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def work(side: str, layout: str, directory: str, direct: bool) -> None:
    """Be a worker."""
    import pools
    import torch
    from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    pool = pools.mha(layout, PAGES, **GEOMETRY)
    pools.fill(pool, 1)
    size = GEOMETRY["page_size"]

    def make(place: str) -> Any:
        if side == "ours":
            name, tier = "dynamic", {"kind": "files", "path": place, "nbytes": "2Gi", "direct": direct}
            extra: dict[str, Any] = {
                "backend_name": "nixl_async",
                "module_path": "nixl_async.integrations.sglang_hicache",
                "class_name": "HiCacheNixlAsync",
                "interface_v1": 1,
                "tiers": [tier],
            }
        else:
            os.environ["SGLANG_HICACHE_NIXL_BACKEND_STORAGE_DIR"] = place
            name, extra = "nixl", {"plugin": {"posix": {"active": True}}, "use_direct_io": direct, "l3_cleaner_enabled": False}
        backend = StorageBackendFactory.create_backend(name, pools.config(extra), pool)
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    for line in sys.stdin:
        number = int(line)
        place = os.path.join(directory, f"{side}-{number}")
        backend, keys, times = make(place), pools.keys(PAGES, number * PAGES), {}
        before = [pools.page(pool, at) for at in range(0, PAGES, 97)]
        for name, call in (("set", backend.batch_set_v1), ("get", backend.batch_get_v1)):
            began = time.perf_counter()
            for at in range(0, PAGES, STORAGE_BATCH_SIZE):
                some = range(at, min(at + STORAGE_BATCH_SIZE, PAGES))
                assert all(call(keys[at : some.stop], pools.slots(some, size)))
            times[name] = time.perf_counter() - began
            if name == "set":
                pools.wipe(pool)
        assert [pools.page(pool, at) for at in range(0, PAGES, 97)] == before, "other bytes came back"
        backend.close()
        shutil.rmtree(place)
        answers.write(json.dumps(times) + "\n")
        answers.flush()


def compare(case: str, stock: str, directory: str, rounds: int) -> None:
    """Run one case and print it."""
    page = 4 * GEOMETRY["layers"] * GEOMETRY["heads"] * GEOMETRY["dim"] * GEOMETRY["page_size"]
    nbytes = PAGES * page
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory(dir=directory) as place:
        workers = {side: Worker(side, case, place, stock) for side in found}
        try:
            for worker in workers.values():
                worker.round(0)
            for number in range(1, rounds + 1):
                for side in list(workers) if number % 2 else reversed(workers):
                    found[side].append(workers[side].round(number))
        finally:
            for worker in workers.values():
                worker.close()
    print(f"{case}: {PAGES} pages of {page >> 10} KiB, {rounds} rounds")
    for name in ("set", "get", "both"):
        seconds = {side: [sum(one.values()) if name == "both" else one[name] for one in told] for side, told in found.items()}
        moved = nbytes * (2 if name == "both" else 1)
        speeds = {side: statistics.median(moved / one / 1e9 for one in times) for side, times in seconds.items()}
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True))
        print(
            f"  {name:4}  ours {speeds['ours']:6.2f} GB/s   HiCacheNixl {speeds['theirs']:6.2f} GB/s   ratio {ratio:.2f}",
            flush=True,
        )


def main() -> None:
    """Be the driver, or a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", help="where pip put stock NIXL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--directory", default=str(Path(__file__).parents[4] / ".upstream"), help="where the files go")
    parser.add_argument("--worker", choices=("ours", "theirs"))
    parser.add_argument("--layout")
    parser.add_argument("--direct", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.layout, given.directory, given.direct)
        return
    for case in given.case or CASES:
        compare(case, given.stock, given.directory, given.rounds)


if __name__ == "__main__":
    main()
