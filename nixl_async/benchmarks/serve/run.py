"""One run from its options to its report: the processes, the configurations in turn, what is shown meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from nixl_async.backend import SCHEMES
from nixl_async.benchmarks.serve import report
from nixl_async.benchmarks.serve.fleet import DECODE, PREFILL, Fleet
from nixl_async.benchmarks.serve.leg import Case, Leg
from nixl_async.benchmarks.serve.metrics import Record, Round, exposed, quantiles, ttfts
from nixl_async.benchmarks.serve.options import (
    AUTO,
    MIB,
    Configuration,
    Options,
    Served,
    configurations,
    requests_of,
)
from nixl_async.benchmarks.system import describe
from nixl_async.errors import NixlError
from nixl_async.storage import parse_store

if TYPE_CHECKING:
    from rich.status import Status


class RequestsFailed(NixlError):
    """Say how many requests were not served, and why."""


class Screen:
    """Shows on standard error how far a run is; what has ended a line each, also where it is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._status: Status | None = None
        self._doing = ""

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._status = self._console.status("starting processes")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def doing(self, text: str) -> None:
        """Say what is being done."""
        self._doing = text
        if self._status is not None:
            self._status.update(escape(text))

    def changed(self, records: list[Record], total: int) -> None:
        """Say what has become of the requests that have come."""
        if self._status is None or not records or records[0].request.number < 0:
            return
        done, failed = sum(one.done for one in records), sum(bool(one.error) for one in records)
        trouble = f", {failed} failed" if failed else ""
        self._status.update(
            escape(f"{self._doing}: {done} of {total} served, {len(records) - done - failed} under way{trouble}")
        )

    def leg(self, text: str, turn: Round) -> None:
        """Show what a leg has come to."""
        (p50, p99), (hidden,) = quantiles(ttfts([turn])), quantiles(exposed([turn]), (0.5,))
        said = [f"{len(turn.done)} served"]
        if failed := len(turn.records) - len(turn.done):
            said.append(f"{failed} failed")
        if p50 is not None and p99 is not None and hidden is not None:
            said.append(f"TTFT p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, exposed p50 {hidden * 1e3:.2f} ms")
        if turn.refused_blocks:
            said.append(f"tiers did not take {turn.refused_blocks} blocks")
        self._console.print(f"[dim]{escape(text)}: {', '.join(said)}[/]")


async def run(options: Options, command: Sequence[str]) -> None:
    """Carry out a run and report it, also what was measured before a signal ended it.

    Raises:
        ConfigurationError: the trace, the model or the sizes cannot be served here.
        RanksFailed: a process did not start, a backend does not work, or bytes arrived wrong.
        RequestsFailed: after the report, some requests were not served.
    """
    rounds = [requests_of(options, turn) for turn in range(options.rounds)]
    served = Served.of(options, [one for requests in rounds for one in requests])
    wanted = configurations(options)
    measured: dict[Configuration, list[Round]] = {one: [] for one in wanted}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    system = await asyncio.to_thread(describe)
    try:
        with Screen() as screen, ExitStack() as stack:
            nvme = ""
            if options.nvme:
                nvme = tempfile.mkdtemp(prefix="serve-", dir=options.nvme)
                stack.callback(shutil.rmtree, nvme, ignore_errors=True)
            async with Fleet(setups(options, served, nvme)) as fleet:
                for number in range(options.rounds * len(wanted)):
                    turn, chosen = number // len(wanted), wanted[number % len(wanted)]
                    if not (fleet.living(PREFILL) and fleet.living(DECODE)):
                        break
                    text = f"round {turn + 1} of {options.rounds}, {chosen.label}"
                    screen.doing(text)
                    case = Case(
                        rounds[turn], options.hash_tokens, served.geometry.token_nbytes, options.page_size, options.timeout
                    )
                    total = len(rounds[turn])
                    leg = Leg(fleet, case, number, chosen, lambda records, total=total: screen.changed(records, total))  # type: ignore[misc]
                    measured[chosen].append(await leg.run())
                    screen.leg(text, measured[chosen][-1])
    finally:
        known = {one: turns for one, turns in measured.items() if turns}
        if known:
            report.write(options, served, known, command, system, started)
    records = [one for turns in measured.values() for turn in turns for one in turn.records]
    if failed := Counter(one.error for one in records if one.error):
        said = "; ".join(f"{count}: {text}" for text, count in failed.most_common(3))
        raise RequestsFailed(f"{failed.total()} of {len(records)} requests failed: {said}")


def setups(options: Options, served: Served, nvme: str) -> list[dict[str, Any]]:
    """Return what each process is told first."""
    backends = None if AUTO in options.backend else [*options.backend, "memory", "posix"]
    if backends is not None and options.objects:
        backends.append(SCHEMES[parse_store(options.objects, {}).scheme])
    common = {
        "token": secrets.token_hex(16),
        "backends": backends,
        "geometry": dataclasses.asdict(served.geometry),
        "compute": dataclasses.asdict(served.compute),
        "page_tokens": options.page_size,
        "block_tokens": options.hash_tokens,
        "slo_ttft": options.slo_ttft_ms / 1e3,
        "tiers": {
            "dram": options.dram_mib * MIB,
            "nvme": nvme,
            "nvme_nbytes": options.nvme_mib * MIB,
            "objects": options.objects,
            "object_options": {"endpoint_url": options.objects_endpoint} if options.objects_endpoint else {},
            "run": f"serve-{secrets.token_hex(4)}",
        },
    }
    sides = ((PREFILL, options.prefill, served.prefill_pages), (DECODE, options.decode, served.decode_pages))
    return [
        {**common, "role": kind, "name": f"{kind}-{number}", "pages": pages}
        for kind, count, pages in sides
        for number in range(count)
    ]
