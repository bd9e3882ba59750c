"""Which route joins each pair of places, asked of a real agent, and what each route brings: verified, timed, beside memcpy."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nixl_async.descriptors import Places
from nixl_async.doctor.stage import FILE, HERE, HERE_VRAM, OBJECT, OTHER_HOST, PAGE_NBYTES, Place, Say, Stage, open_stage
from nixl_async.errors import IntegrityError, NixlError

TRIAL_SECONDS = 20.0
"""What a trial may take at most, however slow: then its transfer is cancelled."""
SMALL_NBYTES, N_SMALL = 4096, 200


@dataclass(frozen=True, slots=True)
class Trial:
    """A route that is tried: from `near` to `middle` by `route`, and back into other memory of the same kind."""

    route: str
    what: str
    near: str
    out: Places
    back: Places
    through: tuple[Places, Places] | None = None
    """Where the route joins two places that are not memory of this process: those two."""


async def explain_and_try(setup: dict[str, Any], say: Say) -> None:
    """Say the explanation of every pair of places, then the outcome of every trial; `setup["seconds"]` for all of them."""
    async with open_stage(setup, say) as stage:
        for src in stage.places.values():
            for dst in stage.places.values():
                _explain(stage, src, dst, say)
        if setup["seconds"] <= 0:
            return
        trials = list(_trials(stage))
        for trial in trials:
            say(event="begins", route=trial.route, what=trial.what)
            found: dict[str, Any] = {}
            try:
                async with asyncio.timeout(TRIAL_SECONDS):
                    await _try(stage, trial, setup["seconds"] / len(trials), found)
            except TimeoutError:
                found["error"] = f"it did not end within {TRIAL_SECONDS:g} s"
            except NixlError as error:
                found["error"] = str(error)
            say(event="trial", route=trial.route, what=trial.what, **found)


def _explain(stage: Stage, src: Place, dst: Place, say: Say) -> None:
    explained = stage.agent.explain(src.src, dst.dst)
    say(
        event="pair",
        src=src.name,
        dst=dst.name,
        route=explained.route,
        how=explained.how,
        next=list(explained.routes[1:]),
        refusals=explained.refusals,
        costs=[asdict(cost) for cost in explained.costs],
    )


def _trials(stage: Stage) -> list[Trial]:
    """List a trial for each route that an explanation offers; the peer that stands for another host has no others."""
    places = stage.places
    found: list[Trial] = []
    for near in (place for place in (HERE, HERE_VRAM) if place in places):
        for middle in places.values():
            # From here to itself is one pair; DRAM to VRAM is tried from DRAM's side.
            if OTHER_HOST in middle.name or (near == HERE_VRAM and middle.name.startswith(HERE) and middle.name != HERE_VRAM):
                continue
            there = stage.agent.explain(places[near].src, middle.dst)
            back = stage.agent.explain(middle.src, places[near].dst)
            both = [route for route in there.routes if route in back.routes]
            out, into = middle.dst, middle.src
            if middle.name == near:
                # There and back through the same bytes.
                out, into = places[near].dst, places[near].dst
            elif middle.name == FILE and stage.files is not None:
                out = into = stage.files[1][:]
            elif middle.name in (OBJECT, HERE_VRAM):
                out = into = middle.dst
            what = f"{near} ↔ {middle.name}"
            found.extend(Trial(route, what, near, out, into) for route in (both if near == HERE else both[:1]))
    if stage.direct is not None:
        whole = stage.direct[:]
        found.append(Trial("posix", f"{HERE} ↔ {FILE} past the page cache", HERE, whole, whole))
    if stage.files is not None and stage.agent.explain(stage.files[0][:], stage.files[1][:]).route == "staging":
        first, second = stage.files[0][:], stage.files[1][:]
        found.append(Trial("staging", f"{FILE} → {FILE}", HERE, first, second, (first, second)))
    return found


async def _try(stage: Stage, trial: Trial, seconds: float, found: dict[str, Any]) -> None:
    """Copy there and back with fresh bytes, compare them, then time rounds of both and of memcpy until `seconds` are over."""
    agent, place = stage.agent, stage.places[trial.near]
    sent, got = stage.memory[trial.near]
    route = None if trial.through else trial.route
    inside = trial.out is place.dst
    found["writes"], found["reads"], found["memcpy"] = [], [], []
    # Both are written to: memory that never was is mapped by the first copy, which takes longer.
    a, b = np.full(stage.nbytes, 2, np.uint8), np.ones(stage.nbytes, np.uint8)

    async def timed(src: Places, dst: Places, series: str | None, by: str | None = route) -> None:
        began = time.perf_counter()
        result = await agent.transfer(src, dst, backend=by)
        if series is not None:
            found[series].append(result.nbytes / (time.perf_counter() - began) / 1e9)

    async def there_and_back(timing: bool) -> None:
        await timed(place.src, trial.out, "writes" if timing and trial.through is None else None)
        if trial.through is not None:
            await timed(*trial.through, "writes" if timing else None, trial.route)
        if not inside:
            await timed(trial.back, place.dst, "reads" if timing and trial.through is None else None)

    async def verify(seed: int) -> None:
        pattern = np.random.default_rng(seed).integers(0, 256, stage.nbytes, np.uint8)
        _store(sent, pattern)
        _store(got, np.zeros(1, np.uint8))
        await there_and_back(False)
        await asyncio.to_thread(_compare, stage, pattern, _load(got))

    await verify(1)
    ends = time.monotonic() + seconds
    while not found["memcpy"] or time.monotonic() < ends:
        began = time.perf_counter()
        np.copyto(a, b)
        found["memcpy"].append(stage.nbytes / (time.perf_counter() - began) / 1e9)
        await there_and_back(True)
    await verify(2)
    found["verified"] = True
    if not trial.through and trial.near == HERE and (inside or "," in trial.what):
        found["small_p50"] = await _small(stage, trial)


async def _small(stage: Stage, trial: Trial) -> float:
    """Return the median time, in seconds, of a prepared transfer of one small page."""
    src, dst = stage.places[HERE].src, trial.out
    prepared = await stage.agent.prepare(_first(src), _first(dst), backend=trial.route)
    seconds = []
    for _ in range(N_SMALL):
        began = time.perf_counter()
        await stage.agent.transfer(prepared)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def _first(places: Any) -> Any:
    return places.region.pages([0], SMALL_NBYTES)


def _store(array: Any, value: Any) -> None:
    if isinstance(array, np.ndarray):
        array[...] = value
    else:
        import cupy

        array[...] = cupy.asarray(value)
        # What is enqueued on a stream is not yet there for transfers, which have streams of their own.
        cupy.cuda.get_current_stream().synchronize()


def _load(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()


def _compare(stage: Stage, sent: Any, got: Any) -> None:
    # Pages lie in one order in the memory that is sent, in another in what is received.
    pages = stage.nbytes // PAGE_NBYTES
    first, second = (np.random.default_rng(seed).permutation(pages) for seed in (1, 2))
    wrong = (sent.reshape(pages, -1)[first] != got.reshape(pages, -1)[second]).any(axis=1)
    if wrong.any():
        raise IntegrityError(f"{int(wrong.sum())} of {pages} pages arrived wrong")
