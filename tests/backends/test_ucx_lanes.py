"""Which of UCX's transports are RDMA, and what rank follows: no UCX is needed."""

from __future__ import annotations

import pytest

from nixl_async.backends import ucx_lanes
from nixl_async.backends.tcp import TCPBackend
from nixl_async.staging import StagingBackend

RDMA = ["rc_verbs", "rc_mlx5", "dc_mlx5", "ud_verbs", "ud_mlx5", "gga_mlx5", "rc_gda", "srd"]
OTHERS = [
    "tcp",
    "self",
    "sysv",
    "posix",
    "cma",
    "knem",
    "xpmem",
    "cuda_copy",
    "cuda_ipc",
    "gdr_copy",
    "rocm_ipc",
    "<unknown>",
    "",
]


@pytest.mark.parametrize("transport", RDMA)
def test_transports_over_a_card_come_before_tcp(transport: str) -> None:
    assert ucx_lanes.is_rdma(transport)
    # Beside others too: a wireup lane over TCP, shared memory, VRAM.
    for lanes in (
        [(transport, "mlx5_0:1")],
        [("tcp", "eth0"), (transport, "mlx5_0:1")],
        [("cuda_ipc", "cuda"), (transport, "x")],
    ):
        assert ucx_lanes.rank_of(lanes) < min(TCPBackend.rank, StagingBackend.rank)


@pytest.mark.parametrize("transport", OTHERS)
def test_other_transports_come_after_tcp(transport: str) -> None:
    assert not ucx_lanes.is_rdma(transport)
    assert ucx_lanes.rank_of([(transport, "x")]) > max(TCPBackend.rank, StagingBackend.rank)


def test_an_endpoint_that_tells_nothing_comes_after_tcp() -> None:
    assert ucx_lanes.rank_of([]) > TCPBackend.rank


def test_what_ucx_tells_is_read_once_each_with_rdma_first() -> None:
    lanes = ucx_lanes.read_lanes("tcp eth0\nrc_mlx5 mlx5_0:1\nrc_mlx5 mlx5_1:1\nrc_mlx5 mlx5_0:1\n\n")
    assert lanes == (("rc_mlx5", "mlx5_0:1"), ("rc_mlx5", "mlx5_1:1"), ("tcp", "eth0"))
    assert ucx_lanes.describe(lanes) == "rc_mlx5 on mlx5_0:1, rc_mlx5 on mlx5_1:1, tcp on eth0"
    assert ucx_lanes.read_lanes("") == ()
