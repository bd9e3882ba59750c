"""What every contender that moves pages has in common: a buffer, filling it, and checking what arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.pattern import allocate, blank, count_wrong, fill, page_order
from bench.slices import DST_TP, SRC_TP, Request
from bench.worker import Common

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Mover(Common):
    """Holds the buffer that the run reads or writes.

    A run pairs local page i with remote page `order[i]`; a write sends from local to remote, a read fetches.
    """

    def __init__(self) -> None:
        self.buffer: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self.write = True
        self.page_nbytes = 0
        self.order: NDArray[np.int64] = np.zeros(0, np.int64)

    def allocate(self, nbytes: int) -> None:
        """Take `nbytes` bytes of mapped memory as the buffer."""
        self.buffer = allocate(nbytes)

    def fill(self, salt: int) -> None:
        """Write the source pattern of `salt` into the buffer."""
        fill(self.buffer, salt)

    def blank(self, salt: int) -> None:
        """Overwrite the buffer with something that no source pattern holds."""
        blank(self.buffer, salt)

    def ready(self, op: str, page_nbytes: int, n_pages: int, seed: int) -> None:
        """Do what stays outside the timing of the runs that follow: `op` is `write` or `read`."""
        self.write = op == "write"
        self.page_nbytes = page_nbytes
        self.order = page_order(n_pages, seed)
        self.prepare()

    def prepare(self) -> None:
        """Build the contender's own lists for `order`; the target has nothing to do."""

    def check(self, salt: int) -> int:
        """Return how many pages are wrong on the destination after a run."""
        return count_wrong(self.buffer, self.order, self.page_nbytes, salt, scattered=self.write)

    def ready_slices(self, op: str, layers: int, tokens: int, slice_nbytes: int) -> None:
        """Do what stays outside the timing of runs that move a request's head slices; `check_slices` belongs to them."""
        self.write = op == "write"
        self.request = Request(layers, tokens, slice_nbytes)
        self.near_tp, self.far_tp = (SRC_TP, DST_TP) if self.write else (DST_TP, SRC_TP)
        self.prepare_slices()

    def prepare_slices(self) -> None:
        """Build the contender's own lists for `request`; the target has nothing to do."""

    def check_slices(self, salt: int) -> int:
        """Return how many slices are wrong on the destination after a run."""
        return self.request.count_wrong(self.buffer, salt)
