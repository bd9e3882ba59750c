"""Fences: a peer confirms that nothing is written any more for ops that were given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from nixl_async.backend import Backend
from nixl_async.errors import ConfigurationError, NixlError, PeerLost, TransferError
from nixl_async.link import Link
from nixl_async.peers import Peer
from nixl_async.questions import Questions
from nixl_async.superseding import Superseding
from nixl_async.wire import FrameType, encode_json

FENCE_SECONDS = 3.0
"""How long a peer may take to confirm that nothing is written for ops that were given up: with the second that a cancelled op has
to end by itself that is less than backends' `drain_seconds`."""


class Fences:
    """Asks peers for fences, and confirms those that they ask for.

    `find(name)` returns a peer, one that is parting included.
    """

    def __init__(
        self,
        backends: Callable[[], Iterable[Backend]],
        find: Callable[[str], Peer],
        questions: Questions,
        superseding: Superseding,
    ) -> None:
        self._backends, self._find, self._questions, self._superseding = backends, find, questions, superseding

    async def fence(self, backend: str, name: str, mark: bytes) -> None:
        """Have a peer's backend fence off ops that were given up; see `Host.fence`."""
        peer = self._find(name)
        try:
            async with asyncio.timeout(FENCE_SECONDS):
                while (link := peer.link) is not None:
                    error = await self._questions.ask(link, FrameType.FENCE, backend=backend, mark=mark.hex())
                    if error == "":
                        return
                    if error is not None:
                        raise TransferError(f"peer {name!r} does not confirm that it is quiet: {error}", peer=name)
                    if not link.superseded:
                        break
                    await self._superseding.replaced(peer, link)
        except TimeoutError:
            raise TransferError(
                f"peer {name!r} did not confirm within {FENCE_SECONDS:g} s that it is quiet", backend=backend, peer=name
            ) from None
        raise PeerLost(peer.gone or f"the control connection to {name!r} ended", backend=backend, peer=name)

    async def confirm(self, link: Link, peer: Peer, name: str, mark: str, number: int) -> None:
        """Fence off what a peer's backend called `name` has given up, and answer that it is, or why not."""
        backend = next((one for one in self._backends() if one.name == name), None)
        answer: dict[str, Any] = {"id": number}
        try:
            if backend is None or name not in peer.infos:
                raise ConfigurationError(f"it has no backend {name!r} for {peer.name!r}")
            await backend.fence(peer.infos[name], bytes.fromhex(mark))
        except (NixlError, ValueError) as error:
            answer["error"] = str(error) or type(error).__name__
        link.send(encode_json(FrameType.FENCED, answer))
