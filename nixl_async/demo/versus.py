"""The same job done by NIXL's wheel, in an interpreter of its own, and how the two compare."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nixl_async.demo.job import Job
from nixl_async.demo.run import run_sides, summarise
from nixl_async.errors import ConfigurationError

HERE = Path(__file__).resolve().parent
BETTER_WHEN_HIGHER = ("gb_per_second",)
BETTER_WHEN_LOWER = ("exposed_seconds", "ttft_seconds", "loop_stall_p999_seconds", "cpu_seconds_per_gb")


def check_python(python: str) -> None:
    """Refuse what is no interpreter.

    Raises:
        ConfigurationError: `python` is not an executable file.
    """
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise ConfigurationError(f"--nixl-python is {python!r}; give the interpreter of an environment with NIXL's wheel")


async def run_nixl(
    job: Job, python: str, on_event: Callable[[str, dict[str, Any]], None] = lambda role, message: None
) -> dict[str, Any]:
    """Do the job with NIXL; return a result of the same form.

    Raises:
        DemoFailed: as `run_job`; also when the wheel is not there.
    """
    return summarise(
        job, await run_sides([python, str(HERE / "nixl_side.py")], {"NIXL_LOG_LEVEL": "WARN"}, job.as_dict(), on_event)
    )


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float | None]:
    """Return how many times better ours is in each figure; None where a figure is zero."""
    found: dict[str, float | None] = {}
    for key in BETTER_WHEN_HIGHER:
        found[key] = ours[key] / theirs[key] if theirs[key] else None
    for key in BETTER_WHEN_LOWER:
        found[key] = theirs[key] / ours[key] if ours[key] else None
    return found
