"""Carries out the plan: breaks members, links and the store when their time comes, and makes them whole again."""

from __future__ import annotations

import asyncio
import time

from bench.churn.fleet import Fleet
from bench.churn.plan import Action
from bench.churn.records import Done


class Chaos:
    """Runs the actions of a plan on a fleet; `began` is the time of the plan's zero."""

    def __init__(self, fleet: Fleet, began: float) -> None:
        self._fleet, self._began = fleet, began
        self._records = fleet.records

    async def run(self, plan: list[Action]) -> None:
        """Carry out all of it; return when the last thing that was broken is whole again."""
        async with asyncio.TaskGroup() as group:
            for action in plan:
                group.create_task(self._at_its_time(action))

    async def _at_its_time(self, action: Action) -> None:
        await asyncio.sleep(max(0.0, self._began + action.at - time.monotonic()))
        fleet = self._fleet
        done = Done(action, time.monotonic(), targets=action.targets)
        self._records.done.append(done)
        absent = [name for name in action.targets if not fleet.up(name)]
        if absent:
            done.skipped = f"{', '.join(absent)} is not at work"
            done.ended = done.began
            fleet.tell(f"{action}: skipped, {done.skipped}")
            # Who is missing later on would be missed by what comes then.
            if action.added:
                await fleet.start(action.added)
            return
        done.lives = tuple(fleet.processes[name].life.number for name in action.targets)
        fleet.tell(str(action))
        for name in action.targets:
            fleet.unwatch(name)
        await self._carry_out(action, done)

    async def _carry_out(self, action: Action, done: Done) -> None:
        fleet, seconds = self._fleet, action.seconds
        match action.kind:
            case "kill" | "crowd":
                await asyncio.gather(*(fleet.kill(name) for name in action.targets))
                await asyncio.sleep(seconds)
                await self._start(action.targets, done)
            case "leave":
                await fleet.leave(action.targets[0])
                await asyncio.sleep(seconds)
                await self._start(action.targets, done)
            case "replace" | "die":
                done.for_good = True
                (name,) = action.targets
                await (fleet.leave(name) if action.kind == "replace" else fleet.kill(name))
                await self._start((action.added,), done)
            case "pause" | "stop" | "freeze":
                (name,) = action.targets
                fleet.stop(name)
                await asyncio.sleep(seconds)
                fleet.go_on(name)
                self._whole(action.targets, done)
            case "blip" | "gap" | "cut" | "unplug":
                (name,) = action.targets
                await fleet.cut(name, unplug=action.kind == "unplug")
                # From when on nothing passes.
                done.began = time.monotonic()
                await asyncio.sleep(seconds)
                await fleet.heal(name)
                self._whole(action.targets, done)
            case "store-restart":
                assert fleet.etcd is not None
                await fleet.etcd.kill()
                await fleet.etcd.start()
                done.ended = time.monotonic()
            case "store-outage":
                await self._outage(action, done)

    async def _outage(self, action: Action, done: Done) -> None:
        fleet = self._fleet
        assert fleet.etcd is not None
        await fleet.etcd.kill()
        (name,) = action.targets
        ends = time.monotonic() + action.seconds
        # One dies meanwhile, and comes back after the store; one is new, and nobody can find it before.
        killed = Done(Action(action.at, "kill", (name,), action.seconds), time.monotonic(), targets=(name,), lives=done.lives)
        self._records.done.append(killed)
        await fleet.kill(name)
        added = asyncio.create_task(fleet.start(action.added))
        await asyncio.sleep(max(0.0, ends - time.monotonic()))
        await fleet.etcd.start()
        done.ended = time.monotonic()
        await added
        fleet.watch(action.added, done.ended)
        await self._start((name,), killed)

    async def _start(self, names: tuple[str, ...], done: Done) -> None:
        processes = await asyncio.gather(*(self._fleet.start(name) for name in names))
        for process in processes:
            if process.life.ready is not None:
                self._fleet.watch(process.life.name, process.life.ready)
        done.ended = time.monotonic()

    def _whole(self, names: tuple[str, ...], done: Done) -> None:
        done.ended = time.monotonic()
        for name in names:
            self._fleet.watch(name, done.ended)
