"""Where the pages of one of SGLang's host pools lie, and what their blocks are called.

A page lies in one or more buffers. What lies in one buffer is a block, or several where heads are split; the blocks of one buffer
make a part. Nothing here imports SGLang; a host pool is what `sglang/srt/mem_cache/pool_host` offers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nixl_async import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async import Descriptor, MemoryRegion
    from nixl_async.tiers import Tiers

logger = logging.getLogger("nixl_async.sglang_hicache")

HASH_NBYTES = 32
SALT_NBYTES = 16


@dataclass(eq=False)
class Part:
    """The blocks of a pool's pages in one buffer: `places[g]` are those of a page's ranges that make up its block `g`."""

    name: str
    buffer: Any
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    salts: list[bytes] = field(default_factory=list)
    region: MemoryRegion | None = None
    tiers: Tiers | None = None

    @property
    def block_nbytes(self) -> int:
        """The bytes of each block."""
        return int(self.sizes[0].sum())

    @property
    def page_nbytes(self) -> int:
        """The bytes of a page that lie here."""
        return int(self.sizes.sum())

    @property
    def opened(self) -> Tiers:
        """The tiers; the pool must be open."""
        assert self.tiers is not None
        return self.tiers

    def keys(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Return the keys of the blocks of pages with these hashes, page by page."""
        return [one + salt for one in hashes for salt in self.salts]

    def blocks(self, addresses: NDArray[np.int64]) -> Descriptor:
        """Describe the blocks of pages whose ranges are at `addresses[page, range]`."""
        assert self.region is not None
        offsets = addresses[:, self.places.ravel()] - self.region.address
        return self.region.ranges(offsets.ravel(), np.broadcast_to(self.sizes.ravel(), offsets.shape).ravel())


