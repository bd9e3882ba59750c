"""What LMCache's keys and memory objects are here: the names of objects, and addresses."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lmcache.v1.distributed.api import ObjectKey

if TYPE_CHECKING:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryObj

PART_NBYTES = 255
"""What file systems allow between two slashes."""


def host_bytes(one: MemoryObj) -> tuple[int, int]:
    """Return the address and the number of an object's bytes in this process's memory; (0, 0) if they are elsewhere."""
    try:
        tensor = one.raw_tensor
        if tensor is not None and tensor.device.type != "cpu":
            return 0, 0
        return int(one.data_ptr), int(one.get_size())
    except (NotImplementedError, AttributeError):
        return 0, 0


def model_prefix(model_name: str) -> str:
    """Return what the names of all objects of a model begin with."""
    return f"{model_name.replace('/', '-SEP-')}@"


def chunk_name(key: ObjectKey) -> str:
    """Return the name of a key's object: that of LMCache's fs adapter (lmcache/v1/distributed/l2_adapters/fs_l2_adapter.py).

    One that is too long for a file system, which that adapter cannot store, is a hash, and is not listed.
    """
    salt = f"@{key.cache_salt}" if key.cache_salt else ""
    return _short(
        f"{model_prefix(key.model_name)}{key.kv_rank:#010x}@{key.object_group_id:x}@{key.chunk_hash.hex()}{salt}.data"
    )


def chunk_text(key: CacheEngineKey) -> str:
    """Return the name of a chunk of LMCache's inside an engine."""
    return _short(key.to_string())


def _short(name: str) -> str:
    """Return a name that every file system takes: a hash in place of one whose parts are too long."""
    if all(len(part.encode()) <= PART_NBYTES for part in name.split("/")):
        return name
    return f"long-{hashlib.sha256(name.encode()).hexdigest()}"


def parse_chunk_name(name: str) -> ObjectKey | None:
    """Return the key of an object's name, `None` if it is none of ours."""
    fields = name.removesuffix(".data").split("@") if name.endswith(".data") else []
    if len(fields) not in (4, 5):
        return None
    try:
        return ObjectKey(
            chunk_hash=bytes.fromhex(fields[3]),
            model_name=fields[0].replace("-SEP-", "/"),
            kv_rank=int(fields[1], 16),
            object_group_id=int(fields[2], 16),
            cache_salt=fields[4] if len(fields) == 5 else "",
        )
    except ValueError:
        return None
