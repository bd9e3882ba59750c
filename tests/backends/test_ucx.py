"""The ucx backend: what it tells peers is sealed, and UCX is the process's own."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent, BackendError, NixlError
from nixl_async.backend import Host, PeerInfo
from nixl_async.testing import assert_same, pattern
from tests.agents import ROOT, TOKEN, agent_process, known, two_agents

pytest.importorskip("ucxx")

from nixl_async.backends.ucx import UCXBackend


async def test_a_worker_address_with_any_bit_flipped_is_refused() -> None:
    random = np.random.default_rng(1)
    a = UCXBackend()
    await a.open(Host("a", "1", asyncio.get_running_loop()))
    try:
        sealed = a.describe()
        for at in random.integers(0, len(sealed) * 8, 50).tolist():
            broken = bytearray(sealed)
            broken[at // 8] ^= 1 << at % 8
            with pytest.raises(BackendError, match="malformed"):
                await a.connect(PeerInfo("b", "2", bytes(broken)))
        for end in range(0, len(sealed), 7):
            with pytest.raises(BackendError, match="malformed"):
                await a.connect(PeerInfo("b", "2", sealed[:end]))
    finally:
        await a.aclose()


async def test_a_key_with_a_bit_flipped_is_refused() -> None:
    async with two_agents(backends=["ucx"]) as (a, b, peer):
        await b.register(pattern(4096, 1), name="kv")
        await known(a, peer, "kv")
        here = await a.register(np.zeros(4096, np.uint8))
        remote = peer.region("kv")
        key = bytearray(remote.keys["ucx"])
        key[len(key) // 2] ^= 1
        remote.keys["ucx"] = bytes(key)
        with pytest.raises(NixlError):
            await a.transfer(here, remote)


async def test_read_only_memory_goes_by_another_route() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, backends=["ucx", "tcp"]) as near:
        here = await near.register(bytes(pattern(1 << 20, 9)), name="constant")
        remote = (await near.connect(far.address)).region("memory")
        assert set(here.keys) == {"tcp"}
        got = np.zeros(1 << 20, np.uint8)
        await near.transfer(here, remote, backend="tcp")
        await near.transfer(remote, await near.register(got), backend="ucx")
        assert_same(got, pattern(1 << 20, 9))


def test_one_libucp_is_loaded_and_the_memory_cache_stays_as_the_user_had_it() -> None:
    program = (
        "import os, asyncio\n"
        "from nixl_async.backends.ucx import UCXBackend; from nixl_async.backend import Host\n"
        "async def main():\n"
        "    backend = UCXBackend(); await backend.open(Host('a', '1', asyncio.get_running_loop()))\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    await backend.aclose()\n"
        "    return len({line.split()[-1] for line in maps.splitlines() if '/libucp' in line})\n"
        "copies = asyncio.run(main())\n"
        "print(copies, os.environ.get('UCX_MEMTYPE_CACHE'))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UCX_")}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    # ucxx switches it off while it is imported, for the sake of allocators that we do not use.
    assert ran.stdout.splitlines()[-1] == "1 None", ran.stdout


def test_the_system_s_ucx_is_taken_where_the_user_prefers_it(tmp_path: Path) -> None:
    """The system's installation here is a copy of the wheel's libraries, found as the loader finds every other."""
    libraries = Path(pytest.importorskip("libucx").__file__).parent / "lib"
    for file in libraries.glob("lib*.so.0"):
        shutil.copy(file, tmp_path / file.name)
        (tmp_path / file.name.removesuffix(".0")).symlink_to(file.name)
    (tmp_path / "ucx").symlink_to(libraries / "ucx")
    program = (
        "import asyncio, numpy as np\n"
        "from nixl_async import Agent\n"
        "async def main():\n"
        "    source, target = np.arange(1 << 20, dtype=np.uint8), np.zeros(1 << 20, np.uint8)\n"
        "    options = dict(backends=['ucx'], authenticate=False)\n"
        "    async with Agent('a', **options) as a, Agent('b', **options) as b:\n"
        "        await b.register(target, name='kv')\n"
        "        peer = await a.connect(await b.serve('127.0.0.1', 0))\n"
        "        await a.transfer(await a.register(source), peer.region('kv'))\n"
        "        assert (source == target).all()\n"
        "    maps = open('/proc/self/maps').read()\n"
        "    print(*{line.split()[-1] for line in maps.splitlines() if '/libucp' in line})\n"
        "asyncio.run(main())"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY": "true"}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(tmp_path / "libucp.so.0")
