"""Azure: who we are (keys, signatures, tokens), what options mean, listings, and what the protocol asks for. Against Azurite."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from azure.core.credentials import AccessToken, AzureSasCredential
from azure.core.exceptions import ClientAuthenticationError
from azure.storage.blob import BlobClient, ContainerClient, ContainerSasPermissions, generate_container_sas
from azure.storage.blob.aio import ContainerClient as AsyncContainerClient

from nixl_async import AccessError, Agent, BackendError, ConfigurationError, ConflictError, NotFoundError
from nixl_async.backends import azure_data
from nixl_async.backends.azure import AzureBackend
from nixl_async.backends.azure_config import Authority, AzureOptions, with_options
from nixl_async.testing.patterns import assert_same, pattern
from nixl_async.testing.proxy import Answer, Fault, FaultProxy
from nixl_async.testing.servers import Server, azurite
from tests.stores import fresh_prefix, running

REFUSED = Fault(answer=Answer(403, "Forbidden", (("x-ms-error-code", "AuthenticationFailed"),)))


@pytest.fixture
def url() -> str:
    return f"az://bench/{fresh_prefix()}"


@pytest.fixture
async def proxy(azure_server: Server) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", azure_server.port) as proxy:
        yield proxy


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with Agent("azure", backends=[AzureBackend(), "memory"]) as agent:
        yield agent


def signature(server: Server, *, read_only: bool = False, minutes: float = 60) -> str:
    permission = ContainerSasPermissions(read=True, list=True, write=not read_only, create=not read_only, delete=not read_only)
    now = datetime.now(UTC)
    return generate_container_sas(
        server.key_id,
        "bench",
        account_key=server.secret,
        permission=permission,
        start=now - timedelta(hours=2),
        expiry=now + timedelta(minutes=minutes),
    )


async def round_trip(agent: Agent, url: str, **options: Any) -> None:
    """Put, get, list, look at and delete a blob."""
    store = await agent.store(url, **options)
    sent, got = pattern(10_000), np.zeros(10_000, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("o"))
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, sent)
    assert [found.key async for found in store.list()] == ["o"]
    assert await store.exists(["o", "p"]) == [True, False]
    await store.delete(["o"])
    assert await store.exists(["o"]) == [False]


# Who we are.


async def test_a_connection_string_from_the_environment(
    agent: Agent, azure_server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure_server.connection_string)
    await round_trip(agent, url)


async def test_an_account_key(agent: Agent, azure_server: Server, url: str) -> None:
    await round_trip(agent, url, account_url=azure_server.endpoint, account_key=azure_server.secret)


async def test_a_shared_access_signature(agent: Agent, azure_server: Server, url: str) -> None:
    token = signature(azure_server)
    await round_trip(agent, url, account_url=azure_server.endpoint, sas_token=token)
    await round_trip(agent, url, account_url=azure_server.endpoint, sas_token=f"?{token}")
    await round_trip(agent, url, account_url=f"{azure_server.endpoint}?{token}")
    text = f"BlobEndpoint={azure_server.endpoint};SharedAccessSignature={token}"
    await round_trip(agent, url, connection_string=text)


async def test_a_signature_whose_owner_renews_it(agent: Agent, azure_server: Server, url: str) -> None:
    credential = AzureSasCredential(signature(azure_server, minutes=-60))
    options = {"account_url": azure_server.endpoint, "credential": credential}
    with pytest.raises(AccessError, match="403 Auth"):
        await round_trip(agent, url, **options)
    credential.update(signature(azure_server))
    await round_trip(agent, url, **options)


async def test_an_expired_signature(agent: Agent, azure_server: Server, proxy: FaultProxy, url: str) -> None:
    store = await agent.store(
        url, account_url=f"{proxy.url}/{azure_server.key_id}", sas_token=signature(azure_server, minutes=-60)
    )
    memory = await agent.register(np.zeros(100, np.uint8))
    for asking in (
        agent.transfer(memory, store.object("o")),
        agent.transfer(store.object("o"), memory),
        store.exists(["o"]),
        store.delete(["o"]),
        anext(aiter(store.list())),
    ):
        before = proxy.requests
        with pytest.raises(AccessError, match="403 Auth"):
            await asking
        assert proxy.requests == before + 1


async def test_a_signature_that_permits_reading_only(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, account_url=azure_server.endpoint, sas_token=signature(azure_server, read_only=True))
    memory = await agent.register(np.zeros(100, np.uint8))
    with pytest.raises(AccessError, match="AuthorizationPermissionMismatch"):
        await agent.transfer(memory, store.object("o"))
    assert await store.exists(["o"]) == [False]


async def test_a_wrong_key(agent: Agent, azure_server: Server, url: str) -> None:
    wrong = base64.b64encode(b"wrong" * 10).decode()
    store = await agent.store(url, account_url=azure_server.endpoint, account_key=wrong)
    with pytest.raises(AccessError, match="403 Auth") as caught:
        await agent.transfer(await agent.register(np.zeros(100, np.uint8)), store.object("o"))
    assert wrong not in str(caught.value)


async def test_nobody(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, account_url=azure_server.endpoint)
    with pytest.raises((AccessError, NotFoundError)):
        await agent.transfer(store.object("o"), await agent.register(np.zeros(100, np.uint8)))


async def test_what_the_server_calls_expired_is_renewed_once_for_all(
    agent: Agent, azure_server: Server, proxy: FaultProxy, url: str
) -> None:
    text = azure_server.connection_string.replace(f":{azure_server.port}/", f":{proxy.port}/")
    store = await agent.store(url, connection_string=text)
    memory = await agent.register(pattern(20_000))
    await agent.transfer(memory[:10], store.object("first"))
    (container,) = agent._backends["azure"]._containers.values()  # type: ignore[attr-defined]
    proxy.inject(REFUSED, times=20)
    await agent.transfer(memory, store.objects([f"{i}" for i in range(20)], 1000))
    assert proxy.faulted == 20
    assert container.data.authorise.renewals == 2


class Clock:
    """A clock that the test sets."""

    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


class Credential:
    """Yields tokens as azure-identity's credentials do, and remembers how many."""

    def __init__(self, clock: Any = time.time, seconds: float = 3600, issued: Any = time.time) -> None:
        self.clock, self.seconds, self.issued = clock, seconds, issued
        self.scopes: list[str] = []
        self.failing: Exception | None = None

    async def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        await asyncio.sleep(0)
        self.scopes += scopes
        if self.failing is not None:
            raise self.failing
        return AccessToken(token(self.issued(), len(self.scopes)), int(self.clock() + self.seconds))


