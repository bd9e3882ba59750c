"""Who gets in and as whom, and what those who do not get in can do: real agents, real sockets, real attacks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import (
    TLS,
    Agent,
    AuthenticationError,
    ConfigurationError,
    ConnectionLimits,
    NixlError,
    PeerLost,
    ProtocolError,
)
from nixl_async.peers import encode_announcement
from nixl_async.security import Credentials, certificate_names
from nixl_async.testing import assert_same, pattern
from nixl_async.wire import FrameType, Greeting, encode_frame
from tests.agents import TOKEN, agent_process, connect, two_agents
from tests.loops import every_loop
from tests.sockets import listening
from tests.strangers import stranger

pytest.importorskip("cryptography")
from tests.certificates import Authority

REFUSALS = (AuthenticationError, PeerLost)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def _still_fine(a: Agent, b: Agent) -> None:
    note = f"still here {np.random.default_rng().integers(1 << 60)}".encode()
    await a.notify(b.name, note)
    async with asyncio.timeout(10):
        assert (await anext(b.notifications(prefix=note))).peer == a.name


# Tokens.


@pytest.mark.parametrize("token", ["", b"", [], ["a", ""], {"b": ""}, {5: "x"}, 5, [5], {"b": None}])
def test_tokens_that_are_none(token: Any) -> None:
    with pytest.raises(ConfigurationError, match="token"):
        Agent("a", token=token)


def test_several_modes_of_tokens() -> None:
    assert Credentials("t").secrets("x") == (b"t",)
    assert Credentials([b"new", "old"]).secrets("x") == (b"new", b"old")
    by_name = Credentials({"a": "x", "b": ["y", "z"]})
    assert (by_name.secrets("a"), by_name.secrets("b"), by_name.secrets("c")) == ((b"x",), (b"y", b"z"), ())
    called = Credentials({"a": "x"}.get)
    assert (called.secrets("a"), called.secrets("b")) == ((b"x",), ())
    assert not Credentials(None).authenticates
    for one, expected in ((Credentials("t"), False), (by_name, True), (called, True)):
        assert one.binds_names(connecting=True) is one.binds_names(connecting=False) is expected


async def test_each_peer_with_a_secret_of_its_own_has_one_name() -> None:
    secrets = {"a": "of a", "b": "of b"}
    async with Agent("hub", token=secrets) as hub:
        address = await hub.serve()
        async with Agent("a", token="of a") as a, Agent("b", token={"hub": "of b"}) as b:
            await a.connect(address)
            await b.connect(address)
            await hub.wait_peer("b")
            assert set(hub.peers) == {"a", "b"}
            for name in ("b", "c"):
                async with Agent(name, token="of a") as thief:
                    with pytest.raises(REFUSALS):
                        await thief.connect(address)
            await _still_fine(b, hub)


async def test_a_secret_lets_its_own_name_return_at_once() -> None:
    async with Agent("hub", token={"a": "of a"}) as hub:
        address = await hub.serve()
        events = hub.membership()
        async with Agent("a", token="of a") as first, Agent("a", token="of a") as second:
            await first.connect(address)
            await second.connect(address)
            async with asyncio.timeout(10):
                assert [(await anext(events)).kind for _ in range(3)] == ["joined", "lost", "joined"]
            assert hub.peers["a"].incarnation == second.incarnation


async def test_a_shared_token_takes_no_name_that_is_alive() -> None:
    async with two_agents() as (a, b, _):
        async with Agent("a", token=TOKEN) as thief:
            with pytest.raises(REFUSALS, match="belongs to an agent that is connected"):
                await thief.connect(b.address)  # type: ignore[arg-type]
        assert b.peers["a"].incarnation == a.incarnation
        await _still_fine(a, b)


async def test_a_shared_token_takes_the_name_of_one_that_says_nothing() -> None:
    backends = ["memory", "samehost", "tcp"]
    async with agent_process("far", backends=backends) as far, Agent("hub", token=TOKEN, backends=backends) as hub:
        await far.order("connect", **dict(zip(("host", "port"), await hub.serve(), strict=True)))
        await hub.wait_peer("far")
        far.stop()
        # Its successor need not wait until it is given up: restarted elsewhere while it hangs.
        async with Agent("far", token=TOKEN, backends=backends) as successor:
            assert hub.address is not None
            async with asyncio.timeout(10):
                await successor.connect(hub.address)
                await _still_fine(successor, hub)
            assert hub.peers["far"].incarnation == successor.incarnation


async def test_a_token_is_changed_while_agents_run() -> None:
    async with Agent("old", token="old") as old, Agent("both", token=["old", "new"]) as both, Agent("new", token="new") as new:
        at = await both.serve()
        await old.connect(at)
        await new.connect(at)
        assert set(both.peers) <= {"old", "new"}
        async with Agent("third", token=["new", "old"]) as third:
            await third.connect(at)


# TLS.


@every_loop
async def test_mutual_tls_needs_no_token_and_moves_bytes(authority: Authority) -> None:
    async with Agent("a", tls=authority.tls("a")) as a, Agent("b", tls=authority.tls("b")) as b:
        peer = await connect(a, b)
        theirs = np.zeros(1 << 20, np.uint8)
        region = await b.register(theirs, name="kv")
        here = await a.register(pattern(1 << 20, 3))
        events = a.membership()
        while "kv" not in peer.regions:
            await anext(events)
        await a.transfer(here, peer.region("kv"))
        assert_same(theirs, pattern(1 << 20, 3))
        await _still_fine(a, b)
        await _still_fine(b, a)
        await region.aclose()
        assert peer.link is not None
        assert peer.link._transport.get_extra_info("ssl_object").version() == "TLSv1.3"


async def test_nothing_readable_travels_under_tls(authority: Authority) -> None:
    async with Agent("a", tls=authority.tls("a")) as a, Agent("b", tls=authority.tls("b")) as b:
        address, passed = await b.serve(), bytearray()

        async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            up_reader, up_writer = await asyncio.open_connection(*address)

            async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    while piece := await source.read(1 << 16):
                        passed.extend(piece)
                        sink.write(piece)
                sink.close()

            await asyncio.gather(pass_on(reader, up_writer), pass_on(up_reader, writer))

        async with listening(listen_in) as port:
            peer = await a.connect(("127.0.0.1", port))
            await a.notify(peer, b"a plain word")
            assert (await anext(b.notifications())).payload == b"a plain word"
            await a.disconnect(peer)
        assert len(passed) > 2000
        for word in (b"a plain word", b"nixlSerDes", a.incarnation.encode(), b"NIXL_ASYNC"):
            assert word not in passed


@pytest.mark.parametrize("names", [{"dns": ("a", "a.kv.svc")}, {"uris": ("nixl-async:a",)}, {}])
async def test_the_name_may_be_in_any_of_three_places(authority: Authority, names: dict[str, Any]) -> None:
    async with Agent("a", tls=authority.tls("a", **names)) as a, Agent("b", tls=authority.tls("b")) as b:
        await connect(a, b)
        await connect(b, a) if a.address else None
        assert set(b.peers) == {"a"}


@pytest.mark.parametrize("names", [{"dns": ("c", "*.kv", "A")}, {"uris": ("nixl-async:aa", "spiffe://x/a")}])
@pytest.mark.parametrize("dials", ["liar", "honest"])
async def test_no_certificate_is_good_for_another_name(authority: Authority, names: dict[str, Any], dials: str) -> None:
    # Where there are alternative names the common name ("a") counts for nothing.
    async with Agent("a", tls=authority.tls("a", **names)) as liar, Agent("b", tls=authority.tls("b")) as honest:
        one, other = (liar, honest) if dials == "liar" else (honest, liar)
        with pytest.raises(REFUSALS, match="does not give it that name"):
            await one.connect(await other.serve())
        assert not one.peers
        assert not other.peers


async def test_a_certificate_of_another_authority_is_worth_nothing(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "another")
    async with Agent("a", tls=other.tls("a")) as a, Agent("b", tls=authority.tls("b")) as b:
        with pytest.raises(AuthenticationError, match="certificate"):
            await a.connect(await b.serve())
        with pytest.raises(AuthenticationError, match="certificate"):
            await b.connect(await a.serve())
        # One that believes the server's authority, and shows what that does not believe.
        believer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        believer.check_hostname = False
        believer.load_verify_locations(authority.ca)
        believer.load_cert_chain(*other.issue("c"))
        async with Agent("c", tls=TLS(client=believer)) as c:
            with pytest.raises(REFUSALS):
                await c.connect(b.address)  # type: ignore[arg-type]
        async with Agent("d", tls=TLS(ca=authority.ca), token="t") as d:
            with pytest.raises(REFUSALS):
                await d.connect(b.address)  # type: ignore[arg-type]
        assert not a.peers
        assert not b.peers


async def test_one_side_speaks_tls_and_the_other_does_not(authority: Authority) -> None:
    async with Agent("a", token=TOKEN) as plain, Agent("b", tls=authority.tls("b"), token=TOKEN) as secure:
        with pytest.raises(NixlError):
            await plain.connect(await secure.serve())
        with pytest.raises(ProtocolError, match="TLS"):
            await secure.connect(await plain.serve())


async def test_tls_of_the_served_side_only_goes_with_a_token(authority: Authority) -> None:
    certificate, key = authority.issue("b")
    served, connecting = TLS(certificate=certificate, key=key), TLS(ca=authority.ca)
    assert not served.mutual
    async with Agent("b", tls=served) as bare:
        with pytest.raises(ConfigurationError, match="authenticate=False"):
            await bare.serve()
    async with Agent("b", tls=served, token=TOKEN) as b, Agent("a", tls=connecting, token=TOKEN) as a:
        await connect(a, b)
        with pytest.raises(ConfigurationError, match="certificate="):
            await a.serve()
        with pytest.raises(ConfigurationError, match="ca="):
            await b.connect(b.address)  # type: ignore[arg-type]
        async with Agent("c", tls=connecting, token="another") as c:
            with pytest.raises(REFUSALS):
                await c.connect(b.address)  # type: ignore[arg-type]


async def test_with_both_the_token_counts_too(authority: Authority) -> None:
    async with Agent("b", tls=authority.tls("b"), token=TOKEN) as b, Agent("a", tls=authority.tls("a"), token="another") as a:
        with pytest.raises(REFUSALS):
            await a.connect(await b.serve())


async def test_a_rule_of_ones_own(authority: Authority) -> None:
    certificate, key = authority.issue("decode-pool", uris=("spiffe://cluster/decode",))
    seen = []

    def allows(found: Any, name: str) -> bool:
        seen.append(certificate_names(found))
        return name.startswith("decode-")

    def tls() -> TLS:
        return TLS(certificate=certificate, key=key, ca=authority.ca, allows=allows)

    async with Agent("decode-1", tls=tls()) as a, Agent("decode-2", tls=tls()) as b, Agent("prefill-1", tls=tls()) as c:
        await connect(a, b)
        with pytest.raises(REFUSALS):
            await c.connect(b.address)  # type: ignore[arg-type]
    assert ["spiffe://cluster/decode"] in seen


async def test_contexts_instead_of_files(authority: Authority) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.issue("b"))
    server.load_verify_locations(authority.ca)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(authority.ca))
    client.load_cert_chain(*authority.issue("a", dns=("a",)))
    async with Agent("b", tls=TLS(server=server)) as b, Agent("a", tls=TLS(client=client)) as a:
        _, port = await b.serve()
        # This context wants the address in the certificate as well.
        with pytest.raises(AuthenticationError, match="certificate"):
            await a.connect(("127.0.0.1", port))
        client.check_hostname = False
        await a.connect(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "ca="),
        ({"certificate": "x"}, "together"),
        ({"key": "x"}, "ca="),
        ({"ca": "/nowhere"}, "/nowhere"),
        ({"ca": "here"}, "cannot use"),
        ({"client": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)}, "client="),
        ({"server": "x"}, "server="),
        ({"client": ssl._create_unverified_context()}, "verifies nobody"),
        ({"client": ssl.create_default_context(), "ca": "x"}, "not both"),
    ],
)
def test_tls_that_cannot_be_set_up(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    if options.get("ca") == "here":
        (tmp_path / "ca.pem").write_text("no certificate")
        options = {"ca": tmp_path / "ca.pem"}
    with pytest.raises(ConfigurationError, match=text):
        TLS(**options)
    with pytest.raises(ConfigurationError, match="tls"):
        Agent("a", tls="certificate.pem")  # type: ignore[arg-type]


async def test_renewed_certificates_are_taken_up_without_a_restart(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nixl_async.security._RELOAD_SECONDS", 0.0)
    tls = authority.tls("b")
    async with Agent("b", tls=tls) as b:
        address = await b.serve()

        async def shown() -> bytes:
            context = authority.tls("x").client_context()
            _, writer = await asyncio.open_connection(*address, ssl=context, server_hostname="")
            try:
                found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            return bytes(found)

        first = await shown()
        (tmp_path / "b.key").write_text("half of a ke")
        assert await shown() == first
        assert "not renewed" in caplog.text
        authority.issue("b")
        assert await shown() != first
        async with Agent("a", tls=authority.tls("a")) as a:
            await connect(a, b)


# Attacks on the handshake.


async def test_a_wrong_token_learns_a_name_and_nothing_else() -> None:
    async with two_agents() as (a, b, _):
        await b.register(np.zeros(8, np.uint8), name="kv")
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            with pytest.raises(AuthenticationError, match="did not prove"):
                await one.authenticate("mallory", b"wrong")
            assert await one.ended() == []
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            # Metadata is not given to one who only says hello, and no proof either: that would be guessed at at home.
            one.writer.write(Greeting.create("mallory", "1").encode())
            one.writer.write(encode_frame(FrameType.METADATA, b"x"))
            assert [kind for kind, _ in await one.ended()] == [FrameType.HELLO, FrameType.REFUSED]
        assert set(b.peers) == {"a"}
        await _still_fine(a, b)


async def test_a_recorded_handshake_is_worth_nothing_later() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        address = await b.serve()
        sent = bytearray()

        async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            up_reader, up_writer = await asyncio.open_connection(*address)

            async def back() -> None:
                with contextlib.suppress(OSError):
                    while piece := await up_reader.read(1 << 16):
                        writer.write(piece)
                writer.close()

            answering = asyncio.create_task(back())
            while piece := await reader.read(1 << 16):
                sent.extend(piece)
                up_writer.write(piece)
            up_writer.close()
            await answering

        async with listening(listen_in) as port:
            await a.disconnect(await a.connect(("127.0.0.1", port)))
        assert b"nixlSerDes" in sent
        events = b.membership()
        for cut in (len(sent), len(sent) // 2):
            async with stranger(address) as one:
                one.writer.write(sent[:cut])
                kinds = [kind for kind, _ in await one.ended()]
                assert kinds in ([FrameType.HELLO, FrameType.REFUSED], [FrameType.HELLO])
        assert not b.peers
        assert events._queue.empty()


async def test_what_a_server_says_cannot_be_turned_against_it() -> None:
    quick = ConnectionLimits(handshake_seconds=1.0)
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN, connection_limits=quick) as b:
        address = await b.serve()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while piece := await reader.read(1 << 16):
                writer.write(piece)

        async with listening(echo) as port:
            with pytest.raises(ProtocolError, match="our own greeting"):
                await a.connect(("127.0.0.1", port))
        # Two connections to one server, each fed with what the other one answers.
        async with stranger(address) as left, stranger(address) as right:
            left.writer.write(Greeting.create("x", "1").encode())
            greeting = encode_frame(*await left.frame())
            right.writer.write(greeting)
            kind, payload = await right.frame()
            if kind is FrameType.HELLO:
                left.writer.write(encode_frame(FrameType.PROOF, payload[:32]))
            left_end, right_end = await left.ended(), await right.ended()
            assert {kind for kind, _ in left_end + right_end} <= {FrameType.REFUSED}
        assert not a.peers
        assert not b.peers


BEGUN = encode_frame(FrameType.METADATA, encode_announcement("mallory", "1", None, [], [], more=True))
PIECE = b'{"piece":[{"name":"kv","address":4096,"nbytes":8,"kind":"DRAM","device":0,"readonly":false,"keys":{}}],"last":%b}'


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([encode_frame(FrameType.REGIONS, PIECE % b"true")], b"after its end"),
        ([BEGUN, *[encode_frame(FrameType.REGIONS, PIECE % b"true")] * 2], b"after its end"),
        ([BEGUN, encode_frame(FrameType.REGIONS, PIECE % b"1")], b"'last'"),
        ([BEGUN, encode_frame(FrameType.REGIONS, b'{"piece":{},"last":true}')], b"'piece'"),
        ([BEGUN, encode_frame(FrameType.REGIONS, b'{"piece":[{"name":5}],"last":true}')], b"malformed"),
        ([BEGUN, *[encode_frame(FrameType.REGIONS, b"x" * (4 << 20))] * 17], b"before all of the metadata"),
        ([BEGUN, encode_frame(FrameType.REGIONS, b'{"added":[],"revision":-1}'), encode_frame(FrameType.REGIONS, PIECE % b"true")],
         b"a revision is -1"),
    ],
)  # fmt: skip
async def test_metadata_in_pieces_that_are_not_what_was_agreed(frames: list[bytes], text: bytes) -> None:
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            await one.authenticate("mallory", TOKEN.encode())
            for frame in frames:
                one.writer.write(frame)
            assert any(text in payload for kind, payload in await one.ended() if kind is FrameType.REFUSED)
        await _still_fine(a, b)


async def test_who_does_not_end_its_metadata_does_not_join() -> None:
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            await one.authenticate("mallory", TOKEN.encode())
            one.writer.write(BEGUN + encode_frame(FrameType.REGIONS, PIECE % b"false") + encode_frame(FrameType.NOTIFY, b"x"))
            while not b._membership._peer_regions._gathering:
                await asyncio.sleep(0)
            await _still_fine(a, b)
            assert set(b.peers) == {"a"}
            one.writer.write(encode_frame(FrameType.REGIONS, PIECE % b"true"))
            note = await anext(b.notifications())
            assert (note.peer, note.payload) == ("mallory", b"x")
            assert set(b.peers["mallory"].regions) == {"kv"}
        assert not b._membership._peer_regions._gathering


async def test_nobody_speaks_for_another_after_joining() -> None:
    async with two_agents() as (a, b, _), Agent("c", token=TOKEN) as c:
        await connect(c, b)
        region = await a.register(np.zeros(8, np.uint8), name="kv")
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            await one.authenticate("mallory", TOKEN.encode())
            # The metadata of somebody else, who is connected or not.
            one.writer.write(encode_frame(FrameType.METADATA, a.metadata()))
            assert any(b"sent the metadata of" in payload for kind, payload in await one.ended() if kind is FrameType.REFUSED)
        async with Agent("mallory", token=TOKEN) as mallory:
            peer = await connect(mallory, b)
            assert peer.link is not None
            for frame in (
                encode_frame(FrameType.WITHDRAW, b'{"id":1,"name":"kv"}'),
                encode_frame(FrameType.WITHDRAWN, b'{"id":1}'),
                encode_frame(FrameType.LEFT, b'{"id":1}'),
            ):
                peer.link.send(frame)
            await _still_fine(mallory, b)
        assert b.peers["a"].region("kv").address == region.address
        assert b.peers["a"].region("kv").withdrawn == ""
        await _still_fine(c, b)


async def test_who_is_expected_is_checked_before_anything_is_told() -> None:
    async with two_agents() as (a, b, _), Agent("c", token=TOKEN) as c:
        assert b.address is not None
        with pytest.raises(PeerLost, match="'b' answers where 'z' is expected"):
            await c._membership.connect(*b.address, name="z")
        assert "c" not in b.peers
        assert set(a.peers) == {"b"}


# Attacks on memory.


@pytest.mark.parametrize("nbytes", [4097, 1 << 20, (1 << 32) - 1])
@pytest.mark.parametrize("kind", [1, 3, 7, 255])
async def test_an_oversize_frame_of_a_stranger(nbytes: int, kind: int) -> None:
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            one.writer.write(nbytes.to_bytes(4, "little") + bytes([kind]))
            ((refused, _),) = await one.ended()
            assert refused is FrameType.REFUSED
        await _still_fine(a, b)


@pytest.mark.parametrize(
    ("kind", "nbytes"),
    [
        (FrameType.METADATA, (256 << 20) + 1),
        (FrameType.NOTIFY, (64 << 20) + 1),
        (FrameType.WITHDRAW, 65537),
        (FrameType.PING, 9),
    ],
)
async def test_an_oversize_frame_of_a_peer(kind: FrameType, nbytes: int) -> None:
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            await one.authenticate("m", TOKEN.encode())
            one.writer.write(nbytes.to_bytes(4, "little") + bytes([kind]))
            assert (await one.ended())[-1][0] is FrameType.REFUSED
        await _still_fine(a, b)


async def test_a_peer_that_disregards_its_window_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixl_async.link.MAX_UNREAD_NBYTES", 1 << 20)
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with Agent("m", token=TOKEN, backends=["memory"]) as m:
            peer = await connect(m, b)
            assert peer.link is not None
            for _ in range(32):
                peer.link.send(encode_frame(FrameType.NOTIFY, bytes(65000)))
            async with asyncio.timeout(10):
                while "m" in b.peers:
                    await asyncio.sleep(0.01)
            assert b.statistics().unread_notifications < 32
        subscription = b.notifications(peer="m")
        for _ in range(b.statistics().unread_notifications):
            await anext(subscription)
        await _still_fine(a, b)


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixl_async.link.MAX_UNSENT_NBYTES", 1 << 20)
    async with two_agents(backends=["memory"]) as (a, b, _):
        async with stranger(b.address) as one:  # type: ignore[arg-type]
            one.writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await one.authenticate("m", TOKEN.encode())
            one.writer.transport.pause_reading()
            ask = encode_frame(FrameType.PING, b"12345678") * 512
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(20):
                    while True:
                        one.writer.write(ask)
                        await one.writer.drain()
                        if not any(link.authenticated and link.other.name == "m" for link in b._membership._links):
                            break
        await _still_fine(a, b)


# What is never shown.


async def test_secrets_are_in_no_log_and_no_text(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret, other = "hush-3c1f", "hush-77aa"
    shown: list[object] = []
    async with Agent("a", token=secret) as a, Agent("b", token={"a": [secret, other]}) as b:
        await b.register(np.zeros(64, np.uint8), name="kv")
        peer = await connect(a, b)
        assert peer.link is not None
        tcp = json.loads(b._backends["tcp"].describe_to("a", a.incarnation))["token"]
        keys = [key.hex() for region in peer.regions.values() for name, key in region.keys.items() if len(key) == 8]
        assert keys
        shown += [a, b, peer, peer.link, peer.link._handshake, a._credentials, b._credentials, *peer.regions.values()]
        shown += [
            a.membership(),
            a.statistics(),
            TLS(ca=authority.ca),
            authority.tls("a"),
            vars(peer.link),
            peer.region("kv")[:8],
        ]
        for wrong in ("wrong-5d", other):
            async with Agent("a", token=wrong) as thief:
                with contextlib.suppress(NixlError):
                    await thief.connect(b.address)  # type: ignore[arg-type]
        for call in (
            a.connect("127.0.0.1:1"),
            a.add_peer(b.metadata()[:-9]),
            a.add_peer(b.metadata().replace(b'"nbytes":64', b'"nbytes":-4')),
        ):
            with pytest.raises(NixlError) as error:
                await call
            shown += [error.value, error.value.__cause__]
        # The other secret is good for the name as well: who came with it has replaced this one.
        with contextlib.suppress(NixlError):
            await a.disconnect(peer)
        shown.append(peer)
    with pytest.raises(ConfigurationError) as error:
        Agent("a", token={"b": 5, "c": secret})  # type: ignore[dict-item]
    text = "\n".join([*map(repr, shown), *map(str, shown), str(error.value), caplog.text])
    for one in (secret, other, "wrong-5d", tcp, *keys):
        assert one not in text, one


# Crowds.

LORIS = """
import select, socket, sys, time
count, host, port, source, again = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "again"
poll, held, opened = select.poll(), {}, 0

