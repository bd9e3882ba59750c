"""The contract between the library and whatever moves the bytes. A plugin author reads this file and no other.

A backend has one verb, `copy`, and one promise: when it returns or raises, `CancelledError` included, every byte is in
place or none moves any more on its account. Backends decide no policy (which route, what order, when to retry: the
scheduler's) and never import each other, the scheduler or the agent.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nixl_async.descriptors import MemoryKind
from nixl_async.errors import BackendError, ConfigurationError, MissingDependency, NixlError, TransferError

if TYPE_CHECKING:
    from nixl_async.costs import Prediction
    from nixl_async.descriptors import Array, Plan, Side
    from nixl_async.memory import MemoryRegion, RemoteRegion

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend wants in flight at most; the scheduler keeps to it.

    `inline_nbytes`: plans up to this size may be offered to `copy_now` on the event loop (0: never). An op holds at most
    `max_op_nbytes` bytes and `max_op_segments` segments. `drain_seconds`: how long a cancelled op may take to become
    quiet before its memory is quarantined. `batch`: whether small transfers may share an op, and large ones be cut further.
    `max_peer_ops` and `max_peer_nbytes` bound what is in flight towards one peer (0: no bound of its own). While more urgent
    traffic wants room, ops of less urgent transfers are cut to `slice_nbytes` bytes (0: never). `lanes`: how many ops it works on
    at once: while fewer are in flight, a large transfer that waits alone is cut for them. `frees_source`: whether a put that was
    stopped reads its source no more, even where the peer does not become quiet.
    """

    max_ops: int = 4
    max_nbytes: int = 64 << 20
    max_op_nbytes: int = 8 << 20
    max_op_segments: int = 65536
    inline_nbytes: int = 0
    drain_seconds: float = 5.0
    batch: bool = True
    max_peer_ops: int = 0
    max_peer_nbytes: int = 0
    slice_nbytes: int = 640 << 10
    lanes: int = 1
    frees_source: bool = False


class Revocation(enum.Enum):
    """What ends a peer's use of memory that was leased to it; see `Backend.revoke`."""

    ENFORCED = "enforced"
    """This side moves the bytes, or refuses to: once `revoke` has returned, nothing moves, whatever the peer does."""
    PROCESS = "process"
    """The peer moves the bytes: nothing moves once it says so, or once its process has ended, if the kernel tells of that."""
    ACKNOWLEDGED = "acknowledged"
    """Nothing moves once the peer says so. Its process's end proves nothing: bytes may be on their way, or it is out of sight."""


def _nobody(start: int, nbytes: int, error: TransferError | None) -> None:
    """Take a report that nobody wants."""


@dataclass(slots=True, eq=False)
class Op:
    """One unit of work for one backend: the segments of `plan`, to or from one peer, or within this process.

    `peer` is the remote side's name (`None`: both sides are ours); `put` is True when bytes go to the peer.
    `parts` lists what it carries as (transfer id, first byte within that transfer, bytes); backends ignore it. A backend whose
    `reports` is True calls `report(first byte within the op, bytes, error)` for everything it carries, as it gets there.
    """

    id: int
    plan: Plan
    peer: str | None
    put: bool
    parts: tuple[tuple[int, int, int], ...] = ()
    report: Callable[[int, int, TransferError | None], None] = _nobody
    kept: Any = None
    """For the backend: what it has made of an op that it may be given again (`copy_now`)."""

    @property
    def nbytes(self) -> int:
        """The bytes this op moves."""
        return self.plan.nbytes

    @property
    def sides(self) -> tuple[Side, Side]:
        """Our side, and the peer's."""
        return (self.plan.src, self.plan.dst) if self.put else (self.plan.dst, self.plan.src)


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """What a backend learns of a peer: its name, its incarnation, and that peer's `describe()` bytes for this backend."""

    name: str
    incarnation: str
    description: bytes
    host: str | None = None


@dataclass(slots=True, eq=False)
class Begun:
    """A copy that `copy_now` began and that ends later.

    `future` resolves, or gets the copy's `TransferError`, once the copy is quiet; `stop` makes that happen soon.
    """

    future: asyncio.Future[None]
    stop: Callable[[], None]


async def _nobody_to_ask(peer: str, mark: bytes) -> None:
    """Confirm a fence where there is no control connection."""


