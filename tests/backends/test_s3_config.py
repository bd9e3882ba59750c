"""Where credentials come from, and what happens when they end: each source for real, on the loopback address."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, ConfigurationError
from nixl_async.backends import s3_config
from nixl_async.backends.s3_config import CredentialSource, S3Options, make_session
from nixl_async.errors import AccessError
from nixl_async.testing.patterns import assert_same, pattern
from nixl_async.testing.servers import Server
from tests.sockets import HOST, listening
from tests.stores import fresh_prefix

LATER = "2099-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide this machine's own credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # What was looked up is asked about again at once.
    monkeypatch.setattr(s3_config, "CREDENTIALS_SECONDS", 0.0)


@asynccontextmanager
async def http(answer: Callable[[str, str, str], tuple[int, str]]) -> AsyncIterator[str]:
    """Serve what `answer(method, path, body)` says; yield the URL."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        lengths = [line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        body = (await reader.readexactly(int(lengths[0]) if lengths else 0)).decode()
        status, text = answer(method, path, body)
        writer.write(f"HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()

    async with listening(handler) as port:
        yield f"http://{HOST}:{port}"


class Metadata:
    """The instance's metadata service: hands out `keys`, one pair after another, the last for ever."""

    def __init__(self, *keys: tuple[str, str]) -> None:
        self.keys = list(keys)
        self.asked = 0

    def __call__(self, method: str, path: str, body: str) -> tuple[int, str]:
        if method == "PUT":
            return 200, "metadata-token"
        if path.endswith("/security-credentials/"):
            return 200, "role"
        self.asked += 1
        key, secret = self.keys.pop(0) if len(self.keys) > 1 else self.keys[0]
        found = {"Code": "Success", "AccessKeyId": key, "SecretAccessKey": secret, "Token": "", "Expiration": LATER}
        return 200, json.dumps(found)


async def round_trip(server: Server, **options: Any) -> None:
    """Put and get thirty objects at once."""
    names = [f"{fresh_prefix()}{n}" for n in range(30)]
    sent, got = pattern(30_000), np.zeros(30_000, np.uint8)
    async with Agent("credentials", backends=["s3", "memory"]) as agent:
        given = {"endpoint_url": server.endpoint, "region": server.region, "addressing": "path", **options}
        store = await agent.store("s3://bench/", **given)
        await agent.transfer(await agent.register(sent), store.objects(names, 1000))
        await agent.transfer(store.objects(names, 1000), await agent.register(got))
        assert all(await store.exists(names))
        assert [found async for found in store.list(names[0])]
    assert_same(got, sent)


def write_profile(directory: Path, key: str, secret: str, name: str = "default") -> None:
    (directory / "credentials").write_text(f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


async def test_the_environments(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret)
    await round_trip(seaweed)


@pytest.mark.parametrize("profile", [None, "work"])
async def test_a_profiles(seaweed: Server, tmp_path: Path, profile: str | None) -> None:
    write_profile(tmp_path, seaweed.key_id, seaweed.secret, profile or "default")
    await round_trip(seaweed, profile=profile)


async def test_a_process_gives_them(seaweed: Server, tmp_path: Path) -> None:
    made = json.dumps({"Version": 1, "AccessKeyId": seaweed.key_id, "SecretAccessKey": seaweed.secret, "Expiration": LATER})
    (tmp_path / "made").write_text(made)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/made\n")
    await round_trip(seaweed)


async def test_the_instances(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = Metadata((seaweed.key_id, seaweed.secret))
    async with http(metadata) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        await round_trip(seaweed)
    assert metadata.asked == 1


async def test_the_instances_that_ended_are_asked_for_once_more(seaweed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty requests are refused at once, and one of them asks."""
    metadata = Metadata(("ENDED", "ended"), (seaweed.key_id, seaweed.secret))
    async with http(metadata) as url:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        await round_trip(seaweed)
    assert metadata.asked == 2


async def test_a_profile_that_is_rewritten(seaweed: Server, tmp_path: Path) -> None:
    write_profile(tmp_path, "ENDED", "ended")
    async with Agent("credentials", backends=["s3", "memory"]) as agent:
        store = await agent.store("s3://bench/", endpoint_url=seaweed.endpoint, region=seaweed.region, addressing="path")
        memory = await agent.register(pattern(1000))
        key = f"{fresh_prefix()}x"
        with pytest.raises(AccessError, match="InvalidAccessKeyId"):
            await agent.transfer(memory, store.object(key))
        with pytest.raises(AccessError, match="InvalidAccessKeyId"):
            assert [found async for found in store.list(key)]
        write_profile(tmp_path, seaweed.key_id, seaweed.secret)
        # The data's and the questions' requests alike.
        assert [found async for found in store.list(key)] == []
        await agent.transfer(memory, store.object(key))
        assert list(await store.exists([key])) == [True]


ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{}</AccessKeyId><SecretAccessKey>{}</SecretAccessKey>
<SessionToken></SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    (tmp_path / "token").write_text("who-i-am")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/test")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return lambda url: monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)


async def test_a_web_identitys(seaweed: Server, identity: Callable[[str], None]) -> None:
    asked: list[str] = []

    def answer(method: str, path: str, body: str) -> tuple[int, str]:
        asked.append(body)
        return 200, ANSWER.format(seaweed.key_id, seaweed.secret)

    async with http(answer) as url:
        identity(url)
        await round_trip(seaweed)
    assert asked
    assert "WebIdentityToken=who-i-am" in asked[0]


async def test_a_web_identity_that_is_refused(seaweed: Server, identity: Callable[[str], None]) -> None:
    refusal = (
        "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>"
    )
    async with http(lambda *_: (403, refusal)) as url:
        identity(url)
        with pytest.raises(AccessError, match="not you"):
            await round_trip(seaweed)


async def test_none_at_all(seaweed: Server) -> None:
    with pytest.raises(AccessError, match="no credentials"):
        await round_trip(seaweed)
    with pytest.raises(ConfigurationError, match="nobody"):
        await round_trip(seaweed, profile="nobody")


# The source by itself.


async def source_of(**options: Any) -> CredentialSource:
    given = S3Options(**options)
    return CredentialSource(await make_session(given), given)


async def test_given_ones_stay() -> None:
    source = await source_of(access_key="a", secret_key="b", session_token="c")
    found = await source()
    assert found is not None
    assert (found.access_key, found.secret_key, found.token) == ("a", "b", "c")
    assert await source(found) == found
    assert await (await source_of(anonymous=True))() is None


async def test_they_are_the_same_object_while_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signer keeps a day's key for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    source = await source_of()
    assert await source() is await source()
