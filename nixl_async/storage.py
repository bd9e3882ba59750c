"""Regions that are not memory: open files, and objects of a store. Addresses in them are offsets; nothing here does I/O.

Objects of one store are one region, however many: object i holds the addresses from `starts[i]` on, with a byte of nobody's
between neighbours, so that ten thousand objects are arrays like pages are, and no two of them are ever coalesced.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from nixl_async.backend import SCHEMES, Op, StoreAddress
from nixl_async.descriptors import Descriptor, MemoryKind, integers
from nixl_async.errors import BackendError, ClosedError, ConfigurationError, DescriptorError, PartsFailed, TransferError
from nixl_async.memory import Held

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nixl_async.descriptors import Array, Side

UNSIZED_NBYTES = 1 << 50
"""What a file or object without a size may hold at most."""
MAX_REGION_NBYTES = 1 << 62
"""What the objects of one region may hold together: offsets are 64 bits."""
_scheme_numbers: dict[str, int] = {}
"""Objects of different kinds of store cannot be one side of a transfer: each scheme is a device of its own."""


class FileRegion(Held):
    """An open file; made by `agent.file`. Slice it, or ask for pages and ranges, as of memory.

    `fd` is open through the page cache, `direct_fd` (-1: not asked for) past it. Leaving `async with` (or `aclose`) waits for the
    transfers that use it, syncs if that was asked for, and publishes: a file opened with `publish=True` gets its name then, or
    never, if the block raised.
    """

    kind = MemoryKind.FILE
    peer: str | None = None
    address = 0
    device = 0

    def __init__(
        self, path: str, fd: int, direct_fd: int, nbytes: int | None, readonly: bool, close: Callable[[bool], Awaitable[None]]
    ) -> None:
        super().__init__()
        self.name = path
        self.path = path
        self.fd: int = fd
        self.direct_fd: int = direct_fd
        self.sized: bool = nbytes is not None
        self.nbytes: int = UNSIZED_NBYTES if nbytes is None else nbytes
        self.readonly = readonly
        self.keys: dict[str, bytes] = {}
        self.quarantined = False
        self.forget: Callable[[FileRegion], None] = _nobody
        """Called when the file is closed: the agent keeps the open ones."""
        self._close = close
        self._closing = False
        self._closer: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether the file is closed, or about to be."""
        return self._closing

    def check_usable(self) -> None:
        """Raise `ClosedError` when the file is closed or quarantined."""
        if self._closing:
            raise ClosedError(f"file {self.path!r} is closed")
        if self.quarantined:
            raise ClosedError(f"file {self.path!r} is quarantined: bytes of a failed transfer may still move in it")

    async def aclose(self, *, publish: bool = True) -> None:
        """Wait for the transfers that use the file, then close it; `publish=False` drops what was to get its name. Idempotent.

        Raises:
            BackendError: syncing, publishing or closing failed.
        """
        self._closing = True
        if self._closer is None:
            self._closer = asyncio.ensure_future(self._end(publish))
        await asyncio.shield(self._closer)

    async def _end(self, publish: bool) -> None:
        try:
            if not self.quarantined:
                await self.wait_unused()
            if self.quarantined:
                # What is still under way would write to whatever gets the descriptor next.
                raise BackendError(
                    f"file {self.path!r} is quarantined: it stays open, unsynced and unpublished", backend="posix"
                )
            await self._close(publish)
        finally:
            self.forget(self)

    async def __aenter__(self) -> FileRegion:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await self.aclose(publish=kind is None)


def _nobody(region: FileRegion) -> None:
    pass


