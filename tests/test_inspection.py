"""The socket that other programs ask, who may, and the dump on a signal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from nixl_async import ConfigurationError, inspection
from tests.agents import known, two_agents


async def test_it_answers_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "agents"
    async with two_agents(backends=["tcp"]) as (a, b, peer), inspection.serve(a, b, path=path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = await asyncio.to_thread(inspection.ask, path, {"do": "dump"})
        assert [agent["agent"] for agent in told["agents"]] == ["a", "b"]
        assert told["pid"] == os.getpid()
        # More than is ever copied at once.
        mine = await a.register(np.ones(4 << 20, np.uint8), name="mine")
        await b.register(np.zeros(4 << 20, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        asked = asyncio.create_task(asyncio.to_thread(inspection.ask, path, {"do": "record", "seconds": 0.5}))
        while not asked.done():
            await a.transfer(mine, peer.region("theirs"))
        recorded = await asked
        assert any(event["name"] == "moving" for event in recorded["events"])
        assert a._observers.finished is None
    assert not path.exists()
    with pytest.raises(ConfigurationError, match="nobody answers"):
        inspection.ask(path, {"do": "dump"})


@pytest.mark.parametrize(
    "request_", [b"{}", b"[]", b"nonsense", b'{"do": "harm"}', b'{"do":"record"}', b'{"do":"dump","limit":"x"}']
)
async def test_what_it_does_not_understand_it_refuses_and_goes_on(tmp_path: Path, request_: bytes) -> None:
    path = tmp_path / "agents"
    async with two_agents(backends=["tcp"]) as (a, _, _), inspection.serve(a, path=path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(request_ + b"\n")
        assert "error" in json.loads(await reader.readline())
        writer.write(b'{"do": "dump"}\n')
        assert "agents" in json.loads(await reader.readline())
        writer.close()
        await writer.wait_closed()


async def test_an_endless_request_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "agents"
    async with two_agents(backends=["tcp"]) as (a, _, _), inspection.serve(a, path=path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * (4 * inspection.MAX_REQUEST_NBYTES))
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_who_is_recording_when_it_closes_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "agents"
    async with two_agents(backends=["tcp"]) as (a, _, _):
        async with inspection.serve(a, path=path):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"do": "record", "seconds": 500}\n')
            async with asyncio.timeout(10):
                while a._observers.finished is None:
                    await asyncio.sleep(0.001)
        assert await reader.read() == b""
        assert a._observers.finished is None
        writer.close()


async def test_a_dead_process_leaves_its_place_and_a_live_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "agents"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with two_agents(backends=["tcp"]) as (a, b, _), inspection.serve(a, path=path):
        with pytest.raises(ConfigurationError, match="choose another path"):
            async with inspection.serve(b, path=path):
                pass
        told = await asyncio.to_thread(inspection.ask, path, {"do": "dump"})
        assert told["agents"][0]["agent"] == "a"
    with pytest.raises(ConfigurationError, match="no socket can be made"):
        async with inspection.serve(a, path=tmp_path / "missing" / "agents"):
            pass


async def test_a_signal_writes_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = asyncio.get_running_loop()
    async with two_agents(backends=["tcp"]) as (a, b, _):
        try:
            path = tmp_path / "dumps"
            inspection.dump_on_signal(a, b, path=path)
            os.kill(os.getpid(), signal.SIGUSR1)
            async with asyncio.timeout(10):
                while not path.exists():
                    await asyncio.sleep(0.001)
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            assert [line["agent"] for line in lines] == ["a", "b"]
            assert lines[0]["peers"][0]["name"] == "b"
            inspection.dump_on_signal(a)
            os.kill(os.getpid(), signal.SIGUSR1)
            async with asyncio.timeout(10):
                while not (text := capsys.readouterr().err):
                    await asyncio.sleep(0.001)
            assert json.loads(text.splitlines()[-1])["agent"] == "a"
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)
