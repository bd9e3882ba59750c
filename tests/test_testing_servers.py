"""The real servers start, answer, and are gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from nixl_async import ConfigurationError, MissingDependency
from nixl_async.testing import servers
from nixl_async.testing.servers import Server, azurite, free_ports, gcs_emulator, juicefs, nginx_dav, seaweedfs

Starts = Callable[[Path], AbstractAsyncContextManager[Server]]

STARTS: dict[str, Starts] = {
    "seaweedfs": seaweedfs,
    "juicefs": juicefs,
    "azurite": azurite,
    "azurite-memory": partial(azurite, in_memory=True),
    "gcs": gcs_emulator,
    "nginx": nginx_dav,
}


@asynccontextmanager
async def started(name: str, directory: Path) -> AsyncIterator[Server]:
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = await stack.enter_async_context(STARTS[name](directory))
        except MissingDependency as missing:
            pytest.skip(str(missing))
        yield server


async def ask(server: Server, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


def listeners(pid: int) -> set[str]:
    """Return the addresses, in hexadecimal, at which the process group of `pid` listens."""
    inodes = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(entry)) == pid:
                inodes |= {os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def gone(pid: int) -> bool:
    """Tell whether no process of the group is left."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("name", STARTS)
async def test_a_server_starts_answers_and_stops(name: str, tmp_path: Path) -> None:
    async with started(name, tmp_path) as server:
        assert server.process.pid == server.pid
        assert server.endpoint.startswith(f"http://127.0.0.1:{server.port}")
        status, _ = await ask(server, "GET", "/")
        assert 200 <= status < 500
        # Nobody else on the network can reach it.
        assert listeners(server.pid) == {"0100007F"}
        assert server.log.parent == tmp_path
    assert gone(server.pid)
    assert server.process.returncode is not None


@pytest.fixture
def session() -> Any:
    session = pytest.importorskip("aiobotocore.session").get_session()
    # Not on the loop: botocore reads the models of S3 for half a second, once for each session.
    loader = session.get_component("data_loader")
    for kind in ("service-2", "endpoint-rule-set-1", "paginators-1", "waiters-2"):
        loader.load_service_model("s3", kind)
    return session


@pytest.mark.parametrize("bucket", ["kv", "", "KV-cache", "kv_cache", "-kv-", "k" * 64])
@pytest.mark.parametrize("serve", [seaweedfs, juicefs, gcs_emulator], ids=lambda serve: serve.__name__)
async def test_a_bucket_that_cannot_be_is_refused_at_once(serve: Any, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3 to 63"):
        async with serve(tmp_path, bucket=bucket):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["seaweedfs", "juicefs"])
async def test_s3_has_its_bucket_and_knows_its_keys(session: Any, name: str, tmp_path: Path) -> None:
    config = pytest.importorskip("botocore.config").Config(s3={"addressing_style": "path"})
    failed = pytest.importorskip("botocore.exceptions").ClientError
    async with started(name, tmp_path) as server:

        def client(secret: str) -> AbstractAsyncContextManager[Any]:
            keys = {"aws_access_key_id": server.key_id, "aws_secret_access_key": secret}
            return session.create_client(  # type: ignore[no-any-return]
                "s3", endpoint_url=server.endpoint, region_name=server.region, config=config, **keys
            )

        async with client(server.secret) as s3:
            await s3.put_object(Bucket=server.bucket, Key="a/b", Body=b"x" * 100_000)
            got = await s3.get_object(Bucket=server.bucket, Key="a/b", Range="bytes=10-19")
            async with got["Body"] as body:
                assert await body.read() == b"x" * 10
        async with client("wrong") as s3:
            with pytest.raises(failed, match="SignatureDoesNotMatch"):
                await s3.get_object(Bucket=server.bucket, Key="a/b")


@pytest.fixture
def blob() -> ModuleType:
    # Not on the loop: the import takes a while.
    pytest.importorskip("aiohttp")
    return cast("ModuleType", pytest.importorskip("azure.storage.blob.aio"))