def dial():
    global opened
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    sock.connect_ex((host, port))
    held[sock.fileno()] = sock
    # Half of them say a little, and never more.
    poll.register(sock, select.POLLIN | (select.POLLOUT if opened % 2 else 0))
    opened += 1

def turn(wait):
    for fd, event in poll.poll(wait):
        sock = held[fd]
        if event & (select.POLLHUP | select.POLLERR | select.POLLIN):
            poll.unregister(fd)
            del held[fd]
            sock.close()
        else:
            poll.modify(fd, select.POLLIN)
            try:
                sock.send(bytes.fromhex(sys.argv[7]))
            except OSError:
                pass

while opened < count:
    dial()
    if opened % 64 == 0:
        turn(0)
print(opened, flush=True)
end = time.monotonic() + float(sys.argv[6])
while time.monotonic() < end:
    turn(20)
    while again and len(held) < min(count, 2000):
        dial()
        if opened % 64 == 0:
            turn(0)
print(opened, len(held), flush=True)
"""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize(("kind", "again"), [("plain", "once"), ("tls", "again")])
async def test_ten_thousand_half_open_connections(again: str, kind: str, authority: Authority) -> None:
    count = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    options: dict[str, Any] = {"token": TOKEN, "backends": ["memory", "tcp"]}

    def tls(name: str) -> dict[str, Any]:
        return options | ({"tls": authority.tls(name)} if kind == "tls" else {})

    async with Agent("a", **tls("a")) as a, Agent("b", **tls("b")) as b:
        host, port = await b.serve()
        await connect(a, b)
        before = _resident()
        # The beginning of a greeting, or of a TLS client's.
        said = (b"\xc8\0\0\0\x01{" if kind == "plain" else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").hex()
        # Those who come again and again are limited by where they come from; those who came once are outlasted.
        source = "127.0.0.1" if again == "once" else "127.0.0.2"
        crowd = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LORIS, str(count), host, str(port), source, again, "2.5", said, stdout=subprocess.PIPE
        )
        assert crowd.stdout is not None
        waits, joins, joined, half_open = [], [], 0, 0
        loop = asyncio.get_running_loop()
        ended = asyncio.ensure_future(crowd.communicate())
        while not ended.done():
            began = loop.time()
            await _still_fine(a, b)
            waits.append(loop.time() - began)
            assert b._membership._server is not None
            half_open = max(half_open, b._membership._server.half_open)
            if len(waits) % 20 == 1:
                async with Agent(f"new-{joined}", **tls(f"new-{joined}")) as new:
                    began = loop.time()
                    async with asyncio.timeout(10):
                        await new.connect((host, port))
                    joins.append(loop.time() - began)
                joined += 1
            await asyncio.sleep(0.01)
        told = (await ended)[0].split()
        assert int(told[0]) >= count
        assert 128 <= half_open <= 256
        assert joined >= 2
        assert b._membership._server is not None
        # The rest waits in the kernel's queue, or has gone by itself.
        assert b._membership._server.turned_away >= count // 4
        assert set(b.peers) == {"a"} | {name for name in b.peers if name.startswith("new-")}
        assert sorted(waits)[len(waits) // 2] < 0.5
        assert max(waits) < 5
        grown = _resident() - before
        median = sorted(waits)[len(waits) // 2]
        print(f"{kind} {again}: {told}, {joined} joined within {max(joins):.2f} s; notifications: p50 {median:.3f} s,")
        print(f"at most {max(waits):.2f} s; memory: {grown >> 20} MiB more")
        assert grown < (192 if kind == "tls" else 64) << 20, f"{grown >> 20} MiB"
        async with asyncio.timeout(30):
            while b._membership._server.half_open:
                await asyncio.sleep(0.05)


@every_loop
async def test_limits_are_the_users() -> None:
    limits = ConnectionLimits(handshake_seconds=0.3, half_open=4)
    async with Agent("b", token=TOKEN, backends=["memory"], connection_limits=limits) as b:
        address = await b.serve()
        async with contextlib.AsyncExitStack() as stack:
            strangers = [await stack.enter_async_context(stranger(address)) for _ in range(10)]
            ends = await asyncio.gather(*(one.ended() for one in strangers))
            assert sum(bool(end) for end in ends) == 4
            assert all(b"took too long" in end[-1][1] for end in ends if end)
        async with Agent("a", token=TOKEN, backends=["memory"]) as a:
            await a.connect(address)
