"""What every discovery store does, and the URLs by which one is chosen."""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from nixl_async.errors import BackendError, ConfigurationError

LEASE_SECONDS = 10.0
LEAST_LEASE_SECONDS = 2.0
FAILURES = (OSError, BackendError)
"""What a store raises while it cannot be used: try again."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a watch saw: values by agent name, `None` where one is gone. `whole`: these are all there are."""

    values: Mapping[str, bytes | None]
    whole: bool = False


@dataclass(frozen=True, slots=True)
class StoreURL:
    """A discovery URL taken apart; `hosts` are host:port texts, `options` the query's. Its text never shows the password."""

    scheme: str
    hosts: tuple[str, ...]
    path: str
    options: Mapping[str, str]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        user = f"{self.user}:…@" if self.user else ""
        return f"{self.scheme}://{user}{','.join(self.hosts)}{self.path}"

    @property
    def lease_seconds(self) -> float:
        """How long an entry stays after its owner was heard of last: the option `ttl`."""
        text = self.options.get("ttl", str(LEASE_SECONDS))
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not LEAST_LEASE_SECONDS <= seconds <= 86400:
            raise ConfigurationError(f"ttl={text!r} of {self} must be {LEAST_LEASE_SECONDS:g} to 86400 seconds")
        return seconds

    def check_options(self, *allowed: str) -> None:
        """Refuse options that are not `allowed`."""
        for name in self.options:
            if name not in allowed:
                raise ConfigurationError(f"{self} has the unknown option {name!r}; it may have {', '.join(allowed)}")

    @classmethod
    def parse(cls, url: str) -> StoreURL:
        """Take a URL apart.

        Raises:
            ConfigurationError: it has no scheme.
        """
        scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
        if not separator or not scheme:
            # It may hold a password: it is not shown.
            raise ConfigurationError("discovery is no URL; give one such as etcd://host:2379 or file:///shared/agents")
        rest, _, query = rest.partition("?")
        authority, slash, path = rest.partition("/")
        signed, _, hosts = authority.rpartition("@")
        user, _, password = signed.partition(":")
        listed = tuple(one.strip() for one in hosts.split(",") if one.strip())
        options = dict(parse_qsl(query, keep_blank_values=True))
        return cls(scheme, listed, unquote(slash + path), options, unquote(user), unquote(password))


class DiscoveryStore(abc.ABC):
    """A place where agents publish a small value under their name and see those of others. It belongs to one event loop.

    Every call may raise one of `FAILURES` while the store cannot be reached, and may be made again.
    """

    lease_seconds: float
    """Within this time after its owner was heard of last an entry vanishes; 0 where entries have no lease."""
    holds_metadata = False
    """Whether whole metadata blobs are kept too, where stock NIXL agents look for them."""
    server: tuple[str, int] | None = None
    """A host and port of the store, by which an agent finds its own address; `None` where it has none."""

    @abc.abstractmethod
    async def put(self, name: str, value: bytes) -> None:
        """Publish a value under a lease of this store object; it replaces the one there is."""

    @abc.abstractmethod
    async def keep(self) -> None:
        """Renew the lease for as long as this runs; return when it is lost and everything must be put again."""

    @abc.abstractmethod
    async def remove(self, name: str) -> None:
        """Take back what this store object has put, unless another has replaced it."""

    @abc.abstractmethod
    def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all there is, then each change, for as long as the store can be reached."""

    def hurry(self) -> None:  # noqa: B027
        """Take note that somebody waits: a store that is polled looks again at once."""

    async def put_metadata(self, name: str, blob: bytes) -> None:
        """Publish a whole metadata blob under the same lease; only where `holds_metadata`."""
        raise NotImplementedError

    def watch_metadata(self, name: str) -> AsyncGenerator[bytes | None, None]:
        """Yield the blob of that agent, `None` if there is none, then what it becomes; only where `holds_metadata`."""
        raise NotImplementedError

    async def aclose(self) -> None:  # noqa: B027
        """Let go of what the store object holds, the lease included; entries that are left vanish."""
