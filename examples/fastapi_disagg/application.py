"""The HTTP around a worker: FastAPI's application, `/health` and `/metrics`, errors as statuses, the command line, uvicorn."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from examples.fastapi_disagg.cache import OutOfPages, TooLong
from examples.fastapi_disagg.model import PAGE_TOKENS
from examples.fastapi_disagg.worker import Options, Worker
from nixl_async import DescriptorError, NixlError

TOKEN_VARIABLE = "NIXL_ASYNC_TOKEN"
SHUTDOWN_SECONDS = 5
"""How long requests may go on after SIGTERM."""


def new_app(worker: Worker, routes: APIRouter) -> FastAPI:
    """Make the application around a worker, which opens and closes with it, on the same event loop."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with worker:
            yield

    app = FastAPI(title=f"nixl_async {worker.options.name}", lifespan=lifespan)
    app.state.worker = worker
    app.include_router(routes)

    @app.get("/health")
    async def health() -> JSONResponse:
        # After a transfer that never became quiet no page can be trusted: whoever watches this starts the server again.
        return JSONResponse(worker.health(), 503 if worker.region.quarantined else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return worker.metrics()

    @app.exception_handler(TooLong)
    async def too_long(request: Request, error: TooLong) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 413)

    @app.exception_handler(OutOfPages)
    async def out_of_pages(request: Request, error: OutOfPages) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})

    @app.exception_handler(NixlError)
    async def not_moved(request: Request, error: NixlError) -> JSONResponse:
        # The request names pages that do not exist; anything else is a peer's or this server's trouble.
        return JSONResponse({"detail": str(error)}, 400 if isinstance(error, DescriptorError) else 503)

    return app


def parser(role: str, port: int) -> argparse.ArgumentParser:
    """Make the command line that both servers have."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.fastapi_disagg.{role}")
    parser.add_argument("--name", default=role, help="the agent's name, unique among all servers")
    parser.add_argument("--host", default="127.0.0.1", help="the address to serve at, HTTP and agent")
    parser.add_argument("--port", type=int, default=port, help="of HTTP; 0: any free one")
    parser.add_argument("--pages", type=int, default=1024, help=f"pages of the KV cache, of {PAGE_TOKENS} tokens each")
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights: the same on all servers")
    parser.add_argument("--threads", type=int, default=1, help="for the forward pass: the same on all servers")
    parser.add_argument("--backends", nargs="+", help="nixl_async backends, the preferred first (default: all there are)")
    return parser


def read_options(parser: argparse.ArgumentParser) -> Options:
    """Read the command line."""
    options = Options(**vars(parser.parse_args()))
    if not os.environ.get(TOKEN_VARIABLE):
        parser.error(f"set {TOKEN_VARIABLE} to a secret that all servers share; by it agents know each other")
    return options


def serve(app: FastAPI, options: Options) -> None:
    """Serve until SIGTERM or SIGINT. The first line on standard output is the URL."""
    listener = socket.create_server((options.host, options.port))
    host, port = listener.getsockname()[:2]
    print(f"http://{host}:{port}", flush=True)
    config = uvicorn.Config(app, loop="uvloop", log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    uvicorn.Server(config).run(sockets=[listener])
