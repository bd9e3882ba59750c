"""What a plan of layers accepts."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async import Agent, ConfigurationError, DescriptorError, LayerPlan
from nixl_async.layers.plan import MAX_LAYERS, check_layers


async def test_the_places_of_several_layers_are_joined() -> None:
    async with Agent("a", backends=["memory"]) as agent:
        near, far = await agent.register(np.zeros(64, np.uint8)), await agent.register(np.zeros(64, np.uint8))
        plan = LayerPlan("r", [(near[0:8], far[8:16]), ([near[8:16], near[16:24]], [far[16:24], far[24:32]])])
        assert len(plan) == 2
        assert plan.places([0]) == plan.layers[0]
        src, dst = plan.places([0, 1])
        assert (len(src), len(dst)) == (3, 3)
        assert src[0] is plan.layers[0][0]


@pytest.mark.parametrize("request_name", ["", 7, b"r", None, "ü" * 513])
def test_a_request_has_a_name(request_name: object) -> None:
    with pytest.raises(ConfigurationError, match="1 to 1024 bytes"):
        LayerPlan(request_name, [("src", "dst")])  # type: ignore[list-item, arg-type]


@pytest.mark.parametrize("layers", [[], [("src",)], [7], ["ab"]], ids=str)
def test_layers_are_pairs(layers: list[object]) -> None:
    with pytest.raises(DescriptorError, match="pair"):
        LayerPlan("r", layers)  # type: ignore[arg-type]


def test_there_is_a_bound() -> None:
    with pytest.raises(DescriptorError, match=str(MAX_LAYERS)):
        LayerPlan("r", [("src", "dst")] * (MAX_LAYERS + 1))  # type: ignore[list-item]


@pytest.mark.parametrize("layer", [-1, 3, True, "1", 1.0])
def test_numbers_of_layers_are_checked(layer: object) -> None:
    with pytest.raises(DescriptorError, match="layers 0 to 2"):
        check_layers([0, layer], 3, "r")
