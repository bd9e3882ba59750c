"""SGLang's buffers as regions, and what of them goes where: page indices of both sides become descriptors.

A rank registers each of its buffers under a name that both sides derive from its number, so that no address travels but in the
agent's metadata, and a pool that is released and resumed at the same address is told to peers by the agent itself. Unequal tensor
parallelism moves slices of heads: strided ranges of the request's own pages, made of two numbers and the page list.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sglang.srt.disaggregation.utils import build_transfer_entry_pairs

from nixl_async.agent import Agent
from nixl_async.cuda import DeviceBytes, device_of
from nixl_async.descriptors import Descriptor, Region
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.integrations.sglang.messages import Geometry, Indices
from nixl_async.memory import MemoryRegion
from nixl_async.peers import Peer
from nixl_async.planner import Pair, plan_pairs

Places = tuple[Descriptor, Descriptor]
"""What to move and where to."""

BATCH_RANGES = 16384
"""About as many ranges go in one transfer: the next layers are planned while these move."""
POOL_AXES = ("layer", "block", "token", "head")
"""Each KV buffer is a region `[pages, tokens, heads, head_dim]`; K and V of a layer are two, which count as layers here."""


def kv_name(entry: int) -> str:
    """Return the name of the region of a KV buffer."""
    return f"kv/{entry}"


def aux_name(entry: int) -> str:
    """Return the name of the region of an aux buffer."""
    return f"aux/{entry}"


def state_name(component: int, entry: int) -> str:
    """Return the name of the region of a state buffer."""
    return f"state/{component}/{entry}"


def _memory(address: int, nbytes: int) -> object:
    """Return memory that SGLang keeps alive as something to register: a device's if the driver knows it, else the host's."""
    if device_of(address) is not None:
        return DeviceBytes(address, nbytes)
    return (ctypes.c_uint8 * nbytes).from_address(address)


class Buffers:
    """A rank's registered buffers by name. Empty ones (an elided layer's) have no region."""

    def __init__(self, kv_args: Any) -> None:
        self.kv_args = kv_args
        self.regions: dict[str, MemoryRegion] = {}

    def _listed(self) -> Iterator[tuple[str, int, int]]:
        args = self.kv_args
        for entry, (address, nbytes) in enumerate(zip(args.kv_data_ptrs, args.kv_data_lens, strict=True)):
            yield kv_name(entry), address, nbytes
        for entry, (address, nbytes) in enumerate(zip(args.aux_data_ptrs, args.aux_data_lens, strict=True)):
            yield aux_name(entry), address, nbytes
        components = zip(args.state_data_ptrs or (), args.state_data_lens or (), strict=True)
        for component, (addresses, lengths) in enumerate(components):
            for entry, (address, nbytes) in enumerate(zip(addresses, lengths, strict=True)):
                yield state_name(component, entry), address, nbytes

    async def register(self, agent: Agent) -> None:
        """Register every buffer that is not registered yet.

        Raises:
            RegistrationError: no backend takes one of them.
        """
        for name, address, nbytes in self._listed():
            if address and nbytes and name not in self.regions:
                self.regions[name] = await agent.register(_memory(address, nbytes), name=name)

    async def deregister(self) -> None:
        """Take every registration back: peers are told, and the bytes are quiet when this returns."""
        regions, self.regions = self.regions, {}
        for region in regions.values():
            await region.aclose()


@dataclass(frozen=True)
class Group:
    """KV buffers of one geometry whose pages go together: pairs of (our entry, the peer's entry)."""

    entries: tuple[tuple[int, int], ...]
    src_nbytes: int
    dst_nbytes: int
    """Bytes of a page on either side."""
    pair: Pair | None = None
    """Which heads move, where that is not all of a page."""


@dataclass(frozen=True)
class Route:
    """What of this rank's KV buffers one decode rank gets; empty groups if another rank gives it the same."""

    groups: tuple[Group, ...]

    def places(
        self, buffers: Buffers, peer: Peer, src: Indices, dst: Indices, layers: Sequence[int] | None = None
    ) -> list[tuple[int, list[Places]]]:
        """Return what moves for pages `src[i]` to the peer's pages `dst[i]`, buffer after buffer, in batches of one transfer each.

        With `layers`, the layer of each of our buffers, a batch is of one layer, which comes with it, and the lowest are first;
        else it comes with 0. Takes milliseconds for tens of thousands of slices; any thread may call it.
        """
        moves: list[tuple[int, Places]] = []
        for group in self.groups:
            numbers = [0 if layers is None else layers[ours] for ours, _ in group.entries]
            moves += zip(numbers, _moves(group, buffers, peer, src, dst), strict=True)
        moves.sort(key=lambda move: move[0])
        batches: list[tuple[int, list[Places]]] = []
        room = 0
        for layer, (source, target) in moves:
            room -= len(source)
            if not batches or batches[-1][0] != layer or room < 0:
                batches.append((layer, []))
                room = BATCH_RANGES - len(source)
            batches[-1][1].append((source, target))
        return batches


def _moves(group: Group, buffers: Buffers, peer: Peer, src: Indices, dst: Indices) -> list[tuple[Descriptor, Descriptor]]:
    """Return what moves for each of the group's entries."""
    sources = [buffers.regions[kv_name(ours)] for ours, _ in group.entries]
    targets = [peer.region(kv_name(theirs)) for _, theirs in group.entries]
    if group.pair is None:
        return [
            (source.pages(src, group.src_nbytes), target.pages(dst, group.src_nbytes, stride_nbytes=group.dst_nbytes))
            for source, target in zip(sources, targets, strict=True)
        ]
    found = group.pair.by_layer(_whole(sources, group.src_nbytes), src, _whole(targets, group.dst_nbytes), dst)
    return [(_only(layer.src), _only(layer.dst)) for layer in found]


def _whole(regions: Sequence[Region], page_nbytes: int) -> list[Descriptor]:
    """Return regions without what is behind their last whole page."""
    return [region[: region.nbytes - region.nbytes % page_nbytes] for region in regions]


def _only(side: Descriptor | list[Descriptor]) -> Descriptor:
    if isinstance(side, Descriptor):
        return side
    (only,) = side
    return only


def layers_of(manager: Any) -> list[int]:
    """Return which of this rank's layers each KV buffer is of; a draft model's buffers count to the last, which they come after."""
    args = manager.kv_args
    drafts = getattr(args, "num_draft_entries", 0)
    main = len(args.kv_item_lens) - drafts
    count = main if manager.is_mla_backend else main // 2
    return [entry % max(1, count) for entry in range(main)] + [max(0, count - 1)] * drafts


def plan_route(manager: Any, peer: Geometry) -> Route:
    """Pair this rank's KV buffers with a decode rank's, as SGLang does: by layer ids where both have them, else by position.

    Raises:
        ValueError: the two sides' buffers do not fit together.
        RuntimeError: SGLang finds that they do not.
    """
    args = manager.kv_args
    ours, theirs = args.kv_item_lens, peer.kv_item_lens
    if len(theirs) < len(ours):
        raise ValueError(
            f"the decode rank has {len(theirs)} KV buffers, this prefill rank {len(ours)}; it needs as many or more"
        )
    if not ours:
        return Route(())
    whole = manager.is_mla_backend or manager.is_hybrid_mla_backend or manager.attn_tp_size == peer.tp_size
    entries = _whole_entries(manager, peer) if whole else _sliced_entries(manager, peer)
    groups = []
    for (src_nbytes, dst_nbytes), together in groupby(entries, lambda pair: (ours[pair[0]], theirs[pair[1]])):
        if whole:
            if src_nbytes > dst_nbytes:
                raise ValueError(f"a page of {src_nbytes} bytes does not fit the decode rank's, which has {dst_nbytes}")
            groups.append(Group(tuple(together), src_nbytes, dst_nbytes))
        elif (pair := _head_pair(manager, peer, src_nbytes, dst_nbytes, len(pairs := tuple(together)))) is not None:
            groups.append(Group(pairs, src_nbytes, dst_nbytes, pair))
    return Route(tuple(groups))


def _whole_entries(manager: Any, peer: Geometry) -> list[tuple[int, int]]:
    args = manager.kv_args
    n_src, n_dst = len(args.kv_item_lens), len(peer.kv_item_lens)
    staged_mla = (
        manager.pp_size > 1
        and n_src != n_dst
        and not args.kv_layer_ids
        and not peer.kv_layer_ids
        and manager.is_mla_backend
        and not manager.is_hybrid_mla_backend
        and not getattr(args, "mla_compression_ratios", None)
    )
    if staged_mla:
        first, end = manager._mla_kv_entry_span_with_pp(n_src)
        if end <= n_dst:
            return list(zip(range(n_src), range(first, end), strict=True))
    positional = manager.pp_size == 1
    found: list[tuple[int, int]] = build_transfer_entry_pairs(
        args.kv_layer_ids, peer.kv_layer_ids, n_src, n_dst, allow_positional_fallback=positional
    )
    return found


def _sliced_entries(manager: Any, peer: Geometry) -> list[tuple[int, int]]:
    # SGLang's own function tells which pointers belong together; it does as well with their numbers.
    src, dst = (list(range(len(lens))) for lens in (manager.kv_args.kv_item_lens, peer.kv_item_lens))
    src_k, src_v, dst_k, dst_v, _ = manager.get_mha_kv_ptrs_with_pp(src, dst)
    return list(zip([*src_k, *src_v], [*dst_k, *dst_v], strict=True))


def _head_pair(manager: Any, peer: Geometry, src_nbytes: int, dst_nbytes: int, entries: int) -> Pair | None:
    """Return which heads this rank gives to a decode rank of so many buffers, `None` if none."""
    args, tokens = manager.kv_args, manager.kv_args.page_size
    heads = getattr(args, "total_kv_head_num", 0) or getattr(args, "kv_head_num", 0) * manager.attn_tp_size
    if heads <= 0:
        raise ValueError("SGLang does not say how many KV heads the model has; unequal tensor parallelism needs that")
    ours = max(1, heads // manager.attn_tp_size)
    row, rest = divmod(src_nbytes, tokens * ours)
    theirs = max(1, heads // peer.tp_size)
    if rest or dst_nbytes != tokens * theirs * row or peer.page_size != tokens:
        raise ValueError(
            f"pages of {src_nbytes} bytes (TP {manager.attn_tp_size}) and {dst_nbytes} bytes (TP {peer.tp_size}) are not"
            f" {tokens} tokens of {ours} and {theirs} heads; of {heads} in all"
        )
    geometry = KVGeometry(entries, heads, row, 1, 1)
    sides = (Sharding(tp=tp, page_tokens=tokens, axes=POOL_AXES) for tp in (manager.attn_tp_size, peer.tp_size))
    ranks = args.engine_rank % manager.attn_tp_size, peer.tp_rank % peer.tp_size
    for pair in plan_pairs(geometry, *sides):
        if (pair.src.rank, pair.dst.rank) == ranks:
            return pair
    return None


def aux_places(buffers: Buffers, peer: Peer, theirs: Geometry, src: int, dst: int) -> list[Places]:
    """Return what moves for row `src` of each aux buffer to the peer's row `dst`; the shorter list of buffers counts.

    Raises:
        ValueError: a row does not fit the peer's.
    """
    found: list[Places] = []
    for entry, (nbytes, room) in enumerate(zip(buffers.kv_args.aux_item_lens, theirs.aux_item_lens, strict=False)):
        if nbytes > room:
            raise ValueError(f"aux buffer {entry} has rows of {nbytes} bytes, the decode rank's {room}")
        source, target = buffers.regions[aux_name(entry)], peer.region(aux_name(entry))
        found.append((source[src * nbytes : (src + 1) * nbytes], target[dst * room : dst * room + nbytes]))
    return found


def by_memory(places: Iterable[Places]) -> list[tuple[list[Descriptor], list[Descriptor]]]:
    """Return both sides of as few transfers as move `places`: one side of a transfer is all of one memory kind and device."""
    found: dict[object, tuple[list[Descriptor], list[Descriptor]]] = {}
    for src, dst in places:
        key = src.region.kind, src.region.device, dst.region.kind, dst.region.device
        sides = found.setdefault(key, ([], []))
        sides[0].append(src)
        sides[1].append(dst)
    return list(found.values())
