"""Head slices against a model that names every byte of both sides."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async.descriptors import Descriptor, MemoryKind, Region, make_plan
from nixl_async.errors import DescriptorError
from nixl_async.geometry import HND, NHD, KVGeometry, Shard, Sharding
from nixl_async.planner import Pair, Slices, plan_pairs

LLAMA = KVGeometry(4, 8, 128)
UNTOUCHED = -1


class Space(Region):
    """A region without memory."""

    kind, device, readonly = MemoryKind.DRAM, 0, False

    def __init__(self, nbytes: int, peer: str | None = None, address: int = 1 << 20) -> None:
        self.name, self.nbytes, self.address, self.peer = "r", nbytes, address, peer

    def check_usable(self) -> None:
        pass


# The model: a pool is an array that has one number for each byte, its regions one after the other; the places of the bytes of
# [layer, kv, block, token, head, byte] come from numpy's own transposition.


def byte_places(shard: Shard, blocks: int) -> np.ndarray[Any, Any]:
    lengths = shard.lengths | {"block": blocks}
    shape = [lengths[axis] for axis in shard.sharding.axes]
    row = shard.geometry.row_nbytes
    flat = np.arange(int(np.prod(shape)) * row).reshape(*shape, row)
    missing = [axis for axis in NHD if axis not in shard.sharding.axes]
    flat = flat.reshape(*flat.shape[:-1], *[1] * len(missing), row)
    order = [*shard.sharding.axes, *missing]
    return flat.transpose(*(order.index(axis) for axis in NHD), flat.ndim - 1)


def request_places(shard: Shard, blocks: int, table: list[int], tokens: range) -> np.ndarray[Any, Any]:
    """Return the places of [layer, kv, token of the request, head, byte]."""
    places = byte_places(shard, blocks)
    size = shard.sharding.page_tokens
    columns = [places[:, :, table[t // size], t % size] for t in tokens]
    return np.stack(columns, axis=2) if columns else np.zeros((*places.shape[:2], 0, *places.shape[4:]), np.int64)


def tags(geometry: KVGeometry, shard: Shard, tokens: range) -> np.ndarray[Any, Any]:
    """Return what the bytes of [layer, kv, token, head, byte] are called in the whole model."""
    shape = (geometry.layers, geometry.kv, tokens.stop, geometry.heads, geometry.row_nbytes)
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    return whole[shard.layers.start : shard.layers.stop, :, tokens.start : tokens.stop, shard.heads.start : shard.heads.stop]


class Memory:
    """A rank's pool; `nregions` cuts it into regions of their own, each `slack` bytes into something larger."""

    def __init__(self, shard: Shard, blocks: int, nregions: int, slack: int, peer: str | None) -> None:
        nbytes = shard.block_nbytes * blocks
        self.bytes = np.full(nbytes, UNTOUCHED)
        self.each = nbytes // nregions
        self.slack = slack
        self.regions = [Space(self.each + 2 * slack, peer) for _ in range(nregions)]
        places: list[Any] = [region[slack : slack + self.each] if slack else region for region in self.regions]
        self.pool = places if nregions > 1 else places[0]

    def positions(self, descriptors: Any) -> np.ndarray[Any, Any]:
        listed = [descriptors] if isinstance(descriptors, Descriptor) else descriptors
        found = [np.zeros(0, np.int64)]
        for one in listed:
            which = next(i for i, region in enumerate(self.regions) if region is one.region)
            for offset, nbytes in zip(one.offsets.tolist(), one.lengths.tolist(), strict=True):
                assert nbytes > 0
                assert self.slack <= offset <= offset + nbytes <= self.slack + self.each
                found.append(np.arange(offset, offset + nbytes) - self.slack + which * self.each)
        return np.concatenate(found)


def copy(slices: Slices, source: Memory, target: Memory) -> np.ndarray[Any, Any]:
    """Copy as told, and return which bytes were written."""
    read, written = source.positions(slices.src), target.positions(slices.dst)
    assert len(read) == len(written)
    assert np.all(target.bytes[written] == UNTOUCHED), "a byte is written twice"
    target.bytes[written] = source.bytes[read]
    return written


