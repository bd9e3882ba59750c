"""Who dials whom, and what is said of those that do not answer: real agents over real sockets."""

from __future__ import annotations

import socket

import pytest

from nixl_async import Agent, PeerLost
from tests.agents import TOKEN


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def test_names_and_addresses_of_both_families() -> None:
    hosts = ["localhost", "127.0.0.1", *(["::1"] if _has_ipv6() else [])]
    for host in hosts:
        async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
            _, port = await b.serve(host)
            text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            assert (await a.connect(text)).name == "b"


async def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with Agent("a", token=TOKEN) as a:
        with pytest.raises(PeerLost, match=str(port)):
            await a.connect(("127.0.0.1", port))
        with pytest.raises(PeerLost):
            await a.connect("name-that-does-not-exist.invalid:7000")
