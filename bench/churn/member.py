"""One process of the drill's fleet: an agent that serves requests for pages (prefill), or makes them without pause (decode).

It takes orders as lines of JSON on standard input and reports as such on standard output. A request is a notification; the
prefill agent fills pages and pushes them into the decode agent's, or offers them, and the decode agent pulls. Then the decode
agent looks at every byte. Pages that were granted to a peer are used again when it has answered, or was lost.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.churn.flights import Flights
from bench.churn.ledger import Ledger
from bench.churn.lending import Lending, Lent
from bench.churn.network import Deafness
from bench.churn.pages import PAGE_NBYTES, Pages, owner_salt
from bench.churn.telling import Footprint, Records, resident, say
from nixl_async import Agent, Liveness, MemoryRegion, NixlError, Notification, Peer, PeerLost, Quarantined

REGION = "kv"
PREFIX = b"churn "
N_PAGES = 512
SIZES = (1, 1, 2, 4, 8, 16, 32, 64)
BULK_PAGES, BULK_SHARE = 128, 0.03
PUSH_SHARE = 0.5
CANCEL_SHARE = 0.04
CANCEL_SECONDS = 0.004
"""A few transfers are given up by their caller within this time."""
AVOID_SUSPECT = 0.8
"""How often a suspect peer is passed over: mostly, as a router would, and not always."""
WORKERS = 3
DRAIN_SECONDS = 5.0
BEAT_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


class Replaced(Exception):
    """Another life of the peer answers than was asked."""


class Expired(Exception):
    """It came to an end after the pages it was about may have been used for something else."""


class Refused(Exception):
    """The other side could not do its part, and says which error it met."""


class Member:
    """A member of the fleet, for the life of its process."""

    def __init__(self, setup: dict[str, Any], orders: asyncio.StreamReader) -> None:
        self.name, self.orders = str(setup["name"]), orders
        self.decodes = self.name.startswith("decode")
        self.limit, self.rate = float(setup["limit"]), float(setup["rate"])
        # Three steps of a request may each take the limit, and a little is lost between them.
        self.lease = 3 * self.limit + DRAIN_SECONDS
        settle = self.limit + DRAIN_SECONDS
        self.inject = set(setup["inject"])
        self.setup = setup
        self.ledger = Ledger(Path(setup["ledger"]))
        self.pages = Pages(N_PAGES)
        self.deafness = Deafness()
        self.rng = random.Random(setup["seed"])
        self.flights = Flights(self.limit, settle + float(setup["slack"]))
        self.answers: dict[int, tuple[str, asyncio.Future[dict[str, Any]]]] = {}
        self.lending = Lending(self.pages, settle, cuts_off="samehost" not in setup["backends"])
        self.watched: dict[str, float] = {}
        self.busy: set[str] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.paused = self.leaving = False
        self.go = asyncio.Event()
        self.next_request = time.monotonic_ns()
        self.agent: Agent
        self.region: MemoryRegion

    async def live(self) -> None:
        """Open the agent, work until told to leave, close it, and report what is left of it."""
        before = Footprint()
        setup = self.setup
        async with Agent(
            self.name,
            token=setup["token"],
            backends=setup["backends"],
            discovery=setup["discovery"],
            liveness=Liveness(2.0, 3.0, setup["stopped_seconds"]),
        ) as agent:
            self.agent = agent
            self.region = await agent.register(self.pages.memory, name=REGION)
            loops = [self._events(), self._listen(), self._beat()]
            running = [asyncio.create_task(loop) for loop in loops]
            address = await agent.serve(setup["host"])
            say(ready=time.monotonic(), address=address)
            if self.decodes:
                running += [asyncio.create_task(self._work()) for _ in range(WORKERS)]
            await self._obey()
            self.leaving = True
            for task in [*running, *self.tasks]:
                task.cancel()
            ended = await asyncio.gather(*running, *self.tasks, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception):
                    say(log=f"a task of the drill failed: {''.join(traceback.format_exception(error))[-1500:]}")
            overwritten = self.pages.audit()
            statistics = agent.statistics()
            rss = resident()
        await asyncio.get_running_loop().shutdown_default_executor()
        left = before.grown(Footprint())
        if agent.statistics().regions:
            left.append(f"{agent.statistics().regions} regions")
        if statistics.live_transfers:
            left.append(f"{statistics.live_transfers} transfers that live on")
        if "leak" in self.inject:
            left.append(f"fd {os.open(os.devnull, os.O_RDONLY)}: put there on purpose")
        say(
            gone=time.monotonic(),
            left=left,
            overwritten=overwritten,
            rss=rss,
            quarantined_pages={peer: len(pages) for peer, pages in self.lending.quarantined.items() if pages},
            quarantined_region=self.region.quarantined,
            routes=statistics.nbytes,
        )
        self.ledger.close()

    async def _obey(self) -> None:
        while line := await self.orders.readline():
            order = json.loads(line)
            match order["do"]:
                case "watch":
                    self.watched[order["peer"]] = order["since"]
                case "unwatch":
                    self.watched.pop(order["peer"], None)
                case "deaf":
                    self.deafness.begin()
                case "hear":
                    self.deafness.end()
                case "go":
                    self.go.set()
                case "pause":
                    self.paused = True
                case "leave":
                    return

    # What happens to others.

    async def _events(self) -> None:
        async for event in self.agent.membership():
            at = time.monotonic()
            if event.kind in ("regions", "discovered", "withdrawn"):
                continue
            say(event=event.kind, peer=event.peer, at=at, reason=event.reason)
            if event.kind in ("lost", "left"):
                self._gone(event.peer, event.kind, event.reason)
            elif event.kind == "joined":
                self.lending.joined(event.peer)

    def _gone(self, peer: str, kind: str, reason: str) -> None:
        error = PeerLost(f"{kind}: {reason}", peer=peer)
        for name, future in self.answers.values():
            if name == peer and not future.done():
                future.set_exception(error)
        self.lending.gone(peer, left=kind == "left")

    async def _beat(self) -> None:
        next_report = 0.0
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            self.flights.tick(now)
            self.lending.tick(now)
            if now >= next_report:
                next_report = now + BEAT_SECONDS
                say(beat=now, rss=resident(), fds=len(os.listdir("/proc/self/fd")), peers=len(self.agent.peers))

    # The prefill side.

    async def _listen(self) -> None:
        async for note in self.agent.notifications(prefix=PREFIX):
            message = json.loads(note.payload[len(PREFIX) :])
            match message["kind"]:
                case "push" | "pull":
                    task = asyncio.create_task(self._serve(note, message))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                case "over":
                    self.lending.over((note.peer, message["number"]))
                case "ready" | "pushed" | "failed":
                    self._answered(message)

    async def _serve(self, note: Notification, message: dict[str, Any]) -> None:
        number, count = message["number"], message["count"]
        answer: dict[str, Any] = {"kind": "failed", "number": number, "incarnation": self.agent.incarnation, "error": ""}
        places = self.pages.take(count)
        if places is None:
            await self._tell(note.peer, {**answer, "error": "NoPages"})
            return
        self.pages.fill(places, owner_salt(self.name, self.agent.incarnation), number)
        answer["places"] = places
        if message["kind"] == "pull":
            self.lending.offer((note.peer, number), places, time.monotonic() + self.lease + 1)
            await self._tell(note.peer, {**answer, "kind": "ready"})
            return
        done = PREFIX + json.dumps({**answer, "kind": "pushed"}).encode()
        try:
            if time.monotonic() - message["at"] > self.limit:
                # Nobody waits for it any more.
                raise Expired
            peer = self.agent.peers.get(note.peer)
            if peer is None or peer.incarnation != message["incarnation"]:
                raise Replaced
            target = peer.region(REGION).pages(message["places"], PAGE_NBYTES)
            await self._transfer(note.peer, self.region.pages(places, PAGE_NBYTES), target, done)
        except Quarantined:
            self.lending.keep(places)
            await self._tell(note.peer, {**answer, "error": "Quarantined"})
            return
        except (NixlError, TimeoutError, Replaced, Expired) as error:
            await self._tell(note.peer, {**answer, "error": type(error).__name__})
        except BaseException:
            self.pages.give_back(places)
            raise
        self.pages.give_back(places)

    async def _tell(self, peer: str, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self.limit):
                await self.agent.notify(peer, PREFIX + json.dumps(message).encode())
        except (PeerLost, TimeoutError):
            # Who asked is gone, or does not read: that is noticed there, too.
            pass

    # The decode side.

    async def _work(self) -> None:
        rng = self.rng
        await self.go.wait()
        await asyncio.sleep(rng.uniform(0, WORKERS / self.rate))
        while not self.paused:
            began = time.monotonic()
            peer = self._choose()
            if peer is not None:
                watched = self.watched.get(peer)
                self.busy.add(peer)
                try:
                    done = await self._request(peer)
                finally:
                    self.busy.discard(peer)
                own = self.watched.get(self.name)
                if done and watched is not None and began >= watched and self.watched.pop(peer, None) is not None:
                    say(first=peer, at=time.monotonic())
                if done and own is not None and began >= own and self.watched.pop(self.name, None) is not None:
                    say(first=self.name, at=time.monotonic())
            pause = WORKERS / self.rate * rng.uniform(0.5, 1.5)
            await asyncio.sleep(max(0.02, began + pause - time.monotonic()))

    def _choose(self) -> str | None:
        known = [name for name in self.agent.discovered if name.startswith("prefill")]
        for name, since in self.watched.items():
            if name in known and name not in self.busy and time.monotonic() >= since:
                return name
        if not known:
            return None
        name = self.rng.choice(known)
        peer = self.agent.peers.get(name)
        if peer is not None and peer.suspect and self.rng.random() < AVOID_SUSPECT:
            return None
        return name

    async def _request(self, name: str) -> bool:
        """Ask for pages and look at them; return whether all went well. Count it in any case."""
        count = BULK_PAGES if self.rng.random() < BULK_SHARE else self.rng.choice(SIZES)
        pages = self.pages.take(count)
        if pages is None:
            return False
        self.next_request += 1
        number, began = self.next_request, time.monotonic()
        self.ledger.add("requests")
        push = self.rng.random() < PUSH_SHARE
        lent = Lent(pages, name)
        step = "find"
        try:
            peer = await self.flights.within(step, name, self.agent.peer(name))
            step = "ask"
            said = await self._ask(peer, number, lent, push=push)
            if said["incarnation"] != peer.incarnation:
                raise Replaced
            if said["kind"] == "failed":
                raise Refused(said["error"])
            step = "pull"
            if not push:
                await self._pull(peer, number, pages, said["places"])
            if time.monotonic() - began > self.lease:
                raise Expired
            if "wrong-byte" in self.inject:
                self.inject.discard("wrong-byte")
                self.pages.spoil(pages[0])
            wrong = self.pages.count_wrong(pages, owner_salt(name, peer.incarnation), number, said["places"])
            self.ledger.add("pages_checked", count)
            if wrong:
                say(wrong=wrong, of=count, peer=name, push=push, at=time.monotonic())
            self.ledger.add("requests_done")
        except BaseException as error:
            self.ledger.add("requests_failed")
            self._failed(f"request: {step}", name, began, error)
            if isinstance(error, Quarantined):
                # Of a pull: something may move there still.
                lent.holder = "nobody"
                self.lending.keep(pages)
            if not isinstance(error, NixlError | TimeoutError | Replaced | Refused | Expired):
                raise
            return False
        finally:
            _, answer = self.answers.pop(number, (name, None))
            if answer is not None and _has_result(answer):
                self.lending.answered(number, waited_for=True)
            if lent.holder == "request":
                self.pages.give_back(pages)
        return True

    async def _ask(self, peer: Peer, number: int, lent: Lent, *, push: bool) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.answers[number] = peer.name, answer
        message = {
            "kind": "push" if push else "pull",
            "number": number,
            "count": len(lent.pages),
            "places": lent.pages if push else [],
            "incarnation": self.agent.incarnation,
            "at": time.monotonic(),
        }

        async def exchange() -> dict[str, Any]:
            if "hang" in self.inject:
                self.inject.discard("hang")
                await self._never()
            await self.agent.notify(peer, PREFIX + json.dumps(message).encode())
            return await answer

        if push:
            self.lending.expose(number, lent)
        said: dict[str, Any] = await self.flights.within("ask", peer.name, exchange())
        return said

    def _answered(self, message: dict[str, Any]) -> None:
        number = message["number"]
        if (waiting := self.answers.get(number)) is not None:
            if not waiting[1].done():
                waiting[1].set_result(message)
        else:
            self.lending.answered(number, waited_for=False)

    async def _pull(self, peer: Peer, number: int, pages: list[int], places: list[int]) -> None:
        over = PREFIX + json.dumps({"kind": "over", "number": number}).encode()
        given_up = self.rng.uniform(0, CANCEL_SECONDS) if self.rng.random() < CANCEL_SHARE else None
        try:
            source = peer.region(REGION).pages(places, PAGE_NBYTES)
            await self._transfer(peer.name, source, self.region.pages(pages, PAGE_NBYTES), over, given_up)
        except BaseException:
            task = asyncio.create_task(self._tell(peer.name, {"kind": "over", "number": number}))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            raise

    async def _never(self) -> None:
        """Do not end, whoever cancels it: what a hang looks like."""
        while True:
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                if self.leaving:
                    raise

    # Both.

    async def _transfer(self, peer: str, src: Any, dst: Any, notify: bytes, given_up: float | None = None) -> None:
        began = time.monotonic()
        self.ledger.add("transfers")
        try:
            result = await self.flights.within("transfer", peer, self.agent.transfer(src, dst, notify=notify), given_up)
        except BaseException as error:
            self.ledger.add("transfers_failed")
            self._failed("transfer", peer, began, error)
            raise
        self.ledger.add("transfers_done")
        self.ledger.add("nbytes", result.nbytes)

    def _failed(self, what: str, peer: str, began: float, error: BaseException) -> None:
        kind = type(error).__name__
        example = "".join(traceback.format_exception(error))[-3000:]
        say(failed=what, peer=peer, kind=kind, began=began, at=time.monotonic(), text=str(error)[:300], trace=example)


def _has_result(future: asyncio.Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


async def _main() -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    setup = json.loads(await orders.readline())
    for name in ("nixl_async", "asyncio"):
        logging.getLogger(name).addHandler(Records(logging.ERROR))
    await Member(setup, orders).live()


def main() -> None:
    """Run as a member."""
    # Ends with the drill, stopped or not.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        asyncio.run(_main())
    except BaseException as error:
        say(log=f"a member ends: {''.join(traceback.format_exception(error))[-3000:]}")
        raise


if __name__ == "__main__":
    main()
