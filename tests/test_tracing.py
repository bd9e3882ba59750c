"""Spans of transfers, and one trace over two processes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from nixl_async import Agent, ConfigurationError, LayerPlan, Notification, PeerLost, tracing
from nixl_async.wire import FrameType, encode_frame
from tests.agents import ROOT, TOKEN, agent_process, known, two_agents

NBYTES = 4 << 20
OTHER = """
import asyncio, json, sys
import numpy as np
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from nixl_async import Agent, tracing

async def main():
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    async with Agent("decode", token=sys.argv[1], backends=["tcp", "memory"]) as agent:
        memory = await agent.register(np.zeros(4 << 20, np.uint8), name="kv")
        copy = await agent.register(np.zeros(4 << 20, np.uint8), name="copy")
        arrivals = agent.notifications()
        with tracing.instrument(agent, provider):
            print(json.dumps(await agent.serve()), flush=True)
            for _ in range(3):
                with tracing.attached(await anext(arrivals)):
                    await agent.transfer(memory, copy)
    spans = kept.get_finished_spans()
    print(json.dumps([[f"{s.context.trace_id:032x}", f"{s.parent.span_id:016x}" if s.parent else None] for s in spans]))

asyncio.run(main())
"""


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def names(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


async def test_a_transfer_is_a_span_with_its_stages(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        tracer = provider.get_tracer("test")
        with tracing.instrument(a, provider), tracer.start_as_current_span("request") as request:
            await a.transfer(mine, peer.region("theirs"), traffic_class="latency")
            await a.transfer(peer.region("theirs")[:100], mine[:100])
        whole, written, read = exporter.get_finished_spans()
        assert (written.name, read.name, whole.name) == ("nixl_async.write", "nixl_async.read", "request")
        assert written.parent is not None
        assert written.parent.span_id == request.get_span_context().span_id
        assert read.parent is not None
        assert names(written) == ["dispatched", "wire", "wire done"]
        assert names(read) == []
        assert written.attributes is not None
        assert written.attributes["nixl_async.bytes"] == NBYTES
        assert written.attributes["nixl_async.peer"] == "b"
        assert written.attributes["nixl_async.backend"] == "tcp"
        assert written.attributes["nixl_async.class"] == "latency"
        assert written.attributes["nixl_async.state"] == "done"
        assert read.attributes is not None
        assert read.attributes["nixl_async.inline"] is True
        times = [written.start_time, *(event.timestamp for event in written.events), written.end_time]
        assert times == sorted(times, key=lambda at: at or 0)
        exporter.clear()
        await a.transfer(mine, peer.region("theirs"))
        assert exporter.get_finished_spans() == ()


async def test_what_fails_or_is_cancelled_says_so(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with tracing.instrument(a, provider):
            stopped = a.submit(mine, peer.region("theirs"), after=never)
            lost = a.submit(mine, peer.region("theirs"), after=never)
            stopped.cancel()
            with pytest.raises(asyncio.CancelledError):
                await stopped
            await a.disconnect("b")
            with pytest.raises(PeerLost):
                await lost
        first, second = exporter.get_finished_spans()
        assert names(first) == []
        assert (first.attributes or {})["nixl_async.state"] == "cancelled"
        assert first.status.status_code is trace.StatusCode.UNSET
        assert second.status.status_code is trace.StatusCode.ERROR
        assert "PeerLost" in (second.status.description or "")
        assert "exception" in names(second)


async def test_one_trace_goes_over_two_processes(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    command = [sys.executable, "-c", OTHER, TOKEN]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60), Agent("prefill", token=TOKEN, backends=["tcp"]) as agent:
            host, port = json.loads(await process.stdout.readline())
            peer = await agent.connect((host, port))
            mine = await agent.register(np.ones(NBYTES, np.uint8))
            tracer = provider.get_tracer("test")
            with tracing.instrument(agent, provider):
                # By the scheduler, copied at once, and alone.
                with tracer.start_as_current_span("first"):
                    await agent.transfer(mine, peer.region("kv"), notify=b"1")
                await agent.transfer(mine[:64], peer.region("kv")[:64], notify=b"2")
                with tracer.start_as_current_span("third"):
                    await agent.notify(peer, b"3")
            told = json.loads(await process.stdout.readline())
            await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    spans = exporter.get_finished_spans()
    writes = [span.context for span in spans if span.name == "nixl_async.write"]
    parents = [*writes, *(span.context for span in spans if span.name == "third")]
    assert told == [[f"{one.trace_id:032x}", f"{one.span_id:016x}"] for one in parents if one is not None]
    assert len({trace_id for trace_id, _ in told}) == 3


@pytest.mark.parametrize("seconds", [3600.0, tracing.BATCH_SECONDS], ids=["many", "few"])
async def test_spans_are_handed_on_together_and_soon(
    seconds: float, provider: TracerProvider, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "BATCH_SECONDS", seconds)
    many = tracing.BATCH if seconds == 3600 else 1
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(64, np.uint8), name="mine")
        await b.register(np.zeros(64, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        with tracing.instrument(a, provider) as made:
            before = time.time_ns()
            for _ in range(many):
                await a.transfer(mine, peer.region("theirs"))
            after = time.time_ns()
            if many > 1:
                assert exporter.get_finished_spans() == ()
                await a.transfer(mine, peer.region("theirs"))
            else:
                async with asyncio.timeout(60):
                    while not exporter.get_finished_spans():
                        await asyncio.sleep(0)
                assert made._timer is None
            found = exporter.get_finished_spans()
    assert len(found) == many
    ends = [span.end_time or 0 for span in found]
    assert before <= ends[0] <= ends[-1] <= after
    assert ends == sorted(ends)
    assert all((span.start_time or 0) < (span.end_time or 0) for span in found)


async def test_an_agent_that_closes_keeps_no_spans(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(64, np.uint8), name="mine")
        await b.register(np.zeros(64, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        made = tracing.instrument(a, provider)
        await a.transfer(mine, peer.region("theirs"))
        await a.aclose()
        assert [span.name for span in exporter.get_finished_spans()] == ["nixl_async.write"]
        made.uninstrument()


async def test_a_context_that_was_told_is_that_of_the_span(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        arrivals = b.notifications()
        told = []
        with tracing.instrument(a, provider):
            for nbytes in (64, NBYTES):
                # More than a batch of those that tell nothing are in between.
                for _ in range(tracing.BATCH - 1):
                    await a.transfer(mine[:nbytes], peer.region("theirs")[:nbytes])
                await a.transfer(mine[:nbytes], peer.region("theirs")[:nbytes], notify=b"x")
                context = trace.get_current_span(tracing.context(await anext(arrivals))).get_span_context()
                told.append((context.trace_id, context.span_id))
        spans = exporter.get_finished_spans()
        assert len(spans) == 2 * tracing.BATCH
        found = [(span.context.trace_id, span.context.span_id) for span in spans]
        assert all(found.count(one) == 1 for one in told)
        assert len(set(found)) == len(found)


async def test_a_processor_that_fails_loses_its_span_alone(provider: TracerProvider, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("full")

    provider.add_span_processor(Failing())
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(64, np.uint8), name="mine")
        memory = np.zeros(64, np.uint8)
        await b.register(memory, name="theirs")
        await known(a, peer, "theirs")
        with tracing.instrument(a, provider):
            await a.transfer(mine, peer.region("theirs"))
            await a.transfer(mine, peer.region("theirs"))
        assert memory.all()
    assert caplog.text.count("a span is lost") == 2


async def test_a_push_brings_the_trace_of_its_producer(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(NBYTES, np.uint8), name="mine")
        await b.register(np.zeros(NBYTES, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        plan = LayerPlan("request 7", [(mine, peer.region("theirs"))])
        tracer = provider.get_tracer("test")
        async with b.incoming("request 7") as incoming:
            assert incoming.trace == b""
            with tracing.instrument(a, provider), tracer.start_as_current_span("prefill") as prefill:
                async with a.push(peer, plan) as push:
                    push.ready(0)
            assert [layer async for layer in incoming.layers()] == [0]
            with tracing.attached(incoming), tracer.start_as_current_span("decode"):
                pass
    spans = {span.name: span for span in exporter.get_finished_spans()}
    for name in ("nixl_async.write", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert (parent.trace_id, parent.span_id) == (prefill.get_span_context().trace_id, prefill.get_span_context().span_id)


async def test_a_peer_that_does_not_know_contexts_gets_the_notification_alone(provider: TracerProvider) -> None:
    sent: list[bytes] = []
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        assert peer.traces
        assert peer.link is not None
        send = peer.link.send
        peer.link.send = lambda frame: (sent.append(frame), send(frame))[1]  # type: ignore[method-assign]
        arrivals = b.notifications()
        tracer = provider.get_tracer("test")
        with tracing.instrument(a, provider), tracer.start_as_current_span("request"):
            await a.notify(peer, b"with")
            assert (await anext(arrivals)).trace
            peer.traces = False
            await a.notify(peer, b"without")
            notification = await anext(arrivals)
        assert notification == Notification("a", b"without")
        assert notification.trace == b""
        peer.traces = True
        await a.notify(peer, b"not traced")
        assert (await anext(arrivals)).trace == b""
    assert sent[0].endswith(encode_frame(FrameType.NOTIFY, b"with"))
    assert sent[0] != encode_frame(FrameType.NOTIFY, b"with")
    assert sent[1] == encode_frame(FrameType.NOTIFY, b"without")
    assert sent[2] == encode_frame(FrameType.NOTIFY, b"not traced")


@pytest.mark.parametrize(
    "given", [b"", b"{", b"[]", b'{"traceparent":3}', b'{"traceparent":"00-zz-1-01"}', b"\xff", b"[" * 5000]
)
async def test_a_malformed_context_is_none(given: bytes) -> None:
    notification = Notification("a", b"", given)
    assert not trace.get_current_span(tracing.context(notification)).get_span_context().is_valid
    with tracing.attached(notification):
        assert not trace.get_current_span().get_span_context().is_valid


async def test_what_is_not_sampled_is_not_described(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with agent_process("other") as other, Agent("a", token=TOKEN) as a:
        peer = await a.connect(other.address)
        mine = await a.register(np.ones(1 << 20, np.uint8))
        with tracing.instrument(a, provider) as made:
            await a.transfer(mine, peer.region("memory"), notify=b"x")
            await a.transfer(mine[:64], peer.region("memory")[:64])
            assert (made._open, made._finished) == ({}, {})
    assert exporter.get_finished_spans() == ()


async def test_an_agent_is_instrumented_once() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, _):
        with tracing.instrument(a), pytest.raises(ConfigurationError, match="uninstrument"):
            tracing.instrument(a)
        with tracing.instrument(a):
            pass
        assert a._observers.submitted is None
        assert a._observers.trace is None


def test_without_opentelemetry_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['opentelemetry'] = None\nimport nixl_async.tracing"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "MissingDependency" in ran.stderr
    assert "nixl-async[tracing]" in ran.stderr