@st.composite
def shardings(draw: st.DrawFn, geometry: KVGeometry) -> Sharding:
    tp = draw(st.sampled_from([n for n in range(1, 9) if geometry.heads % n == 0 or n % geometry.heads == 0]))
    cuts = draw(st.sets(st.integers(1, geometry.layers - 1), max_size=2)) if geometry.layers > 1 else set()
    bounds = [0, *sorted(cuts), geometry.layers]
    stages = tuple(b - a for a, b in itertools.pairwise(bounds))
    axes = draw(st.one_of(st.sampled_from([NHD, HND]), st.permutations(NHD).map(tuple)))
    return Sharding(tp, len(stages), draw(st.sampled_from([1, 2, 3, 4, 8])), axes, stages)


def region_counts(shard: Shard) -> list[int]:
    counts = [1]
    for axis in shard.sharding.axes:
        if axis not in ("layer", "kv"):
            break
        counts.append(counts[-1] * shard.lengths[axis])
    return counts


@st.composite
def requests(draw: st.DrawFn) -> tuple[Any, ...]:
    geometry = draw(
        st.builds(
            KVGeometry,
            layers=st.integers(1, 4),
            heads=st.sampled_from([1, 2, 4, 6]),
            head_dim=st.integers(1, 2),
            dtype_nbytes=st.sampled_from([1, 2]),
            kv=st.sampled_from([1, 2]),
        )
    )
    src, dst = draw(shardings(geometry)), draw(shardings(geometry))
    stop = draw(st.integers(0, 20))
    tokens = range(draw(st.integers(0, stop)), stop)
    tables = []
    for side in (src, dst):
        needed = -(-stop // side.page_tokens) + draw(st.integers(0, 1))
        blocks = max(1, needed + draw(st.integers(0, 2)))
        in_order = draw(st.booleans())
        order = list(range(blocks)) if in_order else draw(st.permutations(range(blocks)))
        tables.append((blocks, order[:needed]))
    return geometry, src, dst, tokens, tables, draw(st.booleans()), draw(st.integers(0, 2)), draw(st.sampled_from([0, 7]))


@settings(max_examples=500, deadline=None)
@given(requests())
def test_every_rank_gets_exactly_its_heads_layers_and_tokens(request_: tuple[Any, ...]) -> None:
    geometry, src, dst, tokens, tables, layerwise, nsplit, slack = request_
    (src_blocks, src_table), (dst_blocks, dst_table) = tables
    sources, targets = [], []
    for rank in range(src.ranks):
        shard = src.shard(geometry, rank)
        counts = region_counts(shard)
        sources.append(Memory(shard, src_blocks, counts[min(nsplit, len(counts) - 1)], slack, None))
        sources[-1].bytes[request_places(shard, src_blocks, src_table, tokens)] = tags(geometry, shard, tokens)
    for rank in range(dst.ranks):
        shard = dst.shard(geometry, rank)
        counts = region_counts(shard)
        targets.append(Memory(shard, dst_blocks, counts[-1 - min(nsplit, len(counts) - 1)], 0, "peer"))
    for pair in plan_pairs(geometry, src, dst):
        source, target = sources[pair.src.rank], targets[pair.dst.rank]
        arguments = (source.pool, src_table, target.pool, dst_table, tokens)
        if layerwise:
            steps = pair.by_layer(*arguments)
            assert len(steps) == len(pair.layers)
        else:
            steps = [pair.pages(*arguments)]
        written = 0
        for layer, step in zip(pair.layers, steps, strict=False):
            places = copy(step, source, target)
            written += len(places)
            if layerwise:
                shard = pair.dst
                of_layer = byte_places(shard, dst_blocks)[layer - shard.layers.start]
                assert np.isin(places, of_layer).all()
        assert written == pair.nbytes(len(tokens))
    for rank, target in enumerate(targets):
        shard = dst.shard(geometry, rank)
        expected = np.full_like(target.bytes, UNTOUCHED)
        expected[request_places(shard, dst_blocks, dst_table, tokens)] = tags(geometry, shard, tokens)
        np.testing.assert_array_equal(target.bytes, expected)


# Golden cases: how many ranges, and of what length.


def shape_of(
    src: Sharding, dst: Sharding, tokens: int, geometry: KVGeometry = LLAMA, in_order: bool = False, which: int = 0
) -> tuple[int, set[int]]:
    pair = plan_pairs(geometry, src, dst)[which]
    sides = []
    for shard, peer in ((pair.src, None), (pair.dst, "peer")):
        blocks = -(-tokens // shard.sharding.page_tokens)
        table = np.arange(blocks) if in_order else np.arange(blocks)[::-1]
        # One block more than the request has: layers do not touch.
        sides += [Space(shard.block_nbytes * (blocks + 1), peer), table]
    slices = pair.pages(*sides, tokens)
    assert isinstance(slices.src, Descriptor)
    assert isinstance(slices.dst, Descriptor)
    np.testing.assert_array_equal(slices.src.lengths, slices.dst.lengths)
    plan = make_plan(*slices)
    assert plan.nbytes == pair.nbytes(tokens)
    assert len(plan.lengths) == len(slices.src)
    return len(slices.src), set(slices.src.lengths.tolist())


ROW = 256
CROSS_LAYER = ("block", "layer", "kv", "token", "head")


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        # Heads are split: one slice for each token, or for each page.
        (Sharding(4), Sharding(2), (4 * 2 * 64, {2 * ROW})),
        (Sharding(2), Sharding(4), (4 * 2 * 64, {2 * ROW})),
        (Sharding(4, axes=HND), Sharding(2, axes=HND), (4 * 2 * 4, {2 * 16 * ROW})),
        # Nothing is split: whole pages; whole blocks of all layers.
        (Sharding(4), Sharding(4), (4 * 2 * 4, {2 * 16 * ROW})),
        (Sharding(4, axes=HND), Sharding(4, axes=HND), (4 * 2 * 4, {2 * 16 * ROW})),
        (Sharding(4, axes=CROSS_LAYER), Sharding(4, axes=CROSS_LAYER), (4, {4 * 2 * 2 * 16 * ROW})),
        # Pages of different sizes.
        (Sharding(4, page_tokens=64), Sharding(4, page_tokens=16), (4 * 2 * 4, {2 * 16 * ROW})),
        (Sharding(4, page_tokens=64, axes=HND), Sharding(4, page_tokens=16, axes=HND), (4 * 2 * 2 * 4, {16 * ROW})),
        # The two orders of a page have only single vectors in common.
        (Sharding(4), Sharding(4, axes=HND), (4 * 2 * 2 * 64, {ROW})),
        # Stages.
        (Sharding(4, pp=2), Sharding(4), (2 * 2 * 4, {2 * 16 * ROW})),
    ],
)
def test_ranges_are_as_long_as_both_sides_allow(src: Sharding, dst: Sharding, expected: tuple[int, set[int]]) -> None:
    assert shape_of(src, dst, 64) == expected


