"""What a request's layers are and where each goes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nixl_async.descriptors import Descriptor, Region
from nixl_async.errors import ConfigurationError, DescriptorError

if TYPE_CHECKING:
    from nixl_async.descriptors import Places

MAX_REQUEST_NBYTES = 1024
MAX_LAYERS = 65536


class LayerPlan:
    """The layers of one request: `layers[i]` is the pair (src, dst) of places between which layer i moves.

    `request` is what both sides call the request; it is theirs to make unique among those that are under way between them.
    `Pair.by_layer` of a parallelism plan gives such pairs.

    Raises:
        ConfigurationError: `request` is no string of 1 to 1024 bytes.
        DescriptorError: there is no layer, or more than 65536, or one is no pair.
    """

    __slots__ = ("layers", "request")

    def __init__(self, request: str, layers: Iterable[tuple[Places, Places]]) -> None:
        self.request: str = check_request(request)
        self.layers: tuple[tuple[Places, Places], ...] = tuple(layers)
        if not 0 < len(self.layers) <= MAX_LAYERS:
            found = f"the plan of request {request!r} has {len(self.layers)} layers"
            raise DescriptorError(f"{found}; give one pair (src, dst) for each, and 1 to {MAX_LAYERS} of them")
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, tuple) or len(layer) != 2:
                raise DescriptorError(f"layer {number} of request {request!r} is {layer!r}; it must be a pair (src, dst)")

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"<LayerPlan {self.request!r}: {len(self.layers)} layers>"

    def places(self, layers: Iterable[int]) -> tuple[Places, Places]:
        """Return both sides of some layers, as one transfer takes them."""
        chosen = [self.layers[layer] for layer in layers]
        if len(chosen) == 1:
            return chosen[0]
        return [one for src, _ in chosen for one in _listed(src)], [one for _, dst in chosen for one in _listed(dst)]


def _listed(places: Places) -> Iterable[Region | Descriptor]:
    return (places,) if isinstance(places, Region | Descriptor) else places


def check_request(request: object) -> str:
    """Return a request's name, if it is one.

    Raises:
        ConfigurationError: it is not a string of 1 to 1024 bytes.
    """
    if not isinstance(request, str) or not 0 < len(request.encode()) <= MAX_REQUEST_NBYTES:
        raise ConfigurationError(f"request {request!r} must be a string of 1 to {MAX_REQUEST_NBYTES} bytes")
    return request


def check_layers(layers: Iterable[object], count: int, request: str) -> list[int]:
    """Return the numbers of layers.

    Raises:
        DescriptorError: one of them is not between 0 and `count` - 1.
    """
    found = list(layers)
    for layer in found:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
            raise DescriptorError(f"layer {layer!r} is none of request {request!r}: it has layers 0 to {count - 1}")
    return found  # type: ignore[return-value]
