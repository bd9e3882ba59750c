"""Layers that a CUDA stream computes, pushed and pulled into the memory of another agent, where a stream waits for each."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest

from nixl_async import Agent, LayerPlan
from nixl_async.cuda import device_count
from tests.agents import TOKEN, connect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    # cupy warns of what it finds in other packages.
    pytest.mark.filterwarnings("default"),
]
LAYERS, LAYER_NBYTES = 12, 1 << 20
PATIENCE_SECONDS = 20
BACKENDS = ["memory", "cuda", "cuda_ipc", "tcp"]


def slow(cupy: Any) -> Any:
    """Return what keeps a stream busy for some milliseconds."""
    matrix = cupy.ones((4096, 4096), cupy.float32)
    return lambda: matrix @ matrix


@pytest.mark.parametrize("push", [True, False], ids=["push", "pull"])
@pytest.mark.parametrize("to_device", [True, False], ids=["to VRAM", "to DRAM"])
async def test_a_layer_goes_when_its_stream_has_computed_it(push: bool, to_device: bool) -> None:
    cupy = pytest.importorskip("cupy")
    if not to_device and not push:
        pytest.skip("a peer's VRAM cannot be read into DRAM: the peer writes it")
    numpy = cupy if to_device else __import__("numpy")
    with cupy.cuda.Device(0):
        source = cupy.zeros((LAYERS, LAYER_NBYTES), cupy.uint8)
        target = numpy.zeros((LAYERS, LAYER_NBYTES), numpy.uint8)
        seen = cupy.zeros(LAYERS, cupy.uint8)
        busy, compute, use = slow(cupy), cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
        # Loading a kernel waits for streams, those included that stand still until a layer comes: all are loaded before.
        busy()
        source[:] = 1
        source[0] = 1
        if to_device:
            seen[0] = target[0, -1]
        cupy.cuda.Device().synchronize()
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            Agent("p", token=TOKEN, backends=BACKENDS) as producer,
            Agent("c", token=TOKEN, backends=BACKENDS) as consumer,
        ):
            near, far = await producer.register(source, name="kv"), await consumer.register(target, name="kv")
            await connect(producer, consumer)
            src, dst = (near, producer.peers["c"].region("kv")) if push else (consumer.peers["p"].region("kv"), far)
            cuts = [slice(at, at + LAYER_NBYTES) for at in range(0, LAYERS * LAYER_NBYTES, LAYER_NBYTES)]
            plan = LayerPlan("r", [(src[cut], dst[cut]) for cut in cuts])
            order: list[int] = []

            async def produce() -> None:
                side: Any = producer.push("c", plan) if push else producer.offer("c", "r", LAYERS)
                async with side:
                    with compute:
                        for layer in range(LAYERS):
                            busy()
                            source[layer] = layer + 1
                            side.ready(layer, after=compute)

            async def consume() -> None:
                side: Any = consumer.incoming("r") if push else consumer.pull("p", plan)
                async with side:
                    if to_device:
                        for layer in range(LAYERS):
                            side.wait_on(use, layer)
                            with use:
                                seen[layer] = target[layer, -1]
                    order.extend([layer async for layer in side.layers()])

            async with asyncio.TaskGroup() as group:
                group.create_task(consume())
                group.create_task(produce())
            use.synchronize()
            assert order == list(range(LAYERS))
            expected = [layer + 1 for layer in range(LAYERS)]
            assert target[:, 0].tolist() == target[:, -1].tolist() == expected
            assert not to_device or seen.tolist() == expected
