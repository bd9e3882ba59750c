"""What a small model keeps for a request, and the pools in which a rank of it keeps that: buffers, SGLang's `KVArgs`, bytes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

LAYERS, HEADS, ROW, PAGE = 3, 4, 256, 8
"""Layers, KV heads of the whole model, bytes of one head's vector, tokens of a page."""
LATENT = 144
"""Bytes of a token where attention is multi-head latent: the same on every rank."""
SLOTS, ITEMS, AUX_ROWS = 64, 32, 16
AUX_LENS = (64, 256, 128)
TEMPORAL_DIM, CONV_GROUPS, DIM_NBYTES = 8, (4, 4, 8), 32
"""A Mamba state: dims of the whole temporal state, of the three parts of the convolution's, and the bytes of a dim."""
UNTOUCHED = 0xEE


@dataclass(frozen=True)
class Side:
    """A rank of a role: `tp` ranks in all, this is number `rank`. `mla`: latent attention. `states`: kinds of state kept."""

    tp: int
    rank: int
    mla: bool
    states: tuple[str, ...]
    slots: int = SLOTS

    @property
    def heads(self) -> range:
        each = HEADS // self.tp
        return range(self.rank * each, (self.rank + 1) * each)


def content(room: int, what: str, *shape: int) -> np.ndarray:
    """Return the bytes that a room's request has as `what`, in the whole model."""
    return np.random.default_rng([room, zlib.crc32(what.encode())]).integers(0, 256, shape, np.uint8)


