"""Other libraries beside this one: each in its own interpreter, checked the same, and reported as absent where it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.transfer.conductor import OURS
from nixl_async.benchmarks.transfer.contenders import NIXL_LIKE_OURS
from nixl_async.benchmarks.transfer.options import Op, Scheme, Segment, Versus
from nixl_async.testing.servers import Server
from tests.benchmarks.runs import arguments, command, refused, steps
from tests.benchmarks.test_transfer import only
from tests.benchmarks.test_transfer_storage import s3


@pytest.mark.nixl
@pytest.mark.parametrize(
    "given",
    [
        {"op_type": Op.READ, "num_threads": 2},
        {"scheme": Scheme.TP, "num_target_dev": 2, "recreate_xfer": True, "notify": True},
        {"prepared_xfer": True, "backend": "tcp"},
    ],
    ids=lambda given: ",".join(given),
)
async def test_nixl(given: dict[str, Any], nixl_python: str) -> None:
    warnings: list[str] = []
    step = only(await steps(None, warnings, versus=(Versus.NIXL,), nixl_python=nixl_python, **given))
    assert warnings == []
    assert list(step.rounds) == [OURS, "nixl", NIXL_LIKE_OURS]


@pytest.mark.nixl
@pytest.mark.parametrize("op", list(Op))
async def test_nixls_storage(op: Op, nixl_python: str, seaweed: Server, tmp_path: Path) -> None:
    for given in ({"target_seg_type": Segment.FILE, "filepath": str(tmp_path)}, s3(seaweed)):
        warnings: list[str] = []
        step = only(await steps(None, warnings, versus=(Versus.NIXL,), nixl_python=nixl_python, op_type=op, **given))
        assert warnings == []
        assert list(step.rounds) == [OURS, "nixl"]


async def test_mooncake() -> None:
    python = os.environ.get("NIXL_ASYNC_MOONCAKE_PYTHON", "")
    if not python:
        pytest.skip("NIXL_ASYNC_MOONCAKE_PYTHON names no environment with Mooncake's wheel: bench/environments.py makes one")
    for op in Op:
        warnings: list[str] = []
        step = only(await steps(None, warnings, versus=(Versus.MOONCAKE,), mooncake_python=python, op_type=op, num_threads=2))
        assert warnings == []
        assert list(step.rounds) == [OURS, "mooncake"]


async def test_a_peer_that_is_not_installed_is_absent() -> None:
    warnings: list[str] = []
    peers = (Versus.NIXL, Versus.MOONCAKE)
    (step,) = await steps(None, warnings, versus=peers, nixl_python=sys.executable, mooncake_python=sys.executable)
    assert list(step.rounds) == [OURS]
    assert [text.partition(":")[0] for text in warnings] == [
        "nixl is absent",
        f"{NIXL_LIKE_OURS} is absent",
        "mooncake is absent",
    ]
    assert "none of nixl_cu12._api, nixl_cu13._api, nixl._api is installed in this interpreter" in warnings[0]


def test_a_peer_without_an_interpreter_is_absent_and_the_report_says_what_to_do() -> None:
    ran = command(*arguments(versus="nixl"))
    assert ran.returncode == 0, ran.stderr
    assert "absent: nixl: it needs --nixl-python" in ran.stdout
    assert "bench/environments.py makes one" in ran.stdout
    ran = refused(*arguments(versus="nixl", nixl_python="/nowhere"))
    assert ran.exit_code == 2
    assert "--nixl-python is /nowhere; it must be an interpreter that can be run" in ran.stderr
