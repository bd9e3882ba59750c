"""The places that are asked about and tried: memory here and at two peers, files, objects; and the peers' side of it."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nixl_async.agent import DEFAULT_BACKENDS, OPTIONAL_BACKENDS, Agent
from nixl_async.backend import Backend, load_backend
from nixl_async.cuda import device_count
from nixl_async.descriptors import Places
from nixl_async.errors import MissingDependency, NixlError, RegistrationError, TransferError

PAGE_NBYTES = 64 << 10
SAME_HOST, OTHER_HOST = "same host", "other host"
ACROSS_HOSTS = ("tcp", "ucx")
"""What the peer that stands for another host has: what goes over a network."""
HERE, HERE_VRAM, FILE, OBJECT = "DRAM", "VRAM", "file", "object"
Say = Callable[..., None]


@dataclass(slots=True, eq=False)
class Place:
    """A place as the first and as the second side of a transfer: other bytes of the same kind, so that it can be both at once."""

    name: str
    src: Places
    dst: Places


@dataclass(eq=False)
class Stage:
    """An open agent, its places by name, and why other places are not there."""

    agent: Agent
    nbytes: int
    places: dict[str, Place] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    memory: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The arrays behind the memory of this process: what is sent and what is received."""
    files: tuple[Any, Any] | None = None
    direct: Any = None
    """The first file past the page cache; `None` where its file system has no such thing."""


def make_backends(names: tuple[str, ...], without: dict[str, str]) -> tuple[list[Backend], dict[str, str]]:
    """Make the backends of `names` that can be made and are not `without`; return also why the others are not there."""
    made, missing = [], {name: why for name, why in without.items() if name in names}
    for name in names:
        if name in missing:
            continue
        try:
            made.append(load_backend(name))
        except MissingDependency as error:
            missing[name] = str(error)
        except TransferError as error:
            if name not in OPTIONAL_BACKENDS:
                raise
            missing[name] = str(error)
    return sorted(made, key=lambda backend: backend.rank), missing


@asynccontextmanager
async def open_stage(setup: dict[str, Any], say: Say) -> AsyncIterator[Stage]:
    """Open the agent and every place there is; `setup` has the peers' addresses, bytes, a directory, and backends to leave out."""
    # With `staging`, which an agent has only when it is asked for: it is how stores and peers' memory are joined.
    names = (*DEFAULT_BACKENDS, "staging")
    backends, missing = await asyncio.to_thread(make_backends, names, setup["without"])
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(Agent("doctor", backends=backends, token=setup["token"]))
        ranks = {backend.name: backend.rank for backend in backends}
        say(event="opened", backends=ranks, missing=missing)
        stage = Stage(agent, setup["nbytes"])
        orders = [np.random.default_rng(seed).permutation(stage.nbytes // PAGE_NBYTES) for seed in (1, 2)]
        await _add_memory(stage, HERE, [np.zeros(stage.nbytes, np.uint8) for _ in range(2)], orders)
        if "cuda" in missing:
            stage.absent[HERE_VRAM] = missing["cuda"]
        else:
            import cupy

            await _add_memory(stage, HERE_VRAM, [cupy.zeros(stage.nbytes, cupy.uint8) for _ in range(2)], orders)
        for name, address in setup["peers"].items():
            await _add_peer(stage, name, address, orders[1])
        await _add_storage(stage, stack, Path(setup["directory"]), orders)
        for name, why in stage.absent.items():
            say(event="absent", place=name, why=why)
        yield stage


async def _add_memory(stage: Stage, name: str, arrays: list[Any], orders: list[Any]) -> None:
    pages = []
    for array, order in zip(arrays, orders, strict=True):
        region = await stage.agent.register(array)
        pages.append(region.pages(order, PAGE_NBYTES))
    stage.memory[name] = arrays[0], arrays[1]
    stage.places[name] = Place(name, *pages)


async def _add_peer(stage: Stage, name: str, address: str, order: Any) -> None:
    try:
        peer = await stage.agent.connect(address)
    except NixlError as error:
        stage.absent[f"{HERE}, {name}"] = str(error)
        return
    for kind in (HERE, HERE_VRAM):
        if kind in peer.regions:
            pages = peer.region(kind).pages(order, PAGE_NBYTES)
            stage.places[f"{kind}, {name}"] = Place(f"{kind}, {name}", pages, pages)


async def _add_storage(stage: Stage, stack: AsyncExitStack, directory: Path, orders: list[Any]) -> None:
    agent, nbytes = stage.agent, stage.nbytes
    try:
        files = [await stack.enter_async_context(agent.file(directory / f"{n}", "w", nbytes=nbytes)) for n in range(2)]
        stage.files = files[0], files[1]
        stage.places[FILE] = Place(FILE, files[0][:], files[1][:])
    except NixlError as error:
        stage.absent[FILE] = str(error)
        return
    try:
        stage.direct = await stack.enter_async_context(agent.file(directory / "direct", "w", nbytes=nbytes, direct=True))
    except NixlError as error:
        stage.absent["file past the page cache"] = str(error)
    store = await agent.store(f"file://{directory}/objects")
    keys = [[f"{side}-{number}" for number in order] for side, order in zip("ab", orders, strict=True)]
    stage.places[OBJECT] = Place(OBJECT, *(store.objects(names, PAGE_NBYTES) for names in keys))


async def be_peer(setup: dict[str, Any], say: Say) -> None:
    """Serve memory to the agent that examines, until standard input ends."""
    across = setup["name"] == OTHER_HOST
    names = ACROSS_HOSTS if across else DEFAULT_BACKENDS
    backends, missing = await asyncio.to_thread(make_backends, names, setup["without"])
    async with Agent(setup["name"], backends=backends, token=setup["token"]) as agent:
        await agent.register(np.zeros(setup["nbytes"], np.uint8), name=HERE)
        if device_count() and "cuda" not in setup["without"] and (across or "cuda" not in missing):
            import cupy

            # Across hosts only ucx takes a device's memory, where it is installed and built for that.
            with suppress(RegistrationError):
                await agent.register(cupy.zeros(setup["nbytes"], cupy.uint8), name=HERE_VRAM)
        host, port = await agent.serve("127.0.0.1", 0)
        say(event="serving", address=f"{host}:{port}")
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def make_token() -> str:
    """Return a secret for one examination."""
    return secrets.token_hex(16)
