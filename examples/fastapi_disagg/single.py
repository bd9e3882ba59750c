"""The same model in one process: what the two servers' tokens have to equal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from examples.fastapi_disagg.forward import Forward
from examples.fastapi_disagg.model import PAGE_TOKENS, Transformer


def generate(model: Transformer, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Return the likeliest tokens after a prompt, one after another."""
    pages = range(-(-(len(prompt) + max_tokens) // PAGE_TOKENS))
    cache = model.new_cache(len(pages))
    Forward(model, cache, pages, prompt).run()
    tokens = [prompt[-1]]
    for position in range(len(prompt) - 1, len(prompt) + max_tokens - 1):
        tokens.append(Forward(model, cache, pages, tokens[-1:], position).run())
    return tokens[1:]


def main() -> None:
    """Print the tokens that follow each prompt, a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="python -m examples.fastapi_disagg.single", description=__doc__)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Transformer(seed=arguments.seed)
    for prompt in arguments.prompts:
        print(json.dumps(generate(model, list(prompt.encode()), arguments.max_tokens)))


if __name__ == "__main__":
    main()
