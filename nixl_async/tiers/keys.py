"""Names of blocks: hashes of token blocks in which each covers all tokens before it, and the names of objects.

A key is any `bytes` of 1 to 255 bytes that stands for the block's content; this module makes such keys, callers may make their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.errors import DescriptorError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MAX_KEY_NBYTES = 255
"""What a key may have, so that its hexadecimal form and the prefix fit the names that object stores and file systems allow."""
_NAME_NBYTES = 96


def hash_tokens(tokens: ArrayLike, block_tokens: int, *, parent: bytes = b"", salt: bytes = b"") -> list[bytes]:
    """Return the key of each full block of `block_tokens` tokens: the SHA-256 of the key before it and of the block's tokens.

    Two sequences have the same key at a position exactly if all tokens up to the end of that block are the same. `parent` is the
    last key of what comes before these tokens. `salt` keeps apart what must not be shared: the model, the adapter, the tenant.
    A last block that is not full has no key.

    Raises:
        DescriptorError: a token is not an integer of 0 to 4294967295, or `block_tokens` is not positive.
    """
    if block_tokens < 1:
        raise DescriptorError(f"block_tokens is {block_tokens}; it must be positive")
    given = np.asarray(tokens)
    if given.size and given.dtype.kind not in "iu":
        raise DescriptorError(f"tokens must be integers, not {given.dtype}")
    given = given.ravel()
    if given.size and (int(given.min()) < 0 or int(given.max()) > 0xFFFFFFFF):
        wrong = int(given.min()) if int(given.min()) < 0 else int(given.max())
        raise DescriptorError(f"token {wrong} is out of range; a token is 0 to 4294967295")
    flat = np.ascontiguousarray(given, "<u4").tobytes()
    step = 4 * block_tokens
    start = hashlib.sha256(len(salt).to_bytes(8, "little") + salt)
    keys: list[bytes] = []
    for at in range(0, len(flat) - step + 1, step):
        state = start.copy()
        state.update(len(parent).to_bytes(1, "little") + parent)
        state.update(flat[at : at + step])
        parent = state.digest()
        keys.append(parent)
    return keys


def check_keys(keys: Sequence[bytes]) -> None:
    """Refuse what is no key.

    Raises:
        DescriptorError: a key is empty or too long.
        TypeError: a key is not `bytes`, or `keys` is a single one.
    """
    if isinstance(keys, bytes | str):
        raise TypeError("keys is a single key; give a list of keys")
    if set(map(type, keys)) <= {bytes}:
        lengths = set(map(len, keys))
        if not lengths or (min(lengths) > 0 and max(lengths) <= MAX_KEY_NBYTES):
            return
    for key in keys:
        if type(key) is not bytes:
            raise TypeError(f"a key must be bytes, not {type(key).__name__}")
        if not 0 < len(key) <= MAX_KEY_NBYTES:
            raise DescriptorError(f"a key of {len(key)} bytes; a key has 1 to {MAX_KEY_NBYTES}")


def object_name(key: bytes) -> str:
    """Return the name of a key's object: hexadecimal, in parts that every file system takes."""
    text = key.hex()
    # A part that is no last one ends with "-": the name of a short key is never the directory of a long one.
    return "-/".join(text[at : at + 2 * _NAME_NBYTES] for at in range(0, len(text), 2 * _NAME_NBYTES))


def parse_object_name(name: str) -> bytes | None:
    """Return the key of an object's name, `None` if it is not one of ours."""
    try:
        key = bytes.fromhex(name.replace("-/", ""))
    except ValueError:
        return None
    return key if 0 < len(key) <= MAX_KEY_NBYTES and object_name(key) == name else None
