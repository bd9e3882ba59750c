"""Time what turns two block tables into head slices, without any transport."""

from __future__ import annotations

import time

import numpy as np

from bench.descriptors import Somewhere
from nixl_async.geometry import HND, NHD, KVGeometry, Sharding
from nixl_async.planner import plan_pairs

GEOMETRY = KVGeometry(80, 8, 128)
CASES = {
    "a slice for each token": (Sharding(4, axes=NHD), Sharding(2, axes=NHD)),
    "the same, pages of 64 and 16 tokens": (Sharding(4, page_tokens=64), Sharding(2, page_tokens=16)),
    "a slice for each page": (Sharding(4, axes=HND), Sharding(2, axes=HND)),
    "whole pages": (Sharding(4), Sharding(4)),
}


def measure(case: str, n_slices: int, repeats: int) -> dict[str, list[float]]:
    """Return the nanoseconds for each of about `n_slices` slices: of all layers at once, and layer by layer."""
    src, dst = CASES[case]
    pair = plan_pairs(GEOMETRY, src, dst)[0]
    tokens = n_slices // (GEOMETRY.layers * GEOMETRY.kv)
    if "token" not in case:
        tokens *= src.page_tokens
    places: list[object] = []
    rng = np.random.default_rng(1)
    for shard, peer in ((pair.src, None), (pair.dst, "peer")):
        pages = -(-tokens // shard.sharding.page_tokens)
        table = rng.permutation(pages + pages // 4 + 1)
        places += [Somewhere("kv", 1 << 40, shard.block_nbytes * len(table), peer), table[:pages].astype(np.int32)]
    nanoseconds: dict[str, list[float]] = {"pages": [], "by_layer": []}
    for turn in range(repeats + 1):
        for name, values in nanoseconds.items():
            start = time.perf_counter_ns()
            made = getattr(pair, name)(*places, tokens)
            took = time.perf_counter_ns() - start
            count = sum(len(layer.src) for layer in (made if name == "by_layer" else [made]))
            if turn:
                values.append(took / count)
    return nanoseconds