def test_neighbouring_blocks_join() -> None:
    assert shape_of(Sharding(4), Sharding(4), 64, in_order=True) == (4 * 2, {64 * 2 * ROW})
    assert shape_of(Sharding(4), Sharding(4), 60, in_order=True) == (4 * 2, {60 * 2 * ROW})
    assert shape_of(Sharding(4, axes=CROSS_LAYER), Sharding(4, axes=CROSS_LAYER), 64, in_order=True)[0] == 1


def test_latent_vectors_are_one_slice_for_each_page() -> None:
    geometry = KVGeometry.mla(4, 512, 64)
    assert shape_of(Sharding(4), Sharding(2), 64, geometry) == (4 * 4, {16 * 1152})
    assert shape_of(Sharding(4), Sharding(2), 60, geometry) == (4 * 4, {16 * 1152, 12 * 1152})


def ranks(pairs: list[Pair]) -> list[tuple[int, int]]:
    return [(pair.src.rank, pair.dst.rank) for pair in pairs]


def test_of_several_that_have_a_head_one_sends_it_and_all_take_turns() -> None:
    latent = KVGeometry.mla(2, 512, 64)
    assert ranks(plan_pairs(latent, Sharding(4), Sharding(4))) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert ranks(plan_pairs(latent, Sharding(4), Sharding(2))) == [(0, 0), (2, 1)]
    assert ranks(plan_pairs(latent, Sharding(2), Sharding(4))) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    two = KVGeometry(2, 2, 128)
    assert ranks(plan_pairs(two, Sharding(4), Sharding(1))) == [(0, 0), (2, 0)]
    assert ranks(plan_pairs(two, Sharding(1), Sharding(4))) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_pairs_say_which_heads_and_layers_they_move() -> None:
    pairs = plan_pairs(LLAMA, Sharding(4, pp=2, stages=(1, 3)), Sharding(2))
    assert ranks(pairs) == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 1), (7, 1)]
    assert [pair.heads for pair in pairs[:4]] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [pair.layers for pair in pairs[::4]] == [range(0, 1), range(1, 4)]


