"""The workers' half of the connector: hands the scheduler's news to the agent on its loop, and brings back what has ended."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.utils.network_utils import get_ip

from nixl_async import Agent
from nixl_async.integrations.vllm.decode import Decode, Load
from nixl_async.integrations.vllm.layout import Layout, describe
from nixl_async.integrations.vllm.node import LoopThread, Node
from nixl_async.integrations.vllm.options import NixlAsyncMetadata, Options
from nixl_async.integrations.vllm.outgoing import Step
from nixl_async.integrations.vllm.prefill import Prefill, Terms
from nixl_async.integrations.vllm.reports import Reports

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger("nixl_async.integrations.vllm")


class WorkerSide:
    """What `NixlAsyncConnector` does in a worker.

    Its methods are called on the engine's thread and wait for the network only where vLLM asks for that: `load="sync"`,
    preemption, sleep, shutdown.
    """

    def __init__(self, config: VllmConfig, options: Options, caches: KVCacheConfig, engine: str) -> None:
        self._config, self._options, self._caches, self._engine = config, options, caches, engine
        self.reports = Reports()
        self.address = ""
        self._tensors: dict[str, Any] = {}
        self._layers: dict[str, int] = {}
        self._on_device = False
        self._loop: LoopThread | None = None
        self._node: Node
        self._prefill: Prefill
        self._decode: Decode
        self._step: Step | None = None
        self._loads: list[Load] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # Setting up.

    def register(self, tensors: dict[str, Any]) -> None:
        """Describe the KV cache and open the agent; it is served from here on."""
        self._tensors = tensors
        layout, memory = self._describe()
        self._layers = {layer.name: number for number, layer in enumerate(layout.layers)}
        self._on_device = any(tensor.is_cuda for tensor in memory.values())
        self._loop = LoopThread(f"nixl-async-vllm-{layout.rank}")
        self._loop.run(self._open(layout, memory))
        logger.info(
            "%s is served at %s: %d layers in %d regions", layout.engine, self.address, len(layout.layers), len(memory)
        )

    def unregister(self) -> None:
        """Let go of the KV cache's memory before it is unmapped. Idempotent."""
        if self._loop is not None:
            self._loop.run(self._unregister())

    def restore(self) -> None:
        """Register the KV cache's memory again, under the same names. Idempotent."""
        if self._loop is not None and not self._node.regions:
            _, memory = self._describe()
            self._loop.run(self._restore(memory))

    def shutdown(self) -> None:
        """Close the agent: when this returns, nothing reads or writes the KV cache any more. Idempotent."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            loop.run(self._close())
            loop.close()

    def _describe(self) -> tuple[Layout, dict[str, torch.Tensor]]:
        model, cache, parallel = self._config.model_config, self._config.cache_config, self._config.parallel_config
        facts = {
            "model": str(model.model),
            "the KV cache's dtype": str(cache.cache_dtype),
            "the model's dtype": str(model.dtype),
            "mode": self._options.mode,
        }
        heads = 0 if model.use_mla else int(model.get_total_num_kv_heads())
        return describe(
            self._tensors,
            self._caches,
            engine=self._engine,
            rank=get_tensor_model_parallel_rank(),
            tp=parallel.tensor_parallel_size,
            heads=heads,
            facts=facts,
        )

    async def _open(self, layout: Layout, memory: dict[str, torch.Tensor]) -> None:
        options = self._options
        name = f"vllm/{self._engine}/{layout.rank}"
        agent = Agent(name, backends=options.backends, token=options.token, authenticate=options.authenticate)
        self._node = Node(agent, layout, self._heard, self._lost)
        push = options.mode == "push"
        terms = Terms(push, options.lease_seconds, options.orphan_seconds, options.early_seconds)
        self._prefill = Prefill(self._node, self.reports, terms)
        self._decode = Decode(self._node, self.reports, push=push, one_group=len(layout.group_tokens) == 1)
        host = options.host or os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or get_ip()
        port = options.port
        if port:
            port += self._config.parallel_config.data_parallel_index * layout.tp + layout.rank
        await self._node.open(memory, host, port, host)
        self.address = self._node.address

    async def _close(self) -> None:
        await self._decode.close()
        await self._prefill.close()
        await self._node.aclose()

    async def _unregister(self) -> None:
        regions, self._node.regions = self._node.regions, {}
        for region in regions.values():
            await region.aclose()

    async def _restore(self, memory: dict[str, torch.Tensor]) -> None:
        for name, tensor in memory.items():
            self._node.regions[name] = await self._node.agent.register(tensor, name=name)

    # A step.

    def begin_step(self, news: NixlAsyncMetadata) -> None:
        """Take over what the scheduler says before a pass: what it computes for whom, and whose blocks are to be sent or not."""
        if self._loop is None:
            return
        if news.advance:
            self._step = Step(self._loop.loop, len(self._layers))
        if news.begin or news.advance or news.finish or news.abort:
            self._call(self._begin, news, self._step)

    def load(self, news: NixlAsyncMetadata) -> None:
        """Take over what is to be received, and what of that need not be."""
        if self._loop is None:
            return
        loads = [self._decode.load(receive) for receive in news.receive]
        self._loads = [load for load in loads if load.receive.sync]
        if loads or news.cancel or news.release or news.claim:
            self._call(self._load, news, loads)

    def wait_for_layer(self, name: str) -> None:
        """Block until a layer of every request that this pass loads is in place, or the request has failed."""
        if self._loads and name in self._layers:
            for load in self._loads:
                load.wait(self._layers[name])

    def layer_done(self, name: str) -> None:
        """Let a layer go that the pass has computed, or will have when the current stream comes here."""
        if self._step is not None and self._options.layerwise and name in self._layers:
            self._call(self._step.reach, self._layers[name], self._point())

    def end_step(self) -> None:
        """Let go what is left of the pass, and wait for what it loads."""
        if self._step is not None:
            self._call(self._step.close, self._point())
            self._step = None
        for load in self._loads:
            load.wait()
        self._loads = []

    def quiesce(self, requests: set[str]) -> None:
        """Block until nothing reads the blocks of requests that are about to lose them."""
        if requests and self._loop is not None:
            self._loop.run(self._prefill.quiesce(requests))

    def _point(self) -> object:
        if not self._on_device:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _call(self, function: Any, *arguments: object) -> None:
        if self._loop is not None:
            self._loop.call(function, *arguments)

    # On the loop.

    def _begin(self, news: NixlAsyncMetadata, step: Step | None) -> None:
        for request, transfer in news.begin.items():
            self._prefill.begin(request, transfer)
        for one in news.finish:
            self._prefill.finish(one.request, one.transfer, one.blocks, one.tokens, one.lease)
        for request, report in news.abort.items():
            self._spawn(self._prefill.abort(request, report=report))
        for ahead in news.advance:
            self._prefill.advance(ahead.request, ahead.blocks, ahead.tokens, ahead.final, step)

    def _load(self, news: NixlAsyncMetadata, loads: list[Load]) -> None:
        for load in loads:
            self._decode.start(load)
        for request in news.cancel:
            self._decode.cancel(request)
        for one in news.release:
            self._decode.release(one.request, one.transfer, one.addresses)
        for addresses, transfers in news.claim.items():
            self._decode.claim(addresses, transfers)

    def _heard(self, peer: str, message: dict[str, Any]) -> None:
        match message["t"]:
            case "want":
                self._prefill.want(peer, message)
            case "claim":
                self._prefill.claim(peer, message["ids"])
            case "release":
                self._spawn(self._prefill.release(peer, message["id"], message["to"]))
            case "chunk" | "refused":
                self._decode.heard(peer, message)
            case other:
                raise ValueError(f"a message of kind {other!r}")

    def _lost(self, peer: str, reason: str) -> None:
        self._prefill.lost(peer)
        self._decode.lost(peer, reason)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the connector failed", exc_info=error)
