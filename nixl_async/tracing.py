"""OpenTelemetry spans of an agent's transfers, and trace contexts that travel with notifications (extra `tracing`).

`tracing.instrument(agent)` makes a span of each transfer, a child of the span that is current where it is submitted, with its
stages as events. A notification carries the context it belongs to (W3C, https://www.w3.org/TR/trace-context/) to peers of this
library; there `with tracing.attached(notification):` goes on with the same trace. Stock NIXL agents get the notification alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

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
_INTERNAL, _CLIENT = trace.SpanKind.INTERNAL, trace.SpanKind.CLIENT
_copy_context, _time_ns = contextvars.copy_context, time.time_ns
_W3C = TraceContextTextMapPropagator()
logger = logging.getLogger("nixl_async.tracing")


class Traced(Protocol):
    """What came from a peer with a trace context: a `Notification`, or an `Incoming` whose producer has come."""

    @property
    def trace(self) -> bytes:
        """The context, as it travelled."""


_INLINE = {"nixl_async.inline": True}
BATCH = 32
"""So many spans are made together: what makes them is then in the processor's caches, where a large copy leaves nothing of it."""
BATCH_SECONDS = 0.05
"""How long the first of them waits at most."""


@dataclass(slots=True, eq=False)
class _Open:
    """A transfer that is not final: where it was submitted, when its first op began and its last one ended, by the loop's clock."""

    parent: Context
    first: float | None = None
    last: float | None = None
    n_ops: int = 0


# Not the plan itself: another one takes its memory at once, which is in the caches.
_What: TypeAlias = tuple[str, int, int]
"""Of a plan: which way its bytes go, how many they are, and in how many segments."""


@dataclass(slots=True, eq=False)
class _Over:
    """What a span is made of: times are nanoseconds since the epoch; `span` is there already if its context has been told."""

    what: _What
    peer: str | None
    route: str
    traffic_class: TrafficClass
    parent: Context
    start: int
    end: int = 0
    more: dict[str, Any] = field(default_factory=_INLINE.copy)
    events: Sequence[tuple[str, int]] = ()
    error: BaseException | None = None
    span: Made | None = None


_Copied: TypeAlias = tuple[_What, str | None, str, TrafficClass, float, contextvars.Context, int]
"""What was copied at once: much as `copied` is told it, the caller's context, and when it ended. Much of it comes in a second."""


