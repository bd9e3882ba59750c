"""The decode server, which clients talk to: has a prompt's KV cache pushed into its own, and streams the tokens that follow."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse

from examples.fastapi_disagg.api import GenerateRequest, PrefillRequest
from examples.fastapi_disagg.application import new_app, parser, read_options, serve
from examples.fastapi_disagg.cache import TooLong
from examples.fastapi_disagg.generation import Generation
from examples.fastapi_disagg.worker import Options, Worker
from nixl_async import Peer

routes = APIRouter()

PREFILL_SECONDS = 10.0
"""How long the prefill server may take to say whether it takes a request on."""
PARTITION_SECONDS = 4.0
"""A prefill server that is cut off, and not dead, may write for 3 seconds before it knows."""


class DecodeWorker(Worker):
    """Knows one prefill server by its URL, and connects to its agent when a request needs it: first, or after a restart."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._http: httpx.AsyncClient
        self._peer: Peer | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> DecodeWorker:
        await super().__aenter__()
        self._http = httpx.AsyncClient(base_url=self.options.prefill, timeout=PREFILL_SECONDS, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()
        await super().__aexit__(*exc)

    @asynccontextmanager
    async def admit(self, body: GenerateRequest) -> AsyncIterator[Generation]:
        """Have a request's prompt computed; when the block is left, however it is, nothing of the request is left.

        Raises:
            TooLong: the request never fits.
            OutOfPages: there is no room here.
            HTTPException: the prefill server does not answer, or refuses.
            NixlError: its agent cannot be reached.
        """
        n_tokens, longest = len(body.tokens) + body.max_tokens, self.model.shape.max_tokens
        if n_tokens > longest:
            raise TooLong(f"prompt and answer have {n_tokens} tokens; the model takes {longest}")
        pages = self.pages.take(n_tokens)
        self.count("running")
        outcome, peer, incoming = "failed", None, None
        try:
            peer = await self._connected()
            incoming = self.agent.incoming(uuid.uuid4().hex, peer=peer)
            # Leaving this block before all layers are here makes the prefill server stop, and waits until it has.
            async with incoming:
                await self._ask(
                    PrefillRequest(
                        request=incoming.request,
                        prompt=body.tokens,
                        decode=self.agent.name,
                        incarnation=self.agent.incarnation,
                        pages=pages,
                        overlap=body.overlap,
                    )
                )
                generation = Generation(self, body, pages, incoming)
                try:
                    yield generation
                finally:
                    outcome = generation.outcome
                    await generation.stop()
        finally:
            self.count(outcome)
            if peer is None or peer.connected or incoming is None or incoming.complete:
                self.pages.give_back(pages)
            else:
                asyncio.get_running_loop().call_later(PARTITION_SECONDS, self.pages.give_back, pages)

    async def _connected(self) -> Peer:
        """Return the prefill server's agent; connect to it if it is not connected, or is another one by now."""
        async with self._connecting:
            if self._peer is None or not self._peer.connected:
                agent = (await self._call("GET", "/health")).json()["agent"]
                self._peer = await self.agent.connect((urlsplit(self.options.prefill).hostname or "", agent["port"]))
            return self._peer

    async def _ask(self, body: PrefillRequest) -> None:
        await self._call("POST", "/prefill", json=body.model_dump())

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            why = f"the prefill server at {self.options.prefill} does not answer: {type(error).__name__}: {error}"
            raise HTTPException(503, why) from error
        if answer.is_error:
            # What is too much for the prefill server now is worth another try later: its status and that header go to the client.
            again = {name: answer.headers[name] for name in ("Retry-After",) if name in answer.headers}
            raise HTTPException(answer.status_code, f"the prefill server refuses: {answer.text}", again)
        return answer


async def admitted(body: GenerateRequest, request: Request) -> AsyncIterator[Generation]:
    """Hold a request's place for as long as its answer is being sent.

    FastAPI leaves this when the answer has been sent, or the client has gone: then Starlette has cancelled the answer.
    """
    worker: DecodeWorker = request.app.state.worker
    async with worker.admit(body) as generation:
        yield generation


@routes.post("/generate")
async def generate(generation: Annotated[Generation, Depends(admitted)]) -> StreamingResponse:
    """Answer with the tokens that follow a prompt, each as soon as it is there."""
    return StreamingResponse(generation.lines(), media_type="application/x-ndjson")


def main() -> None:
    """Run `python -m examples.fastapi_disagg.decode`."""
    arguments = parser("decode", 8002)
    arguments.add_argument("--prefill", default="http://127.0.0.1:8001", help="the prefill server's URL")
    options = read_options(arguments)
    serve(new_app(DecodeWorker(options), routes), options)


if __name__ == "__main__":
    main()
