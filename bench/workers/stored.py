"""What the clients of a storage server or of a file have in common: which objects or blocks, and which memory is theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.pattern import allocate_aligned
from bench.worker import reset_rss_peak, rss_peak
from bench.workers.mover import Mover


class Stored(Mover):
    """Holds the buffer that objects are got into and put from; `where` says what the objects, or the file, are called.

    As with a peer's pages, memory page i belongs to object, or block of the file, number `order[i]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole = self.buffer
        self.where: dict[str, Any] = {}
        self.measured: dict[str, float] = {}

    def allocate(self, nbytes: int) -> None:
        """Take `nbytes` bytes of aligned and mapped memory."""
        self.whole = self.buffer = allocate_aligned(nbytes)

    def aim(self, where: dict[str, Any], op: str, page_nbytes: int, n_pages: int, seed: int) -> Any:
        """Do what stays outside the timing of the runs that follow; only the memory they use is filled and checked."""
        self.where = where
        self.buffer = self.whole[: page_nbytes * n_pages]
        return self.ready(op, page_nbytes, n_pages, seed)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Put the block's seconds, this whole process's CPU meanwhile, and how much its memory grew into `measured`."""
        before = reset_rss_peak()
        cpu, start = time.process_time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.measured = {"seconds": seconds, "cpu": time.process_time() - cpu, "rss_growth": rss_peak() - before}
