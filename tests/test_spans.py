"""Spans made in one piece are those that OpenTelemetry's SDK makes, and where it wants its own, it makes them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as OpenSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler, SamplingResult

from nixl_async.spans import Ended, Made, Spans

ATTRIBUTES = {"nixl_async.peer": "b", "nixl_async.bytes": 1 << 40, "nixl_async.inline": True}
START, END = 1_000_000_000, 2_000_000_000
EVENTS = [("dispatched", START + 1), ("wire", START + 2)]
CLIENT = trace.SpanKind.CLIENT


class Watching(SpanProcessor):
    """Counts the spans that begin and adds an attribute, as processors for baggage do."""

    def __init__(self) -> None:
        self.begun = 0

    def on_start(self, span: OpenSpan, parent_context: otel.Context | None = None) -> None:
        self.begun += 1
        span.set_attribute("watched", True)


class Ending(SpanProcessor):
    """Counts the spans that end."""

    def __init__(self) -> None:
        self.ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        self.ended += 1


class AboutToEnd(Ending):
    """Wants to change a span when it ends; experimental in the SDK."""

    def _on_ending(self, span: OpenSpan) -> None:
        span.set_attribute("seen", True)


class Recorded(Sampler):
    """Records and does not sample, with attributes of its own."""

    def should_sample(
        self, parent_context: Any, trace_id: int, name: str, kind: Any = None, attributes: Any = None, *more: Any, **named: Any
    ) -> SamplingResult:
        return SamplingResult(Decision.RECORD_ONLY, {"sampler": name})

    def get_description(self) -> str:
        return "recorded"


def provided(*processors: SpanProcessor, **options: Any) -> tuple[TracerProvider, InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "prefill"}), shutdown_on_exit=False, **options)
    for one in (SimpleSpanProcessor(kept), *processors):
        provider.add_span_processor(one)
    return provider, kept


def made(spans: Spans, parent: otel.Context | None = None) -> Made:
    span = spans.start(
        "nixl_async.write", otel.Context() if parent is None else parent, CLIENT, dict(ATTRIBUTES), start_time=START
    )
    for name, at in EVENTS:
        span.add_event(name, timestamp=at)
    span.end(END)
    return span


def comparable(span: ReadableSpan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(span.to_json())
    del found["context"]["span_id"]
    if found["parent_id"] is None:
        del found["context"]["trace_id"]
    return found


@pytest.mark.parametrize("below", [False, True], ids=["a root", "a child"])
def test_it_is_the_span_that_the_sdk_makes(below: bool) -> None:
    provider, kept = provided()
    tracer = provider.get_tracer("nixl_async", "1.0", attributes={"scope": 1})
    parent = trace.set_span_in_context(tracer.start_span("request"), otel.Context()) if below else otel.Context()
    quick = made(Spans(tracer), parent)
    assert isinstance(quick, Ended)
    assert quick.is_recording()
    theirs = tracer.start_span("nixl_async.write", parent, CLIENT, dict(ATTRIBUTES), start_time=START)
    for name, at in EVENTS:
        theirs.add_event(name, timestamp=at)
    theirs.end(END)
    ours, other = kept.get_finished_spans()
    assert comparable(ours) == comparable(other)
    assert ours.get_span_context() == quick.get_span_context()
    assert (ours.context.trace_flags, ours.instrumentation_scope) == (other.context.trace_flags, other.instrumentation_scope)
    assert (ours.dropped_attributes, ours.dropped_events, ours.dropped_links) == (0, 0, 0)
    assert [event.attributes for event in ours.events] == [event.attributes for event in other.events]
    assert ours.context.span_id != other.context.span_id


def test_no_two_have_the_same_identifiers() -> None:
    provider, kept = provided()
    spans = Spans(provider.get_tracer("test"))
    for _ in range(100):
        made(spans)
    found = kept.get_finished_spans()
    assert len({span.context.span_id for span in found}) == len({span.context.trace_id for span in found}) == 100


def test_what_is_not_sampled_is_not_recorded() -> None:
    provider, kept = provided(sampler=ParentBased(ALWAYS_OFF))
    span = made(Spans(provider.get_tracer("test")))
    assert not span.is_recording()
    assert span.get_span_context().is_valid
    assert not span.get_span_context().trace_flags.sampled
    assert kept.get_finished_spans() == ()


def test_what_is_recorded_and_not_sampled_goes_to_processors_alone() -> None:
    ending = Ending()
    provider, kept = provided(ending, sampler=Recorded())
    span = made(Spans(provider.get_tracer("test")))
    assert isinstance(span, Ended)
    assert not span.get_span_context().trace_flags.sampled
    assert (ending.ended, kept.get_finished_spans()) == (1, ())


def test_a_sampler_chooses_the_attributes() -> None:
    seen: list[ReadableSpan] = []

    class Kept(Ending):
        def on_end(self, span: ReadableSpan) -> None:
            seen.append(span)

    provider, _ = provided(Kept(), sampler=Recorded())
    made(Spans(provider.get_tracer("test")))
    (span,) = seen
    assert dict(span.attributes or {}) == {"sampler": "nixl_async.write"}


def test_a_processor_that_wants_to_see_it_begin_does() -> None:
    watching = Watching()
    provider, kept = provided()
    spans = Spans(provider.get_tracer("test"))
    assert isinstance(made(spans), Ended)
    provider.add_span_processor(watching)
    assert not isinstance(made(spans), Ended)
    assert watching.begun == 1
    _, span = kept.get_finished_spans()
    assert (span.attributes or {})["watched"] is True


@pytest.mark.skipif(not hasattr(SpanProcessor, "_on_ending"), reason="this SDK has no processor that changes a span that ends")
def test_so_does_one_that_wants_to_see_it_end() -> None:
    # The first processor has exported it by then.
    about = AboutToEnd()
    provider, _ = provided(about)
    assert not isinstance(made(Spans(provider.get_tracer("test"))), Ended)
    assert about.ended == 1


def test_batches_are_no_reason() -> None:
    out = io.StringIO()
    batches = BatchSpanProcessor(ConsoleSpanExporter(out=out))
    provider, _ = provided(batches)
    assert isinstance(made(Spans(provider.get_tracer("test"))), Ended)
    provider.shutdown()
    assert json.loads(out.getvalue())["attributes"]["nixl_async.bytes"] == 1 << 40


@pytest.mark.parametrize(
    "limits", [SpanLimits(max_attribute_length=8), SpanLimits(max_span_attributes=2), SpanLimits(max_events=1)], ids=str
)
def test_limits_are_kept(limits: SpanLimits) -> None:
    provider, kept = provided(span_limits=limits)
    assert not isinstance(made(Spans(provider.get_tracer("test"))), Ended)
    assert len(kept.get_finished_spans()) == 1


def test_the_sdks_own_metrics_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    provider, _ = provided()
    assert not isinstance(made(Spans(provider.get_tracer("test"))), Ended)


def test_another_tracer_makes_its_own() -> None:
    span = made(Spans(trace.NoOpTracer()))
    assert not isinstance(span, Ended)
    assert not span.is_recording()


def test_a_disabled_sdk_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider, kept = provided()
    assert not made(Spans(provider.get_tracer("test"))).is_recording()
    assert kept.get_finished_spans() == ()
