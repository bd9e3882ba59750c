"""`nixl-async bench kv`: plan, kvcache, profile, traffic, workload."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nixl_async.benchmarks.kv.options import (
    ISL,
    OSL,
    PP,
    TP,
    WRONG_INPUT,
    AccessOption,
    BackendOption,
    Compatible,
    ConfigOption,
    ConfigsOption,
    Dtype,
    Format,
    FormatOption,
    MemoryOption,
    Mode,
    ModelOption,
    NumRequests,
    Operation,
    PageSize,
    PlanFormat,
    PlanFormatOption,
    Stages,
    layouts,
    overrides,
    refusing,
    run,
    value_of,
    watched,
)
from nixl_async.errors import ConfigurationError, DescriptorError

app = typer.Typer(
    help="KV caches of models: sizes, transfers for real, traffic between many ranks; KVBench's files and commands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
OTHER_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=OTHER_OPTIONS)
def plan(
    context: typer.Context,
    model: ModelOption,
    model_config: ConfigOption = None,
    model_configs: ConfigsOption = None,
    tp: TP = None,
    pp: PP = None,
    isl: ISL = None,
    osl: OSL = None,
    num_requests: NumRequests = None,
    page_size: PageSize = None,
    access_pattern: AccessOption = None,
    dtype: Dtype = None,
    stages: Stages = None,
    source: Annotated[str | None, typer.Option(help="Of the nixlbench command: file, memory or gpu.")] = None,
    destination: Annotated[str | None, typer.Option(help="Of the nixlbench command: file, memory or gpu.")] = None,
    kvbench_compatible: Compatible = False,
    output: PlanFormatOption = PlanFormat.TEXT,
) -> None:
    """Print what each rank of a model moves: pages, accesses, bytes; and the nixlbench command for it.

    nixlbench's own parameters (--backend, --num_threads, …) are taken as KVBench takes them and go into the command.
    """
    from nixl_async.benchmarks.kv import kvbench
    from nixl_async.benchmarks.kv.models import find_model
    from nixl_async.benchmarks.kv.planning import Plan, make_plan
    from nixl_async.benchmarks.kv.reports import console, plan_csv, print_plan

    failed: list[str] = []
    theirs: list[tuple[str, Any, dict[str, Any]]] = []
    ours: list[tuple[str | None, Plan, dict[str, Any]]] = []
    values = overrides(tp, pp, isl, osl, num_requests, page_size, access_pattern, dtype, stages)
    with refusing():
        given = kvbench.read_parameters(context.args)
        found = find_model(model)
        if kvbench_compatible:
            _check_compatible(model_config, model_configs, given)
        for config, layout in layouts(model_config, model_configs, found, **values):
            try:
                if kvbench_compatible:
                    figures = kvbench.Figures.of(found, layout)
                    sizes = (figures.io_size, figures.batch_size)
                    where = (source or "file", destination or "memory")
                    theirs.append((str(config), layout, kvbench.parameters(given, *sizes, *where)))
                    continue
                made = make_plan(found, layout)
                where = _where(given, source or layout.source, destination or layout.destination)
                fullest = made.fullest
                ours.append((config, made, kvbench.parameters(given, fullest.io_nbytes, fullest.batch_size, *where)))
            except (ConfigurationError, DescriptorError) as error:
                failed.append(str(error) if config is None else f"{config}: {error}")
    match output:
        case _ if not theirs and not ours:
            pass
        case PlanFormat.JSON if kvbench_compatible:
            print(kvbench.as_json(theirs))
        case PlanFormat.CSV if kvbench_compatible:
            print(kvbench.as_csv(theirs))
        case PlanFormat.TEXT if kvbench_compatible:
            for config, layout, parameters in theirs:
                print(f"{kvbench.banner(config, layout)}\n{kvbench.command(parameters)}\n")
        case PlanFormat.JSON:
            print(json.dumps([{"config_file": c, **p.as_dict(), "nixlbench": n} for c, p, n in ours], indent=2))
        case PlanFormat.CSV:
            print(plan_csv((config, made) for config, made, _ in ours), end="")
        case _:
            for config, made, parameters in ours:
                print_plan(console(), made, config, parameters)
    for text in failed:
        typer.echo(f"nixl-async: {text}", err=True)
    if failed:
        raise typer.Exit(WRONG_INPUT)


def _check_compatible(config: str | None, configs: str | None, given: dict[str, Any] | None) -> None:
    if config is None and configs is None:
        raise ConfigurationError("KVBench needs a configuration file: give --model-config")
    if given is not None and "backend" not in given:
        raise ConfigurationError("KVBench's plan needs a backend: give --backend UCX, for one")


def _where(given: dict[str, Any], source: str | None, destination: str | None) -> tuple[str, str]:
    network = str(given.get("backend", "UCX")).lower() in ("ucx", "gpunetio", "mooncake")
    return source or ("memory" if network else "file"), destination or "memory"


@app.command()
def kvcache(
    model: ModelOption,
    model_config: ConfigOption = None,
    model_configs: ConfigsOption = None,
    tp: TP = None,
    pp: PP = None,
    isl: ISL = None,
    osl: OSL = None,
    num_requests: NumRequests = None,
    page_size: PageSize = None,
    access_pattern: AccessOption = None,
    dtype: Dtype = None,
    stages: Stages = None,
    kvbench_compatible: Compatible = False,
    output: PlanFormatOption = PlanFormat.TEXT,
) -> None:
    """Print what a model's cache takes: a token, a request, one access, and how many accesses there are."""
    from nixl_async.benchmarks.kv import kvbench, reports
    from nixl_async.benchmarks.kv.models import find_model
    from nixl_async.benchmarks.kv.planning import make_plan

    values = overrides(tp, pp, isl, osl, num_requests, page_size, access_pattern, dtype, stages)
    with refusing():
        found = find_model(model)
        if kvbench_compatible:
            _check_compatible(model_config, model_configs, None)
        wanted = list(layouts(model_config, model_configs, found, **values))
        if kvbench_compatible:
            theirs = [(layout, kvbench.Figures.of(found, layout)) for _, layout in wanted]
            rows = [reports.kvbench_row(found.name, layout, figures) for layout, figures in theirs]
        else:
            plans = [make_plan(found, layout) for _, layout in wanted]
            rows = [reports.kvcache_row(made) for made in plans]
    if output is PlanFormat.JSON:
        print(json.dumps(rows, indent=2))
    elif output is PlanFormat.CSV:
        print(reports.write_csv(rows), end="")
    elif kvbench_compatible:
        print(kvbench.kvcache_table((found.name, layout, f.batch_size, f.io_size) for layout, f in theirs))
    else:
        reports.print_kvcache(reports.console(), plans)