def token(now: float, number: int = 0) -> str:
    """Return a token as the emulator takes them: it does not look at the signature."""
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/test/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + 3600,
        "number": number,
    }
    parts = [{"alg": "none", "typ": "JWT"}, claims]
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), "none"])


def client_with(credential: Any) -> Any:
    return SimpleNamespace(credential=credential, account_name="account", container_name="box", url="https://a/box")


async def test_tokens_are_renewed_before_they_end_and_when_refused() -> None:
    clock = Clock()
    credential = Credential(clock)
    authority = Authority(client_with(credential), now=clock)
    first = await authority()
    assert first[0] == ""
    assert first[1].startswith("authorization: Bearer ")
    assert first[1].endswith("\r\n")
    clock.seconds += 3299
    assert await authority() == first
    clock.seconds += 2
    second = await authority()
    assert second != first
    # Those that were refused meanwhile get what is there already.
    assert await authority(first) == second
    assert set(await asyncio.gather(*(authority(second) for _ in range(10)))) != {second}
    assert authority.renewals == 3
    assert credential.scopes == ["https://storage.azure.com/.default"] * 3


async def test_a_short_token_is_not_asked_for_with_every_request() -> None:
    clock = Clock()
    authority = Authority(client_with(Credential(clock, seconds=60)), now=clock)
    await authority()
    clock.seconds += 29
    await authority()
    assert authority.renewals == 1
    clock.seconds += 2
    await authority()
    assert authority.renewals == 2


