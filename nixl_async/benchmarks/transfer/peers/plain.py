"""What every contender's process shares: its connection, where blocks lie, and bytes that prove where they came from.

Scripts beside this file import it as `plain`, in interpreters that have numpy and nothing of ours. A process is started with the
conductor's host, port and its own id as arguments, and the secret of the run in NIXL_ASYNC_BENCH_SECRET. It answers a nonce with
an HMAC, then commands, each a JSON line `{"do": name, …}`, with `{"ok": result}` or `{"error": text}`. End of file ends it.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import hmac
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np

SECRET_VARIABLE = "NIXL_ASYNC_BENCH_SECRET"
WORD = 8
PROGRESS_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1
_STEP = 0x9E3779B97F4A7C15
_SALT = 0x100000001B3
_MASK = (1 << 64) - 1
_CHUNK_NBYTES = 1 << 19
_ALIGNMENT = 4096
_HUGE_PAGE = 2 << 20

Array = np.ndarray[Any, Any]


# Where blocks lie.


class Flow:
    """What one initiator moves to or from one target.

    `piece` of `pieces` equal parts of each block belongs to it; `lane` is its own memory at the initiator, `inbound` at the
    target. `target` is -1 where the far side is a file or a store.
    """

    def __init__(
        self, initiator: int, target: int, lane: int = 0, inbound: int = 0, piece: int = 0, pieces: int = 1, lanes: int = 1
    ) -> None:
        self.initiator, self.target, self.lane, self.inbound = initiator, target, lane, inbound
        self.piece, self.pieces, self.lanes = piece, pieces, lanes

    def __repr__(self) -> str:
        return f"Flow({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flow) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Point:
    """One step of the sweep: `batch` blocks of `block` bytes a request, in each of `slots` that are at work at once."""

    def __init__(
        self, block: int, batch: int, slots: int = 1, op: str = "WRITE", salt: int = 1, location: str = "none", seed: int = 0
    ) -> None:
        self.block, self.batch, self.slots, self.op, self.salt = block, batch, slots, op, salt
        self.location, self.seed = location, seed

    def near(self, flow: Flow, slot: int) -> Array:
        """Return the offsets of the slot's blocks in the initiator's memory."""
        first = (flow.lane * self.slots + slot) * self.batch * self.block + flow.piece * self.nbytes(flow)
        return first + np.arange(self.batch, dtype=np.int64) * self.block

    def far(self, flow: Flow, slot: int) -> Array:
        """Return the offsets of the same blocks in the target's memory."""
        nbytes = self.nbytes(flow)
        first = (flow.inbound * self.slots + slot) * self.batch * nbytes
        order = np.arange(self.batch, dtype=np.int64)
        if self.location != "none":
            order = np.random.default_rng([self.seed, flow.initiator, slot]).permutation(order)
        return first + order * nbytes

    def nbytes(self, flow: Flow) -> int:
        """Return the bytes of each descriptor of the flow."""
        return self.block // flow.pieces

    def salt_of(self, role: str, index: int) -> int:
        """Return what makes the source's bytes its own: no two processes and no two steps have the same."""
        return (self.salt * 1021 + index) * 2 + (role == "target")


def need(point: Point, flows: list[Flow], role: str, index: int) -> int:
    """Return the bytes that a process needs for a step."""
    if role == "initiator":
        mine = [flow for flow in flows if flow.initiator == index]
        return max(flow.lane + 1 for flow in mine) * point.slots * point.batch * point.block
    ends = [(flow.inbound + 1) * point.slots * point.batch * point.nbytes(flow) for flow in flows if flow.target == index]
    return max(ends)


# The bytes.


def words(start: int, count: int, salt: int) -> Array:
    """Return the words that belong at word positions `start` and after."""
    made: Array = np.arange(start, start + count, dtype=np.uint64)
    made *= np.uint64(_STEP)
    made += np.uint64(salt * _SALT + 1 & _MASK)
    return made


