"""A tensor transport of Ray Direct Transport: tensors go from actor to actor by this library, under the name NIXL_ASYNC.

    import ray, nixl_async.integrations.ray
    nixl_async.integrations.ray.register()                     # in the driver, before the actors that use it are made

    @ray.remote(enable_tensor_transport=True)
    class Trainer:
        @ray.method(tensor_transport="NIXL_ASYNC")
        def weights(self): ...

Each process that sends or receives has one agent, on a thread of its own that sleeps while nothing moves. A transfer ends by an
event; the death of the source fails it; one that is aborted or late returns when its buffers are quiet. Whoever has an object's
metadata, which Ray carries, may connect to its source, unless NIXL_ASYNC_TOKEN gives all processes a secret. NIXL_ASYNC_HOST is
the address to serve at (default: the node's in Ray).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import secrets
import threading
import uuid
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
import torch
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    FetchRequest,
    TensorTransportManager,
    TensorTransportMetadata,
)

from nixl_async.agent import TOKEN_VARIABLE, Agent
from nixl_async.compat import blobs
from nixl_async.compat.engine import ENGINE
from nixl_async.descriptors import Descriptor
from nixl_async.errors import NixlError, NotFoundError
from nixl_async.memory import MemoryRegion

T = TypeVar("T")

TRANSPORT = "NIXL_ASYNC"
HOST_VARIABLE = "NIXL_ASYNC_HOST"
LATE_SECONDS = 1.0
"""How long to wait for a region that an object's metadata names and its source's connection has not told of yet."""
MAX_ABORTED = 4096
"""How many aborted objects are remembered whose fetch may be yet to begin."""


def register() -> None:
    """Make the transport known to Ray in this process, and in the actors that are made from here on."""
    register_tensor_transport(TRANSPORT, ["cuda", "cpu"], NixlAsyncTensorTransport, torch.Tensor)


@dataclass(eq=False)
class NixlAsyncTransportMetadata(TensorTransportMetadata):
    """Where an object's tensors are: `places` has (region's name, offset, bytes) for each, in the agent of `agent_metadata`."""

    agent_name: str = ""
    agent_metadata: bytes = b""
    places: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(eq=False)
class _Held:
    """A storage that is registered, and by how many objects, fetches and callers it is used."""

    key: tuple[str, int]
    owner: torch.Tensor
    region: MemoryRegion
    users: int = 0


@dataclass(eq=False)
class NixlAsyncFetchRequest(FetchRequest):
    """A fetch under way; dropping it cancels it."""

    future: concurrent.futures.Future[None] | None = None

    def __del__(self) -> None:
        if self.future is not None:
            self.future.cancel()


class NixlAsyncTensorTransport(TensorTransportManager):
    """One process's end of the transport; Ray makes it, and calls it from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agent: _Agent | None = None

    def tensor_transport_backend(self) -> str:
        """Return the transport's name."""
        return TRANSPORT

    @staticmethod
    def is_one_sided() -> bool:
        """Say that the receiver reads by itself."""
        return True

    @staticmethod
    def can_abort_transport() -> bool:
        """Say that a transfer can be aborted without killing an actor."""
        return True

    def actor_has_tensor_transport(self, actor: Any) -> bool:
        """Ask an actor whether its process can open an agent."""
        return bool(ray.get(actor.__ray_call__.options(concurrency_group="_ray_system").remote(_available)))

    def agent(self) -> _Agent:
        """Return the process's agent, opening it at first."""
        with self._lock:
            if self._agent is None:
                self._agent = _Agent(_own_name(), os.environ.get(HOST_VARIABLE) or ray.util.get_node_ip_address())
            return self._agent

    def register_memory(self, tensor: torch.Tensor) -> None:
        """Keep a tensor's storage registered until `deregister_memory`: objects made of it then cost no registration."""
        agent = self.agent()
        agent.run(agent.hold([tensor]))

    def deregister_memory(self, tensor: torch.Tensor) -> None:
        """Take one `register_memory` back; objects that are made of the storage keep it registered themselves."""
        agent = self.agent()
        agent.run(agent.release_storage(tensor))

    def extract_tensor_transport_metadata(self, obj_id: str, rdt_object: list[Any]) -> NixlAsyncTransportMetadata:
        """Register an object's tensors; tell where they are. What is enqueued on their CUDA devices is waited for.

        Raises:
            ValueError: a tensor is not contiguous, or they are on devices of different types.
            RegistrationError: no backend takes the memory.
        """
        if not rdt_object:
            return NixlAsyncTransportMetadata(tensor_meta=[])
        kinds = {tensor.device.type for tensor in rdt_object}
        if len(kinds) > 1:
            raise ValueError(
                f"the tensors of one object are on devices of the types {sorted(kinds)}; they must be on one type"
            )
        for index, tensor in enumerate(rdt_object):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"tensor {index} of shape {tuple(tensor.shape)} is not contiguous; return tensor.contiguous()"
                )
        for device in {tensor.device for tensor in rdt_object if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        agent = self.agent()
        return agent.run(agent.expose(obj_id, rdt_object, kinds.pop()))

    def get_communicator_metadata(self, src_actor: Any, dst_actor: Any, backend: str | None = None) -> CommunicatorMetadata:
        """Return nothing of use: a source is reached by its object's metadata."""
        return CommunicatorMetadata()

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> NixlAsyncFetchRequest:
        """Start to read an object's tensors, into `target_buffers` (which may be on another device) or new ones."""
        metadata = tensor_transport_metadata
        assert isinstance(metadata, NixlAsyncTransportMetadata)
        if not metadata.tensor_meta:
            return NixlAsyncFetchRequest(obj_id=obj_id, tensors=[])
        tensors = target_buffers or [
            torch.empty(shape, dtype=dtype, device=metadata.tensor_device) for shape, dtype in metadata.tensor_meta
        ]
        agent = self.agent()
        return NixlAsyncFetchRequest(obj_id=obj_id, tensors=tensors, future=agent.start(obj_id, metadata, tensors))

    def wait_fetch_complete(self, fetch_request: FetchRequest, timeout: float = -1) -> list[Any]:
        """Return a fetch's tensors when they are whole; `timeout` in seconds, below 0 for no end.

        A fetch that is late is cancelled, and its buffers are quiet, when this raises; with a timeout of 0 it goes on.

        Raises:
            RayDirectTransportError: it failed, for instance as the source's process ended.
            TimeoutError: it is not complete.
        """
        assert isinstance(fetch_request, NixlAsyncFetchRequest)
        future, tensors = fetch_request.future, list(fetch_request.tensors)
        if future is None:
            return tensors
        try:
            future.result(None if timeout < 0 else timeout)
        except TimeoutError:
            if timeout > 0:
                self.agent().quiet(future)
            if future.done() and not isinstance(error := future.exception(), concurrent.futures.CancelledError):
                if error is None:
                    return tensors
                raise _failed(fetch_request.obj_id, error) from None
            raise TimeoutError(f"object {fetch_request.obj_id} is not fetched within {timeout:g} s") from None
        except Exception as error:
            raise _failed(fetch_request.obj_id, error) from error
        return tensors

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Read an object's tensors and wait for them."""
        return self.wait_fetch_complete(
            self.fetch_multiple_tensors(obj_id, tensor_transport_metadata, communicator_metadata, target_buffers)
        )

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Refuse: the receiver reads."""
        raise NotImplementedError(f"{TRANSPORT} is one-sided: the receiver reads")

    def garbage_collect(self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]) -> None:
        """Take the registrations of an object back; returns when no peer reads it any more."""
        agent = self.agent()
        agent.run(agent.conceal(obj_id))

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Cancel the fetches of an object, those that are yet to begin too; returns when their buffers are quiet."""
        self.agent().abort(obj_id)


class _Agent:
    """The agent of a process, on the loop that all such agents share. What is `async` runs on that loop."""

    def __init__(self, name: str, host: str) -> None:
        self._name, self._host = name, host
        given = os.environ.get(TOKEN_VARIABLE)
        self._told = None if given else secrets.token_bytes(16)
        self._storages: dict[tuple[str, int], _Held] = {}
        self._objects: dict[str, list[_Held]] = {}
        self._fetches: dict[str, set[concurrent.futures.Future[None]]] = {}
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._close = self._aclose
        ENGINE.enter(self._close)
        self._agent = Agent(name, token=given or self._told)
        try:
            ENGINE.run(self._open())
        except BaseException:
            ENGINE.leave(self._close)
            raise
        self._registering = asyncio.Lock()
        self._releasing: set[asyncio.Task[None]] = set()

    async def _open(self) -> None:
        await self._agent.__aenter__()
        await self._agent.serve(self._host, 0)

    async def _aclose(self) -> None:
        await self._agent.aclose()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for it."""
        return ENGINE.run(work)

    # Memory.

    async def hold(self, tensors: Sequence[torch.Tensor]) -> list[_Held]:
        """Register the storages of tensors, or count one user more; all or none."""
        held: list[_Held] = []
        try:
            for tensor in tensors:
                held += [await self._hold(tensor)]
        except BaseException:
            await self.release(held)
            raise
        return held

    async def _hold(self, tensor: torch.Tensor) -> _Held:
        key = _key(tensor)
        async with self._registering:
            held = self._storages.get(key)
            if held is None:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                # A name is never used twice, so that old metadata never means other memory.
                region = await self._agent.register(whole, name=f"ray-{next(self._numbers)}")
                held = self._storages[key] = _Held(key, whole, region)
            held.users += 1
        return held

    async def release(self, held: Sequence[_Held]) -> None:
        """Count one user less of each; who has none is deregistered, when no peer reads it any more."""
        async with self._registering:
            for one in held:
                one.users -= 1
            gone = [one for one in set(held) if one.users == 0]
            for one in gone:
                del self._storages[one.key]
        await asyncio.gather(*(one.region.aclose() for one in gone))

    async def release_storage(self, tensor: torch.Tensor) -> None:
        """Count one user of a tensor's storage less."""
        held = self._storages.get(_key(tensor))
        if held is not None:
            await self.release([held])

    # Objects.

    async def expose(self, obj_id: str, tensors: list[torch.Tensor], kind: str) -> NixlAsyncTransportMetadata:
        """Register an object's tensors; a second time, for a retried task, in place of the first."""
        filled = [tensor for tensor in tensors if tensor.numel()]
        held = await self.hold(filled)
        before = self._objects.get(obj_id, [])
        self._objects[obj_id] = held
        await self.release(before)
        by_tensor = {id(tensor): one for tensor, one in zip(filled, held, strict=True)}
        places = []
        for tensor in tensors:
            one = by_tensor.get(id(tensor))
            nbytes = tensor.numel() * tensor.element_size()
            places.append(("", 0, 0) if one is None else (one.region.name, tensor.data_ptr() - one.region.address, nbytes))
        regions = {one.region.name: one.region for one in held}
        return NixlAsyncTransportMetadata(
            tensor_meta=[(tensor.shape, tensor.dtype) for tensor in tensors],
            tensor_device=kind,
            agent_name=self._name,
            agent_metadata=blobs.write(self._agent.metadata(regions.values()), self._told),
            places=places,
        )

    async def conceal(self, obj_id: str) -> None:
        """Release an object's tensors."""
        await self.release(self._objects.pop(obj_id, []))

    # Fetches.

    def start(
        self, obj_id: str, metadata: NixlAsyncTransportMetadata, tensors: list[torch.Tensor]
    ) -> concurrent.futures.Future[None]:
        """Start a fetch."""
        future: concurrent.futures.Future[None] = _Fetch()
        with self._lock:
            aborted = obj_id in self._aborted
            self._aborted.pop(obj_id, None)
            self._fetches.setdefault(obj_id, set()).add(future)
        future.add_done_callback(lambda ended: self._forget(obj_id, ended))
        if aborted:
            future.cancel()
        ENGINE.call(self._begin, future, metadata, tensors)
        return future

    def _begin(self, future: _Fetch, metadata: NixlAsyncTransportMetadata, tensors: list[torch.Tensor]) -> None:
        future.task = asyncio.get_running_loop().create_task(self._fetch(metadata, tensors))
        future.task.add_done_callback(future.settle)
        if future.unwanted:
            future.task.cancel()

    def _forget(self, obj_id: str, future: concurrent.futures.Future[None]) -> None:
        with self._lock:
            fetches = self._fetches.get(obj_id, set())
            fetches.discard(future)
            if not fetches:
                self._fetches.pop(obj_id, None)

    def abort(self, obj_id: str) -> None:
        """Cancel an object's fetches and wait until they are quiet; without any, the next one."""
        with self._lock:
            fetches = list(self._fetches.get(obj_id, ()))
            if not fetches:
                self._aborted[obj_id] = None
                while len(self._aborted) > MAX_ABORTED:
                    self._aborted.popitem(last=False)
        for future in fetches:
            self.quiet(future)

    def quiet(self, future: concurrent.futures.Future[None]) -> None:
        """Cancel a fetch and wait until its buffers are quiet."""
        future.cancel()
        concurrent.futures.wait([future])

    async def _fetch(self, metadata: NixlAsyncTransportMetadata, tensors: list[torch.Tensor]) -> None:
        pairs = [(tensor, place) for tensor, place in zip(tensors, metadata.places, strict=True) if place[2]]
        if not pairs:
            return
        held = await self.hold([tensor for tensor, _ in pairs])
        try:
            theirs = await self._theirs(metadata, [place for _, place in pairs])
            ours = []
            for one, (tensor, (_, _, nbytes)) in zip(held, pairs, strict=True):
                offset = tensor.data_ptr() - one.region.address
                ours.append(one.region[offset : offset + nbytes])
            await self._agent.transfer(theirs, ours)
        finally:
            # Its bytes are quiet: whether every peer has forgotten the buffers is no reason to wait.
            task = asyncio.get_running_loop().create_task(self.release(held))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _theirs(self, metadata: NixlAsyncTransportMetadata, places: list[tuple[str, int, int]]) -> list[Descriptor]:
        if metadata.agent_name == self._name:
            own = {held.region.name: held.region for held in self._storages.values()}
            missing = {name for name, _, _ in places} - own.keys()
            if missing:
                raise NotFoundError(f"the object is gone: {', '.join(sorted(missing))}")
            return [own[name][offset : offset + nbytes] for name, offset, nbytes in places]
        read = blobs.read(metadata.agent_metadata)
        events = self._agent.membership()
        peer = self._agent.peers.get(read.name)
        assert read.announcement is not None
        if peer is None or peer.incarnation != read.announcement.incarnation:
            peer = await self._agent.add_peer(metadata.agent_metadata, token=read.token)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_SECONDS):
                while any(name not in peer.regions for name, _, _ in places) and not peer.gone:
                    await anext(events)
        return [peer.region(name)[offset : offset + nbytes] for name, offset, nbytes in places]


