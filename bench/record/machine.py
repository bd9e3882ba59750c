"""What else the machine did while something was measured, by the kernel's own counts."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_STAT = Path("/proc/stat")
_USER, _NICE, _SYSTEM, _STEAL = 0, 1, 2, 7


class Meter:
    """Counts CPU time from its making on: ours is that of this process and of all its children that have ended."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._counts, self._own = _counts(), _own_seconds()

    def read(self) -> dict[str, float]:
        """Return the load before and after, and shares of the machine's CPU time: other processes', and the hypervisor's."""
        counts = [after - before for before, after in zip(self._counts, _counts(), strict=True)]
        total = sum(counts) or 1.0
        # Interrupts are left out: much of their work, such as loopback's, is ours and nobody's by name.
        busy = counts[_USER] + counts[_NICE] + counts[_SYSTEM]
        others = max(0.0, busy - (_own_seconds() - self._own))
        return {
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others_cpu": round(others / total, 4),
            "stolen_cpu": round(counts[_STEAL] / total, 4),
        }


def _counts() -> list[float]:
    ticks = os.sysconf("SC_CLK_TCK")
    # The last two are counted in the first two already.
    return [int(one) / ticks for one in _STAT.read_text().split("\n", 1)[0].split()[1:9]]


def _own_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def available_nbytes() -> int:
    """Return how many bytes of memory can be taken without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