def fill(buffer: Array, salt: int) -> None:
    """Write the pattern of `salt` into all of `buffer`."""
    for start in range(0, len(buffer), _CHUNK_NBYTES):
        stop = min(start + _CHUNK_NBYTES, len(buffer))
        made = words(start // WORD, -(-(stop - start) // WORD), salt)
        buffer[start:stop] = made.view(np.uint8)[: stop - start]


def count_wrong(buffer: Array, places: Array, sources: Array, nbytes: int, salt: int) -> int:
    """Count the blocks at `places` of `buffer` that are not what a source of that salt has at `sources`, every byte compared."""
    wrong = 0
    if nbytes % WORD or (places % WORD).any() or (sources % WORD).any() or nbytes >= _CHUNK_NBYTES:
        for place, source in zip(places.tolist(), sources.tolist()):
            wrong += not _same(buffer[place : place + nbytes], source, salt)
        return wrong
    per_block = nbytes // WORD
    inside = np.arange(per_block, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(salt * _SALT + 1 & _MASK)
    step = max(1, _CHUNK_NBYTES // nbytes)
    view = buffer[: len(buffer) // WORD * WORD].view(np.uint64)
    for start in range(0, len(places), step):
        at = (places[start : start + step] // WORD)[:, None] + np.arange(per_block)
        first = (sources[start : start + step] // WORD).astype(np.uint64) * np.uint64(_STEP)
        wrong += int((view[at] != first[:, None] + inside).any(axis=1).sum())
    return wrong


def _same(found: Array, source: int, salt: int) -> bool:
    for start in range(0, len(found), _CHUNK_NBYTES):
        part = found[start : start + _CHUNK_NBYTES]
        skipped = (source + start) % WORD
        made = words((source + start) // WORD, -(-(skipped + len(part)) // WORD), salt).view(np.uint8)
        if not np.array_equal(part, made[skipped : skipped + len(part)]):
            return False
    return True


def allocate(nbytes: int, hugepages: bool = False) -> Array:
    """Return `nbytes` bytes at a memory page's begin that the kernel has mapped already.

    Raises:
        OSError: there are not as many huge pages as are asked for.
    """
    if not hugepages:
        whole = np.full(nbytes + _ALIGNMENT, 0x5A, np.uint8)
        skipped = -whole.ctypes.data % _ALIGNMENT
        return whole[skipped : skipped + nbytes]
    size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)  # MAP_HUGETLB of the kernel's ABI
    except OSError as error:
        raise OSError(
            f"--use-hugepages: {size // _HUGE_PAGE} free huge pages of 2 MiB are needed ({error.strerror}):"
            " raise /proc/sys/vm/nr_hugepages, or leave it out"
        ) from None
    found = np.frombuffer(mapped, np.uint8)[:nbytes]
    found[:] = 0x5A
    return found


# What every contender does with its memory.


class Mover:
    """Holds the memory of one process, fills it where it is the source, and checks it where it is the destination.

    `reach` is the address by which the conductor is connected to it, at which peers can reach it too.
    """

    reach = "127.0.0.1"

    def open(self, role: str, index: int, host: str, nbytes: int, options: dict[str, Any]) -> Any:
        """Take memory and be reachable; return what peers need to know."""
        self.role, self.index, self.host, self.options = role, index, host or self.reach, options
        self.buffer = allocate(nbytes, bool(options.get("use_hugepages")))
        return self.opened()

    def opened(self) -> Any:
        """Do the contender's own part of `open`."""

    def meet(self, peers: dict[str, Any], flows: list[dict[str, int]]) -> Any:
        """Connect initiators with their targets; `peers` has what `open` returned, by role and index as `target 0`."""
        everyone = [Flow(**flow) for flow in flows]
        self.flows = [flow for flow in everyone if getattr(flow, self.role) == self.index]
        return self.met(peers)

    def met(self, peers: dict[str, Any]) -> Any:
        """Do the contender's own part of `meet`."""

    def ready(self, point: dict[str, Any]) -> Any:
        """Take the next step of the sweep: fill the source, and do what is done once for many requests."""
        self.point = Point(**point)
        if self.is_source:
            self.fill()
        return self.prepared()

    def prepared(self) -> Any:
        """Do the contender's own part of `ready`."""

    @property
    def is_source(self) -> bool:
        """Whether this side's memory is read."""
        return (self.point.op == "WRITE") == (self.role == "initiator")

    def fill(self) -> Any:
        """Write the source's bytes."""
        fill(self.buffer[: self.used], self.point.salt_of(self.role, self.index))

    @property
    def used(self) -> int:
        """How many bytes from the memory's begin on take part in this step."""
        return need(self.point, self.flows, self.role, self.index)

    def blank(self, value: int) -> Any:
        """Overwrite the destination, so that bytes of an earlier round do not pass."""
        if not self.is_source:
            self.buffer[: self.used] = value & 0xFF

    def check(self) -> Any:
        """Return how many blocks of the destination are wrong, and how many there are; (0, 0) at a source."""
        return (0, 0) if self.is_source else self.count_wrong(self.buffer)

    def count_wrong(self, buffer: Array) -> tuple[int, int]:
        """Compare memory that holds the destination's bytes with what its sources have."""
        wrong = total = 0
        point = self.point
        for flow in self.flows:
            other = ("initiator", flow.initiator) if self.role == "target" else ("target", flow.target)
            for slot in range(point.slots):
                near, far = point.near(flow, slot), point.far(flow, slot)
                places, sources = (far, near) if self.role == "target" else (near, far)
                wrong += count_wrong(buffer, places, sources, point.nbytes(flow), point.salt_of(*other))
                total += len(places)
        return wrong, total

    def attend(self, count: int) -> Any:
        """Be the target of a run, until `count` notifications are there."""
        self.cpu_before = time.process_time()

    def left(self) -> Any:
        """End being a target; return the CPU seconds used meanwhile, and what else has been noted."""
        return {"cpu": time.process_time() - self.cpu_before}

    def close(self) -> Any:
        """Leave nothing behind."""


class Stored(Mover):
    """Moves to and from storage, alone: block n of the far side is the n-th of all that its slots have.

    Written bytes differ from round to round, and are fetched back to be checked.
    """

    @property
    def n_blocks(self) -> int:
        """How many blocks the far side has."""
        return self.point.slots * self.point.batch

    def numbers(self, slot: int) -> Array:
        """Return which blocks of the far side a slot's request has."""
        return self.point.far(self.flows[0], slot) // self.point.block

    def prepared(self) -> Any:
        """Lay out what is read, and do what is done once for many requests."""
        self.salt = self.point.salt
        self.aim()
        if not self.is_source:
            self.put(self.layout())
        return self.aimed()

    def layout(self) -> Array:
        """Return what the far side holds where it is read."""
        made = allocate(self.n_blocks * self.point.block)
        fill(made, self.point.salt_of("target", -1))
        return made

    def blank(self, value: int) -> Any:
        """Change what is written, or overwrite where it is read to."""
        if self.is_source:
            self.point.salt = self.salt + (value + 1) * 65537
            return self.fill()
        return super().blank(value)

    def check(self) -> Any:
        """Return how many blocks are wrong where they have arrived, and how many there are."""
        return self.count_far(self.fetch()) if self.is_source else super().check()

    def count_far(self, found: Array) -> tuple[int, int]:
        """Compare what the far side holds with what was written."""
        point, flow = self.point, self.flows[0]
        sides = [(point.far(flow, slot), point.near(flow, slot)) for slot in range(point.slots)]
        salt = point.salt_of("initiator", self.index)
        return sum(count_wrong(found, far, near, point.block, salt) for far, near in sides), self.n_blocks

    def aim(self) -> None:
        """Find the places of a step's blocks."""

    def aimed(self) -> Any:
        """Do what is done once for many requests."""

    def put(self, content: Array) -> Any:
        """Write all blocks of the far side."""
        raise NotImplementedError

    def fetch(self) -> Any:
        """Return all blocks of the far side."""
        raise NotImplementedError


class Files:
    """New files of one process, without a name from the moment they are open: whatever ends the process, nothing is left."""

    def __init__(self, options: dict[str, Any], label: str, index: int, nbytes: int) -> None:
        self.direct = bool(options["storage_enable_direct"])
        n_files, directory = options["num_files"], options["filepath"] or tempfile.gettempdir()
        given = [one.strip() for one in options["filenames"].split(",") if one.strip()]
        names = given or [f"nixl-async-bench-{label}-{os.getpid()}-{number}" for number in range(n_files)]
        self.location, self.seed = options["randomize_location_mode"], [options["randomize_location_mode_seed"], index]
        total = options["total_buffer_size"] // options["num_initiator_dev"] or nbytes
        self.nbytes = -(-max(total, nbytes) // (n_files * _ALIGNMENT)) * _ALIGNMENT
        self.fds: list[int] = []
        for name in names:
            path = os.path.join(directory, name if not given else f"{name}.{label}.{index}")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.unlink(path)
            os.posix_fallocate(fd, 0, self.nbytes)
            self.fds.append(fd)
        self.paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in self.fds]

    def opened(self) -> list[int]:
        """Return descriptors for the contender's own use: past the page cache if that is asked for."""
        if not self.direct:
            return self.fds
        return [os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT) for path in self.paths]

    def locate(self, numbers: Array, block: int) -> tuple[Array, Array]:
        """Return the file and the offset of each block."""
        rng = np.random.default_rng(self.seed)
        capacity = self.nbytes // block
        if self.location == "bytealigned":
            places = rng.integers(0, self.nbytes - block, int(numbers.max()) + 1, endpoint=True)[numbers]
            return numbers % len(self.fds), places
        if self.location == "blockaligned":
            numbers = rng.permutation(capacity * len(self.fds))[numbers]
        return numbers % len(self.fds), numbers // len(self.fds) * block

    def put(self, content: Array, block: int) -> None:
        """Write block n of `content` as block n, through the page cache, and wait for the device."""
        self._each(content, block, lambda fd, view, offset: os.pwrite(fd, view, offset))
        for fd in self.fds:
            os.fsync(fd)

    def fetch(self, content: Array, block: int) -> Array:
        """Read block n to where block n of `content` is."""
        self._each(content, block, lambda fd, view, offset: os.preadv(fd, [view], offset))
        return content

    def _each(self, content: Array, block: int, call: Any) -> None:
        files, offsets = self.locate(np.arange(len(content) // block), block)
        view: Any = content.data
        for number, (file, offset) in enumerate(zip(files.tolist(), offsets.tolist())):
            first, done = number * block, 0
            while done < block:
                count = call(self.fds[file], view[first + done : first + block], offset + done)
                if count <= 0:
                    raise OSError(f"the file ends at byte {offset + done}, within block {number}")
                done += count


class Measured:
    """What a run of requests took, in seconds."""

    def __init__(self) -> None:
        self.prep: list[float] = []
        self.post: list[float] = []
        self.latency: list[float] = []
        self.seconds = 0.0
        self.cpu = 0.0
        self.nbytes = 0

    def begin(self) -> None:
        """Begin the run."""
        self._cpu, self._start = time.process_time(), time.perf_counter()

    def end(self) -> None:
        """End the run: the time and the CPU time of this process."""
        self.seconds = time.perf_counter() - self._start
        self.cpu = time.process_time() - self._cpu

    def add(self, prep: float, post: float, latency: float) -> None:
        """Note a request: what came before it, the call that starts it, and from that call's begin to its completion."""
        self.prep.append(prep)
        self.post.append(post)
        self.latency.append(latency)

    def as_dict(self, **more: Any) -> dict[str, Any]:
        """Return it as it goes to the conductor; series as base64 of little-endian doubles."""
        series = {name: base64.b64encode(np.array(getattr(self, name), "<f8").tobytes()).decode() for name in SERIES}
        return {**series, "seconds": self.seconds, "cpu": self.cpu, "nbytes": self.nbytes, **more}


SERIES = ("prep", "post", "latency")


# The connection.


def proof(secret: str, nonce: str, name: str) -> str:
    """Return what shows that one knows the secret."""
    return hmac.new(secret.encode(), f"{nonce} {name}".encode(), hashlib.sha256).hexdigest()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while it is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def join() -> Any:
    """Connect to the conductor that the arguments name; return the connection as a binary file and its socket."""
    die_with_parent()
    # Ctrl-C reaches every process of a terminal; the conductor ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host, port, name = sys.argv[1:4]
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    file = connection.makefile("rb")
    nonce = json.loads(file.readline())["nonce"]
    answer = {"name": name, "proof": proof(os.environ.get(SECRET_VARIABLE, ""), nonce, name)}
    connection.sendall(json.dumps(answer).encode() + b"\n")
    return file, connection


class Meter:
    """Tells the conductor now and then how many bytes have moved."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._due = 0.0

    def tell(self, nbytes: int) -> None:
        """Send the count if it is time."""
        now = time.monotonic()
        if now >= self._due:
            if self._due:
                self._connection.sendall(json.dumps({"progress": nbytes}).encode() + b"\n")
            self._due = now + PROGRESS_SECONDS


def serve(mover: Any) -> None:
    """Answer commands with the mover's methods until the conductor hangs up; then exit without clean-up."""
    # Libraries print to standard output; nobody reads it there.
    os.dup2(2, 1)
    file, connection = join()
    mover.meter, mover.reach = Meter(connection), connection.getsockname()[0]
    for line in file:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(mover, command.pop("do"))(**command)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        connection.sendall(json.dumps(answer).encode() + b"\n")
    try:
        mover.close()
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    # Libraries are known to crash in their destructors; nothing of theirs is needed any more.
    os._exit(0)
