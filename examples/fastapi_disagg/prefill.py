"""The prefill server: computes a prompt's KV cache and pushes each layer to the decode server while the next one is computed."""

from __future__ import annotations

import asyncio
import logging

from fastapi import APIRouter, Request

from examples.fastapi_disagg.api import PrefillRequest
from examples.fastapi_disagg.application import SHUTDOWN_SECONDS, new_app, parser, read_options, serve
from examples.fastapi_disagg.forward import Forward
from examples.fastapi_disagg.worker import Options, Worker
from nixl_async import Aborted, LayerPlan, Peer, PeerLost

routes = APIRouter()
logger = logging.getLogger("fastapi_disagg.prefill")

PEER_SECONDS = 5.0
"""How long a decode server's agent may take from having connected, as it sees it, to being known here."""


class PrefillWorker(Worker):
    """Serves decode servers that come and go: they connect to it, and it knows none of them in advance."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> PrefillWorker:
        await super().__aenter__()
        await self.agent.serve(self.options.host, 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        # HTTP is quiet by now, but the pushes may not be.
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SHUTDOWN_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().__aexit__(*exc)

    async def accept(self, body: PrefillRequest) -> None:
        """Take a request on, or refuse it; return before it is computed.

        Raises:
            OutOfPages: there is no room here.
            DescriptorError: `body.pages` are not pages of the decode server's cache, or too few.
            PeerLost: the decode server's agent is not connected.
        """
        peer = await self._peer(body.decode, body.incarnation)
        pages = self.pages.take(len(body.prompt))
        try:
            layers = self.pair.by_layer(self.region, pages, peer.region("kv"), body.pages, len(body.prompt))
        except BaseException:
            self.pages.give_back(pages)
            raise
        self.count("running")
        task = asyncio.create_task(self._run(body, peer, pages, LayerPlan(body.request, layers)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, body: PrefillRequest, peer: Peer, pages: list[int], plan: LayerPlan) -> None:
        """Compute and push a request; give its pages back when nothing reads or writes them any more."""
        outcome = "failed"
        try:
            await self._push(body, peer, pages, plan)
            outcome = "done"
        except (Aborted, PeerLost) as error:
            # The decode server gave the request up, as its client has gone, or is gone itself.
            logger.info("request %s ends: %s", body.request, error)
            outcome = "aborted"
        except Exception:
            logger.exception("request %s failed", body.request)
        finally:
            self.pages.give_back(pages)
            self.count(outcome)

    async def _push(self, body: PrefillRequest, peer: Peer, pages: list[int], plan: LayerPlan) -> None:
        forward = Forward(self.model, self.cache, pages, body.prompt)
        computed = [self.compute.start(forward.layer, layer) for layer in range(len(plan))]
        try:
            # Leaving the block waits until all layers are in place at the peer. Where either side gives up, or an awaitable
            # that a layer waits for fails, it stops what is under way, tells the other side, and raises.
            async with self.agent.push(peer, plan) as push:
                points = [asyncio.wrap_future(layer) for layer in computed]
                if body.overlap:
                    for layer, point in enumerate(points):
                        push.ready(layer, after=point)
                else:
                    push.ready(*range(len(plan)), after=points)
        finally:
            await self.compute.stop(computed)

    async def _peer(self, name: str, incarnation: str) -> Peer:
        events = self.agent.membership()
        try:
            async with asyncio.timeout(PEER_SECONDS):
                while (peer := self.agent.peers.get(name)) is None or peer.incarnation != incarnation:
                    await anext(events)
        except TimeoutError:
            known = ", ".join(self.agent.peers) or "none"
            raise PeerLost(f"the agent {name!r} is not connected to this prefill server; connected are: {known}") from None
        return peer


@routes.post("/prefill", status_code=202)
async def prefill(body: PrefillRequest, request: Request) -> dict[str, str]:
    """Take a request on; its KV cache goes to the decode server's agent."""
    worker: PrefillWorker = request.app.state.worker
    await worker.accept(body)
    return {"request": body.request}


def main() -> None:
    """Run `python -m examples.fastapi_disagg.prefill`."""
    options = read_options(parser("prefill", 8001))
    serve(new_app(PrefillWorker(options), routes), options)


if __name__ == "__main__":
    main()
