"""Records of requests made by hand, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.serve.arrivals import Request
from nixl_async.benchmarks.serve.metrics import Record, Round

SMALL = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}


def record(
    number: int, came: float, tokens: list[float], *, prompt: int = 100, tiers: list[str] | None = None, **more: Any
) -> Record:
    """Return a request that was served: two layers, computed 30 and 20 ms before the first token, the last one moved in 20."""
    first = tokens[0]
    made = Record(Request(number, came, prompt, len(tokens), (1, 2), **more), came, "prefill-0", "decode-0")
    made.said = {"turn": came + 0.01, "loaded": came + 0.015, "layers": [first - 0.03, first - 0.02], "asked": 1}
    made.said["tiers"] = tiers or []
    made.told = {"arrived": [first - 0.025, first], "tokens": tokens}
    return made


def failed(number: int, came: float) -> Record:
    """Return one that was not."""
    return Record(Request(number, came, 100, 2, (1, 2)), came, error="decode-0 was killed")


def turn(*records: Record, **more: Any) -> Round:
    """Return a round of blocks of 32 tokens, 1000 bytes each."""
    given = {"routes": {"tcp": 5, "memory": 7}, "tier_nbytes": {"dram": (3, 4)}, "refused_blocks": 0, "cpu_seconds": 1.0}
    return Round(records, 32, 1000, **{**given, **more})


TINY: dict[str, Any] = {
    "requests": 6,
    "rate": 60.0,
    "isl": 128,
    "osl": 4,
    "spread": 0.0,
    "prefixes": 1,
    "block_tokens": 16,
    "page_size": 8,
    "rounds": 1,
    "speed": 1e-4,
    "dram_mib": 1,
    "backend": ("samehost",),
}


def write_model(directory: Path) -> str:
    """Write a small model's config.json; return where."""
    path = directory / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)