def test_layers_in_regions_of_their_own_share_their_arrays() -> None:
    pair = plan_pairs(LLAMA, Sharding(1, axes=("kv", *(a for a in NHD if a != "kv"))), Sharding(1))[0]
    each = pair.src.block_nbytes // 8 * 2
    src, dst = [Space(each) for _ in range(8)], [Space(2 * each, "peer") for _ in range(4)]
    layers = pair.by_layer(src, [0, 1], dst, [1, 0])
    assert [[d.region for d in layer.src] for layer in layers] == [[src[i], src[4 + i]] for i in range(4)]
    assert [[d.region for d in layer.dst] for layer in layers] == [[dst[i], dst[i]] for i in range(4)]
    assert layers[0].src[0].offsets is layers[3].src[1].offsets


def one_pair(**more: Any) -> tuple[Pair, list[Any]]:
    pair = plan_pairs(LLAMA, Sharding(1, **more), Sharding(1))[0]
    return pair, [Space(pair.src.block_nbytes * 4), [0, 1], Space(pair.dst.block_nbytes * 4, "peer"), [2, 3]]


@pytest.mark.parametrize(
    ("at", "value", "error", "message"),
    [
        (1, [0, 4], DescriptorError, "src_blocks has block 4; the pool of rank 0 has 4 blocks"),
        (3, [-1, 0], DescriptorError, "dst_blocks has block -1"),
        (3, [2, 2], DescriptorError, "dst_blocks has block 2 twice"),
        (1, [0.5, 1], TypeError, "src_blocks must be integers"),
        (1, [0, 1, 2], DescriptorError, "48 tokens of src, 32 of dst; say how many"),
        (4, 33, DescriptorError, "token 32 is to move, but the tables have 32"),
        (4, -1, DescriptorError, "tokens is -1"),
        (4, range(0, 8, 2), DescriptorError, "tokens is range"),
        (4, range(-2, 8), DescriptorError, "tokens is range"),
        (4, 1.5, TypeError, "float"),
        (0, Space(1 << 16), DescriptorError, "no whole number of blocks of 262144 bytes"),
        (0, [Space(1 << 18)] * 3, DescriptorError, "src is 3 regions; .* has one of \\[1, 4, 8\\]"),
        (0, [Space(1 << 18), *[Space(1 << 19)] * 3], DescriptorError, "src regions have \\[4, 8\\] blocks"),
        (0, Space(1 << 20).pages([0, 1], 4096), DescriptorError, "give one range"),
        (0, b"no region", TypeError, "src must be regions"),
    ],
)
def test_bad_input_is_refused(at: int, value: Any, error: type[Exception], message: str) -> None:
    pair, arguments = one_pair()
    arguments = [*arguments, None]
    arguments[at] = value
    for method in (pair.pages, pair.by_layer):
        with pytest.raises(error, match=message):
            method(*arguments)


def test_a_region_without_a_size_is_refused() -> None:
    pair, arguments = one_pair()
    arguments[0].sized = False
    with pytest.raises(DescriptorError, match="has no size"):
        pair.pages(*arguments)


def test_the_same_blocks_may_be_sent_twice() -> None:
    pair, arguments = one_pair()
    arguments[1] = [1, 1]
    assert pair.pages(*arguments).dst.nbytes == pair.nbytes(32)  # type: ignore[union-attr]


def test_no_tokens_are_no_ranges() -> None:
    pair, arguments = one_pair()
    slices = pair.pages(*arguments, 0)
    assert len(slices.src) == 0
    assert make_plan(*slices).nbytes == 0
