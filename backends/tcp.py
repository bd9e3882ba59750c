"""Copies over plain TCP connections, for pages of any size: one-sided, served by native threads that never need the GIL.

A peer proves that it may connect by a token that it alone was told over its control connection, and that ends with it. Each request
names the byte ranges it reads or writes, and the side that serves it checks them, and who asks, against what is registered before
a byte moves. Sockets are read into, and written from, the
pages themselves. Bytes travel in the clear: use it on networks that you trust.

What was sent on a connection that breaks may lie in the network, or in the peer's socket, and be written long after. So a put that
was on it ends when the peer has confirmed, over the control connection, that it has closed its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import json
import os
import secrets
import socket
import struct
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from nixl_async.backend import Backend, Begun, Host, Limits, Op, PeerInfo, Revocation, quiesce
from nixl_async.descriptors import MemoryKind, Side
from nixl_async.errors import AccessError, BackendError, ConfigurationError, PeerLost, Quarantined, TransferError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.native import ffi, int64, lib

PORTS_VARIABLE = "NIXL_ASYNC_TCP_PORTS"
CONNECT_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""How long a cancelled request may take before its connection is cut: a live peer needs milliseconds."""
SPIN_NS, SPIN_MOST_NS = 150_000, 800_000
"""How long a small copy looks for its answer before it lets the loop run, and a nanosecond more for each byte, up to so long: to be
woken takes longer than a near peer's answer."""
LARGE_NBYTES = 512 << 10
"""What is larger and not looked for goes to the threads."""
SPIN_MISSES = 3
SPIN_AGAIN = 32
"""After so many vain looks in a row only every 32nd copy tries one again: that peer is far away, or busy."""
_BATCH = 256
_TOKEN_NBYTES = 16
_MAX_MARK = 20
_ROUNDS = 3
_KEY = struct.Struct("<Q")
_HELLO = struct.Struct("<8s16sII")
_HEADER = struct.Struct("<IBBHIIQQ")
_MAGIC, _ACK = 0x5458494E, 3
_REFUSALS = {1: "it has no such region for us", 2: "an address lies outside the region", 3: "the region is read-only"}


@dataclass(slots=True, eq=False)
class _Stream:
    """One connection to a peer; `ended` resolves with the reason when the native side has let go of it.

    `mark` is what it has told the peer that it is; `users` counts the ops that hold its pointer; `fence` ends when the peer has
    closed its end.
    """

    pointer: object
    ended: asyncio.Future[int]
    mark: bytes
    nbytes: int = 0
    users: int = 0
    fence: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    identity: bytes
    streams: list[_Stream] = field(default_factory=list)
    """The connections for bulk; the express one, which this thread drives, comes after them."""
    express: _Stream | None = None
    express_fd: int = -1
    misses: list[int] = field(default_factory=lambda: [0, 0])
    """How many looks in a row were in vain, for small copies and for those of more than LARGE_NBYTES."""
    lost: str = ""
    broken: list[_Stream] = field(default_factory=list)
    """Connections that have ended and that ops may still hold."""
    down: str = ""
    """Why it is to be connected to again."""


def read_ports(what: str, given: str | int) -> range:
    """Return the ports that a text such as "7100-7199" or "7100" names.

    Raises:
        ConfigurationError: it names none; `what` is called in the message.
    """
    first, dash, last = str(given).partition("-")
    last = last if dash else first
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        raise ConfigurationError(f'{what} is {given!r}; it must be a port or a range of ports, such as "7100-7199"')
    ports = range(int(first), int(last) + 1)
    if not ports or not 0 < ports[0] <= ports[-1] < 65536:
        raise ConfigurationError(f"{what} is {given!r}; ports are 1 to 65535, the lower end first")
    return ports


