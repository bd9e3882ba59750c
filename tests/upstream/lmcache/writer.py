"""A process that stores chunks by our L2 adapter: `writer.py PARAMETERS FIRST LAST` stores those keys, one at a time, without end.

It says so on its output after each, and begins with others when all are stored; it ends when it is killed.
"""

from __future__ import annotations

import json
import sys

import torch
from places import key_of, object_of, store

from nixl_async.integrations.lmcache import NixlAsyncL2Adapter

CHUNK = 96 << 10


def content(number: int) -> torch.Tensor:
    """Return the bytes of a key's chunk."""
    return torch.randint(0, 256, (CHUNK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def main() -> None:
    """Store chunks until killed."""
    adapter = NixlAsyncL2Adapter(json.loads(sys.argv[1]))
    first, last = map(int, sys.argv[2:])
    number = first
    while True:
        assert store(adapter, [key_of(number)], [object_of(content(number))]).is_successful()
        print(number, flush=True)
        if number == last - 1:
            # Those who wait for it know that all are there; storing goes on.
            print("all", flush=True)
        number += 1


if __name__ == "__main__":
    main()
