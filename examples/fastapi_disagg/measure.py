"""Measure what sending layers while later ones are computed brings: the time to the first token, with and without.

Starts the two servers itself. Requests with and without overlap take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from rich.console import Console
from rich.table import Table

from examples.fastapi_disagg.application import TOKEN_VARIABLE
from examples.fastapi_disagg.model import PAGE_TOKENS, Shape


@contextmanager
def server(role: str, *arguments: str) -> Iterator[str]:
    """Run a server on a free port; yield its URL."""
    command = [sys.executable, "-m", f"examples.fastapi_disagg.{role}", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def first_token_seconds(client: httpx.Client, prompt: list[int], *, overlap: bool) -> float:
    """Return how long the first token takes, from the request on."""
    started = time.perf_counter()
    with client.stream("POST", "/generate", json={"prompt": prompt, "max_tokens": 1, "overlap": overlap}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        seconds = time.perf_counter() - started
        for _ in lines:
            pass
    if "token" not in json.loads(first):
        raise SystemExit(f"the request failed: {answer.status_code} {first}")
    return seconds


def main() -> None:
    """Run `python -m examples.fastapi_disagg.measure`."""
    parser = argparse.ArgumentParser(prog="python -m examples.fastapi_disagg.measure", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=30, help="requests of each kind")
    parser.add_argument("--backends", nargs="+", help="nixl_async backends, such as: memory tcp")
    arguments = parser.parse_args()
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
    common = ["--pages", str(2 * (-(-(arguments.tokens + 1) // PAGE_TOKENS)))]
    if arguments.backends:
        common += ["--backends", *arguments.backends]
    prompts = random.Random(0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with server("prefill", *common) as prefill, server("decode", "--prefill", prefill, *common) as decode:
        with httpx.Client(base_url=decode, timeout=60, trust_env=False) as client:
            for n in range(-2, arguments.rounds):
                prompt = [prompts.randrange(256) for _ in range(arguments.tokens)]
                for overlap in (True, False) if n % 2 else (False, True):
                    took = first_token_seconds(client, prompt, overlap=overlap)
                    if n >= 0:
                        seconds[overlap].append(took)
        routes = [line for line in httpx.get(f"{prefill}/metrics", trust_env=False).text.splitlines() if "bytes_total" in line]

    moved = arguments.tokens * Shape().geometry().token_nbytes / 2**20
    title = f"{arguments.tokens} tokens, {moved:.0f} MiB of KV cache"
    table = Table("layers are sent", "time to first token: median", "quartiles", "least", title=title)
    for overlap, name in ((True, "each layer when it is computed"), (False, "all layers at the end")):
        low, middle, high = (one * 1e3 for one in statistics.quantiles(seconds[overlap], n=4))
        table.add_row(name, f"{middle:.1f} ms", f"{low:.1f} to {high:.1f} ms", f"{min(seconds[overlap]) * 1e3:.1f} ms")
    console = Console()
    console.print(table)
    pairs = [after / before for before, after in zip(seconds[True], seconds[False], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    console.print(f"without / with overlap, pair by pair: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")
    console.print("moved:", *routes)


if __name__ == "__main__":
    main()
