"""OpenTelemetry spans of an agent's transfers, and trace contexts that travel with notifications (extra `tracing`).

`tracing.instrument(agent)` makes a span of each transfer, a child of the span that is current where it is submitted, with its
stages as events. A notification carries the context it belongs to (W3C, https://www.w3.org/TR/trace-context/) to peers of this
library; there `with tracing.attached(notification):` goes on with the same trace. Stock NIXL agents get the notification alone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nixl_async.backend import Op
from nixl_async.counters import LOCAL, RX, TX, direction
from nixl_async.descriptors import Plan
from nixl_async.errors import ConfigurationError, MissingDependency
from nixl_async.transfer import TrafficClass, TransferRecord, TransferState
from nixl_async.wire import MAX_CONTEXT_NBYTES

try:
    from opentelemetry import context as otel
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    from nixl_async.spans import Ended, Made, Spans
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "opentelemetry":
        raise
    raise MissingDependency("tracing needs OpenTelemetry: pip install 'nixl-async[tracing]'") from error

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer, TracerProvider

    from nixl_async.agent import Agent

_NAMES = {TX: "nixl_async.write", RX: "nixl_async.read", LOCAL: "nixl_async.copy"}
_W3C = TraceContextTextMapPropagator()
logger = logging.getLogger("nixl_async.tracing")


class Traced(Protocol):
    """What came from a peer with a trace context: a `Notification`, or an `Incoming` whose producer has come."""

    @property
    def trace(self) -> bytes:
        """The context, as it travelled."""


@dataclass(slots=True, eq=False)
class _Open:
    """A transfer that is not final: where it was submitted, when its first op began and its last one ended, by the loop's clock."""

    parent: Context
    first: float | None = None
    last: float | None = None
    n_ops: int = 0


