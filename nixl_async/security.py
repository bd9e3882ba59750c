"""Who may connect and as whom: tokens, certificates, and the limits on connections that have not proved anything yet.

A token is a secret that both sides prove to each other (`nixl_async.wire`); it authenticates, and neither encrypts nor protects
what follows. TLS does, and binds a peer's name to its certificate.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nixl_async.errors import AuthenticationError, ConfigurationError

logger = logging.getLogger("nixl_async.security")

Secrets: TypeAlias = str | bytes | Sequence[str | bytes]
Token: TypeAlias = Secrets | Mapping[str, Secrets] | Callable[[str], Secrets | None]
"""One secret for all peers; several, of which the first is shown and every one is taken; or those of each peer by its name."""

URI_PREFIX = "nixl-async:"
_RELOAD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on what strangers can make a served agent hold.

    `handshake_seconds`: how long a connection may take to authenticate, TLS included. `half_open`: how many may be on their way to
    that at once; when one more comes, the oldest of the source that has the most gives way, those first that have said nothing.
    `per_second` and `burst`: how fast one source may come, counting only those that do not authenticate; what is more is
    closed at once. A source is an IPv4 address or an IPv6 /64. `connections`: how many connections may be open in all.
    """

    handshake_seconds: float = 5.0
    half_open: int = 256
    per_second: float = 200.0
    burst: int = 1024
    connections: int = 16384

    def __post_init__(self) -> None:
        for name in ("handshake_seconds", "per_second"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} is {value!r}; it must be a finite number above 0")
        for name in ("half_open", "burst", "connections"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"{name} is {value!r}; it must be an integer of at least 1")


