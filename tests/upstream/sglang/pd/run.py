"""SGLang's disaggregation over a backend: `run.py nixl` (SGLang's own, on whatever `nixl` is) or `run.py nixl_async`.

Each rank is a process of its own with SGLang's KV manager; the requests' bytes are compared in whole pools, so that a byte at a
wrong place shows as well as a missing one. Prints a line for each scenario and exits with 1 if one fails.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import rank

STATUS_SECONDS = 2.0
"""Within what time of the moment it can be known a failure must show."""
PATIENCE = 20.0
HEARTBEAT_SECONDS = 2.0
"""SGLang's own way to notice that a prefill server is gone; 2 s is its least."""
DETECTION = {"nixl": HEARTBEAT_SECONDS, "nixl_async": 1.0}
"""How long after a prefill process's death its decode ranks may not know: SGLang's heartbeat, or the connection's end."""
LARGE = 2000
"""Pages of a room that takes long enough to be interrupted: 98 MB."""
ROOMS = itertools.count(1000)


class Process:
    """A rank's process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=rank.main, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def post(self, name: str, **arguments: Any) -> None:
        self.pipe.send((name, arguments))

    def result(self) -> Any:
        if not self.pipe.poll(120):
            raise TimeoutError(f"process {self.process.pid} does not answer")
        good, value = self.pipe.recv()
        if not good:
            raise AssertionError(value)
        return value

    def call(self, name: str, **arguments: Any) -> Any:
        self.post(name, **arguments)
        return self.result()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Fleet:
    """Processes that have SGLang imported and wait to become ranks; those that are killed are replaced by new ones."""

    def __init__(self, size: int) -> None:
        self.idle = [Process() for _ in range(size)]

    def take(self) -> Process:
        return self.idle.pop(0)

    def give(self, process: Process) -> None:
        self.idle.append(process)

    def kill(self, process: Process) -> None:
        process.kill()
        self.idle.append(Process())


class Service:
    """A prefill server of `p` ranks and a decode server of `d` ranks."""

    def __init__(
        self,
        fleet: Fleet,
        backend: str,
        p: int = 1,
        d: int = 1,
        *,
        memory: str = "VRAM",
        mla: bool = False,
        states: tuple[str, ...] = (),
        slots: int = 64,
        route: str = "",
        tokens: tuple[str, str] = ("", ""),
    ) -> None:
        self.fleet, self.backend = fleet, backend
        self.fields = {"backend": backend, "mla": mla, "states": states, "memory": memory, "slots": slots, "route": route}
        self.port, self.tokens = free_port(), dict(zip(("prefill", "decode"), tokens, strict=True))
        self.prefill, self.decode = [], []
        try:
            for role, tp, ranks in (("prefill", p, self.prefill), ("decode", d, self.decode)):
                for number in range(tp):
                    self.open(role, tp, number, ranks)
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def open(self, role: str, tp: int, number: int, ranks: list[Process]) -> None:
        process = self.fleet.take()
        ranks.append(process)
        process.call("open", role=role, tp=tp, rank=number, port=self.port, token=self.tokens[role], **self.fields)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exc: object) -> None:
        failed: AssertionError | None = None
        for process in [*self.prefill, *self.decode]:
            if exc[0] is None:
                try:
                    process.call("close")
                    self.fleet.give(process)
                    continue
                except AssertionError as error:
                    failed = error
            # Whatever it does at the moment, it is of no use to the next scenario.
            self.fleet.kill(process)
        if failed is not None:
            raise failed

    def all(self, processes: list[Process], name: str, **arguments: Any) -> list[Any]:
        """Call all at once."""
        for process in processes:
            process.post(name, **arguments)
        return [process.result() for process in processes]

    def start(self, room: int, pages: int) -> None:
        """Bring a room so far that its pages can be sent."""
        self.all([*self.prefill, *self.decode], "begin", room=room, pages=pages)
        self.all(self.decode, "ask", room=room)
        self.all(self.prefill, "ready", room=room, seconds=PATIENCE)

    def send(self, room: int, first: int, last: int, **more: Any) -> None:
        self.all(self.prefill, "send", room=room, first=first, last=last, **more)

    def finish(self, *rooms: int) -> None:
        """Wait until rooms have arrived, and compare every byte of the pools."""
        for room in rooms:
            self.all([*self.prefill, *self.decode], "until", room=room, names=["Success"], seconds=PATIENCE)
        for wrong in self.all(self.decode, "wrong", rooms=list(rooms)):
            assert not wrong, wrong

    def end(self, *rooms: int) -> None:
        for room in rooms:
            self.all([*self.prefill, *self.decode], "end", room=room)
        for left in self.all([*self.prefill, *self.decode], "left", seconds=STATUS_SECONDS):
            assert not any(left.values()), left


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# Scenarios: each returns what to say of it.


def moves(fleet: Fleet, backend: str, p: int, d: int, **how: Any) -> str:
    """Two chunks, aux and states of four rooms at once."""
    with Service(fleet, backend, p, d, **how) as service:
        rooms = {next(ROOMS): pages for pages in (7, 2, 9, 5)}
        for room, pages in rooms.items():
            service.start(room, pages)
        began = time.monotonic()
        for room in rooms:
            service.send(room, 0, 1)
        for room, pages in rooms.items():
            service.send(room, 1, pages)
        service.finish(*rooms)
        took = time.monotonic() - began
        service.end(*rooms)
    return f"4 rooms, 2 chunks each, aux, states: all bytes equal ({took * 1000:.0f} ms with {4 * (p + d) + 8 * p} calls)"


def both_ways(fleet: Fleet, backend: str, **how: Any) -> str:
    return f"{moves(fleet, backend, 1, 2, **how)}; {moves(fleet, backend, 2, 1, **how)}"


def many(fleet: Fleet, backend: str) -> str:
    """A hundred rooms one after another on one pair of ranks, each in two chunks."""
    with Service(fleet, backend) as service:
        rooms = [next(ROOMS) for _ in range(100)]
        for room in rooms:
            service.start(room, 6)
            service.send(room, 0, 3)
            service.send(room, 3, 6)
            service.all([*service.prefill, *service.decode], "until", room=room, names=["Success"], seconds=PATIENCE)
            service.end(room)
        idle = service.all([*service.prefill, *service.decode], "idle", seconds=1.0)
    if backend == "nixl_async":
        assert max(idle) < 0.02, idle
    return "100 rooms, nothing left behind; idle prefill {:.1%}, decode {:.1%} of a core".format(*idle)


def cached(fleet: Fleet, backend: str) -> str:
    """The decode side has all pages already: only aux and states move."""
    with Service(fleet, backend, states=("mamba",)) as service:
        room = next(ROOMS)
        service.start(room, 0)
        service.send(room, 0, 0)
        service.finish(room)
        service.end(room)
    return "no page moves, aux and states do"


def large(fleet: Fleet, backend: str) -> str:
    """One room of thousands of pages, at once; and to twice as many ranks, by slices of heads."""
    said = []
    for d in (1, 2):
        times = []
        with Service(fleet, backend, 1, d, slots=LARGE + 48) as service:
            for _ in range(3):
                room = next(ROOMS)
                service.start(room, LARGE)
                began = time.monotonic()
                service.send(room, 0, LARGE)
                service.all(service.decode, "until", room=room, names=["Success"], seconds=PATIENCE)
                times.append(time.monotonic() - began)
                service.all(service.prefill, "until", room=room, names=["Success"], seconds=PATIENCE)
                for wrong in service.all(service.decode, "missing", room=room):
                    assert not wrong, wrong
                service.end(room)
        said.append(f"TP 1 to {d} {LARGE * 49152 / min(times) / 1e9:.1f} GB/s")
    return f"{LARGE:,} pages of 6 times 8 KiB: {', '.join(said)}, from the call until decode has Success"


def after_event(fleet: Fleet, backend: str) -> str:
    """Chunks that wait for compute: a whole one for its event, one layer after another for theirs."""
    with Service(fleet, backend, 1, 2) as service:
        (prefill,), decode = service.prefill, service.decode
        room = next(ROOMS)
        service.start(room, 6)
        service.send(room, 0, 5, after="layers")
        for layer in (1, 0, 2):
            before = [len(there) for there in service.all(decode, "layers_there", room=room, count=0, seconds=0)]
            assert before == [0, 0], before
            prefill.call("let_go", layer=layer)
            if layer == 2:
                service.send(room, 5, 6, after="event")
                prefill.call("let_go")
        service.finish(room)
        service.end(room)
        room = next(ROOMS)
        service.start(room, 6)
        service.send(room, 0, 6, after="layers")
        for count, layer in enumerate((1, 0, 2), 1):
            prefill.call("let_go", layer=layer)
            there = service.all(decode, "layers_there", room=room, count=count, seconds=PATIENCE)
            assert there == [sorted((1, 0, 2)[:count])] * 2, there
        service.all([prefill, *decode], "until", room=room, names=["Success"], seconds=PATIENCE)
        service.end(room)
    return "a chunk goes after its event, and layer by layer, head slices of each, in the order in which they are ready"


def disturbed(fleet: Fleet, backend: str) -> str:
    """Somebody sends nonsense to the control sockets."""
    with Service(fleet, backend) as service:
        for _ in range(2):
            service.all([*service.prefill, *service.decode], "disturb")
            after_abort(service)
    return "it is dropped, and rooms arrive"


def tokens(fleet: Fleet, backend: str) -> str:
    """Both sides are given a secret: the same, or not."""
    with Service(fleet, backend, tokens=("secret", "secret")) as service:
        after_abort(service)
    with Service(fleet, backend, tokens=("secret", "another")) as service:
        room = next(ROOMS)
        service.all([*service.prefill, *service.decode], "begin", room=room, pages=2)
        service.all(service.decode, "ask", room=room)
        service.all([*service.prefill, *service.decode], "until", room=room, names=["Failed"], seconds=STATUS_SECONDS)
        for why in service.all([*service.prefill, *service.decode], "why", room=room):
            assert "token" in why, why
        service.end(room)
    return "with the same, rooms arrive; with two, they fail at once on both sides, and say why"


def memory_released(fleet: Fleet, backend: str) -> str:
    """Either side gives its pools' memory away and gets it back, as for an update of the weights."""
    with Service(fleet, backend) as service:
        for ranks in (service.decode, service.prefill, service.decode):
            after_abort(service)
            service.all(ranks, "pool_memory", there=False)
            service.all(ranks, "pool_memory", there=True)
        after_abort(service)
    return "registrations taken back and made again on either side, the connections kept: the next rooms arrive"