class ObjectRegion(Held):
    """Objects of one store; made by `agent.object`, `Store.object` and `Store.objects`.

    `region[:]` is all of them, `select` some; of a single object, slices, pages and ranges are as of memory. A transfer writes
    whole objects, and each range given is one part of it. `nbytes` is needed to have more than one, or a part of one; without
    it, one object takes the other side's size, and reading it fails if it is not of that size.
    """

    kind = MemoryKind.OBJECT
    peer: str | None = None
    address = 0
    keyed = True

    def __init__(
        self,
        store: StoreAddress,
        objects: Sequence[str],
        nbytes: ArrayLike | None,
        *,
        readonly: bool = False,
        exact: bool = False,
        if_none_match: bool = False,
    ) -> None:
        super().__init__()
        if not objects:
            raise DescriptorError("the list of keys is empty; give at least one")
        self.store = store
        self.objects: tuple[str, ...] = tuple(objects)
        self.name: str = f"{store.scheme}://{store.bucket}/{self.objects[0]}" + (
            "" if len(self.objects) == 1 else f" and {len(self.objects) - 1} more"
        )
        self.device: int = _scheme_numbers.setdefault(store.scheme, len(_scheme_numbers))
        self.readonly = readonly
        self.if_none_match = if_none_match
        self.exact = exact
        """Whether a read must find the object to be exactly as long as `nbytes` says."""
        self.sized: bool = nbytes is not None
        if nbytes is None:
            if len(self.objects) > 1:
                raise DescriptorError(
                    "nbytes is needed for more than one object: one size for all, or a list; `stat` tells them"
                )
            sizes = np.array([UNSIZED_NBYTES], np.int64)
        else:
            sizes = np.array(integers("nbytes", nbytes))
            if len(sizes) == 1:
                sizes = np.repeat(sizes, len(self.objects))
            if len(sizes) != len(self.objects):
                raise DescriptorError(f"{len(self.objects)} keys but {len(sizes)} sizes; give one for each, or one for all")
            if int(sizes.min()) < 0 or int(sizes.max()) > UNSIZED_NBYTES:
                wrong = int(sizes.min()) if int(sizes.min()) < 0 else int(sizes.max())
                raise DescriptorError(f"an object of {wrong} bytes; a size is 0 to {UNSIZED_NBYTES}")
            if float(sizes.sum(dtype=np.float64)) > MAX_REGION_NBYTES:
                raise DescriptorError(f"objects of more than {MAX_REGION_NBYTES} bytes together; name fewer at once")
        self.sizes: Array = sizes
        ends = np.cumsum(sizes) + np.arange(len(sizes))
        self.starts: Array = ends - sizes
        self.nbytes: int = int(ends[-1])

    def __len__(self) -> int:
        return len(self.objects)

    def check_usable(self) -> None:
        """Accept: objects are opened by nobody."""

    def __getitem__(self, item: slice) -> Descriptor:
        """Describe a byte range of a single object, or with `[:]` all bytes of all."""
        if len(self.objects) == 1:
            return super().__getitem__(item)
        if not isinstance(item, slice) or (item.start, item.stop, item.step) != (None, None, None):
            raise DescriptorError(f"{item!r} of {len(self.objects)} objects: take [:] for all, or select(indices) for some")
        return Descriptor(self, self.starts, self.sizes)

    def whole(self, nbytes: int) -> Descriptor:
        """Describe an object without a size as one of exactly `nbytes` bytes."""
        exact = ObjectRegion(
            self.store, self.objects, nbytes, readonly=self.readonly, exact=True, if_none_match=self.if_none_match
        )
        return Descriptor.one(exact, 0, nbytes)

    def select(self, indices: ArrayLike, offsets: ArrayLike = 0, nbytes: ArrayLike | None = None) -> Descriptor:
        """Describe the objects number `indices`, whole, or `nbytes` bytes at `offsets` in each.

        Raises:
            DescriptorError: there is no such object, or a range does not lie within its object.
        """
        chosen = integers("indices", indices)
        if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= len(self.objects)):
            wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
            raise DescriptorError(f"object {wrong} is out of range: there are {len(self.objects)}")
        inside = _for_each("offsets", offsets, len(chosen))
        sizes = self.sizes[chosen]
        lengths = sizes - inside if nbytes is None else np.array(_for_each("nbytes", nbytes, len(chosen)))
        # In this order nothing overflows.
        bad = (inside < 0) | (lengths < 0) | (inside > sizes) | (lengths > sizes - inside)
        if bad.any():
            at = int(bad.argmax())
            key = self.objects[int(chosen[at])]
            raise DescriptorError(
                f"{int(lengths[at])} bytes at {int(inside[at])} do not lie within object {key!r} of {int(sizes[at])} bytes"
            )
        return Descriptor(self, self.starts[chosen] + inside, lengths)

    def locate(self, addresses: Array) -> tuple[Array, Array]:
        """Return which object each address is in, and the offset there."""
        which = np.searchsorted(self.starts, addresses, "right") - 1
        return which, addresses - self.starts[which]

    def check_target(self, offsets: Array, lengths: Array) -> None:
        """Refuse to write anything but whole objects, each once, from its first byte to its last in order."""
        if len(self.objects) == 1 and len(offsets) == 1:
            if offsets[0] or (self.sized and lengths[0] != self.sizes[0]):
                self._refuse_target(0)
            if not lengths[0]:
                self._refuse_empty(0)
            return
        which, inside = self.locate(offsets)
        first = np.ones(len(which), np.bool_)
        first[1:] = which[1:] != which[:-1]
        begins = np.flatnonzero(first)
        keys = which[begins]
        expected = np.zeros(len(which), np.int64)
        expected[1:] = np.where(first[1:], 0, inside[:-1] + lengths[:-1])
        wrong = inside != expected
        totals = np.add.reduceat(lengths, begins) if len(begins) else lengths
        if wrong.any():
            self._refuse_target(int(which[wrong.argmax()]))
        if len({self.objects[key] for key in keys.tolist()}) != len(keys):
            raise DescriptorError(f"{self!r} is to be written with an object twice; give each once")
        if self.sized and (short := totals != self.sizes[keys]).any():
            self._refuse_target(int(keys[short.argmax()]))
        if not totals.all():
            self._refuse_empty(int(keys[(totals == 0).argmax()]))

    def replaced(self, offsets: Array) -> Iterator[Hashable]:
        """Tell which objects, of which store, are written by ranges at these offsets."""
        where = (self.store.scheme, self.store.bucket, self.store.options)
        for key in np.unique(self.locate(offsets)[0]).tolist():
            yield where, self.objects[key]

    def _refuse_empty(self, key: int) -> None:
        raise DescriptorError(
            f"object {self.objects[key]!r} would be written with no bytes; a transfer has at least one for each"
        )

    def _refuse_target(self, key: int) -> None:
        raise DescriptorError(
            f"only a part of object {self.objects[key]!r} would be written; objects are written whole, from byte 0 on in order"
        )