@dataclass(slots=True)
class Host:
    """What the agent lends a backend at `open`: its name and incarnation, and where to report events.

    `peer_lost(peer, reason)` and `notification(sender, payload)` must be called on the loop's thread. After `peer_lost` of a peer
    that is still there, the backend is asked to `connect` to it again, until it succeeds.
    `rank_changed()`, on the loop's thread too, says that the backend's `rank_for` may answer otherwise than before.
    `fence(peer, mark)` has the peer's backend of the same name carry out `Backend.fence`, and returns when that is done. It raises
    `PeerLost` when the peer is lost meanwhile, and another `TransferError` when the peer does not confirm.
    """

    agent_name: str
    incarnation: str
    loop: asyncio.AbstractEventLoop
    peer_lost: Callable[[str, str], None] = field(default=lambda peer, reason: None)
    notification: Callable[[str, bytes], None] = field(default=lambda sender, payload: None)
    fence: Callable[[str, bytes], Awaitable[None]] = _nobody_to_ask
    rank_changed: Callable[[], None] = field(default=lambda: None)
    backends: Mapping[str, Backend] = field(default_factory=dict)
    """All of the agent's, for a backend that relays between others."""
    preferred: Callable[[list[Backend], Side, Side], list[Backend]] = field(default=lambda backends, src, dst: backends)
    """Puts backends that can copy between two sides in the agent's order, for the same."""


class Backend(ABC):
    """Moves bytes between two kinds of place. Subclass it, set `name`, and pass `nixl_async.testing.BackendTests`."""

    name: ClassVar[str]
    kinds: ClassVar[frozenset[MemoryKind]] = frozenset({MemoryKind.DRAM})
    """The kinds of memory it takes; `register` sees no others."""
    remote: ClassVar[bool] = True
    """Whether the backend reaches peers; a local one is never asked to `connect`."""
    relays: ClassVar[bool] = False
    """Whether it moves bytes through other backends of the agent, to peers too without being connected to them."""
    begins: ClassVar[bool] = False
    """Whether `copy_now` may begin what ends later."""
    reports: ClassVar[bool] = False
    """Whether it calls `Op.report`."""
    revocation: ClassVar[Revocation] = Revocation.ACKNOWLEDGED
    """What `revoke` achieves, and what must be waited for besides."""
    limits: Limits = Limits()
    rank: int = 50
    """Routes are tried in rising rank, unless the caller has given an order: `Agent(backends=[…])`, `backend=` of a transfer."""

    @abstractmethod
    def refusal(self, src: Side, dst: Side) -> str | None:
        """Return why this backend cannot copy between the two sides, or `None` if it can. Pure, cheap, no I/O."""

    def rank_for(self, src: Side, dst: Side) -> int:
        """Return the rank between two sides that it does not refuse, where that depends on them or their peer.

        Pure, cheap, no I/O: it is asked for each transfer that is prepared. The answer may change; then call `Host.rank_changed`.
        """
        return self.rank

    def how(self, src: Side, dst: Side) -> str:
        """Return in a few words by which of its ways it would copy; `Agent.explain` shows it."""
        return ""

    def predict(self, plan: Plan) -> tuple[Prediction, ...]:
        """Return what a plan should take by each of its ways, the one that it would choose first; empty if it learns no costs."""
        return ()

    @abstractmethod
    async def copy(self, op: Op) -> None:
        """Copy every segment of `op`; return when all bytes are visible at the destination.

        Cancelling must end quietly: stop what can be stopped, wait for the rest (`quiesce`), then raise `CancelledError`.
        Failing must too: the op may be sent again by another route at once, and the memory be written to by others after that. What
        of a put the peer may still write is fenced first (`Host.fence`).

        Raises:
            PeerLost: the peer cannot be reached this way; the agent uses other routes until `connect` succeeds again.
            Quarantined: it failed or was cancelled, and bytes of it may still be written.
            TransferError: the copy failed; `retryable` says whether the same op may succeed later.
        """

    def copy_now(self, op: Op) -> bool | Begun:
        """Copy a small op at once on the calling thread and return True, or return False to be given it through `copy`.

        It must take far less than a millisecond. What it has begun and cannot finish in that time it returns as `Begun`. What is
        prepared is the same op each time.
        """
        return False

    async def prepare(self, op: Op) -> None:
        """Make ready for ops of this very plan, which a caller means to send many times; nothing is moved.

        What has been kept for it goes when the plan is collected. It is never asked for large transfers that are cut into slices.
        """

    async def open(self, host: Host) -> None:
        """Acquire what the backend needs: threads, sockets, contexts. Called once, on the loop that will be used.

        Raises:
            MissingDependency: the package or device that the backend needs is not there.
        """

    async def aclose(self) -> None:
        """Release everything. No op is in flight when this is called."""

    async def register(self, region: MemoryRegion) -> bytes:
        """Make `region` known to the transport and return the key that peers need for it (may be empty)."""
        return b""

    async def unregister(self, region: MemoryRegion) -> None:
        """Forget `region`; afterwards peers that still hold its key are refused."""

    def describe(self) -> bytes:
        """Return what a peer's backend of this name needs to reach us; it travels in the agent's metadata."""
        return b""

    def describe_to(self, peer: str, incarnation: str) -> bytes:
        """Return what that peer is told over its authenticated connection, instead of `describe()`; it may be a secret."""
        return self.describe()

    def served(self) -> tuple[int, int] | None:
        """Return how many bytes this side has moved for peers, as (read from our memory, written to it); None if it cannot know."""
        return None

    async def dismiss(self, peer: str, incarnation: str) -> None:
        """Let nobody in any more with what `describe_to` told that peer; it is gone, whether or not it was ever connected."""

    async def grant(self, region: MemoryRegion, peer: str, incarnation: str, *, writable: bool) -> bytes:
        """Return a key for `region` that is meant for one peer; `revoke` ends it. By default it is the key for all.

        Raises:
            BackendError: this backend cannot lend that memory to that peer.
        """
        return region.keys[self.name]

    async def revoke(self, region: MemoryRegion, key: bytes) -> None:
        """End a key that `grant` returned: refuse it where this side can, and wait for what this side moves on its account."""

    def pidfd(self, peer: str) -> int | None:
        """Return a descriptor that is readable once the peer's process has ended, for the caller to close; `None`: cannot tell."""
        return None

    async def connect(self, peer: PeerInfo) -> None:
        """Prepare for ops to and from `peer`; called again, for the same incarnation, after the backend has lost it.

        Raises:
            TransferError: this backend cannot reach that peer; the agent then uses other routes.
        """

    async def listen(self, host: str) -> None:
        """Accept peers on the local address `host` too; called before `describe`, by `agent.serve` and before a connection."""

    async def send_notification(self, peer: str, payload: bytes) -> None:
        """Deliver a notification to a peer that has no control connection (a stock NIXL agent).

        Raises:
            BackendError: this backend carries no notifications.
        """
        raise BackendError(f"backend {self.name!r} carries no notifications", backend=self.name, peer=peer)

    async def fence(self, peer: PeerInfo, mark: bytes) -> None:
        """Let nothing more be written here for those ops of `peer` that its backend of this name means by `mark`.

        What of them has arrived may be written before this returns; nothing of them is written after. An empty mark means all that
        the peer's life has ever begun: it had given us up and connects again, and this side has parted from it, or never knew it.
        By default nothing is written here but by the peer itself, whose ops were over when it parted.

        Raises:
            BackendError: that cannot be made sure.
        """
        if not mark:
            return
        raise BackendError(f"backend {self.name!r} cannot fence off what a peer has sent", backend=self.name, peer=peer.name)

    async def forget(self, region: RemoteRegion) -> None:
        """Let go of what was kept of a peer's region, which its owner withdraws; no op uses it."""

    async def disconnect(self, peer: str) -> None:
        """Forget `peer`. No op of it is in flight, or the peer is lost and its ops have been failed.

        Afterwards nothing is written here that the peer has sent on connections of this backend.
        """


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store tells of an object: its key (within the store), bytes, entity tag, and time of change in seconds since 1970."""

    key: str
    nbytes: int
    etag: str = ""
    modified: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where a store is: scheme, bucket (container, directory), the prefix that all its keys get, and the caller's options."""

    scheme: str
    bucket: str
    prefix: str = ""
    # Out of the repr: there are keys and secrets among them.
    options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


