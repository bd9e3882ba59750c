"""Spans of what has ended already, made in one piece.

OpenTelemetry's SDK makes a span that can be changed while it is open, and copies it when it ends: together a third of the time in
which 1 MiB is copied. What has ended needs the copy alone (`python -m bench tracing`). Sampler, identifiers and processors are the
SDK's own; where one of them, or a limit, asks for a span that is open, the SDK makes it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanKind, Tracer

_RANDOM = 2
"""The flag of W3C Trace Context, level 2, that says a trace's identifier is random."""
_FLAGS = [TraceFlags(value) for value in range(4)]
_ENOUGH = 32
"""More attributes than a span of ours has, and more events."""


class Ended:
    """A sampled span that nobody changes but by events, until `end` hands it to the SDK's processors."""

    __slots__ = ("_attributes", "_context", "_events", "_kind", "_name", "_parent", "_sdk", "_start", "_tracer")

    def __init__(
        self,
        sdk: Any,
        tracer: Any,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        start: int,
    ) -> None:
        self._sdk, self._tracer = sdk, tracer
        self._name, self._context, self._parent, self._kind = name, context, parent, kind
        self._attributes, self._start = attributes, start
        self._events: list[Any] = []

    def get_span_context(self) -> SpanContext:
        """Return what identifies it."""
        return self._context

    def is_recording(self) -> bool:
        """Return True."""
        return True

    def add_event(self, name: str, *, timestamp: int) -> None:
        """Note that something happened, in nanoseconds since the epoch."""
        self._events.append(self._sdk.Event(name, {}, timestamp))

    def end(self, end_time: int | None = None) -> None:
        """Hand it to the processors, which may not be done twice."""
        tracer = self._tracer
        tracer.span_processor.on_end(
            self._sdk.ReadableSpan(
                self._name,
                self._context,
                self._parent,
                tracer.resource,
                self._attributes,
                self._events,
                (),
                self._kind,
                tracer.instrumentation_info,
                start_time=self._start,
                end_time=time.time_ns() if end_time is None else end_time,
                instrumentation_scope=tracer._instrumentation_scope,
            )
        )


Made: TypeAlias = "Span | Ended"


class Spans:
    """Makes spans by a tracer: `Ended` ones where that tracer is the SDK's own and nothing of it wants more."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer: Any = tracer
        self._sdk: Any = None
        self._ids: Any = getattr(tracer, "id_generator", None)
        self._processors: object = None
        self._quick = False
        if type(tracer).__module__ == "opentelemetry.sdk.trace" and _unlimited(tracer):
            from opentelemetry.sdk import trace as sdk

            self._sdk = sdk
            self._enabled = getattr(tracer, "_is_enabled", lambda: True)
            self._random = _RANDOM if getattr(self._ids, "is_trace_id_random", lambda: False)() else 0

    def start(self, name: str, parent: Context, kind: SpanKind, attributes: dict[str, Any], *, start_time: int) -> Made:
        """Return a span that began at `start_time`, nanoseconds since the epoch, and is over but for its events."""
        tracer = self._tracer
        if self._sdk is None or not self._enabled() or not self._unobserved():
            made: Span = tracer.start_span(name, parent, kind, attributes, start_time=start_time)
            return made
        ids = self._ids
        above: SpanContext | None = trace.get_current_span(parent).get_span_context()
        if above is None or not above.is_valid:
            above, trace_id, random = None, ids.generate_trace_id(), self._random
        else:
            trace_id, random = above.trace_id, above.trace_flags & _RANDOM
        result = tracer.sampler.should_sample(parent, trace_id, name, kind, attributes, ())
        decision = result.decision
        flags = _FLAGS[random | decision.is_sampled()]
        context = SpanContext(trace_id, ids.generate_span_id(), False, flags, result.trace_state)
        if not decision.is_recording():
            return NonRecordingSpan(context)
        return Ended(self._sdk, tracer, name, context, above, kind, result.attributes, start_time)

    def _unobserved(self) -> bool:
        """Whether no processor wants to see a span that begins or is about to end; another set of them is looked at again."""
        processors = getattr(self._tracer.span_processor, "_span_processors", None)
        if processors is not self._processors:
            self._processors = processors
            self._quick = processors is not None and _indifferent(processors, self._sdk.SpanProcessor)
        return self._quick


def _unlimited(tracer: Any) -> bool:
    """Whether neither the limits of spans nor the SDK's own metrics have to do with a span of ours."""
    limits = getattr(tracer, "_span_limits", None)
    if limits is None or os.environ.get("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED"):
        return False
    counts = limits.max_span_attributes, limits.max_events
    return limits.max_span_attribute_length is None and all(count is None or count >= _ENOUGH for count in counts)


def _indifferent(processors: Iterable[object], plain: type) -> bool:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    for hook in ("on_start", "_on_ending"):
        nothing = {getattr(one, hook, None) for one in (plain, BatchSpanProcessor, SimpleSpanProcessor)}
        if not all(getattr(type(one), hook, None) in nothing for one in processors):
            return False
    return True
