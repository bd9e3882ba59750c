"""What every suite shares: the settings of a run, who takes part, and how turns alternate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from bench.process import Contender, Pair, Processes, Single, Worker, WorkerError
from bench.report import Row

OURS = "nixl_async"
NIXL = "NIXL"
NIXL_SAME = "NIXL, our UCX settings"
MOONCAKE = "Mooncake"
OUR_UCX_ENVIRONMENT = {"UCX_TCP_TX_SEG_SIZE": "64k", "UCX_TCP_RX_SEG_SIZE": "256k"}
"""What our UCX backend sets on its own context, as a stock UCX program would be given it."""
TCP_ONLY = {"UCX_TLS": "tcp"}


@dataclass(frozen=True)
class Path:
    """A way between the two processes: the backends that our side may use, and what restricts UCX to the same."""

    name: str
    backends: tuple[str, ...] | None
    environment: dict[str, str] = field(default_factory=dict)


SAME_HOST = Path("same host", ("samehost",))
TCP = Path("tcp", ("tcp",), TCP_ONLY)
UCX_TCP = Path("ucx tcp", ("ucx",), TCP_ONLY)
DEFAULT = Path("default route", None)
PAGES = (4096, 16384, 65536, 262144, 1 << 20)


@dataclass
class Settings:
    """The options of a run."""

    nbytes: int = 256 << 20
    rounds: int = 7
    pages: tuple[int, ...] = PAGES
    sizes: tuple[int, ...] = ()
    """Sizes of objects and of a file's blocks, bytes; empty: those that the promises are about."""
    count: int = 2000
    """How many small operations make a latency figure, in all."""
    seconds: float = 3.0
    """How long the busy peer spins, and an idle agent is watched."""
    quick: bool = False
    nixl_python: str | None = None
    mooncake_python: str | None = None
    progress: Callable[[str], None] = field(default=lambda text: None)
    warn: Callable[[str], None] = field(default=lambda text: None)

    def made_quick(self) -> Settings:
        """Shrink everything: it shows that the commands work, not how fast anything is."""
        return replace(self, quick=True, nbytes=2 << 20, rounds=2, pages=(4096, 65536), count=40, seconds=0.5)


def ours(path: Path = DEFAULT, label: str = OURS) -> Contender:
    """Describe our side; it is left running between turns, because idle it must cost nothing."""
    backends = None if path.backends is None else list(path.backends)
    return Contender(label, "bench.workers.ours", environment=path.environment, options={"backends": backends})


def nixl(settings: Settings, path: Path = DEFAULT) -> list[Contender]:
    """Describe NIXL as installed, and with our UCX settings; its progress threads spin, so it stops between turns."""
    if not settings.nixl_python:
        return []
    base = path.environment
    return [
        Contender(NIXL, "bench.workers.nixl", settings.nixl_python, base, stopped_between_turns=True),
        Contender(
            NIXL_SAME, "bench.workers.nixl", settings.nixl_python, base | OUR_UCX_ENVIRONMENT, stopped_between_turns=True
        ),
    ]


def mooncake(settings: Settings) -> list[Contender]:
    """Describe Mooncake's TCP transport."""
    if not settings.mooncake_python:
        return []
    return [Contender(MOONCAKE, "bench.workers.mooncake", settings.mooncake_python, stopped_between_turns=True)]


def raw() -> Contender:
    """Describe the raw limits."""
    return Contender("raw", "bench.workers.raw", sys.executable)


P = TypeVar("P", bound=Processes)
T = TypeVar("T")


@contextmanager
def pairs(contenders: Iterable[Contender], nbytes: int, settings: Settings) -> Iterator[dict[str, Pair]]:
    """Start every contender's two processes, one contender at a time, and leave the spinning ones stopped."""
    with ExitStack() as stack:
        yield _started(contenders, settings, stack, lambda contender: Pair(contender, nbytes))


@contextmanager
def singles(contenders: Iterable[Contender], nbytes: int, settings: Settings) -> Iterator[dict[str, Single]]:
    """Start every contender's only process, one contender at a time, and leave the spinning ones stopped."""
    with ExitStack() as stack:
        yield _started(contenders, settings, stack, lambda contender: Single(contender, nbytes))


def _started(
    contenders: Iterable[Contender], settings: Settings, stack: ExitStack, start: Callable[[Contender], P]
) -> dict[str, P]:
    started = {}
    for contender in contenders:
        settings.progress(f"starting {contender.label}")
        try:
            started[contender.label] = stack.enter_context(start(contender))
        except WorkerError as error:
            if contender.label == OURS:
                raise
            settings.warn(f"{contender.label} is left out, it does not start: {error}")
            continue
        started[contender.label].rest()
    return started


def alternate(started: dict[str, P], settings: Settings, what: str, measure: Callable[[P], T]) -> dict[str, list[T]]:
    """Take `rounds` samples of each contender, A B C A B C, after a round of warming up that does not count."""
    samples: dict[str, list[T]] = {label: [] for label in started}
    for turn in range(settings.rounds + 1):
        for label, processes in started.items():
            settings.progress(f"{what}: {label}, " + (f"round {turn} of {settings.rounds}" if turn else "warming up"))
            with processes.turn():
                value = measure(processes)
            if turn:
                samples[label].append(value)
    return samples


class WrongBytes(AssertionError):
    """A contender reported success, but the destination does not hold what it should."""


def start_run(pair: Pair, op: str, page_nbytes: int, n_pages: int, seed: int) -> tuple[Worker, Worker]:
    """Fill the source and tell both sides what comes; return source and destination."""
    source, destination = (pair.initiator, pair.target) if op == "write" else (pair.target, pair.initiator)
    with pair.turn():
        source.call("fill", salt=seed)
        for side in (pair.initiator, pair.target):
            side.call("ready", op=op, page_nbytes=page_nbytes, n_pages=n_pages, seed=seed)
    return source, destination


def move_checked(pair: Pair, destination: Worker, salt: int, blank: int) -> dict[str, Any]:
    """Blank the destination, move once, and check every byte; only the move is timed.

    Raises:
        WrongBytes: the move left something else than the source's bytes.
    """
    destination.call("blank", salt=blank)
    result: dict[str, Any] = pair.initiator.call("move")
    check(pair, destination, salt)
    return result


def check(pair: Pair, destination: Worker, salt: int) -> None:
    """Compare every byte of the destination with what the source had."""
    if wrong := destination.call("check", salt=salt):
        raise WrongBytes(f"{pair.contender.label}: {wrong} pages hold wrong bytes")


def judged(rows: Iterable[Row], settings: Settings) -> Iterator[Row]:
    """Pass rows on; at `--quick` sizes no promise is judged."""
    for row in rows:
        if settings.quick:
            row.checks = [replace(item, met=None) for item in row.checks]
        yield row
