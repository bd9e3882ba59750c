"""What `kv_connector_extra_config` may say, and what the scheduler's half of the connector tells the workers' half each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from nixl_async import ConfigurationError
from nixl_async.integrations.vllm.decode import Receive


@dataclass(frozen=True)
class Options:
    """The keys of `kv_connector_extra_config`; those that both sides must have alike are `mode`."""

    mode: str = "pull"
    """Who copies: "pull", the decode side reads, or "push", the prefill side writes."""
    layerwise: bool = False
    """Whether a prefill sends each layer as soon as a pass has computed it, to decode sides that ask before it has ended. CUDA
    graphs become piecewise."""
    load: str = "async"
    """On the decode side: "async", requests wait outside the batch until all has arrived; "sync", they are scheduled at once and
    the pass waits for each layer."""
    host: str | None = None
    """The address under which this rank is served and told to peers (default: vLLM's own idea of the machine's address)."""
    port: int = 0
    """The port of rank 0 of data-parallel rank 0; rank r of d has port + d * tensor parallelism + r (default: any free ones)."""
    token: str | None = None
    """The secret that both sides share (default: the environment's NIXL_ASYNC_TOKEN)."""
    authenticate: bool = True
    """Whether peers must know the token."""
    backends: tuple[str, ...] | None = None
    """The transports to use (default: all there are)."""
    lease_seconds: float = 30.0
    """How long a prefilled request's blocks wait for the decode side to want them, or to say again that it will."""
    orphan_seconds: float = 5.0
    """How long they wait for another decode side when the one that claimed them has died."""
    early_seconds: float = 120.0
    """How long a decode side that asks before the prefill has begun waits for it."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Options:
        """Read the keys.

        Raises:
            ConfigurationError: there is an unknown one, or a value is not allowed.
        """
        known = {one.name for one in fields(cls)}
        if unknown := sorted(set(config) - known):
            raise ConfigurationError(f"kv_connector_extra_config has {unknown}; NixlAsyncConnector knows {sorted(known)}")
        values = dict(config)
        if values.get("backends") is not None:
            values["backends"] = tuple(values["backends"])
        found = cls(**values)
        for name, allowed in (("mode", ("pull", "push")), ("load", ("async", "sync"))):
            if getattr(found, name) not in allowed:
                raise ConfigurationError(f"{name} is {getattr(found, name)!r}; it must be one of {allowed}")
        for name in ("lease_seconds", "orphan_seconds", "early_seconds"):
            if not getattr(found, name) >= 0:
                raise ConfigurationError(f"{name} is {getattr(found, name)!r}; it must be a number of seconds, at least 0")
        return found


@dataclass
class NixlAsyncHandshake(KVConnectorHandshakeMetadata):
    """Where a worker is served, for the scheduler to hand on in `kv_transfer_params`."""

    address: str


@dataclass(frozen=True)
class Advance:
    """A request of which this step computes tokens: its blocks in each group, and how many tokens are in them afterwards."""

    request: str
    blocks: list[list[int]]
    tokens: int
    final: bool


@dataclass(frozen=True)
class Finish:
    """A prefilled request whose blocks the workers take over, for as long as the lease."""

    request: str
    transfer: str
    blocks: list[list[int]]
    tokens: int
    lease: float


@dataclass(frozen=True)
class Release:
    """A request of which nothing is needed of the prefill side."""

    request: str
    transfer: str
    addresses: tuple[str, ...]


@dataclass
class NixlAsyncMetadata(KVConnectorMetadata):
    """One step's news from the scheduler."""

    receive: list[Receive] = field(default_factory=list)
    release: list[Release] = field(default_factory=list)
    claim: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    cancel: set[str] = field(default_factory=set)
    begin: dict[str, str] = field(default_factory=dict)
    """Requests whose prefill begins, and what they are called between the two sides."""
    advance: list[Advance] = field(default_factory=list)
    finish: list[Finish] = field(default_factory=list)
    abort: dict[str, bool] = field(default_factory=dict)
    """Requests whose prefill was given up, and whether the scheduler waits for their blocks."""
    preempted: set[str] = field(default_factory=set)