class Instrumentation:
    """What makes an agent's spans; `uninstrument` ends it. `with instrument(agent):` does so too."""

    def __init__(self, agent: Agent, tracer: Tracer) -> None:
        self._agent, self._tracer, self._spans = agent, tracer, Spans(tracer)
        self._open: dict[int, _Open] = {}
        self._finished: dict[int, _Over] = {}
        self._waiting: list[_Over | _Copied] = []
        # The plan whose copy is the last of those.
        self._last = 0
        self._timer: asyncio.TimerHandle | None = None

    def uninstrument(self) -> None:
        """Make no more spans; transfers on their way get none. Idempotent."""
        self._agent._observers.remove(self)
        if self._agent._observers.trace == self.trace:
            self._agent._observers.trace = None
        for over in self._finished.values():
            over.end = time.time_ns()
        self._waiting.extend(self._finished.values())
        self._finished.clear()
        self.flush()

    def flush(self) -> None:
        """Hand on the spans of all transfers that have ended; it is done every 50 ms at the latest."""
        waiting, self._waiting = self._waiting, []
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        for one in waiting:
            try:
                if isinstance(one, tuple):
                    what, peer, route, traffic_class, seconds, caller, end = one
                    self._start(
                        what, peer, route, traffic_class, caller.run(otel.get_current), end - int(seconds * 1e9), _INLINE
                    ).end(end)
                else:
                    self._made(one).end(one.end)
            except Exception:
                logger.exception("a span is lost")

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
        """Note what its span will say, before its notification is sent."""
        opened = self._open.pop(record.id, None)
        if opened is None:
            return
        offset = time.time_ns() - int(self._agent._loop.time() * 1e9)
        start = offset + int(record.submitted * 1e9)
        over = _Over(
            _what(record.plan, record.peer), record.peer, record.routes[0], record.traffic_class, opened.parent, start
        )
        over.more = {"nixl_async.state": record.state.value, "nixl_async.ops": opened.n_ops}
        if record.resent:
            over.more["nixl_async.resent"] = record.resent
        stages = ("dispatched", record.started), ("wire", opened.first), ("wire done", opened.last)
        over.events = [(name, offset + int(at * 1e9)) for name, at in stages if at is not None]
        if record.state is TransferState.FAILED:
            over.error = record.error
        self._finished[record.id] = over

    def resolved(self, record: TransferRecord) -> None:
        """End the span: the notification is on its way and whoever waited goes on."""
        over = self._finished.pop(record.id, None)
        if over is not None:
            over.end = time.time_ns()
            self._next().append(over)

    def copied(self, plan: Plan, peer: str | None, route: str, traffic_class: TrafficClass, seconds: float) -> None:
        """Note what was copied at once."""
        # No function of Python's is called that need not be: the copy has left none in the caches.
        waiting = self._waiting
        if len(waiting) >= BATCH or self._timer is None:
            waiting = self._next()
        what = (
            _what(plan, None)
            if peer is None
            else (RX if plan.dst.regions[0].peer is None else TX, plan.nbytes, len(plan.lengths))
        )
        waiting.append((what, peer, route, traffic_class, seconds, _copy_context(), _time_ns()))
        self._last = id(plan)

    def closed(self) -> None:
        """Hand on what is left: the loop may end."""
        self.flush()

    def trace(self, subject: object) -> bytes:
        """Return the context that goes with a notification; see `Observers`."""
        over = None
        if isinstance(subject, TransferRecord):
            over = self._finished.get(subject.id)
        elif id(subject) == self._last and self._waiting and isinstance(last := self._waiting[-1], tuple):
            # It was copied a moment ago, and its notification follows.
            what, peer, route, traffic_class, seconds, caller, end = last
            over = self._waiting[-1] = _Over(
                what, peer, route, traffic_class, caller.run(otel.get_current), end - int(seconds * 1e9), end
            )
        carrier: dict[str, str] = {}
        try:
            if over is None:
                _W3C.inject(carrier, None)
            else:
                span = trace.NonRecordingSpan(self._made(over).get_span_context())
                _W3C.inject(carrier, trace.set_span_in_context(span, otel.get_current()))
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

    def _next(self) -> list[_Over | _Copied]:
        """Return the list for one span more; a full one is handed on before that, as the context of the last may be asked for."""
        if len(self._waiting) >= BATCH:
            self.flush()
        if self._timer is None:
            self._timer = self._agent._loop.call_later(BATCH_SECONDS, self.flush)
        return self._waiting

    def _made(self, over: _Over) -> Made:
        """Return the span, which lacks nothing but its end."""
        if over.span is not None:
            return over.span
        over.span = span = self._start(
            over.what,
            over.peer,
            over.route,
            over.traffic_class,
            over.parent,
            over.start,
            over.more,
            failed=over.error is not None,
        )
        if span.is_recording():
            for name, at in over.events:
                span.add_event(name, timestamp=at)
            if over.error is not None and not isinstance(span, Ended):
                span.record_exception(over.error)
                span.set_status(trace.StatusCode.ERROR, f"{type(over.error).__name__}: {over.error}"[:256])
        return span

    def _start(
        self,
        what: _What,
        peer: str | None,
        route: str,
        traffic_class: TrafficClass,
        parent: Context,
        start: int,
        more: dict[str, Any],
        *,
        failed: bool = False,
    ) -> Made:
        way, nbytes, segments = what
        attributes = {
            "nixl_async.agent": self._agent.name,
            "nixl_async.peer": peer or "",
            "nixl_async.backend": route,
            "nixl_async.class": traffic_class._value_,
            "nixl_async.bytes": nbytes,
            "nixl_async.segments": segments,
            **more,
        }
        kind = _INTERNAL if peer is None else _CLIENT
        name = _NAMES[way]
        if failed:
            # What is told of an error has to be a span that can still be changed.
            return self._tracer.start_span(name, parent, kind, attributes, start_time=start)
        return self._spans.start(name, parent, kind, attributes, start_time=start)


def _what(plan: Plan, peer: str | None) -> _What:
    return direction(plan, peer), plan.nbytes, len(plan.lengths)


def instrument(agent: Agent, tracer_provider: TracerProvider | None = None) -> Instrumentation:
    """Make a span of each transfer of an agent from here on; `tracer_provider` is the process's own unless another is given.

    Spans are called nixl_async.write, .read or .copy. Their events are the stages: dispatched (its turn has come), wire (a backend
    has its first op), wire done; they end when its notification is on its way. They are made together, 50 ms later at most, or when
    the agent closes or `uninstrument` is called: shut the provider down after that. `python -m bench tracing` says what they cost.

    Raises:
        ConfigurationError: the agent is instrumented already.
    """
    observers = agent._observers
    if observers.trace is not None:
        raise ConfigurationError(f"agent {agent.name!r} is instrumented already; call uninstrument() of that first")
    made = Instrumentation(agent, trace.get_tracer("nixl_async", tracer_provider=tracer_provider))
    observers.add(made, trusted=True)
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
