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
from nixl_async.compat.polled import Ranges as NativeRanges
from nixl_async.compat.polled import Side as NativeSide
from nixl_async.compat.polled import Target
from nixl_async.compat.ranges import Group
from nixl_async.compat.requests import Owner, Request, Way, find_target, prepared_request
from nixl_async.descriptors import Descriptor, Plan, Side
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
    sides: dict[int, NativeSide]
    """Those of the lists that transfers are made of natively."""
    native_ranges: dict[str, NativeRanges]
    """What lists are prepared of natively, by the agent's name; "" for this one's own."""
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
        epoch = self.gate.epoch
        handle = self._keep(self._located(agent, from_list(descs), handles))
        self._publish_ranges(agent, epoch)
        return handle

    def prepare_runs(self, agent: str, memory: nixl_mem_t, runs: Any, handles: Sequence[int]) -> int:
        """Find what holds runs of places."""
        epoch = self.gate.epoch
        handle = self._keep(self._located(agent, from_runs(memory, runs), handles))
        self._publish_ranges(agent, epoch)
        return handle

    def _publish_ranges(self, agent: str, epoch: int) -> None:
        """Have lists of an agent's main memory prepared natively from now on, and transfers of them made so."""
        known = self.native_ranges.get(agent)
        if known is not None and known.epoch == epoch:
            return
        lane = next((one for one in self.lanes.values() if one.plugin.remote), None)
        remote = self.remotes.get(agent) if agent and agent != self.name else None
        ranges = (lane.local if remote is None else remote.ranges) if lane is not None else None
        group = None if ranges is None else ranges.of(nixl_mem_t.DRAM_SEG, 0)
        if self.exports or lane is None or group is None or not _usable(group.regions):
            return
        target = self._target(lane, remote, group) if agent else None
        if agent and target is None:
            return
        way = Way(self, lane, group.regions, remote, agent)
        self.native_ranges[agent] = NativeRanges(group.starts, group.ends, lane.handle, epoch, target, way)

    def _target(self, lane: Lane, remote: Remote | None, group: Group) -> Target | None:
        """Return the process that copies with a remote agent go to; `None` where they go another way than by this thread."""
        mine = lane.local.of(nixl_mem_t.DRAM_SEG, 0)
        if mine is None:
            return None
        one = np.array([1])
        here, there = (Side((each.regions[0],), each.starts[:1]) for each in (mine, group))
        try:
            route = lane.agent.prepare_plan(Plan(here, there, one, 1, (1,))).routes[0]
        except NixlError:
            return None
        return find_target(lane, route, remote)

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
        epoch = self.gate.epoch
        request = self._request(op, near, mine, far, theirs, notify, handles, merge)
        if not handles:
            self._remember(local, near, remote, far, epoch, request)
        return self._keep_request(request)

    def _keep_request(self, request: Request) -> int:
        handle = next(self._handles)
        self.requests[handle] = request
        return handle

    def _remember(self, local: int, near: Places, remote: int, far: Places, epoch: int, like: Request) -> None:
        """Have transfers of these two lists made natively from now on, where they go as this one does."""
        lane = like.lane
        if self.exports or (near.memory, far.memory) != (nixl_mem_t.DRAM_SEG,) * 2:
            return
        target = find_target(lane, like.prepared.routes[0], far.remote)
        held, held_far = near.held[lane.handle], far.held[lane.handle]
        if target is None or not _usable(held.regions) or not _usable(held_far.regions):
            return
        for handle, places, found, where in ((local, near, held, None), (remote, far, held_far, target)):
            columns = places.addresses, places.lengths, places.strides, places.ends
            agent = "" if where is None else self.name if places.remote is None else places.remote.name
            way = Way(self, lane, found.regions, places.remote, agent)
            self.sides[handle] = NativeSide(*columns, places.n, found.index, lane.handle, epoch, where, way)

    def _prepared(self, handle: int) -> Places:
        places = self.places.get(handle)
        if places is None and (side := self.sides.get(handle)) is not None:
            places = self.places[handle] = self._placed(side)
        if places is None:
            raise refusal(nixlInvalidParamError, f"{handle:#x} is no list of places; it may be released")
        return places

    def _placed(self, side: NativeSide) -> Places:
        """Make of places that were prepared natively what the rest needs."""
        way: Way = side.way
        if way.remote is not None and self.remotes.get(way.remote.name) is not way.remote:
            raise refusal(nixlNotFoundError, f"agent {way.agent!r} was removed after the list was prepared; prepare another")
        addresses, lengths, strides, ends, _ = (
            None if one is None else np.frombuffer(one, np.int64) for one in side.columns()
        )
        assert addresses is not None
        assert lengths is not None
        counts = None if ends is None else np.diff(ends, prepend=0)
        n = len(lengths) if ends is None else int(ends[-1])
        places = Places(nixl_mem_t.DRAM_SEG, addresses, lengths, np.zeros_like(lengths), strides, counts, ends, n=n)
        return self._located(way.agent, places, ())

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
        epoch = self.gate.epoch
        far = self._located(agent, far, handles)
        near = self._located("", near, handles)
        self._publish_ranges("", epoch)
        self._publish_ranges(agent, epoch)
        return self._keep_request(self._request(op, near, None, far, None, notify, handles, False))

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
    ) -> Request:
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
        return prepared_request(self, lane, write, prepared, far.remote, notify, n_descs)

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
        request.adopt()
        return request

    def release_request(self, handle: int) -> None:
        """Forget a transfer; cancel it if it is under way."""
        self.request(handle).release()
        self.requests.pop(handle, None)

    def release_places(self, handle: int) -> None:
        """Forget a list of places; transfers made of it stay."""
        known = (self.places.pop(handle, None), self.sides.pop(handle, None))
        if known == (None, None):
            raise refusal(nixlInvalidParamError, f"{handle:#x} is no list of places; it may be released")

    def estimate(self, handle: int) -> float | None:
        """Return how many seconds a transfer should take, `None` if nobody knows."""
        request = self.request(handle)
        if not request.lane.plugin.remote:
            raise refusal(nixlNotSupportedError, f"backend {request.lane.plugin.name} estimates no costs")
        predictions = request.lane.backends[request.prepared.routes[0]].predict(request.prepared.plan)
        return predictions[0].seconds if predictions else None


def _usable(regions: Sequence[Any]) -> bool:
    try:
        for region in regions:
            region.check_usable()
    except NixlError:
        return False
    return not any(region.readonly for region in regions)


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
