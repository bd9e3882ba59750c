"""What a request keeps besides its KV cache (Mamba states, sliding windows, sparse indices, …), from rank to rank.

SGLang describes each kind as a component: buffers of fixed-size items, and for a request the items it has in them. The functions of
SGLang that reckon addresses are given 0 for every buffer: what they return are then offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.disaggregation.utils import (
    build_dsa_tail_transfer_blocks,
    build_transfer_entry_pairs,
    compute_mamba_state_slice_byte_blocks,
    is_elided_entry,
    slice_dsa_tail_dst_ptrs_for_pp,
)

from nixl_async.descriptors import Region
from nixl_async.integrations.sglang.messages import Geometry, Indices, as_indices
from nixl_async.integrations.sglang.places import Buffers, Places, state_name
from nixl_async.peers import Peer

_PER_LAYER = frozenset(
    {StateType.QSA_PENDING, StateType.QSA_COMPRESSED, StateType.MINIMAX_INDEX_K, StateType.MINIMAX_DENSE_KV}
)
"""One buffer a layer even where the KV cache has K and V."""
_WHOLE_AT_ANY_TP = frozenset({StateType.DSA, StateType.DSA_TAIL})
_OF_STATE_TP = frozenset({StateType.MAMBA, StateType.QSA_PENDING, StateType.QSA_COMPRESSED})
"""What is laid out over `state_tp_size` ranks; the rest over the attention's."""


def _nth(lists: Any, index: int) -> Any:
    return lists[index] if lists and index < len(lists) else []


@dataclass
class _Component:
    """One component on both sides. `src` and `dst` are the items the request has there."""

    manager: Any
    buffers: Buffers
    peer: Peer
    theirs: Geometry
    number: int
    kind: StateType
    src: Indices
    dst: Indices

    def __post_init__(self) -> None:
        args = self.manager.kv_args
        self.src_lens: list[int] = _nth(args.state_item_lens, self.number)
        self.dst_lens: list[int] = _nth(self.theirs.state_item_lens, self.number)
        self.src_ids: list[int] = _nth(args.state_layer_ids, self.number)
        self.dst_ids: list[int] = _nth(self.theirs.state_layer_ids, self.number)

    def regions(self, ours: int, theirs: int) -> tuple[Region, Region] | None:
        """Return a pair of buffers; `None` if either side has elided it."""
        name = state_name(self.number, ours)
        target = self.peer.regions.get(state_name(self.number, theirs))
        if name not in self.buffers.regions or target is None:
            return None
        return self.buffers.regions[name], target

    def same_length(self) -> None:
        """Refuse lists of items that do not pair."""
        if len(self.src) != len(self.dst):
            raise ValueError(
                f"state component {self.number} ({self.kind.value}) has {len(self.src)} items here, {len(self.dst)} at the peer"
            )

    def same_tp(self) -> None:
        """Refuse a component that cannot be sliced where it would have to be."""
        ours = self.manager.state_tp_size if self.kind in _OF_STATE_TP else self.manager.attn_tp_size
        if not self.manager.is_mla_backend and ours != self.theirs.tp_size:
            raise ValueError(
                f"state component {self.number} ({self.kind.value}) needs equal tensor parallelism; prefill has {ours}, decode"
                f" {self.theirs.tp_size}"
            )

    def by_layer_ids(self) -> list[tuple[int, int]]:
        """Pair the buffers by SGLang's layer ids, else by position."""
        found: list[tuple[int, int]] = build_transfer_entry_pairs(
            self.src_ids,
            self.dst_ids,
            len(self.src_lens),
            len(self.dst_lens),
            allow_positional_fallback=self.manager.pp_size == 1,
        )
        return found

    def entries(self) -> list[tuple[int, int]]:
        """Pair the buffers of a component of whole items."""
        manager, src, dst = self.manager, list(range(len(self.src_lens))), list(range(len(self.dst_lens)))
        if manager.is_mla_backend or self.kind in _PER_LAYER or self.kind is StateType.DSA:
            if (self.src_ids or self.dst_ids) and self.kind is not StateType.DSA:
                return self.by_layer_ids()
            ours, theirs, _ = manager.get_mla_kv_ptrs_with_pp(src, dst, self.kind)
            return list(zip(ours, theirs, strict=False))
        return _with_kv(manager, src, dst)


def _with_kv(manager: Any, src: list[int], dst: list[int]) -> list[tuple[int, int]]:
    src_k, src_v, dst_k, dst_v, layers = manager.get_mha_kv_ptrs_with_pp(src, dst)
    return list(zip([*src_k[:layers], *src_v[:layers]], [*dst_k[:layers], *dst_v[:layers]], strict=True))


def state_places(
    manager: Any, buffers: Buffers, peer: Peer, theirs: Geometry, src: list[Any], dst: list[Indices | None]
) -> list[Places]:
    """Return what moves for a request whose items are `src[c]` of each component c here, and `dst[c]` at the decode rank.

    Raises:
        ValueError: the two sides do not fit together.
        RuntimeError: SGLang finds that they do not.
    """
    found: list[Places] = []
    for number, kind in enumerate(getattr(manager.kv_args, "state_types", None) or ()):
        ours = _nth(src, number)
        if ours is None or (len(ours) == 0 and kind is not StateType.DSA_TAIL):
            continue
        wanted = _nth(dst, number)
        one = _Component(
            manager, buffers, peer, theirs, number, kind, as_indices(ours), as_indices([] if wanted is None else wanted)
        )
        found.extend(_of_component(one))
    return found


