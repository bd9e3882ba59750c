"""NIXL's twelve exceptions, and which of them stands for each of ours.

Their text is the name of NIXL's status, as programs expect; what exactly went wrong is a note on the exception, and its cause.
"""

from __future__ import annotations

import asyncio

from nixl_async.errors import (
    ClosedError,
    ConfigurationError,
    DescriptorError,
    InternalError,
    MissingDependency,
    NixlError,
    NoRoute,
    PeerLost,
    ProtocolError,
)


class nixlNotPostedError(NixlError):
    """Say that a transfer was never posted."""


class nixlInvalidParamError(NixlError):
    """Refuse an argument."""


class nixlBackendError(NixlError):
    """Report a failure inside a backend."""


class nixlNotFoundError(NixlError):
    """Say that an agent, a registration, a backend or metadata is not known."""


class nixlMismatchError(NixlError):
    """Refuse metadata that is malformed."""


class nixlNotAllowedError(NixlError):
    """Refuse what contradicts what is there already."""


class nixlRepostActiveError(NixlError):
    """Refuse to post a transfer that is under way."""


class nixlUnknownError(NixlError):
    """Report a fault in this library."""


class nixlNotSupportedError(NixlError):
    """Say that a backend cannot do that."""


class nixlRemoteDisconnectError(NixlError):
    """Report a remote agent that is gone."""


class nixlCancelledError(NixlError):
    """Report a transfer that was cancelled."""


class nixlNoTelemetryError(NixlError):
    """Say that telemetry is not enabled."""


STATUS = {
    nixlNotPostedError: "NIXL_ERR_NOT_POSTED",
    nixlInvalidParamError: "NIXL_ERR_INVALID_PARAM",
    nixlBackendError: "NIXL_ERR_BACKEND",
    nixlNotFoundError: "NIXL_ERR_NOT_FOUND",
    nixlMismatchError: "NIXL_ERR_MISMATCH",
    nixlNotAllowedError: "NIXL_ERR_NOT_ALLOWED",
    nixlRepostActiveError: "NIXL_ERR_REPOST_ACTIVE",
    nixlUnknownError: "NIXL_ERR_UNKNOWN",
    nixlNotSupportedError: "NIXL_ERR_NOT_SUPPORTED",
    nixlRemoteDisconnectError: "NIXL_ERR_REMOTE_DISCONNECT",
    nixlCancelledError: "NIXL_ERR_CANCELED",
    nixlNoTelemetryError: "NIXL_ERR_NO_TELEMETRY",
}
"""The text of each exception."""


def refusal(kind: type[NixlError], why: str) -> NixlError:
    """Make an exception of NIXL's with its text, and `why` as a note."""
    error = kind(STATUS[kind])
    error.add_note(why)
    return error


def translate(error: BaseException) -> BaseException:
    """Return NIXL's exception for one of ours; what is not ours stays what it is."""
    if type(error) in STATUS:
        return error
    if isinstance(error, asyncio.CancelledError):
        made = refusal(nixlCancelledError, "the transfer was cancelled")
    elif not isinstance(error, NixlError):
        return error
    else:
        made = refusal(_kind(error), f"{type(error).__name__}: {error}")
    made.__cause__ = error
    return made


def _kind(error: NixlError) -> type[NixlError]:
    if isinstance(error, PeerLost):
        return nixlRemoteDisconnectError
    if isinstance(error, NoRoute | ClosedError | MissingDependency):
        return nixlNotFoundError
    if isinstance(error, DescriptorError | ConfigurationError):
        return nixlInvalidParamError
    if isinstance(error, ProtocolError):
        return nixlMismatchError
    return nixlUnknownError if isinstance(error, InternalError) else nixlBackendError
