"""Promise 7: bad input is refused before anything moves, by an error that names the value and what was allowed."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from nixl_async import (
    Agent,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    NixlError,
    NotFoundError,
    PeerLost,
    RegistrationError,
)
from nixl_async.testing import pattern
from tests.agents import TOKEN, two_agents


class OnDevice:
    __cuda_array_interface__: ClassVar[dict[str, Any]] = {
        "shape": (10,),
        "typestr": "|u1",
        "data": (1 << 40, False),
        "version": 3,
    }


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda r: r.pages([100], 4096), DescriptorError, "100"),
        (lambda r: r.pages([-1], 4096), DescriptorError, "-1"),
        (lambda r: r.pages([0], 0), DescriptorError, "page_nbytes"),
        (lambda r: r.pages([0], -4096), DescriptorError, "-4096"),
        (lambda r: r.pages([0], 1 << 62), DescriptorError, "holds 0 pages"),
        (lambda r: r.pages([2**62], 4096), DescriptorError, str(2**62)),
        (lambda r: r.pages([0.5], 4096), TypeError, "integers, not float64"),
        (lambda r: r.pages(np.array(["a"]), 4096), TypeError, "integers, not <U1"),
        (lambda r: r.pages(np.array([2**63], np.uint64), 4096), DescriptorError, str(2**63)),
        (lambda r: r.ranges([-8], 8), DescriptorError, "-8"),
        (lambda r: r.ranges([8188], 8), DescriptorError, "ends at byte 8196"),
        (lambda r: r.ranges([0, 1], [1, 2, 3]), DescriptorError, "2 offsets but 3"),
        (lambda r: r.ranges([2**63 - 1], 8), DescriptorError, str(2**63 - 1)),
    ],
)
async def test_descriptors(make: Any, error: type[Exception], text: str) -> None:
    async with Agent("a", backends=["memory"]) as a:
        region = await a.register(np.zeros(8192, np.uint8))
        with pytest.raises(error, match=text):
            make(region)


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros(0, np.uint8),
        np.zeros((4, 4), np.uint8)[:, ::2],
        b"",
        "text",
        None,
        42,
        [1, 2, 3],
        np.array([object()]),
        memoryview(bytearray(8))[::2],
    ],
    ids=["nothing", "strides", "no bytes", "text", "None", "a number", "a list", "objects", "a view with strides"],
)
async def test_memory_that_cannot_be_registered(memory: Any) -> None:
    async with Agent("a", backends=["memory"]) as a:
        with pytest.raises(RegistrationError):
            await a.register(memory)
        assert a.statistics().regions == 0


async def test_cuda_memory_is_refused_by_an_error() -> None:
    async with Agent("a", token=TOKEN) as a:
        with pytest.raises(RegistrationError, match="VRAM"):
            await a.register(OnDevice())


async def test_sides_that_do_not_fit_together() -> None:
    async with two_agents() as (a, b, peer):
        mine, theirs = np.zeros(8192, np.uint8), np.zeros(8192, np.uint8)
        here = await a.register(mine)
        events = a.membership()
        await b.register(theirs, name="theirs")
        await anext(events)
        remote = peer.region("theirs")
        for src, dst in ((here[:100], remote[:101]), (here, remote[:1]), ([here[:1], here[:2]], remote[:4])):
            with pytest.raises(DescriptorError, match="bytes"):
                await a.transfer(src, dst)
        with pytest.raises(NixlError):
            await a.transfer(remote, remote)
        with pytest.raises((DescriptorError, TypeError)):
            await a.transfer(mine, remote)  # type: ignore[arg-type]
        assert not theirs.any()


async def test_read_only_memory_is_no_destination() -> None:
    async with Agent("a", backends=["memory"]) as a:
        src = await a.register(np.zeros(8, np.uint8))
        dst = await a.register(b"constant")
        with pytest.raises(DescriptorError, match="read-only"):
            await a.transfer(src, dst)
        await a.transfer(dst, src)


async def test_memory_that_is_gone() -> None:
    async with two_agents() as (a, b, peer):
        here = await a.register(pattern(64, 1))
        events = a.membership()
        there = await b.register(np.zeros(64, np.uint8), name="theirs")
        await anext(events)
        remote = peer.region("theirs")
        await there.aclose()
        assert (await anext(events)).kind == "regions"
        with pytest.raises(ClosedError, match="theirs"):
            await a.transfer(here, remote)
        with pytest.raises(NotFoundError, match="theirs"):
            peer.region("theirs")
        await here.aclose()
        with pytest.raises(ClosedError, match="deregistered"):
            await a.transfer(here, here)
        await b.register(np.zeros(64, np.uint8), name="fresh")
        await anext(events)
        remote = peer.region("fresh")
        await a.disconnect(peer)
        with pytest.raises(PeerLost):
            await a.transfer(await a.register(pattern(64, 1)), remote)


async def test_names_that_nobody_has() -> None:
    async with two_agents() as (a, _, peer):
        here = await a.register(pattern(64, 1))
        with pytest.raises(PeerLost, match="stranger"):
            await a.peer("stranger")
        with pytest.raises(PeerLost, match="stranger"):
            await a.notify("stranger", b"")
        with pytest.raises(NotFoundError, match="nowhere"):
            peer.region("nowhere")
        with pytest.raises(ConfigurationError, match="warp"):
            await a.transfer(here, here, backend="warp")
        with pytest.raises(ConfigurationError, match="registered already"):
            await a.register(pattern(64, 1), name=here.name)
    with pytest.raises(ConfigurationError, match="warp"):
        await Agent("b", backends=["warp"]).__aenter__()


@pytest.mark.parametrize("payload", ["text", 5, None, [1]])
async def test_payloads_that_are_no_bytes(payload: Any) -> None:
    async with two_agents() as (a, _, peer):
        with pytest.raises(TypeError, match="bytes"):
            await a.notify(peer, payload)


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", "localhost:x", "localhost:0", "localhost:70000", "", ("h", -1), 5]
)
async def test_addresses_that_are_none(address: Any) -> None:
    async with Agent("a", token=TOKEN) as a:
        with pytest.raises((ConfigurationError, PeerLost)):
            await a.connect(address)


@pytest.mark.parametrize("name", ["", "x" * 256, 5, None])
def test_agents_without_a_proper_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        Agent(name)


async def test_a_closed_agent_refuses_everything() -> None:
    a = Agent("a", token=TOKEN)
    with pytest.raises(ClosedError, match="async with"):
        await a.register(pattern(64, 1))
    async with a:
        region = await a.register(pattern(64, 1))
    for call in (a.register(pattern(64, 1)), a.transfer(region, region), a.serve(), a.connect("127.0.0.1:1")):
        with pytest.raises(ClosedError):
            await call
    with pytest.raises(ClosedError):
        a.metadata()
    with pytest.raises(ClosedError):
        async with a:
            pass


@pytest.mark.parametrize("wrong", [np.zeros(64, np.uint8), bytearray(64), memoryview(bytes(64)), "kv", 64, None])
async def test_memory_that_is_not_registered_is_no_place(wrong: object) -> None:
    async with Agent("unregistered", backends=["memory"]) as agent:
        region = await agent.register(bytearray(64))
        no_place = r"(dst is missing|must be a region, a descriptor, or a list of them, not \w+; memory is)"
        for call in (agent.transfer, agent.prepare, agent.submit):
            with pytest.raises(TypeError, match=no_place):
                await call(region, wrong)
        with pytest.raises(TypeError, match="src must be regions or descriptors of regions, not ndarray"):
            agent.submit([np.zeros(64, np.uint8)], region)
