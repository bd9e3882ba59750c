"""How the azure backend is configured: its options, whom requests are made for, and where a container is.

The SDK reads connection strings and account URLs, makes shared access signatures of account keys, and gets and renews tokens.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from nixl_async.backend import map_errors
from nixl_async.errors import AccessError, ConfigurationError, MissingDependency

try:
    from azure.core.credentials import AzureSasCredential
    from azure.core.exceptions import AzureError, ClientAuthenticationError
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas
    from azure.storage.blob.aio import ContainerClient
except ImportError as error:
    raise MissingDependency(
        f"the azure backend needs azure-storage-blob ({error}): pip install 'nixl-async[azure]'"
    ) from error

SAS_SECONDS = 3600
SKEW_SECONDS = 300
"""By how much our clock and the server's may differ, and how long before their end credentials are renewed."""
SCOPE = "https://storage.azure.com/.default"
DEFAULT_CREDENTIAL = "default"


@dataclass(frozen=True, slots=True)
class AzureOptions:
    """What `AzureBackend` and `agent.store("az://…")` take.

    Who we are: `connection_string` (or AZURE_STORAGE_CONNECTION_STRING), or `account_url` with `account_key`, `sas_token`, or
    `credential`: "default" for DefaultAzureCredential (needs azure-identity), any of azure-identity's asynchronous credentials, or
    azure-core's AzureSasCredential, whose owner renews it. With none of them, requests are anonymous.
    `checksum`: "md5" is sent with every put and asked for with every get, by ranges of at most 4 MiB, as the service tells none for
    longer ones. "crc64" (needs awscrt) takes a twentieth of the time to put; gets are checked by MD5 with it, too.
    `verify` is False or a CA file. Blobs above `block_threshold_nbytes` are put in blocks of
    `block_nbytes`; runs above `range_nbytes` are got by several requests.
    """

    connection_string: str | None = None
    account_url: str | None = None
    account_key: str | None = None
    sas_token: str | None = None
    credential: Any = None
    checksum: str | None = None
    verify: bool | str = True
    concurrency: int = 32
    block_threshold_nbytes: int = 64 << 20
    block_nbytes: int = 16 << 20
    range_nbytes: int = 32 << 20
    attempts: int = 5
    connect_timeout: float = 10.0
    read_timeout: float = 60.0

    def check(self) -> AzureOptions:
        """Refuse values that mean nothing; return itself."""
        if self.checksum not in (None, "md5", "crc64"):
            raise ConfigurationError(f"azure option checksum={self.checksum!r}; it must be None, 'md5' or 'crc64'")
        for name in ("concurrency", "block_threshold_nbytes", "block_nbytes", "range_nbytes", "attempts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"azure option {name}={getattr(self, name)!r}; it must be a positive integer")
        given = [name for name in ("account_key", "sas_token", "credential") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"azure options {' and '.join(given)} exclude each other; give one of them")
        if isinstance(self.credential, str) and self.credential != DEFAULT_CREDENTIAL:
            # The value may be a secret.
            raise ConfigurationError("azure option credential is a string other than 'default'; a key goes into account_key")
        get_token = getattr(self.credential, "get_token", None)
        if get_token is not None and not inspect.iscoroutinefunction(get_token):
            raise ConfigurationError(
                f"azure option credential={type(self.credential).__name__} is a blocking one; take it from azure.identity.aio"
            )
        return self


def with_options(options: AzureOptions, given: dict[str, Any]) -> AzureOptions:
    """Replace those that are given; refuse unknown ones."""
    known = [one.name for one in fields(AzureOptions)]
    for name in given:
        if name not in known:
            raise ConfigurationError(f"azure has no option {name!r}; it has {', '.join(known)}")
    return replace(options, **given).check()


def default_credential() -> Any:
    """Return azure-identity's DefaultAzureCredential, to be entered."""
    try:
        from azure.identity.aio import DefaultAzureCredential
    except ImportError as error:
        raise MissingDependency(f"credential='default' needs azure-identity: pip install azure-identity ({error})") from error
    return DefaultAzureCredential()


def create_client(options: AzureOptions, container: str, credential: Any) -> Any:
    """Return the SDK's client of a container; it connects to nobody until it is asked. `credential` replaces "default".

    Raises:
        ConfigurationError: the options do not say where the container is, or make no sense to the SDK.
    """
    text = options.connection_string or (
        os.environ.get("AZURE_STORAGE_CONNECTION_STRING") if options.account_url is None else None
    )
    if text is None and options.account_url is None:
        raise ConfigurationError(
            "azure needs a connection_string (or AZURE_STORAGE_CONNECTION_STRING), or an account_url with account_key, sas_token"
            " or credential"
        )
    if options.account_key is not None:
        parts = urlsplit(options.account_url or "")
        # Emulators have the account's name in the path.
        name = parts.path.strip("/") or (parts.hostname or "").partition(".")[0]
        credential = {"account_name": name, "account_key": options.account_key}
    elif options.sas_token is not None:
        credential = options.sas_token
    try:
        if text is not None:
            return ContainerClient.from_connection_string(text, container, credential=credential)
        return ContainerClient(options.account_url or "", container, credential=credential)
    except (ValueError, TypeError, AzureError) as error:
        raise ConfigurationError(f"azure: container {container!r}: {error}") from error


def tls_context(verify: bool | str) -> ssl.SSLContext:
    """Return the context that checks servers as `verify` says."""
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@dataclass(slots=True, eq=False)
class Authority:
    """What authorises requests to one container: (query, header line); one of them is empty. Renewed in time.

    `client` is the SDK's; what it was made of decides: an account's key signs a shared access signature for an hour, a credential
    gets tokens, and a signature that was given is all there is.
    """

    client: Any
    now: Callable[[], float] = time.time
    renewals: int = 0
    _found: tuple[str, str] = ("", "")
    _until: float = 0.0
    _renewing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, refused: tuple[str, str] | None = None) -> tuple[str, str]:
        """Return what there is, or something newer than what the server `refused`, if that can be had.

        Raises:
            AccessError: the credential has no token for us.
        """
        if self.now() < self._until and self._found != refused:
            return self._found
        async with self._renewing:
            # Of many that were refused at once, the first renews for all.
            if self.now() >= self._until or self._found == refused:
                await self._renew()
        return self._found

    async def _renew(self) -> None:
        credential = self.client.credential
        now = self.now()
        self.renewals += 1
        if isinstance(credential, AzureSasCredential):
            self._found = (credential.signature.lstrip("?"), "")
            self._until = now + 1.0
        elif hasattr(credential, "get_token"):
            with map_errors("azure", {ClientAuthenticationError: AccessError}):
                token = await credential.get_token(SCOPE)
            self._found = ("", f"authorization: Bearer {token.token}\r\n")
            # Credentials keep tokens themselves: asking early costs little, even with one that is about to end.
            self._until = now + max((token.expires_on - now) / 2, token.expires_on - now - SKEW_SECONDS)
        elif (key := getattr(credential, "account_key", None)) is not None:
            began = datetime.fromtimestamp(now, UTC)
            signature = generate_container_sas(
                self.client.account_name,
                self.client.container_name,
                account_key=key,
                permission=ContainerSasPermissions(read=True, write=True, create=True, add=True, delete=True, list=True),
                start=began - timedelta(seconds=SKEW_SECONDS),
                # No two are the same, even within a second.
                expiry=began + timedelta(seconds=SAS_SECONDS + self.renewals),
            )
            self._found = (signature, "")
            self._until = now + SAS_SECONDS - 2 * SKEW_SECONDS
        else:
            self._found = (urlsplit(self.client.url).query, "")
            self._until = float("inf")
