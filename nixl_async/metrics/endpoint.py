"""An HTTP endpoint for Prometheus, on a thread: it answers while the event loop is stuck, which is when it is wanted most."""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

from nixl_async.errors import ConfigurationError
from nixl_async.metrics.collector import AgentCollector
from nixl_async.metrics.multiprocess import DIRECTORY_VARIABLE, Mirror

if TYPE_CHECKING:
    from nixl_async.agent import Agent

LOOPBACK = "127.0.0.1"


class Endpoint:
    """`async with serve(agent, port=9400) as endpoint`; `address` is where it listens, (host, port)."""

    def __init__(self, agents: tuple[Agent, ...], host: str, port: int) -> None:
        if not agents:
            raise ConfigurationError("serve was given no agent; give at least one")
        self.address = host, port
        self._collector = AgentCollector(*agents)
        self._mirror: Mirror | None = None

    async def __aenter__(self) -> Endpoint:
        registry = CollectorRegistry()
        if os.environ.get(DIRECTORY_VARIABLE):
            # What other processes have written there is shown too; they do not listen.
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            self._mirror = Mirror(self._collector)
        else:
            registry.register(self._collector)
        host, port = self.address
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"metrics cannot be served at {host}:{port}: {error}; choose another address") from error
        self.address = host, int(self._server.server_address[1])
        if self._mirror is not None:
            self._mirror.start()
        else:
            self._collector.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mirror is not None:
            self._mirror.stop()
        else:
            self._collector.stop()
        server, thread = self._server, self._thread

        def shut() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        # It takes up to half a second.
        await asyncio.shield(asyncio.to_thread(shut))


def serve(*agents: Agent, host: str = LOOPBACK, port: int = 0) -> Endpoint:
    """Serve the metrics of agents of this process at http://`host`:`port`/metrics (0: any free port).

    `host` is the loopback address unless another is given: whoever reaches the port reads names of agents and peers. Where
    PROMETHEUS_MULTIPROC_DIR is set it serves those of all processes that share that directory, see `publish`.

    Raises:
        ConfigurationError: when the block is entered: the address cannot be used.
    """
    return Endpoint(agents, host, port)
