"""The client against a real etcd: leases, many keys, passwords, TLS. Reads, writes and watches are in tests/compat/test_etcd.py."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixl_async.discovery.etcd_client import PAGE_ENTRIES, Etcd, LeaseLost
from nixl_async.discovery.etcd_store import EtcdStore
from nixl_async.discovery.store import StoreURL
from nixl_async.errors import BackendError
from tests.compat.etcd_server import INSTALL, EtcdServer, program

PATIENCE_SECONDS = 20.0


async def test_a_lease_takes_its_keys_with_it(etcd: EtcdServer) -> None:
    client = Etcd(etcd.url)
    async with asyncio.timeout(PATIENCE_SECONDS):
        lease = await client.grant(60)
        await client.put(b"/lease/a", b"1", lease=lease)
        await client.put(b"/lease/b", b"2", lease=lease)
        await client.put(b"/lease/b", b"3")
        await client.renew(lease)
        await client.revoke(lease)
        assert (await client.entries(b"/lease/"))[0] == {b"/lease/b": b"3"}
        with pytest.raises(LeaseLost):
            await client.renew(lease)
        with pytest.raises(LeaseLost):
            await client.put(b"/lease/a", b"1", lease=lease)
        await client.revoke(lease)


async def test_only_one_of_many_creates_a_key(etcd: EtcdServer) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        lease = await Etcd(etcd.url).grant(60)
        made = await asyncio.gather(*(Etcd(etcd.url).create(b"/create/a", b"%d" % n, lease=lease) for n in range(8)))
        assert sum(made) == 1
        assert (await Etcd(etcd.url).get(b"/create/a"))[0] == b"%d" % made.index(True)
        await Etcd(etcd.url).revoke(lease)
        assert await Etcd(etcd.url).create(b"/create/a", b"again")
        with pytest.raises(LeaseLost):
            await Etcd(etcd.url).create(b"/create/b", b"1", lease=lease)


async def test_a_lease_that_nobody_renews_ends(etcd: EtcdServer) -> None:
    client = Etcd(etcd.url)
    async with asyncio.timeout(PATIENCE_SECONDS):
        lease = await client.grant(1)
        await client.put(b"/short", b"1", lease=lease)
        _, revision = await client.get(b"/short")
        async with contextlib.aclosing(client.watch(b"/short", revision + 1)) as events:
            assert (await anext(events)).value is None


async def test_more_keys_than_one_answer_holds(etcd: EtcdServer) -> None:
    client = Etcd(etcd.url)
    wanted = {f"/many/{i}".encode(): str(i).encode() for i in range(PAGE_ENTRIES + 5)}
    async with asyncio.timeout(PATIENCE_SECONDS):
        for key, value in wanted.items():
            await client.put(key, value)
        found, revision = await client.entries(b"/many/")
        assert found == wanted
        assert revision > 0


async def test_a_password_is_sent_and_sent_again_after_a_restart(tmp_path: Path) -> None:
    if program() is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    server = EtcdServer(tmp_path)
    await asyncio.to_thread(server.start)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            admin = Etcd(server.url)
            await admin._call("auth/user/add", {"name": "root", "password": "secret"})
            await admin._call("auth/role/add", {"name": "root"})
            await admin._call("auth/user/grant", {"user": "root", "role": "root"})
            await admin._call("auth/enable", {})
            with pytest.raises(BackendError):
                await admin.put(b"/x", b"1")
            with pytest.raises(BackendError) as caught:
                await Etcd(server.url, user="root", password="wrong").put(b"/x", b"1")
            assert "wrong" not in str(caught.value)
            client = Etcd(server.url, user="root", password="secret")
            await client.put(b"/x", b"1")
            _, revision = await client.get(b"/x")
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            await client.put(b"/x", b"2")
            async with contextlib.aclosing(client.watch(b"/x", revision + 1)) as events:
                assert (await anext(events)).value == b"2"
            store = EtcdStore(StoreURL.parse(server.url.replace("http://", "etcd://root:secret@")))
            await store.put("a", b"1")
            async with contextlib.aclosing(store.watch()) as seen:
                assert (await anext(seen)).values == {"a": b"1"}
            await store.aclose()
    finally:
        await asyncio.to_thread(server.stop)


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@contextlib.asynccontextmanager
async def _tls_in_front(server: EtcdServer, certificates: Path) -> AsyncIterator[int]:
    where = server.url.removeprefix("http://").split(":")
    program = Path(__file__).with_name("tls_front.py")
    pipe = asyncio.subprocess.PIPE
    front = await asyncio.create_subprocess_exec(sys.executable, program, certificates, *where, stdout=pipe)
    try:
        assert front.stdout is not None
        yield int(await front.stdout.readline())
    finally:
        front.kill()
        await front.wait()


async def test_tls_with_certificates_of_both_sides(etcd: EtcdServer, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    # Python 3.13 takes no authority that does not say so (ssl.VERIFY_X509_STRICT).
    usage = ("-addext", "keyUsage=critical,digitalSignature,keyCertSign")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", *usage)
    ca, ca_key = tmp_path / "ca.pem", tmp_path / "ca.key"
    _openssl("req", "-x509", *key, "-subj", "/CN=authority", "-keyout", ca_key, "-out", ca)
    for name in ("server", "client"):
        more = ("-addext", "subjectAltName=IP:127.0.0.1", "-CA", ca, "-CAkey", ca_key)
        out = ("-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem")
        _openssl("req", "-x509", *key, "-subj", f"/CN={name}", *more, *out)
    async with _tls_in_front(etcd, tmp_path) as port, asyncio.timeout(PATIENCE_SECONDS):
        url = f"etcds://127.0.0.1:{port}/tls?ca={ca}"
        store = EtcdStore(StoreURL.parse(f"{url}&cert={tmp_path}/client.pem&key={tmp_path}/client.key"))
        await store.put("a", b"1")
        async with contextlib.aclosing(store.watch()) as seen:
            assert (await anext(seen)).values == {"a": b"1"}
        await store.aclose()
        for refused in (url, f"etcds://127.0.0.1:{port}/tls"):
            with pytest.raises((BackendError, OSError)):
                await EtcdStore(StoreURL.parse(refused)).put("a", b"1")
