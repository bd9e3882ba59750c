"""What a prefill and a decode server have in common: the model, its KV cache, and an agent that moves it."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ParamSpec, Self, TypeVar

import torch

from examples.fastapi_disagg.cache import Pages
from examples.fastapi_disagg.model import PAGE_TOKENS, Transformer
from nixl_async import Agent, MemoryRegion, Sharding, plan_pairs
from nixl_async.backend import quiesce

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    name: str
    host: str
    port: int
    pages: int
    seed: int
    threads: int
    backends: list[str] | None
    prefill: str = ""


class Compute:
    """The thread that runs the model, one piece of work after another; the event loop only waits for it.

    With a GPU, a stream takes its place: `push.ready(layer, after=stream.record_event())`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Let the thread call `function` after what it was given before. `asyncio.wrap_future` makes the result awaitable."""
        return self._thread.submit(function, *args, **kwargs)

    async def stop(self, work: Iterable[Future[Any]]) -> None:
        """Drop the work that has not begun, and wait for what has, even if cancelled: it writes to pages of the cache."""
        begun = [asyncio.wrap_future(one) for one in work if not one.cancel()]
        await quiesce(asyncio.gather(*begun, return_exceptions=True))

    def close(self) -> None:
        """End the thread when it has done what it was given."""
        self._thread.shutdown(wait=False)


class Worker:
    """A server's model, pages and agent, from `async with` on. Everything but the forward pass runs on the server's event loop."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pages = Pages(options.pages)
        self.compute = Compute()
        self.requests = Counter(running=0, done=0, failed=0, aborted=0)
        self.model: Transformer
        self.cache: torch.Tensor
        self.agent: Agent
        self.region: MemoryRegion
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        options = self.options
        torch.set_num_threads(options.threads)
        self.model = await asyncio.to_thread(Transformer, seed=options.seed)
        self.cache = self.model.new_cache(options.pages)
        async with AsyncExitStack() as stack:
            stack.callback(self.compute.close)
            self.agent = await stack.enter_async_context(Agent(options.name, backends=options.backends))
            # Registered once, for good: a transfer names pages in it.
            self.region = await self.agent.register(self.cache, name="kv")
            # One rank on each side here. Unequal tensor parallelism or page sizes are two other values.
            sharding = Sharding(page_tokens=PAGE_TOKENS)
            (self.pair,) = plan_pairs(self.model.shape.geometry(), sharding, sharding)
            self._stack = stack.pop_all()
        # What is loaded by now stays: the garbage collector need not walk it again, which would hold the loop for 25 ms.
        gc.collect()
        gc.freeze()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    def count(self, outcome: str) -> None:
        """Count a request that ends: "done", "failed" or "aborted"; "running" where one begins."""
        self.requests[outcome] += 1
        if outcome != "running":
            self.requests["running"] -= 1

    def health(self) -> dict[str, Any]:
        """Tell who this is and what it is doing."""
        address = self.agent.address
        return {
            "status": "quarantined" if self.region.quarantined else "ok",
            "name": self.agent.name,
            "agent": None if address is None else {"host": address[0], "port": address[1]},
            "peers": sorted(self.agent.peers),
            "pages": {"free": self.pages.n_free, "all": self.pages.count},
            "requests": dict(self.requests),
        }

    def metrics(self) -> str:
        """Return the counters in Prometheus' text form."""
        statistics = self.agent.statistics()
        lines = [f"kv_pages_free {self.pages.n_free}", f"kv_pages {self.pages.count}"]
        lines += [f'requests{{state="{state}"}} {count}' for state, count in self.requests.items()]
        lines += [f"nixl_async_peers {statistics.peers}", f"nixl_async_transfers_live {statistics.live_transfers}"]
        outcomes = {"done": statistics.done, "failed": statistics.failed, "cancelled": statistics.cancelled}
        lines += [f'nixl_async_transfers_total{{outcome="{name}"}} {count}' for name, count in outcomes.items()]
        lines += [f'nixl_async_bytes_total{{backend="{name}"}} {count}' for name, count in statistics.nbytes.items()]
        return "\n".join(lines) + "\n"