class Instrumentation:
    """What makes an agent's spans; `uninstrument` ends it. `with instrument(agent):` does so too."""

    def __init__(self, agent: Agent, tracer: Tracer) -> None:
        self._agent, self._tracer, self._spans = agent, tracer, Spans(tracer)
        self._open: dict[int, _Open] = {}
        self._finished: dict[int, Made] = {}
        # What was copied at once, whose notification may follow: the plan's identity, and its span.
        self._last: tuple[int, Made] | None = None

    def uninstrument(self) -> None:
        """Make no more spans; transfers on their way get none. Idempotent."""
        self._agent._observers.remove(self)
        if self._agent._observers.trace == self.trace:
            self._agent._observers.trace = None
        for span in self._finished.values():
            span.end()
        self._finished.clear()

    def __enter__(self) -> Instrumentation:
        return self

    def __exit__(self, *exc: object) -> None:
        self.uninstrument()

    # Observer.

    def submitted(self, record: TransferRecord) -> None:
        """Keep the context of whoever submits a transfer."""
        self._open[record.id] = _Open(otel.get_current())

    def started(self, backend: str, op: Op) -> None:
        """Note when an op was given to a backend."""
        now = self._agent._loop.time()
        for transfer_id, _, _ in op.parts:
            opened = self._open.get(transfer_id)
            if opened is not None:
                opened.n_ops += 1
                if opened.first is None:
                    opened.first = now

    def ended(self, backend: str, op: Op, error: BaseException | None) -> None:
        """Note when it ended."""
        now = self._agent._loop.time()
        for transfer_id, _, _ in op.parts:
            opened = self._open.get(transfer_id)
            if opened is not None:
                opened.last = now

    def finished(self, record: TransferRecord) -> None:
        """Make the span of a transfer that is final, before its notification is sent."""
        opened = self._open.pop(record.id, None)
        if opened is None:
            return
        offset = time.time_ns() - int(self._agent._loop.time() * 1e9)
        more: dict[str, Any] = {"nixl_async.state": record.state.value, "nixl_async.ops": opened.n_ops}
        if record.resent:
            more["nixl_async.resent"] = record.resent
        place = record.peer, record.routes[0], record.traffic_class
        # What an error is told of has to be a span that can still be changed.
        failed = record.error if record.state is TransferState.FAILED else None
        start = self._spans.start if failed is None else self._tracer.start_span
        span = self._start(start, record.plan, *place, opened.parent, offset + int(record.submitted * 1e9), more)
        self._finished[record.id] = span
        if not span.is_recording():
            return
        for name, at in (("dispatched", record.started), ("wire", opened.first), ("wire done", opened.last)):
            if at is not None:
                span.add_event(name, timestamp=offset + int(at * 1e9))
        if failed is not None and not isinstance(span, Ended):
            span.record_exception(failed)
            span.set_status(trace.StatusCode.ERROR, f"{type(failed).__name__}: {failed}"[:256])

    def resolved(self, record: TransferRecord) -> None:
        """End the span: the notification is on its way and whoever waited goes on."""
        span = self._finished.pop(record.id, None)
        if span is not None:
            span.end()

    def copied(self, plan: Plan, peer: str | None, route: str, traffic_class: TrafficClass, seconds: float) -> None:
        """Make the span of a transfer that was copied at once."""
        now = time.time_ns()
        at = now - int(seconds * 1e9)
        more = {"nixl_async.inline": True}
        span = self._start(self._spans.start, plan, peer, route, traffic_class, otel.get_current(), at, more)
        span.end(now)
        self._last = id(plan), span

    def trace(self, subject: object) -> bytes:
        """Return the context that goes with a notification; see `Observers`."""
        if isinstance(subject, TransferRecord):
            span = self._finished.get(subject.id)
        else:
            last, self._last = self._last, None
            span = last[1] if last is not None and last[0] == id(subject) else None
        if isinstance(span, Ended):
            span = trace.NonRecordingSpan(span.get_span_context())
        carrier: dict[str, str] = {}
        try:
            _W3C.inject(carrier, None if span is None else trace.set_span_in_context(span, otel.get_current()))
        except Exception:
            logger.exception("a trace context cannot be told; the notification goes without")
            return b""
        if not carrier:
            return b""
        encoded = json.dumps(carrier, separators=(",", ":")).encode()
        if len(encoded) > MAX_CONTEXT_NBYTES:
            carrier.pop("tracestate", None)
            encoded = json.dumps(carrier, separators=(",", ":")).encode()
        return encoded

    def _start(
        self,
        start: Callable[..., Made],
        plan: Plan,
        peer: str | None,
        route: str,
        traffic_class: TrafficClass,
        parent: Context,
        at: int,
        more: dict[str, Any],
    ) -> Made:
        attributes = {
            "nixl_async.agent": self._agent.name,
            "nixl_async.peer": peer or "",
            "nixl_async.backend": route,
            "nixl_async.class": traffic_class.value,
            "nixl_async.bytes": plan.nbytes,
            "nixl_async.segments": len(plan.lengths),
            **more,
        }
        kind = trace.SpanKind.INTERNAL if peer is None else trace.SpanKind.CLIENT
        return start(_NAMES[direction(plan, peer)], parent, kind, attributes, start_time=at)


def instrument(agent: Agent, tracer_provider: TracerProvider | None = None) -> Instrumentation:
    """Make a span of each transfer of an agent from here on; `tracer_provider` is the process's own unless another is given.

    Spans are called nixl_async.write, .read or .copy. Their events are the stages: dispatched (its turn has come), wire (a backend
    has its first op), wire done; they end when its notification is on its way. A span that is recorded costs some tens of
    microseconds, which is several copies of a small page: sample where there are many of those.

    Raises:
        ConfigurationError: the agent is instrumented already.
    """
    observers = agent._observers
    if observers.trace is not None:
        raise ConfigurationError(f"agent {agent.name!r} is instrumented already; call uninstrument() of that first")
    made = Instrumentation(agent, trace.get_tracer("nixl_async", tracer_provider=tracer_provider))
    observers.add(made)
    observers.trace = made.trace
    return made


def context(of: Traced) -> Context:
    """Return the context that a notification or an incoming push belongs to at its sender; an empty one if it came without."""
    try:
        carrier = json.loads(of.trace) if of.trace else {}
    except (ValueError, RecursionError):
        carrier = {}
    if not isinstance(carrier, dict) or not all(isinstance(value, str) for value in carrier.values()):
        carrier = {}
    return _W3C.extract(carrier, otel.Context())


@contextmanager
def attached(to: Traced) -> Iterator[None]:
    """Let what is done in the block belong to the trace of a notification or an incoming push, below its sender's span."""
    token = otel.attach(context(to))
    try:
        yield
    finally:
        otel.detach(token)