class Upload(ABC):
    """An object that is written piece by piece; nothing of it is visible before `finish`."""

    piece_nbytes: int
    """The pieces' size in bytes; only the last may be smaller."""

    @abstractmethod
    async def put(self, number: int, source: Side, lengths: Array) -> None:
        """Send piece `number` (from 0) from local memory; several may be on their way at once."""

    @abstractmethod
    async def finish(self) -> None:
        """Make the object visible, whole."""

    @abstractmethod
    async def abort(self) -> None:
        """Forget every piece. Idempotent, and without effect after `finish`."""


class StorageBackend(Backend):
    """Moves bytes between local memory and the objects of a store, and answers questions about them.

    `schemes` are the URL schemes it serves. All keys given to its methods are full: the store's prefix is in them.
    """

    schemes: ClassVar[tuple[str, ...]] = ()
    remote = False

    async def open_store(self, address: StoreAddress) -> None:
        """Make ready for a store: clients, credentials. Called before anything else that concerns it; cheap when repeated.

        Raises:
            ConfigurationError: an option is unknown or wrong.
        """

    def check_keys(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Raise `DescriptorError` for a key that the store cannot have; asked when objects are named. Pure, cheap, no I/O."""

    async def stat(self, address: StoreAddress, keys: Sequence[str]) -> list[Stat | None]:
        """Look up objects; `None` for those that do not exist."""
        raise BackendError(f"backend {self.name!r} answers no questions", backend=self.name)

    def list(self, address: StoreAddress, prefix: str) -> AsyncIterator[Stat]:
        """Iterate over the objects whose key begins with `prefix`, in the store's order."""
        raise BackendError(f"backend {self.name!r} lists nothing", backend=self.name)

    async def delete(self, address: StoreAddress, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are deleted already."""
        raise BackendError(f"backend {self.name!r} deletes nothing", backend=self.name)

    async def upload(
        self, address: StoreAddress, key: str, nbytes: int, *, if_none_match: bool = False, max_piece_nbytes: int | None = None
    ) -> Upload:
        """Begin to write an object of `nbytes` bytes piece by piece; `if_none_match` makes `finish` fail if it exists.

        The pieces are of `max_piece_nbytes` bytes at most where the store allows that; where it does not, the caller sees it
        from `Upload.piece_nbytes`. The caller never cancels this, and aborts or finishes what it returns.
        """
        raise BackendError(f"backend {self.name!r} writes objects whole only", backend=self.name)


async def quiesce(future: asyncio.Future[T], stop: Callable[[], None] | None = None) -> T:
    """Wait for `future` to end even if the waiting task is cancelled, any number of times; then raise the cancellation.

    A backend awaits what it cannot abandon through this, so that `copy` never returns while bytes still move. `stop` is
    called at the first cancellation to make the work end early.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            if future.cancelled():
                break
            if cancelled is None and stop is not None:
                stop()
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not future.cancelled():
            future.exception()
        raise cancelled
    return future.result()


@contextmanager
def map_errors(
    backend: str, mapping: dict[type[BaseException], Callable[..., TransferError]] | None = None, *, peer: str | None = None
) -> Iterator[None]:
    """Turn a third party's exceptions into ours at a backend's boundary.

    The first entry of `mapping` that the exception is an instance of decides; everything else becomes `BackendError`.
    Exceptions of this library and `CancelledError` pass through.
    """
    try:
        yield
    except (NixlError, asyncio.CancelledError):
        raise
    except Exception as error:
        for kind, wanted in (mapping or {}).items():
            if isinstance(error, kind):
                raise wanted(f"{backend}: {error}", backend=backend, peer=peer) from error
        raise BackendError(f"{backend}: {type(error).__name__}: {error}", backend=backend, peer=peer) from error


BUILT_IN = {
    "memory": "nixl_async.backends.memory:MemoryBackend",
    "samehost": "nixl_async.backends.samehost:SameHostBackend",
    "tcp": "nixl_async.backends.tcp:TCPBackend",
    "ucx": "nixl_async.backends.ucx:UCXBackend",
    "posix": "nixl_async.backends.posix:PosixBackend",
    "directory": "nixl_async.backends.directory:DirectoryBackend",
    "cuda": "nixl_async.backends.cuda:CUDABackend",
    "cuda_ipc": "nixl_async.backends.cuda_ipc:CUDAIPCBackend",
    "gds": "nixl_async.backends.gds:GDSBackend",
    "s3": "nixl_async.backends.s3:S3Backend",
    "azure": "nixl_async.backends.azure:AzureBackend",
    "gcs": "nixl_async.backends.gcs:GCSBackend",
    "staging": "nixl_async.staging:StagingBackend",
}
SCHEMES = {"file": "directory", "s3": "s3", "az": "azure", "gs": "gcs"}
"""Which of ours serves which URL scheme."""


def load_backend(name: str, **options: Any) -> Backend:
    """Construct the backend called `name`: one of ours, or one that a package offers as entry point `nixl_async.backends`.

    Raises:
        ConfigurationError: no such backend; the message lists the known ones.
        MissingDependency: the backend's package is not installed; the message has the command.
    """
    target = BUILT_IN.get(name)
    if target is None:
        # Its import takes as long as a tenth of the library's own, and few need it.
        from importlib.metadata import entry_points

        offered = {point.name: point.value for point in entry_points(group="nixl_async.backends")}
        target = offered.get(name)
        if target is None:
            raise ConfigurationError(f"no backend is called {name!r}; known are {', '.join(sorted(BUILT_IN | offered))}")
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except MissingDependency:
        raise
    except ImportError as error:
        raise MissingDependency(f"backend {name!r} cannot be loaded: {error}") from error
    backend = getattr(module, class_name)(**options)
    if not isinstance(backend, Backend):
        raise ConfigurationError(f"{target} is not a Backend")
    return backend