async def test_signatures_are_renewed_before_they_end() -> None:
    clock = Clock()
    key = SimpleNamespace(account_key=base64.b64encode(b"key").decode())
    authority = Authority(client_with(key), now=clock)
    first = await authority()
    assert first[1] == ""
    assert "se=2001-09-09T02%3A46%3A41Z" in first[0]
    clock.seconds += 2999
    assert await authority() == first
    clock.seconds += 2
    assert await authority() != first


@pytest.mark.parametrize(
    ("raised", "kind"), [(ClientAuthenticationError("no account"), AccessError), (OSError("no network"), BackendError)]
)
async def test_a_credential_that_has_no_token(raised: Exception, kind: type[Exception]) -> None:
    credential = Credential()
    credential.failing = raised
    with pytest.raises(kind, match="no account|no network"):
        await Authority(client_with(credential))()


# Tokens over TLS.


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a certificate for the loopback address."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed: apt-get install -y openssl")
    directory = tmp_path_factory.mktemp("certificate")
    made, key = directory / "certificate.pem", directory / "key.pem"
    command = [program, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made, key


@pytest.fixture(scope="session")
def secure_server(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]) -> Iterator[Server]:
    """Run Azurite with TLS and tokens, and a container "bench"."""
    with running(lambda: azurite(tmp_path_factory.mktemp("secure"), in_memory=True, certificate=certificate)) as server:
        text = server.connection_string
        with ContainerClient.from_connection_string(text, "bench", connection_verify=str(certificate[0])) as client:
            client.create_container()
        yield server


@pytest.mark.keeps
async def test_a_token(agent: Agent, secure_server: Server, certificate: tuple[Path, Path], url: str) -> None:
    credential = Credential()
    options = {"account_url": secure_server.endpoint, "credential": credential, "verify": str(certificate[0])}
    await round_trip(agent, url, **options)
    assert len(credential.scopes) == 1
    store = await agent.store(url, block_threshold_nbytes=1 << 20, block_nbytes=1 << 20, range_nbytes=1 << 20, **options)
    sent, got = pattern(5 << 20), np.zeros(5 << 20, np.uint8)
    await agent.transfer(await agent.register(sent), store.object("large"))
    await agent.transfer(store.object("large"), await agent.register(got))
    assert_same(got, sent)


async def test_a_token_that_has_ended(agent: Agent, secure_server: Server, certificate: tuple[Path, Path], url: str) -> None:
    clock = Clock()
    credential = Credential(issued=clock)
    store = await agent.store(url, account_url=secure_server.endpoint, credential=credential, verify=str(certificate[0]))
    with pytest.raises(AccessError):
        await store.exists(["o"])
    # The server is asked again with a newer one, once.
    assert len(credential.scopes) == 2
    clock.seconds = time.time()
    assert await store.exists(["o"]) == [False]


async def test_a_server_that_we_cannot_trust(agent: Agent, secure_server: Server, url: str) -> None:
    text = secure_server.connection_string
    store = await agent.store(url, connection_string=text, attempts=1)
    with pytest.raises(BackendError, match="certificate verify failed"):
        await store.exists(["o"])
    assert await (await agent.store(url, connection_string=text, verify=False)).exists(["o"]) == [False]