@pytest.mark.parametrize("name", ["azurite", "azurite-memory"])
async def test_azurite_takes_its_connection_string(blob: ModuleType, name: str, tmp_path: Path) -> None:
    async with (
        started(name, tmp_path) as server,
        blob.BlobServiceClient.from_connection_string(server.connection_string) as client,
    ):
        container = await client.create_container("bench")
        await container.upload_blob("a", b"bytes")
        assert await (await container.download_blob("a")).readall() == b"bytes"


async def test_the_gcs_emulator_has_its_bucket(tmp_path: Path) -> None:
    async with started("gcs", tmp_path) as server:
        assert (await ask(server, "GET", "/storage/v1/b/bench"))[0] == 200
        assert (await ask(server, "GET", "/storage/v1/b/other"))[0] == 404


async def test_nginx_keeps_what_is_put(tmp_path: Path) -> None:
    async with started("nginx", tmp_path) as server:
        body = bytes(range(256)) * 20_000
        assert (await ask(server, "PUT", "/a/b/c", body))[0] == 201
        assert await ask(server, "GET", "/a/b/c") == (200, body)
        assert (await ask(server, "DELETE", "/a/b/c"))[0] == 204
        assert (await ask(server, "GET", "/a/b/c"))[0] == 404


async def test_a_server_that_was_killed_or_stopped_already(tmp_path: Path) -> None:
    async with started("nginx", tmp_path) as server:
        server.kill()
        await server.process.wait()
        await server.stop()
        server.kill()
    async with started("nginx", tmp_path) as server:
        server.freeze()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                # The workers hold the listening socket: the connection is made, and nobody answers.
                await ask(server, "GET", "/")
        server.thaw()
        assert (await ask(server, "GET", "/"))[0] == 403
        server.freeze()
    assert gone(server.pid)


async def sleeper(directory: Path, program: str) -> asyncio.subprocess.Process:
    process = await servers._start([sys.executable, "-c", program], directory, {})
    for _ in range(2000):
        if b"up" in (directory / "server.log").read_bytes():
            break
        await asyncio.sleep(0.01)
    return process


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


async def test_what_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.2)
    process = await sleeper(tmp_path, STUBBORN)
    await servers._end(process)
    assert process.returncode == -9
    assert gone(process.pid)


async def test_a_cancelled_stop_kills(tmp_path: Path) -> None:
    process = await sleeper(tmp_path, STUBBORN)
    task = asyncio.create_task(servers._end(process))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(process.pid)


async def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import asyncio, os, sys; from pathlib import Path; from nixl_async.testing import servers\n"
        "async def main():\n"
        "    process = await servers._start(['sleep', '60'], Path(sys.argv[1]), {})\n"
        "    print(process.pid, flush=True)\n"
        # Long enough for the child to have asked the kernel for it.
        "    await asyncio.sleep(0.5)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    pipe = asyncio.subprocess.PIPE
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path), stdout=pipe)
    said, _ = await starter.communicate()
    for _ in range(250):
        if (state := _state(int(said))) in ("", "Z"):
            break
        await asyncio.sleep(0.02)
    assert state in ("", "Z")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize(
    "program", ["print('no', 'room'); raise SystemExit(3)", "import time; print('no room'); time.sleep(60)"]
)
async def test_a_failed_start_shows_the_log(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "START_SECONDS", 2.0)
    command = [sys.executable, "-u", "-c", program]
    (port,) = free_ports(1)
    with pytest.raises(RuntimeError, match="no room"):
        async with servers._running("it", command, tmp_path, port, bucket=""):
            pass


@pytest.mark.parametrize("name", STARTS)
async def test_a_missing_program_is_named_with_its_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **options: None)
    monkeypatch.setenv("NIXL_ASYNC_NODE_MODULES", str(tmp_path))
    monkeypatch.delenv("NIXL_ASYNC_GCS_EMULATOR", raising=False)
    with pytest.raises(MissingDependency, match="install"):
        async with STARTS[name](tmp_path):
            pass


def test_ports_and_their_twins_are_free_and_different() -> None:
    found = free_ports(20, twins=True)
    assert len({*found, *(port + servers.TWIN for port in found)}) == 40