def aborted_by_decode(fleet: Fleet, backend: str) -> str:
    """The decode side gives up rooms under way: their pages are quiet when SGLang may use them again."""
    times = []
    with Service(fleet, backend, slots=LARGE + 48) as service:
        (prefill,), (decode,) = service.prefill, service.decode
        for turn in range(3):
            room = next(ROOMS)
            service.start(room, LARGE)
            service.send(room, 0, LARGE - 10, after="event" if backend == "nixl_async" and turn == 0 else "")
            decode.call("abort", room=room)
            assert decode.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)[0] == "Failed"
            assert "Aborted" in decode.call("why", room=room)
            decode.call("hold_pages", room=room)
            if turn == 0 and backend == "nixl_async":
                times.append(prefill.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)[1])
            times.append(decode.call("quiet", room=room, seconds=STATUS_SECONDS))
            before = decode.call("digest")
            if turn == 0 and backend == "nixl_async":
                prefill.call("let_go")
            prefill.call("send", room=room, first=LARGE - 10, last=LARGE)
            times.append(prefill.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)[1])
            why = prefill.call("why", room=room)
            assert "abort" in why.lower(), why
            assert decode.call("digest") == before, "pages were written after they were said to be quiet"
            service.end(room)
        after_abort(service)
    return f"Failed on both sides and quiet within {max(times):.2f} s, not a byte after; the next room arrives"


