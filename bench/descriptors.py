"""Time the work per descriptor: building, validating and coalescing, without any transport."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from nixl_async.descriptors import MemoryKind, Region, make_plan

PAGE = 4096
RUN = 16


class Somewhere(Region):
    """Memory that nobody will touch."""

    kind, device, readonly = MemoryKind.DRAM, 0, False

    def __init__(self, name: str, address: int, nbytes: int, peer: str | None) -> None:
        self.name, self.address, self.nbytes, self.peer = name, address, nbytes, peer

    def check_usable(self) -> None:
        """Accept every use."""


def measure(n_pages: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each step for all `n_pages` descriptors.

    `build` makes both sides' descriptors from page indices and validates the indices; `plan` pairs, checks and coalesces
    pages in random order, `plan runs` pages that lie in runs of 16 on both sides.
    """
    rng = np.random.default_rng(1)
    here = Somewhere("here", 1 << 40, n_pages * PAGE, None)
    there = Somewhere("there", 1 << 41, n_pages * PAGE, "peer")
    near, far = np.arange(n_pages), rng.permutation(n_pages)
    runs = (rng.permutation(n_pages // RUN)[:, None] * RUN + np.arange(RUN)).ravel()
    a, b = here.pages(near, PAGE), there.pages(far, PAGE)
    c, d = here.pages(runs, PAGE), there.pages(runs, PAGE)
    steps: dict[str, Callable[[], object]] = {
        "build": lambda: here.pages(far, PAGE),
        "plan": lambda: make_plan(a, b),
        "plan runs": lambda: make_plan(c, d),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds
