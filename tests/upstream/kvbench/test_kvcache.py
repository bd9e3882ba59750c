"""KVBench's 41 cases (benchmark/kvbench/test/test_kvcache.py of ai-dynamo/nixl): what a token's KV cache takes, and what one
transfer of it does, for its models and its example configurations; and each of them moved through the drop-in, byte for byte.

Its files are in no wheel and no source distribution, so that the sizes are reckoned as `nixl-async bench kv` does if compatible:
by KVBench's rules, which divide MLA's latent vector by TP as well.
"""

import itertools
import os

import numpy as np
import pytest
from nixl._api import nixl_agent, nixl_agent_config
from nixl.logging import get_logger

from nixl_async.benchmarks.kv.kvbench import Figures
from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.models import find_model

logger = get_logger(__name__)
LLAMA_8B, LLAMA_70B, DEEPSEEK_R1 = "llama-3.1-8b", "llama-3.1-70b", "deepseek-r1"
BLOCK, LAYER = "block", "layer"
PAGE_TOKENS = 16

ALL_PIPELINES = [(BLOCK, 1, pp) for pp in (1, 2, 4, 8)] + [(BLOCK, 8, pp) for pp in (2, 4, 8, 16, 32)]
SIZES = [
    *((LLAMA_8B, *layout, 65536) for layout in [*ALL_PIPELINES, *((LAYER, 1, pp) for pp in (1, 2, 4, 8))]),
    *((LLAMA_70B, *layout, 163840) for layout in [*ALL_PIPELINES, *((LAYER, 1, pp) for pp in (1, 2, 4, 8))]),
    *((DEEPSEEK_R1, BLOCK, 8, pp, 35136) for pp in (2, 4, 8, 16, 32)),
]
IO_SIZES = [
    *((BLOCK, pp, nbytes) for pp, nbytes in ((2, 10240), (4, 5120), (8, 2560), (16, 1280), (32, 640))),
    *((LAYER, pp, 256) for pp in (2, 4, 8, 16, 32)),
]
assert len(SIZES) + len(IO_SIZES) == 41


def figures(model: str, access: str, tp: int, pp: int) -> Figures:
    """What KVBench says of one token of a model."""
    return Figures.of(find_model(model), Layout(tp=tp, pp=pp, access=access))


class Sides:
    """Two agents, one of which writes to the other, and numbers for their names."""

    numbers = itertools.count()

    def __init__(self, nbytes: int) -> None:
        names = [f"kvbench-{os.getpid()}-{next(self.numbers)}" for _ in range(2)]
        self.near, self.far = (nixl_agent(name, nixl_agent_config(backends=["UCX"])) for name in names)
        self.source = np.random.default_rng(1).integers(0, 255, nbytes, np.uint8)
        self.target = np.zeros(nbytes, np.uint8)
        for agent, memory in ((self.near, self.source), (self.far, self.target)):
            agent.register_memory([(memory.ctypes.data, nbytes, 0, "kv")], "DRAM")
        self.near.add_remote_agent(self.far.get_agent_metadata())

    def move(self, piece: int) -> None:
        """Write all of the source, in pieces and in an order by chance, and compare the bytes."""
        count = len(self.source) // piece
        runs = [np.array([(memory.ctypes.data, piece, 0, piece, count)], np.uint64) for memory in (self.source, self.target)]
        here, there = self.near.prep_xfer_dlist("", runs[0], "DRAM"), self.near.prep_xfer_dlist(self.far.name, runs[1], "DRAM")
        orders = [np.random.default_rng(seed).permutation(count) for seed in (2, 3)]
        handle = self.near.make_prepped_xfer("WRITE", here, orders[0], there, orders[1], b"kv")
        state = self.near.transfer(handle)
        while state == "PROC":
            state = self.near.check_xfer_state(handle)
        while not self.far.check_remote_xfer_done(self.near.name, b"kv"):
            pass
        sent = self.source[: count * piece].reshape(count, piece)[orders[0]]
        assert (self.target[: count * piece].reshape(count, piece)[orders[1]] == sent).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("model", "access", "tp", "pp", "expected"), SIZES)
def test_kvcache_size(model: str, access: str, tp: int, pp: int, expected: int) -> None:
    found = figures(model, access, tp, pp)
    assert found.token_nbytes == expected
    piece = found.io_size * PAGE_TOKENS
    logger.info("%s: %d bytes a token, in pieces of %d for %d tokens", access, expected, piece, PAGE_TOKENS)
    Sides(-(-expected * PAGE_TOKENS // piece) * piece).move(piece)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("access", "pp", "expected"), IO_SIZES)
def test_io_size(access: str, pp: int, expected: int) -> None:
    nbytes = figures(LLAMA_70B, access, 8, pp).io_size
    assert nbytes == expected
    Sides(nbytes * PAGE_TOKENS * 8).move(nbytes * PAGE_TOKENS)
