"""Traces as operators get them: two processes, OpenTelemetry's OTLP exporter, a real collector, and what it passes on."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_config_var

import pytest

from nixl_async.testing.servers import free_ports
from tests.agents import ROOT

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install opentelemetry-exporter-otlp-proto-http")
web = pytest.importorskip("aiohttp.web", reason="aiohttp comes with the extra s3")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: E402
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status  # noqa: E402

HOST = "127.0.0.1"
SECONDS = 60
PROGRAM = "from tests.traced import main; main()"


class Backend:
    """Where the collector sends what it has collected: parses OTLP's protobuf, and keeps each span with its process's resource."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[dict[str, object], Span]] = {}
        self._changed = asyncio.Condition()

    async def take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        exported = ExportTraceServiceRequest.FromString(await request.read())
        async with self._changed:
            for resource in exported.resource_spans:
                about = values(resource.resource)
                for scope in resource.scope_spans:
                    self.spans |= {span.name: (about, span) for span in scope.spans}
            self._changed.notify_all()
        return web.Response(body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf")

    async def have(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.spans) >= count)


def values(of: object) -> dict[str, object]:
    """Return the attributes of a span, an event or a resource."""
    found = {}
    for each in of.attributes:  # type: ignore[attr-defined]
        kind = each.value.WhichOneof("value")
        found[each.key] = getattr(each.value, kind)
    return found


@asynccontextmanager
async def backend() -> AsyncIterator[tuple[Backend, int]]:
    kept = Backend()
    application = web.Application()
    application.router.add_post("/v1/traces", kept.take)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, 0)
        await site.start()
        yield kept, runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def collector(directory: Path, to_port: int) -> AsyncIterator[str]:
    """Run Rotel, an OpenTelemetry collector that is a wheel: OTLP in, OTLP out. Yield its URL."""
    spec = find_spec("rotel")
    if spec is None or spec.origin is None:
        pytest.skip("the collector is not installed: pip install rotel==0.0.1a15")
    if not get_config_var("Py_ENABLE_SHARED"):
        pytest.skip("the collector needs this Python's shared library, and it has none")
    libraries = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]))
    }
    http, grpc = free_ports(2)
    command = [str(Path(spec.origin).parent / "rotel-agent"), "start", "--batch-timeout", "20ms", "--exporter", "otlp"]
    command += ["--otlp-http-endpoint", f"{HOST}:{http}", "--otlp-grpc-endpoint", f"{HOST}:{grpc}"]
    command += ["--otlp-exporter-protocol", "http", "--otlp-exporter-endpoint", f"http://{HOST}:{to_port}"]
    command += ["--pid-file", str(directory / "pid"), "--log-file", str(directory / "log")]
    with (directory / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=os.environ | libraries)
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    _, writer = await asyncio.open_connection(HOST, http)
                    break
                except ConnectionError:
                    # No event tells when it listens.
                    assert process.returncode is None, (directory / "output").read_text()
                    await asyncio.sleep(0.02)
            writer.close()
            await writer.wait_closed()
        yield f"http://{HOST}:{http}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def start(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, *arguments, stdout=pipe, cwd=ROOT)


async def test_a_collector_receives_one_trace_of_two_processes(tmp_path: Path) -> None:
    async with asyncio.timeout(SECONDS), backend() as (kept, port), collector(tmp_path, port) as url:
        decode = await start("decode", url)
        assert decode.stdout is not None
        prefill = await start("prefill", url, json.loads(await decode.stdout.readline()))
        # Each tells the collector of its spans before it ends.
        assert await asyncio.gather(prefill.wait(), decode.wait()) == [0, 0]
        await kept.have(4)
    assert set(kept.spans) == {"request 7", "nixl_async.write", "decode", "nixl_async.copy"}
    spans = {name: span for name, (_, span) in kept.spans.items()}
    assert len({span.trace_id for span in spans.values()}) == 1
    # Each is the child of the one before; the step from the second to the third is from one process to the other.
    order = ["request 7", "nixl_async.write", "decode", "nixl_async.copy"]
    assert [spans[name].parent_span_id for name in order] == [b"", *(spans[name].span_id for name in order[:3])]
    abouts = [kept.spans[name][0] for name in order]
    assert [about["service.name"] for about in abouts] == ["prefill", "prefill", "decode", "decode"]
    assert [about["process.pid"] for about in abouts] == [prefill.pid, prefill.pid, decode.pid, decode.pid]

    written = spans["nixl_async.write"]
    assert written.kind == Span.SPAN_KIND_CLIENT
    assert written.status.code == Status.STATUS_CODE_UNSET
    assert [event.name for event in written.events] == ["dispatched", "wire", "wire done"]
    times = [written.start_time_unix_nano, *(event.time_unix_nano for event in written.events), written.end_time_unix_nano]
    assert times == sorted(times)
    found = values(written)
    assert (found["nixl_async.agent"], found["nixl_async.peer"], found["nixl_async.backend"]) == ("prefill", "decode", "tcp")
    assert (found["nixl_async.bytes"], found["nixl_async.state"]) == (4 << 20, "done")
