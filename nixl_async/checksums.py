"""Checksums of pages: which kinds there are, which pages a transfer has, and how two agents ask each other for sums. Pure.

The libraries are crc32c (ICRAR) and xxhash: both read any buffer where it is and let go of the interpreter's lock over long ones.
VERIFY asks for the sums of byte ranges of the receiver's regions, VERIFIED answers with them in that order, or says why not:

    VERIFY    u64 id · u8 algorithm · u16 regions · for each: u64 address, u32 bytes of its name, the name · ranges of 14 bytes:
              u16 which region, u32 bytes, u64 offset in it
    VERIFIED  u64 id · u8 0 · u64 for each range; or u64 id · u8 1 · text

All numbers are little-endian. A region is named with its address: one that is being deregistered may share its name with another.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import itertools
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.descriptors import Descriptor, Region, Side
from nixl_async.errors import ConfigurationError, MissingDependency, ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array, Places, Plan

    Sums = NDArray[np.uint64]

PAGE_NBYTES = 1 << 20
"""What is not given as pages is cut into pages of this size; longer pages are summed in pieces of it."""
MAX_PIECES = 4096
"""How many byte ranges one request names at most."""
MAX_REQUEST_NBYTES = 32 << 20
"""How many bytes they have together at most."""
MAX_REGIONS = 256
"""In how many regions they may lie."""
MAX_NAMES_NBYTES = 128 << 10
"""What the names of those may take."""
MAX_REASON_NBYTES = 1024

HOLD_SECONDS = 1e-3
"""How long pages too short for the libraries to let go of the interpreter's lock are summed before others get a turn at it."""
TURN_SECONDS = 5e-5
BLOCK, BLOCK_NBYTES = 64, 4 << 20
"""How many pages of one size, and how many bytes, are summed before it is asked whether to go on."""
LETS_GO_NBYTES = {"crc32c": 32 << 10, "xxh3": (64 << 10) + 1}
"""From which size on they let go of it."""

_NUMBERS = {"crc32c": 1, "xxh3": 2}
_MODULES = {"crc32c": ("crc32c", "crc32c"), "xxh3": ("xxhash", "xxh3_64_intdigest")}
_HEAD = struct.Struct("<QBH")
_NAME = struct.Struct("<QI")
_ANSWER = struct.Struct("<QB")
RANGE = np.dtype([("region", "<u2"), ("nbytes", "<u4"), ("offset", "<u8")])
ALGORITHMS = tuple(_NUMBERS)


@functools.cache
def available() -> list[str]:
    """Return the algorithms whose libraries are installed."""
    return [name for name, (module, _) in _MODULES.items() if importlib.util.find_spec(module) is not None]


def load(algorithm: str | bool) -> Callable[[Any], int]:
    """Return the function that sums a buffer.

    Raises:
        ConfigurationError: there is no such algorithm.
        MissingDependency: its library is not installed.
    """
    if not isinstance(algorithm, str) or algorithm not in _MODULES:
        allowed = ", ".join(map(repr, ALGORITHMS))
        raise ConfigurationError(f"verify is {algorithm!r}; it must be one of {allowed}, False, or None")
    module, name = _MODULES[algorithm]
    try:
        function: Callable[[Any], int] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependency(
            f"verify={algorithm!r} needs the package {module!r}: pip install 'nixl-async[verify]'"
        ) from error
    return function


