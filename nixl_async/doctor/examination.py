"""The examination: facts first, then what has to be asked of processes of their own, then the judgement."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nixl_async.doctor.children import Answer, ask
from nixl_async.doctor.facts import Facts, gather
from nixl_async.doctor.findings import judge
from nixl_async.doctor.report import Report, Route, Tried
from nixl_async.doctor.stage import OTHER_HOST, PAGE_NBYTES, SAME_HOST, make_token
from nixl_async.doctor.ucx import Library, ask_ucx
from nixl_async.errors import ConfigurationError

PROBE_SECONDS = 30.0
ROUTES_SECONDS = 60.0
TEST_SECONDS = 10.0
AT_ONCE = 2
NBYTES, LEAST_NBYTES = 64 << 20, 1 << 20
OF_DEVICES = ("cuda", "cuda_ipc", "gds")
"""Like ucx, backends over other people's native libraries: each is opened once by itself, and left out if that ends badly."""


async def examine(
    *,
    seconds: float = TEST_SECONDS,
    directory: str | os.PathLike[str] | None = None,
    nbytes: int = NBYTES,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Examine this machine; `seconds` for the self-test, 0 leaves it out. Files are written in `directory` (default: temporary).

    `nbytes` are moved at once, less where memory or the file system has little room. `progress` hears what is being done.

    Raises:
        ConfigurationError: the directory cannot be written.
    """
    facts = gather()
    report = Report(facts)
    progress("asking UCX, CUDA and the kernel what there is")
    await _few_at_once([_ask_ucx(report), _probe(report, "gpu"), _probe(report, "file-engine")])
    if report.gpu.get("devices"):
        # Without a device they say so by themselves, before they load anything.
        await _few_at_once([*(_open(report, name) for name in OF_DEVICES), _probe(report, "gds")])
    try:
        made = tempfile.TemporaryDirectory(prefix="nixl-async-doctor-", dir=directory)
    except OSError as error:
        where = tempfile.gettempdir() if directory is None else directory
        raise ConfigurationError(f"directory {str(where)!r} cannot be written: {error.strerror}") from None
    with made as path:
        nbytes = _nbytes(facts, Path(path), nbytes)
        setup = {"token": make_token(), "nbytes": nbytes, "without": report.missing, "directory": path, "seconds": seconds}
        progress("starting peers")
        async with _peers(report, setup) as addresses:
            peers = {name: addresses[name] for name in (SAME_HOST, OTHER_HOST) if name in addresses}
            await _routes(report, setup | {"peers": peers}, seconds, progress)
    report.findings = judge(report)
    return report


async def _few_at_once(work: list[Coroutine[Any, Any, object]]) -> None:
    # Each is a process that loads libraries, and takes three of our descriptors: there may be few cores and few descriptors.
    room = asyncio.Semaphore(AT_ONCE)

    async def one(part: Coroutine[Any, Any, object]) -> None:
        async with room:
            await part

    async with asyncio.TaskGroup() as group:
        for part in work:
            group.create_task(one(part))


def _nbytes(facts: Facts, directory: Path, wanted: int) -> int:
    room = min(facts.number("memory", "available bytes", 1e18), facts.number("memory", "limit of the cgroup, bytes", 1e18))
    found = os.statvfs(directory)
    # Three processes and their copies take some ten times as much memory, the files and objects five times.
    fits = min(wanted, int(room) >> 5, (found.f_bavail * found.f_frsize) >> 3)
    return max(LEAST_NBYTES, fits // PAGE_NBYTES * PAGE_NBYTES)


async def _probe(report: Report, what: str) -> None:
    answer = await ask(what, seconds=PROBE_SECONDS)
    found = next((message for message in answer.messages if message.get("event") in ("gpu", "engine", "gds")), {})
    if answer.failure:
        report.failures[what] = answer.failure
    elif what == "gpu":
        report.gpu = found
        for number, device in enumerate(found.get("devices", ())):
            report.facts.add("gpu", f"device {number}", f"{device['name']}, {device['nbytes'] / 2**30:.1f} GiB", "cuda driver")
    elif what == "file-engine":
        report.engine = found
        report.facts.add("storage", "file engine", found.get("how"), "io_uring_setup")
    else:
        report.gds = found


async def _ask_ucx(report: Report) -> None:
    told = next((message for message in await _open(report, "ucx") if message.get("event") == "library"), None)
    report.ucx = await ask_ucx(None if told is None else Library(told["version"], told["path"]))
    if report.ucx is None:
        return
    if report.ucx.failure:
        report.failures["ucx_info"] = report.ucx.failure
    if (library := report.ucx.library) is not None:
        report.facts.add("ucx", "version that is loaded", library.version, library.path)
    for program, version in ((report.ucx.program, report.ucx.version), *report.ucx.others):
        report.facts.add("ucx", "version of ucx_info", version or None, program)
    for name in dict.fromkeys(name for name, _ in report.ucx.transports):
        report.facts.add("ucx", name, ", ".join(report.ucx.devices(name)), "ucx_info -d")


async def _open(report: Report, name: str) -> list[dict[str, Any]]:
    answer = await ask("backend", seconds=PROBE_SECONDS, setup={"name": name})
    refused = next((message for message in answer.messages if message.get("event") == "refused"), None)
    if answer.failure:
        report.failures[f"opening {name}"] = answer.failure
        report.missing[name] = f"opening it was tried in a process of its own: {answer.failure}"
    elif refused is not None:
        report.missing[name] = refused["text"]
        if refused["kind"] != "MissingDependency":
            report.failures[f"opening {name}"] = refused["text"]
    return answer.messages


@asynccontextmanager
async def _peers(report: Report, setup: dict[str, Any]) -> AsyncIterator[dict[str, str]]:
    """Start the two peers, as processes beside the one that connects to them: the kernel may allow more to a parent."""
    enough = asyncio.Event()
    addresses: dict[str, str] = {}

    async def be(name: str, answered: asyncio.Event) -> None:
        def heard(message: dict[str, Any]) -> None:
            if message.get("event") == "serving":
                addresses[name] = message["address"]
                answered.set()

        bound = PROBE_SECONDS + ROUTES_SECONDS + setup["seconds"] * 3
        answer = await ask("peer", seconds=bound, setup=setup | {"name": name}, on_message=heard, until=enough)
        if why := answer.failure or _refusal(answer):
            report.failures[f"the peer {name!r}"] = why
        answered.set()

    ready = [asyncio.Event(), asyncio.Event()]
    async with asyncio.TaskGroup() as group:
        for name, event in zip((SAME_HOST, OTHER_HOST), ready, strict=True):
            group.create_task(be(name, event))
        try:
            for event in ready:
                await event.wait()
            yield addresses
        finally:
            enough.set()


def _refusal(answer: Answer) -> str:
    return next((str(message["text"]) for message in answer.messages if message.get("event") == "refused"), "")


async def _routes(report: Report, setup: dict[str, Any], seconds: float, progress: Callable[[str], None]) -> None:
    under_way: list[tuple[str, str]] = []

    def heard(message: dict[str, Any]) -> None:
        match message.get("event"):
            case "opened":
                report.ranks = message["backends"]
                report.missing |= message["missing"]
                progress("asking for routes")
            case "absent":
                report.absent[message["place"]] = message["why"]
            case "pair":
                report.routes.append(_route(message))
            case "begins":
                under_way[:] = [(message["route"], message["what"])]
                progress(f"trying {message['route']}: {message['what']}")
            case "trial":
                under_way.clear()
                report.trials.append(_tried(message))

    answer = await ask("routes", seconds=ROUTES_SECONDS + 3 * seconds, setup=setup, on_message=heard)
    if why := answer.failure or _refusal(answer):
        if under_way:
            route, what = under_way[0]
            report.trials.append(Tried(route, what, False, error=f"the process that tried it: {why}"))
        else:
            report.failures["the routes"] = why


def _route(message: dict[str, Any]) -> Route:
    costs = message["costs"]
    expected = f"{costs[0]['seconds'] * 1e3:.2f} ms" if costs else ""
    names = {name: message[name] for name in ("src", "dst", "route", "how", "refusals")}
    return Route(**names, next=tuple(message["next"]), expected=expected)


def _tried(message: dict[str, Any]) -> Tried:
    series = {name: tuple(message.get(name, ())) for name in ("writes", "reads", "memcpy")}
    return Tried(
        message["route"],
        message["what"],
        bool(message.get("verified")),
        small_p50=message.get("small_p50"),
        error=message.get("error", ""),
        **series,
    )
