"""What a run has measured: each request's life, and the figures made of many. Seconds, tokens, bytes. Pure.

A request's first token is there when the last layer of its KV cache is in place at decode (TTFT: since it came), the others by
decode's steps (ITL: from one token to the next). Exposed is the time from the end of prefill's computing to the last layer's
arrival. A request meets its objectives if its TTFT and the mean of its ITLs are within both; goodput is how many of those there are
a second (Zhong et al., DistServe, OSDI 2024). Batch requests, for which nobody waits, are in neither; failed ones meet nothing.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nixl_async.benchmarks.results import Latencies
from nixl_async.benchmarks.serve.arrivals import Request


@dataclass(eq=False)
class Record:
    """What became of a request; times are on the machine's clock, but for `Request.seconds`."""

    request: Request
    came: float
    prefill: str = ""
    decode: str = ""
    error: str = ""
    said: dict[str, Any] = field(default_factory=dict)
    """What prefill said of it."""
    told: dict[str, Any] = field(default_factory=dict)
    """What decode did."""

    @property
    def done(self) -> bool:
        """Whether both sides have done with it."""
        return bool(self.said and self.told and not self.error)

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.done or bool(self.error)

    @property
    def tokens(self) -> list[float]:
        """When each token was there."""
        found: list[float] = self.told["tokens"]
        return found

    @property
    def ttft(self) -> float:
        """From its coming to its first token."""
        return self.tokens[0] - self.came

    @property
    def itls(self) -> list[float]:
        """From each token to the next."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]

    @property
    def exposed(self) -> float:
        """From the end of prefill's computing to the last layer's arrival."""
        return float(max(self.told["arrived"]) - max(self.said["layers"]))

    def meets(self, ttft: float, itl: float) -> bool:
        """Tell whether it was served within both objectives."""
        return self.done and self.ttft <= ttft and (not self.itls or statistics.fmean(self.itls) <= itl)


@dataclass(frozen=True)
class Round:
    """All requests of one turn of a configuration, and what the processes counted meanwhile."""

    records: tuple[Record, ...]
    block_tokens: int
    token_nbytes: int
    routes: dict[str, int]
    """Bytes by the backend that moved them; tiers copy between memory and the page cache by themselves."""
    tier_nbytes: dict[str, tuple[int, int]]
    """Bytes read out of each tier and written into it."""
    refused_blocks: int
    """Blocks that a tier below the first did not take."""
    cpu_seconds: float

    @property
    def done(self) -> list[Record]:
        """The requests that were served."""
        return [one for one in self.records if one.done]

    @property
    def seconds(self) -> float:
        """From the first request's coming to the last token."""
        ends = [one.tokens[-1] for one in self.done]
        return max(ends) - min(one.came for one in self.records) if ends else 0.0

    @property
    def waited_for(self) -> list[Record]:
        """The requests that have objectives."""
        return [one for one in self.records if not one.request.batch]

    def attainment(self, ttft: float, itl: float) -> float:
        """Return the share of requests that met both objectives, of those that have any."""
        asked = self.waited_for
        return sum(one.meets(ttft, itl) for one in asked) / len(asked) if asked else 0.0

    def goodput(self, ttft: float, itl: float) -> float:
        """Return how many requests a second met both objectives."""
        good = sum(one.meets(ttft, itl) for one in self.waited_for)
        return good / self.seconds if good else 0.0

    @property
    def kv_nbytes(self) -> int:
        """Bytes of KV cache that went from prefill to decode, of the requests' tokens alone."""
        return sum(one.request.prompt for one in self.done) * self.token_nbytes

    def hit_rates(self) -> dict[str, float]:
        """Return the share of all prompts' tokens that each tier had."""
        total = sum(one.request.prompt for one in self.done)
        counts = Counter(name for one in self.done for name in one.said["tiers"])
        return {name: count * self.block_tokens / total for name, count in counts.items()}


def quantiles(values: Iterable[float], shares: Sequence[float] = (0.5, 0.99)) -> list[float | None]:
    """Return the values below which these shares lie; None where there is none."""
    found = Latencies(tuple(values))
    return [found.quantile(share) if len(found) else None for share in shares]


def ttfts(rounds: Iterable[Round]) -> list[float]:
    """Return the TTFT of each request that was served."""
    return [one.ttft for turn in rounds for one in turn.done if not one.request.batch]


def itls(rounds: Iterable[Round]) -> list[float]:
    """Return every time from one token to the next."""
    return [gap for turn in rounds for one in turn.done if not one.request.batch for gap in one.itls]


def exposed(rounds: Iterable[Round]) -> list[float]:
    """Return each request's exposed transfer time."""
    return [one.exposed for turn in rounds for one in turn.done]
