"""The tools for tests catch what they are there to catch."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nixl_async.testing import Canary, assert_same, cancel_after, cancel_at_await, pattern

LIAR = """
from nixl_async.backends.memory import MemoryBackend
from nixl_async.testing import BackendTests

class Liar(MemoryBackend):
    name = "liar"
    def copy_now(self, op):
        return {now}
    async def copy(self, op):
        {copy}

class TestLiar(BackendTests):
    backend = "test_liar:Liar"
    processes = False
    refuses_unregistered = False
    checks_bounds = False
"""


def test_patterns_differ_and_repeat() -> None:
    assert_same(pattern(1000, 1), pattern(1000, 1))
    assert not np.array_equal(pattern(1000, 1), pattern(1000, 2))
    broken = pattern(1000, 1)
    broken[500] ^= 1
    with pytest.raises(AssertionError, match="500"):
        assert_same(broken, pattern(1000, 1))


async def test_the_canary_sees_a_late_write() -> None:
    memory = np.zeros(100, np.uint8)
    canary = Canary(memory)
    canary.check()
    asyncio.get_running_loop().call_later(0.005, memory.__setitem__, 50, 1)
    with pytest.raises(AssertionError):
        await canary.watch()


async def test_a_coroutine_is_cancelled_at_each_of_its_awaits() -> None:
    reached = []

    async def three() -> None:
        for step in range(3):
            reached.append(step)
            await asyncio.sleep(0)

    for at in range(3):
        reached.clear()
        assert await cancel_at_await(three(), at)
        assert reached == list(range(at + 1))
    assert not await cancel_at_await(three(), 3)
    assert await cancel_after(asyncio.sleep(60), 0.001)
    assert not await cancel_after(asyncio.sleep(0), 5)


@pytest.mark.parametrize(
    ("now", "copy"),
    [("True", "pass"), ("False", "await __import__('asyncio').sleep(0)"), ("False", "raise ValueError('not ours')")],
    ids=["claims to have copied", "copies nothing", "raises a foreign error"],
)
def test_the_conformance_suite_fails_a_backend_that_lies(tmp_path: Path, root: Path, now: str, copy: str) -> None:
    (tmp_path / "test_liar.py").write_text(LIAR.format(now=now, copy=copy))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(root), check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "failed" in ran.stdout


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}