def _of_component(one: _Component) -> Iterator[Places]:
    manager, unequal = one.manager, one.manager.attn_tp_size != one.theirs.tp_size
    if one.kind is StateType.MAMBA:
        return _mamba(one)
    if one.kind is StateType.DSA_TAIL:
        return _dsa_tail(one)
    if one.kind is StateType.SWA and not manager.is_mla_backend and unequal:
        return _head_slices(one)
    if one.kind not in _WHOLE_AT_ANY_TP:
        one.same_tp()
    return _whole_items(one)


def _whole_items(one: _Component) -> Iterator[Places]:
    one.same_length()
    for ours, theirs in one.entries():
        if is_elided_entry(one.src_lens[ours], one.dst_lens, theirs) or (regions := one.regions(ours, theirs)) is None:
            continue
        nbytes, room = one.src_lens[ours], one.dst_lens[theirs]
        if nbytes != room:
            raise ValueError(
                f"state component {one.number} ({one.kind.value}): items of buffer {ours} have {nbytes} bytes, those of the decode"
                f" rank's buffer {theirs} {room}"
            )
        yield regions[0].pages(one.src, nbytes), regions[1].pages(one.dst, nbytes)


def _mamba(one: _Component) -> Iterator[Places]:
    one.same_length()
    if len(one.src) != 1:
        raise ValueError(f"a request has one Mamba state, not {len(one.src)}")
    args, manager = one.manager.kv_args, one.manager
    src_dims, dst_dims = _nth(getattr(args, "state_dim_per_tensor", None), one.number), _nth(one.theirs.state_dims, one.number)
    counts = _nth(getattr(args, "state_slice_outer_counts", None), one.number)
    groups = _nth(getattr(args, "state_conv_shard_groups", None), one.number)
    sliced = manager.state_tp_size != one.theirs.tp_size and src_dims and dst_dims
    for ours, theirs in one.by_layer_ids():
        nbytes, room = one.src_lens[ours], one.dst_lens[theirs]
        regions = one.regions(ours, theirs)
        if regions is None or nbytes == 0:
            continue
        blocks = [(0, 0, nbytes)]
        if sliced:
            blocks = compute_mamba_state_slice_byte_blocks(
                src_item_len=nbytes,
                dst_item_len=room,
                src_dim=src_dims[ours],
                dst_dim=dst_dims[theirs],
                outer_count=counts[ours] if ours < len(counts) else 1,
                src_attn_tp_size=manager.state_tp_size,
                dst_attn_tp_size=one.theirs.tp_size,
                dst_tp_rank_in_group=one.theirs.tp_rank % one.theirs.tp_size,
                local_tp_rank_in_group=args.engine_rank % manager.state_tp_size,
                conv_shard_groups=groups[ours] if ours < len(groups) else None,
            )
        elif nbytes != room:
            raise ValueError(f"a Mamba state of {nbytes} bytes in buffer {ours} has {room} at the decode rank")
        if blocks:
            yield _ranges(regions, blocks, int(one.src[0]) * nbytes, int(one.dst[0]) * room)


def _dsa_tail(one: _Component) -> Iterator[Places]:
    args = one.manager.kv_args
    entries = slice_dsa_tail_dst_ptrs_for_pp(
        one.src_lens, list(range(len(one.dst_lens))), args.prefill_start_layer, getattr(args, "prefill_end_layer", None)
    )
    src, dst = one.src.tolist(), one.dst.tolist()
    for ours, theirs in enumerate(entries):
        lens = [one.src_lens[ours]], [one.dst_lens[theirs]]
        blocks = build_dsa_tail_transfer_blocks([0], lens[0], [0], src, dst, lens[1])
        regions = one.regions(ours, theirs)
        if blocks and regions is not None:
            yield _ranges(regions, blocks, 0, 0)


def _head_slices(one: _Component) -> Iterator[Places]:
    one.same_length()
    zeros = [0] * len(one.src_lens), [0] * len(one.dst_lens)
    blocks = one.manager._get_mha_head_slice_blocks(
        src_ptrs=zeros[0],
        src_item_lens=one.src_lens,
        dst_ptrs=zeros[1],
        dst_item_lens=one.dst_lens,
        src_page_indices=one.src,
        dst_page_indices=one.dst,
        dst_attn_tp_size=one.theirs.tp_size,
        dst_tp_rank=one.theirs.tp_rank,
    )
    entries = _with_kv(one.manager, list(range(len(zeros[0]))), list(range(len(zeros[1]))))
    for (ours, theirs), (src, dst, nbytes) in zip(entries, blocks, strict=True):
        if (regions := one.regions(ours, theirs)) is not None:
            yield regions[0].ranges(src, nbytes), regions[1].ranges(dst, nbytes)


def _ranges(regions: tuple[Region, Region], blocks: list[tuple[int, int, int]], src_base: int, dst_base: int) -> Places:
    """Return blocks of (offset here, offset there, bytes) as one pair of descriptors."""
    src, dst, nbytes = np.array(blocks, np.int64).T
    return regions[0].ranges(src + src_base, nbytes), regions[1].ranges(dst + dst_base, nbytes)
