"""Planning against a naive model that looks at each byte by itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.descriptors import AXES, BlockLayout, Descriptor, MemoryKind, Plan, Region, Side, concatenate, make_plan
from nixl_async.errors import ClosedError, DescriptorError


class Space(Region):
    """A region without memory."""

    def __init__(self, name: str = "r", nbytes: int = 4096, address: int = 1 << 20, **more: Any) -> None:
        self.name, self.nbytes, self.address = name, nbytes, address
        self.kind: MemoryKind = more.get("kind", MemoryKind.DRAM)
        self.device: int = more.get("device", 0)
        self.peer: str | None = more.get("peer")
        self.readonly: bool = more.get("readonly", False)
        self.problem: Exception | None = more.get("problem")

    def check_usable(self) -> None:
        if self.problem is not None:
            raise self.problem


# The model: a place is the list of the bytes it names, as (region, address).


def places(descriptors: list[Descriptor]) -> list[tuple[Region, int]]:
    return [
        (d.region, d.region.address + int(offset) + i)
        for d in descriptors
        for offset, nbytes in zip(d.offsets, d.lengths, strict=True)
        for i in range(int(nbytes))
    ]


def side_places(side: Side, lengths: Any) -> list[tuple[Region, int]]:
    index = np.zeros(len(lengths), np.int64) if side.index is None else side.index
    return [
        (side.regions[int(which)], int(address) + i)
        for which, address, nbytes in zip(index, side.addresses, lengths, strict=True)
        for i in range(int(nbytes))
    ]


def moves(plan: Plan) -> list[tuple[tuple[Region, int], tuple[Region, int]]]:
    return list(zip(side_places(plan.src, plan.lengths), side_places(plan.dst, plan.lengths), strict=True))


# Two regions of a side lie back to back, so that runs that touch across regions occur.
def make_side(peer: str | None) -> list[Space]:
    return [Space("one", 64, 1 << 20, peer=peer), Space("two", 64, (1 << 20) + 64, peer=peer)]


def cut(total: int, cuts: list[int]) -> list[int]:
    points = sorted({0, total, *(c % (total + 1) for c in cuts)})
    return [b - a for a, b in itertools.pairwise(points)]


@st.composite
def descriptor_lists(draw: st.DrawFn, peer: str | None, total: int) -> list[Descriptor]:
    """Draw descriptors of `total` bytes in all; ranges often continue where the one before ended."""
    regions = make_side(peer)
    found = []
    for nbytes in cut(total, draw(st.lists(st.integers(0, 1000), max_size=4))):
        region = draw(st.sampled_from(regions))
        offsets, lengths = [], []
        for length in cut(nbytes, draw(st.lists(st.integers(0, 1000), max_size=5))):
            follow = draw(st.booleans()) and offsets and offsets[-1] + lengths[-1] + length <= region.nbytes
            offsets.append(offsets[-1] + lengths[-1] if follow else draw(st.integers(0, region.nbytes - length)))
            lengths.append(length)
            if draw(st.integers(0, 9)) == 0:
                offsets.append(draw(st.integers(0, region.nbytes)))
                lengths.append(0)
        found.append(region.ranges(offsets, lengths))
    return found


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[Descriptor], list[Descriptor]]:
    total = draw(st.integers(1, 60))
    return draw(descriptor_lists(None, total)), draw(descriptor_lists("peer", total))


@given(transfers())
def test_a_plan_moves_the_same_bytes_as_the_model(sides: tuple[list[Descriptor], list[Descriptor]]) -> None:
    src, dst = sides
    plan = make_plan(src, dst)
    assert moves(plan) == list(zip(places(src), places(dst), strict=True))
    assert plan.nbytes == sum(d.nbytes for d in src) == int(plan.lengths.sum())
    assert plan.lengths.min() > 0
    assert plan.part_ends == tuple(itertools.accumulate(d.nbytes for d in src))


@given(transfers())
def test_a_plan_is_as_short_as_can_be_and_keeps_parts_apart(sides: tuple[list[Descriptor], list[Descriptor]]) -> None:
    plan = make_plan(*sides)
    ends = np.cumsum(plan.lengths)
    assert set(plan.part_ends) - {0} <= set(ends.tolist())
    indices = [np.zeros(len(ends)) if s.index is None else s.index for s in (plan.src, plan.dst)]
    for i in range(1, len(plan.lengths)):
        continues = [
            side.addresses[i - 1] + plan.lengths[i - 1] == side.addresses[i] and index[i - 1] == index[i]
            for side, index in zip((plan.src, plan.dst), indices, strict=True)
        ]
        # A cut at equal lengths of both sides inside a part is not needed.
        if all(continues):
            assert int(ends[i - 1]) in plan.part_ends


@given(transfers(), st.integers(1, 70), st.integers(1, 6))
def test_split_keeps_order_bytes_and_limits(
    sides: tuple[list[Descriptor], list[Descriptor]], max_nbytes: int, max_segments: int
) -> None:
    plan = make_plan(*sides)
    pieces = list(plan.split(max_nbytes, max_segments))
    assert [move for piece in pieces for move in moves(piece)] == moves(plan)
    for piece in pieces:
        assert 0 < piece.nbytes <= max_nbytes
        assert 0 < len(piece.lengths) <= max_segments
        assert piece.nbytes == int(piece.lengths.sum())
    # Not more pieces than needed: two neighbours never fit into one.
    for a, b in itertools.pairwise(pieces):
        assert a.nbytes + int(b.lengths[0]) > max_nbytes or len(a.lengths) + 1 > max_segments


@st.composite
def alike_transfers(draw: st.DrawFn) -> list[tuple[list[Descriptor], list[Descriptor]]]:
    return [draw(transfers()) for _ in range(draw(st.integers(1, 4)))]


@given(alike_transfers())
def test_concatenate_is_one_after_the_other(many: list[tuple[list[Descriptor], list[Descriptor]]]) -> None:
    plans = [make_plan(*sides) for sides in many]
    joined = concatenate(plans)
    assert moves(joined) == [move for plan in plans for move in moves(plan)]
    assert joined.nbytes == sum(plan.nbytes for plan in plans)
    for side in (joined.src, joined.dst):
        assert len(set(map(id, side.regions))) == len(side.regions)


@given(st.lists(st.integers(0, 15), max_size=40), st.sampled_from([1, 7, 64, 256]), st.integers(0, 16), st.integers(0, 9))
def test_pages_are_where_arithmetic_says(indices: list[int], page_nbytes: int, offset: int, gap: int) -> None:
    region = Space(nbytes=16 * (256 + 9) + 16)
    stride = page_nbytes + gap
    pages = region.pages(indices, page_nbytes, offset=offset, stride_nbytes=stride)
    assert pages.offsets.tolist() == [offset + i * stride for i in indices]
    assert pages.lengths.tolist() == [page_nbytes] * len(indices)
    assert pages.nbytes == len(indices) * page_nbytes
    assert len(pages) == len(indices)


@given(st.integers(-5, 40), st.integers(1, 50), st.integers(0, 120), st.integers(1, 60))
def test_a_page_is_accepted_exactly_when_it_fits(index: int, page_nbytes: int, offset: int, stride: int) -> None:
    region = Space(nbytes=100)
    fits = index >= 0 and offset + index * stride + page_nbytes <= 100
    if fits:
        assert region.pages([index], page_nbytes, offset=offset, stride_nbytes=stride).offsets.tolist() == [
            offset + index * stride
        ]
    else:
        with pytest.raises(DescriptorError):
            region.pages([index], page_nbytes, offset=offset, stride_nbytes=stride)


huge = st.one_of(st.integers(-10, 120), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, -(2**63), -1]))


@given(st.lists(st.tuples(huge, huge), min_size=1, max_size=4))
def test_ranges_are_accepted_exactly_when_they_fit(given_ranges: list[tuple[int, int]]) -> None:
    region = Space(nbytes=100)
    offsets, lengths = [r[0] for r in given_ranges], [r[1] for r in given_ranges]
    if all(0 <= o <= 100 and n >= 0 and o + n <= 100 for o, n in given_ranges):
        described = region.ranges(offsets, lengths)
        assert (described.offsets.tolist(), described.lengths.tolist()) == (offsets, lengths)
    else:
        with pytest.raises(DescriptorError):
            region.ranges(offsets, lengths)


@given(st.one_of(st.none(), huge), st.one_of(st.none(), huge))
def test_slices_are_accepted_exactly_when_they_fit(start: int | None, stop: int | None) -> None:
    region = Space(nbytes=100)
    first, last = 0 if start is None else start, 100 if stop is None else stop
    if 0 <= first <= last <= 100:
        described = region[start:stop]
        assert (described.offsets.tolist(), described.lengths.tolist()) == ([first], [last - first])
    else:
        with pytest.raises(DescriptorError):
            region[start:stop]


# Block layouts against numpy's own strides.


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    axes = draw(st.permutations(AXES).flatmap(lambda p: st.integers(1, 4).map(lambda n: tuple(p[:n]))))
    return BlockLayout(axes, tuple(draw(st.integers(1, 4)) for _ in axes), draw(st.integers(1, 8)))


def selections(length: int) -> st.SearchStrategy[Any]:
    whole = st.integers(0, length - 1)
    return st.one_of(
        st.none(), whole, st.lists(whole, max_size=4), st.slices(length), st.lists(whole, max_size=4).map(np.array)
    )


def pick(length: int, selection: Any) -> Any:
    if selection is None:
        return np.arange(length)
    if isinstance(selection, slice):
        return np.arange(length)[selection]
    return np.atleast_1d(np.asarray(selection, int))


@given(st.data(), layouts(), st.integers(0, 5))
def test_a_layout_agrees_with_numpy(data: st.DataObject, layout: BlockLayout, offset: int) -> None:
    region = Space(nbytes=offset + layout.nbytes + 3)
    pool = np.arange(layout.nbytes).reshape(*layout.shape, layout.page_nbytes)[..., 0] + offset
    chosen = {axis: data.draw(selections(n)) for axis, n in zip(layout.axes, layout.shape, strict=True)}
    picked = {axis: pick(n, chosen[axis]) for axis, n in zip(layout.axes, layout.shape, strict=True)}
    pool = pool.transpose([layout.axes.index(axis) for axis in AXES if axis in layout.axes])
    expected = pool[np.ix_(*(picked[axis] for axis in AXES if axis in layout.axes))].ravel()
    found = layout.pages(region, offset=offset, **chosen)
    assert found.offsets.tolist() == expected.tolist()
    assert set(found.lengths.tolist()) <= {layout.page_nbytes}


def test_two_layouts_of_one_pool_pair_up() -> None:
    outer = BlockLayout(("layer", "kv", "block"), (3, 2, 5), 4)
    inner = BlockLayout(("block", "layer", "kv"), (5, 3, 2), 4)
    memory = np.arange(120, dtype=np.uint8)
    by_outer = memory[outer.pages(Space(nbytes=120), layer=1, block=[4, 0]).offsets]
    assert by_outer.tolist() == [memory.reshape(3, 2, 5, 4)[1, kv, b, 0] for kv in (0, 1) for b in (4, 0)]
    by_inner = memory[inner.pages(Space(nbytes=120), layer=1, block=[4, 0]).offsets]
    assert by_inner.tolist() == [memory.reshape(5, 3, 2, 4)[b, 1, kv, 0] for kv in (0, 1) for b in (4, 0)]


@pytest.mark.parametrize(
    ("axes", "shape", "page_nbytes", "match"),
    [
        ((), (), 1, "axes"),
        (("layer", "layer"), (1, 1), 1, "once"),
        (("row",), (1,), 1, "row"),
        (("layer",), (1, 2), 1, "1 axes but 2"),
        (("layer",), (0,), 1, "layer.*0"),
        (("layer",), (-1,), 1, "-1"),
        (("layer",), (3,), 0, "page_nbytes is 0"),
    ],
)
def test_bad_layouts_are_refused(axes: Any, shape: Any, page_nbytes: int, match: str) -> None:
    with pytest.raises(DescriptorError, match=match):
        BlockLayout(axes, shape, page_nbytes)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layer": 3}, "layer index 3.*has 3"),
        ({"block": [0, -1]}, "block index -1"),
        ({"head": 0}, "head.*has"),
        ({"offset": 1}, "at offset 1 does not fit"),
        ({"offset": -1}, "offset -1"),
    ],
)
def test_bad_selections_are_refused(arguments: Any, match: str) -> None:
    layout = BlockLayout(("layer", "block"), (3, 5), 4)
    with pytest.raises(DescriptorError, match=match):
        layout.pages(Space(nbytes=60), **arguments)


# What make_plan refuses.


def test_sides_of_unequal_size_are_refused() -> None:
    with pytest.raises(DescriptorError, match="src has 10 bytes but dst has 11"):
        make_plan(Space()[0:10], Space()[0:11])
    with pytest.raises(DescriptorError, match="src has 10 bytes but dst has 11"):
        make_plan([Space()[0:10]], [Space()[0:5], Space()[0:6]])


@pytest.mark.parametrize("listed", [False, True])
def test_a_read_only_destination_is_refused(listed: bool) -> None:
    dst = Space("sealed", readonly=True)[0:4]
    with pytest.raises(DescriptorError, match="sealed.*read-only"):
        make_plan(Space()[0:4], [dst] if listed else dst)
    make_plan(dst, Space()[0:4])


@pytest.mark.parametrize("listed", [False, True])
def test_a_closed_region_is_refused_on_either_side(listed: bool) -> None:
    gone = Space("gone", problem=ClosedError("region 'gone' is deregistered"))[0:4]
    sides = ([gone], [Space()[0:4]]) if listed else (gone, Space()[0:4])
    for src, dst in (sides, sides[::-1]):
        with pytest.raises(ClosedError, match="gone"):
            make_plan(src, dst)


@pytest.mark.parametrize("other", [{"peer": "p"}, {"kind": MemoryKind.VRAM}, {"device": 1}])
def test_a_side_that_mixes_owners_kinds_or_devices_is_refused(other: dict[str, Any]) -> None:
    mixed = [Space()[0:4], Space(**other)[0:4]]
    with pytest.raises(DescriptorError, match="src mixes"):
        make_plan(mixed, Space()[0:8])
    with pytest.raises(DescriptorError, match="dst mixes"):
        make_plan(Space()[0:8], mixed)


def test_nothing_at_all_is_refused_but_no_bytes_are_fine() -> None:
    with pytest.raises(DescriptorError, match="src is empty"):
        make_plan([], Space()[0:0])
    plan = make_plan(Space()[4:4], Space()[9:9])
    assert (plan.nbytes, len(plan.lengths), plan.part_ends) == (0, 0, (0,))
    plan = make_plan([Space()[4:4], Space()[5:5]], [Space().pages([], 8)])
    assert (plan.nbytes, len(plan.lengths), plan.part_ends) == (0, 0, (0, 0))


@pytest.mark.parametrize("wrong", [7, "text", b"bytes", [3], None, [None], np.zeros(3)])
def test_what_is_no_place_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        make_plan(wrong, Space()[0:4])
    with pytest.raises(TypeError):
        make_plan(Space()[0:4], wrong)


@pytest.mark.parametrize("item", [3, (0, 4), "0:4", None, slice(0, 4, 2), slice(0, 4, -1), slice("a", None), slice(0.0, 4.0)])
def test_only_plain_slices_index_a_region(item: Any) -> None:
    with pytest.raises(TypeError):
        Space()[item]


@pytest.mark.parametrize("indices", [[0.5], ["a"], [True, False], [None], np.zeros(3), np.array([1 + 2j])])
def test_indices_that_are_no_integers_are_type_errors(indices: Any) -> None:
    with pytest.raises(TypeError, match="must be integers"):
        Space().pages(indices, 4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int32", "int64", "uint64", ">i4", ">i8"])
def test_every_integer_type_is_taken(dtype: str) -> None:
    assert Space().pages(np.array([3, 0, 3], dtype), 100).offsets.tolist() == [300, 0, 300]


def test_indices_of_any_shape_and_stride_are_read_in_order() -> None:
    grid = np.arange(24).reshape(4, 6)
    assert Space().pages(grid[::2, ::-3], 100).offsets.tolist() == [500, 200, 1700, 1400]
    assert Space().pages(5, 100).offsets.tolist() == [500]


def test_indices_are_copied() -> None:
    indices = np.array([1, 2])
    for described in (Space().pages(indices, 1), Space().ranges(indices, indices), Space().ranges(indices, 1)):
        before = described.offsets.tolist(), described.lengths.tolist()
        indices += 1
        assert (described.offsets.tolist(), described.lengths.tolist()) == before
        indices -= 1


@pytest.mark.parametrize("indices", [[2**63], [2**64 - 1], np.array([2**63], np.uint64), [2**62], [-(2**63)], [2**100]])
def test_overflowing_indices_are_refused(indices: Any) -> None:
    with pytest.raises((DescriptorError, TypeError)):
        Space().pages(indices, 1 << 40)


@pytest.mark.parametrize("page_nbytes", [0, -1, 2**63, 2**70])
def test_page_sizes_that_cannot_be_are_refused(page_nbytes: int) -> None:
    with pytest.raises(DescriptorError):
        Space().pages([0], page_nbytes)


@pytest.mark.parametrize("page_nbytes", [1.0, "4", None, [4]])
def test_page_sizes_that_are_no_integers_are_type_errors(page_nbytes: Any) -> None:
    with pytest.raises(TypeError):
        Space().pages([0], page_nbytes)


def test_ranges_want_one_byte_count_for_each_offset() -> None:
    with pytest.raises(DescriptorError, match="2 offsets but 3"):
        Space().ranges([0, 1], [1, 2, 3])
    assert Space().ranges([0, 10], 5).lengths.tolist() == [5, 5]
    assert len(Space().ranges([], 5)) == 0


def test_a_hundred_thousand_pages_make_one_segment_where_they_touch() -> None:
    n = 131_072
    src, dst = Space(nbytes=n * 4096), Space(nbytes=n * 4096, peer="p")
    whole = make_plan(src.pages(np.arange(n), 4096), dst.pages(np.arange(n), 4096))
    assert (whole.lengths.tolist(), whole.nbytes) == ([n * 4096], n * 4096)
    backwards = make_plan(src.pages(np.arange(n)[::-1], 4096), dst.pages(np.arange(n)[::-1], 4096))
    assert len(backwards.lengths) == n
    pairs = np.arange(n).reshape(-1, 2)[::-1]
    assert len(make_plan(src.pages(pairs, 4096), dst.pages(pairs, 4096)).lengths) == n // 2


def test_representations_say_what_they_are() -> None:
    region = Space("kv", 100, peer="decode")
    assert repr(region) == "<Space 'kv' of 'decode': 100 bytes DRAM>"
    assert repr(region.pages([0, 1], 10)) == f"<Descriptor: 2 ranges, 20 bytes of {region!r}>"


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_indices_of_any_kind_of_integer(kind: type[np.integer[Any]]) -> None:
    region = Space(nbytes=1 << 20)
    table = np.array([[3, 1], [100, 0]], kind)
    pages = region.pages(table.T, 4096)
    table[:] = 99
    assert pages.offsets.tolist() == [3 * 4096, 100 * 4096, 4096, 0]
    assert region.pages(np.arange(20, dtype=kind)[::2], 4096).offsets.tolist() == [at * 4096 for at in range(0, 20, 2)]
    with pytest.raises(DescriptorError, match="page index 17 is out of range"):
        Space(nbytes=4096 * 17).pages(np.array([0, 17], kind), 4096)
    if np.dtype(kind).kind == "i":
        with pytest.raises(DescriptorError, match="page index -1 is out of range"):
            region.pages(np.array([0, -1], kind), 4096)
