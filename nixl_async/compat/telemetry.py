"""What an agent did, for others to read, as NIXL's agents tell it: NIXL_TELEMETRY_* say what is told, how often, and to whom.

The exporters are NIXL's BUFFER (a ring in a file, NIXL_TELEMETRY_DIR) and prometheus; the others, `prometheus_mp` and `doca`, are
named in a warning and export nothing. Where there is no exporter, telemetry is what `getXferTelemetry` returns, and costs nothing
(src/core/telemetry of ai-dynamo/nixl).
"""

from __future__ import annotations

import asyncio
import fnmatch
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nixl_async.compat.engine import ENGINE
from nixl_async.compat.errors import STATUS
from nixl_async.compat.log import get_logger
from nixl_async.compat.settings import number, setting
from nixl_async.errors import ConfigurationError, NixlError

logger = get_logger(__name__)

EVENTS = (
    "agent_tx_bytes",
    "agent_rx_bytes",
    "agent_tx_requests_num",
    "agent_rx_requests_num",
    "agent_memory_registered",
    "agent_memory_deregistered",
    "agent_xfer_time",
    "agent_xfer_post_time",
    "agent_err_not_posted",
    "agent_err_invalid_param",
    "agent_err_backend",
    "agent_err_not_found",
    "agent_err_mismatch",
    "agent_err_not_allowed",
    "agent_err_repost_active",
    "agent_err_unknown",
    "agent_err_not_supported",
    "agent_err_remote_disconnect",
    "agent_err_canceled",
    "agent_err_no_telemetry",
    "agent_telemetry_events_dropped",
)
"""What there is to tell, by NIXL's numbers: bytes and requests sent (tx: WRITE) and received (rx: READ), times in microseconds."""
_NUMBERS = {name: number for number, name in enumerate(EVENTS)}
TX_BYTES, RX_BYTES, TX_REQUESTS, RX_REQUESTS, REGISTERED, DEREGISTERED, XFER_TIME, POST_TIME = range(8)
DROPPED = _NUMBERS["agent_telemetry_events_dropped"]
ERRORS = {kind: _NUMBERS[f"agent_err_{text.removeprefix('NIXL_ERR_').lower()}"] for kind, text in STATUS.items()}
"""The event that counts each exception."""

DIRECTORY_VARIABLE, EXPORTER_VARIABLE = "NIXL_TELEMETRY_DIR", "NIXL_TELEMETRY_EXPORTER"
SIZE_VARIABLE, INTERVAL_VARIABLE = "NIXL_TELEMETRY_BUFFER_SIZE", "NIXL_TELEMETRY_RUN_INTERVAL"
METRICS_VARIABLE = "NIXL_TELEMETRY_ENABLED_METRICS"
SIZE, INTERVAL_MS = 4096, 100
VERSION = 4
"""The version of the ring's layout (TELEMETRY_VERSION in src/core/telemetry/telemetry_event.h)."""

Event = tuple[int, int]


class Exporter(Protocol):
    """Takes events: pairs of what happened and a value. Called on the engine's loop."""

    async def open(self) -> None:
        """Make ready."""

    def export(self, events: Sequence[Event]) -> None:
        """Take what happened."""

    async def aclose(self) -> None:
        """Tell nothing more."""


