"""How the s3 backend is configured: its options, the clients made of them, credentials, TLS, and the headers they ask for."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import ssl
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nixl_async.backends.s3_data import Credentials
from nixl_async.errors import AccessError, ConfigurationError, MissingDependency

try:
    import aiobotocore.session
    from aiobotocore.config import AioConfig
    from botocore import UNSIGNED as ANONYMOUS
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.loaders import create_loader
except ImportError as error:
    raise MissingDependency(f"the s3 backend needs aiobotocore ({error}): pip install 'nixl-async[s3]'") from error

MIN_PART_NBYTES = 5 << 20
MAX_PUT_NBYTES = 5 << 30
CREDENTIALS_SECONDS = 1.0
"""How long credentials are used before aiobotocore is asked whether they still hold."""


@dataclass(frozen=True, slots=True)
class S3Options:
    """What `S3Backend` and `agent.store("s3://…")` take; what is not given, aiobotocore finds (environment, profiles, IMDS, …).

    `addressing`: "auto", "path" or "virtual". `payload`: "signed" hashes every body into the signature, "unsigned" leaves that to
    TLS, "auto" is signed over plain http only. `checksum`: "crc32c" or "crc64nvme" is sent with every put, and checked on whole
    reads where the server tells it; such reads want an object of exactly the size that was given. `sse`, `sse_kms_key_id`,
    `requester_pays` as in S3; `sse_customer_key` are 32 bytes in base64 that the server encrypts with and does not keep.
    `verify` is False or a CA file. Objects above `multipart_nbytes` are put in parts of `part_nbytes`; runs above `range_nbytes`
    are got by several requests, those above four times as much always, others where a transfer has too few of them to keep the
    server busy. `connect_timeout` and `read_timeout` (a server's silence) are in seconds; `attempts` is how often
    a request is sent.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    anonymous: bool = False
    addressing: str = "auto"
    payload: str = "auto"
    checksum: str | None = None
    sse: str | None = None
    sse_kms_key_id: str | None = None
    sse_customer_key: str | None = field(default=None, repr=False)
    requester_pays: bool = False
    verify: bool | str = True
    concurrency: int = 64
    multipart_nbytes: int = 64 << 20
    part_nbytes: int = 16 << 20
    range_nbytes: int = 32 << 20
    attempts: int = 5
    connect_timeout: float = 10.0
    read_timeout: float = 60.0

    def check(self) -> S3Options:
        """Refuse values that mean nothing; return itself."""
        allowed: dict[str, tuple[object, ...]] = {
            "addressing": ("auto", "path", "virtual"),
            "payload": ("auto", "signed", "unsigned"),
            "checksum": (None, "crc32c", "crc64nvme"),
            "sse": (None, "AES256", "aws:kms", "aws:kms:dsse"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigurationError(f"s3 option {name}={getattr(self, name)!r}; it must be one of {values}")
        for name in ("concurrency", "multipart_nbytes", "part_nbytes", "range_nbytes", "attempts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigurationError(f"s3 option {name}={getattr(self, name)!r}; it must be a positive integer")
        if not MIN_PART_NBYTES <= self.part_nbytes <= MAX_PUT_NBYTES:
            raise ConfigurationError(f"s3 option part_nbytes={self.part_nbytes}; S3 takes parts of 5 MiB to 5 GiB")
        if self.multipart_nbytes > MAX_PUT_NBYTES:
            raise ConfigurationError(f"s3 option multipart_nbytes={self.multipart_nbytes}; S3 takes 5 GiB at most in one put")
        if self.sse_customer_key is not None and len(customer_key(self)) != 32:
            raise ConfigurationError("s3 option sse_customer_key is not 32 bytes in base64")
        if (self.access_key is None) != (self.secret_key is None):
            raise ConfigurationError("s3 options access_key and secret_key go together; one of them is missing")
        return self


class CredentialSource:
    """Asks aiobotocore for credentials, which renews those that end; at most once a second."""

    def __init__(self, session: Any, options: S3Options) -> None:
        self.session = session
        self._options = options
        self._found: Credentials | None = None
        self._until = 0.0
        self._looking = asyncio.Lock()

    async def __call__(self, refused: Credentials | None = None) -> Credentials | None:
        """Return what to sign with, `None` to send requests unsigned.

        What the server has refused is looked up from the beginning: environment, files, IMDS, … The same may be found again.

        Raises:
            AccessError: there are none, or where they come from does not give them.
        """
        options = self._options
        if options.anonymous:
            return None
        if self._found is not None and self._found is not refused and asyncio.get_running_loop().time() < self._until:
            return self._found
        async with self._looking:
            # Others may have been found while we waited.
            if self._found is None or self._found is refused or asyncio.get_running_loop().time() >= self._until:
                try:
                    found = await self._look(refused is not None and self._found is refused)
                except (BotoCoreError, ClientError, OSError, TimeoutError) as error:
                    raise AccessError(f"s3: no credentials: {type(error).__name__}: {error}", backend="s3") from error
                if self._found != found:
                    self._found = found
                self._until = asyncio.get_running_loop().time() + CREDENTIALS_SECONDS
            return self._found

    async def _look(self, afresh: bool) -> Credentials:
        options = self._options
        if options.access_key is not None:
            return Credentials(options.access_key, str(options.secret_key), options.session_token or "")
        if afresh:
            self.session = await make_session(options)
        source = await self.session.get_credentials()
        if source is None:
            raise AccessError(
                "s3: no credentials: set access_key and secret_key, a profile, or AWS_ACCESS_KEY_ID; or anonymous=True",
                backend="s3",
            )
        frozen = await source.get_frozen_credentials()
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token or "")


def with_options(options: S3Options, given: dict[str, Any]) -> S3Options:
    """Replace those that are given; refuse unknown ones."""
    known = [one.name for one in fields(S3Options)]
    for name in given:
        if name not in known:
            raise ConfigurationError(f"s3 has no option {name!r}; it has {', '.join(known)}")
    return replace(options, **given).check()


def create_client(session: Any, options: S3Options) -> Any:
    """Return a client of aiobotocore's, to be entered."""
    config = AioConfig(
        signature_version=ANONYMOUS if options.anonymous else "s3v4",
        s3={"addressing_style": options.addressing},
        connect_timeout=options.connect_timeout,
        read_timeout=options.read_timeout,
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        # Checksums of its own choice break uploads to many servers that are not Amazon's (botocore 1.36 on).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.create_client(
        "s3",
        region_name=options.region
        or (None if options.endpoint_url is None else session.get_config_variable("region") or "us-east-1"),
        endpoint_url=options.endpoint_url,
        aws_access_key_id=options.access_key,
        aws_secret_access_key=options.secret_key,
        aws_session_token=options.session_token,
        # An explicit True would hide the CA file that the environment or a profile names.
        verify=None if options.verify is True else options.verify,
        config=config,
    )


_LOADER: list[Any] = []


async def make_session(options: S3Options) -> Any:
    """Return a session of aiobotocore's for a profile.

    All share one loader: S3's model takes a tenth of a second to load, on a thread, and is a million objects to the collector.
    """
    if not _LOADER:
        loader = create_loader()
        session = aiobotocore.session.AioSession()
        session.register_component("data_loader", loader)
        await asyncio.to_thread(lambda: asyncio.run(_load_model(session)))
        _LOADER.append(loader)
    session = aiobotocore.session.AioSession(profile=options.profile)
    session.register_component("data_loader", _LOADER[0])
    return session


async def _load_model(session: Any) -> None:
    # Web identities and assumed roles ask STS for their credentials.
    for service in ("s3", "sts"):
        async with session.create_client(
            service, region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none"
        ):
            pass


async def tls_context(session: Any, verify: bool | str) -> ssl.SSLContext:
    """Return the context that checks servers as `verify` says; a CA file may be configured for aiobotocore too.

    Raises:
        ConfigurationError: the CA file cannot be read.
    """
    authorities = verify if isinstance(verify, str) else session.get_config_variable("ca_bundle")
    try:
        # Reading the system's authorities takes tens of milliseconds.
        context = await asyncio.to_thread(ssl.create_default_context, cafile=authorities)
    except OSError as error:
        raise ConfigurationError(f"s3: CA file {authorities!r} cannot be read: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def customer_key(options: S3Options) -> bytes:
    """Return the key that the caller gives with every request; nothing if it cannot be read."""
    try:
        return base64.b64decode(options.sse_customer_key or "", validate=True)
    except (binascii.Error, ValueError):
        return b""


def get_headers(options: S3Options) -> tuple[tuple[str, str], ...]:
    """Return what goes with every request for bytes, and with every part of an upload."""
    found = []
    if options.requester_pays:
        found.append(("x-amz-request-payer", "requester"))
    if options.sse_customer_key is not None:
        key = customer_key(options)
        name = "x-amz-server-side-encryption-customer-"
        found.append((f"{name}algorithm", "AES256"))
        found.append((f"{name}key", base64.b64encode(key).decode()))
        found.append((f"{name}key-md5", base64.b64encode(hashlib.md5(key, usedforsecurity=False).digest()).decode()))
    return tuple(found)


def put_headers(options: S3Options) -> tuple[tuple[str, str], ...]:
    """Return what goes with every put of a whole object."""
    found = [*get_headers(options), ("content-type", "application/octet-stream")]
    if options.sse:
        found.append(("x-amz-server-side-encryption", options.sse))
    if options.sse_kms_key_id:
        found.append(("x-amz-server-side-encryption-aws-kms-key-id", options.sse_kms_key_id))
    return tuple(found)


def payer(options: S3Options) -> dict[str, Any]:
    """Return what goes with every call of aiobotocore's."""
    return {"RequestPayer": "requester"} if options.requester_pays else {}


def get_arguments(options: S3Options) -> dict[str, Any]:
    """Return the arguments of calls about an object's bytes: GetObject, HeadObject, UploadPart."""
    found = payer(options)
    if options.sse_customer_key is not None:
        found |= {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": customer_key(options)}
    return found


def put_arguments(options: S3Options) -> dict[str, Any]:
    """Return the arguments of PutObject and CreateMultipartUpload."""
    found = get_arguments(options) | {"ContentType": "application/octet-stream"}
    if options.sse:
        found["ServerSideEncryption"] = options.sse
    if options.sse_kms_key_id:
        found["SSEKMSKeyId"] = options.sse_kms_key_id
    if options.checksum:
        found["ChecksumAlgorithm"] = options.checksum.upper()
    return found
