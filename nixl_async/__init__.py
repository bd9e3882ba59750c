"""Move LLM inference data between GPU memory, CPU memory and machines with `await agent.transfer(src, dst)`.

Rooms: `errors` (every exception) · `descriptors` (what to move) · `memory` (regions) · `transfer` (its life) · `backend` (the
contract for whatever moves bytes) · `scheduler` (what moves when; pure) · `wire`, `link`, `membership`, `peers`,
`notifications`, `metadata` (who is there) · `leases`, `leased` (memory lent to one peer) · `handle`, `agent` (what callers
hold) · `testing` (conformance suite) · `cli`, `demo` ·
`discovery` (agents by name) · `geometry`, `planner` (who sends which slices of a KV cache to whom) · `layers` (pushes and
pulls, layer by layer) · `benchmarks` (`nixl-async bench`) · `metrics`, `tracing`, `timeline`, `inspection`, `logs` (watching it).
"""

from nixl_async.agent import Agent, Statistics
from nixl_async.backend import Backend, Limits, Op, Revocation, Stat, StorageBackend, Upload, load_backend
from nixl_async.descriptors import BlockLayout, Descriptor, MemoryKind
from nixl_async.discovery import Discovered
from nixl_async.errors import (
    Aborted,
    AccessError,
    AuthenticationError,
    BackendError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    DescriptorError,
    IntegrityError,
    InternalError,
    InvalidTransition,
    LeaseEnded,
    MissingDependency,
    NixlError,
    NoRoute,
    NotFoundError,
    OutOfSpace,
    PartsFailed,
    PeerLost,
    ProtocolError,
    Quarantined,
    RegistrationError,
    TransferError,
)
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.handle import Part, PreparedTransfer, Transfer
from nixl_async.layers import Incoming, LayerPlan, Offer, Pull, Push
from nixl_async.leased import LeasedRegion
from nixl_async.leases import Lease
from nixl_async.liveness import Liveness
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.notifications import Notification
from nixl_async.peers import MembershipEvent, Peer
from nixl_async.planner import Pair, Slices, plan_pairs
from nixl_async.routing import Explanation
from nixl_async.security import TLS, ConnectionLimits
from nixl_async.storage import FileRegion, ObjectRegion
from nixl_async.stores import Store
from nixl_async.streams import CPUEvent, CPUStream
from nixl_async.transfer import TrafficClass, TransferResult, TransferState

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "AccessError",
    "Agent",
    "AuthenticationError",
    "Backend",
    "BackendError",
    "BlockLayout",
    "CPUEvent",
    "CPUStream",
    "ClosedError",
    "ConfigurationError",
    "ConflictError",
    "ConnectionLimits",
    "Descriptor",
    "DescriptorError",
    "Discovered",
    "Explanation",
    "FileRegion",
    "Incoming",
    "IntegrityError",
    "InternalError",
    "InvalidTransition",
    "KVGeometry",
    "LayerPlan",
    "Lease",
    "LeaseEnded",
    "LeasedRegion",
    "Limits",
    "Liveness",
    "MembershipEvent",
    "MemoryKind",
    "MemoryRegion",
    "MissingDependency",
    "NixlError",
    "NoRoute",
    "NotFoundError",
    "Notification",
    "ObjectRegion",
    "Offer",
    "Op",
    "OutOfSpace",
    "Pair",
    "Part",
    "PartsFailed",
    "Peer",
    "PeerLost",
    "PreparedTransfer",
    "ProtocolError",
    "Pull",
    "Push",
    "Quarantined",
    "RegistrationError",
    "RemoteRegion",
    "Revocation",
    "Sharding",
    "Slices",
    "Stat",
    "Statistics",
    "StorageBackend",
    "Store",
    "TLS",
    "TrafficClass",
    "Transfer",
    "TransferError",
    "TransferResult",
    "TransferState",
    "Upload",
    "load_backend",
    "plan_pairs",
]
