"""The samples are those that the table of metrics announces."""

from __future__ import annotations

import numpy as np

from nixl_async.errors import IntegrityError
from nixl_async.metrics.families import FAMILIES
from nixl_async.metrics.readings import _status, read
from nixl_async.metrics.timings import Histogram, Timings
from tests.agents import known, two_agents


async def test_every_sample_is_of_a_metric_and_has_its_labels() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(4 << 20, np.uint8), name="mine")
        await b.register(np.zeros(4 << 20, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        timings = Timings(a)
        timings.start()
        await a.transfer(mine, peer.region("theirs"))
        timings.stop()
        samples = list(read(a, timings))
        for name, labels, value in samples:
            assert len(labels) == len(FAMILIES[name].labels), name
            assert isinstance(value, Histogram) == (FAMILIES[name].kind == "histogram"), name
        # Nothing has failed.
        assert {name for name, _, _ in samples} == set(FAMILIES) - {"agent_errors"}
        assert len({(name, labels) for name, labels, _ in samples}) == len(samples)


def test_each_error_has_a_status_of_nixl() -> None:
    assert _status(IntegrityError.__name__) == "mismatch"
    assert _status("BackendError") == "backend"
    assert _status("ZeroDivisionError") == "unknown"
