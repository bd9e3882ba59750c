"""Garbage, more than ten million bytes of it, through everything that reads what others send: no crash, no growth, no harm."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import logging
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async import Agent, AuthenticationError, ProtocolError
from nixl_async.checksums import RANGE, Request, decode_answer, decode_request, encode_refusal, encode_sums
from nixl_async.layers.exchanges import PREFIX
from nixl_async.metadata import Metadata, Section, decode, decode_notification, encode, encode_notification
from nixl_async.peers import decode_announcement, describe_regions, encode_announcement, read_regions
from nixl_async.wire import (
    MAX_FRAME_NBYTES,
    FrameReader,
    FrameType,
    Greeting,
    Handshake,
    decode_json,
    encode_frame,
    encode_json,
)
from tests.agents import TOKEN, connect, two_agents
from tests.strangers import stranger

REFUSED = (ProtocolError, AuthenticationError)
NASTY: list[Any] = [
    None, True, -1, 0, 1 << 31, 1 << 63, -(1 << 70), 10**300, 1e308, float("nan"), float("inf"),
    "", "\x00", "\ud800", "x" * 300, [], {}, [[]], {"": None}, [0] * 50, "zz", "00" * 40, {"a": [{}]},
]  # fmt: skip
EXTREMES = [struct.pack("<Q", n) for n in (0, 1, 255, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)]


def mutate(rng: random.Random, valid: bytes) -> bytes:
    """Return something like `valid`, damaged in some ways, or nothing like it."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(400))
    data = bytearray(valid)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 3:
                data[at : at + 8] = rng.choice(EXTREMES)
            case 4:
                data[at:at] = data[: rng.randrange(200)]
            case _:
                del data[at : at + rng.randrange(1, 30)]
    return bytes(data)


def mutate_json(rng: random.Random, valid: Any) -> bytes:
    """Return `valid` as JSON with some values replaced by what does not belong there, or damaged as text."""
    if rng.random() < 0.2:
        return mutate(rng, json.dumps(valid).encode())
    value = json.loads(json.dumps(valid))
    for _ in range(rng.randrange(1, 4)):
        node, keys = value, []
        while isinstance(node, dict | list) and node:
            key: Any = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            keys.append((node, key))
            node = node[key]
            if rng.random() < 0.3:
                break
        if not keys:
            break
        parent, key = keys[-1]
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
    return json.dumps(value).encode()


# Valid examples to start from.


def _regions() -> list[dict[str, Any]]:
    keys = {"tcp": "00" * 8, "ucx": "ab" * 40}
    kinds = {"kind": "DRAM", "device": 0, "readonly": False}
    return [{"name": f"kv{n}", "address": 4096 * (n + 1), "nbytes": 4096, **kinds, "keys": keys} for n in range(3)]


REGIONS = _regions()
STOCK = encode(Metadata("stock", {"UCX": b"\x01" * 40}, [Section("UCX", 0, [(4096, 64, 0, b"key"), (8192, 64, 0, b"k")])]))
OURS = encode_announcement("far", "1", ("127.0.0.1", 7000), [], [])
RECORD = {
    "version": 1, "incarnation": "1", "control": ["h", 7], "backends": {"tcp": "00"}, "regions": REGIONS, "checksums": ["xxh3"],
}  # fmt: skip
LAYERS = [
    {"t": "open", "x": 1, "m": True, "k": "push", "r": "request 7", "n": 4, "have": [1], "window": True},
    {"t": "open", "x": 2, "m": True, "k": "pull", "r": "request 8", "n": 4, "have": []},
    {"t": "take", "x": 1, "m": False, "have": [0], "confirmed": [0]},
    {"t": "layers", "x": 1, "m": True, "l": [0, 1, 2]},
    {"t": "confirm", "x": 1, "m": False, "l": [0, 1]},
    {"t": "done", "x": 2, "m": True},
    {"t": "end", "x": 1, "m": True, "why": "no more"},
    {"t": "quiet", "x": 1, "m": False},
    {"t": "refuse", "x": 1, "m": False, "why": "full"},
]
MESSAGES: list[tuple[FrameType, Any]] = [
    (FrameType.REGIONS, {"added": REGIONS}),
    (FrameType.WITHDRAW, {"id": 1, "name": "kv0"}),
    (FrameType.WITHDRAWN, {"id": 1}),
    (FrameType.LEFT, {"id": 1}),
    (FrameType.LEASE, {"id": 1, "seconds": 1.0, "region": REGIONS[0]}),
    (FrameType.LEASED, {"id": 1}),
    (FrameType.RENEW, {"number": 1, "through": 7}),
    (FrameType.RENEWED, {"number": 1}),
    (FrameType.REVOKE, {"ids": [1, 2]}),
    (FrameType.QUIET, {"ids": [1, 2]}),
]
QUESTION = Request("crc32c", [(4096, "kv"), (8192, "kv2")], np.array([(0, 64, 0), (1, 4096, 128), (0, 1, 4095)], RANGE))
ANSWERS = [encode_sums(1, np.arange(3, dtype=np.uint64)), encode_refusal(2, "it has no region 'kv'")]


