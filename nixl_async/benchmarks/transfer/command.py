"""The command `nixl-async bench transfer`: its options, what it shows while it runs, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from nixl_async.benchmarks.options import Format, given
from nixl_async.benchmarks.transfer.options import (
    Location,
    Mode,
    Op,
    Options,
    Runtime,
    Scheme,
    Segment,
    Versus,
    make,
)
from nixl_async.errors import ConfigurationError, NixlError

INTERRUPTED = 130
FAILED, WRONG = 1, 2

_D = Options()


def _panel(name: str) -> Callable[..., Any]:
    def option(text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=name, **more)

    return option


_WHO, _WHAT, _HOW = _panel("Who moves what"), _panel("Sizes and repetitions"), _panel("How a request is made")
_STORE, _WHERE, _OUT = _panel("Files and objects"), _panel("Where processes run"), _panel("Peers and output")


def transfer(
    context: typer.Context,
    config_file: Annotated[str, _OUT("TOML file of the same names; the command line goes before it.")] = "",
    scheme: Annotated[Scheme, _WHO("Who talks to whom.", case_sensitive=False)] = _D.scheme,
    mode: Annotated[Mode, _WHO("A process for each device, or one for all of a side.", case_sensitive=False)] = _D.mode,
    op_type: Annotated[Op, _WHO("The direction, as initiators see it.", case_sensitive=False)] = _D.op_type,
    initiator_seg_type: Annotated[Segment, _WHO("The initiators' memory.", case_sensitive=False)] = _D.initiator_seg_type,
    target_seg_type: Annotated[Segment, _WHO("The far side.", case_sensitive=False)] = _D.target_seg_type,
    num_initiator_dev: Annotated[int, _WHO("Initiators, by default a process each.")] = 1,
    num_target_dev: Annotated[int, _WHO("Targets, the same; files and objects need none.")] = 1,
    backend: Annotated[str, _WHO("Go by this backend only (default: the cheapest). NIXL's UCX, POSIX, GDS, OBJ too.")] = "",
    device_list: Annotated[str, _WHO("Network devices for UCX (UCX_NET_DEVICES), or all.")] = "all",
    total_buffer_size: Annotated[int, _WHAT("Bytes of all initiators' memory (default: what the sweep needs).")] = 0,
    start_block_size: Annotated[int, _WHAT("Bytes of a block, the first; multiplied until the last.")] = _D.start_block_size,
    max_block_size: Annotated[int, _WHAT("The last.")] = _D.max_block_size,
    start_batch_size: Annotated[int, _WHAT("Blocks of a request, the first; multiplied until the last.")] = 1,
    max_batch_size: Annotated[int, _WHAT("The last.")] = 1,
    size_factor: Annotated[int, _WHAT("By what blocks and batches grow.")] = _D.size_factor,
    max_request_size: Annotated[int, _WHAT("Leave out requests of more bytes (default: none).")] = _D.max_request_size,
    num_iter: Annotated[int, _WHAT("Requests of each initiator, in all rounds.")] = _D.num_iter,
    warmup_iter: Annotated[int, _WHAT("Requests before them that do not count.")] = _D.warmup_iter,
    large_blk_iter_ftr: Annotated[int, _WHAT("Blocks over 1 MiB: this many times fewer.")] = _D.large_blk_iter_ftr,
    rounds: Annotated[int, _WHAT("Rounds in which contenders take turns.")] = _D.rounds,
    num_threads: Annotated[int, _HOW("Tasks of each initiator, each with memory of its own.")] = 1,
    pipeline_depth: Annotated[int, _HOW("Requests in flight of each task.")] = 1,
    recreate_xfer: Annotated[bool, _HOW("Make the transfer anew for each request.")] = False,
    reregister_mem: Annotated[bool, _HOW("Register the initiator's memory anew for each request.")] = False,
    prepared_xfer: Annotated[bool, _HOW("Keep descriptors where the transfer is made anew.")] = False,
    notify: Annotated[bool, _HOW("Notify the target of each request, as NIXLBench always does.")] = False,
    use_hugepages: Annotated[bool, _HOW("Memory in huge pages of 2 MiB.")] = False,
    check_consistency: Annotated[bool, _HOW("Compare every byte after each round.")] = True,
    randomize_location_mode: Annotated[
        Location, _HOW("Far blocks in random order; in files anywhere.", case_sensitive=False)
    ] = _D.randomize_location_mode,
    randomize_location_mode_seed: Annotated[int, _HOW("Which random order.")] = 0,
    raw: Annotated[bool, _HOW("Measure the machine's own limit in the same rounds.")] = True,
    filepath: Annotated[str, _STORE("Directory of the files (default: the temporary one).")] = "",
    filenames: Annotated[str, _STORE("Names of new files there, with commas.")] = "",
    num_files: Annotated[int, _STORE("Files of each initiator.")] = 1,
    storage_enable_direct: Annotated[bool, _STORE("Past the page cache.")] = False,
    obj_url: Annotated[str, _STORE("The store: s3://bucket/prefix, az://container, gs://bucket, file:///directory.")] = "",
    obj_access_key: Annotated[str, _STORE("S3's access key (default: as AWS's clients find it).")] = "",
    obj_secret_key: Annotated[str, _STORE("S3's secret key.", envvar="NIXL_ASYNC_BENCH_OBJ_SECRET_KEY")] = "",
    obj_session_token: Annotated[str, _STORE("S3's session token.")] = "",
    obj_bucket_name: Annotated[str, _STORE("S3's bucket.")] = "",
    obj_scheme: Annotated[str, _STORE("http or https, where the endpoint has none.")] = _D.obj_scheme,
    obj_region: Annotated[str, _STORE("S3's region.")] = _D.obj_region,
    obj_use_virtual_addressing: Annotated[bool, _STORE("The bucket in the host's name.")] = False,
    obj_endpoint_override: Annotated[str, _STORE("S3's endpoint.")] = "",
    obj_req_checksum: Annotated[str, _STORE("supported or required.")] = _D.obj_req_checksum,
    obj_ca_bundle: Annotated[str, _STORE("PEM file of trusted authorities.")] = "",
    azure_blob_account_url: Annotated[str, _STORE("Azure's account.")] = "",
    azure_blob_container_name: Annotated[str, _STORE("Azure's container.")] = "",
    azure_blob_connection_string: Annotated[str, _STORE("Azure's connection string.")] = "",
    runtime: Annotated[
        Runtime,
        _WHERE(
            "auto: ranks if the environment has them, etcd if there are endpoints, else local.",
            "--runtime",
            "--runtime-type",
            case_sensitive=False,
        ),
    ] = _D.runtime,
    benchmark_group: Annotated[str, _WHERE("Runs of one group meet.")] = _D.benchmark_group,
    etcd_endpoints: Annotated[str, _WHERE("etcd's URLs: ranks by arrival.")] = "",
    rendezvous: Annotated[str, _WHERE("Where ranks meet: host:port of rank 0, or a discovery URL.")] = "",
    rank: Annotated[int, _WHERE("This process's rank (default: of torchrun, SLURM, OpenMPI).")] = -1,
    world_size: Annotated[int, _WHERE("How many ranks there are.")] = 0,
    address: Annotated[str, _WHERE("Where to be reachable (default: the address that leads to rank 0).")] = "",
    ray_address: Annotated[str, _WHERE("Ray's cluster (default: the one at hand, or a local one).")] = "",
    versus: Annotated[list[Versus] | None, _OUT("Run these beside us; may be repeated.", case_sensitive=False)] = None,
    nixl_python: Annotated[
        str, _OUT("Interpreter of an environment with NIXL's wheel.", envvar="NIXL_ASYNC_NIXL_PYTHON")
    ] = "",
    mooncake_python: Annotated[str, _OUT("The same with Mooncake's.", envvar="NIXL_ASYNC_MOONCAKE_PYTHON")] = "",
    format: Annotated[Format, _OUT("A table, or a result file.", case_sensitive=False)] = _D.format,
    output: Annotated[str, _OUT("Write the result to this file (default: standard output).")] = "",
) -> None:
    """Move blocks between processes, machines, files and objects; NIXLBench's options, table and more, beside other libraries."""
    from nixl_async.benchmarks.transfer.run import Interrupted, run

    try:
        options = make(given(context, Options), config_file)
    except ConfigurationError as error:
        raise _fail(str(error), WRONG) from None
    try:
        _run(lambda: run(options, [Path(sys.argv[0]).name, *sys.argv[1:]]))
    except Interrupted:
        raise _fail("interrupted", INTERRUPTED) from None
    except ConfigurationError as error:
        raise _fail(str(error), WRONG) from None
    except NixlError as error:
        raise _fail(str(error), FAILED) from None


def _fail(text: str, code: int) -> typer.Exit:
    typer.echo(f"nixl-async: {text}", err=True)
    return typer.Exit(code)


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def guarded() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        await task

    asyncio.run(guarded())