def sums(algorithm: str, addresses: Array, lengths: Array, stopped: Callable[[], bool]) -> Sums:
    """Return the sum of each byte range of this process's memory, or of those before `stopped()` became true; on a thread.

    The memory must stay where it is meanwhile.
    """
    function = load(algorithm)
    found = np.zeros(len(lengths), np.uint64)
    begun = time.perf_counter()
    # Runs of equal length, so that the loop over them is not Python's.
    edges = np.flatnonzero(np.diff(lengths)) + 1
    for first, last in itertools.pairwise((0, *edges.tolist(), len(lengths))):
        nbytes = int(lengths[first])
        memory = ctypes.c_char * nbytes
        step = max(1, min(BLOCK, BLOCK_NBYTES // nbytes))
        for start in range(first, last, step):
            stop = min(start + step, last)
            found[start:stop] = list(map(function, map(memory.from_address, addresses[start:stop].tolist())))
            if stopped():
                return found
            if nbytes < LETS_GO_NBYTES[algorithm] and time.perf_counter() - begun > HOLD_SECONDS:
                # Merely letting go would not do: whoever waits for the lock wakes too late to get it.
                time.sleep(TURN_SECONDS)
                begun = time.perf_counter()
    return found


@dataclass(slots=True, eq=False)
class Pieces:
    """A transfer's bytes cut so that each piece lies within one page, and in one stretch on both sides.

    `pages[i]` is the page of piece i, whose `lengths[i]` bytes were copied from `src.addresses[i]` to `dst.addresses[i]`.
    """

    src: Side
    dst: Side
    lengths: Array
    pages: Array
    n_pages: int

    def chunks(self, side: Side, max_nbytes: int = MAX_REQUEST_NBYTES) -> Iterator[Array]:
        """Yield which pieces are summed together: a request's worth each, those of one region of `side` after another.

        `max_nbytes`, if it is less than a request's, is at least `PAGE_NBYTES`.
        """
        order = np.arange(len(self.lengths)) if side.index is None else np.argsort(side.index, kind="stable")
        ends = np.cumsum(self.lengths[order])
        start, done = 0, 0
        while start < len(order):
            stop = min(int(ends.searchsorted(done + max_nbytes, "right")), start + MAX_PIECES)
            yield order[start:stop]
            start, done = stop, int(ends[stop - 1])


def cut_pages(plan: Plan, places: tuple[Places, Places] | None) -> Pieces:
    """Cut a plan that was made of `places` into pages: those of the side that has more of them, of `src` if both have as many.

    A descriptor has a page for each of its ranges, if it has several; one range has a page for each mebibyte.
    """
    if places is None:
        page_lengths = _page_lengths([plan.lengths])
    else:
        src, dst = (_page_lengths(_listed(side, plan.nbytes)) for side in places)
        page_lengths = dst if len(dst) > len(src) else src
    if np.array_equal(page_lengths, plan.lengths) and int(plan.lengths.max()) <= PAGE_NBYTES:
        # Nothing was coalesced: each page is a segment already.
        return Pieces(plan.src, plan.dst, plan.lengths, np.arange(len(page_lengths)), len(page_lengths))
    page_ends, segment_ends = np.cumsum(page_lengths), np.cumsum(plan.lengths)
    ends = np.union1d(page_ends, segment_ends)
    ends = ends[ends > 0]
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))[: len(ends)]
    lengths = ends - starts
    if len(lengths) and int(lengths.max()) > PAGE_NBYTES:
        counts = -(-lengths // PAGE_NBYTES)
        which = np.repeat(np.arange(len(lengths)), counts)
        step = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * PAGE_NBYTES
        starts, lengths = starts[which] + step, np.minimum(lengths[which] - step, PAGE_NBYTES)
    segment = segment_ends.searchsorted(starts, "right")
    inside = starts - (segment_ends[segment] - plan.lengths[segment])
    sides = [side.choose(segment) for side in (plan.src, plan.dst)]
    a, b = (Side(side.regions, side.addresses + inside, side.index) for side in sides)
    return Pieces(a, b, lengths, page_ends.searchsorted(starts, "right"), len(page_lengths))


def _listed(places: Places, nbytes: int) -> list[Array]:
    if isinstance(places, Region) and not places.sized:
        # It had the other side's size.
        return [np.array([nbytes], np.int64)]
    listed = [places] if isinstance(places, Region | Descriptor) else places
    return [(place[:] if isinstance(place, Region) else place).lengths for place in listed]


def _page_lengths(listed: Sequence[Array]) -> Array:
    found = []
    for lengths in listed:
        if len(lengths) == 1:
            full, rest = divmod(int(lengths[0]), PAGE_NBYTES)
            lengths = np.full(full + bool(rest), PAGE_NBYTES, np.int64)
            if rest:
                lengths[-1] = rest
        found.append(lengths)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


# What travels.


@dataclass(slots=True, eq=False)
class Request:
    """A question for sums: `regions` are (address, name) at the receiver, `ranges` an array of `RANGE`."""

    algorithm: str
    regions: Sequence[tuple[int, str]]
    ranges: NDArray[Any]

    def encode(self, number: int) -> bytes:
        """Return the payload of a VERIFY frame."""
        parts = [_HEAD.pack(number, _NUMBERS[self.algorithm], len(self.regions))]
        for address, name in self.regions:
            text = name.encode(errors="surrogatepass")
            parts += [_NAME.pack(address, len(text)), text]
        return b"".join([*parts, self.ranges.tobytes()])


def requests(algorithm: str, side: Side, lengths: Array, chunk: Array) -> Iterator[tuple[Array, Request]]:
    """Yield the requests for a chunk of pieces, with the pieces that each is about.

    Raises:
        ConfigurationError: a region's name is too long to be sent.
    """
    index = None if side.index is None else side.index[chunk]
    which, local = (np.zeros(1, np.int64), 0) if index is None else np.unique(index, return_inverse=True)
    regions = [side.regions[one] for one in which.tolist()]
    named = sum(len(region.name.encode(errors="surrogatepass")) + _NAME.size for region in regions)
    if named > MAX_NAMES_NBYTES or len(regions) > MAX_REGIONS:
        if len(regions) == 1:
            raise ConfigurationError(f"region {regions[0].name[:80]!r}… cannot be verified: its name has {named} bytes")
        half = len(chunk) // 2
        yield from requests(algorithm, side, lengths, chunk[:half])
        yield from requests(algorithm, side, lengths, chunk[half:])
        return
    ranges = np.zeros(len(chunk), RANGE)
    ranges["region"], ranges["nbytes"] = local, lengths[chunk]
    bases = np.array([region.address for region in regions], np.int64)
    ranges["offset"] = side.addresses[chunk] - bases[local]
    yield chunk, Request(algorithm, [(region.address, region.name) for region in regions], ranges)


def decode_request(payload: bytes) -> tuple[int, Request]:
    """Read a VERIFY frame's payload; return the request and its number.

    Raises:
        ProtocolError: it is malformed, or asks for more than one request may.
    """
    try:
        number, kind, count = _HEAD.unpack_from(payload)
        (algorithm,) = [name for name, value in _NUMBERS.items() if value == kind]
        if count > MAX_REGIONS:
            raise ValueError(f"it names {count} regions; {MAX_REGIONS} are allowed")
        at, regions = _HEAD.size, []
        for _ in range(count):
            address, nbytes = _NAME.unpack_from(payload, at)
            at += _NAME.size + nbytes
            if at > len(payload):
                raise ValueError("a name ends behind the frame")
            regions.append((address, payload[at - nbytes : at].decode(errors="surrogatepass")))
        ranges = np.frombuffer(payload, RANGE, offset=at)
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a VERIFY frame is malformed: {error}") from None
    if not 0 < len(ranges) <= MAX_PIECES or int(ranges["region"].max()) >= len(regions):
        raise ProtocolError(
            f"a VERIFY frame has {len(ranges)} ranges in {len(regions)} regions; 1 to {MAX_PIECES} are allowed"
        )
    lengths = ranges["nbytes"]
    if not 0 < int(lengths.min()) <= int(lengths.max()) <= PAGE_NBYTES or int(lengths.sum()) > MAX_REQUEST_NBYTES:
        raise ProtocolError(
            f"a VERIFY frame asks for {int(lengths.sum())} bytes in ranges of {int(lengths.min())} to {int(lengths.max())};"
            f" 1 to {PAGE_NBYTES} each and {MAX_REQUEST_NBYTES} together are allowed"
        )
    return number, Request(algorithm, regions, ranges)


def encode_sums(number: int, found: Sums) -> bytes:
    """Return the payload of a VERIFIED frame with sums."""
    return _ANSWER.pack(number, 0) + found.astype("<u8").tobytes()


def encode_refusal(number: int, why: str) -> bytes:
    """Return the payload of a VERIFIED frame that says why there are none."""
    return _ANSWER.pack(number, 1) + why.encode(errors="replace")[:MAX_REASON_NBYTES]


def decode_answer(payload: bytes) -> tuple[int, Sums | str]:
    """Read a VERIFIED frame's payload: the request's number, and the sums or why there are none.

    Raises:
        ProtocolError: it is malformed.
    """
    try:
        number, refused = _ANSWER.unpack_from(payload)
        if refused not in (0, 1):
            raise ValueError(f"its status is {refused}")
        if refused:
            return number, payload[_ANSWER.size :].decode(errors="replace")[:MAX_REASON_NBYTES]
        return number, np.frombuffer(payload, "<u8", offset=_ANSWER.size).astype(np.uint64)
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"a VERIFIED frame is malformed: {error}") from None
