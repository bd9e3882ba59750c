"""Our L2 adapter in several processes on one place: what one stores the other loads, and one that is killed leaves whole chunks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import key_of, load, look_up, object_of, store
from writer import CHUNK, content

from nixl_async.integrations.lmcache import NixlAsyncL2Adapter

Make = Callable[..., NixlAsyncL2Adapter]
Parameters = Callable[[str], dict[str, Any]]
Start = Callable[..., subprocess.Popen[str]]
SHARED = ["directory", "s3", "tiers", "tiers to s3"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return what starts a process that stores keys; all are killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(given: dict[str, Any], first: int, last: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("writer.py")), json.dumps(given), str(first), str(last)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_all(process: subprocess.Popen[str]) -> None:
    """Wait until a writer has stored all keys."""
    assert process.stdout is not None
    assert "all\n" in iter(process.stdout.readline, "")


def check(adapter: NixlAsyncL2Adapter, numbers: list[int]) -> list[bool]:
    """Look up and load keys; compare the bytes of those that are there; return which are."""
    keys = list(map(key_of, numbers))
    bits = look_up(adapter, keys, CHUNK)
    target = torch.zeros(len(keys), CHUNK, dtype=torch.uint8)
    loaded = load(adapter, keys, list(map(object_of, target)))
    for number, row, here in zip(numbers, target, loaded, strict=True):
        assert not here or torch.equal(row, content(number))
    assert bits == loaded
    return loaded


@pytest.mark.parametrize("place", SHARED)
def test_what_another_process_stores_is_there(place: str, parameters: Parameters, adapters: Make, start: Start) -> None:
    given = parameters(place)
    if place == "tiers to s3":
        # The DRAM in front is each process's own.
        given |= {"durable": True}
    if place == "tiers":
        given = {"tiers": given["tiers"][1:], "block_nbytes": given["block_nbytes"]}
    adapter = adapters(given)
    assert check(adapter, list(range(8))) == [False] * 8
    wait_all(start(given, 0, 8))
    assert check(adapter, list(range(8))) == [True] * 8
    assert check(adapter, [1 << 40]) == [False]


@pytest.mark.parametrize("place", SHARED[:3])
def test_a_killed_process_leaves_whole_chunks_or_none(
    place: str, parameters: Parameters, adapters: Make, start: Start
) -> None:
    given = parameters(place)
    if "tiers" in given:
        given |= {"durable": True}
    for turn in range(2):
        process = start(given, 1000 * turn, 1000 * turn + 5 + turn)
        wait_all(process)
        # In the middle of one of those that follow.
        process.kill()
        process.wait()
    adapter = adapters(given)
    for turn in range(2):
        promised = 5 + turn
        found = check(adapter, [1000 * turn + at for at in range(promised + 50)])
        assert found[:promised] == [True] * promised
        assert not all(found)
    assert store(adapter, [key_of(5)], [object_of(content(5))]).is_successful()
    assert check(adapter, [5]) == [True]
