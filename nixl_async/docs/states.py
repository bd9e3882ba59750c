"""The figure of a transfer's states: where each stands is said here, what leads where is the library's own table."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT = 848, 256
BOX_WIDTH, BOX_HEIGHT = 116, 40
PLACES = {
    "QUEUED": (98, 36),
    "ACTIVE": (580, 36),
    "DONE": (786, 36),
    "DRAINING": (580, 172),
    "FAILED": (310, 124),
    "CANCELLED": (310, 224),
}
"""The middle of each state's box; no two arrows cross."""


def picture(transitions: Mapping[enum.Enum, Mapping[enum.Enum, enum.Enum]]) -> str:
    """Draw the table as SVG that takes the page's colors.

    Raises:
        KeyError: a state has no place.
    """
    labels: dict[tuple[str, str], list[str]] = {}
    for old, arrows in transitions.items():
        for event, new in arrows.items():
            labels.setdefault((old.name, new.name), []).append(event.value)
    x, y = PLACES["QUEUED"]
    start = x - BOX_WIDTH / 2 - 26
    parts = [
        f'<svg class="transfer-states" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' aria-label="The states of a transfer and what leads from one to the next">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<circle cx="{start}" cy="{y}" r="5"/>',
        _arrow((start, y), (x - BOX_WIDTH / 2, y)),
    ]
    for (old, new), events in labels.items():
        a, b = PLACES[old], PLACES[new]
        parts.append(_arrow(_edge(a, b), _edge(b, a)))
        tail, head = _edge(a, b), _edge(b, a)
        upright = abs(tail[0] - head[0]) < 1
        left, top = (tail[0] + head[0]) / 2 + (8 if upright else 0), (tail[1] + head[1]) / 2 + 5
        anchor = "start" if upright else "middle"
        parts.append(f'<text class="event" x="{left:g}" y="{top:g}" text-anchor="{anchor}">{escape(", ".join(events))}</text>')
    for state, arrows in transitions.items():
        x, y = PLACES[state.name]
        kind = "state" if arrows else "state final"
        parts.append(
            f'<rect class="{kind}" x="{x - BOX_WIDTH / 2:g}" y="{y - BOX_HEIGHT / 2:g}" width="{BOX_WIDTH}"'
            f' height="{BOX_HEIGHT}" rx="7"/>'
        )
        parts.append(f'<text class="name" x="{x}" y="{y + 5}" text-anchor="middle">{escape(state.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _arrow(tail: tuple[float, float], head: tuple[float, float]) -> str:
    return f'<path class="arrow" d="M{tail[0]:g} {tail[1]:g}L{head[0]:g} {head[1]:g}" marker-end="url(#arrow)"/>'


def _edge(of: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """Return where the line between two boxes' middles leaves the first."""
    right, down = towards[0] - of[0], towards[1] - of[1]
    scale = min(BOX_WIDTH / 2 / abs(right) if right else 9, BOX_HEIGHT / 2 / abs(down) if down else 9)
    return of[0] + right * scale, of[1] + down * scale
