"""The event loops that tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop


def debug_loop() -> asyncio.AbstractEventLoop:
    """Make an asyncio loop in debug mode, whose slow callbacks conftest judges and not the log."""
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 60.0
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "debug": debug_loop,
    "uvloop": uvloop.new_event_loop,
}

every_loop = pytest.mark.asyncio(loop_factories=list(LOOPS))
"""Runs a test on each loop; without it a test runs in debug mode."""
