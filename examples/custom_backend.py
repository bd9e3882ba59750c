"""A backend of your own: it copies through /proc/PID/mem, with nothing but the standard library, between processes of one host.

    python examples/custom_backend.py

starts a second process, moves pages there and back by this backend, and checks every byte. A backend has one verb, `copy`, and one
promise: when it returns or raises, no byte moves any more. The contract is nixl_async/backend.py; the suite that finds out whether
a backend keeps it is `nixl_async.testing.BackendTests`, which tests/test_example_backend.py runs on this one.
"""

import asyncio
import ctypes
import json
import os
import secrets
import sys
import threading
from asyncio.subprocess import PIPE
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from nixl_async import Agent, Backend, BackendError, Limits, MemoryKind, Op, PeerLost
from nixl_async.backend import Host, PeerInfo, quiesce
from nixl_async.descriptors import Side

N_THREADS, COOKIE_NBYTES = 2, 16


def where_am_i() -> str:
    """Return what only processes that see each other's numbers share: the boot of the host, and the PID namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


class ProcMem(Backend):
    """Reads and writes a peer's memory as a file. The kernel asks for the same rights as for ptrace."""

    name = "proc-mem"
    # The scheduler keeps to this: so many ops at once, none larger, and no copying on the event loop (inline_nbytes is 0).
    limits = Limits(max_ops=N_THREADS, lanes=N_THREADS, max_op_nbytes=4 << 20, max_op_segments=1024)
    rank = 5  # before ours, where it reaches a peer

    async def open(self, host: Host) -> None:
        """Start the threads that copy."""
        self.threads: ThreadPoolExecutor | None = ThreadPoolExecutor(N_THREADS, "proc-mem")
        self.memory: dict[str, int] = {}
        # A peer reads this to be sure that it has found us, and not another process that has our number.
        self.cookie = ctypes.create_string_buffer(secrets.token_bytes(COOKIE_NBYTES), COOKIE_NBYTES)

    async def aclose(self) -> None:
        """End them; no copy is in flight."""
        for peer in list(self.memory):
            await self.disconnect(peer)
        if self.threads is not None:
            self.threads.shutdown()
            self.threads = None

    # Peers. What `describe` returns travels over the control connection; the agent there gives it to `connect`.

    def describe(self) -> bytes:
        """Tell where this process's memory is."""
        cookie = {"at": ctypes.addressof(self.cookie), "cookie": self.cookie.raw.hex()}
        return json.dumps({"where": where_am_i(), "pid": os.getpid(), **cookie}).encode()

    async def connect(self, peer: PeerInfo) -> None:
        """Open a peer's memory. An error is no harm: the agent takes another route."""
        with ExitStack() as undo:
            try:
                told = json.loads(peer.description)
                # The file stays that of the process that was opened, even when another one gets the number.
                fd = os.open(f"/proc/{int(told['pid'])}/mem", os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, fd)
                if told["where"] != where_am_i() or os.pread(fd, COOKIE_NBYTES, int(told["at"])).hex() != told["cookie"]:
                    raise ValueError("it is on another host, or another process has its number")
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise BackendError(f"peer {peer.name!r}: {error}", backend=self.name, peer=peer.name) from error
            undo.pop_all()
        await self.disconnect(peer.name)
        self.memory[peer.name] = fd

    async def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        fd = self.memory.pop(peer, None)
        if fd is not None:
            os.close(fd)

    # Copying.

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Say what it cannot do: `agent.explain` shows this text."""
        if {src.kind, dst.kind} != {MemoryKind.DRAM} or bool(src.peer) == bool(dst.peer):
            return "it copies between DRAM of ours and DRAM of a peer"
        return None if (src.peer or dst.peer) in self.memory else "the peer is not reached"

    async def copy(self, op: Op) -> None:
        """Copy on a thread. If the caller gives up, the thread stops at the next segment, and is waited for."""
        fd = self.memory.get(op.peer or "")
        if self.threads is None or fd is None:
            raise PeerLost(f"peer {op.peer!r} is not connected", backend=self.name, peer=op.peer)
        stop = threading.Event()
        await quiesce(asyncio.get_running_loop().run_in_executor(self.threads, self._run, op, fd, stop), stop.set)

    def _run(self, op: Op, fd: int, stop: threading.Event) -> None:
        src, dst, move = op.plan.src.addresses, op.plan.dst.addresses, os.pwritev if op.put else os.preadv
        ours, theirs = (src, dst) if op.put else (dst, src)
        for here, there, nbytes in np.stack([ours, theirs, op.plan.lengths], 1).tolist():
            done = 0
            while done < nbytes and not stop.is_set():
                try:
                    moved = move(fd, [(ctypes.c_char * (nbytes - done)).from_address(here + done)], there + done)
                except OSError as error:
                    raise BackendError(f"{nbytes} bytes at {there:#x}: {error}", backend=self.name, peer=op.peer) from error
                if moved == 0:
                    raise PeerLost(f"the process of peer {op.peer!r} has ended", backend=self.name, peer=op.peer)
                done += moved


PAGE, N = 65_536, 256


async def serve() -> None:
    """Be the other process: memory, and an agent that has the backend too."""
    async with Agent("decode", token="secret", backends=[ProcMem(), "tcp"]) as agent:
        await agent.register(np.zeros(N * PAGE, np.uint8), name="kv")
        print(*await agent.serve(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def main() -> None:
    other = await asyncio.create_subprocess_exec(sys.executable, __file__, "serve", stdin=PIPE, stdout=PIPE)
    host, port = (await other.stdout.readline()).decode().split()
    sent, back = np.random.default_rng(0).integers(0, 256, N * PAGE, np.uint8), np.zeros(N * PAGE, np.uint8)
    async with Agent("prefill", token="secret", backends=[ProcMem(), "tcp"]) as agent:
        ours, mirror = await agent.register(sent), await agent.register(back)
        theirs = (await agent.connect((host, int(port)))).region("kv")
        print(agent.explain(ours, theirs))
        pages = theirs.pages(np.random.permutation(N), PAGE)
        put, got = await agent.transfer(ours[:], pages), await agent.transfer(pages, mirror[:])
        assert (sent == back).all()
        print(f"{N} pages there by {put.route} and back by {got.route}, every byte checked")
    other.stdin.close()
    await other.wait()


if __name__ == "__main__":
    try:
        asyncio.run(serve() if sys.argv[1:] == ["serve"] else main())
    except KeyboardInterrupt:
        sys.exit(130)
