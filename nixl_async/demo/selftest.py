"""The self-test: a small job by every backend that can be tried without anybody's help, every byte checked."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from nixl_async.agent import Agent
from nixl_async.backend import BUILT_IN, StorageBackend, load_backend
from nixl_async.demo.job import Job
from nixl_async.demo.run import DemoFailed, run_job
from nixl_async.errors import MissingDependency, NixlError

N_BLOCKS, BLOCK_NBYTES = 128, 65_536
LOCAL = frozenset({"memory", "posix", "directory", "staging"})
"""Those that are tried within this process, with files in a temporary directory."""
DEVICE = frozenset({"cuda", "gds"})


async def try_backends() -> AsyncIterator[tuple[str, bool | None, str]]:
    """Yield for each backend its name, whether it works (`None`: not tried), and what there is to say."""
    job = Job("llama-3.1-8b", 64, 16, 8, 0.0)
    for name in BUILT_IN:
        try:
            backend = load_backend(name)
            if name in LOCAL:
                yield name, True, f"{await _try_local(name)} bytes checked"
            elif name in DEVICE:
                yield name, True, f"{await _try_device(name)} bytes checked"
            elif isinstance(backend, StorageBackend):
                yield name, None, "needs a server: open a store to try it"
            else:
                result = await run_job(job, [name])
                yield name, bool(result["verified"]) and result["route"] == name, f"{result['bytes']} bytes checked"
        except MissingDependency as error:
            yield name, None, f"not here: {error}"
        except (DemoFailed, NixlError) as error:
            yield name, False, str(error)


async def _try_local(name: str) -> int:
    sent = np.random.default_rng(1).integers(0, 255, N_BLOCKS * BLOCK_NBYTES, np.uint8)
    got = np.zeros_like(sent)
    order = np.random.default_rng(2).permutation(N_BLOCKS)
    with tempfile.TemporaryDirectory() as directory:
        backends = ["memory", "posix", "directory"] if name == "staging" else [name]
        async with Agent("self-test", backends=backends) as agent:
            source, target = await agent.register(sent), await agent.register(got)
            if name == "memory":
                route = (await agent.transfer(source.pages(order, BLOCK_NBYTES), target.pages(order, BLOCK_NBYTES))).route
            elif name == "directory":
                store = await agent.store(f"file://{directory}")
                objects = store.objects([f"block-{i}" for i in order], BLOCK_NBYTES)
                route = (await agent.transfer(source.pages(order, BLOCK_NBYTES), objects)).route
                await agent.transfer(objects, target.pages(order, BLOCK_NBYTES))
            else:
                route = await _through_file(agent, Path(directory), source, target, order, copied=name == "staging")
    _check(name, route, got, sent)
    return sent.nbytes


async def _through_file(agent: Agent, directory: Path, source: object, target: object, order: object, *, copied: bool) -> str:
    async with agent.file(directory / "blocks", "w", nbytes=N_BLOCKS * BLOCK_NBYTES) as file:
        route = (await agent.transfer(source.pages(order, BLOCK_NBYTES), file[:])).route  # type: ignore[attr-defined]
        if copied:
            async with agent.file(directory / "copy", "w", nbytes=file.nbytes) as copy:
                route = (await agent.transfer(file[:], copy[:])).route
                await agent.transfer(copy[:], target.pages(order, BLOCK_NBYTES))  # type: ignore[attr-defined]
        else:
            await agent.transfer(file[:], target.pages(order, BLOCK_NBYTES))  # type: ignore[attr-defined]
    return route


async def _try_device(name: str) -> int:
    import cupy

    sent = np.random.default_rng(1).integers(0, 255, N_BLOCKS * BLOCK_NBYTES, np.uint8)
    got = np.zeros_like(sent)
    on_device = cupy.asarray(sent)
    with tempfile.TemporaryDirectory() as directory:
        async with Agent(
            "self-test", backends=["memory", "posix", "cuda", name] if name != "cuda" else ["memory", "cuda"]
        ) as agent:
            source, target = await agent.register(on_device), await agent.register(got)
            if name == "cuda":
                route = (await agent.transfer(source, target)).route
            else:
                async with agent.file(Path(directory) / "blocks", "w", nbytes=sent.nbytes) as file:
                    route = (await agent.transfer(source, file[:])).route
                    await agent.transfer(file[:], target)
    _check(name, route, got, sent)
    return sent.nbytes


def _check(name: str, route: str, got: object, sent: object) -> None:
    if route != name or not np.array_equal(got, sent):  # type: ignore[arg-type]
        raise DemoFailed(f"{name}: the bytes went by {route}" if route != name else f"{name}: wrong bytes arrived")
