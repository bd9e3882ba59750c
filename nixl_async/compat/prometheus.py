"""Telemetry for Prometheus: one HTTP endpoint for all agents of the process, with the names of NIXL's own series.

The port is NIXL_TELEMETRY_PROMETHEUS_PORT (9090), on all addresses, or with NIXL_TELEMETRY_PROMETHEUS_LOCAL on the loopback address
only. Where another process has the port, this one goes without (src/plugins/telemetry/prometheus of ai-dynamo/nixl).
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterator, Sequence

from nixl_async.compat.log import get_logger
from nixl_async.compat.settings import number, setting, switch
from nixl_async.compat.telemetry import (
    DEREGISTERED,
    DROPPED,
    EVENTS,
    POST_TIME,
    REGISTERED,
    RX_BYTES,
    RX_REQUESTS,
    TX_BYTES,
    TX_REQUESTS,
    XFER_TIME,
    Event,
)
from nixl_async.errors import ConfigurationError

logger = get_logger(__name__)

PORT_VARIABLE, LOCAL_VARIABLE = "NIXL_TELEMETRY_PROMETHEUS_PORT", "NIXL_TELEMETRY_PROMETHEUS_LOCAL"
BUCKETS_VARIABLE = "NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US"
PORT = 9090
BUCKETS_US = (10, 25, 50, 100, 250, 500, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5, 5e5, 1e6, 5e6, 1e7)
MAX_HEAD_NBYTES = 16 << 10
ASK_SECONDS = 5.0
# By event: the counter, the gauge of the last value, the histogram; and what they are of.
_SERIES = {
    TX_BYTES: ("agent_tx_bytes_total", "agent_tx_last_bytes", "", "Bytes that the agent sent"),
    RX_BYTES: ("agent_rx_bytes_total", "agent_rx_last_bytes", "", "Bytes that the agent received"),
    TX_REQUESTS: ("agent_tx_requests_num_total", "", "", "Requests that sent"),
    RX_REQUESTS: ("agent_rx_requests_num_total", "", "", "Requests that received"),
    REGISTERED: ("agent_memory_registered_total", "agent_memory_registered_last_bytes", "", "Bytes registered"),
    DEREGISTERED: ("agent_memory_deregistered_total", "agent_memory_deregistered_last_bytes", "", "Bytes deregistered"),
    XFER_TIME: ("agent_xfer_time_total", "agent_xfer_time", "agent_xfer_time_us", "Microseconds from a post to its end"),
    POST_TIME: (
        "agent_xfer_post_time_total",
        "agent_xfer_post_time",
        "agent_xfer_post_time_us",
        "Microseconds that a post took",
    ),
    DROPPED: ("agent_telemetry_events_dropped_total", "", "", "Events for which there was no room"),
}
_ERRORS = {kind: name.removeprefix("agent_err_") for kind, name in enumerate(EVENTS) if name.startswith("agent_err_")}
_ERROR_FAMILY = "agent_errors_total"


class Prometheus:
    """One agent's series."""

    _endpoint: _Endpoint | None = None

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self._buckets = _buckets()
        self.totals = dict.fromkeys((*_SERIES, *_ERRORS), 0)
        self.last: dict[int, int] = {}
        self.counts = {kind: [0] * (len(self._buckets) + 1) for kind, series in _SERIES.items() if series[2]}

    async def open(self) -> None:
        """Join the process's endpoint; the first opens it."""
        endpoint = Prometheus._endpoint
        if endpoint is None:
            endpoint = Prometheus._endpoint = _Endpoint()
        await endpoint.join(self)

    def export(self, events: Sequence[Event]) -> None:
        """Add events up."""
        for kind, value in events:
            self.totals[kind] += value
            self.last[kind] = value
            if kind in self.counts:
                at = next((i for i, most in enumerate(self._buckets) if value <= most), len(self._buckets))
                self.counts[kind][at] += 1

    async def aclose(self) -> None:
        """Leave the endpoint; the last closes it."""
        endpoint = Prometheus._endpoint
        if endpoint is not None and await endpoint.leave(self):
            Prometheus._endpoint = None

    def lines(self, kind: int, host: str) -> Iterator[tuple[str, str, str]]:
        """Yield the family, its type and a line, for each series of an event."""
        labels = f'hostname="{_escape(host)}",agent_name="{_escape(self.agent)}"'
        if kind in _ERRORS:
            yield _ERROR_FAMILY, "counter", f'{_ERROR_FAMILY}{{{labels},status="{_ERRORS[kind]}"}} {self.totals[kind]}'
            return
        counter, gauge, histogram, _ = _SERIES[kind]
        yield counter, "counter", f"{counter}{{{labels}}} {self.totals[kind]}"
        if gauge:
            yield gauge, "gauge", f"{gauge}{{{labels}}} {self.last.get(kind, 0)}"
        if histogram:
            below = 0
            for most, count in zip((*self._buckets, "+Inf"), self.counts[kind], strict=True):
                below += count
                bound = most if isinstance(most, str) else f"{most:g}"
                yield histogram, "histogram", f'{histogram}_bucket{{{labels},le="{bound}"}} {below}'
            yield histogram, "histogram", f"{histogram}_sum{{{labels}}} {self.totals[kind]}"
            yield histogram, "histogram", f"{histogram}_count{{{labels}}} {below}"