class Pools:
    """A rank's buffers. `view(kind)` lists those of a kind as arrays `[slots, …]`; `kv_args` is what SGLang is given."""

    def __init__(self, side: Side, memory: str) -> None:
        self.side, self.memory = side, memory
        if side.mla:
            self.kv = [self._buffer(side.slots, PAGE * LATENT) for _ in range(LAYERS)]
        else:
            self.kv = [self._buffer(side.slots, PAGE * len(side.heads) * ROW) for _ in range(2 * LAYERS)]
        self.aux = [self._buffer(AUX_ROWS, nbytes) for nbytes in AUX_LENS]
        self.states = {kind: self._state(kind) for kind in side.states}
        random = np.random.default_rng()
        self._free = {kind: random.permutation(len(one[0])).tolist() for kind, one in self.buffers().items()}
        self.rooms: dict[int, dict[str, np.ndarray]] = {}

    def _buffer(self, items: int, nbytes: int) -> np.ndarray:
        return np.full((items, nbytes), UNTOUCHED, np.uint8)

    def _state(self, kind: str) -> list[np.ndarray]:
        side = self.side
        if kind == "mamba":
            dims = TEMPORAL_DIM // side.tp, sum(CONV_GROUPS) // side.tp
            return [self._buffer(ITEMS, dim * DIM_NBYTES) for dim in dims for _ in range(2)]
        if kind == "swa":
            return [self._buffer(ITEMS, PAGE * len(side.heads) * ROW) for _ in range(2 * LAYERS)]
        assert kind == "dsa"
        return [self._buffer(ITEMS, 96) for _ in range(LAYERS)]

    def kv_args(self, cls: type) -> object:
        """Return the `KVArgs` of this rank."""
        from sglang.srt.disaggregation.base.conn import StateType

        side, args = self.side, cls()
        args.engine_rank, args.pp_rank, args.system_dp_rank, args.gpu_id = side.rank, 0, 0, 0
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = _infos(self.kv)
        args.kv_layer_ids = []
        args.kv_cache_dtype_str, args.page_size, args.ib_device, args.rust_http_port = "bfloat16", PAGE, None, None
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = _infos(self.aux)
        args.state_types = [StateType(kind) for kind in self.states]
        infos = [_infos(buffers) for buffers in self.states.values()]
        args.state_data_ptrs, args.state_data_lens, args.state_item_lens = ([one[i] for one in infos] for i in range(3))
        args.state_layer_ids = [[] for _ in infos]
        dims = {"mamba": [TEMPORAL_DIM // side.tp] * 2 + [sum(CONV_GROUPS) // side.tp] * 2}
        groups = {"mamba": [None, None, list(CONV_GROUPS), list(CONV_GROUPS)]}
        args.state_dim_per_tensor = [dims.get(kind, []) for kind in self.states]
        args.state_slice_outer_counts = [[1] * len(dims.get(kind, [])) for kind in self.states]
        args.state_conv_shard_groups = [groups.get(kind, []) for kind in self.states]
        args.is_hybrid_mla_backend = False
        args.swa_kv_cache_layout = "nhd"
        args.kv_head_num, args.total_kv_head_num = len(side.heads), HEADS
        args.prefill_start_layer, args.prefill_end_layer, args.mla_compression_ratios = 0, LAYERS, None
        args.kv_data_mem_kinds = [self.memory] * len(self.kv)
        return args

    # A room's part of the whole.

    def expected(self, room: int, pages: int) -> dict[str, list[np.ndarray]]:
        """Return what this rank must have of a room with so many pages: arrays of items, for each buffer of each kind."""
        side = self.side
        tokens = pages * PAGE
        if side.mla:
            kv = [content(room, f"kv{i}", tokens, LATENT).reshape(pages, PAGE * LATENT) for i in range(LAYERS)]
        else:
            kv = [self._heads(content(room, f"kv{i}", tokens, HEADS, ROW), pages) for i in range(2 * LAYERS)]
        found = {"kv": kv, "aux": [content(room, f"aux{i}", 1, nbytes) for i, nbytes in enumerate(AUX_LENS)]}
        for kind in self.states:
            if kind == "swa":
                found[kind] = [self._heads(content(room, f"swa{i}", 2 * PAGE, HEADS, ROW), 2) for i in range(2 * LAYERS)]
            elif kind == "dsa":
                found[kind] = [content(room, f"dsa{i}", pages, 96) for i in range(LAYERS)]
            else:
                found[kind] = self._mamba(room)
        return found

    def _heads(self, whole: np.ndarray, pages: int) -> np.ndarray:
        return np.ascontiguousarray(whole[:, list(self.side.heads)]).reshape(pages, PAGE * len(self.side.heads) * ROW)

    def _mamba(self, room: int) -> list[np.ndarray]:
        tp, rank = self.side.tp, self.side.rank
        found = []
        for i, parts in enumerate(((TEMPORAL_DIM,), (TEMPORAL_DIM,), CONV_GROUPS, CONV_GROUPS)):
            shards = [content(room, f"mamba{i}.{part}", dims, DIM_NBYTES) for part, dims in enumerate(parts)]
            mine = [shard[rank * len(shard) // tp : (rank + 1) * len(shard) // tp] for shard in shards]
            found.append(np.concatenate(mine).reshape(1, -1))
        return found

    def where(self, room: int, pages: int) -> dict[str, np.ndarray]:
        """Return which items of the buffers of each kind are a room's; they are scattered, and no other room's until `release`."""
        if room not in self.rooms:
            counts = {"kv": pages, "aux": 1, "mamba": 1, "swa": 2, "dsa": pages}
            self.rooms[room] = {
                kind: np.array([free.pop() for _ in range(counts[kind])], np.int32) for kind, free in self._free.items()
            }
        return self.rooms[room]

    def release(self, room: int) -> None:
        """Give a room's items back."""
        for kind, items in self.rooms.pop(room).items():
            self._free[kind].extend(items.tolist())

    def buffers(self) -> dict[str, list[np.ndarray]]:
        return {"kv": self.kv, "aux": self.aux, **self.states}

    def fill(self, room: int, pages: int) -> None:
        """Write a room's bytes where they belong."""
        where, buffers = self.where(room, pages), self.buffers()
        for kind, parts in self.expected(room, pages).items():
            for buffer, part in zip(buffers[kind], parts, strict=True):
                buffer[where[kind]] = part

    def wrong(self, rooms: dict[int, int]) -> list[str]:
        """Return what is not as it must be, if exactly these rooms (with their pages) have arrived."""
        found = []
        wanted = {kind: [np.full_like(one, UNTOUCHED) for one in buffers] for kind, buffers in self.buffers().items()}
        for room, pages in rooms.items():
            where = self.where(room, pages)
            for kind, parts in self.expected(room, pages).items():
                for buffer, part in zip(wanted[kind], parts, strict=True):
                    buffer[where[kind]] = part
        for kind, buffers in self.buffers().items():
            for i, buffer in enumerate(buffers):
                if (bad := int((buffer != wanted[kind][i]).any(axis=1).sum())) > 0:
                    found.append(f"{bad} items of {kind} buffer {i}")
        return found

    def missing(self, room: int, pages: int) -> list[str]:
        """Return what is not as it must be of a room's own items."""
        where, buffers = self.where(room, pages), self.buffers()
        parts = self.expected(room, pages).items()
        return [
            f"{kind} buffer {i}"
            for kind, listed in parts
            for i, part in enumerate(listed)
            if not np.array_equal(buffers[kind][i][where[kind]], part)
        ]

    def layers_there(self, room: int, pages: int) -> list[int]:
        """Return the layers of a room whose KV pages are all in place."""
        missing = set(self.missing(room, pages))
        return [i for i in range(LAYERS) if not missing & {f"kv buffer {i}", f"kv buffer {i + LAYERS}"}]

    def wipe(self) -> None:
        """Make the pools as they were in the beginning."""
        for buffers in self.buffers().values():
            for buffer in buffers:
                buffer[:] = UNTOUCHED

    def digest(self) -> int:
        """Return a checksum of all buffers."""
        value = 0
        for buffers in self.buffers().values():
            for buffer in buffers:
                value = zlib.crc32(buffer, value)
        return value


def _infos(buffers: list[np.ndarray]) -> tuple[list[int], list[int], list[int]]:
    return [one.ctypes.data for one in buffers], [one.nbytes for one in buffers], [one.shape[1] for one in buffers]