def _for_each(what: str, values: ArrayLike, n: int) -> Array:
    array = integers(what, values)
    if len(array) not in (1, n):
        raise DescriptorError(f"{n} indices but {len(array)} {what}; give one for each, or one for all")
    return np.broadcast_to(array, (n,))


def object_parts(side: Side, lengths: Array) -> Iterator[tuple[ObjectRegion, int, int, int, int]]:
    """Cut a side of a plan into runs of one object each: (region, object, first segment, behind the last, offset of the first)."""
    index = np.zeros(len(lengths), np.int64) if side.index is None else side.index
    which, inside = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    for number, region in enumerate(side.regions):
        assert isinstance(region, ObjectRegion)
        mine = slice(None) if side.index is None else np.flatnonzero(index == number)
        which[mine], inside[mine] = region.locate(side.addresses[mine])
    cut = np.ones(len(lengths), np.bool_)
    same = (which[1:] == which[:-1]) & (index[1:] == index[:-1])
    # A run goes on where the segment before it ends.
    cut[1:] = ~(same & (inside[1:] == inside[:-1] + lengths[:-1]))
    starts = np.flatnonzero(cut)
    stops = np.append(starts[1:], len(lengths))
    found = (index[starts], which[starts], starts, stops, inside[starts])
    for number, key, start, stop, offset in zip(*(column.tolist() for column in found), strict=True):
        yield side.regions[number], key, start, stop, offset


def raise_failed(failed: Sequence[tuple[int, TransferError]], op: Op) -> None:
    """Raise the first error of an op on a single run of one object, or `PartsFailed`."""
    if not failed:
        return
    first = min(failed, key=lambda one: one[0])[1]
    plan = op.plan
    runs = object_parts(plan.dst if plan.dst.kind is MemoryKind.OBJECT else plan.src, plan.lengths)
    if len(list(itertools.islice(runs, 2))) == 1:
        raise first
    many = "1 object" if len(failed) == 1 else f"{len(failed)} objects"
    raise PartsFailed(f"{many} failed, the first of them: {first}", backend=first.backend) from first


def parse_store(url: str, options: dict[str, Any], schemes: Collection[str] = SCHEMES) -> StoreAddress:
    """Read a store's URL, of one of `schemes`: `file:///directory`, or `scheme://bucket/prefix` as in `s3://bucket/prefix`.

    Raises:
        ConfigurationError: it is none of these.
    """
    try:
        parts = urlsplit(url)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigurationError(f"store URL {url!r} cannot be read: {error}") from error
    if parts.scheme not in schemes:
        known = ", ".join(f"{scheme}://" for scheme in schemes)
        raise ConfigurationError(f"store URL {url!r} has scheme {parts.scheme!r}; known are {known}")
    # Keys may hold what URLs give a meaning to.
    rest = url[len(parts.scheme) + 3 :]
    given = tuple(sorted(options.items()))
    for name, value in given:
        try:
            hash(value)
        except TypeError as error:
            raise ConfigurationError(
                f"option {name} is {value!r}, which cannot be hashed; give a number, string or tuple"
            ) from error
    if parts.scheme == "file":
        if not rest.startswith("/"):
            raise ConfigurationError(f"store URL {url!r} must be file:/// and an absolute path")
        return StoreAddress("file", rest.rstrip("/") or "/", "", given)
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ConfigurationError(f"store URL {url!r} names no bucket; write {parts.scheme}://bucket/prefix")
    return StoreAddress(parts.scheme, bucket, prefix, given)
