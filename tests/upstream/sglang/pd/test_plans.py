"""What moves from which rank to which, beside SGLang's own reckoning of it, over many shapes; and the messages."""

from __future__ import annotations

import itertools

import pytest
from sglang.srt.disaggregation.base.conn import KVArgs, StateType
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.common.staging_buffer import compute_head_slice_params

from nixl_async.integrations.sglang.messages import (
    PREFIX,
    Geometry,
    MalformedMessage,
    Registration,
    TransferInfo,
    as_indices,
    note,
    read_note,
)
from nixl_async.integrations.sglang.places import Buffers, kv_name, layers_of, plan_route, state_name
from nixl_async.integrations.sglang.state import state_places
from nixl_async.memory import Buffer, MemoryKind, MemoryRegion, RemoteRegion
from nixl_async.peers import Peer

PAGE, ROW, SLOTS = 4, 32, 12


class Manager:
    """What the plans ask of SGLang's manager: its own methods, on plain values."""

    get_mha_kv_ptrs_with_pp = CommonKVManager.get_mha_kv_ptrs_with_pp
    get_mla_kv_ptrs_with_pp = CommonKVManager.get_mla_kv_ptrs_with_pp
    _mla_kv_entry_span_with_pp = CommonKVManager._mla_kv_entry_span_with_pp
    _get_mha_head_slice_blocks = CommonKVManager._get_mha_head_slice_blocks

    def __init__(
        self, tp: int, rank: int, entries: int, heads: int, *, mla: bool = False, pp: int = 1, first: int = 0
    ) -> None:
        self.is_mla_backend, self.is_hybrid_mla_backend = mla, False
        self.attn_tp_size = self.state_tp_size = tp
        self.pp_size = pp
        args = self.kv_args = KVArgs()
        each = PAGE * ROW * (1 if mla else max(1, heads // tp))
        args.kv_item_lens, args.kv_data_ptrs, args.kv_data_lens = [each] * entries, [0] * entries, [each * SLOTS] * entries
        args.kv_layer_ids, args.aux_item_lens, args.aux_data_ptrs, args.aux_data_lens = [], [], [], []
        args.engine_rank, args.page_size, args.total_kv_head_num, args.kv_head_num = rank, PAGE, heads, max(1, heads // tp)
        args.prefill_start_layer, args.prefill_end_layer = first, first + entries // (1 if mla else 2)
        args.state_types, args.state_item_lens, args.state_layer_ids, args.state_data_ptrs, args.state_data_lens = (
            [],
            [],
            [],
            [],
            [],
        )
        args.swa_kv_cache_layout = "nhd"

    def geometry(self) -> Geometry:
        args = self.kv_args
        kinds = [kind.value for kind in args.state_types]
        return Geometry(
            self.attn_tp_size,
            args.engine_rank,
            1,
            0,
            PAGE,
            args.kv_item_lens,
            args.kv_layer_ids,
            [],
            kinds,
            args.state_item_lens,
            [],
            [],
        )

    def registered(self) -> tuple[Buffers, Peer]:
        """Return its buffers as this rank sees them, and as its peers do: both at made up addresses."""
        buffers, peer = Buffers(self.kv_args), Peer("peer", "1")
        sizes = {kv_name(i): nbytes for i, nbytes in enumerate(self.kv_args.kv_data_lens)}
        for c, lens in enumerate(self.kv_args.state_item_lens):
            sizes |= {state_name(c, i): nbytes * SLOTS for i, nbytes in enumerate(lens) if nbytes}
        for number, (name, nbytes) in enumerate(sizes.items(), 1):
            buffers.regions[name] = MemoryRegion(name, Buffer(number << 32, nbytes, MemoryKind.DRAM, 0, False, None), None)
            peer.regions[name] = RemoteRegion("peer", "1", name, number << 32, nbytes)
        return buffers, peer


def moved(places: list) -> dict[tuple[str, int], tuple[str, int]]:
    """Return for each byte of the destination where it comes from."""
    found: dict[tuple[str, int], tuple[str, int]] = {}
    for src, dst in places:
        pairs = zip(src.offsets.tolist(), src.lengths.tolist(), dst.offsets.tolist(), dst.lengths.tolist(), strict=True)
        for a, n, b, m in pairs:
            assert n == m
            for i in range(n):
                assert (dst.region.name, b + i) not in found
                found[dst.region.name, b + i] = src.region.name, a + i
    return found


def route_of(prefill: Manager, decode: Manager, src: list[int], dst: list[int]) -> dict:
    route = plan_route(prefill, decode.geometry())
    batches = route.places(prefill.registered()[0], decode.registered()[1], as_indices(src), as_indices(dst))
    return moved([place for _, places in batches for place in places])


SHAPES = [
    (p, d, heads)
    for p, d, heads in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    if p != d and max(p, d) % min(p, d) == 0
]


@pytest.mark.parametrize(("p", "d", "heads"), SHAPES)
def test_every_decode_rank_gets_its_heads_from_the_ranks_that_sglang_pairs_it_with(p: int, d: int, heads: int) -> None:
    src, dst = [3, 0, 7], [5, 11, 2]
    for decode_rank in range(d):
        decode = Manager(d, decode_rank, 2, heads)
        # SGLang: CommonKVManager._resolve_rank_mapping.
        sources = [decode_rank * p // d] if d > p else range(decode_rank * p // d, (decode_rank + 1) * p // d)
        wanted, got = {}, {}
        for rank in sources:
            prefill = Manager(p, rank, 2, heads)
            got |= route_of(prefill, decode, src, dst)
            first, count, into, _ = compute_head_slice_params(p, d, rank, decode_rank, heads)
            ours, theirs = max(1, heads // p), max(1, heads // d)
            for a, b in zip(src, dst, strict=True):
                for token, byte in itertools.product(range(PAGE), range(count * ROW)):
                    here = (a * PAGE + token) * ours * ROW + first * ROW + byte
                    there = (b * PAGE + token) * theirs * ROW + into * ROW + byte
                    for entry in range(2):
                        wanted[kv_name(entry), there] = kv_name(entry), here
        assert got == wanted


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_a_pipeline_stage_writes_the_layers_that_it_has(mla: bool, first: int) -> None:
    stage, whole = (2, 4) if mla else (4, 8)
    prefill = Manager(1, 0, stage, 2, mla=mla, pp=2, first=first)
    decode = Manager(1, 0, whole, 2, mla=mla)
    if not mla:
        # SGLang gives ids where stages are to be told apart: K of its layers, then V.
        prefill.kv_args.kv_layer_ids = [first, first + 1] * 2
        decode.kv_args.kv_layer_ids = [0, 1, 2, 3] * 2
    got = route_of(prefill, decode, [1], [2])
    entries = {(int(a.partition("/")[2]), int(b.partition("/")[2])) for (b, _), (a, _) in got.items()}
    wanted = [(i, first + i) for i in range(2)]
    assert entries == set(wanted if mla else [*wanted, *((i + 2, j + 4) for i, j in wanted)])


def test_unequal_tp_and_pipeline_stages() -> None:
    prefill = Manager(1, 0, 4, 2, pp=2, first=2)
    got = route_of(prefill, Manager(2, 1, 8, 2), [1], [2])
    assert {(a, b) for (b, _), (a, _) in got.items()} == {
        ("kv/0", "kv/2"),
        ("kv/1", "kv/3"),
        ("kv/2", "kv/6"),
        ("kv/3", "kv/7"),
    }


def test_a_decode_rank_with_longer_pages_gets_them_at_its_own_distances() -> None:
    prefill, decode = Manager(1, 0, 2, 1), Manager(1, 0, 2, 1)
    decode.kv_args.kv_item_lens = [PAGE * ROW * 2] * 2
    decode.kv_args.kv_data_lens = [PAGE * ROW * 2 * SLOTS] * 2
    assert route_of(prefill, decode, [1], [3])[kv_name(0), 3 * PAGE * ROW * 2] == (kv_name(0), PAGE * ROW)


@pytest.mark.parametrize(
    ("prefill", "decode", "text"),
    [
        (Manager(1, 0, 4, 2), Manager(1, 0, 2, 2), "2 KV buffers, this prefill rank 4"),
        (Manager(1, 0, 2, 3), Manager(2, 0, 2, 4), "are not 4 tokens of"),
    ],
)
def test_what_does_not_fit_is_refused(prefill: Manager, decode: Manager, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_route(prefill, decode.geometry())


def test_a_page_that_is_too_long_is_refused() -> None:
    prefill, decode = Manager(1, 0, 2, 2), Manager(1, 0, 2, 2)
    decode.kv_args.kv_item_lens = [PAGE * ROW] * 2
    with pytest.raises(ValueError, match="does not fit"):
        plan_route(prefill, decode.geometry())


def test_batches_go_layer_by_layer_when_asked_and_are_bounded() -> None:
    prefill, decode = Manager(1, 0, 6, 2), Manager(2, 0, 6, 2)
    route = plan_route(prefill, decode.geometry())
    sides = prefill.registered()[0], decode.registered()[1]
    assert layers_of(prefill) == [0, 1, 2, 0, 1, 2]
    batches = route.places(*sides, as_indices([1, 2]), as_indices([3, 4]), layers_of(prefill))
    assert [(layer, [src.region.name for src, _ in places]) for layer, places in batches] == [
        (0, ["kv/0", "kv/3"]),
        (1, ["kv/1", "kv/4"]),
        (2, ["kv/2", "kv/5"]),
    ]
    prefill.kv_args.num_draft_entries = 2
    assert layers_of(prefill) == [0, 1, 0, 1, 1, 1]


# States.


@pytest.mark.parametrize("kind", [kind for kind in StateType if kind not in (StateType.MAMBA, StateType.DSA_TAIL)])
def test_states_of_whole_items(kind: StateType) -> None:
    prefill, decode = (Manager(1, 0, 4, 2) for _ in range(2))
    for manager in (prefill, decode):
        manager.kv_args.state_types, manager.kv_args.state_item_lens = [kind], [[16, 24, 16, 24]]
    places = state_places(
        prefill, prefill.registered()[0], decode.registered()[1], decode.geometry(), [[2, 5]], [as_indices([7, 1])]
    )
    got = moved(places)
    assert len(got) == 2 * (16 + 24 + 16 + 24)
    assert got[state_name(0, 1), 7 * 24] == (state_name(0, 1), 2 * 24)


def test_an_elided_layer_has_no_state() -> None:
    prefill, decode = (Manager(1, 0, 4, 2) for _ in range(2))
    prefill.kv_args.state_types, prefill.kv_args.state_item_lens = [StateType.DSA], [[16, 16]]
    decode.kv_args.state_types, decode.kv_args.state_item_lens = [StateType.DSA], [[16, 0]]
    places = state_places(
        prefill, prefill.registered()[0], decode.registered()[1], decode.geometry(), [[2]], [as_indices([7])]
    )
    assert [dst.region.name for _, dst in places] == [state_name(0, 0)]


def test_the_tail_of_a_ring_goes_from_ring_to_ring() -> None:
    prefill, decode = (Manager(1, 0, 4, 2) for _ in range(2))
    for manager, nbytes in ((prefill, 4 * 8), (decode, 8 * 8)):
        manager.kv_args.state_types, manager.kv_args.state_item_lens = [StateType.DSA_TAIL], [[nbytes, nbytes]]
    # Row, then offset and length of two segments, and the ring's size: tokens 3, 0, 1 here, 6, 7, 0 there.
    src, dst = [2, 3, 1, 0, 2, 4], [5, 6, 2, 0, 1, 8]
    got = moved(
        state_places(prefill, prefill.registered()[0], decode.registered()[1], decode.geometry(), [src], [as_indices(dst)])
    )
    for token, there in ((3, 6), (0, 7), (1, 0)):
        assert got[state_name(0, 1), 5 * 64 + there * 8] == (state_name(0, 1), 2 * 32 + token * 8)
    assert len(got) == 2 * 3 * 8


@pytest.mark.parametrize(
    ("kind", "src", "dst", "text"),
    [
        (StateType.SWA, [1, 2], [1], "2 items here, 1 at the peer"),
        (StateType.BLOCK_SCALE, [1], [1], "needs equal tensor parallelism"),
        (StateType.MAMBA, [1, 2], [1, 2], "one Mamba state"),
    ],
)
def test_states_that_do_not_pair_are_refused(kind: StateType, src: list[int], dst: list[int], text: str) -> None:
    prefill, decode = Manager(1, 0, 4, 2), Manager(2 if kind is StateType.BLOCK_SCALE else 1, 0, 4, 2)
    for manager in (prefill, decode):
        manager.kv_args.state_types, manager.kv_args.state_item_lens = [kind], [[16] * 4]
    with pytest.raises(ValueError, match=text):
        state_places(prefill, prefill.registered()[0], decode.registered()[1], decode.geometry(), [src], [as_indices(dst)])


# Messages.


def test_messages_come_back_as_they_were() -> None:
    geometry = Manager(2, 1, 4, 2).geometry()
    one = Registration("10.0.0.1", 7000, "sglang-decode@10.0.0.1:7000", geometry, b"\0meta", b"token")
    again = Registration.decode(one.encode())
    assert vars(again) == vars(one)
    info = TransferInfo(1 << 62, "::1", 7, "a", 2, as_indices([3, 1]), 5, [as_indices([2]), None, as_indices([])], 16, True)
    back = TransferInfo.decode(info.encode())
    assert [one if one is None else one.tolist() for one in back.state_indices] == [[2], None, []]
    assert back.kv_indices.tolist() == [3, 1]
    others = [name for name in vars(info) if name not in ("kv_indices", "state_indices")]
    assert [getattr(back, name) for name in others] == [getattr(info, name) for name in others]
    assert read_note(note("ack", room=1, rank=0, generation=2)) == {"k": "ack", "room": 1, "rank": 0, "generation": 2}


@pytest.mark.parametrize(
    "frames", [[], [b"x"], [b"x", b"{}"], [b"x", b"\xff", b"", b""], [b"x", b"[]", b"", b""], [b"x", b"{}", b"abc"]]
)
def test_what_is_malformed_is_refused(frames: list[bytes]) -> None:
    for message in (Registration, TransferInfo):
        with pytest.raises(MalformedMessage):
            message.decode(frames)
    for payload in (PREFIX, PREFIX + b"[]", PREFIX + b"{}", b"\xff"):
        with pytest.raises(MalformedMessage):
            read_note(payload)
