"""Frames and handshake: whatever is written is read, in whatever pieces it comes; nobody gets in without the token."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import AuthenticationError, ProtocolError
from nixl_async.wire import (
    MAX_FRAME_NBYTES,
    MAX_GREETING_NBYTES,
    FrameReader,
    FrameType,
    Greeting,
    Handshake,
    Secrets,
    decode_json,
    encode_frame,
    encode_json,
)

SMALL = {FrameType.CREDIT: 8, FrameType.PING: 8, FrameType.PONG: 8, FrameType.PROOF: 32}
frames = st.lists(
    st.sampled_from(FrameType).flatmap(lambda kind: st.tuples(st.just(kind), st.binary(max_size=SMALL.get(kind, 200)))),
    max_size=8,
)


@given(frames, st.lists(st.integers(1, 50), max_size=30))
def test_frames_survive_any_cut(sent: list[tuple[FrameType, bytes]], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(kind, payload) for kind, payload in sent)
    reader, got = FrameReader(), []
    for length in cuts:
        got += list(reader.feed(stream[:length]))
        stream = stream[length:]
    got += list(reader.feed(stream))
    assert got == sent


def test_an_oversized_frame_is_refused_by_its_header_alone() -> None:
    header = struct.pack("<IB", MAX_GREETING_NBYTES + 1, FrameType.HELLO)
    with pytest.raises(ProtocolError, match=str(MAX_GREETING_NBYTES + 1)):
        list(FrameReader().feed(header))


@pytest.mark.parametrize(
    ("kind", "nbytes"),
    [*SMALL.items(), (FrameType.WITHDRAW, 64 << 10), (FrameType.VERIFY, 256 << 10), (FrameType.NOTIFY, 64 << 20)],
)
def test_each_kind_of_frame_has_its_limit_after_authentication_too(kind: FrameType, nbytes: int) -> None:
    reader = FrameReader(MAX_FRAME_NBYTES)
    assert list(reader.feed(struct.pack("<IB", nbytes, kind))) == []
    with pytest.raises(ProtocolError, match=f"{kind.name} frame announces {nbytes + 1} bytes; at most {nbytes}"):
        list(FrameReader(MAX_FRAME_NBYTES).feed(struct.pack("<IB", nbytes + 1, kind)))


def test_an_unknown_frame_is_refused() -> None:
    with pytest.raises(ProtocolError, match="77"):
        list(FrameReader().feed(struct.pack("<IB", 0, 77)))


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"5", b"{}", b'{"id": "x"}', b'{"id": true}', b"[" * 5000, b"\xff"])
def test_json_that_is_not_what_was_agreed(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_json(payload, id=int)


def _hello(**changes: object) -> bytes:
    value = json.loads(Greeting.create("a", "1").encode()[5:])
    return json.dumps(value | changes).encode()


@pytest.mark.parametrize(
    "payload",
    [
        _hello(protocol="nixl-async/0"),
        _hello(name=""),
        _hello(name="x" * 256),
        _hello(incarnation=""),
        _hello(nonce="zz"),
        _hello(nonce="00"),
        _hello(name=5),
        _hello(name="a\0b"),
        _hello(name="\ud800"),
        _hello(incarnation="\udfff"),
        _hello(incarnation="x" * 65),
    ],
)
def test_greetings_that_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Greeting.decode(payload)


def _sides(ours: bytes | Secrets | None, theirs: bytes | Secrets | None) -> tuple[Handshake, Handshake]:
    a = Handshake(Greeting.create("a", "1"), ours, connecting=True)
    b = Handshake(Greeting.create("b", "2"), theirs, connecting=False)
    a.greeted(b.own.encode()[5:])
    b.greeted(a.own.encode()[5:])
    return a, b


@pytest.mark.parametrize("token", [b"secret", None])
def test_sides_with_one_token_accept_each_other(token: bytes | None) -> None:
    a, b = _sides(token, token)
    b.verify(a.proof())
    a.verify(b.proof())
    assert (a.other, b.other) == (b.own, a.own)


@pytest.mark.parametrize(("ours", "theirs"), [(b"x", b"y"), (b"x", None), (None, b"y")])
def test_sides_with_different_tokens_do_not(ours: bytes | None, theirs: bytes | None) -> None:
    a, b = _sides(ours, theirs)
    with pytest.raises(AuthenticationError, match="'a'"):
        b.verify(a.proof())
    with pytest.raises(AuthenticationError, match="'b'"):
        a.verify(b.proof())


def test_each_name_has_its_secret() -> None:
    of_a, of_b = {"b": (b"ab",)}, {"a": (b"ab",), "c": (b"bc",)}
    a, b = _sides(lambda name: of_a.get(name, ()), lambda name: of_b.get(name, ()))
    b.verify(a.proof())
    a.verify(b.proof())
    # One who knows a's secret only is not c, and nothing tells it whether c exists.
    texts = []
    for claimed in ("c", "nobody"):
        thief = Handshake(Greeting.create(claimed, "1"), b"ab", connecting=True)
        b = Handshake(Greeting.create("b", "2"), lambda name: of_b.get(name, ()), connecting=False)
        thief.greeted(b.own.encode()[5:])
        b.greeted(thief.own.encode()[5:])
        with pytest.raises(AuthenticationError) as error:
            b.verify(thief.proof())
        texts.append(str(error.value).replace(claimed, "…"))
    assert texts[0] == texts[1]
    with pytest.raises(AuthenticationError, match="no token for 'nobody' here"):
        b.proof()


@pytest.mark.parametrize(
    ("ours", "theirs", "meet"),
    [
        ((b"old",), (b"old", b"new"), True),
        ((b"old", b"new"), (b"new", b"old"), True),
        ((b"new",), (b"new", b"old"), True),
        ((b"new", b"old"), (b"old",), False),
        ((b"old",), (b"new",), False),
    ],
)
def test_a_token_is_changed_in_three_steps(ours: tuple[bytes, ...], theirs: tuple[bytes, ...], meet: bool) -> None:
    a, b = _sides(lambda _: ours, lambda _: theirs)
    if meet:
        b.verify(a.proof())
        a.verify(b.proof())
    else:
        with pytest.raises(AuthenticationError):
            b.verify(a.proof())


def test_a_handshake_shows_no_secret() -> None:
    a, _ = _sides(b"hush", b"hush")
    assert repr(a) == "<Handshake of 'a' with 'b'>"


def test_a_proof_cannot_be_reflected_or_replayed() -> None:
    a, b = _sides(b"t", b"t")
    with pytest.raises(AuthenticationError):
        a.verify(a.proof())
    later, _ = _sides(b"t", b"t")
    with pytest.raises(AuthenticationError):
        later.verify(b.proof())
    with pytest.raises(ProtocolError, match="our own greeting"):
        a.greeted(a.own.encode()[5:])


def test_json_frames_carry_what_they_were_given() -> None:
    ((kind, payload),) = FrameReader().feed(encode_json(FrameType.WITHDRAW, {"id": 7, "name": "kv"}))
    assert (kind, decode_json(payload, id=int, name=str)) == (FrameType.WITHDRAW, {"id": 7, "name": "kv"})
