"""The transfer benchmark with files and objects, and its peers there."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.transfer.conductor import OURS
from nixl_async.benchmarks.transfer.options import Location, Op, Segment, Versus
from nixl_async.testing.servers import Server
from tests.benchmarks.runs import steps
from tests.benchmarks.test_transfer import only

FILE = {"target_seg_type": Segment.FILE}


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize(
    "given",
    [
        {"num_files": 2, "num_threads": 2},
        {"randomize_location_mode": Location.BLOCK, "total_buffer_size": 1 << 20, "recreate_xfer": True},
        {"storage_enable_direct": True, "pipeline_depth": 2},
        {"randomize_location_mode": Location.BYTE, "check_consistency": False, "total_buffer_size": 1 << 20},
    ],
    ids=lambda given: ",".join(given),
)
async def test_files(op: Op, given: dict[str, Any], tmp_path: Path) -> None:
    # Not in memory, where there is no direct I/O.
    directory = str(tmp_path)
    step = only(await steps(**FILE, op_type=op, filepath=directory, raw=True, **given))
    assert step.route == "posix"
    assert step.raw_label == ("pwritev" if op is Op.WRITE else "preadv")
    assert len(step.raw) == 2
    assert os.listdir(directory) == []


async def test_named_files_must_not_exist(tmp_path: Path) -> None:
    (tmp_path / "mine.ours.0").write_text("precious")
    with pytest.raises(Exception, match="File exists"):
        await steps(**FILE, filepath=str(tmp_path), filenames="mine")
    assert (tmp_path / "mine.ours.0").read_text() == "precious"


async def test_fio_beside_us(tmp_path: Path) -> None:
    warnings: list[str] = []
    (step,) = await steps(None, warnings, **FILE, filepath=str(tmp_path), versus=(Versus.FIO,))
    if shutil.which("fio") is None:
        assert warnings == ["fio is absent: the program fio is not installed: apt-get install fio"]
        return
    assert warnings == []
    assert [one.throughput > 0 for one in step.rounds["fio"]] == [True, True]


def s3(server: Server) -> dict[str, Any]:
    return {
        "target_seg_type": Segment.OBJ,
        "obj_endpoint_override": server.endpoint,
        "obj_access_key": server.key_id,
        "obj_secret_key": server.secret,
        "obj_bucket_name": server.bucket,
        "obj_region": server.region,
    }


@pytest.mark.parametrize("op", list(Op))
async def test_objects(op: Op, seaweed: Server) -> None:
    warnings: list[str] = []
    peers = (Versus.OBSTORE, Versus.AWSCRT)
    step = only(await steps(None, warnings, **s3(seaweed), op_type=op, versus=peers))
    assert step.route == "s3"
    for peer in peers:
        if importlib.util.find_spec(peer.value):
            assert len(step.rounds[peer.value]) == 2
        else:
            assert f"{peer.value} is absent: {peer.value} is not installed" in " ".join(warnings)
    assert next(iter(step.rounds)) == OURS


async def test_objects_in_a_directory(tmp_path: Path) -> None:
    step = only(await steps(target_seg_type=Segment.OBJ, obj_url=f"file://{tmp_path}", op_type=Op.READ))
    assert step.route == "directory"
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) == 0
