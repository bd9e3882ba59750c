"""`--runtime ray`: an actor for each rank, wherever Ray puts it, starts the rank's processes; the driver conducts."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from nixl_async.benchmarks.transfer.contenders import contenders
from nixl_async.benchmarks.transfer.control import ControlServer, Launcher, RemoteLauncher, connect, serve_launcher
from nixl_async.benchmarks.transfer.machine import header
from nixl_async.benchmarks.transfer.options import Options
from nixl_async.errors import ConfigurationError, MissingDependency

START_SECONDS = 120.0


class Rank:
    """The actor of a rank."""

    async def serve(self, options: Options, address: tuple[str, int], secret: str, name: str) -> None:
        """Start and end processes here as the conductor says, until it says good-bye."""
        channel = await connect(*address, secret, name)
        launcher = Launcher(address, secret)
        known = {one.label: one for one in contenders(options)}
        try:
            await serve_launcher(channel, launcher, known, lambda: header(known.values()))
        finally:
            await launcher.aclose()
            await channel.aclose()


@asynccontextmanager
async def on_ray(options: Options) -> AsyncIterator[tuple[ControlServer, list[Launcher | RemoteLauncher]]]:
    """Connect to Ray's cluster (or start a local one), make the actors and have them connect; leaving ends them.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigurationError: there is no such cluster, or it does not start the actors.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError as error:
        raise MissingDependency(f"--runtime ray needs Ray: pip install ray ({error})") from error
    started = not ray.is_initialized()
    if started:
        await asyncio.to_thread(_begin, ray, options.ray_address or os.environ.get("RAY_ADDRESS"))
    server = ControlServer()
    actors: list[Any] = []
    serving: list[asyncio.Future[Any]] = []
    try:
        address = await server.open(options.address or ray.util.get_node_ip_address())
        # What they do costs Ray's own accounting nothing: the measured processes are not Ray's.
        kind = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(Rank)
        arrivals: list[asyncio.Future[Any]] = []
        for number in range(options.world):
            actor = kind.remote()
            actors.append(actor)
            answer = actor.serve.remote(options, address, server.secret, f"rank {number}")
            serving.append(asyncio.wrap_future(answer.future()))
            arrivals.append(server.arrival(f"rank {number}"))
        await _all_here(arrivals, serving)
        yield server, [RemoteLauncher(one.result(), f"rank {number}") for number, one in enumerate(arrivals)]
    finally:
        await server.aclose()
        for one in serving:
            one.cancel()
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if started:
            await asyncio.to_thread(ray.shutdown)


async def _all_here(arrivals: list[asyncio.Future[Any]], serving: list[asyncio.Future[Any]]) -> None:
    """Wait until all actors have connected, or one of them has ended."""
    everyone = asyncio.gather(*arrivals)
    await asyncio.wait([everyone, *serving], timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if everyone.done():
        return
    everyone.cancel()
    failed = [one.exception() for one in serving if one.done() and not one.cancelled()]
    if failed:
        raise ConfigurationError(f"an actor has ended before it could serve: {str(failed[0]).strip().splitlines()[-1]}")
    raise ConfigurationError(f"Ray has not started {len(arrivals)} actors within {START_SECONDS:g} s")


def _begin(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except ValueError:
        # An existing cluster takes no such options.
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigurationError(f"--ray-address {address}: there is no cluster ({error})") from None