@pytest.mark.keeps
async def test_the_default_credential(
    agent: Agent, secure_server: Server, certificate: tuple[Path, Path], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("azure.identity")
    asked: list[str] = []

    async def issue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Stand for the issuer that the platform has for managed identities (learn.microsoft.com, App Service, REST)."""
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        now = int(time.time())
        answer = {"access_token": token(now), "expires_on": str(now + 3600), "resource": "r", "token_type": "Bearer"}
        body = json.dumps(answer)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(issue, "127.0.0.1", 0) as issuer:
        port = issuer.sockets[0].getsockname()[1]
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{port}/msi/token")
        monkeypatch.setenv("IDENTITY_HEADER", "secret")
        monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
        options = {"account_url": secure_server.endpoint, "credential": "default", "verify": str(certificate[0])}
        await round_trip(agent, url, **options)
        await agent.aclose()
    assert len(asked) == 1
    assert "resource=https://storage.azure.com" in asked[0]
    assert "x-identity-header: secret" in asked[0].lower()


# Options.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a connection_string"),
        ({"connection_string": "Nonsense"}, "Connection string"),
        ({"account_url": "https://a.blob.core.windows.net", "checksum": "crc32"}, "checksum='crc32'; it must be"),
        ({"account_url": "https://a.blob.core.windows.net", "attempts": 0}, "attempts=0; it must be a positive integer"),
        ({"account_url": "https://a.blob.core.windows.net", "concurrency": "x"}, "concurrency='x'"),
        ({"account_url": "https://a", "account_key": "k", "sas_token": "s"}, "account_key and sas_token exclude each other"),
        ({"account_url": "https://a", "credential": "c2VjcmV0"}, "a string other than 'default'"),
        ({"account_url": "http://a.blob.core.windows.net", "credential": Credential()}, "only supported with HTTPS"),
        (
            {"account_url": "https://a.blob.core.windows.net", "credential": SimpleNamespace(get_token=len)},
            "azure.identity.aio",
        ),
    ],
)
async def test_options_that_make_no_sense(
    options: dict[str, Any], words: str, agent: Agent, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    if isinstance(options.get("credential"), SimpleNamespace):
        with pytest.raises(ConfigurationError, match=words):
            AzureBackend(**options)
        return
    with pytest.raises(ConfigurationError, match=words) as caught:
        await agent.store(url, **options)
    assert "c2VjcmV0" not in str(caught.value)


def test_a_stores_options_go_before_the_backends() -> None:
    both = with_options(AzureOptions(attempts=2, checksum="md5"), {"attempts": 7})
    assert both == replace(AzureOptions(), attempts=7, checksum="md5")


async def test_where_the_bytes_go_is_told(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, connection_string=azure_server.connection_string)
    told = str(agent.explain(await agent.register(np.zeros(10, np.uint8)), store.object("o", 10)))
    assert f"zero-copy HTTP to 127.0.0.1:{azure_server.port}" in told


async def test_nobody_is_there(agent: Agent, azure_server: Server, url: str, unused_tcp_port: int) -> None:
    text = azure_server.connection_string.replace(f":{azure_server.port}/", f":{unused_tcp_port}/")
    store = await agent.store(url, connection_string=text, attempts=2)
    with pytest.raises(BackendError, match="cannot connect"):
        await agent.transfer(await agent.register(np.zeros(10, np.uint8)), store.object("o"))


# Blobs.


async def test_a_container_that_does_not_exist(agent: Agent, azure_server: Server) -> None:
    store = await agent.store("az://nowhere/", connection_string=azure_server.connection_string)
    memory = await agent.register(np.zeros(10, np.uint8))
    for asking in (
        store.exists(["o"]),
        store.delete(["o"]),
        anext(aiter(store.list())),
        agent.transfer(memory, store.object("o")),
        agent.transfer(store.object("o"), memory),
    ):
        with pytest.raises(NotFoundError, match="ContainerNotFound"):
            await asking


async def test_a_conditional_put_in_blocks(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(
        url, connection_string=azure_server.connection_string, block_threshold_nbytes=1000, block_nbytes=1000
    )
    memory, other = await agent.register(pattern(10_000)), await agent.register(pattern(10_000, 1))
    await agent.transfer(memory, store.object("o", if_none_match=True))
    with pytest.raises(ConflictError, match="BlobAlreadyExists|ConditionNotMet"):
        await agent.transfer(other, store.object("o", if_none_match=True))
    got = np.zeros(10_000, np.uint8)
    await agent.transfer(store.object("o"), await agent.register(got))
    assert_same(got, pattern(10_000))


async def test_uploads_by_pieces_keep_to_a_size(azure_server: Server) -> None:
    backend = AzureBackend(connection_string=azure_server.connection_string, block_nbytes=1 << 20)
    async with Agent("pieces", backends=[backend, "memory"]) as agent:
        store = await agent.store("az://bench/")
        assert (await backend.upload(store.address, "o", 10 << 20)).piece_nbytes == 1 << 20
        assert (await backend.upload(store.address, "o", 10 << 20, max_piece_nbytes=1 << 16)).piece_nbytes == 1 << 16
        # No more than fifty thousand blocks.
        assert (await backend.upload(store.address, "o", 1 << 40, max_piece_nbytes=1 << 16)).piece_nbytes == 21_990_233


async def test_deleting_takes_snapshots_along(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, connection_string=azure_server.connection_string)
    await agent.transfer(await agent.register(pattern(10)), store.object("o"))
    with BlobClient.from_connection_string(azure_server.connection_string, "bench", f"{store.address.prefix}o") as blob:
        blob.create_snapshot()
    await store.delete(["o"])
    assert await store.exists(["o"]) == [False]


async def test_answers_are_the_sdks(agent: Agent, azure_server: Server, url: str) -> None:
    store = await agent.store(url, connection_string=azure_server.connection_string)
    await agent.transfer(await agent.register(pattern(77)), store.object("a b/ü&<>"))
    async with AsyncContainerClient.from_connection_string(azure_server.connection_string, "bench") as client:
        told = await client.get_blob_client(f"{store.address.prefix}a b/ü&<>").get_blob_properties()
    (listed,) = [found async for found in store.list()]
    assert listed == await store.stat("a b/ü&<>")
    assert listed.key == "a b/ü&<>"
    assert (listed.nbytes, listed.etag) == (77, told.etag.strip('"'))
    assert listed.modified == told.last_modified.timestamp()
    assert told.content_settings.content_type == "application/octet-stream"


async def test_long_listings(agent: Agent, azure_server: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(azure_data, "LISTED_AT_ONCE", 16)
    store = await agent.store(url, connection_string=azure_server.connection_string)
    names = [f"{i:03d}" for i in range(50)]
    await agent.transfer(await agent.register(pattern(500)), store.objects(names, 10))
    assert [found.key async for found in store.list()] == names
    assert [found.key async for found in store.list("01")] == names[10:20]
    # A reader who leaves early leaves nothing behind.
    listing = store.list()
    assert (await anext(listing)).key == "000"
    await listing.aclose()


def test_checksums_are_azures() -> None:
    # The check value of CRC-64/NVME is 0xAE8B14860A799888.
    assert base64.b64decode(azure_data.digest("crc64", [memoryview(b"1234"), memoryview(b"56789")])) == bytes.fromhex(
        "8898790a86148bae"
    )
    assert azure_data.digest("md5", [memoryview(b"12345"), memoryview(b"6789")]) == (
        base64.b64encode(bytes.fromhex("25f9e794323b453885f5181f1b624d0b")).decode()
    )


def test_names_of_blocks_are_of_one_length() -> None:
    names = {
        azure_data.block_name(mark, number) for mark in (azure_data.new_mark(), "f" * 16) for number in range(0, 50_000, 99)
    }
    assert len(names) == 2 * 506
    assert {len(name) for name in names} == {36}


@asynccontextmanager
async def tunnels(asked: list[str]) -> AsyncIterator[str]:
    """Run a proxy that knows CONNECT and nothing else; yield its URL."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.partition("\r\n")[0])
        host, _, port = head.split(" ")[1].rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        for one in (writer, far_writer):
            with contextlib.suppress(OSError):
                await one.wait_closed()

    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if tasks:
            await asyncio.wait(tasks, timeout=5)


async def test_https_goes_through_a_tunnel(
    agent: Agent, secure_server: Server, certificate: tuple[Path, Path], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    async with tunnels(asked) as proxy:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy)
        text, verify = secure_server.connection_string, str(certificate[0])
        await round_trip(agent, url, connection_string=text, verify=verify)
        assert set(asked) == {f"CONNECT 127.0.0.1:{secure_server.port} HTTP/1.1"}
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        n_asked = len(asked)
        await round_trip(agent, f"{url}more/", connection_string=text, verify=verify, read_timeout=59.0)
        assert len(asked) == n_asked
        await agent.aclose()