class Ring:
    """A ring of events in a file that other processes map, such as NIXL's `telemetry_reader`; full, it takes no more."""

    def __init__(self, path: Path, size: int) -> None:
        if size & (size - 1):
            raise ConfigurationError(f"{SIZE_VARIABLE} is {size}; it must be a power of 2")
        self._path, self._size = path, size
        self._map: mmap.mmap | None = None
        self._words: memoryview | None = None

    async def open(self) -> None:
        """Make the file, or begin anew in the one that is there.

        Raises:
            ConfigurationError: it cannot be made.
        """
        nbytes = 40 + 16 * self._size
        try:
            fd = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(fd, nbytes)
                self._map = mmap.mmap(fd, nbytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigurationError(f"telemetry cannot be written to {str(self._path)!r}: {error}") from error
        # Read and written in whole words, because the reader is another process.
        self._words = memoryview(self._map).cast("Q")
        self._words[0] = self._words[1] = 0
        self._words[3], self._words[4] = self._size, self._size - 1
        self._words[2] = VERSION << 32 | VERSION

    def export(self, events: Sequence[Event]) -> None:
        """Append events, as far as there is room."""
        if self._words is None:
            return
        at = self._words[0]
        for kind, value in events:
            following = (at + 1) & (self._size - 1)
            if following == self._words[1]:
                break
            self._words[5 + 2 * at], self._words[6 + 2 * at] = kind, value
            at = self._words[0] = following

    async def aclose(self) -> None:
        """Leave the file to its readers."""
        if self._words is not None and self._map is not None:
            self._words.release()
            self._map.close()
            self._words = self._map = None


class Telemetry:
    """Collects events on any thread, and hands them to an exporter every now and then, while there are any."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._most = number(SIZE_VARIABLE, SIZE, 1)
        self._seconds = number(INTERVAL_VARIABLE, INTERVAL_MS, 1) / 1000
        self._wanted = _wanted()
        self._lock = threading.Lock()
        self._pending: list[Event] = []
        self._dropped = 0
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Open the exporter."""
        await self._exporter.open()

    async def aclose(self) -> None:
        """Hand over what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        await self._exporter.aclose()

    def add(self, *events: Event) -> None:
        """Take events: all of them, or, where there is no room, none."""
        kept = [event for event in events if self._wanted[event[0]]]
        if not kept:
            return
        with self._lock:
            first = not self._pending and not self._dropped
            if len(self._pending) + len(kept) <= self._most:
                self._pending += kept
            else:
                self._dropped += len(kept)
        if first:
            ENGINE.call(self._arm)

    def transferred(self, put: bool, nbytes: int, post_us: int, took_us: int) -> None:
        """Take a transfer that is done."""
        kinds = (TX_BYTES, TX_REQUESTS) if put else (RX_BYTES, RX_REQUESTS)
        self.add((POST_TIME, post_us), (XFER_TIME, took_us), (kinds[0], nbytes), (kinds[1], 1))

    def failed(self, error: NixlError) -> None:
        """Count an error."""
        if (kind := ERRORS.get(type(error))) is not None:
            self.add((kind, 1))

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._flush)

    def _flush(self) -> None:
        self._timer = None
        with self._lock:
            events, self._pending = self._pending, []
            dropped, self._dropped = self._dropped, 0
        if dropped and self._wanted[DROPPED]:
            events.append((DROPPED, dropped))
        self._exporter.export(events)


def _wanted() -> list[bool]:
    patterns = [one.strip() for one in (setting(METRICS_VARIABLE) or "").split(",") if one.strip()]
    if not patterns:
        return [True] * len(EVENTS)
    for one in patterns:
        if not fnmatch.filter(EVENTS, one):
            logger.warning("%s: %r is none of %s", METRICS_VARIABLE, one, ", ".join(EVENTS))
    return [any(fnmatch.fnmatchcase(name, one) for one in patterns) for name in EVENTS]


def open_telemetry(agent: str) -> Telemetry | None:
    """Return what exports an agent's telemetry by the settings; `None` if it goes nowhere.

    Raises:
        ConfigurationError: a setting makes no sense.
    """
    directory = setting(DIRECTORY_VARIABLE)
    exporter = setting(EXPORTER_VARIABLE) or ("BUFFER" if directory else "NOP")
    if exporter == "BUFFER":
        if not directory:
            raise ConfigurationError(f"{EXPORTER_VARIABLE} is BUFFER: set {DIRECTORY_VARIABLE} to a directory")
        return Telemetry(Ring(Path(directory) / agent, number(SIZE_VARIABLE, SIZE, 1)))
    if exporter == "prometheus":
        from nixl_async.compat.prometheus import Prometheus

        return Telemetry(Prometheus(agent))
    if exporter != "NOP":
        logger.warning("%s is %r: only BUFFER, prometheus and NOP export here", EXPORTER_VARIABLE, exporter)
    return None