@app.command()
def profile(
    model: ModelOption,
    model_config: ConfigOption = None,
    tp: TP = None,
    pp: PP = None,
    isl: ISL = None,
    osl: OSL = None,
    num_requests: NumRequests = None,
    page_size: PageSize = None,
    access_pattern: AccessOption = None,
    dtype: Dtype = None,
    stages: Stages = None,
    decode_tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel ranks of decode (default: as prefill).")
    ] = None,
    decode_pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages of decode (default: as prefill).")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Which rank of prefill sends.")] = 0,
    op: Annotated[Operation, typer.Option(help="Prefill pushes, or decode pulls.")] = Operation.BOTH,
    mode: Annotated[Mode, typer.Option(help="Descriptors checked before, or as part of the time.")] = Mode.BOTH,
    repeats: Annotated[int, typer.Option(min=1, help="Transfers of each kind.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those that count.")] = 2,
    backend: BackendOption = None,
    memory: MemoryOption = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Move the requests of a plan for real, from a rank of prefill to one of decode, in two processes; check every byte."""
    from nixl_async.benchmarks.kv import reports, running
    from nixl_async.benchmarks.kv.models import find_model
    from nixl_async.benchmarks.kv.planning import make_plan

    values = overrides(tp, pp, isl, osl, num_requests, page_size, access_pattern, dtype, stages)
    with refusing():
        found = find_model(model)
        ((_, layout),) = layouts(model_config, None, found, **values)
        made = make_plan(found, layout)
        other = layout.changed(tp=decode_tp, pp=decode_pp)
        if decode_pp is not None and decode_pp != layout.pp:
            other = other.with_default_stages()
        ops = ["write", "read"] if op is Operation.BOTH else [op.value]
        modes = ["prepared", "one-shot"] if mode is Mode.BOTH else [mode.value]
        backends = running.check_backend(backend)

        async def work() -> dict[str, Any]:
            with watched() as on_event:
                return await running.profile(
                    made,
                    other,
                    on_event=on_event,
                    rank=rank,
                    ops=ops,
                    modes=modes,
                    repeats=repeats,
                    warmup=warmup,
                    backends=backends,
                    memory=value_of(memory),
                )

        result = run(work)
    if output is Format.JSON:
        print(json.dumps(result))
    else:
        reports.print_profile(reports.console(), result)


@app.command()
def traffic(
    file: Annotated[
        str, typer.Argument(help="Patterns as KVBench's ct-perftest or sequential-ct-perftest has them; or a matrix.")
    ],
    iters: Annotated[int | None, typer.Option(min=1, help="Rounds (default: as the file says; of a sequence 3).")] = None,
    isolated_iters: Annotated[int, typer.Option(min=1, help="Rounds of each pattern of a sequence alone.")] = 30,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Rounds before those that count (default: as the file says; of a sequence 30).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", "--verify-buffers/--no-verify-buffers", help="Check every byte.")
    ] = True,
    backend: BackendOption = None,
    memory: MemoryOption = None,
    sleep_scale: Annotated[float, typer.Option(min=0, help="Multiply the seconds of computing by this.")] = 1.0,
    senders: Annotated[bool, typer.Option("--senders", help="Show each sender's figures too.")] = False,
    json_output_path: Annotated[
        str | None, typer.Option("--json-output-path", help="Write the result there too, in KVBench's form.")
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Run patterns of what each rank sends to each, alone and one after the other, between as many processes as there are ranks."""
    from nixl_async.benchmarks.kv import reports, running
    from nixl_async.benchmarks.kv.matrices import read_traffic

    with refusing():
        wanted = read_traffic(file).slept(sleep_scale)
        backends = running.check_backend(backend)
        if json_output_path is not None and not os.access(Path(json_output_path).absolute().parent, os.W_OK):
            raise ConfigurationError(f"{json_output_path!r} cannot be written: there is no such folder, or it is not yours")

        async def work() -> dict[str, Any]:
            with watched() as on_event:
                return await running.traffic(
                    wanted,
                    on_event=on_event,
                    iters=iters,
                    isolated_iters=isolated_iters,
                    warmup=warmup,
                    verify=verify,
                    backends=backends,
                    memory=value_of(memory),
                )

        result = run(work)
        if json_output_path is not None:
            Path(json_output_path).write_text(json.dumps(result))
    if output is Format.JSON:
        print(json.dumps(result))
    else:
        reports.print_traffic(reports.console(), result, senders=senders)


