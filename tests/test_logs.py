"""Lines of JSON that a log collector can read."""

from __future__ import annotations

import asyncio
import io
import json
import logging

import numpy as np
import pytest

from nixl_async import PeerLost, logs
from tests.agents import known, two_agents


def test_a_record_is_one_object() -> None:
    logger = logging.getLogger("test of nixl_async.logs")
    logger.propagate = False
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JSONFormatter())
    logger.addHandler(handler)
    logger.warning("peer %s\nis slow", "b", extra={"peer": "b", "object": object})
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("failed")
    logger.removeHandler(handler)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["message"], first["peer"]) == (
        "WARNING",
        "test of nixl_async.logs",
        "peer b\nis slow",
        "b",
    )
    assert first["object"] == "<class 'object'>"
    assert first["time"].endswith("Z")
    assert "ValueError: no" in second["exception"]


async def test_each_transfer_that_ends_is_a_line() -> None:
    stream = io.StringIO()
    root = logging.getLogger("nixl_async")
    level, handler = root.level, logs.write_json(stream)
    try:
        async with two_agents(backends=["tcp"]) as (a, b, peer):
            mine = await a.register(np.ones(4 << 20, np.uint8), name="mine")
            await b.register(np.zeros(4 << 20, np.uint8), name="theirs")
            await known(a, peer, "theirs")
            with logs.log_transfers(a):
                await a.transfer(mine, peer.region("theirs"), traffic_class="bulk")
                never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                lost = a.submit(mine, peer.region("theirs"), after=never)
                await a.disconnect("b")
                with pytest.raises(PeerLost):
                    await lost
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    done, failed = (line for line in lines if line["logger"] == "nixl_async.transfers")
    assert (done["level"], done["state"], done["bytes"], done["peer"]) == ("INFO", "done", 4 << 20, "b")
    assert (done["agent"], done["backend"], done["class"]) == ("a", "tcp", "bulk")
    assert done["seconds"] > 0
    assert (failed["level"], failed["state"]) == ("WARNING", "failed")
    assert failed["error"].startswith("PeerLost: ")