def _announce(rng: random.Random) -> bytes:
    record = mutate_json(rng, RECORD)
    return encode(Metadata("far", {"NIXL_ASYNC": record, "UCX": b"x"}, []))


def _shake(rng: random.Random, payload: bytes) -> None:
    handshake = Handshake(Greeting.create("us", "1"), b"token", connecting=rng.random() < 0.5)
    handshake.greeted(payload)
    handshake.verify(rng.randbytes(32))


def _read_frames(rng: random.Random, data: bytes) -> None:
    reader = FrameReader(rng.choice([4096, MAX_FRAME_NBYTES]))
    at = 0
    while at < len(data):
        step = rng.randrange(1, 200)
        for _ in reader.feed(data[at : at + step]):
            pass
        at += step
    assert len(reader._buffer) <= len(data)


def _decode_regions(rng: random.Random, payload: bytes) -> None:
    read_regions("far", "1", decode_json(payload, added=list)["added"])


READERS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[random.Random, bytes], object]]] = {
    "greeting": (
        lambda rng: mutate_json(rng, json.loads(Greeting.create("far", "1").encode()[5:])),
        _shake,
    ),
    "frames": (
        lambda rng: mutate(rng, b"".join(encode_frame(rng.choice(list(FrameType)), rng.randbytes(8)) for _ in range(9))),
        _read_frames,
    ),
    "regions": (lambda rng: mutate_json(rng, {"added": REGIONS}), _decode_regions),
    "announcement": (_announce, lambda _, data: decode_announcement(data)),
    "stock metadata": (lambda rng: mutate(rng, STOCK), lambda _, data: decode_announcement(data)),
    "our metadata": (lambda rng: mutate(rng, OURS), lambda _, data: decode(data)),
    "stock notification": (
        lambda rng: mutate(rng, encode_notification("far", b"layer 0")),
        lambda _, data: decode_notification(data),
    ),
    "questions for checksums": (lambda rng: mutate(rng, QUESTION.encode(7)), lambda _, data: decode_request(data)),
    "checksums": (lambda rng: mutate(rng, rng.choice(ANSWERS)), lambda _, data: decode_answer(data)),
}
READERS_NBYTES = 5_000_000


@pytest.mark.slow
def test_five_million_bytes_through_every_reader() -> None:
    rng, sent, refused = random.Random(20261129), 0, 0
    each = READERS_NBYTES // len(READERS)

    def feed(nbytes: int) -> None:
        nonlocal sent, refused
        for make, read in READERS.values():
            until = sent + nbytes
            while sent < until:
                data = make(rng)
                sent += len(data) + 1
                try:
                    read(rng, data)
                except REFUSED as error:
                    refused += len(str(error)) < 2000

    feed(20_000)
    gc.collect()
    tracemalloc.start()
    try:
        feed(each // 4)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    feed(each - 20_000 - each // 2)
    tracemalloc.start()
    try:
        feed(each // 4)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < before + (1 << 20)
    finally:
        tracemalloc.stop()
    assert sent >= READERS_NBYTES
    assert refused > 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.sampled_from(["name", "address", "nbytes", "kind", "device", "readonly", "keys", "more"]), json_values)
def test_regions_with_any_value_anywhere(field: str, value: Any) -> None:
    with contextlib.suppress(ProtocolError):
        (region,) = read_regions("far", "1", json.loads(json.dumps([REGIONS[0] | {field: value}])))
        assert 0 < region.address < region.address + region.nbytes < 1 << 63
        assert region[:1].nbytes == 1
        assert repr(region)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["protocol", "name", "incarnation", "nonce"]), json_values, max_size=2))
def test_greetings_with_any_value_anywhere(changes: dict[str, Any]) -> None:
    value = json.loads(Greeting.create("far", "1").encode()[5:]) | changes
    with contextlib.suppress(ProtocolError):
        read = Greeting.decode(json.dumps(value).encode())
        assert read.name.encode()
        assert len(read.nonce) == 32


@settings(max_examples=300)
@given(st.binary(max_size=500))
def test_any_bytes_are_metadata_or_refused(data: bytes) -> None:
    for read in (
        decode,
        decode_announcement,
        decode_notification,
        Greeting.decode,
        decode_json,
        decode_request,
        decode_answer,
    ):
        for start in (b"", b"nixlSerDes|"):
            with contextlib.suppress(ProtocolError):
                read(start + data)


# Through a real agent.

STRANGERS_NBYTES, PEERS_NBYTES = 2_500_000, 3_000_000


