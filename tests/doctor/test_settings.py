"""Environment variables: those that hurt are told, with why; those that do not are not."""

from __future__ import annotations

import pytest

from nixl_async.doctor.facts import Facts
from nixl_async.doctor.report import Level, Report
from nixl_async.doctor.settings import judge_environment


def judged(devices: bool = False, **variables: str) -> dict[str, tuple[Level, str]]:
    facts = Facts()
    facts.add("network", "eth0 MTU", 1500, "made")
    facts.add("rdma", "mlx5_0:1", "", "made")
    for name, value in variables.items():
        facts.add("environment", name, value, "environment")
    report = Report(facts, gpu={"devices": [{"reaches": []}] if devices else []})
    return {finding.what: (finding.level, finding.why) for finding in judge_environment(report)}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"UCX_TLS": "tcp"},
        {"UCX_TLS": "rc,cuda_copy,tcp"},
        {"UCX_TLS": "^cma"},
        {"UCX_NET_DEVICES": "eth0,mlx5_0:1"},
        {"UCX_NET_DEVICES": "mlx5_0"},
        {"UCX_NET_DEVICES": "^lo"},
        {"UCX_TCP_TX_SEG_SIZE": "64k", "UCX_TCP_RX_SEG_SIZE": "1M"},
        {"UCX_KEEPALIVE_INTERVAL": "500ms"},
        {"UCX_LOG_LEVEL": "error"},
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
        {"UCX_MEMTYPE_CACHE": "n"},
    ],
    ids=str,
)
def test_what_does_no_harm_is_not_told(variables: dict[str, str]) -> None:
    assert judged(**variables) == {}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("UCX_TLS", "self,sysv", "no network among them"),
        ("UCX_TLS", "^cma,tcp", "reaches no other host"),
        ("UCX_NET_DEVICES", "lo", "reaches no other host"),
        ("UCX_TCP_TX_SEG_SIZE", "8k", "segments below 64k"),
        ("UCX_TCP_RX_SEG_SIZE", "65536", "segments below 256k"),
        ("UCX_RNDV_THRESH", "8192", "one more round trip"),
        ("UCX_KEEPALIVE_INTERVAL", "20s", "noticed after 20 s"),
        ("UCX_KEEPALIVE_INTERVAL", "inf", "noticed after inf s"),
        ("UCX_LOG_LEVEL", "TRACE", "a line for every operation"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True", "no CUDA IPC handle"),
        ("PYTHONASYNCIODEBUG", "1", "checks every call"),
    ],
)
def test_what_hurts_is_told(name: str, value: str, why: str) -> None:
    found = judged(**{name: value})
    slow = {what: said for what, (level, said) in found.items() if level is Level.SLOW}
    assert [what for what in slow if what.startswith(name)], found
    assert any(why in said for said in slow.values())


def test_devices_that_are_not_here_are_named() -> None:
    ((what, (level, why)),) = judged(UCX_NET_DEVICES="mlx5_9:1,eth0").items()
    assert what == "UCX_NET_DEVICES names mlx5_9:1, which is not here or not up"
    assert level is Level.SLOW
    assert why == "there are eth0, mlx5_0:1"


def test_what_matters_with_a_gpu_only() -> None:
    assert "ucx then moves no VRAM" in str(judged(devices=True, UCX_TLS="tcp"))
    assert "asks the CUDA driver" in str(judged(devices=True, UCX_MEMTYPE_CACHE="n"))
    assert judged(devices=True, UCX_TLS="tcp,cuda_copy") == {}


@pytest.mark.parametrize("value", ["tcp,cma", "all", "tcp,sm", "^tcp"])
def test_cma_is_a_note(value: str) -> None:
    assert [what for what, (level, _) in judged(UCX_TLS=value).items() if level is Level.NOTE and "offers cma" in what]


@pytest.mark.parametrize("value", ["", "many", "1x", "auto"])
def test_what_ucx_would_not_read_either_is_left_to_it(value: str) -> None:
    assert judged(UCX_TCP_TX_SEG_SIZE=value) == {}
    assert judged(UCX_KEEPALIVE_INTERVAL=value) == {}
