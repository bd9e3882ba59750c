"""Agents that find each other through a real etcd: the drop-in's, NIXL's own, and one of each."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixl_async.discovery.etcd_client import CompactedError, Etcd, Event
from nixl_async.errors import BackendError, ConfigurationError
from nixl_async.testing.servers import free_ports
from tests.compat.etcd_server import INSTALL, EtcdServer, program
from tests.compat.test_behaviours import NIXL_PYTHON, dropin, names, needs_nixl, run
from tests.stores import etcd_running

FILE, COMMON = "through_etcd.py", "through_store.py"
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_running(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def ours(etcd: EtcdServer) -> dict[str, str]:
    return dropin(FILE, NIXL_ETCD_ENDPOINTS=etcd.url)


@pytest.fixture(scope="module")
def stock(etcd: EtcdServer) -> dict[str, str]:
    return run(FILE, python=NIXL_PYTHON, NIXL_PYTHON=NIXL_PYTHON, NIXL_ETCD_ENDPOINTS=etcd.url)


@pytest.fixture(scope="module")
def mixed(etcd: EtcdServer) -> dict[str, str]:
    return dropin(FILE, NIXL_PYTHON=NIXL_PYTHON, NIXL_ETCD_ENDPOINTS=etcd.url)


@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_drop_in_agents(name: str, ours: dict[str, str]) -> None:
    assert not ours[name], ours[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_nixl_agents(name: str, stock: dict[str, str]) -> None:
    assert not stock[name], stock[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", names(FILE) + names(COMMON))
def test_a_drop_in_agent_and_one_of_nixl(name: str, mixed: dict[str, str]) -> None:
    assert not mixed[name], mixed[name]


@pytest.mark.parametrize("place", ["named", "home"])
def test_settings_come_from_a_file(etcd: EtcdServer, tmp_path: Path, place: str) -> None:
    file = tmp_path / ".nixl.cfg"
    file.write_text(f'NIXL_ETCD_ENDPOINTS = "{etcd.url}"\nNIXL_ETCD_NAMESPACE = "/another/"\n')
    variables = {"NIXL_CONFIG_FILE": str(file)} if place == "named" else {"HOME": str(tmp_path)}
    (failure,) = dropin(FILE, "an_agent_is_fetched_by_its_name", **variables).values()
    assert not failure, failure


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    file = tmp_path / "wrong.cfg"
    file.write_text("no toml")
    (failure,) = dropin(FILE, "an_agent_is_fetched_by_its_name", NIXL_CONFIG_FILE=str(file)).values()
    assert "ConfigurationError: NIXL's settings cannot be read from" in failure


async def test_keys_are_put_got_watched_and_deleted(etcd: EtcdServer) -> None:
    client = Etcd(f"http://127.0.0.1:{free_ports(1)[0]},{etcd.url}")
    key, binary = b"/keys/a/\xff", bytes(range(256)) * 4096
    assert (await client.get(key))[0] is None
    _, revision = await client.get(key)
    seen: list[Event] = []

    async def watch() -> None:
        async for event in client.watch(b"/keys/a/", revision + 1, prefix=True):
            seen.append(event)
            if event.value is None:
                return

    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        group.create_task(watch())
        await client.put(key, binary)
        await client.put(b"/keys/b", b"")
        assert (await client.get(key))[0] == binary
        assert await client.delete_prefix(b"/keys/a/") == 1
    assert [(one.key, one.value) for one in seen] == [(key, binary), (key, None)]
    assert (await client.get(b"/keys/b"))[0] == b""
    assert await client.delete_prefix(b"/keys/") == 1


async def test_a_watch_from_a_forgotten_revision_says_so(etcd: EtcdServer) -> None:
    client = Etcd(etcd.url)
    await client.put(b"/old", b"1")
    _, revision = await client.get(b"/old")
    await client.put(b"/old", b"2")
    await client._call("kv/compaction", {"revision": str(revision + 1), "physical": True})
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(CompactedError) as caught:
            await anext(client.watch(b"/old", revision))
    assert caught.value.revision == revision + 1


async def test_what_is_no_etcd() -> None:
    for wrong in ("", " , ", "ftp://host", "http://", "http://host:0", "http://host:port"):
        with pytest.raises(ConfigurationError):
            Etcd(wrong)
    with pytest.raises(BackendError, match="no etcd server can be reached"):
        await Etcd(f"127.0.0.1:{free_ports(1)[0]}").get(b"x")

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html>\n")
        writer.close()

    async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
        with pytest.raises(BackendError, match="<html>"):
            await Etcd(f"127.0.0.1:{server.sockets[0].getsockname()[1]}").get(b"x")


def test_agents_outlive_a_restart_of_etcd(tmp_path: Path) -> None:
    if program() is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    server = EtcdServer(tmp_path)
    server.start()
    # The agents' process asks for it by a line, and goes on at the next.
    ask, answer = os.pipe(), os.pipe()

    def restart() -> None:
        assert os.read(ask[0], 1) == b"?"
        server.stop()
        server.start()
        os.write(answer[1], b"!")

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        (failure,) = dropin(
            "etcd_restart.py", NIXL_ETCD_ENDPOINTS=server.url, COMPAT_PIPE=f"{ask[1]},{answer[0]}", fds=(ask[1], answer[0])
        ).values()
        assert not failure, failure
    finally:
        os.close(ask[1])
        thread.join()
        for fd in (ask[0], *answer):
            os.close(fd)
        server.stop()
