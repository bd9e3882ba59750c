"""The command `nixl-async bench serve`: its options, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nixl_async.benchmarks.kv.options import refusing, run
from nixl_async.benchmarks.options import Format, given
from nixl_async.benchmarks.serve.options import Classes, Options, Schedule, make

_D = Options()


def _panel(name: str) -> Callable[..., Any]:
    def option(text: str, *names: str, **more: Any) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=name, **more)

    return option


_WHAT, _WHEN, _COMPUTE = _panel("Model and processes"), _panel("Requests"), _panel("Simulated compute")
_TIERS, _HOW, _OUT = _panel("Offload tiers"), _panel("What is compared"), _panel("Objectives and output")


def serve(
    context: typer.Context,
    model: Annotated[str, _WHAT("A model's name, a Hugging Face config.json, or KVBench's model file.")] = _D.model,
    layers: Annotated[int, _WHAT("Of the model's layers so many only, cache and compute (0: all).")] = 0,
    dtype: Annotated[str, _WHAT("What the cache is made of (default: the model's own).")] = "",
    page_size: Annotated[int, _WHAT("Tokens in a page.")] = _D.page_size,
    prefill: Annotated[int, _WHAT("Prefill processes.")] = 1,
    decode: Annotated[int, _WHAT("Decode processes.")] = 1,
    pool_requests: Annotated[int, _WHAT("How many of the longest request each process has memory for.")] = _D.pool_requests,
    trace: Annotated[str, _WHEN("JSON lines as Mooncake's traces have them: timestamp, input_length, …")] = "",
    requests: Annotated[int, _WHEN("How many requests come in a round; of a trace the first.")] = _D.requests,
    rate: Annotated[float, _WHEN("Poisson: requests a second.")] = _D.rate,
    isl: Annotated[int, _WHEN("Poisson: mean tokens of a prompt.")] = _D.isl,
    osl: Annotated[int, _WHEN("Poisson: mean tokens of an answer.")] = _D.osl,
    spread: Annotated[float, _WHEN("Poisson: lengths are even between (1 - this) and (1 + this) times the mean.")] = _D.spread,
    prefix_share: Annotated[float, _WHEN("Poisson: share of a prompt that others have, too.")] = _D.prefix_share,
    prefixes: Annotated[int, _WHEN("Poisson: how many such prefixes there are.")] = _D.prefixes,
    block_tokens: Annotated[
        int, _WHEN("Poisson: tokens of a block that can be shared; a trace's have 512.")
    ] = _D.block_tokens,
    shrink: Annotated[int, _WHEN("Divide a trace's lengths and blocks by this.")] = 1,
    batch_share: Annotated[float, _WHEN("Share of requests for which nobody waits: of class bulk, without objectives.")] = 0.0,
    seed: Annotated[int, _WHEN("Which requests come by chance; each round has its own.")] = 0,
    speed: Annotated[float, _COMPUTE("How many times as fast computing, and a trace's clock, are.")] = _D.speed,
    tflops: Annotated[float, _COMPUTE("TFLOP/s that a process reaches.")] = _D.tflops,
    memory_bandwidth: Annotated[float, _COMPUTE("GB/s of its memory.")] = _D.memory_bandwidth,
    parameters: Annotated[float, _COMPUTE("10^9 active parameters (0: 12 x layers x hidden size^2).")] = 0.0,
    dram_mib: Annotated[int, _TIERS("Memory of each prefill process for what it computed (0: none).")] = _D.dram_mib,
    nvme: Annotated[str, _TIERS("Directory of files behind it, which all prefill processes share.")] = "",
    nvme_mib: Annotated[int, _TIERS("Their size.")] = _D.nvme_mib,
    objects: Annotated[str, _TIERS("Store behind those: s3://bucket/prefix, az://, gs://, file:///directory.")] = "",
    objects_endpoint: Annotated[str, _TIERS("The store's endpoint URL; credentials are found as its clients find them.")] = "",
    schedule: Annotated[
        list[Schedule] | None, _HOW("Layers go as they are computed, or the whole at the end; may be repeated (both).")
    ] = None,
    classes: Annotated[
        list[Classes] | None, _HOW("Without or with traffic classes and deadlines; may be repeated (off).")
    ] = None,
    backend: Annotated[list[str] | None, _HOW("auto, samehost, tcp, ucx; may be repeated (auto).")] = None,
    rounds: Annotated[int, _HOW("Rounds in which configurations take turns.")] = _D.rounds,
    slo_ttft_ms: Annotated[float, _OUT("Objective: time to the first token.")] = _D.slo_ttft_ms,
    slo_itl_ms: Annotated[float, _OUT("Objective: mean time from a token to the next.")] = _D.slo_itl_ms,
    timeout: Annotated[float, _OUT("Seconds after which a request has failed.")] = _D.timeout,
    config_file: Annotated[str, _OUT("TOML file of the same names; the command line goes before it.")] = "",
    format: Annotated[Format, _OUT("A table, a result file, or figures.", case_sensitive=False)] = _D.format,
    output: Annotated[str, _OUT("Write the result to this file (default: standard output).")] = "",
) -> None:
    """Serve requests with prefill and decode processes: compute is simulated, every byte of KV cache moves and is checked.

    Reports TTFT, ITL, goodput under objectives, exposed transfer time, prefix hits of each tier and bytes moved, of all schedules,
    classes and backends that are compared, in turns, on the same requests.
    """
    from nixl_async.benchmarks.serve.run import run as serve_all

    with refusing():
        options = make(given(context, Options), config_file)
        run(lambda: serve_all(options, [Path(sys.argv[0]).name, *sys.argv[1:]]))
