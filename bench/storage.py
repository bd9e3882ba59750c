"""What the storage suites share: their contenders, one measurement of all of them in turn, and the rows that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from bench.process import Contender, Single, WorkerError
from bench.report import Figure, Row
from bench.served import Place
from bench.session import OURS, Settings, WrongBytes, singles

UVLOOP = "nixl_async, uvloop"
SIGNED = "nixl_async, signed"
OBSTORE, AWSCRT, SDK = "obstore", "awscrt", "Azure SDK"
SOCKET = "socket"
PAUSE_SECONDS = 0.001
"""NIXL is polled without pause, as its own examples do; and once more with these pauses, which leave its threads the CPU."""
AT_ONCE = 16
"""Requests in flight of clients that leave it to the caller."""
AWSCRT_GBPS = 10.0
SEED = 11
_GB = 1e9


def nixl_label(n_threads: int | None, *, paused: bool = False) -> str:
    """Name NIXL with a number of threads; `None`: as installed."""
    return ("NIXL, default" if n_threads is None else f"NIXL, {n_threads} threads") + (", 1 ms polls" if paused else "")


def ours_s3(place: Place, *, label: str = OURS, loop: str = "", **options: Any) -> Contender:
    """Describe our agent with a store of an S3 server."""
    given = place.s3
    store = {
        "endpoint_url": given["endpoint"],
        "access_key": given["access_key"],
        "secret_key": given["secret_key"],
        "region": given["region"],
        "addressing": "path",
        **options,
    }
    url = f"s3://{given['bucket']}/"
    return _ours(label, loop, {"backend": "s3", "url": url, "store": store})


def ours_azure(place: Place, bucket: str) -> Contender:
    """Describe our agent with a store of an Azure server."""
    store = {"connection_string": place.server.connection_string}
    return _ours(OURS, "", {"backend": "azure", "url": f"az://{bucket}/", "store": store})


def _ours(label: str, loop: str, options: dict[str, Any]) -> Contender:
    return Contender(label, "bench.workers.ours_objects", environment={"BENCH_LOOP": loop}, options=options)


def uvloop_s3(place: Place, **options: Any) -> list[Contender]:
    """Describe our agent on uvloop, if that is installed."""
    return [ours_s3(place, label=UVLOOP, loop="uvloop", **options)] if find_spec("uvloop") else []


def nixl_s3(settings: Settings, place: Place, threads: Sequence[int | None]) -> list[Contender]:
    """Describe NIXL's OBJ plugin, once for each number of threads."""
    given = place.s3
    parameters = {
        "access_key": given["access_key"],
        "secret_key": given["secret_key"],
        "bucket": given["bucket"],
        "endpoint_override": given["endpoint"],
        "scheme": "http",
        "region": given["region"],
        "use_virtual_addressing": "false",
        "req_checksum": "required",
        "resp_checksum": "required",
    }
    return nixl_objects(settings, "OBJ", parameters, threads)


def nixl_objects(
    settings: Settings, plugin: str, parameters: dict[str, str], threads: Sequence[int | None]
) -> list[Contender]:
    """Describe an object plugin of NIXL's once for each number of threads, and with pauses between polls for the last."""
    if not settings.nixl_python:
        return []
    found = [_nixl(settings, plugin, parameters, n, paused=False) for n in threads]
    return [*found, _nixl(settings, plugin, parameters, threads[-1], paused=True)]


def _nixl(settings: Settings, plugin: str, parameters: dict[str, str], n_threads: int | None, *, paused: bool) -> Contender:
    if n_threads is not None:
        parameters = parameters | {"num_threads": str(n_threads)}
    options = {"backend": plugin, "parameters": parameters, "poll_seconds": PAUSE_SECONDS if paused else 0}
    label, python = nixl_label(n_threads, paused=paused), settings.nixl_python or ""
    return Contender(label, "bench.workers.nixl_storage", python, options=options, stopped_between_turns=True)


def stock_s3(place: Place) -> list[Contender]:
    """Describe the stock clients that are installed."""
    options = place.s3 | {"at_once": AT_ONCE, "gbps": AWSCRT_GBPS}
    found = [(OBSTORE, "obstore", "bench.workers.stock_obstore"), (AWSCRT, "awscrt", "bench.workers.stock_awscrt")]
    return [Contender(label, module, options=options) for label, package, module in found if find_spec(package)]


@dataclass
class Field:
    """All that take part in a suite: those who are compared, and the raw sockets that also lay out and check objects."""

    contenders: dict[str, Single]
    raw: Single
    settings: Settings
    limited: bool = True
    """Whether the raw limit takes part in the turns."""
    checkable: bool = True
    """Whether the raw limit moves the bench's bytes, and not its own."""


