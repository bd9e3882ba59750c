"""NIXL's metadata form: what we write we read, and nothing else gets through."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import Agent, ProtocolError
from nixl_async.errors import NixlError
from nixl_async.metadata import Metadata, Section, decode, decode_notification, encode, encode_notification
from nixl_async.peers import decode_announcement
from tests.agents import TOKEN

u64 = st.integers(0, 2**64 - 1)
names = st.text(min_size=1, max_size=20).filter(lambda text: text.encode("utf-8", "ignore").decode() == text)
entries = st.lists(st.tuples(u64, u64, u64, st.binary(max_size=40)), max_size=4)
sections = st.lists(st.builds(Section, names, st.integers(0, 4), entries), max_size=3)
metadatas = st.builds(Metadata, names, st.dictionaries(names, st.binary(max_size=60), max_size=3), sections)

EXAMPLE = Metadata("agent", {"UCX": b"address"}, [Section("UCX", 0, [(4096, 8192, 0, b"key"), (1 << 40, 1, 0, b"")])])


@given(metadatas)
def test_what_is_written_is_read(metadata: Metadata) -> None:
    assert decode(encode(metadata)) == metadata


def test_the_bytes_are_those_that_nixl_writes() -> None:
    def record(tag: bytes, body: bytes) -> bytes:
        return tag + len(body).to_bytes(8, "little") + body + b"|"

    expected = b"nixlSerDes|" + record(b"Agent", b"agent") + record(b"Conns", (1).to_bytes(8, "little"))
    expected += record(b"t", b"UCX") + record(b"c", b"address") + record(b"", b"MemSection")
    expected += (
        record(b"nixlSecElms", (1).to_bytes(8, "little")) + record(b"bknd", b"UCX") + record(b"nixlDList", b"nixlSDList")
    )
    expected += record(b"t", (0).to_bytes(4, "little")) + record(b"n", (2).to_bytes(8, "little"))
    for address, nbytes, device, key in EXAMPLE.sections[0].entries:
        expected += record(b"", b"".join(n.to_bytes(8, "little") for n in (address, nbytes, device)) + key)
    assert encode(EXAMPLE) == expected


def test_truncated_at_every_byte() -> None:
    blob = encode(EXAMPLE)
    for end in range(len(blob)):
        with pytest.raises(ProtocolError):
            decode(blob[:end])


@given(metadatas, st.data())
def test_flipped_bits(metadata: Metadata, data: st.DataObject) -> None:
    blob = bytearray(encode(metadata))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob) * 8 - 1))
        blob[at // 8] ^= 1 << at % 8
    with contextlib.suppress(ProtocolError):
        decode(bytes(blob))


@given(st.binary(max_size=200))
def test_garbage(blob: bytes) -> None:
    for start in (b"", b"nixlSerDes|"):
        with pytest.raises(ProtocolError):
            decode(start + blob)


async def test_an_agents_own_metadata_truncated_and_flipped() -> None:
    random = np.random.default_rng(1)
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await b.serve()
        blob = b.metadata()
        assert decode_announcement(blob).regions[0].name == "kv"
        for end in random.integers(0, len(blob), 100).tolist():
            with pytest.raises(ProtocolError):
                await a.add_peer(blob[:end])
        for _ in range(300):
            broken = bytearray(blob)
            at = int(random.integers(0, len(blob) * 8))
            broken[at // 8] ^= 1 << at % 8
            with contextlib.suppress(ProtocolError):
                decode_announcement(bytes(broken))
        peer = await a.add_peer(blob)
        assert peer.name == "b"
        assert set(peer.regions) == {"kv"}


async def test_partial_and_incremental_metadata() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        first = await b.register(np.zeros(4096, np.uint8), name="first")
        await b.register(np.zeros(4096, np.uint8), name="second")
        await b.serve()
        part = decode_announcement(b.metadata([first]))
        assert [region.name for region in part.regions] == ["first"]
        peer = await a.add_peer(b.metadata())
        assert set(peer.regions) == {"first", "second"}
        events = a.membership()
        await b.register(np.zeros(4096, np.uint8), name="third")
        async with asyncio.timeout(10):
            event = await anext(events)
        assert (event.kind, set(peer.regions)) == ("regions", {"first", "second", "third"})


async def test_metadata_of_an_agent_that_is_not_served() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        with pytest.raises(NixlError, match="serve"):
            await a.add_peer(b.metadata())


@given(names, st.binary(max_size=100))
def test_notifications(sender: str, payload: bytes) -> None:
    message = encode_notification(sender, payload)
    assert decode_notification(message) == (sender, payload)
    for end in range(len(message)):
        with pytest.raises(ProtocolError):
            decode_notification(message[:end])
