"""Runs whose processes are started one by one, as torchrun, SLURM, OpenMPI, or people with etcd start them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nixl_async.benchmarks.transfer.options import make
from nixl_async.benchmarks.transfer.rendezvous import ranks_here
from nixl_async.errors import ConfigurationError
from nixl_async.testing.servers import free_ports
from tests.agents import ROOT
from tests.benchmarks.runs import PROGRAM, arguments, environment, refused
from tests.compat.etcd_server import EtcdServer

WAIT_SECONDS = 100.0


async def together(commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]]) -> list[tuple[int, str, str]]:
    """Run commands at the same time; return exit status, output and errors of each."""
    pipe = asyncio.subprocess.PIPE
    processes = [
        await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment(**given))
        for command, given in zip(commands, variables, strict=True)
    ]
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            said = await asyncio.gather(*(process.communicate() for process in processes))
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return [(process.returncode or 0, out.decode(), err.decode()) for process, (out, err) in zip(processes, said, strict=True)]


def check(ended: list[tuple[int, str, str]], world: int) -> dict[str, Any]:
    """See that one rank has reported and the others have not; return the report."""
    assert [code for code, _, _ in ended] == [0] * world, ended
    (report,) = [out for _, out, _ in ended if out]
    found: dict[str, Any] = json.loads(report)
    assert all(row["throughput"][0] > 0 for row in found["rows"])
    assert len([key for key in found["system"] if key.startswith("rank ")]) == world - 1
    return found


async def test_ranks_of_torchruns_variables() -> None:
    (port,) = free_ports(1)
    run = [*PROGRAM, *arguments(scheme="tp", num_target_dev=2, format="json")]
    given = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = check(await together([run] * 3, [given | {"RANK": str(rank)} for rank in range(3)]), 3)
    assert found["rows"][0]["scheme"] == "tp"


async def test_ranks_of_slurms_and_openmpis_variables() -> None:
    run = [*PROGRAM, *arguments(format="json")]
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_ports(1)[0]), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1"}
    check(await together([run] * 2, [slurm | {"SLURM_PROCID": str(rank)} for rank in range(2)]), 2)
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"job-{free_ports(1)[0]}"}
    check(await together([run] * 2, [mpi | {"OMPI_COMM_WORLD_RANK": str(rank)} for rank in range(2)]), 2)


async def test_ranks_by_number_meet_in_a_directory(tmp_path: Path) -> None:
    runs = [[*PROGRAM, *arguments(rank=rank, world_size=2, rendezvous=f"file://{tmp_path}", format="json")] for rank in (1, 0)]
    check(await together(runs, [{}, {}]), 2)


async def test_torchrun_itself() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nixl_async"]
    ((code, out, err),) = await together([[*runner, "bench", "transfer", *arguments(format="json")]], [{}])
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    assert json.loads(line)["rows"][0]["throughput"][0] > 0


async def test_ranks_by_arrival_in_etcd(etcd: EtcdServer) -> None:
    run = [*PROGRAM, *arguments(etcd_endpoints=etcd.url, benchmark_group="a", format="json")]
    check(await together([run] * 2, [{}, {}]), 2)
    # The group is free again.
    check(await together([run] * 2, [{}, {}]), 2)


async def test_a_rank_that_dies_ends_the_others_with_its_name() -> None:
    (port,) = free_ports(1)
    run = [*PROGRAM, *arguments(rounds=10_000, max_batch_size=64)]
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipe = asyncio.subprocess.PIPE
    first, second = [
        await asyncio.create_subprocess_exec(
            *run, stdout=pipe, stderr=pipe, cwd=ROOT, env=environment(**given, RANK=str(rank))
        )
        for rank in range(2)
    ]
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            assert first.stdout is not None
            # The header is printed when everyone is there.
            await first.stdout.readline()
            while len(await asyncio.to_thread(_children, second.pid)) == 0:
                await asyncio.sleep(0.02)
            second.kill()
            _, err = await first.communicate()
            await second.communicate()
    finally:
        for process in (first, second):
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert first.returncode == 1
    assert re.search(r"nixl-async: (nixl_async, target 0: |rank 1 has gone)", err.decode()), err.decode()


def _children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def test_too_many_and_too_few_ranks_are_refused() -> None:
    (port,) = free_ports(1)
    given = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1"}
    ran = refused(*arguments(), **given)
    assert ran.exit_code == 2
    assert "there are 3 ranks; --num-initiator-dev 1 and 1 targets need 2" in ran.stderr


# What the variables say.


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"}, "h:5"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "tcpstore://h:5/nixl_async/benchmark/run/0",
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "node[003-008,12],gpu1"}, r"node003:2\d{4}"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NODELIST": "alpha,beta"}, r"alpha:2\d{4}"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}, r"127\.0\.0\.1:2\d{4}"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, r"127\.0\.0\.1:2\d{4}"),
    ],
)  # fmt: skip
def test_where_rank_0_is_met(variables: dict[str, str], place: str) -> None:
    found = ranks_here(make({}), variables)
    assert found is not None
    assert (found.rank, found.world) == (1, 2)
    assert re.fullmatch(place, found.place)
    other = ranks_here(make({"rendezvous": "x:1"}), variables)
    assert other is not None
    assert other.place == "x:1"


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'; it must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2; it must be 0 to 1"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "torchrun has started this process as rank 1 of 2, and nothing says where rank 0 is"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "OpenMPI has started"),
    ],
)  # fmt: skip
def test_variables_that_say_too_little(variables: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        ranks_here(make({}), variables)


def test_without_variables_there_are_no_ranks() -> None:
    assert ranks_here(make({}), {}) is None
