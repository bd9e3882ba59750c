"""The shape of a chunk of LMCache's inside an engine, from its size alone: nothing else of it is kept."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lmcache.utils import CacheEngineKey, LayerCacheEngineKey
from lmcache.v1.memory_management import MemoryFormat

if TYPE_CHECKING:
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata

logger = logging.getLogger(__name__)


class Layouts:
    """What a chunk's size says about its shape, for the model that is served."""

    def __init__(self, config: LMCacheEngineConfig, metadata: LMCacheMetadata) -> None:
        self._metadata = metadata
        self._blending = config.enable_blending
        self._chunk_tokens = metadata.chunk_size
        _, self._kv_size, _, heads, head_size = metadata.kv_shape
        self._hidden = heads * head_size

    def _token_nbytes(self, key: CacheEngineKey) -> int:
        if isinstance(key, LayerCacheEngineKey):
            return int(self._kv_size * self._hidden * self._metadata.kv_dtype.itemsize)
        pairs = zip(self._metadata.get_shapes(1), self._metadata.get_dtypes(), strict=True)
        return int(sum(shape.numel() * dtype.itemsize for shape, dtype in pairs))

    def whole(self, key: CacheEngineKey) -> int:
        """Return the bytes of a whole chunk, or of one layer of it."""
        return int(self._chunk_tokens * self._token_nbytes(key))

    def of(self, key: CacheEngineKey, nbytes: int) -> tuple[Any, Any, MemoryFormat] | None:
        """Return shapes, dtypes and format of a chunk of that size; `None` if no number of tokens has it."""
        tokens, rest = divmod(nbytes, self._token_nbytes(key))
        if rest or not 0 < tokens <= self._chunk_tokens:
            logger.warning("chunk %s has %d bytes, which no number of tokens of this model has", key.to_string(), nbytes)
            return None
        mla = self._metadata.use_mla
        if isinstance(key, LayerCacheEngineKey):
            if mla:
                return torch.Size([tokens, self._hidden]), self._metadata.kv_dtype, MemoryFormat.KV_MLA_FMT
            if self._blending:
                return torch.Size([2, tokens, self._hidden]), self._metadata.kv_dtype, MemoryFormat.KV_2TD
            return torch.Size([tokens, 2, self._hidden]), self._metadata.kv_dtype, MemoryFormat.KV_T2D
        form = MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD
        return self._metadata.get_shapes(tokens), self._metadata.get_dtypes(), form
