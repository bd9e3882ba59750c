"""Peers as values, and the form in which agents describe themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nixl_async import Agent, DescriptorError, MemoryKind, NotFoundError, Peer, ProtocolError, RemoteRegion
from nixl_async.metadata import Metadata, Section, decode, encode
from nixl_async.peers import (
    LARGE_NBYTES,
    PIECE_NBYTES,
    PIECE_REGIONS,
    RECORD,
    decode_announcement,
    pieces,
    read_announcement,
    read_regions,
)
from tests.agents import TOKEN


def _peer() -> Peer:
    regions = {
        name: RemoteRegion("b", "1", name, address, 4096, kind=MemoryKind.DRAM)
        for name, address in (("x", 8192), ("y", 16384))
    }
    return Peer("b", "1", regions)


def test_a_region_is_found_by_name_or_the_error_lists_them() -> None:
    assert _peer().region("x").address == 8192
    with pytest.raises(NotFoundError, match=r"'z'.*x, y"):
        _peer().region("z")


def test_a_raw_address_is_found_in_its_region() -> None:
    found = _peer().at(16384 + 100, 50)
    assert (found.region.name, found.offsets.tolist(), found.nbytes) == ("y", [100], 50)
    for address, nbytes in ((16384 + 4000, 100), (0, 1), (12288, 1)):
        with pytest.raises(DescriptorError, match=hex(address)):
            _peer().at(address, nbytes)


def test_a_raw_address_is_found_while_regions_come_and_go_and_overlap() -> None:
    peer = _peer()
    assert peer.at(8192, 1).region.name == "x"
    # It begins earlier and holds both; one more begins where another does.
    peer.add(RemoteRegion("b", "1", "all", 4096, 1 << 20))
    peer.add(RemoteRegion("b", "1", "x2", 8192, 8192))
    assert peer.at(8192 + 5000, 100).region.name == "x2"
    assert peer.at(16384 + 4000, 200).region.name == "all"
    assert peer.take("x2") is not None
    assert peer.take("x2") is None
    assert peer.at(8192 + 5000, 100).region.name == "all"
    peer.add(RemoteRegion("b", "1", "all", 1 << 20, 8))
    with pytest.raises(DescriptorError):
        peer.at(8192 + 5000, 100)
    assert peer.at(1 << 20, 8).region.nbytes == 8


async def test_an_agent_is_described_and_read_back() -> None:
    async with Agent("b", token=TOKEN, backends=["memory", "tcp"]) as b:
        await b.register(np.zeros(100, np.uint8), name="kv")
        await b.register(b"constant", name="weights")
        host, port = await b.serve()
        read = decode_announcement(b.metadata())
        assert (read.name, read.incarnation, read.control, read.stock) == ("b", b.incarnation, (host, port), False)
        assert set(read.descriptions) == {"memory", "tcp"}
        assert [(r.name, r.nbytes, r.readonly) for r in read.regions] == [("kv", 100, False), ("weights", 8, True)]


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": 5},
        {"control": ["host"]},
        {"control": 7},
        {"backends": []},
        {"backends": {"tcp": "zz"}},
        {"regions": 5},
        {"regions": [{}]},
        {"regions": [5]},
        {"revision": -1},
        {"revision": "1"},
        {"revision": True},
    ],
)
async def test_records_that_are_not_what_was_agreed(change: dict[str, object]) -> None:
    async with Agent("b", token=TOKEN, backends=["tcp"]) as b:
        await b.serve()
        metadata = decode(b.metadata())
    record = json.loads(metadata.connections[RECORD]) | change
    broken = Metadata(metadata.agent, metadata.connections | {RECORD: json.dumps(record).encode()}, metadata.sections)
    with pytest.raises(ProtocolError):
        decode_announcement(encode(broken))


REGION = {
    "name": "kv",
    "address": 4096,
    "nbytes": 8,
    "kind": "DRAM",
    "device": 0,
    "readonly": False,
    "keys": {"tcp": "00"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": 5},
        {"address": -1},
        {"address": 1 << 63},
        {"nbytes": 0},
        {"nbytes": "8"},
        {"kind": "DISK"},
        {"device": None},
        {"readonly": 0},
        {"keys": {"tcp": 0}},
        {"keys": []},
    ],
)
def test_regions_that_are_not_what_was_agreed(change: dict[str, object]) -> None:
    (region,) = read_regions("b", "1", [REGION])
    assert (region.name, region.keys) == ("kv", {"tcp": b"\x00"})
    with pytest.raises(ProtocolError):
        read_regions("b", "1", [REGION | change])


def test_lists_of_regions_are_cut_into_pieces_that_are_short() -> None:
    assert list(pieces([])) == [b"[]"]
    for records in ([b"%d" % n for n in range(1000)], [b'"%b"' % (b"x" * 6000)] * 10, [b'"%b"' % (b"x" * 100_000)] * 3):
        cut = list(pieces(records))
        assert [item for piece in cut for item in json.loads(piece)] == [json.loads(record) for record in records]
        assert all(len(json.loads(piece)) <= PIECE_REGIONS for piece in cut)
        assert all(len(piece) <= max(PIECE_NBYTES + 100, len(records[0]) + 2) for piece in cut)


async def test_metadata_of_many_regions_is_read_as_it_was_written() -> None:
    memory = np.zeros((1000, 8), np.uint8)
    async with Agent("b", token=TOKEN, backends=["memory", "tcp"]) as b:
        for number in range(1000):
            await b.register(memory[number], name=f"block {number}\n")
        await b.serve()
        blob = b.metadata()
        assert len(blob) > LARGE_NBYTES
        read = await read_announcement(blob)
        assert read.regions[999].name == "block 999\n"
        assert [region.address for region in read.regions] == [row.ctypes.data for row in memory]
        assert (read.revision, read.more) == (1000, False)
        broken = blob.replace(b'"nbytes":8,', b'"nbytes":0,')
        with pytest.raises(ProtocolError):
            await read_announcement(broken)


def test_a_stock_agent_is_known_by_its_worker_address() -> None:
    sections = [Section("UCX", 0, [(4096, 8192, 0, b"key")]), Section("GDS", 2, [(0, 10, 3, b"")])]
    read = decode_announcement(encode(Metadata("nixl", {"UCX": b"address", "GDS": b""}, sections)))
    assert (read.name, read.stock, read.control, read.descriptions) == ("nixl", True, None, {"ucx": b"address"})
    assert read.incarnation == b"address".hex()
    (region,) = read.regions
    assert (region.address, region.nbytes, region.keys) == (4096, 8192, {"ucx": b"key"})


def test_an_agent_without_a_backend_we_share_is_refused() -> None:
    with pytest.raises(ProtocolError, match="GDS"):
        decode_announcement(encode(Metadata("nixl", {"GDS": b""}, [])))