@contextmanager
def field(contenders: Sequence[Contender], raw: Contender, nbytes: int, settings: Settings) -> Iterator[Field]:
    """Start all contenders with a buffer of `nbytes` bytes each."""
    with singles(contenders, nbytes, settings) as started, Single(raw, nbytes) as limit:
        yield Field(started, limit, settings)


def raw_http(place: Place) -> Contender:
    """Describe plain sockets."""
    options = {"host": "127.0.0.1", "port": place.server.port}
    return Contender(SOCKET, "bench.workers.raw_http", options=options)


@dataclass(frozen=True)
class Work:
    """What every contender does in a turn: get or put `count` objects, or blocks, of `nbytes` bytes."""

    op: str
    nbytes: int
    count: int
    where: dict[str, Any]

    @property
    def total(self) -> int:
        """The bytes of a turn."""
        return self.nbytes * self.count


Samples = dict[str, list[dict[str, float]]]


def measure(players: Field, work: Work, what: str) -> Samples:
    """Have everyone do the work in turn, A B C A B C, the raw sockets too; every byte of every turn is checked.

    A contender of others' that fails is left out from there on, with a warning.

    Raises:
        WrongBytes: a contender reported success, but the bytes are not where they should be.
    """
    settings = players.settings
    lay_out(players, work)
    everyone = players.contenders | ({players.raw.contender.label: players.raw} if players.limited else {})
    samples: Samples = {label: [] for label in everyone}
    for single in everyone.values():
        with single.turn():
            _aim(single, work, work.op)
    for turn in range(settings.rounds + 1):
        for number, (label, single) in enumerate(list(everyone.items())):
            settings.progress(f"{what}: {label}, " + (f"round {turn} of {settings.rounds}" if turn else "warming up"))
            try:
                result = turn_checked(players, single, work, turn * len(everyone) + number + 1)
            except WorkerError as error:
                if label == OURS or single is players.raw:
                    raise
                settings.warn(f"{label} is left out of {what}: {error}")
                del everyone[label], samples[label]
                continue
            if turn:
                samples[label].append(result)
    return samples


def lay_out(players: Field, work: Work) -> None:
    """Put what is to be got, and make files as long as they will be."""
    _aim(players.raw, work, "write")
    if work.op == "read" or "path" in work.where:
        players.raw.worker.call("fill", salt=SEED)
        players.raw.worker.call("store")


def turn_checked(players: Field, single: Single, work: Work, salt: int, do: str = "move") -> Any:
    """Do the work once; only the work is timed. Getting is checked where the bytes arrive, putting by getting them back."""
    worker, checker = single.worker, single.worker
    if single is players.raw and not players.checkable:
        return worker.call(do)
    with single.turn():
        if work.op == "read" and "path" not in work.where:
            # Once for nothing: while it was the others' turn, connections, caches and the server's memory have gone cold.
            worker.call(do)
        worker.call("blank" if work.op == "read" else "fill", salt=salt)
        result = worker.call(do)
        if work.op == "write":
            checker = players.raw.worker
            checker.call("fetch")
        wrong = checker.call("check", salt=SEED if work.op == "read" else salt)
    if wrong:
        raise WrongBytes(f"{single.contender.label}: {wrong} of {work.count} objects hold wrong bytes")
    return result


def _aim(single: Single, work: Work, op: str) -> None:
    arguments = {"op": op, "page_nbytes": work.nbytes, "n_pages": work.count, "seed": SEED}
    single.worker.call("aim", where=work.where, **arguments)


def rows(command: str, case: dict[str, Any], work: Work, samples: Samples, *, raw: str = SOCKET) -> tuple[Row, Row]:
    """Make two rows of a measurement: bytes per second, and the client's CPU seconds for each 10^9 bytes."""
    speed = {label: _speed(label, work, taken) for label, taken in samples.items()}
    cost = {label: _cost(label, work, taken) for label, taken in samples.items()}
    both = []
    for unit, figures in (("GB/s", speed), ("CPU s/GB", cost)):
        limit = figures.pop(raw, None)
        mine = figures.pop(OURS)
        both.append(Row(command, case, unit, mine, list(figures.values()), limit))
    return both[0], both[1]


def _speed(label: str, work: Work, taken: list[dict[str, float]]) -> Figure:
    return Figure(label, tuple(work.total / one["seconds"] / _GB for one in taken))


def _cost(label: str, work: Work, taken: list[dict[str, float]]) -> Figure:
    return Figure(label, tuple(one["cpu"] / work.total * _GB for one in taken))
