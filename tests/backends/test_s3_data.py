"""Signatures, checksums, errors: what the data path of s3 says, beside what botocore says."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import zlib
from typing import Any
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import BackendError, ConflictError, IntegrityError, NotFoundError, OutOfSpace
from nixl_async.backends import s3_data
from nixl_async.backends.s3_batch import GetHeads
from nixl_async.backends.s3_data import (
    EMPTY_SHA256,
    UNSIGNED,
    WARMED_NBYTES,
    BucketData,
    Credentials,
    DataOptions,
    Endpoint,
    Signer,
    checksum,
    document_of,
    error_for,
    error_of,
    off_loop,
    sha256,
)
from nixl_async.errors import AccessError
from nixl_async.http import Response
from nixl_async.testing.patterns import pattern

SECONDS = 1_700_000_000


def data_for(host: str = "example.com", base: str = "/bench", region: str = "us-east-1") -> tuple[BucketData, Endpoint]:
    endpoint = Endpoint(None, host, base, Signer(region), False)  # type: ignore[arg-type]
    return BucketData("bench", endpoint, DataOptions(), None, None), endpoint  # type: ignore[arg-type]


def botos(method: str, url: str, headers: dict[str, str], credentials: Credentials, region: str, payload: str) -> str:
    """Return the Authorization that botocore gives a request."""
    request = AWSRequest(method, url, headers={k: v for k, v in headers.items() if k != "host"})
    request.context["payload_signing_enabled"] = True
    signer = S3SigV4Auth(
        BotoCredentials(credentials.access_key, credentials.secret_key, credentials.token or None), "s3", region
    )
    signer.payload = lambda request: payload  # type: ignore[method-assign]
    signer.add_auth(request)
    return str(request.headers["Authorization"])


@given(
    key=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30),
    query=st.sampled_from(["", "partNumber=3&uploadId=a%2Fb%20c", "uploads="]),
    token=st.sampled_from(["", "token/+="]),
    method=st.sampled_from(["GET", "PUT", "HEAD"]),
    payload=st.sampled_from([UNSIGNED, EMPTY_SHA256]),
    region=st.sampled_from(["us-east-1", "eu-central-2", "auto"]),
)
def test_signatures_are_botocores(key: str, query: str, token: str, method: str, payload: str, region: str) -> None:
    data, endpoint = data_for(region=region)
    credentials = Credentials("AKID", "secret/+", token)
    headers = [("range", "bytes=0-9"), ("x-amz-meta-a", "b c")]
    patched = pytest.MonkeyPatch()
    moment = datetime.datetime.fromtimestamp(SECONDS, datetime.UTC)
    with patched.context() as patch:
        patch.setattr(s3_data.time, "time", lambda: SECONDS)
        patch.setattr("botocore.auth.get_current_datetime", lambda remove_tzinfo=True: moment.replace(tzinfo=None))
        head = data.head(endpoint, credentials, method, key, query, headers, payload).decode()
        first, *lines = head.split("\r\n")[:-2]
        sent = dict(line.split(": ", 1) for line in lines)
        ours = sent.pop("authorization")
        url = f"http://example.com/bench/{quote(key, safe='/~')}{'?' if query else ''}{query}"
        skipped = {"x-amz-date", "x-amz-content-sha256", "x-amz-security-token"}
        given_headers = {name: value for name, value in sent.items() if name not in skipped}
        assert ours == botos(method, url, given_headers, credentials, region, payload)
    assert first == f"{method} {url.removeprefix('http://example.com')} HTTP/1.1"
    assert sent.get("x-amz-security-token", "") == token


@given(
    key=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30),
    first=st.integers(0, 1 << 50),
    nbytes=st.integers(1, 1 << 40),
    credentials=st.sampled_from([None, Credentials("AKID", "secret/+"), Credentials("AKID", "s", "token/+=")]),
    more=st.sampled_from([(), (("x-amz-request-payer", "requester"), ("x-amz-server-side-encryption-customer-key", "k="))]),
)
def test_heads_that_are_made_by_the_batch_are_the_same(
    key: str, first: int, nbytes: int, credentials: Credentials | None, more: tuple[tuple[str, str], ...]
) -> None:
    _, endpoint = data_for()
    data = BucketData("bench", endpoint, DataOptions(of_get=more), None, None)  # type: ignore[arg-type]
    span = ("range", f"bytes={first}-{first + nbytes - 1}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_data.time, "time", lambda: SECONDS)
        heads = GetHeads(data, endpoint, credentials)
        assert heads.make(key, first, nbytes) == data.head(endpoint, credentials, "GET", key, "", [*more, span])


def test_the_days_key_is_not_another_days_or_anothers() -> None:
    signer = Signer("r")
    headers = [("host", "h"), ("x-amz-content-sha256", UNSIGNED)]

    def sign(credentials: Credentials, date: str) -> str:
        return signer.authorization(credentials, "GET", "/", "", headers, date)

    one, other = Credentials("a", "s"), Credentials("a", "t")
    found = [sign(one, "20260101T000000Z"), sign(one, "20260102T000000Z"), sign(other, "20260101T000000Z")]
    assert len({text[-64:] for text in found}) == 3
    assert sign(one, "20260101T000000Z") == found[0]


def test_unsigned_heads() -> None:
    data, endpoint = data_for()
    head = data.head(endpoint, None, "PUT", "a b", body_nbytes=5).decode()
    assert head == "PUT /bench/a%20b HTTP/1.1\r\nhost: example.com\r\ncontent-length: 5\r\n\r\n"


def b64(number: str) -> str:
    return base64.b64encode(bytes.fromhex(number)).decode()


@pytest.mark.parametrize(("name", "expected"), [("crc32c", "e3069283"), ("crc64nvme", "ae8b14860a799888")])
def test_checksums(name: str, expected: str) -> None:
    # The check values that the catalogue of CRCs gives for "123456789".
    assert checksum(name, [memoryview(b"123456789")]) == b64(expected)
    assert checksum(name, [memoryview(b"1234"), memoryview(b""), memoryview(b"56789")]) == b64(expected)
    assert checksum(name, [memoryview(b"123456780")]) != b64(expected)


def test_hashes() -> None:
    assert sha256([memoryview(b"ab"), memoryview(b"c")]) == hashlib.sha256(b"abc").hexdigest()
    assert sha256([]) == EMPTY_SHA256
    data = pattern(2 * WARMED_NBYTES + 1)
    for cut in (1, WARMED_NBYTES, WARMED_NBYTES + 1):
        assert sha256([memoryview(data)[:cut], memoryview(data)[cut:]]) == hashlib.sha256(data).hexdigest()
    data.flags.writeable = False
    assert sha256([memoryview(data)]) == hashlib.sha256(data).hexdigest()


async def test_work_off_the_loop_is_waited_for() -> None:
    done: list[int] = []

    def work(data: bytes) -> str:
        for _ in range(20):
            zlib.crc32(data)
        done.append(1)
        return "x"

    data = bytes(8 << 20)
    task = asyncio.create_task(off_loop(len(data), work, data))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


# Errors.


def answer(body: str) -> Response:
    return Response(400, {}, body.encode())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>", ("NoSuchKey", "gone")),
        ('<?xml version="1.0"?>\n<Error xmlns="http://s3"><Code>A</Code></Error>', ("A", "")),
        ("", ("", "")),
        ("plain words", ("", "plain words")),
        ("<Error><Code>NoSuch", ("", "")),
        ("<html>no", ("", "")),
    ],
)
def test_error_documents(body: str, expected: tuple[str, str]) -> None:
    assert error_of(answer(body)) == expected


def test_a_document() -> None:
    assert document_of(answer("<Error><Code>X</Code><Region>eu</Region></Error>"))["Region"] == "eu"
    assert document_of(answer("?")) == {}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", NotFoundError),
        (403, "AccessDenied", AccessError),
        (401, "", AccessError),
        (400, "ExpiredToken", AccessError),
        (412, "PreconditionFailed", ConflictError),
        (409, "ConditionalRequestConflict", ConflictError),
        (400, "BadDigest", IntegrityError),
        (400, "XAmzContentSHA256Mismatch", IntegrityError),
        (507, "", OutOfSpace),
        (403, "QuotaExceeded", OutOfSpace),
        (500, "InternalError", BackendError),
        (416, "InvalidRange", BackendError),
    ],
)
def test_kinds_of_errors(status: int, code: str, kind: type[Any]) -> None:
    assert error_for(status, code) is kind


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Credentials("id", "hidden", "hidden"))
