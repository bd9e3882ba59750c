"""Two processes that a trace goes over, each with OpenTelemetry's exporter. `main` is told a role, the collector, and the peer."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import numpy as np
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from nixl_async import Agent, tracing
from tests.agents import TOKEN

NBYTES = 4 << 20


async def prefill(provider: TracerProvider, address: str) -> None:
    """Write the KV cache of a request; its notification carries the context of the span that is current here."""
    tracer = provider.get_tracer("prefill")
    async with Agent("prefill", token=TOKEN, backends=["tcp"]) as agent:
        mine = await agent.register(np.ones(NBYTES, np.uint8))
        peer = await agent.connect(address)
        with tracing.instrument(agent, provider), tracer.start_as_current_span("request 7"):
            await agent.transfer(mine, peer.region("kv"), notify=b"request 7")


async def decode(provider: TracerProvider) -> None:
    """Go on with the trace that came with the notification."""
    tracer = provider.get_tracer("decode")
    memory, copy = np.zeros(NBYTES, np.uint8), np.zeros(NBYTES, np.uint8)
    async with Agent("decode", token=TOKEN, backends=["tcp", "memory"]) as agent:
        source, target = await agent.register(memory, name="kv"), await agent.register(copy)
        arrivals = agent.notifications()
        host, port = await agent.serve()
        print(json.dumps(f"{host}:{port}"), flush=True)
        with tracing.instrument(agent, provider):
            notification = await anext(arrivals)
            with tracing.attached(notification), tracer.start_as_current_span("decode"):
                await agent.transfer(source, target)
    assert copy.all()


def main() -> None:
    """Run as one of the two."""
    role, collector, *address = sys.argv[1:]
    provider = TracerProvider(resource=Resource.create({"service.name": role, "process.pid": os.getpid()}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{collector}/v1/traces")))
    asyncio.run(prefill(provider, *address) if role == "prefill" else decode(provider))
    provider.shutdown()
