"""SGLang's own host pools on the CPU, filled with known bytes; nothing of a GPU is needed to make or to address them."""

from __future__ import annotations

import hashlib
from typing import Any

import without_gpu  # noqa: F401

# isort: split
import numpy as np
import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MambaStateBufferInfo, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

# What SGLang leaves to the rest of a serving machine is more than a small one has.
base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0

MODEL = "meta-llama/Llama-3.1-8B"
PAGE_SIZE = 16


def _pointers(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.tensor([one.data_ptr() for one in tensors], dtype=torch.uint64)


def mha(
    layout: str,
    n_pages: int,
    *,
    layers: int = 4,
    heads: int = 2,
    dim: int = 32,
    page_size: int = PAGE_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Keys and values: pages of 2 x `layers * heads * dim * page_size` numbers."""
    k, v = (tuple(torch.zeros(1, heads, dim, dtype=dtype) for _ in range(layers)) for _ in range(2))
    buffers = KVBuffers(k=k, v=v, k_data_ptrs=_pointers(k), v_data_ptrs=_pointers(v), layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=buffers,
        page_size=page_size,
        head_num=heads,
        head_dim=dim,
        v_head_dim=dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return MHATokenToKVPoolHost(
        info,
        1.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=page_size,
        start_layer=0,
        end_layer=layers,
        host_token_capacity=n_pages * page_size,
    )


def mla(layout: str, n_pages: int, *, layers: int = 4, rank: int = 96, rope: int = 32, page_size: int = PAGE_SIZE) -> Any:
    """Compressed keys and values, the same on all ranks."""
    dtype = torch.bfloat16
    rows = tuple(torch.zeros(1, 1, rank + rope, dtype=dtype) for _ in range(layers))
    info = MLABufferInfo(
        buffers=rows,
        data_ptrs=_pointers(rows),
        layer_indices=tuple(range(layers)),
        device_layer_num=layers,
        page_size=page_size,
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        kv_cache_dim=rank + rope,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return MLATokenToKVPoolHost(
        info,
        1.0,
        0,
        page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=page_size,
        start_layer=0,
        end_layer=layers,
        target_layer_num=layers,
        host_token_capacity=n_pages * page_size,
    )


def mamba(n_slots: int, *, layers: int = 3, side_state: bool = False) -> Any:
    """State of recurrent layers: a temporal and two convolution buffers; with a side state it can only be copied whole."""
    temporal = torch.zeros(layers, 2, 8, 16, 16, dtype=torch.float32)
    conv = (torch.zeros(layers, 2, 64, 4, dtype=torch.bfloat16), torch.zeros(layers, 2, 32, 4, dtype=torch.bfloat16))
    extra = (torch.zeros(2, 7, dtype=torch.int32),) if side_state else ()
    info = MambaStateBufferInfo(temporal=temporal, conv=conv, extra_checkpoint_buffers=extra)
    # It makes one slot more than it is asked for.
    return MambaPoolHost(info, float(n_slots - 1), 0, device_capacity=1, pin_memory=False, layout="page_first")


def config(extra: dict[str, Any] | None = None, **changes: Any) -> HiCacheStorageConfig:
    """The configuration that SGLang's cache controller makes."""
    given: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": True,
        "model_name": MODEL,
        "extra_config": extra or {},
    }
    return HiCacheStorageConfig(**(given | changes))


def keys(n: int, first: int = 0) -> list[str]:
    """Page hashes as SGLang makes them: SHA-256 in hexadecimal."""
    return [hashlib.sha256(at.to_bytes(8, "little")).hexdigest() for at in range(first, first + n)]


def tensors(pool: Any) -> list[torch.Tensor]:
    """The pool's memory, as bytes."""
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, list | tuple) else [pool.kv_buffer]
    return [one.reshape(-1).view(torch.uint8) for one in buffers]


def fill(pool: Any, seed: int) -> None:
    """Give every byte of the pool a value that its place decides."""
    random = np.random.default_rng(seed)
    for one in tensors(pool):
        one.copy_(torch.from_numpy(random.integers(0, 256, one.numel(), np.uint8)))


def wipe(pool: Any) -> None:
    """Make all of the pool zeros."""
    for one in tensors(pool):
        one.zero_()


def slots(pages: Any, page_size: int = PAGE_SIZE) -> torch.Tensor:
    """The host indices of pages, as the cache controller gives them: `page_size` for each."""
    return torch.as_tensor(np.asarray(pages, np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)


def page(pool: Any, number: int) -> bytes:
    """One page's bytes, by the pool's own way to copy it out."""
    return bytes(pool.get_data_page(number * (pool.page_size or 1), flat=True).contiguous().view(-1).view(torch.uint8).numpy())
