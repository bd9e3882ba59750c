"""What the commands of `nixl-async bench kv` share: their options, how they run and how they end."""

from __future__ import annotations

import asyncio
import enum
import glob
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nixl_async.errors import ConfigurationError, DescriptorError, NixlError

if TYPE_CHECKING:
    from nixl_async.benchmarks.kv.layouts import Layout
    from nixl_async.benchmarks.kv.models import Model

T = TypeVar("T")
WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class PlanFormat(enum.StrEnum):
    """How a plan is printed."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


class Format(enum.StrEnum):
    """How a measurement is printed."""

    TEXT = "text"
    JSON = "json"


class Access(enum.StrEnum):
    """How pages are moved."""

    BLOCK = "block"
    LAYER = "layer"


class Operation(enum.StrEnum):
    """Which side starts a transfer."""

    WRITE = "write"
    READ = "read"
    BOTH = "both"


class Mode(enum.StrEnum):
    """What is part of the time."""

    PREPARED = "prepared"
    ONE_SHOT = "one-shot"
    BOTH = "both"


class MemoryKind(enum.StrEnum):
    """Where buffers are."""

    DRAM = "dram"
    VRAM = "vram"


ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="A model's name, a Hugging Face config.json (or its folder), or one of KVBench's model files."
    ),
]
ConfigOption = Annotated[
    str | None, typer.Option("--model-config", "--model_config", help="One of KVBench's configuration files.")
]
ConfigsOption = Annotated[
    str | None, typer.Option("--model-configs", "--model_configs", help="Several of them, as a pattern: 'configs/*.yaml'.")
]
TP = Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
PP = Annotated[int | None, typer.Option("--pp", min=1, help="Pipeline stages.")]
ISL = Annotated[int | None, typer.Option("--isl", min=1, help="Tokens of a prompt (without a file: 1000).")]
OSL = Annotated[int | None, typer.Option("--osl", min=1, help="Tokens of an answer; they change no figure.")]
NumRequests = Annotated[
    int | None, typer.Option("--num-requests", "--num_requests", min=1, help="Requests (without a file: 1).")
]
PageSize = Annotated[
    int | None, typer.Option("--page-size", "--page_size", min=1, help="Tokens in a page (without a file: 16).")
]
AccessOption = Annotated[
    Access | None,
    typer.Option(
        "--access-pattern", "--access_pattern", "--access", help="A page in all layers of a rank at once, or in one."
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="What the cache is made of (without a file: the model's own).")]
Stages = Annotated[
    str | None, typer.Option("--stages", help="Layers of each stage, as 16,15,15,15 (default: as vLLM divides).")
]
Compatible = Annotated[
    bool, typer.Option("--kvbench-compatible", help="Print what KVBench prints, its figures included, right or wrong.")
]
BackendOption = Annotated[
    str | None, typer.Option("--backend", help="Move by this backend only (default: the best there is).")
]
MemoryOption = Annotated[
    MemoryKind | None, typer.Option("--memory", help="Where buffers are (default: as the file says, or DRAM).")
]
FormatOption = Annotated[Format, typer.Option("--format", help="Tables, or one JSON object.")]
PlanFormatOption = Annotated[PlanFormat, typer.Option("--format", help="Tables, JSON, or CSV.")]


def failure(text: str, code: int = WRONG_INPUT) -> typer.Exit:
    """Print what is wrong; return what ends the program."""
    typer.echo(f"nixl-async: {text}", err=True)
    return typer.Exit(code)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what is wrong with the input into one line and status 2, everything else that went wrong into status 1."""
    from nixl_async.benchmarks.kv.processes import RanksFailed

    try:
        yield
    except (ConfigurationError, DescriptorError) as error:
        raise failure(str(error)) from None
    except (NixlError, RanksFailed, OSError) as error:
        raise failure(str(error), FAILED) from None


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine; Ctrl-C and SIGTERM cancel it, and end the program when it has cleaned up."""

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise failure("interrupted", INTERRUPTED) from None


@contextmanager
def watched() -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """Show on a terminal how far the ranks are."""
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield lambda rank, message: None
        return
    with err.status("starting") as status:

        def take(rank: int, message: dict[str, Any]) -> None:
            if rank == 0 and message["event"] != "started":
                status.update(f"{message['event']} {message['number']}")

        yield take


def layouts(config: str | None, configs: str | None, model: Model, **values: Any) -> Iterator[tuple[str | None, Layout]]:
    """Yield configuration files and the layouts in them, with the command line's values instead of theirs.

    Raises:
        ConfigurationError: there is no such file, or it is wrong.
    """
    from nixl_async.benchmarks.kv.layouts import Layout, read_layout

    files = [] if config is None else [config]
    if configs is not None:
        found = sorted(glob.glob(configs))
        if not found:
            raise ConfigurationError(f"no file matches {configs!r}")
        files += found
    if values.get("stages") is not None:
        values["stages"] = _stages(values["stages"])
    if not files:
        made_of = values.get("kv_dtype") or model.dtype or "bfloat16"
        base = Layout(isl=1000, page_size=16, access="block", kv_dtype=made_of, model_dtype=made_of)
        yield None, base.changed(**values)
    for file in dict.fromkeys(files):
        yield file, read_layout(file).changed(**values)


def overrides(
    tp: int | None,
    pp: int | None,
    isl: int | None,
    osl: int | None,
    num_requests: int | None,
    page_size: int | None,
    access: Access | None,
    dtype: str | None,
    stages: str | None,
) -> dict[str, Any]:
    """Return what the command line says of a layout, None where it says nothing."""
    return {
        "tp": tp,
        "pp": pp,
        "isl": isl,
        "osl": osl,
        "num_requests": num_requests,
        "page_size": page_size,
        "access": value_of(access),
        "kv_dtype": dtype,
        "stages": stages,
    }


def _stages(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigurationError(f"stages is {text!r}; give the layers of each stage, as 16,15,15,15") from None


def value_of(option: enum.Enum | None) -> Any:
    """Return what an option stands for, None where it was not given."""
    return None if option is None else option.value