class _Endpoint:
    def __init__(self) -> None:
        self._agents: list[Prometheus] = []
        self._server: asyncio.Server | None = None
        self._lock = asyncio.Lock()
        self._asking: set[asyncio.Task[None]] = set()

    async def join(self, agent: Prometheus) -> None:
        async with self._lock:
            self._agents.append(agent)
            if self._server is None:
                port = number(PORT_VARIABLE, PORT)
                host = "127.0.0.1" if switch(LOCAL_VARIABLE) else "0.0.0.0"
                try:
                    self._server = await asyncio.start_server(self._serve, host, port)
                except OSError as error:
                    logger.warning("telemetry of %s goes to nobody: %s:%d: %s", agent.agent, host, port, error)

    async def leave(self, agent: Prometheus) -> bool:
        async with self._lock:
            self._agents.remove(agent)
            if self._agents:
                return False
            if self._server is not None:
                self._server.close()
            for task in list(self._asking):
                task.cancel()
            await asyncio.gather(*self._asking, return_exceptions=True)
            return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                found = head.split(b" ")[:2] == [b"GET", b"/metrics"]
                body = self._text().encode() if found else b"there is only /metrics\n"
                status = b"200 OK" if found else b"404 Not Found"
                writer.write(
                    b"HTTP/1.1 %b\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            self._asking.discard(task)
            writer.close()

    def _text(self) -> str:
        host = socket.gethostname()
        lines: list[str] = []
        seen: set[str] = set()
        for kind in (*_SERIES, *_ERRORS):
            families: dict[tuple[str, str], list[str]] = {}
            for agent in self._agents:
                for family, type_, line in agent.lines(kind, host):
                    families.setdefault((family, type_), []).append(line)
            for (family, type_), found in families.items():
                if family not in seen:
                    seen.add(family)
                    what = "Errors by their status" if kind in _ERRORS else _SERIES[kind][3]
                    lines += [f"# HELP {family} {what}", f"# TYPE {family} {type_}"]
                lines += found
        return "\n".join(lines) + "\n"


def _buckets() -> tuple[float, ...]:
    given = setting(BUCKETS_VARIABLE)
    if not given:
        return BUCKETS_US
    try:
        found = tuple(float(one) for one in given.split(","))
    except ValueError:
        found = ()
    if not found or found[0] <= 0 or any(b <= a for a, b in itertools.pairwise(found)):
        raise ConfigurationError(
            f"{BUCKETS_VARIABLE} is {given!r}; it must be growing numbers above 0, with commas between them"
        )
    return found


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