class Pages:
    """The pages of a host pool: of how many of its slots each is, and the parts it consists of.

    `names` say what makes these pages others than those of another model, rank or pool; several of them split a page by its heads,
    a block for each. `zero_copied`: bytes may move to and from the pool's own memory, which is so if `zero_copy` asks for it and
    the pool tells where that is; otherwise there is one part, without a buffer, for copies of pages, of type `dtype`. `logical`:
    the pool has no bytes, and no parts.

    Raises:
        ConfigurationError: the pool neither tells where its pages lie nor gives copies of them.
    """

    def __init__(self, pool: Any, name: str, names: Sequence[str], *, zero_copy: bool) -> None:
        self.pool, self.name = pool, name
        self.page_size = int(getattr(pool, "logical_page_size", None) or getattr(pool, "page_size", None) or 1)
        self._split = len(names)
        self.dtype: torch.dtype | None = None
        self._ranges_of_page = 0
        buffers = _buffers(pool)
        self.logical = not buffers and getattr(pool, "kv_buffer", None) is None
        self.parts: list[Part] = []
        if not self.logical:
            self.parts = (self._find_parts(buffers) if zero_copy else []) or [self._flat_part()]
        self.zero_copied = self.dtype is None
        form = ("ranges" if self.zero_copied else "flat", str(getattr(pool, "layout", "")), str(getattr(pool, "dtype", "")))
        for at, part in enumerate(self.parts):
            # Each block has a name of its own, or there is one block for all names.
            mine = names if len(part.places) == len(names) else [" ".join(names)]
            what = (*form, str(self.page_size), str(at), str(part.block_nbytes))
            part.salts = [_digest("\0".join((name, one, *what)).encode(), SALT_NBYTES) for one in mine]

    def __repr__(self) -> str:
        way = "no bytes" if self.logical else "zero copy" if self.zero_copied else "through bounce buffers"
        sizes = " + ".join(f"{len(part.places)} x {part.block_nbytes}" for part in self.parts)
        return f"<Pages {self.name!r}, {way}: pages of {sizes or '0'} bytes>"

    @property
    def page_nbytes(self) -> int:
        """The bytes of a page in all parts."""
        return sum(part.page_nbytes for part in self.parts)

    @property
    def on_device(self) -> bool:
        """Whether the pool's memory is a GPU's."""
        return any(getattr(part.buffer, "is_cuda", False) for part in self.parts)

    def _find_parts(self, buffers: list[tuple[int, int, Any]]) -> list[Part]:
        """Find what a page's ranges are, by asking for those of the first page; empty if the pool does not tell."""
        try:
            addresses, sizes = self.ranges(torch.arange(self.page_size), 1)
        except (NotImplementedError, AttributeError, AssertionError, TypeError, ValueError) as error:
            logger.info("host pool %s does not tell where its pages are: %s", self.name, error)
            return []
        self._ranges_of_page = addresses.shape[1]
        places: list[list[int]] = [[] for _ in buffers]
        for at, (address, nbytes) in enumerate(zip(addresses[0].tolist(), sizes[0].tolist(), strict=True)):
            inside = [start <= address and address + nbytes <= start + size for start, size, _ in buffers]
            if nbytes and True not in inside:
                logger.info("host pool %s has pages outside the buffers that it shows", self.name)
                return []
            if nbytes:
                places[inside.index(True)].append(at)
        parts: list[Part] = []
        # In the order in which the pool tells of them: where buffers are is another thing in each process.
        for mine, (_, _, buffer) in sorted(
            (one for one in zip(places, buffers, strict=True) if one[0]), key=lambda one: one[0]
        ):
            order = np.array(mine, np.int64)
            # Ascending addresses run together; split heads keep the order of their ranks.
            order = order.reshape(self._split, -1) if self._split > 1 else order[np.argsort(addresses[0, order])][None]
            parts.append(Part(f"{self.name}-{len(parts)}", buffer, order, sizes[0, order]))
        return parts

    def ranges(self, indices: torch.Tensor, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ask the pool for the ranges of `n` pages: addresses and sizes, a row for each page."""
        if self._split > 1:
            found = self.pool.get_split_heads_page_buffer_meta(indices, self._split)
        else:
            found = self.pool.get_page_buffer_meta(indices)
        if not found:
            raise NotImplementedError("it gives no ranges")
        addresses, sizes = (np.asarray(one, np.int64) for one in found)
        each = self._ranges_of_page or len(addresses) // n
        if not each or len(addresses) != each * n or len(sizes) != each * n:
            raise ValueError(f"host pool {self.name} gives {len(addresses)} ranges and {len(sizes)} sizes for {n} pages")
        return addresses.reshape(n, each), sizes.reshape(n, each)

    def _flat_part(self) -> Part:
        try:
            sample = self.pool.get_dummy_flat_data_page()
            nbytes = sample.numel() * sample.element_size()
            page = self.pool.get_data_page(0, flat=True)
            if page.numel() * page.element_size() != nbytes:
                raise ValueError(f"a page has {page.numel() * page.element_size()} bytes once and {nbytes} then")
        except (NotImplementedError, AttributeError, AssertionError, ValueError) as error:
            nbytes, sample = 0, error
        if not nbytes:
            raise ConfigurationError(
                f"host pool {self.name} ({type(self.pool).__name__}, layout {getattr(self.pool, 'layout', None)!r}) neither"
                f" tells where its pages are nor gives copies of them ({sample}); choose another --hicache-mem-layout"
            )
        self.dtype, self._split = sample.dtype, 1
        return Part(f"{self.name}-flat", None, np.zeros((1, 1), np.int64), np.array([[nbytes]], np.int64))


def names_of_pages(config: Any, namespace: str, pool_name: str, pool: Any) -> list[str]:
    """Return what a page is beside its tokens, for each of the ranks whose heads it has; `config` is a `HiCacheStorageConfig`."""
    ranks = [f"tp {config.tp_rank} of {config.tp_size}"]
    # State of recurrent layers is sharded even where KV is the same on all ranks; so are a draft model's heads.
    sharded = pool_name == "mamba" or (pool_name.startswith("draft") and hasattr(pool, "head_num"))
    if config.is_mla_model and not sharded:
        ranks = ["all ranks"]
    elif config.tp_lcm_size and getattr(pool, "layout", None) == "page_head":
        split = config.tp_lcm_size // config.tp_size if config.should_split_heads and pool_name == "kv" else 1
        first = config.tp_rank * split
        ranks = [f"tp {first + at} of {config.tp_size * split}" for at in range(split)]
    rest = f"pp {config.pp_rank} of {config.pp_size}, cp {config.attn_cp_rank} of {config.attn_cp_size}"
    if config.dcp_size > 1:
        rest += f", dcp {config.dcp_rank} of {config.dcp_size}"
    return [f"{namespace}\n{config.model_name or ''}\n{rank}, {rest}" for rank in ranks]


def page_hash(key: str) -> bytes:
    """Return the 32 bytes that stand for a page's key: SGLang's keys are SHA-256 in hexadecimal, others are hashed."""
    if len(key) == 2 * HASH_NBYTES:
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return _digest(key.encode(), HASH_NBYTES)


def _digest(what: bytes, nbytes: int) -> bytes:
    return hashlib.blake2b(what, digest_size=nbytes).digest()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes as a flat tensor: a view, if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _buffers(pool: Any) -> list[tuple[int, int, Any]]:
    """Return the tensors that hold a pool's pages, with their addresses and bytes; none that lies within another."""
    shown: list[Any] = []
    given: tuple[Any, Any] = (getattr(pool, "kv_buffer", None), getattr(pool, "get_hybrid_pool_buffer", list)())
    for buffers in given:
        shown += buffers if isinstance(buffers, list | tuple) else [] if buffers is None else [buffers]
    found: list[tuple[int, int, Any]] = []
    for tensor in shown:
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes and tensor.is_contiguous():
            found.append((tensor.data_ptr(), nbytes, tensor))
    found.sort(key=lambda one: (-one[1], one[0]))
    outer: list[tuple[int, int, Any]] = []
    for address, nbytes, tensor in found:
        if not any(start <= address and address + nbytes <= start + size for start, size, _ in outer):
            outer.append((address, nbytes, tensor))
    return outer
