"""Waiting for what a membership tells."""

from __future__ import annotations

from nixl_async.peers import MembershipEvents


async def until(events: MembershipEvents, kind: str, name: str, *, after: tuple[str, str] | None = None) -> None:
    """Wait for an event, the first behind another one if `after` names it."""
    async for event in events:
        if after is not None:
            after = None if (event.kind, event.peer) == after else after
        elif (event.kind, event.peer) == (kind, name):
            return
    raise AssertionError(f"the agent closed before {name!r} was {kind}")