class TCPBackend(Backend):
    """Moves bytes to and from peers over `streams` connections each, by `threads` threads in all, and small copies at once.

    By default both follow the number of cores: one connection keeps two cores of a host busy, more of them only share those.
    `ports` is where peers are accepted: a port, or a range such as "7100-7199", of which the first free one is taken; each agent of
    a host needs one (default: the environment's NIXL_ASYNC_TCP_PORTS, else any that is free).

    Raises:
        ConfigurationError: an option is out of its range.
    """

    name = "tcp"
    begins = True
    rank = 30
    revocation = Revocation.ENFORCED
    limits = Limits(max_ops=4, max_op_nbytes=8 << 20, max_op_segments=16384, inline_nbytes=2 << 20)

    def __init__(self, *, streams: int | None = None, threads: int | None = None, ports: str | int | None = None) -> None:
        self._n_streams = max(1, min(2, (os.cpu_count() or 1) // 2)) if streams is None else streams
        if not 1 <= self._n_streams <= 64:
            raise ConfigurationError(f"streams is {streams}; it must be 1 to 64")
        self.limits = replace(type(self).limits, max_ops=max(4, self._n_streams), lanes=self._n_streams)
        self._n_threads = min(4, os.cpu_count() or 1) if threads is None else threads
        if not 1 <= self._n_threads <= 64:
            raise ConfigurationError(f"threads is {threads}; it must be 1 to 64")
        self._ports = read_ports("ports", ports) if ports is not None else range(1)
        if ports is None and (given := os.environ.get(PORTS_VARIABLE)):
            self._ports = read_ports(PORTS_VARIABLE, given)
        self._engine = ffi.NULL
        self._event_fd = -1
        self._host: Host | None = None
        self._listening: list[tuple[str, int]] = []
        self._peers: dict[str, _Peer] = {}
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._ids = itertools.count(1)
        self._ids_out = np.zeros(_BATCH, np.int64)
        self._statuses_out = np.zeros(_BATCH, np.int64)

    # Life.

    async def open(self, host: Host) -> None:
        """Start the threads."""
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._engine = lib.nx_tcp_open(self._n_threads, self._event_fd)
        if self._engine == ffi.NULL:
            os.close(self._event_fd)
            raise BackendError("the system gives no more threads or file descriptors", backend=self.name)
        self._host = host
        host.loop.add_reader(self._event_fd, self._take_completions)

    async def aclose(self) -> None:
        """Close every connection and end the threads."""
        if self._host is None:
            return
        for peer in list(self._peers):
            await self.disconnect(peer)
        host, self._host = self._host, None
        host.loop.remove_reader(self._event_fd)
        engine, self._engine = self._engine, ffi.NULL
        lib.nx_tcp_close(engine)
        os.close(self._event_fd)
        self._listening = []

    async def listen(self, host: str) -> None:
        """Accept peers at a free port of the local address `host` (a name is looked up); again for the same one does nothing.

        Raises:
            ConfigurationError: the address cannot be used, or none of `ports` is free.
        """
        self._opened()
        for family, address in await self._addresses(host):
            if any(at in (address[0], _wildcard(family)) for at, _ in self._listening):
                continue
            sock = self._bound(family, address)
            try:
                status = lib.nx_tcp_listen(self._engine, sock.fileno())
                if status:
                    raise OSError(-status, os.strerror(-status))
            except OSError as error:
                sock.close()
                raise ConfigurationError(f"cannot listen at {address[0]}: {error}") from None
            self._listening.append((str(address[0]), sock.getsockname()[1]))
            sock.detach()

    def _bound(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        """Return a socket that listens at the first free port."""
        for port in self._ports:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                # Else connections of a life before, which the kernel remembers for a minute, keep the port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address[0], port, *address[2:]))
                sock.listen(128)
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRINUSE or port == 0:
                    at = f"{address[0]}" + (f", port {port}" if port else "")
                    raise ConfigurationError(f"cannot listen at {at}: {error}") from None
            else:
                return sock
        first, last = self._ports[0], self._ports[-1]
        which = f"port {first} is" if first == last else f"all ports {first}-{last} are"
        raise ConfigurationError(
            f"cannot listen at {address[0]}: {which} taken; each agent of a host needs one, of ports= or {PORTS_VARIABLE}"
        )

    async def _addresses(self, host: str) -> list[tuple[int, tuple[Any, ...]]]:
        with contextlib.suppress(ValueError):
            version = ipaddress.ip_address(host).version
            return [(socket.AF_INET, (host, 0)) if version == 4 else (socket.AF_INET6, (host, 0, 0, 0))]
        try:
            loop = self._opened().loop
            found = await loop.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            raise ConfigurationError(f"cannot listen at {host!r}: {error}") from None
        return [(family, address) for family, _, _, _, address in found]

    def describe(self) -> bytes:
        """Return where we listen."""
        return json.dumps({"at": self._listening}).encode()

    def describe_to(self, peer: str, incarnation: str) -> bytes:
        """Return where we listen, and the token that this peer must show: no other's name goes with it."""
        _, token = self._invite(peer, incarnation)
        return json.dumps({"at": self._listening, "token": token.hex()}).encode()

    def _invite(self, peer: str, incarnation: str) -> tuple[int, bytes]:
        self._opened()
        identity = _identity(peer, incarnation)
        token = ffi.new("uint8_t[]", secrets.token_bytes(_TOKEN_NBYTES))
        number = lib.nx_tcp_invite(self._engine, identity, len(identity), token)
        if number < 0:
            raise BackendError(f"cannot invite peer {peer!r}: {os.strerror(-number)}", backend=self.name, peer=peer)
        return number, bytes(ffi.buffer(token, _TOKEN_NBYTES))

    async def dismiss(self, peer: str, incarnation: str) -> None:
        """Refuse the peer's token, and close the connections that it opened."""
        await self._drop_accepted(_identity(peer, incarnation), dismiss=True)

    async def _drop_accepted(self, identity: bytes, *, dismiss: bool) -> None:
        """End the connections that peers have opened and introduced themselves on by what begins with `identity`."""
        number = next(self._ids)
        dropped = self._expect(number)
        lib.nx_tcp_drop_accepted(self._engine, identity, len(identity), number, dismiss)
        await quiesce(dropped)

    async def connect(self, peer: PeerInfo) -> None:
        """Open the connections to a peer and introduce us; to one that is connected, those that are missing."""
        self._opened()
        places, token = _read_description(peer, self.name)
        known = self._peers.get(peer.name)
        if known is None or known.lost or known.identity != _identity(peer.name, peer.incarnation):
            await self.disconnect(peer.name)
            known = _Peer(peer.name, _identity(peer.name, peer.incarnation))
        for _ in range(_ROUNDS):
            # Meanwhile others may have broken.
            missing = [False] * (self._n_streams - len(known.streams)) + [True] * (known.express is None)
            if not missing:
                break
            await self._add(known, peer, places, token, missing)
        if missing:
            raise BackendError(f"peer {peer.name!r}: {known.down}", backend=self.name, peer=peer.name)
        known.down = ""

    async def _add(
        self, known: _Peer, peer: PeerInfo, places: list[tuple[str, int]], token: bytes, wanted: list[bool]
    ) -> None:
        """Open connections to a peer: for each of `wanted` whether it is the express one."""
        host = self._opened()
        marks = [b"%d" % next(self._ids) for _ in wanted]
        identity = _identity(host.agent_name, host.incarnation)
        introductions = [identity + mark + b"\0" for mark in marks]
        sockets: list[socket.socket] = []
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for introduction in introductions:
                    if sockets:
                        place = sockets[0].getpeername()
                        sockets.append(await self._greet(sockets[0].family, place, token, introduction))
                    else:
                        sockets.append(await self._reach(peer, places, token, introduction))
            if known.lost:
                raise PeerLost(f"peer {peer.name!r} is lost: {known.lost}", backend=self.name, peer=peer.name)
        except TimeoutError:
            for sock in sockets:
                sock.close()
            raise BackendError(
                f"peer {peer.name!r} did not answer at {places} within {CONNECT_SECONDS:g} s",
                backend=self.name,
                peer=peer.name,
            ) from None
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        self._peers[peer.name] = known
        for sock, mark, express in zip(sockets, marks, wanted, strict=True):
            number, fd = next(self._ids), sock.fileno()
            ended = self._expect(number)
            stream = _Stream(lib.nx_tcp_adopt(self._engine, sock.detach(), number, express), ended, mark)
            if express:
                known.express, known.express_fd = stream, fd
                host.loop.add_reader(fd, self._pump, known)
            else:
                known.streams.append(stream)
            ended.add_done_callback(partial(self._ended, known, stream))

    async def disconnect(self, peer: str) -> None:
        """Close the connections with a peer, those it opened included; afterwards none of its requests is served."""
        known = self._peers.pop(peer, None)
        if known is None:
            return
        known.lost = known.lost or "we parted from it"
        streams = [*known.streams, *([known.express] if known.express else [])]
        for stream in streams:
            lib.nx_tcp_drop(stream.pointer)
        try:
            dropped = asyncio.ensure_future(self._drop_accepted(known.identity, dismiss=False))
            await quiesce(asyncio.gather(dropped, *(stream.ended for stream in streams)))
        finally:
            self._unwatch(known)
            for stream in [*streams, *known.broken]:
                if stream.fence is not None:
                    stream.fence.cancel()
                lib.nx_tcp_forget(stream.pointer)

    async def fence(self, peer: PeerInfo, mark: bytes) -> None:
        """Close our end of the connection that the peer means, or of all that it has opened."""
        self._opened()
        if mark and (not mark.isdigit() or len(mark) > _MAX_MARK):
            raise BackendError(f"a fence of peer {peer.name!r} names no connection: {mark[:40]!r}", backend=self.name)
        which = mark + b"\0" if mark else b""
        await self._drop_accepted(_identity(peer.name, peer.incarnation) + which, dismiss=False)

    def served(self) -> tuple[int, int] | None:
        """Return the bytes that peers have read from our memory and written to it."""
        if self._engine == ffi.NULL:
            return None
        nbytes = ffi.new("int64_t[2]")
        lib.nx_tcp_served(self._engine, nbytes)
        return nbytes[0], nbytes[1]

    async def register(self, region: MemoryRegion) -> bytes:
        """Let peers that know the key read the region, and write to it unless it is read-only."""
        return self._register(region, region.readonly, 0)

    async def unregister(self, region: MemoryRegion) -> None:
        """Refuse the key, and wait until no request touches the region; a peer that holds one for long is cut off."""
        await self.revoke(region, region.keys[self.name])

    async def grant(self, region: MemoryRegion, peer: str, incarnation: str, *, writable: bool) -> bytes:
        """Return a key that opens the region to requests on connections of that peer alone."""
        guest, _ = self._invite(peer, incarnation)
        return self._register(region, region.readonly or not writable, guest)

    def _register(self, region: MemoryRegion, readonly: bool, guest: int) -> bytes:
        self._opened()
        key = secrets.randbits(64)
        status = lib.nx_tcp_register(self._engine, key, region.address, region.nbytes, readonly, guest)
        if status:
            raise BackendError(f"cannot register: {os.strerror(-status)}", backend=self.name)
        return _KEY.pack(key)

    async def revoke(self, region: MemoryRegion, key: bytes) -> None:
        """Refuse a key, and wait until no request that names it touches the region; a peer that holds one for long is cut off."""
        self._opened()
        (number_of_key,) = _KEY.unpack(key)
        number = next(self._ids)
        quiet = self._expect(number)
        lib.nx_tcp_unregister(self._engine, number_of_key, number)
        cut = self._opened().loop.call_later(GRACE_SECONDS, lib.nx_tcp_cut_region, self._engine, number_of_key)
        try:
            await quiesce(quiet)
        finally:
            cut.cancel()

    # Copying.

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but DRAM between us and a connected peer."""
        if src.kind is not MemoryKind.DRAM or dst.kind is not MemoryKind.DRAM:
            return f"it copies DRAM only, not {src.kind.value} to {dst.kind.value}"
        if (src.peer is None) == (dst.peer is None):
            return "it copies between this process and a peer only"
        peer = self._peers.get(src.peer or dst.peer or "")
        if peer is None or peer.lost:
            return peer.lost if peer else "it is not connected to that peer"
        return None

    def copy_now(self, op: Op) -> bool | Begun:
        """Send a small request over the idle express connection, and look for its answer for a moment."""
        peer = self._peers.get(op.peer or "")
        if peer is None or peer.lost or peer.down or peer.express is None:
            return False
        large, misses = op.nbytes > LARGE_NBYTES, peer.misses
        spin = min(SPIN_NS + op.nbytes, SPIN_MOST_NS)
        if misses[large] >= SPIN_MISSES and misses[large] % SPIN_AGAIN:
            if large:
                misses[large] += 1
                return False
            spin = 0
        number = next(self._ids)
        stream = peer.express
        status = lib.nx_tcp_now(stream.pointer, number, *self._request(op), spin)
        if status == 0:
            misses[large] = 0
            return True
        if status == -errno.EBUSY:
            # An answer is on its way: what comes meanwhile is the threads'.
            return False
        if status > 0:
            raise self._error(status, op)
        ended = self._expect(number)
        future: asyncio.Future[None] = ended.get_loop().create_future()
        cut: list[asyncio.TimerHandle] = []

        def fenced(fence: asyncio.Task[None]) -> None:
            future.set_exception(self._why_not_quiet(fence, op) or self._error(ended.result(), op))

        def resolve(ended: asyncio.Future[int]) -> None:
            for timer in cut:
                timer.cancel()
            if ended.result() < 0 and op.put:
                self._fence_off(peer, stream).add_done_callback(fenced)
            elif ended.result():
                future.set_exception(self._error(ended.result(), op))
            else:
                future.set_result(None)

        def stop() -> None:
            if not cut:
                cut.append(ended.get_loop().call_later(GRACE_SECONDS, self._cut, peer, stream))

        ended.add_done_callback(resolve)
        if status == -errno.EINPROGRESS:
            misses[large] += 1
            self._pump(peer)
        else:
            del self._waiting[number]
            ended.set_result(status)
        return Begun(future, stop)

    async def copy(self, op: Op) -> None:
        """Ask the peer's native threads for the bytes, or send them; a cancelled request that has begun is seen to its end."""
        host = self._opened()
        peer = self._peers.get(op.peer or "")
        if peer is None or peer.lost:
            raise PeerLost(
                f"peer {op.peer!r} is lost: {peer.lost if peer else 'no connection'}", backend=self.name, peer=op.peer
            )
        request = self._request(op)
        if not peer.streams:
            raise PeerLost(f"peer {op.peer!r} cannot be reached: {peer.down}", backend=self.name, peer=op.peer)
        stream = min(peer.streams, key=_load)
        number = next(self._ids)
        done = self._expect(number)
        if lib.nx_tcp_submit(stream.pointer, number, *request):
            del self._waiting[number]
            raise BackendError("out of memory", backend=self.name, peer=op.peer, retryable=True)
        stream.nbytes += op.plan.nbytes
        stream.users += 1
        cut: asyncio.TimerHandle | None = None

        def stop() -> None:
            nonlocal cut
            lib.nx_tcp_cancel(stream.pointer, number)
            cut = host.loop.call_later(GRACE_SECONDS, self._cut, peer, stream)

        try:
            status = await quiesce(done, stop)
            if status:
                raise self._error(status, op)
        finally:
            stream.nbytes -= op.plan.nbytes
            stream.users -= 1
            if cut is not None:
                cut.cancel()
            status = done.result()
            if op.put and status < 0 and status != -errno.ECANCELED:
                await self._quiet(self._fence_off(peer, stream), op)

    def _fence_off(self, peer: _Peer, stream: _Stream) -> asyncio.Task[None]:
        """Have the peer close its end of a connection that broke; all puts that were on it wait for the one answer."""
        if stream.fence is None:
            host = self._opened()
            stream.fence = host.loop.create_task(_ask(host, peer.name, stream.mark))
        return stream.fence

    async def _quiet(self, fence: asyncio.Task[None], op: Op) -> None:
        """Wait until nothing more of a put that failed can land.

        Raises:
            Quarantined: that is not certain.
        """
        try:
            await quiesce(fence)
        except asyncio.CancelledError:
            if error := self._why_not_quiet(fence, op):
                raise error from None
            raise
        except TransferError:
            if error := self._why_not_quiet(fence, op):
                raise error from None

    def _why_not_quiet(self, fence: asyncio.Task[None], op: Op) -> Quarantined | None:
        cause = None if fence.cancelled() else fence.exception()
        # With a peer that is lost goes its memory, as far as this side is concerned.
        if cause is None or isinstance(cause, PeerLost):
            return None
        error = Quarantined(
            f"a connection to peer {op.peer!r} broke, and bytes that were sent on it may still be written there: {cause}",
            local=False,
            backend=self.name,
            peer=op.peer,
        )
        error.__cause__ = cause
        return error

    def _request(self, op: Op) -> tuple[Any, ...]:
        """Return an op as the arguments that the engine takes."""
        ours, theirs = op.sides
        keys = b"".join([region.keys.get(self.name, b"") for region in theirs.regions if isinstance(region, RemoteRegion)])
        if len(keys) != _KEY.size * len(theirs.regions):
            raise BackendError(f"peer {op.peer!r} has not registered that memory with tcp", backend=self.name, peer=op.peer)
        kept = op.kept
        if kept is None:
            lengths = op.plan.lengths
            arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
            index = ffi.NULL if theirs.index is None else int64(theirs.index)
            kept = op.kept = op.put, len(lengths), *arrays, index, len(theirs.regions)
        return *kept, keys, op.nbytes

    def _pump(self, peer: _Peer) -> None:
        """Drive the express connection as far as it goes."""
        if peer.express is None or peer.express_fd < 0:
            return
        loop = self._opened().loop
        status = lib.nx_tcp_pump(peer.express.pointer)
        if status < 0:
            self._unwatch(peer)
        elif status:
            loop.add_writer(peer.express_fd, self._pump, peer)
        else:
            loop.remove_writer(peer.express_fd)

    def _unwatch(self, peer: _Peer) -> None:
        if peer.express_fd >= 0 and self._host is not None:
            self._host.loop.remove_reader(peer.express_fd)
            self._host.loop.remove_writer(peer.express_fd)
        peer.express_fd = -1

    def _cut(self, peer: _Peer, stream: _Stream) -> None:
        if not stream.ended.done():
            peer.down = f"it did not finish a cancelled request within {GRACE_SECONDS:g} s"
            lib.nx_tcp_drop(stream.pointer)

    def _error(self, status: int, op: Op) -> TransferError:
        text = f"peer {op.peer!r}"
        if status in _REFUSALS:
            return AccessError(f"{text} refuses: {_REFUSALS[status]}", backend=self.name, peer=op.peer)
        if status > 0:
            return BackendError(f"{text} has no memory for the request", backend=self.name, peer=op.peer, retryable=True)
        if status == -errno.ECANCELED:
            return BackendError(f"the request to {text} was taken back", backend=self.name, peer=op.peer)
        return PeerLost(f"the connection to {text} is lost: {os.strerror(-status)}", backend=self.name, peer=op.peer)

    # Inside.

    def _opened(self) -> Host:
        if self._host is None:
            raise BackendError("the tcp backend is not open", backend=self.name)
        return self._host

    def _expect(self, number: int) -> asyncio.Future[int]:
        future = self._opened().loop.create_future()
        self._waiting[number] = future
        return future

    def _take_completions(self) -> None:
        ids, statuses = self._ids_out, self._statuses_out
        n = lib.nx_tcp_completions(self._engine, int64(ids), int64(statuses), _BATCH)
        for number, status in zip(ids[:n].tolist(), statuses[:n].tolist(), strict=True):
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_result(status)

    def _ended(self, peer: _Peer, stream: _Stream, future: asyncio.Future[int]) -> None:
        if stream is peer.express:
            self._unwatch(peer)
        if peer.lost or self._host is None:
            return
        # What is on the others goes on. No op is given to them until this one is there again: often they are about to break too.
        if stream is peer.express:
            peer.express = None
        else:
            peer.streams.remove(stream)
            # This thread learns of the express one's end by looking.
            self._pump(peer)
        for old in [old for old in peer.broken if not old.users]:
            lib.nx_tcp_forget(old.pointer)
            peer.broken.remove(old)
        peer.broken.append(stream)
        peer.down = peer.down or f"a connection ended: {os.strerror(-future.result())}"
        self._host.peer_lost(peer.name, peer.down)

    async def _reach(self, peer: PeerInfo, places: list[tuple[str, int]], token: bytes, identity: bytes) -> socket.socket:
        reasons = []
        for host, port in _candidates(places, peer.host):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                return await self._greet(family, (host, port), token, identity)
            except (OSError, TransferError) as error:
                reasons.append(f"{host}:{port}: {error}")
        why = "; ".join(reasons) or "it listens nowhere"
        raise BackendError(f"peer {peer.name!r} cannot be reached: {why}", backend=self.name, peer=peer.name)

    async def _greet(
        self, family: int, place: tuple[str, int] | tuple[str, int, int, int], token: bytes, identity: bytes
    ) -> socket.socket:
        loop = self._opened().loop
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_sendall(sock, _HELLO.pack(b"nixltcp1", token, len(identity), 0) + identity)
            answer = b""
            while len(answer) < _HEADER.size:
                piece = await loop.sock_recv(sock, _HEADER.size - len(answer))
                if not piece:
                    raise BackendError("it does not take us: the metadata is of another process", backend=self.name)
                answer += piece
            magic, kind, status, *_ = _HEADER.unpack(answer)
            if (magic, kind, status) != (_MAGIC, _ACK, 0):
                raise BackendError("what answers is not an agent's tcp backend", backend=self.name)
        except BaseException:
            sock.close()
            raise
        return sock


async def _ask(host: Host, peer: str, mark: bytes) -> None:
    await host.fence(peer, mark)


def _identity(name: str, incarnation: str) -> bytes:
    """Return what a peer's introductions begin with; the mark of the connection follows."""
    return f"{name}\0{incarnation}\0".encode()


def _load(stream: _Stream) -> int:
    return stream.nbytes


def _wildcard(family: int) -> str:
    return "::" if family == socket.AF_INET6 else "0.0.0.0"


def _read_description(peer: PeerInfo, backend: str) -> tuple[list[tuple[str, int]], bytes]:
    try:
        value = json.loads(peer.description)
        token = bytes.fromhex(value["token"])
        places = []
        for host, port in value["at"]:
            ipaddress.ip_address(host.partition("%")[0])
            if not (isinstance(port, int) and 0 < port < 65536):
                raise ValueError(f"port {port!r}")
            places.append((host, port))
        if len(token) != _TOKEN_NBYTES:
            raise ValueError(f"a token of {len(token)} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackendError(
            f"peer {peer.name!r} described itself wrongly: {error!r}", backend=backend, peer=peer.name
        ) from None
    return places, token


def _candidates(places: list[tuple[str, int]], host: str | None) -> list[tuple[str, int]]:
    """List where the peer may be reached, the address of its control connection first; a wildcard means that address."""
    found: dict[tuple[str, int], None] = {}
    for at, port in sorted(places, key=lambda place: place[0] != host):
        address = ipaddress.ip_address(at.partition("%")[0])
        if not address.is_unspecified:
            found[at, port] = None
        elif host is not None:
            with contextlib.suppress(ValueError):
                if ipaddress.ip_address(host.partition("%")[0]).version == address.version:
                    found[host, port] = None
    return list(found)
