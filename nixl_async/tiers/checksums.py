"""Checksums of blocks: CRC-64/NVME by awscrt where it is installed, else zlib's CRC-32; which of them is kept with each block.

A checksum covers the block's key and then its bytes, so that a block in another's place does not pass. Both libraries release the
GIL; call this on a thread.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.errors import MissingDependency

if TYPE_CHECKING:
    from numpy.typing import NDArray

NONE, CRC64NVME, CRC32 = 0, 1, 2
"""The kinds as they are kept on disk. NONE: the block was written with `checksum=False` and cannot be verified."""

_Function = Callable[[memoryview, int], int]
_functions: dict[int, _Function] = {CRC32: lambda data, before: zlib.crc32(data, before)}


def best_kind() -> int:
    """Return the kind that new blocks get."""
    return CRC64NVME if find_spec("awscrt") is not None else CRC32


def checksum_blocks(kind: int, keys: Sequence[bytes], blocks: Iterable[Sequence[memoryview]]) -> NDArray[np.uint64]:
    """Return the checksum of each block, whose bytes are given as views.

    Raises:
        MissingDependency: the kind is awscrt's and awscrt is not installed.
    """
    function = _function(kind)
    found = np.empty(len(keys), np.uint64)
    for at, (key, views) in enumerate(zip(keys, blocks, strict=True)):
        value = function(memoryview(key), 0)
        for one in views:
            value = function(one, value)
        found[at] = value
    return found


def _function(kind: int) -> _Function:
    function = _functions.get(kind)
    if function is None:
        try:
            from awscrt.checksums import crc64nvme
        except ImportError as error:
            raise MissingDependency(
                "blocks with CRC-64/NVME checksums need awscrt: pip install 'nixl-async[s3]', or open with verify=False"
            ) from error
        function = _functions[CRC64NVME] = lambda data, before: int(crc64nvme(data, before))
    return function
