"""Layers of a request's KV cache, moved one by one while they are computed: pushed by who has them, or pulled by who wants them.

`plan` (what the layers are), `exchanges` (the messages of an agent's pushes and pulls), `mover` (the side that copies), `stream`
(the side that uses what arrives), `push` and `pull` (the two ends of each), `calls` (what an agent offers).
"""

from nixl_async.layers.calls import LayerCalls
from nixl_async.layers.exchanges import Exchanges
from nixl_async.layers.plan import LayerPlan
from nixl_async.layers.pull import Offer, Pull
from nixl_async.layers.push import Incoming, Push

__all__ = ["Exchanges", "Incoming", "LayerCalls", "LayerPlan", "Offer", "Pull", "Push"]