def aborted_before_prefill(fleet: Fleet, backend: str) -> str:
    """The decode side gives up a room before the prefill side has the request, or never gets it."""
    with Service(fleet, backend) as service:
        (prefill,), (decode,) = service.prefill, service.decode
        rooms = [next(ROOMS), next(ROOMS)]
        for room in rooms:
            decode.call("begin", room=room, pages=3)
            decode.call("ask", room=room)
            decode.call("abort", room=room)
            decode.call("why", room=room)
            decode.call("hold_pages", room=room)
            decode.call("quiet", room=room, seconds=STATUS_SECONDS)
            decode.call("end", room=room)
        left = prefill.call("left", seconds=STATUS_SECONDS)
        assert not any(left.values()), left
        prefill.call("begin", room=rooms[0], pages=3)
        prefill.call("until", room=rooms[0], names=["Failed"], seconds=STATUS_SECONDS)
        assert "abort" in prefill.call("why", room=rooms[0])
        prefill.call("end", room=rooms[0])
        after_abort(service)
    return "nothing of it is left at prefill, and a request that comes then fails at once"


def aborted_by_prefill(fleet: Fleet, backend: str) -> str:
    """The prefill side gives up a room under way, and the decode side hears of it."""
    with Service(fleet, backend) as service:
        (prefill,), (decode,) = service.prefill, service.decode
        room = next(ROOMS)
        service.start(room, 8)
        service.send(room, 0, 4, after="event")
        prefill.call("abort", room=room)
        times = [one.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)[1] for one in (prefill, decode)]
        before = decode.call("digest")
        prefill.call("let_go")
        assert decode.call("digest") == before == decode.call("digest")
        for one in (prefill, decode):
            assert "Aborted" in one.call("why", room=room)
        service.end(room)
        # The decode side asks for a room that has been given up already.
        room = next(ROOMS)
        service.all([prefill, decode], "begin", room=room, pages=3)
        prefill.call("abort", room=room)
        prefill.call("why", room=room)
        decode.call("ask", room=room)
        times.append(decode.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)[1])
        decode.call("why", room=room)
        after_abort(service)
    return f"Failed on both sides within {max(times):.2f} s, also for one who asks later; the next room arrives"


