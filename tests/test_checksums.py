"""Pages, their sums, and the frames that ask for them."""

from __future__ import annotations

import contextlib
import struct
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.checksums import (
    ALGORITHMS,
    MAX_NAMES_NBYTES,
    MAX_PIECES,
    MAX_REGIONS,
    MAX_REQUEST_NBYTES,
    PAGE_NBYTES,
    RANGE,
    Request,
    available,
    cut_pages,
    decode_answer,
    decode_request,
    encode_refusal,
    encode_sums,
    load,
    requests,
    sums,
)
from nixl_async.descriptors import Region, make_plan
from nixl_async.errors import ConfigurationError, MissingDependency, ProtocolError
from nixl_async.memory import RemoteRegion
from nixl_async.testing import pattern


def region(name: str, nbytes: int, address: int = 4096, peer: str = "far") -> RemoteRegion:
    return RemoteRegion(peer, "1", name, address, nbytes)


def never() -> bool:
    return False


def test_both_algorithms_are_there() -> None:
    assert available() == list(ALGORITHMS)
    # The check value of CRC-32/ISCSI in the catalogue of parametrised CRC algorithms; XXH3 of nothing.
    assert load("crc32c")(b"123456789") == 0xE3069283
    assert load("xxh3")(b"") == 0x2D06800538D394C2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("page", [1, 777, 4096, 65536, 1 << 20])
def test_sums_are_those_of_the_bytes(algorithm: str, page: int) -> None:
    memory = pattern(3 << 20, 1)
    starts = np.random.default_rng(2).integers(0, len(memory) - page, 100)
    lengths = np.full(100, page, np.int64)
    lengths[70:] = np.random.default_rng(3).integers(1, page + 1, 30)
    found = sums(algorithm, starts + memory.ctypes.data, lengths, never)
    function = load(algorithm)
    assert found.tolist() == [function(memory[a : a + n].tobytes()) for a, n in zip(starts, lengths, strict=True)]


def test_summing_stops_when_it_is_told_to() -> None:
    memory = pattern(1 << 20, 1)
    asked = 0

    def third() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    addresses = np.arange(256) * 4096 + memory.ctypes.data
    found = sums("crc32c", addresses, np.full(256, 4096, np.int64), third)
    assert found[:190].all()
    assert not found[192:].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_thread_runs_while_short_pages_are_summed(algorithm: str) -> None:
    memory = pattern(4096, 1)
    n = 200_000
    addresses, lengths = np.full(n, memory.ctypes.data, np.int64), np.full(n, 4096, np.int64)
    thread = threading.Thread(target=sums, args=(algorithm, addresses, lengths, never))
    interval = sys.getswitchinterval()
    # Nobody is forced to let go of the interpreter: only who does so by himself lets others run.
    sys.setswitchinterval(60)
    try:
        thread.start()
        turns = 0
        while thread.is_alive():
            time.sleep(0)
            turns += 1
        assert turns > 20
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_what_is_not_there() -> None:
    for wrong in ("md5", True, 7, ["crc32c"]):
        with pytest.raises(ConfigurationError, match="'crc32c', 'xxh3'"):
            load(wrong)  # type: ignore[arg-type]


def test_a_library_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(MissingDependency, match=r"nixl-async\[verify\]"):
        load("xxh3")


# Pages.


def places_of(data: st.DataObject, total: int, name: str) -> Any:
    """Draw places of `total` bytes, and return them with the page each byte is in and how many pages there are."""
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=4), label=f"{name} cuts")) if total > 1 else []
    places, lengths = [], []
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, total], strict=True)):
        nbytes = stop - start
        inner = sorted(data.draw(st.sets(st.integers(1, nbytes - 1), max_size=4))) if nbytes > 1 else []
        sizes = np.diff([0, *inner, nbytes])
        one = region(f"{name}{number % 2}", 1 << 20, address=4096 + (number % 2 << 30))
        order = data.draw(st.permutations(range(len(sizes))))
        offsets = np.zeros(len(sizes), np.int64)
        offsets[order] = np.cumsum([0, *sizes[order][:-1]]) + data.draw(st.integers(0, 3))
        places.append(one.ranges(offsets, sizes))
        lengths += sizes.tolist()
    return places, lengths


