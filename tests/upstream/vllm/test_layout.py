"""Which bytes of which rank are whose: no engine, no network."""

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

from nixl_async import ConfigurationError, MemoryKind
from nixl_async.integrations.vllm.layout import consumers, describe, heads_between, shared, sources, table

BLOCKS, TOKENS, DIM = 6, 4, 3


@pytest.mark.parametrize("heads", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("source_tp", [1, 2, 4, 8])
@pytest.mark.parametrize("target_tp", [1, 2, 4, 8])
def test_every_rank_gets_its_heads_once_and_every_rank_is_told(heads, source_tp, target_tp):
    between = heads_between(heads, source_tp, target_tp)
    for target in range(target_tp):
        count = max(1, heads // target_tp)
        first = target * heads // target_tp
        got = sorted(head for (_, one), some in between.items() if one == target for head in some)
        assert got == list(range(first, first + count))
        needed, others = sources(heads, source_tp, target, target_tp)
        assert sorted(origin for origin, one in between if one == target) == sorted(needed)
        assert not set(needed) & set(others)
    for source in range(source_tp):
        said = [t for t in range(target_tp) if any(source in ranks for ranks in sources(heads, source_tp, t, target_tp))]
        assert said == sorted(consumers(heads, source, source_tp, target_tp)) != []


def spec(heads):
    return FullAttentionSpec(block_size=TOKENS, num_kv_heads=heads, head_size=DIM, dtype=torch.float16)


def made(memory, order, heads, *, rank=0, tp=1, ratio=1, total=None):
    """Describe two layers in memory whose axes are in an order such as LBHNC."""
    lengths = {"L": 2, "B": BLOCKS * ratio, "H": heads, "N": TOKENS // ratio, "C": 2 * DIM}
    pool = torch.from_numpy(memory).view(torch.float16).reshape([lengths[axis] for axis in order])
    pool = pool.permute([order.index(axis) for axis in "LBHNC"])
    config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["a.1", "a.0"], spec(heads))])
    caches = {"a.1": pool[1], "a.0": pool[0]}
    layout, regions = describe(caches, config, engine="e", rank=rank, tp=tp, heads=total or heads * tp, facts={})
    return layout, regions, pool


class Region:
    """The bytes of a region, for descriptors to point into."""

    def __init__(self, nbytes):
        from nixl_async import RemoteRegion

        self.region = RemoteRegion("peer", "1", "kv-0", 4096, nbytes, kind=MemoryKind.DRAM)

    def take(self, memory, part, layer, blocks):
        found = part.pages(layer, self.region, np.asarray(blocks))
        flat = memory.view(np.uint8).ravel()
        return np.concatenate([flat[at : at + n] for at, n in zip(found.offsets, found.lengths, strict=True)])


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC", "LBNHC"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_pages_are_where_vllm_has_them(order, ratio):
    memory = np.arange(2 * BLOCKS * 2 * TOKENS * 2 * DIM, dtype=np.int16)
    layout, regions, pool = made(memory, order, 2, ratio=ratio)
    assert [layer.name for layer in layout.layers] == ["a.0", "a.1"]
    assert [one.numel() for one in regions.values()] == [memory.nbytes]
    whole, _ = shared(layout, layout)
    blocks = [4, 1]
    pages = [block * ratio + n for block in blocks for n in range(ratio)]
    for number, layer in enumerate(layout.layers):
        got = Region(memory.nbytes).take(memory, whole, layer, blocks)
        as_stored = (1, 0, 2) if order == "LBNHC" else (0, 1, 2)
        wanted = np.concatenate(
            [pool[number, page].permute(as_stored).contiguous().view(torch.uint8).ravel() for page in pages]
        )
        assert np.array_equal(got, wanted)


def test_ranks_of_unequal_parallelism_share_heads():
    one = np.arange(2 * BLOCKS * 4 * TOKENS * 2 * DIM, dtype=np.int16)
    two = np.arange(2 * BLOCKS * 2 * TOKENS * 2 * DIM, dtype=np.int16)
    whole, _, pool = made(one, "LBHNC", 4)
    half, _, _ = made(two, "LBHNC", 2, rank=1, tp=2)
    whole.check(half)
    mine, theirs = shared(half, whole)
    assert Region(two.nbytes).take(two, mine, half.layers[0], [3]).nbytes == two.nbytes // (2 * BLOCKS)
    got = Region(one.nbytes).take(one, theirs, whole.layers[1], [3])
    assert np.array_equal(got, pool[1, 3, 2:].contiguous().view(torch.uint8).ravel())


def test_what_cannot_be_moved_is_refused():
    memory = np.zeros(2 * BLOCKS * 2 * TOKENS * 2 * DIM, np.int16)
    for order in ("LHBNC", "BHLNC"):
        with pytest.raises(ConfigurationError, match="not contiguous"):
            made(memory, order, 2)
    by_token, _, _ = made(memory, "LBNHC", 2)
    by_head, _, _ = made(memory, "LBHNC", 2)
    other, _, _ = made(np.zeros(memory.size * 2, np.int16), "LBNHC", 4)
    with pytest.raises(ConfigurationError, match="heads outermost"):
        by_token.check(by_head)
    halves, _, _ = made(memory, "LBNHC", 2, tp=2)
    with pytest.raises(ConfigurationError, match="LBHNC on both"):
        other.check(halves)
    with pytest.raises(ConfigurationError, match="KV heads"):
        by_head.check(made(np.zeros(memory.size * 2, np.int16), "LBHNC", 4)[0])
    mamba = MambaSpec(block_size=TOKENS, shapes=((2, 2),), dtypes=(torch.float16,))
    config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["a"], mamba)])
    with pytest.raises(ConfigurationError, match="MambaSpec"):
        describe({"a": torch.zeros(4)}, config, engine="e", rank=0, tp=1, heads=2, facts={})


def test_layouts_travel():
    layout, _, _ = made(np.zeros(2 * BLOCKS * 2 * TOKENS * 2 * DIM, np.int16), "LBHNC", 2)
    assert type(layout).unpack(layout.pack()) == layout
    with pytest.raises(ConfigurationError, match="malformed"):
        type(layout).unpack({"engine": "e"})
    assert table(np.array([3, 1], np.int32).tobytes()).tolist() == [3, 1]