def prefill_killed(fleet: Fleet, backend: str) -> str:
    """The prefill process dies with a room half sent and another under way, and a new one takes its place."""
    with Service(fleet, backend, slots=LARGE + 48) as service:
        (prefill,), (decode,) = service.prefill, service.decode
        rooms = half_sent(service)
        began = time.monotonic()
        fleet.kill(prefill)
        service.prefill.clear()
        for room in rooms:
            decode.call("until", room=room, names=["Failed"], seconds=DETECTION[backend] + STATUS_SECONDS)
        took = time.monotonic() - began
        quiet = ""
        for room in rooms:
            why = decode.call("why", room=room)
            assert "Lost connection" in why, why
            if backend == "nixl_async":
                decode.call("hold_pages", room=room)
                quiet = f", its pages free after {decode.call('quiet', room=room, seconds=STATUS_SECONDS):.2f} s"
            decode.call("end", room=room)
        service.open("prefill", 1, 0, service.prefill)
        after_abort(service)
    return f"decode: Failed {took:.2f} s after the death{quiet}; the prefill server that takes its place is used"


def one_of_two_killed(fleet: Fleet, backend: str) -> str:
    """One of the two prefill ranks that a decode rank gets heads from dies; the other still writes."""
    with Service(fleet, backend, 2, 1, slots=LARGE + 48) as service:
        (left, lost), (decode,) = service.prefill, service.decode
        rooms = half_sent(service)
        began = time.monotonic()
        fleet.kill(lost)
        service.prefill.remove(lost)
        for room in rooms:
            decode.call("until", room=room, names=["Failed"], seconds=DETECTION[backend] + STATUS_SECONDS)
        took = time.monotonic() - began
        for room in rooms:
            decode.call("why", room=room)
            decode.call("hold_pages", room=room)
            quiet = decode.call("quiet", room=room, seconds=STATUS_SECONDS)
            decode.call("end", room=room)
        before = decode.call("digest")
        for room in rooms:
            left.call("until", room=room, names=["Failed"], seconds=STATUS_SECONDS)
            left.call("why", room=room)
            left.call("end", room=room)
        assert decode.call("digest") == before, "pages were written after they were said to be quiet"
    return f"decode: Failed {took:.2f} s after the death, its pages free after {quiet:.2f} s; the rank that is left gives up"


