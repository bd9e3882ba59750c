"""Making transfers: which registrations hold the places, which backend has both sides, and the plan of what goes where."""

from __future__ import annotations

import itertools
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.compat.enums import nixl_mem_t, nixl_xfer_op_t
from nixl_async.compat.errors import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlNotFoundError,
    nixlNotSupportedError,
    refusal,
    translate,
)
from nixl_async.compat.exchange import Remote
from nixl_async.compat.lane import Lane, vram_on_host
from nixl_async.compat.lists import nixlXferDList
from nixl_async.compat.places import Places, from_list, from_runs, pair, read_indices
from nixl_async.compat.requests import Owner, Request
from nixl_async.descriptors import Descriptor, Side
from nixl_async.errors import NixlError
from nixl_async.handle import PreparedTransfer

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

T = TypeVar("T")


class Making(Owner):
    """The part of an agent that makes transfers."""

    lanes: dict[int, Lane]
    requests: dict[int, Request]
    places: dict[int, Places]
    _handles: itertools.count[int]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait."""
        raise NotImplementedError

    def remote_lane(self) -> Lane:
        """Return the backend that reaches other agents."""
        raise NotImplementedError

    def chosen(self, handles: Sequence[int]) -> list[Lane]:
        """Return the backends with these handles, or all."""
        raise NotImplementedError

    def prepare_list(self, agent: str, descs: nixlXferDList, handles: Sequence[int]) -> int:
        """Find what holds the places; return a handle to choose from them."""
        return self._keep(self._located(agent, from_list(descs), handles))

    def prepare_runs(self, agent: str, memory: nixl_mem_t, runs: Any, handles: Sequence[int]) -> int:
        """Find what holds runs of places."""
        return self._keep(self._located(agent, from_runs(memory, runs), handles))

    def _keep(self, places: Places) -> int:
        handle = next(self._handles)
        self.places[handle] = places
        return handle

    def _located(self, agent: str, places: Places, handles: Sequence[int]) -> Places:
        if places.memory is nixl_mem_t.VRAM_SEG and vram_on_host():
            places.memory = nixl_mem_t.DRAM_SEG
        places.target = agent != ""
        if agent and agent != self.name:
            places.remote = self.known(agent)
            found = places.find(places.remote.ranges)
            if found is not None and any(lane.plugin.remote for lane in self.chosen(handles)):
                places.held[self.remote_lane().handle] = found
        else:
            for lane in self.chosen(handles):
                if lane.takes(places.memory) and (found := places.find(lane.local)) is not None:
                    places.held[lane.handle] = found
        if not places.held:
            whose = "this agent" if places.remote is None else f"agent {agent!r}, as far as its metadata was loaded,"
            raise refusal(nixlNotFoundError, f"{whose} has no registration that holds these {places.memory.name} places")
        return places

    def known(self, agent: str) -> Remote:
        """Return a loaded remote agent."""
        remote: Remote | None = self.remotes.get(agent)
        if remote is None:
            loaded = ", ".join(self.remotes) or "none"
            raise refusal(nixlNotFoundError, f"no metadata of agent {agent!r} was loaded; loaded are: {loaded}")
        return remote

    def make(
        self,
        op: nixl_xfer_op_t,
        local: int,
        local_indices: Any,
        remote: int,
        remote_indices: Any,
        notify: bytes,
        handles: Sequence[int],
        merge: bool,
    ) -> int:
        """Make a transfer of chosen places."""
        near, far = self._prepared(local), self._prepared(remote)
        if near.target or not far.target:
            raise refusal(nixlInvalidParamError, "the local side must be local places, and the remote side places of an agent")
        mine, theirs = read_indices("local", local_indices), read_indices("remote", remote_indices)
        if len(mine) != len(theirs) or not len(mine):
            raise refusal(
                nixlInvalidParamError,
                f"{len(mine)} local indices and {len(theirs)} remote ones; give as many, and one at least",
            )
        return self._request(op, near, mine, far, theirs, notify, handles, merge)

    def _prepared(self, handle: int) -> Places:
        places = self.places.get(handle)
        if places is None:
            raise refusal(nixlInvalidParamError, f"{handle:#x} is no list of places; it may be released")
        return places

    def create(
        self,
        op: nixl_xfer_op_t,
        local: nixlXferDList,
        remote: nixlXferDList,
        agent: str,
        notify: bytes,
        handles: Sequence[int],
    ) -> int:
        """Make a transfer of two lists."""
        if local.descCount() != remote.descCount():
            counts = f"{local.descCount()} local descriptors and {remote.descCount()} remote ones"
            raise refusal(nixlInvalidParamError, f"{counts}; both sides need the same number")
        near, far = from_list(local), from_list(remote)
        _check_lengths(near.lengths, far.lengths)
        far = self._located(agent, far, handles)
        near = self._located("", near, handles)
        return self._request(op, near, None, far, None, notify, handles, False)

    def _request(
        self,
        op: nixl_xfer_op_t,
        near: Places,
        mine: Array | None,
        far: Places,
        theirs: Array | None,
        notify: bytes,
        handles: Sequence[int],
        merge: bool,
    ) -> int:
        lane = self._lane_of(near, far, handles)
        if notify and not lane.plugin.remote:
            raise refusal(nixlBackendError, f"backend {lane.plugin.name} carries no notifications")
        if far.remote is None and not lane.plugin.remote and far.memory in (nixl_mem_t.DRAM_SEG, nixl_mem_t.VRAM_SEG):
            raise refusal(
                nixlInvalidParamError, f"the remote side of {lane.plugin.name} is files or objects, not {far.memory.name}"
            )
        held, held_far = near.held[lane.handle], far.held[lane.handle]
        write = op is nixl_xfer_op_t.NIXL_WRITE
        n = near.n if mine is None else len(mine)
        plan = pair(near, mine, held, far, theirs, held_far)
        if not write:
            plan.src, plan.dst = plan.dst, plan.src
        try:
            if far.memory is nixl_mem_t.OBJ_SEG:
                every = np.arange(n)
                a, lengths = near.choose(every if mine is None else mine, held)
                b, _ = far.choose(every if theirs is None else theirs, held_far)
                prepared = self._objects(lane, op, a, lengths, b)
            else:
                self._check_writable(plan.dst)
                prepared = lane.agent.prepare_plan(plan)
        except NixlError as error:
            raise translate(error) from error
        merged = merge and far.memory is not nixl_mem_t.OBJ_SEG
        n_descs = len(prepared.plan.lengths) if merged else n
        handle = next(self._handles)
        self.requests[handle] = Request(self, lane, op, prepared, far.remote, notify, n_descs)
        return handle

    def _lane_of(self, near: Places, far: Places, handles: Sequence[int]) -> Lane:
        both = [lane for lane in self.chosen(handles) if lane.handle in near.held and lane.handle in far.held]
        if not both:
            raise refusal(nixlNotFoundError, "no backend has both sides registered")
        # Memory goes by the backend that reaches agents: others take it only beside their files and objects.
        return next((one for one in both if one.plugin.remote), both[0])

    def _check_writable(self, side: Side) -> None:
        for region in side.regions:
            if region.readonly:
                raise refusal(nixlBackendError, f"{region!r} is open for reading only")

    def _objects(self, lane: Lane, op: nixl_xfer_op_t, near: Side, lengths: Array, far: Side) -> PreparedTransfer:
        store = self.run(lane.opened_store())
        found: tuple[Any, ...] = far.regions
        keys = [found[0]] * len(lengths) if far.index is None else [found[i] for i in far.index.tolist()]
        offsets = far.addresses
        here = _descriptors(near, lengths)
        if op is nixl_xfer_op_t.NIXL_WRITE:
            if offsets.any():
                raise refusal(
                    nixlBackendError, f"object {keys[int(offsets.argmax())]!r} is written whole: its offset must be 0"
                )
            return self.run(lane.agent.prepare(here, store.objects(keys, lengths)[:]))
        there = store.objects(keys, offsets + lengths).select(np.arange(len(keys)), offsets, lengths)
        return self.run(lane.agent.prepare(there, here))

    def request(self, handle: int) -> Request:
        """Return a transfer by its handle."""
        request = self.requests.get(handle)
        if request is None:
            raise refusal(nixlInvalidParamError, f"{handle:#x} is no transfer of agent {self.name!r}; it may be released")
        return request

    def release_request(self, handle: int) -> None:
        """Forget a transfer; cancel it if it is under way."""
        self.request(handle).release()
        self.requests.pop(handle, None)

    def release_places(self, handle: int) -> None:
        """Forget a list of places; transfers made of it stay."""
        self._prepared(handle)
        self.places.pop(handle, None)

    def estimate(self, handle: int) -> float | None:
        """Return how many seconds a transfer should take, `None` if nobody knows."""
        request = self.request(handle)
        if not request.lane.plugin.remote:
            raise refusal(nixlNotSupportedError, f"backend {request.lane.plugin.name} estimates no costs")
        predictions = request.lane.backends[request.prepared.routes[0]].predict(request.prepared.plan)
        return predictions[0].seconds if predictions else None


def _check_lengths(here: Array, there: Array) -> None:
    if not np.array_equal(here, there):
        at = int((here != there).argmax())
        raise refusal(
            nixlInvalidParamError,
            f"descriptor {at} has {int(here[at])} bytes here and {int(there[at])} there; both need the same length",
        )


def _descriptors(side: Side, lengths: Array) -> list[Descriptor]:
    if side.index is None:
        region = side.regions[0]
        return [Descriptor(region, side.addresses - region.address, np.ascontiguousarray(lengths))]
    regions = [side.regions[i] for i in side.index.tolist()]
    rows = zip(regions, side.addresses.tolist(), lengths.tolist(), strict=True)
    return [Descriptor.one(region, address - region.address, nbytes) for region, address, nbytes in rows]
