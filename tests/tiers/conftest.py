"""An agent, memory with a pattern, and blank memory, for every test of the tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, MemoryRegion
from nixl_async.descriptors import Descriptor
from nixl_async.testing import pattern
from nixl_async.tiers import hash_tokens

BLOCK = 4096
N = 64


@dataclass(eq=False)
class Bench:
    """N blocks of known bytes, their keys, and as much blank memory to get them into."""

    agent: Agent
    data: Any
    blank: Any
    source: MemoryRegion
    target: MemoryRegion
    keys: list[bytes]

    def src(self, which: Any = range(N)) -> Descriptor:
        return self.source.pages(np.asarray(which), BLOCK)

    def dst(self, which: Any = range(N)) -> Descriptor:
        return self.target.pages(np.asarray(which), BLOCK)

    def right(self, which: Any = range(N)) -> bool:
        """Tell whether these blocks have arrived in their places."""
        rows = np.asarray(which)
        return bool((self.data.reshape(N, BLOCK)[rows] == self.blank.reshape(N, BLOCK)[rows]).all())


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with Agent("tiers", backends=["memory", "posix", "directory"]) as agent:
        data, blank = pattern(N * BLOCK, 1), np.zeros(N * BLOCK, np.uint8)
        source, target = await agent.register(data), await agent.register(blank)
        yield Bench(agent, data, blank, source, target, hash_tokens(np.arange(N * 4), 4))