@given(st.data(), st.integers(1, 60))
def test_each_piece_lies_in_its_page_on_both_sides(data: st.DataObject, total: int) -> None:
    (src, src_pages), (dst, dst_pages) = places_of(data, total, "s"), places_of(data, total, "d")
    plan = make_plan(src, dst)
    pieces = cut_pages(plan, (src, dst))
    wanted = dst_pages if len(dst_pages) > len(src_pages) else src_pages
    assert pieces.n_pages == len(wanted)
    page_of = np.repeat(np.arange(len(wanted)), wanted)
    for side, given_places in ((pieces.src, src), (pieces.dst, dst)):
        each = [r for d in given_places for a, n in zip(d.addresses, d.lengths, strict=True) for r in range(a, a + n)]
        mine = [r for a, n in zip(side.addresses, pieces.lengths, strict=True) for r in range(a, a + n)]
        assert mine == each
    assert np.repeat(pieces.pages, pieces.lengths).tolist() == page_of.tolist()
    for side in (pieces.src, pieces.dst):
        summed = np.concatenate(list(pieces.chunks(side)))
        assert sorted(summed.tolist()) == list(range(len(pieces.lengths)))


def test_one_range_has_a_page_for_each_mebibyte() -> None:
    a, b = region("a", 5 << 20), region("b", 5 << 20, 1 << 30)
    pieces = cut_pages(make_plan(a[100 : 100 + (5 << 19)], b[0 : 5 << 19]), (a[100 : 100 + (5 << 19)], b[0 : 5 << 19]))
    assert pieces.lengths.tolist() == [PAGE_NBYTES, PAGE_NBYTES, PAGE_NBYTES // 2]
    assert (pieces.pages.tolist(), pieces.n_pages) == ([0, 1, 2], 3)
    whole = cut_pages(make_plan(a, b), (a, b))
    assert whole.n_pages == 5
    assert cut_pages(make_plan(a, b), None).pages.tolist() == whole.pages.tolist()


def test_long_pages_stay_pages() -> None:
    a, b = region("a", 12 << 20), region("b", 12 << 20, 1 << 30)
    src, dst = a.pages([3, 0], 3 << 20), b.pages([0, 1, 2, 3, 4, 5], 1 << 20)
    # The finer side decides.
    assert cut_pages(make_plan(src, dst), (src, dst)).pages.tolist() == [0, 1, 2, 3, 4, 5]
    same = b.pages([0, 3], 3 << 20)
    assert cut_pages(make_plan(src, same), (src, same)).pages.tolist() == [0, 0, 0, 1, 1, 1]


# What travels.


def side_of(*regions: Region, pages: int, nbytes: int) -> Any:
    places = [one.pages(range(pages), nbytes) for one in regions]
    total = len(regions) * pages * nbytes
    source = region("source", total, 1 << 50)
    dst = source.pages(range(len(regions) * pages), nbytes)
    return cut_pages(make_plan(places, dst), (places, dst))


def test_long_lists_become_several_requests() -> None:
    regions = [region(f"r{n}", 4000 * 4096, (n + 1) << 32) for n in range(3)]
    pieces = side_of(*regions, pages=4000, nbytes=4096)
    seen = []
    for chunk in pieces.chunks(pieces.src):
        for part, request in requests("xxh3", pieces.src, pieces.lengths, chunk):
            number, read = decode_request(request.encode(7))
            assert (number, read.algorithm, list(read.regions)) == (7, "xxh3", list(request.regions))
            assert len(read.ranges) == len(part) <= MAX_PIECES
            assert int(read.ranges["nbytes"].sum()) <= MAX_REQUEST_NBYTES
            bases = np.array([address for address, _ in read.regions], np.int64)
            addresses = bases[read.ranges["region"]] + read.ranges["offset"].astype(np.int64)
            assert np.array_equal(addresses, pieces.src.addresses[part])
            seen += part.tolist()
    assert sorted(seen) == list(range(12_000))


def test_long_names_become_several_requests_and_too_long_ones_are_refused() -> None:
    regions = [region(f"{n}" + "é" * 30_000, 4096, (n + 1) << 32) for n in range(4)]
    pieces = side_of(*regions, pages=1, nbytes=4096)
    (chunk,) = pieces.chunks(pieces.src)
    parts = list(requests("crc32c", pieces.src, pieces.lengths, chunk))
    assert [len(request.regions) for _, request in parts] == [2, 2]
    assert all(len(request.encode(1)) <= MAX_NAMES_NBYTES + 4096 for _, request in parts)
    pieces = side_of(region("n" * 140_000, 4096), pages=1, nbytes=4096)
    with pytest.raises(ConfigurationError, match="its name has"):
        list(requests("crc32c", pieces.src, pieces.lengths, np.arange(1)))


def test_many_regions_become_several_requests() -> None:
    pieces = side_of(*(region(f"r{n}", 4096, (n + 1) << 32) for n in range(600)), pages=1, nbytes=4096)
    (chunk,) = pieces.chunks(pieces.src)
    parts = list(requests("crc32c", pieces.src, pieces.lengths, chunk))
    assert max(len(decode_request(request.encode(1))[1].regions) for _, request in parts) <= MAX_REGIONS
    assert sorted(np.concatenate([part for part, _ in parts]).tolist()) == list(range(600))


VALID = Request("crc32c", [(4096, "kv")], np.array([(0, 64, 0), (0, 64, 128)], RANGE))


def _with(**changes: Any) -> bytes:
    ranges = VALID.ranges.copy()
    for name, value in changes.items():
        ranges[name][1] = value
    return Request("crc32c", VALID.regions, ranges).encode(1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        VALID.encode(1)[:10],
        VALID.encode(1)[:-1],
        VALID.encode(1)[: -2 * RANGE.itemsize],
        struct.pack("<QBH", 1, 0, 0),
        struct.pack("<QBH", 1, 9, 0) + VALID.ranges.tobytes(),
        struct.pack("<QBH", 1, 1, MAX_REGIONS + 1) + struct.pack("<QI", 0, 0) * (MAX_REGIONS + 1) + VALID.ranges.tobytes(),
        struct.pack("<QBH", 1, 1, 65535) + VALID.encode(1)[11:],
        struct.pack("<QBH", 1, 1, 1) + struct.pack("<QI", 0, 60000) + b"x",
        struct.pack("<QBH", 1, 1, 1) + struct.pack("<QI", 0, 2) + b"\xff\xfe" + VALID.ranges.tobytes(),
        _with(region=1),
        _with(nbytes=0),
        _with(nbytes=PAGE_NBYTES + 1),
        Request("xxh3", VALID.regions, np.full(MAX_PIECES + 1, np.array((0, 1, 0), RANGE))).encode(1),
        Request("xxh3", VALID.regions, np.full(33, np.array((0, PAGE_NBYTES, 0), RANGE))).encode(1),
    ],
)
def test_questions_that_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(payload)


def test_answers() -> None:
    number, found = decode_answer(encode_sums(5, np.array([1, 1 << 63], np.uint64)))
    assert not isinstance(found, str)
    assert (number, found.tolist()) == (5, [1, 1 << 63])
    assert decode_answer(encode_refusal(6, "no\ud800 " + "x" * 5000)) == (6, ("no? " + "x" * 5000)[:1024])
    for wrong in (b"", b"x" * 8, struct.pack("<QB", 1, 2), encode_sums(1, np.zeros(2, np.uint64))[:-1]):
        with pytest.raises(ProtocolError):
            decode_answer(wrong)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_question_or_refused(data: bytes) -> None:
    for read in (decode_request, decode_answer):
        with contextlib.suppress(ProtocolError):
            read(data)