@app.command()
def workload(
    model: ModelOption,
    results_dir: Annotated[str, typer.Option("--results-dir", help="Folder that the matrices and metadata.yaml go to.")],
    workers: Annotated[int, typer.Option(min=1, help="Prefill workers, and as many decode workers.")] = 1,
    prefill_tp: Annotated[int, typer.Option(min=1)] = 1,
    prefill_pp: Annotated[int, typer.Option(min=1)] = 1,
    decode_tp: Annotated[int, typer.Option(min=1)] = 1,
    decode_pp: Annotated[int, typer.Option(min=1)] = 1,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens in a page.")] = 16,
    dtype: Dtype = None,
    num_user_requests: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests of a batch.")] = 1,
    isl_mean: Annotated[int, typer.Option(help="Mean length of a prompt, tokens.")] = 16000,
    isl_scale: Annotated[int, typer.Option(min=0, help="Its standard deviation.")] = 10000,
    min_isl: Annotated[int, typer.Option(min=1)] = 1000,
    max_isl: Annotated[int, typer.Option(min=1)] = 128000,
    max_batch_mem: Annotated[float, typer.Option(help="A batch is closed when it is larger, bytes.")] = 100e9,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same prompts.")] = 0,
    sleeps: Annotated[float, typer.Option(min=0, help="Multiply the estimated time of computing by this.")] = 1.0,
    kvbench_compatible: Compatible = False,
) -> None:
    """Write the traffic of a fleet, from prefill to decode, as matrices that `traffic` and KVBench run."""
    from nixl_async.benchmarks.kv import workloads
    from nixl_async.benchmarks.kv.layouts import Layout
    from nixl_async.benchmarks.kv.models import find_model

    with refusing():
        found = find_model(model)
        common = {"kv_dtype": dtype or found.dtype or "bfloat16", "page_size": page_size, "access": "block"}
        prefill, decode = Layout(tp=prefill_tp, pp=prefill_pp, **common), Layout(tp=decode_tp, pp=decode_pp, **common)  # type: ignore[arg-type]
        fleet = workloads.Fleet(prefill, decode, workers)
        requests = workloads.Requests(
            num_user_requests, batch_size, isl_mean, isl_scale, min_isl, max_isl, max_batch_mem, seed
        )
        if kvbench_compatible:
            theirs = workloads.generate_as_kvbench(found, fleet, requests)
            batches = [([[workloads.kvbench_size(c) for c in row] for row in rows], n, s * sleeps) for rows, n, s in theirs]
        else:
            made = workloads.generate(found, fleet, requests)
            batches = [(workloads.as_text(one.cells), one.isl, one.compute_seconds * sleeps) for one in made]
        index = workloads.write_workload(Path(results_dir), batches)
    print(f"{index}: {len(batches)} patterns between {fleet.world} ranks")
