"""What an agent offers for layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nixl_async.errors import ConfigurationError
from nixl_async.layers.mover import Route
from nixl_async.layers.plan import LayerPlan, check_request
from nixl_async.layers.pull import Offer, Pull
from nixl_async.layers.push import Incoming, Push
from nixl_async.transfer import TrafficClass

if TYPE_CHECKING:
    from nixl_async.layers.exchanges import Exchanges
    from nixl_async.peers import Peer


class LayerCalls:
    """Pushes and pulls of layers."""

    _exchanges: Exchanges

    def _check_open(self) -> None:
        raise NotImplementedError

    def push(
        self,
        peer: str | Peer,
        plan: LayerPlan,
        *,
        window: int | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        backend: str | None = None,
        verify: str | bool | None = None,
    ) -> Push:
        """Write a request's layers into a peer's memory, each when it is ready: `async with agent.push(peer, plan) as push`.

        The peer takes them by `incoming` under the same request. At most `window` layers are on their way or there and not yet used
        by the peer (default: all), so that the peer's side may be a ring of `window` buffers. `traffic_class`, `priority`,
        `deadline` and `verify` are each transfer's, see `Agent.transfer`; `backend` forces the route.

        Raises:
            ConfigurationError: an option is wrong.
            PeerLost: when the block is entered or left: the peer is not connected, or was lost.
        """
        options = {"priority": priority, "traffic_class": traffic_class, "deadline": deadline, "verify": verify}
        return Push(self._of_layers(), plan, _window(window), Route(_name(peer), True, backend, options))

    def incoming(self, request: str, *, peer: str | Peer | None = None) -> Incoming:
        """Take the layers of a request that a peer (any, if None) pushes into this agent's memory, as they come.

        Use it as `async with agent.incoming(request) as incoming`, and iterate over `incoming.layers()`. Where several ranks push
        parts of one request, open one for each and take layer after layer from all of them.
        """
        return Incoming(self._of_layers(), check_request(request), None if peer is None else _name(peer))

    def pull(
        self,
        peer: str | Peer,
        plan: LayerPlan,
        *,
        window: int | None = None,
        have: Iterable[int] = (),
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        backend: str | None = None,
        verify: str | bool | None = None,
    ) -> Pull:
        """Read a request's layers out of a peer's memory, each when the peer, by `offer`, says that it is ready.

        Iterate over it: `async for layer in agent.pull(peer, plan)`; where the loop may be left early, use it as
        `async with … as pull` and iterate over `pull.layers()`. At most `window` layers are being read or wait to be used (default:
        all). `have` are layers that are there already, as after a peer that was lost: `lost_pull.arrived`.

        Raises:
            ConfigurationError: an option is wrong.
            PeerLost: the peer is not connected, or was lost.
        """
        options = {"priority": priority, "traffic_class": traffic_class, "deadline": deadline, "verify": verify}
        return Pull(self._of_layers(), plan, _window(window), Route(_name(peer), False, backend, options), have)

    def offer(self, peer: str | Peer, request: str, n_layers: int) -> Offer:
        """Let a peer read the layers of a request out of this agent's memory, each when it is ready; see `pull`.

        Use it as `async with agent.offer(peer, request, n_layers) as offer`, and call `offer.ready(layer)`.
        """
        if not isinstance(n_layers, int) or n_layers < 1:
            raise ConfigurationError(f"n_layers={n_layers!r} must be a whole number of at least 1")
        return Offer(self._of_layers(), check_request(request), _name(peer), n_layers)

    def _of_layers(self) -> Exchanges:
        self._check_open()
        return self._exchanges


def _name(peer: Any) -> str:
    return peer if isinstance(peer, str) else str(peer.name)


def _window(window: int | None) -> int | None:
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigurationError(f"window={window!r} must be a whole number of layers of at least 1, or None")
    return window
