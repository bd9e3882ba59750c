"""When which requests come: a Poisson process with shared prefixes, or a trace in Mooncake's format.

A trace is a file of JSON lines, as `FAST25-release/traces/*.jsonl` of kvcache-ai/Mooncake:

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, …, 13]}

`timestamp` is in milliseconds; `hash_ids` has an id for each 512 tokens of the prompt, the last of them begun or not. Two requests
with the same id have the same tokens in that block and in all before it. Other keys are passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nixl_async.errors import ConfigurationError

TRACE_BLOCK_TOKENS = 512
MAX_TOKENS = 1 << 24
_UNSHARED = 1 << 48
"""Ids from here on are of blocks that one request alone has."""
_OF_PREFIX = 1 << 24
_BATCH, _GAPS = 1, 2


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `blocks` are ids of its prompt's blocks, all of them: the last may have fewer tokens than a block.

    `seconds` is when it comes, after the first moment of the run; `batch` says that nobody waits for it.
    """

    number: int
    seconds: float
    prompt: int
    answer: int
    blocks: tuple[int, ...]
    batch: bool = False


def poisson(
    requests: int,
    rate: float,
    *,
    isl: int,
    osl: int,
    spread: float,
    block_tokens: int,
    prefix_share: float,
    prefixes: int,
    seed: int,
) -> list[Request]:
    """Make requests that come `rate` times a second, independent of each other.

    Lengths are even between (1 - spread) and (1 + spread) times `isl` and `osl`. Each prompt begins with one of `prefixes` shared
    ones, as many whole blocks of it as are `prefix_share` of the prompt.
    """
    rng = np.random.default_rng((seed, _GAPS))
    times = np.cumsum(rng.exponential(1 / rate, requests))
    found, fresh = [], _UNSHARED
    for number in range(requests):
        prompt, answer = (max(1, round(mean * rng.uniform(1 - spread, 1 + spread))) for mean in (isl, osl))
        blocks = math.ceil(prompt / block_tokens)
        shared = int(prompt * prefix_share) // block_tokens
        prefix = int(rng.integers(prefixes)) * _OF_PREFIX
        ids = (*range(prefix, prefix + shared), *range(fresh, fresh + blocks - shared))
        fresh += blocks - shared
        found.append(Request(number, float(times[number]), prompt, answer, ids))
    return found


def read_trace(path: str, requests: int, *, shrink: int = 1, speed: float = 1.0) -> list[Request]:
    """Read the first `requests` requests of a trace, in the order of their time; the first comes at 0 s.

    `shrink` divides lengths, and with them what a block has of tokens, so that as many blocks are shared as before; `speed`
    divides times.

    Raises:
        ConfigurationError: the file cannot be read or has no request; or the line that is named has none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = list(_read(path, file, requests, shrink))
    except OSError as error:
        raise ConfigurationError(f"--trace {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--trace {path} is no text; it must be JSON lines, as Mooncake's traces") from None
    if not found:
        raise ConfigurationError(f"--trace {path} has no request; it must have one a line, as Mooncake's traces")
    found.sort(key=lambda one: one.seconds)
    first = found[0].seconds
    return [replace(one, number=number, seconds=(one.seconds - first) / speed) for number, one in enumerate(found)]


def _read(path: str, lines: Iterable[str], requests: int, shrink: int) -> Iterator[Request]:
    fresh = _UNSHARED
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if count == requests:
            return
        try:
            values = _values(line)
        except ValueError as error:
            raise ConfigurationError(f"--trace {path}, line {number}: {error}") from None
        timestamp, prompt, answer, ids = values
        missing = math.ceil(prompt / TRACE_BLOCK_TOKENS) - len(ids)
        blocks = (*ids, *range(fresh, fresh + missing))
        fresh += missing
        yield Request(count, timestamp / 1000, math.ceil(prompt / shrink), math.ceil(answer / shrink), blocks)
        count += 1


def _values(line: str) -> tuple[float, int, int, list[int]]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is {_short(found)}; it must be an object with timestamp, input_length, output_length, hash_ids")
    timestamp = _take(found, "timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not 0 <= timestamp < math.inf:
        raise ValueError(f"timestamp is {_short(timestamp)}; it must be milliseconds, at least 0")
    lengths = []
    for name in ("input_length", "output_length"):
        length = _take(found, name)
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= MAX_TOKENS:
            raise ValueError(f"{name} is {_short(length)}; it must be a number of tokens, 1 to {MAX_TOKENS}")
        lengths.append(length)
    ids = _take(found, "hash_ids")
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < _UNSHARED for one in ids):
        raise ValueError(f"hash_ids is {_short(ids)}; it must be a list of whole numbers, 0 to {_UNSHARED - 1}")
    most = math.ceil(lengths[0] / TRACE_BLOCK_TOKENS)
    if len(ids) > most:
        raise ValueError(f"hash_ids has {len(ids)} ids; {lengths[0]} tokens have {most} blocks of {TRACE_BLOCK_TOKENS}")
    return float(timestamp), lengths[0], lengths[1], ids


def _take(found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise ValueError(f"{name} is missing; a request has timestamp, input_length, output_length, hash_ids")
    return found[name]


def with_batch(requests: list[Request], share: float, seed: int) -> list[Request]:
    """Make that share of the requests, chosen by chance, such that nobody waits for them."""
    chosen = np.random.default_rng((seed, _BATCH)).random(len(requests)) < share
    return [replace(one, batch=bool(batch)) for one, batch in zip(requests, chosen, strict=True)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
