"""A fleet of agents that find each other through a store, and one agent with very many regions."""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from bench.process import Contender, Worker
from bench.report import Figure, Row
from bench.session import OURS, Settings
from nixl_async.testing.servers import free_ports

STORES = ("memory", "file", "etcd", "tcpstore")
REGIONS_PATH = "regions"
AGENTS, REGIONS, UPDATES, TABLE = 1000, 64, 8, 100_000
PROCESSES = 2
START_SECONDS = 30.0
MOVES = 1000
SAMPLES = 5
BACKENDS = ["memory"]
KIB = 1024.0
_TCP_STORE = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
sys.stdin.read()
"""
_COUNTED = re.compile(r"^etcd_network_client_grpc_(?:received|sent)_bytes_total (\S+)$", re.MULTILINE)


def fleet(settings: Settings, kind: str) -> Iterator[Row]:
    """Let one agent find all of a fleet by one kind of store, connect to each by its name, and hear of their updates."""
    agents, regions, processes = (24, 8, 1) if settings.quick else (AGENTS, REGIONS, PROCESSES)
    with ExitStack() as stack:
        url = stack.enter_context(_store(kind))
        if url is None:
            settings.warn(f"{kind} is left out: {'torch' if kind == 'tcpstore' else 'etcd'} is not installed")
            return
        seeker = stack.enter_context(_worker("seeker"))
        # What is in one process's memory only that process sees.
        crowds = [seeker] if kind == "memory" else [stack.enter_context(_worker(f"crowd {n}")) for n in range(processes)]
        yield from _fleet(settings, kind, url, agents, regions, seeker, crowds)


def _fleet(
    settings: Settings, kind: str, url: str, agents: int, regions: int, seeker: Worker, crowds: list[Worker]
) -> Iterator[Row]:
    def row(work: str, unit: str, *samples: float, note: str = "") -> Row:
        case = {"store": kind, "agents": agents, "regions": regions, "work": work}
        return Row("membership", case, unit, Figure(OURS, samples, note))

    alone = seeker not in crowds
    names = [f"agent-{number}" for number in range(agents)]
    share = -(-agents // len(crowds))
    settings.progress(f"{kind}: opening {agents} agents")
    for one in {seeker, *crowds}:
        one.call("load", url=url)
    seeker.call("seek", name="seeker", url=url, backends=BACKENDS)
    before, began = seeker.call("know", count=0)["rss"], time.monotonic()
    for number, crowd in enumerate(crowds):
        these = names[number * share : (number + 1) * share]
        crowd.send("open", names=these, url=url, regions=regions, updates=UPDATES, backends=BACKENDS)
    if not alone:
        seeker.receive()
    known = seeker.call("know", count=agents)
    yield row("all are known", "s", time.monotonic() - began, note="since the first was opened")
    for crowd in crowds if alone else ():
        crowd.receive()
    if alone:
        yield row("memory of a known one", "KiB", max(0.0, (known["rss"] - before) / agents / KIB))
    settings.progress(f"{kind}: connecting by name")
    joined = seeker.call("connect", names=names)
    each = [seconds * 1e3 for seconds in joined["each"]]
    high = statistics.quantiles(each, n=100)[98]
    yield row("connect by name", "ms", *each, note=f"p99 {high:.1f} ms, all {joined['seconds']:.2f} s, 16 at a time")
    if alone:
        low, after = joined["rss"]
        yield row("memory of a connected one", "KiB", max(0.0, (after - low) / agents / KIB))
    yield row("a region more, to each peer", "bytes", seeker.call("more", count=SAMPLES)["nbytes"])
    settings.progress(f"{kind}: {UPDATES} updates of each agent")
    stored, count = _through(kind, url), agents * UPDATES
    seeker.send("hear", regions=regions + UPDATES, updates=0 if alone else UPDATES)
    for crowd in crowds if alone else ():
        crowd.send("update", updates=UPDATES)
    heard = seeker.receive()
    for crowd in crowds if alone else ():
        crowd.receive()
    yield row("updates until all are heard", "s", heard["seconds"], note=f"{count / heard['seconds']:.0f} a second")
    yield row("an update, to each peer", "bytes", heard["nbytes"] / count)
    if stored is not None:
        passed = (_through(kind, url) or stored) - stored
        yield row(
            "an update, through the store", "bytes", passed / count, note="whole metadata for stock agents, now and then"
        )


def table(settings: Settings) -> Iterator[Row]:
    """Let an agent of 100,000 regions register them, be connected to, and be read by their names."""
    count = 2000 if settings.quick else TABLE
    parts: dict[str, tuple[dict[str, float], float]] = {}
    with _worker("owner") as owner, _worker("reader") as reader, _worker("newcomer") as newcomer:
        for one in (owner, reader, newcomer):
            one.call("seek", name=one.role, url=None, backends=["memory", "tcp"])
        host, port = owner.call("serve")
        owner.call("register", count=REGIONS)
        reader.call("join", host=host, port=port)
        few = owner.call("more", count=SAMPLES)["nbytes"]
        settings.progress(f"regions: registering {count}")
        parts["register, a peer listens"] = owner.call("register", count=count), count
        many = owner.call("more", count=SAMPLES)["nbytes"]
        settings.progress("regions: connecting")
        parts["connect, and know all"] = joined = newcomer.call("join", host=host, port=port), 1
        moved = newcomer.call("move", peer="owner", count=MOVES)
        parts["read 64 bytes by name"] = moved, moved["count"]
        settings.progress("regions: deregistering")
        parts["deregister, two listen"] = owner.call("deregister", count=count // 10), count // 10
    case = {"regions": count}
    for what, (result, times) in parts.items():
        unit, scale = ("s", 1.0) if times == 1 else ("us", 1e6)
        yield Row("membership", case | {"work": what}, unit, Figure(OURS, (result["seconds"] / times * scale,)))
    yield Row(
        "membership",
        case | {"work": "memory of a peer's region"},
        "bytes",
        Figure(OURS, (max(0.0, joined[0]["rss"] / count),)),
    )
    for what, (result, _) in parts.items():
        note = f"the longest garbage collection {result['collecting'] * 1e3:.1f} ms"
        yield Row(
            "membership", case | {"work": f"{what}: longest iteration"}, "ms", Figure(OURS, (result["longest"] * 1e3,), note)
        )
    row = Row(
        "membership", {"regions": f"{REGIONS} and {count}", "work": "one more, to a peer"}, "bytes", Figure(OURS, (many,))
    )
    row.others.append(Figure(f"with {REGIONS}", (few,)))
    row.at_most(1.05, many / few, f"as many bytes as with {REGIONS} regions (x)")
    yield row


@contextmanager
def _worker(role: str) -> Iterator[Worker]:
    worker = Worker(Contender(OURS, "bench.workers.crowd"), role)
    try:
        yield worker
    finally:
        worker.close()


_numbers = itertools.count()


@contextmanager
def _store(kind: str) -> Iterator[str | None]:
    """Yield the URL of an empty store, `None` where its server is not installed."""
    match kind:
        case "memory":
            yield f"memory://bench-{next(_numbers)}"
        case "file":
            with tempfile.TemporaryDirectory(prefix="nixl-async-bench-") as directory:
                yield f"file://{directory}/agents"
        case "etcd":
            with _etcd() as url:
                yield url
        case _:
            if find_spec("torch") is None:
                yield None
                return
            (port,) = free_ports(1)
            command = [sys.executable, "-c", _TCP_STORE, str(port)]
            with _server(command, subprocess.PIPE) as process:
                assert process.stdout is not None
                if process.stdout.readline() != b"ready\n":
                    raise RuntimeError("the TCPStore did not start")
                yield f"tcpstore://127.0.0.1:{port}/bench"


@contextmanager
def _etcd() -> Iterator[str | None]:
    program = shutil.which("etcd", path=str(Path(sys.executable).parent)) or shutil.which("etcd")
    if program is None:
        yield None
        return
    client, peer = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    with tempfile.TemporaryDirectory(prefix="nixl-async-bench-") as directory:
        command = [program, "--data-dir", f"{directory}/data", "--log-level", "error", "--unsafe-no-fsync"]
        for kind, url in (("client", client), ("peer", peer)):
            command += [f"--listen-{kind}-urls", url]
        command += ["--advertise-client-urls", client, "--initial-advertise-peer-urls", peer]
        with _server([*command, "--initial-cluster", f"default={peer}"], subprocess.DEVNULL):
            deadline = time.monotonic() + START_SECONDS
            while True:
                with suppress(OSError), urllib.request.urlopen(f"{client}/health", timeout=1):
                    break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"etcd did not answer within {START_SECONDS:g} s")
                time.sleep(0.05)
            yield client.replace("http://", "etcd://")


@contextmanager
def _server(command: list[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _through(kind: str, url: str) -> float | None:
    """Return the bytes that a store has taken and given so far, where it counts them."""
    if kind != "etcd":
        return None
    with urllib.request.urlopen(f"{url.replace('etcd://', 'http://')}/metrics", timeout=5) as answer:
        return sum(map(float, _COUNTED.findall(answer.read().decode())))
