"""The ucx backend: what it tells peers is sealed, and UCX is the process's own."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent, BackendError, NixlError, RegistrationError
from nixl_async.backend import Host, PeerInfo
from nixl_async.cuda import DeviceBytes, device_count
from nixl_async.descriptors import MemoryKind, make_plan
from nixl_async.testing import Canary, assert_same, pattern
from tests.agents import ROOT, TOKEN, agent_process, known, two_agents

pytest.importorskip("ucxx")

from nixl_async.backends.ucx import UCXBackend, _seal, loaded_library
from nixl_async.backends.ucx_lanes import RDMA_RANK

CARD = "rc_mlx5 mlx5_0:1\nrc_mlx5 mlx5_1:1\ntcp eth0\n"
"""What UCX says of an endpoint where there are RDMA cards; there are none where this was written."""


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


@pytest.mark.skipif(device_count() > 0, reason="tests/gpu/test_vram_gpu.py has the ones with a device")
async def test_a_device_s_memory_without_cuda_is_refused_by_name() -> None:
    memory = pattern(4096, 1)
    async with two_agents(backends=["ucx"]) as (a, b, peer):
        with pytest.raises(RegistrationError, match="ucx: this UCX takes no VRAM: it was built without CUDA"):
            await a.register(DeviceBytes(memory.ctypes.data, 4096))
        here = await a.register(memory)
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        remote = peer.region("kv")
        remote.kind = MemoryKind.VRAM
        assert "takes no VRAM" in a.explain(here, remote).refusals["ucx"]


async def test_read_only_memory_goes_by_another_route() -> None:
    async with agent_process("far") as far, Agent("near", token=TOKEN, backends=["ucx", "tcp"]) as near:
        here = await near.register(bytes(pattern(1 << 20, 9)), name="constant")
        remote = (await near.connect(far.address)).region("memory")
        assert set(here.keys) == {"tcp"}
        got = np.zeros(1 << 20, np.uint8)
        await near.transfer(here, remote, backend="tcp")
        await near.transfer(remote, await near.register(got), backend="ucx")
        assert_same(got, pattern(1 << 20, 9))


@pytest.mark.parametrize("put", [True, False], ids=["put", "get"])
async def test_packed_pages_are_checked_by_the_side_that_owns_the_memory(put: bool) -> None:
    async with two_agents(backends=["ucx"]) as (a, b, peer):
        memory = pattern(1 << 20, 1)
        await b.register(memory, name="kv")
        await b.register(np.zeros(1 << 20, np.uint8), name="other")
        await known(a, peer, "other")
        mine = pattern(1 << 20, 2)
        here, there = await a.register(mine), peer.region("kv")
        while "packed" not in a.explain(here, there).how:
            # The other side greets once its endpoint is there.
            await asyncio.sleep(0)
        order = np.random.default_rng(3).permutation(256)
        canary, own = Canary(memory), Canary(mine)

        async def move(pages: np.ndarray) -> None:
            sides = here.pages(order[: len(pages)], 4096), there.pages(pages, 4096)
            await a.transfer(*(sides if put else sides[::-1]))

        there.nbytes *= 2
        with pytest.raises(BackendError, match="Invalid parameter"):
            await move(np.arange(255, 257))
        there.nbytes //= 2
        key = there.keys["ucx"]
        there.keys["ucx"] = _seal(key[:-16] + bytes(8))
        with pytest.raises(BackendError, match="Invalid parameter"):
            await move(order)
        there.keys["ucx"] = key
        canary.check()
        own.check()
        await move(order[::-1])
        theirs, ours = memory.reshape(256, 4096), mine.reshape(256, 4096)
        assert_same(theirs[order[::-1]].ravel(), ours[order].ravel())


@pytest.mark.parametrize("put", [True, False], ids=["put", "get"])
async def test_pieces_of_any_size_of_many_regions_are_packed(put: bool) -> None:
    random = np.random.default_rng(5)
    async with two_agents(backends=["ucx"]) as (a, b, peer):
        ours, theirs = [pattern(1 << 18, i) for i in range(4)], [pattern(1 << 18, 10 + i) for i in range(4)]
        for i, memory in enumerate(theirs):
            await b.register(memory, name=f"layer-{i}")
        await known(a, peer, "layer-3")
        src, dst, expected = [], [], []
        for i, memory in enumerate(ours):
            cuts = np.unique(np.concatenate(([0, 1 << 18], random.integers(0, 1 << 18, 700))))
            starts, lengths = cuts[:-1], np.diff(cuts)
            order = random.permutation(len(starts))
            src.append((await a.register(memory)).ranges(starts[order], lengths[order]))
            dst.append(peer.region(f"layer-{i}").ranges(starts[order], lengths[order]))
            expected.append((memory if put else theirs[i]).copy())
        await a.transfer(*((src, dst) if put else (dst, src)))
        for memory, wanted in zip(theirs if put else ours, expected, strict=True):
            assert_same(memory, wanted)


@pytest.mark.parametrize("page", [4096, 1 << 20], ids=["packed", "one-sided"])
async def test_what_a_stopped_peer_does_not_answer_can_be_cancelled(page: int) -> None:
    async with agent_process("far", nbytes=8 << 20, backends=["ucx"]) as far:
        async with Agent("near", token=TOKEN, backends=["ucx"]) as near:
            got = np.zeros(8 << 20, np.uint8)
            here, remote = await near.register(got), (await near.connect(far.address)).region("memory")
            order = np.random.default_rng(1).permutation((8 << 20) // page)
            await near.transfer(remote.pages(order, page), here.pages(order, page))
            far.stop()
            async with asyncio.timeout(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await near.transfer(remote.pages(order, page), here.pages(order, page))
            canary = Canary(got)
            far.resume()
        canary.check()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "sending"])
async def test_parting_from_a_stopped_peer_takes_a_moment(busy: bool) -> None:
    async with agent_process("far", backends=["ucx"]) as far, Agent("near", token=TOKEN, backends=["ucx"]) as near:
        await near.connect(far.address)
        far.stop()
        backend = near._backends["ucx"]
        sending = [asyncio.ensure_future(backend.send_notification("far", bytes(1 << 16))) for _ in range(20 * busy)]
        await asyncio.sleep(0)
        async with asyncio.timeout(4):
            await backend.disconnect("far")
            await asyncio.gather(*sending, return_exceptions=True)
        far.resume()
        # Nothing is left of it: the two meet again.
        await near.disconnect("far")
        peer = await near.connect(far.address)
        got = np.zeros(1 << 20, np.uint8)
        await near.transfer(peer.region("memory"), await near.register(got))
        assert_same(got, pattern(1 << 20, 1))


async def test_the_lanes_are_those_that_ucx_has_chosen() -> None:
    async with agent_process("far", backends=["tcp", "ucx"]) as far, Agent("near", token=TOKEN, backends=["ucx"]) as near:
        remote = (await near.connect(far.address)).region("memory")
        lanes = near._backends["ucx"]._peers["far"].lanes  # type: ignore[attr-defined]
        assert lanes
        here = await near.register(np.zeros(1 << 20, np.uint8))
        explained = near.explain(remote, here)
        assert explained.how.startswith(", ".join(f"{transport} on {device}" for transport, device in lanes) + "; one-sided")
        devices = dict(lanes)
        # This machine's own words for them, as in `ip link`.
        assert "tcp" not in devices or (Path("/sys/class/net") / devices["tcp"]).exists()


@pytest.mark.parametrize("lanes", [CARD, ""], ids=["rdma", "as-it-is"])
async def test_ucx_comes_before_tcp_towards_peers_that_it_reaches_by_rdma(lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = UCXBackend._ask_lanes
    monkeypatch.setattr(UCXBackend, "_ask_lanes", lambda self, pointer: lanes or asked(self, pointer))
    async with agent_process("far", backends=["tcp", "ucx"]) as far, Agent("near", token=TOKEN) as near:
        remote = (await near.connect(far.address)).region("memory")
        got = np.zeros(1 << 20, np.uint8)
        here = await near.register(got)
        explained = near.explain(remote, here)
        found = near._backends["ucx"]._peers["far"].lanes  # type: ignore[attr-defined]
        rdma = bool(lanes) or any(transport.startswith(("rc_", "dc_", "ud_")) for transport, _ in found)
        assert explained.routes == (("ucx", "tcp") if rdma else ("tcp", "ucx"))
        if lanes:
            assert explained.how.startswith("rc_mlx5 on mlx5_0:1, rc_mlx5 on mlx5_1:1, tcp on eth0; one-sided")
        assert f"{found[0][0]} on {found[0][1]}" in explained.ways["ucx"]
        assert (await near.prepare(remote, here)).routes == explained.routes
        assert (await near.transfer(remote, here)).route == explained.routes[0]
        assert_same(got, pattern(1 << 20, 1))
        # A transfer chooses for itself.
        assert (await near.transfer(remote, here, backend="tcp")).route == "tcp"


async def test_other_lanes_change_the_order_of_what_is_routed_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [CARD]
    monkeypatch.setattr(UCXBackend, "_ask_lanes", lambda self, pointer: told[0])
    async with agent_process("far", backends=["tcp", "ucx"]) as far, Agent("near", token=TOKEN) as near:
        remote = (await near.connect(far.address)).region("memory")
        here = await near.register(np.zeros(1 << 20, np.uint8))
        prepared = await near.prepare(remote, here)
        backend = near._backends["ucx"]
        assert isinstance(backend, UCXBackend)
        assert (await near.transfer(remote, here)).route == "ucx"
        told[0] = "tcp eth0\n"
        backend._take_lanes(backend._peers["far"].number)
        assert (await near.transfer(remote, here)).route == "tcp"
        # What was prepared keeps its routes.
        assert (await near.transfer(prepared)).route == "ucx"
        # An endpoint that is made again is asked again.
        told[0] = CARD
        await backend.disconnect("far")
        await backend.connect(near._membership.peers["far"].infos["ucx"])
        assert near.explain(remote, here).routes == ("ucx", "tcp")


@pytest.mark.parametrize("peermem", [False, True], ids=["cards-without-vram", "cards-with-vram"])
async def test_vram_goes_by_the_cards_where_they_reach_it(
    peermem: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(UCXBackend, "_ask_lanes", lambda self, pointer: CARD)
    monkeypatch.setattr("nixl_async.backends.ucx.PEERMEM", (str(tmp_path if peermem else tmp_path / "none"),))
    async with two_agents(backends=["ucx"]) as (a, b, peer):
        await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        here, remote, backend = await a.register(pattern(4096, 1)), peer.region("kv"), a._backends["ucx"]
        plan = make_plan(here, remote)
        assert backend.rank_for(plan.src, plan.dst) == RDMA_RANK
        remote.kind = MemoryKind.VRAM
        plan = make_plan(here, remote)
        assert backend.rank_for(plan.src, plan.dst) == (RDMA_RANK if peermem else UCXBackend.rank)


LOGGING = (
    "import asyncio, os, numpy as np\n"
    "from nixl_async import Agent, NixlError\n"
    "from tests.agents import TOKEN, agent_process\n"
    "async def main():\n"
    "    async with Agent('near', token=TOKEN, backends=['ucx']) as near, agent_process('far', backends=['ucx']) as far:\n"
    "        await near.connect(far.address)\n"
    "        backend, info = near._backends['ucx'], near._membership.peers['far'].infos['ucx']\n"
    "        await far.end()\n"
    "        await backend.disconnect('far')\n"
    "        try:\n"
    "            await backend.connect(info)\n"
    "            await backend.send_notification('far', b'are you there?')\n"
    "        except NixlError as error:\n"
    "            print('error:', error)\n"
    "asyncio.run(main())\n"
    "print('left:', sorted({'UCX_LOG_FILE', 'UCX_RNDV_THRESH', 'UCX_MEMTYPE_CACHE'} & set(os.environ)))"
)


@pytest.mark.parametrize("chosen", [None, "stdout"], ids=["ours", "the-user-s"])
def test_ucx_s_log_goes_where_the_user_wants_it_and_never_to_standard_output_by_itself(chosen: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UCX_")}
    environment |= {} if chosen is None else {"UCX_LOG_FILE": chosen}
    ran = subprocess.run(
        [sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    lines = ran.stdout.splitlines()
    # A peer that was killed and is tried again: UCX says so, and so does the error.
    assert [line for line in lines if line.startswith("error: peer 'far'")]
    printed, said = (" UCX  " in text for text in (ran.stdout, ran.stderr))
    assert (printed, said) == ((False, True) if chosen is None else (True, False))
    # What the program starts has the environment that its user has made.
    assert lines[-1] == f"left: {[] if chosen is None else ['UCX_LOG_FILE']}"


def test_the_library_that_is_loaded_tells_its_version_and_its_file() -> None:
    version, path = loaded_library()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libucp" in line}
    assert {str(Path(path).resolve())} == {str(Path(one).resolve()) for one in maps}


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