class TLS:
    """How control connections are encrypted, and whose certificates are believed.

    `certificate` and `key` are PEM files of this agent's certificate chain and private key, `ca` one with the authorities that sign
    the peers' certificates. All three make mutual TLS: each side shows a certificate, and tokens are optional. An agent that only
    connects may give `ca` alone, and one that is served may leave it out: then only the served side shows a certificate,
    and tokens are needed. The files are read again when they change; connections that exist stay.

    `server` and `client` are contexts (`ssl.SSLContext`) to use instead, for accepting and for connecting.

    A peer must have the name that its certificate gives it: one of its DNS names (wildcards mean nothing), a URI
    "nixl-async:NAME", any other URI as a whole, or, where there are neither, its common name. `allows(certificate, name)`
    replaces that rule; `certificate` is what `ssl.SSLSocket.getpeercert` returns.

    Raises:
        ConfigurationError: a file cannot be read, or they do not fit together.
    """

    def __init__(
        self,
        *,
        certificate: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        ca: str | os.PathLike[str] | None = None,
        server: ssl.SSLContext | None = None,
        client: ssl.SSLContext | None = None,
        allows: Callable[[Mapping[str, Any], str], bool] | None = None,
    ) -> None:
        given = (certificate, key, ca)
        if (server or client) and any(given):
            raise ConfigurationError(
                "give TLS either files (certificate=, key=, ca=) or contexts (server=, client=), not both"
            )
        if not (server or client) and not (certificate or ca):
            raise ConfigurationError("TLS needs certificate= and key=, ca=, or both; or contexts: server=, client=")
        if bool(certificate) != bool(key):
            raise ConfigurationError("TLS needs certificate= and key= together")
        self._files = None if server or client else tuple(None if one is None else os.fspath(one) for one in given)
        self._server, self._client = server, client
        self._allows = allows or certificate_allows
        self._stamps: list[tuple[int, int, int]] = []
        self._looked = 0.0
        self._check_context("server", server, ssl.PROTOCOL_TLS_SERVER)
        self._check_context("client", client, ssl.PROTOCOL_TLS_CLIENT)
        if self._files is not None:
            self._stamps = self._stat()
            self._load()

    def __repr__(self) -> str:
        return f"<TLS: {'mutual' if self.mutual else 'the served side shows a certificate'}>"

    @property
    def mutual(self) -> bool:
        """Whether peers that connect to us must show a certificate."""
        return self._server is not None and self._server.verify_mode == ssl.CERT_REQUIRED

    @property
    def only_connects(self) -> bool:
        """Whether it cannot be served with; whoever it connects to is verified."""
        return self._server is None

    def server_context(self) -> ssl.SSLContext:
        """Return the context for accepting.

        Raises:
            ConfigurationError: there is no certificate to be served with.
        """
        self._refresh()
        if self._server is None:
            raise ConfigurationError("TLS has no certificate to serve with: give certificate= and key=, or server=")
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """Return the context for connecting.

        Raises:
            ConfigurationError: there is nothing to verify the other side with.
        """
        self._refresh()
        if self._client is None:
            raise ConfigurationError("TLS cannot verify whom it connects to: give ca=, or client=")
        return self._client

    def check_name(self, certificate: Mapping[str, Any] | None, name: str) -> None:
        """Check that a peer's certificate gives it the name it has.

        Raises:
            AuthenticationError: it does not.
        """
        if not certificate or not self._allows(certificate, name):
            held = ", ".join(map(repr, certificate_names(certificate or {}))) or "none"
            raise AuthenticationError(f"the certificate of {name!r} does not give it that name; the names in it are: {held}")

    def _check_context(self, which: str, context: ssl.SSLContext | None, protocol: ssl._SSLMethod) -> None:
        if context is None:
            return
        if not isinstance(context, ssl.SSLContext) or context.protocol not in (protocol, ssl.PROTOCOL_TLS):
            raise ConfigurationError(f"{which}= must be an ssl.SSLContext of {protocol.name}, not {context!r}")
        if which == "client" and context.verify_mode != ssl.CERT_REQUIRED:
            raise ConfigurationError("client= verifies nobody: its verify_mode must be ssl.CERT_REQUIRED")

    def _stat(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in self._files or ():
            if path is not None:
                try:
                    found = os.stat(path)
                except OSError as error:
                    raise ConfigurationError(f"TLS cannot read {path}: {error.strerror}") from None
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return stamps

    def _load(self) -> None:
        assert self._files is not None
        certificate, key, ca = self._files
        server = client = None
        try:
            if certificate is not None:
                server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                server.minimum_version = ssl.TLSVersion.TLSv1_3
                server.load_cert_chain(certificate, key)
                if ca is not None:
                    server.load_verify_locations(ca)
                    server.verify_mode = ssl.CERT_REQUIRED
            if ca is not None:
                client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                client.minimum_version = ssl.TLSVersion.TLSv1_3
                # Peers are known by their agents' names, whatever address they are reached at.
                client.check_hostname = False
                client.load_verify_locations(ca)
                if certificate is not None:
                    client.load_cert_chain(certificate, key)
        except (OSError, ValueError) as error:
            shown = ", ".join(path for path in self._files if path)
            raise ConfigurationError(f"TLS cannot use {shown}: {error}") from None
        self._server, self._client = server, client

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._files is None or now - self._looked < _RELOAD_SECONDS:
            return
        self._looked = now
        try:
            stamps = self._stat()
            if stamps != self._stamps:
                self._load()
                self._stamps = stamps
        except ConfigurationError as error:
            # One file may have been replaced already and the other not yet: what was loaded stays until they fit again.
            logger.warning("certificates were not renewed: %s", error)


def certificate_names(certificate: Mapping[str, Any]) -> list[str]:
    """Return the names that a certificate gives to an agent; see `TLS`."""
    names = []
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "DNS":
            names.append(value)
        elif kind == "URI":
            names.append(value.removeprefix(URI_PREFIX))
    if names:
        return names
    return [value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"]


def certificate_allows(certificate: Mapping[str, Any], name: str) -> bool:
    """Tell whether a certificate gives an agent this name."""
    return name in certificate_names(certificate)


class Credentials:
    """What an agent shows and what it believes: its tokens and its TLS. Never shown by `repr`, never logged."""

    def __init__(self, token: Token | None, tls: TLS | None = None) -> None:
        if tls is not None and not isinstance(tls, TLS):
            raise ConfigurationError(f"tls is {type(tls).__name__}; it must be a TLS, such as TLS(certificate=…, key=…, ca=…)")
        self.tls = tls
        self.by_name = callable(token) or isinstance(token, Mapping)
        """Whether each peer has a secret of its own, so that knowing one is worth one name only."""
        self._token = token
        self._shared = () if token is None or self.by_name else read_secrets(token)
        if isinstance(token, Mapping):
            for name, one in token.items():
                if not isinstance(name, str):
                    raise ConfigurationError(f"token has the key {name!r}; its keys are the names of peers")
                read_secrets(one)

    def __repr__(self) -> str:
        tokens = "no token" if self._token is None else "a token for each name" if self.by_name else "a shared token"
        return f"<Credentials: {tokens}, {self.tls or 'no TLS'}>"

    @property
    def has_token(self) -> bool:
        """Whether there is a token."""
        return self._token is not None

    @property
    def authenticates(self) -> bool:
        """Whether peers have to prove anything."""
        return self._token is not None or (self.tls is not None and (self.tls.mutual or self.tls.only_connects))

    def secrets(self, name: str) -> tuple[bytes, ...]:
        """Return the secrets shared with the agent called `name`, the one to be shown first; none if it has none."""
        if not self.by_name:
            return self._shared
        found = self._token.get(name) if isinstance(self._token, Mapping) else self._token(name)  # type: ignore[operator,misc]
        return () if found is None else read_secrets(found)

    def binds_names(self, *, connecting: bool) -> bool:
        """Tell whether a peer that authenticated has proved its name, and not only that it belongs to the group."""
        return self.by_name or (self.tls is not None and (connecting or self.tls.mutual))


def read_secrets(given: object) -> tuple[bytes, ...]:
    """Return one or several secrets as bytes.

    Raises:
        ConfigurationError: one is empty, or of a wrong type; the message does not show it.
    """
    listed = [given] if isinstance(given, str | bytes) else given
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(one, str | bytes) for one in listed):
        raise ConfigurationError(
            f"a token is a {type(given).__name__}; it must be a str, bytes, a list of these, a mapping from peers' names to"
            " them, or a callable that returns them"
        )
    if not all(listed):
        raise ConfigurationError("token is empty; give a secret, or authenticate=False to do without")
    return tuple(one.encode() if isinstance(one, str) else one for one in listed)
