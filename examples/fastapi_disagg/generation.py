"""One request at the decode server, from the layers that arrive to the tokens that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from examples.fastapi_disagg.api import GenerateRequest
from examples.fastapi_disagg.forward import Forward
from examples.fastapi_disagg.worker import Worker
from nixl_async import Incoming, NixlError

P = ParamSpec("P")
T = TypeVar("T")


class Generation:
    """A request that was admitted: its pages, the layers that are pushed into them, and the tokens that follow."""

    def __init__(self, worker: Worker, body: GenerateRequest, pages: list[int], incoming: Incoming) -> None:
        self._worker, self._body, self._pages, self._incoming = worker, body, pages, incoming
        self._work: Future[Any] | None = None
        self.outcome = "aborted"
        """What became of it: "done", "failed", or "aborted" by its client."""

    async def lines(self) -> AsyncIterator[str]:
        """Yield the answer. It may be cancelled at any point: whoever admitted the request cleans up."""
        try:
            async for token in self._tokens():
                yield json.dumps({"token": token}) + "\n"
            self.outcome = "done"
            yield json.dumps({"done": True}) + "\n"
        except Exception as error:
            self.outcome = "failed"
            if not isinstance(error, NixlError):
                raise
            # The status line has gone out already.
            yield json.dumps({"error": str(error)}) + "\n"

    async def stop(self) -> None:
        """Wait until the model does nothing for this request any more."""
        if self._work is not None:
            await self._worker.compute.stop([self._work])

    async def _tokens(self) -> AsyncIterator[int]:
        prompt = self._body.tokens
        # The last token of the prompt is computed again, for what follows it: each layer as soon as that of the prompt is here.
        forward = self._forward(prompt[-1], len(prompt) - 1)
        async for layer in self._incoming.layers():
            await self._run(forward.layer, layer)
        token = await self._run(forward.next_token)
        yield token
        for position in range(len(prompt), len(prompt) + self._body.max_tokens - 1):
            token = await self._run(self._forward(token, position).run)
            yield token

    def _forward(self, token: int, position: int) -> Forward:
        return Forward(self._worker.model, self._worker.cache, self._pages, [token], position)

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        work = self._worker.compute.start(function, *args, **kwargs)
        self._work = work
        return await asyncio.wrap_future(work)
