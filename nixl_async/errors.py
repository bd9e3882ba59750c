"""Every exception of the library: one root, and a cousin from the standard library where one exists.

    NixlError
    ├── ConfigurationError(ValueError)      the caller asked for something that cannot be set up
    │   └── MissingDependency(ImportError)  an optional package is absent; the message names the extra
    ├── DescriptorError(ValueError)         a byte range, page index or layout does not fit its region
    ├── RegistrationError                   memory cannot be registered
    ├── NoRoute                             no backend can copy between these two places; lists who was asked and why not
    ├── ClosedError                         the agent, peer or region is closed already
    ├── AuthenticationError(PermissionError)  the peer does not know the token, or sent none
    ├── ProtocolError(ConnectionError)      the other side sent something malformed; that connection is closed
    ├── TransferError                       a transfer failed: transfer_id, backend, peer, retryable, history
    │   ├── NotFoundError(FileNotFoundError)
    │   ├── AccessError(PermissionError)
    │   ├── PeerLost(ConnectionError)       the peer's process ended, or it cannot be reached any more
    │   ├── BackendError                    anything else a backend met; `__cause__` is the original
    │   │   ├── OutOfSpace                  the device or the quota is full
    │   │   └── IntegrityError              bytes arrived that do not match their checksum: pages, count
    │   ├── ConflictError(FileExistsError)  a conditional write found what it must not find
    │   ├── Aborted                         the other side of a push or pull of layers gave it up
    │   ├── LeaseEnded(ClosedError)         the lease on a peer's memory ran out or was revoked
    │   ├── PartsFailed                     some objects of a transfer failed; `parts` has each one's error
    │   └── Quarantined                     the hardware, or a peer, did not become quiet: do not reuse the memory
    └── InternalError                       a fault in this library
        └── InvalidTransition               an event that the transfer's state does not allow

Whose fault it was is readable from the class: Configuration, Descriptor, Registration, NoRoute and Closed are the
caller's, Transfer and Protocol the world's, Internal ours. `asyncio.CancelledError` is never wrapped.
"""

from collections.abc import Collection, Sequence
from typing import Any


class NixlError(Exception):
    """Root of every exception that this library raises on its own account."""


class ConfigurationError(NixlError, ValueError):
    """Refuse an option, a name or a combination of them; the message says what is allowed."""


class MissingDependency(ConfigurationError, ImportError):
    """Report an optional package that is not installed, with the command that installs it."""


class DescriptorError(NixlError, ValueError):
    """Refuse a range, page list or layout that does not fit the memory it points into."""


class RegistrationError(NixlError):
    """Refuse memory that cannot be registered (empty, read-only, not contiguous, wrong device)."""


class NoRoute(NixlError):
    """Say that no backend can copy between two places.

    `refusals` maps each backend that was asked to its reason.
    """

    def __init__(self, message: str, refusals: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.refusals: dict[str, str] = refusals or {}


class ClosedError(NixlError):
    """Refuse work on an agent, peer or region that is closed."""


class AuthenticationError(NixlError, PermissionError):
    """Refuse a peer whose token is wrong or missing."""


class ProtocolError(NixlError, ConnectionError):
    """Report a malformed, oversized or unexpected message; only its connection is closed."""


class TransferError(NixlError):
    """Report a transfer that did not complete; the destination's content is undefined.

    `retryable` tells the scheduler whether the same op may succeed when sent again. `history` is the transfer's
    bounded list of `(time, old state, event, new state)`. Of a transfer that was sent again in vain, `resent` tells how many times,
    `seconds` since when, and `tried` by which routes; the text says so too.
    """

    resent: int = 0
    seconds: float = 0.0
    tried: tuple[str, ...] = ()

    def __init__(
        self,
        message: str,
        *,
        transfer_id: int | None = None,
        backend: str | None = None,
        peer: str | None = None,
        retryable: bool = False,
        history: Sequence[tuple[float, str, str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.transfer_id = transfer_id
        self.backend = backend
        self.peer = peer
        self.retryable = retryable
        self.history: tuple[tuple[float, str, str, str], ...] = tuple(history)

    def __str__(self) -> str:
        text = super().__str__()
        if not self.resent:
            return text
        times = "once" if self.resent == 1 else f"{self.resent} times"
        return f"{text} (sent again {times} in {self.seconds:.3g} s, by {', '.join(self.tried)})"


class NotFoundError(TransferError, FileNotFoundError):
    """Report a file, object or remote region that does not exist."""


class AccessError(TransferError, PermissionError):
    """Report an access that the operating system or the peer refused."""


class PeerLost(TransferError, ConnectionError):
    """Report a peer that died, was partitioned away, or left while it was needed."""


class BackendError(TransferError):
    """Report a failure inside a backend; `__cause__` carries the original."""


class OutOfSpace(BackendError):
    """Report a device, file system or bucket that has no room for the bytes."""


class IntegrityError(BackendError):
    """Report bytes that do not match their checksum or their size; nothing of them is used.

    Of a transfer with `verify`: `pages` has the first indices of the `count` pages that differ, `algorithm` is the checksum's name.
    """

    def __init__(
        self, message: str, *, pages: Sequence[int] = (), count: int = 0, algorithm: str | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.pages: tuple[int, ...] = tuple(pages)
        self.count = count
        self.algorithm = algorithm


class ConflictError(TransferError, FileExistsError):
    """Report a conditional write whose condition does not hold: the object or file exists already."""


class Aborted(TransferError):
    """Report that the other side of a push or pull of layers gave it up, and why."""


class LeaseEnded(TransferError, ClosedError):
    """Report memory of a peer that may not be used any more: its lease ran out, or its owner revoked it."""


class PartsFailed(TransferError):
    """Report a transfer of many objects of which some failed; the others are in place.

    `parts` maps the number of each part that failed, as `Transfer.parts` counts them, to its error.
    """

    def __init__(self, message: str, parts: dict[int, TransferError] | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.parts: dict[int, TransferError] = parts or {}


class Quarantined(TransferError):
    """Report an op, or a peer whose lease has ended, that did not become quiet within the drain limit.

    Bytes of it may still move: the local region named in the message stays registered for the life of the process
    and must not be freed or reused, and neither must the peer's. Where `local` is False the memory on this side is quiet, and only
    the peer's destination may still be written to, as long as that peer is connected. `moving` holds the regions that the message
    names, `None` where they are all of the transfer's. After a lease, `await lease.quiet()` returns if it may, after all.
    """

    def __init__(self, message: str, *, local: bool = True, moving: Collection[object] | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.local: bool = local
        self.moving: Collection[object] | None = moving


class InternalError(NixlError):
    """Report a fault in this library; please file it with the text of the exception."""


class InvalidTransition(InternalError):
    """Refuse an event that a transfer's state does not allow; the state is unchanged."""