@pytest.mark.slow
@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_millions_of_bytes_into_an_agent_that_serves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    rng, sent = random.Random(5), 0
    async with two_agents(backends=["memory"]) as (a, b, _):
        here = np.zeros(4096, np.uint8)
        await b.register(here, name="kv")
        assert b.address is not None
        stop = asyncio.Event()
        served = asyncio.create_task(_serve_honestly(a, b, stop))
        gc.collect()
        tracemalloc.start()
        try:
            sizes = []
            for goal in (STRANGERS_NBYTES // 5, STRANGERS_NBYTES):
                sent = await _as_strangers(b.address, rng, sent, goal)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            assert sizes[1] < sizes[0] + (2 << 20), sizes
        finally:
            tracemalloc.stop()
        as_peers = await _as_peers(b, rng, PEERS_NBYTES)
        stop.set()
        assert await served > 5
        assert sent + as_peers >= STRANGERS_NBYTES + PEERS_NBYTES
        async with asyncio.timeout(10):
            while set(b.peers) != {"a"}:
                await asyncio.sleep(0.01)
        assert not here.any()
        assert b.statistics().regions == 1
    assert "could not be handled" not in caplog.text
    assert "task failed" not in caplog.text


async def _serve_honestly(a: Agent, b: Agent, stop: asyncio.Event) -> int:
    """Exchange notifications until told to stop; return how many there were."""
    count = 0
    received = b.notifications(peer="a", prefix=b"honest")
    while not stop.is_set():
        await a.notify("b", b"honest %d" % count)
        async with asyncio.timeout(5):
            assert (await anext(received)).payload == b"honest %d" % count
        count += 1
        await asyncio.sleep(0.02)
    return count


async def _as_strangers(address: tuple[str, int], rng: random.Random, sent: int, goal: int) -> int:
    async def one(data: bytes) -> None:
        async with stranger(address) as this:
            with contextlib.suppress(OSError):
                this.writer.write(data)
                this.writer.write_eof()
            await this.ended()

    while sent < goal:
        batch = []
        for _ in range(20):
            data = mutate(
                rng, b"".join((Greeting.create("x", "1").encode(), encode_frame(FrameType.PROOF, rng.randbytes(32))))
            )
            data += rng.randbytes(rng.choice([0, 100, 60_000]))
            batch.append(data)
            sent += len(data)
        await asyncio.gather(*map(one, batch))
    return sent


async def _as_peers(agent: Agent, rng: random.Random, goal: int) -> int:
    """Join under some name, with the token, and send garbage until thrown out; again and again."""
    sent = number = 0
    assert agent.address is not None
    while sent < goal:
        number += 1
        async with stranger(agent.address) as one:
            await one.authenticate(f"mallory-{number % 50}", TOKEN.encode(), str(number))
            metadata = encode_announcement(f"mallory-{number % 50}", str(number), None, [], [])
            if rng.random() < 0.3:
                metadata = rng.choice([_announce(rng), mutate(rng, metadata)])
            data = [encode_frame(FrameType.METADATA, metadata)]
            while rng.random() < 0.995:
                data.append(_frame(rng))
            blob = b"".join(data)
            sent += len(blob)
            with contextlib.suppress(OSError):
                one.writer.write(blob)
                one.writer.write_eof()
            await one.ended()
    return sent


def _frame(rng: random.Random) -> bytes:
    if rng.random() < 0.8:
        # Of these none ends the connection, whatever they hold.
        return encode_frame(FrameType.NOTIFY, PREFIX + mutate_json(rng, rng.choice(LAYERS)))
    if rng.random() < 0.1:
        kind = rng.choice([FrameType.VERIFY, FrameType.VERIFIED])
        return encode_frame(kind, mutate(rng, QUESTION.encode(7) if kind is FrameType.VERIFY else rng.choice(ANSWERS)))
    kind, value = rng.choice(MESSAGES)
    if rng.random() < 0.9:
        return encode_json(kind, value)
    return encode_frame(rng.choice([kind, FrameType.CREDIT, FrameType.NOTIFY]), mutate_json(rng, value)[:8])


async def test_garbage_about_layers_into_both_ends_of_an_exchange(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    rng = random.Random(6)
    async with two_agents(backends=["memory"]) as (a, b, _):
        for number in range(20):
            async with Agent(f"m{number}", token=TOKEN, backends=["memory"]) as m:
                await connect(m, b)
                async with b.incoming(f"request {number}") as incoming:
                    reading = asyncio.ensure_future(anext(aiter(incoming.layers())))
                    first = LAYERS[0] | {"r": f"request {number}"}
                    await m.notify("b", PREFIX + json.dumps(first).encode())
                    for _ in range(100):
                        message = rng.choice(LAYERS[2:])
                        await m.notify("b", PREFIX + mutate_json(rng, message | {"m": rng.random() < 0.5}))
                    await m.notify("b", b"through")
                    async with asyncio.timeout(10):
                        await anext(b.notifications(prefix=b"through"))
                    reading.cancel()
                    await asyncio.wait([reading])
        await a.notify("b", b"still here")
        async with asyncio.timeout(10):
            assert (await anext(b.notifications(prefix=b"still"))).peer == "a"
    assert "could not be handled" not in caplog.text


def test_what_is_written_is_read_again() -> None:
    """The examples that the garbage is made of are valid themselves."""
    assert len(read_regions("far", "1", REGIONS)) == 3
    assert decode_announcement(STOCK).stock
    assert decode_announcement(OURS).name == "far"
    assert describe_regions([]) == []
    assert len(decode_request(QUESTION.encode(7))[1].ranges) == 3
    assert [number for number, _ in map(decode_answer, ANSWERS)] == [1, 2]
