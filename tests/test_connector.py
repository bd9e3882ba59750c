"""Who dials whom, and what is said of those that do not answer: real agents over real sockets."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from nixl_async import Agent, ConnectionLimits, PeerLost
from tests.agents import TOKEN
from tests.certificates import Authority


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


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_who_answers_and_says_nothing_is_lost_and_not_asked_again(encrypted: bool, tmp_path: Path) -> None:
    """As a process that is stopped: its kernel accepts."""
    limits = ConnectionLimits(handshake_seconds=0.2)
    tls = Authority(tmp_path).tls("a") if encrypted else None
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with Agent("a", token=TOKEN, backends=["memory"], connection_limits=limits, tls=tls) as a, asyncio.timeout(1):
            with pytest.raises(PeerLost, match=r"handshake") as caught:
                await a.connect(silent.getsockname())
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.retryable
