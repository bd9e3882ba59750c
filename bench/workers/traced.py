"""nixl_async with OpenTelemetry spans, made or not from turn to turn; a batch exporter drops those that are recorded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from bench.worker import serve_made
from bench.workers.ours import Ours
from nixl_async import tracing

SAMPLERS = {"recorded": ALWAYS_ON, "not sampled": ALWAYS_OFF}


class Dropped(SpanExporter):
    """Counts spans and drops them: what a collector costs is another question."""

    def __init__(self) -> None:
        self.count = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Count them."""
        self.count += len(spans)
        return SpanExportResult.SUCCESS


class Traced(Ours):
    """One agent, whose transfers are spans if a turn asks for it."""

    async def move_traced(self, spans: str | None, batch: int) -> dict[str, float]:
        """Move every page once, `batch` pages a transfer, one after the other, `spans` is a key of SAMPLERS, or None: without.

        Timed from page indices to the last completed await; `spans` in the answer is how many were exported.
        """
        exporter = Dropped()
        with ExitStack() as stack:
            provider = TracerProvider(sampler=SAMPLERS.get(spans or "recorded"), shutdown_on_exit=False)
            stack.callback(provider.shutdown)
            provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=1 << 16))
            if spans is not None:
                stack.enter_context(tracing.instrument(self.agent, provider))
            start = time.perf_counter()
            for place in range(0, len(self.indices), batch):
                near = self.region.pages(self.indices[place : place + batch], self.page_nbytes)
                far = self.remote.pages(self.table[place : place + batch], self.page_nbytes)
                await self.agent.transfer(*((near, far) if self.write else (far, near)))
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "spans": exporter.count}


if __name__ == "__main__":
    asyncio.run(serve_made(lambda: Traced(None)))