class _Fetch(concurrent.futures.Future[None]):
    """A fetch as other threads see it: cancelling it asks for its end, and it is done when its buffers are quiet."""

    def __init__(self) -> None:
        super().__init__()
        self.task: asyncio.Task[None] | None = None
        self.unwanted = False

    def cancel(self) -> bool:
        """Ask for the end of the fetch; it comes by `settle`."""
        if self.done():
            return False
        self.unwanted = True
        ENGINE.call(self._stop)
        return True

    def _stop(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def settle(self, task: asyncio.Task[None]) -> None:
        """Take over how the task ended."""
        if task.cancelled():
            self.set_exception(concurrent.futures.CancelledError())
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(None)


def _available(actor: object) -> bool:
    """Tell, in an actor's process, whether an agent opens there."""
    from ray.experimental.rdt.util import get_tensor_transport_manager

    try:
        get_tensor_transport_manager(TRANSPORT).agent()
    except (NixlError, ValueError):
        return False
    return True


def _own_name() -> str:
    actor = ray.get_runtime_context().get_actor_id()
    return f"ray-driver-{uuid.uuid4()}" if actor is None else str(actor)


def _key(tensor: torch.Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _failed(obj_id: str, error: BaseException | None) -> Exception:
    from ray.exceptions import RayDirectTransportError

    why = "it was aborted" if isinstance(error, concurrent.futures.CancelledError) else f"{type(error).__name__}: {error}"
    made: Exception = RayDirectTransportError(f"the {TRANSPORT} transfer of object {obj_id} failed: {why}")
    return made
