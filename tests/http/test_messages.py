from __future__ import annotations

import contextlib
import ctypes
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.http.messages import MAX_HEAD_NBYTES, ChunkReader, HTTPError, Request, parse_head, view


def parse(text: str, method: str = "GET"):
    return parse_head(text.replace("\n", "\r\n").encode("latin-1"), method)


def test_a_head() -> None:
    head = parse('HTTP/1.1 206 Partial Content\nContent-Length: 12\nETag:  "x" \nX-Empty:\nx-colon: a:b')
    assert (head.status, head.nbytes, head.chunked, head.keep_alive) == (206, 12, False, True)
    assert head.headers == {"content-length": "12", "etag": '"x"', "x-empty": "", "x-colon": "a:b"}


@pytest.mark.parametrize(
    ("text", "method", "nbytes", "chunked"),
    [
        ("HTTP/1.1 200 OK\nContent-Length: 5", "HEAD", 0, False),
        ("HTTP/1.1 204 No Content", "PUT", 0, False),
        ("HTTP/1.1 304 Not Modified\nContent-Length: 9", "GET", 0, False),
        ("HTTP/1.1 100 Continue", "PUT", 0, False),
        ("HTTP/1.1 200", "GET", None, False),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: Chunked", "GET", None, True),
        ("HTTP/1.1 200 OK\nContent-Length: 7\nContent-Length: 7", "GET", 7, False),
        ("HTTP/1.1 200 OK\nContent-Length: 7\nTransfer-Encoding: chunked", "GET", None, True),
    ],
)
def test_where_a_body_ends(text: str, method: str, nbytes: int | None, chunked: bool) -> None:
    head = parse(text, method)
    assert (head.nbytes, head.chunked) == (nbytes, chunked)


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("HTTP/1.1 200 OK\nContent-Length: 0", True),
        ("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: Close", False),
        ("HTTP/1.1 200 OK\nContent-Length: 0\nConnection: keep-alive\nConnection: close", False),
        ("HTTP/1.0 200 OK\nContent-Length: 0", False),
        ("HTTP/1.0 200 OK\nContent-Length: 0\nConnection: Keep-Alive", True),
        ("HTTP/1.1 200 OK", False),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", True),
        ("HTTP/1.1 200 OK\nContent-Length: 7\nTransfer-Encoding: chunked", False),
    ],
)
def test_whether_the_connection_stays(text: str, keep: bool) -> None:
    assert parse(text).keep_alive is keep


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HTTP/2 200 OK",
        "HTTP/1.1",
        "HTTP/1.1 20",
        "HTTP/1.1 20x OK",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1 099 No",
        "HTTP/1.1 101 Switching Protocols",
        "SSH-2.0-OpenSSH",
        "HTTP/1.1 200 OK\nno colon",
        "HTTP/1.1 200 OK\nName : value",
        "HTTP/1.1 200 OK\n folded: line",
        "HTTP/1.1 200 OK\n: nameless",
        "HTTP/1.1 200 OK\nContent-Length: -1",
        "HTTP/1.1 200 OK\nContent-Length: 0x10",
        "HTTP/1.1 200 OK\nContent-Length: 1, 1",
        "HTTP/1.1 200 OK\nContent-Length: \xb2",
        "HTTP/1.1 200 OK\nContent-Length: " + "9" * 5000,
        "HTTP/1.1 200 OK\nContent-Length: 1\nContent-Length: 2",
        "HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked",
        "HTTP/1.1 200 OK\nTransfer-Encoding: identity",
    ],
)
def test_heads_that_are_refused(text: str) -> None:
    with pytest.raises(HTTPError):
        parse(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_an_error(data: bytes) -> None:
    with contextlib.suppress(HTTPError):
        parse_head(data, "GET")


# Chunks.


def feed(reader: ChunkReader, pieces: list[bytes]) -> bytes:
    return b"".join(bytes(part) for piece in pieces for part in reader.feed(memoryview(piece)))


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    payload, stream = b"", b""
    for part in draw(st.lists(st.binary(min_size=1, max_size=700), max_size=6)):
        size = draw(st.sampled_from([f"{len(part):x}", f"{len(part):X}", f"000{len(part):x}"]))
        stream += size.encode() + draw(st.sampled_from([b"", b";ext=1", b' ; name="v"', b" "])) + b"\r\n" + part + b"\r\n"
        payload += part
    stream += b"0\r\n" + b"".join(draw(st.lists(st.sampled_from([b"x: y\r\n", b"checksum: z\r\n"]), max_size=2))) + b"\r\n"
    return payload, stream


@given(chunked(), st.data())
def test_chunks_cut_anywhere(body: tuple[bytes, bytes], data: st.DataObject) -> None:
    payload, stream = body
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    reader = ChunkReader()
    assert feed(reader, [stream[a:b] for a, b in itertools.pairwise(edges)]) == payload
    assert reader.done


@given(chunked())
def test_chunks_byte_by_byte(body: tuple[bytes, bytes]) -> None:
    payload, stream = body
    reader = ChunkReader()
    found = b""
    for n in range(len(stream)):
        assert not reader.done
        found += feed(reader, [stream[n : n + 1]])
    assert reader.done
    assert found == payload


@pytest.mark.parametrize(
    "stream",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"1_0\r\n",
        b" 1\r\n",
        b"1\r\nab\r\n",
        b"f" * 16 + b"\r\n",
        b"0\r\n\r\nmore",
        b"1" * (MAX_HEAD_NBYTES + 1),
        b"1;" + b"e" * (MAX_HEAD_NBYTES + 1),
        b"0\r\n" + b"name: value\r\n" * 10_000,
    ],
)
def test_streams_that_are_no_chunks(stream: bytes) -> None:
    with pytest.raises(HTTPError):
        feed(ChunkReader(), [stream])


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_are_chunks_or_an_error(pieces: list[bytes]) -> None:
    with contextlib.suppress(HTTPError):
        feed(ChunkReader(), pieces)


def test_a_view_is_the_memory() -> None:
    memory = bytearray(b"0123456789")
    address = ctypes.addressof((ctypes.c_char * 10).from_buffer(memory))
    part = view(address + 2, 3)
    assert bytes(part) == b"234"
    part[:] = b"abc"
    assert memory == b"01abc56789"


def test_what_a_request_moves() -> None:
    assert Request("GET", b"", sink=[memoryview(bytearray(5))], sink_nbytes=5).nbytes == 5
    assert Request("PUT", b"", body=[memoryview(b"abc")], body_nbytes=3).nbytes == 3
