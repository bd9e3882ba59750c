"""Two processes with an agent each behind one endpoint, by prometheus_client's multi-process mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from nixl_async import ConfigurationError, metrics
from tests.agents import ROOT, two_agents
from tests.metrics.test_collector import get, parsed

WORKER = """
import asyncio, sys, urllib.request
import numpy as np
from nixl_async import Agent, metrics

async def main(rounds):
    async with Agent("worker", token="t", backends=["memory"]) as agent:
        source = await agent.register(np.ones(1 << 20, np.uint8))
        target = await agent.register(np.zeros(1 << 20, np.uint8))
        async with metrics.publish(agent, seconds=0.05):
            for _ in range(rounds):
                await agent.transfer(source, target)
                await asyncio.sleep(0.06)
            async with metrics.serve(agent) as endpoint:
                url = "http://%s:%d/metrics" % endpoint.address
                text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
                assert "agent_moved_bytes_total{" in text, text

asyncio.run(main(int(sys.argv[1])))
"""


def test_what_processes_count_is_summed(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rounds in (3, 4):
        command = [sys.executable, "-c", WORKER, str(rounds)]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    samples = parsed(generate_latest(registry).decode())
    assert get(samples, "agent_moved_bytes_total", agent_name="worker", direction="local") == 7 << 20
    assert get(samples, "agent_transfers_total", state="done") == 7
    assert get(samples, "agent_xfer_time_us_count", backend="memory") == 7
    assert get(samples, "agent_xfer_time_us_bucket", backend="memory", le="+Inf") == 7
    assert get(samples, "agent_loop_stall_us_count") > 0


async def test_without_the_directory_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    async with two_agents(backends=["tcp"]) as (a, _, _):
        with pytest.raises(ConfigurationError, match="PROMETHEUS_MULTIPROC_DIR"):
            metrics.publish(a)