def decode_killed(fleet: Fleet, backend: str) -> str:
    """The decode process dies with a room half sent and another under way, and a new one takes its place."""
    with Service(fleet, backend, slots=LARGE + 48) as service:
        (prefill,), (decode,) = service.prefill, service.decode
        rooms = half_sent(service)
        began = time.monotonic()
        fleet.kill(decode)
        service.decode.clear()
        if backend == "nixl":
            # It learns of a death only by sending.
            for room, pages in rooms.items():
                prefill.call("send", room=room, first=pages - 1, last=pages)
        for room in rooms:
            prefill.call("until", room=room, names=["Failed"], seconds=1.0 + STATUS_SECONDS)
        took = time.monotonic() - began
        for room in rooms:
            prefill.call("why", room=room)
            prefill.call("end", room=room)
        service.open("decode", 1, 0, service.decode)
        after_abort(service)
    return f"prefill: Failed {took:.2f} s after the death; the decode server that takes its place is served"


def half_sent(service: Service) -> dict[int, int]:
    """Send all but the last page of two rooms, and wait for a short one's to land; return the rooms with their pages."""
    rooms = {next(ROOMS): pages for pages in (8, LARGE)}
    for room, pages in rooms.items():
        service.start(room, pages)
        service.send(room, 0, pages - 1)
        if pages == 8:
            service.all(service.prefill, "landed", room=room, seconds=PATIENCE)
    return rooms


def after_abort(service: Service) -> None:
    """Move another room, and look at its pages only: others may have been written in part."""
    room = next(ROOMS)
    service.start(room, 5)
    service.send(room, 0, 2)
    service.send(room, 2, 5)
    service.all([*service.prefill, *service.decode], "until", room=room, names=["Success"], seconds=PATIENCE)
    for wrong in service.all(service.decode, "missing", room=room):
        assert not wrong, wrong
    service.end(room)


def scenarios(backend: str) -> list[tuple[str, Callable[[Fleet], str]]]:
    states = ("mamba", "swa", "dsa")
    listed: list[tuple[str, Callable[[Fleet], str]]] = []

    def add(name: str, run: Callable[..., str], *arguments: Any, **how: Any) -> None:
        listed.append((name, lambda fleet: run(fleet, backend, *arguments, **how)))

    for p, d in ((1, 1), (2, 2), (1, 2), (2, 1)):
        for memory in ("DRAM", "VRAM"):
            # SGLang's NIXL backend takes states for VRAM, and refuses head slices of DRAM.
            if backend == "nixl" and memory == "DRAM" and p != d:
                continue
            kept = () if backend == "nixl" and memory == "DRAM" else states
            add(f"TP {p} to {d}, {memory}", moves, p, d, memory=memory, states=kept)
    for p, d in ((1, 1), (1, 2), (2, 1)):
        add(f"MLA, TP {p} to {d}, VRAM", moves, p, d, mla=True, states=("dsa",))
    if backend == "nixl_async":
        for route in ("memory,tcp",):
            add(f"TP 1 to 2 and 2 to 1 by {route.partition(',')[2]}", both_ways, route=route, states=states)
        add("after compute", after_event)
        add("memory released", memory_released)
        add("nonsense on the control sockets", disturbed)
        add("tokens", tokens)
    add("all pages cached", cached)
    add("many rooms", many)
    add("large", large)
    add("aborted by decode", aborted_by_decode)
    if backend == "nixl_async":
        add("aborted by prefill", aborted_by_prefill)
        add("aborted before prefill has it", aborted_before_prefill)
        add("one of two prefill ranks killed", one_of_two_killed)
    add("prefill killed", prefill_killed)
    add("decode killed", decode_killed)
    return listed


def main() -> int:
    backend, chosen = sys.argv[1], sys.argv[2:]
    os.environ |= {
        "SGLANG_HOST_IP": "127.0.0.1",
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_SECONDS),
        "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1",
        "RANK_BACKEND": backend,
    }
    began = time.monotonic()
    fleet = Fleet(4)
    failed = 0
    for name, run in scenarios(backend):
        if chosen and not any(word in name for word in chosen):
            continue
        try:
            print(f"ok     {backend}: {name}: {run(fleet)}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {backend}: {name}:\n{traceback.format_exc()}", flush=True)
    print(f"{backend}: {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    for process in fleet.idle:
        process.kill()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
