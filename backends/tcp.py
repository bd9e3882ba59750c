"""Copies over plain TCP connections, for pages of any size: one-sided, served by native threads that never need the GIL.

A peer proves by a token from our metadata that it may connect. Each request names the byte ranges it reads or writes, and the
side that serves it checks them against what is registered before a byte moves. Sockets are read into, and written from, the
pages themselves. Bytes travel in the clear: use it on networks that you trust.
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

from nixl_async.backend import Backend, Begun, Host, Limits, Op, PeerInfo, quiesce
from nixl_async.descriptors import MemoryKind, Side
from nixl_async.errors import AccessError, BackendError, ConfigurationError, PeerLost, TransferError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.native import ffi, int64, lib

CONNECT_SECONDS = 5.0
GRACE_SECONDS = 1.0
"""How long a cancelled request may take before its connection is cut: a live peer needs milliseconds."""
SPIN_NS = 150_000
"""How long a small copy looks for its answer before it lets the loop run: waking up takes longer than a near peer's answer."""
SPIN_MISSES = 3
SPIN_AGAIN = 32
"""After so many vain looks in a row only every 32nd small copy tries one again: that peer is far away, or busy."""
_BATCH = 256
_TOKEN_NBYTES = 16
_KEY = struct.Struct("<Q")
_HELLO = struct.Struct("<8s16sII")
_HEADER = struct.Struct("<IBBHIIQQ")
_MAGIC, _ACK = 0x5458494E, 3
_REFUSALS = {1: "it has no such region", 2: "an address lies outside the region", 3: "the region is read-only"}


@dataclass(slots=True, eq=False)
class _Stream:
    """One connection to a peer; `ended` resolves with the reason when the native side has let go of it."""

    pointer: object
    ended: asyncio.Future[int]
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    identity: bytes
    streams: list[_Stream] = field(default_factory=list)
    """The connections for bulk; the express one, which this thread drives, comes after them."""
    express: _Stream | None = None
    express_fd: int = -1
    misses: int = 0
    lost: str = ""


class TCPBackend(Backend):
    """Moves bytes to and from peers over `streams` connections each, by `threads` threads in all, and small copies at once.

    By default both follow the number of cores: one connection keeps two cores of a host busy, more of them only share those.
    """

    name = "tcp"
    rank = 30
    limits = Limits(max_ops=4, max_op_nbytes=8 << 20, max_op_segments=16384, inline_nbytes=16 << 10)

    def __init__(self, *, streams: int | None = None, threads: int | None = None) -> None:
        self._n_streams = max(1, min(2, (os.cpu_count() or 1) // 2)) if streams is None else streams
        if not 1 <= self._n_streams <= 64:
            raise ConfigurationError(f"streams is {streams}; it must be 1 to 64")
        self.limits = replace(type(self).limits, max_ops=max(4, self._n_streams), lanes=self._n_streams)
        self._n_threads = min(4, os.cpu_count() or 1) if threads is None else threads
        if not 1 <= self._n_threads <= 64:
            raise ConfigurationError(f"threads is {threads}; it must be 1 to 64")
        self._token = secrets.token_bytes(_TOKEN_NBYTES)
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
        self._engine = lib.nx_tcp_open(self._n_threads, self._event_fd, self._token)
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
        """Accept peers at a free port of the local address `host` (a name is looked up); again for the same one does nothing."""
        self._opened()
        for family, address in await self._addresses(host):
            if any(at in (address[0], _wildcard(family)) for at, _ in self._listening):
                continue
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address[0], 0, *address[2:]))
                sock.listen(128)
                status = lib.nx_tcp_listen(self._engine, sock.fileno())
                if status:
                    raise OSError(-status, os.strerror(-status))
            except OSError as error:
                sock.close()
                raise ConfigurationError(f"cannot listen at {address[0]}: {error}") from None
            self._listening.append((str(address[0]), sock.getsockname()[1]))
            sock.detach()

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
        """Return where we listen, and the token that peers must show."""
        return json.dumps({"at": self._listening, "token": self._token.hex()}).encode()

    async def connect(self, peer: PeerInfo) -> None:
        """Open the connections to a peer and introduce us."""
        host = self._opened()
        places, token = _read_description(peer, self.name)
        identity = f"{host.agent_name}\0{host.incarnation}".encode()
        await self.disconnect(peer.name)
        known = _Peer(peer.name, f"{peer.name}\0{peer.incarnation}".encode())
        sockets: list[socket.socket] = []
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                sockets.append(await self._reach(peer, places, token, identity))
                place = sockets[0].getpeername()
                for _ in range(self._n_streams):
                    sockets.append(await self._greet(sockets[0].family, place, token, identity))
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
        known.express_fd = sockets[-1].fileno()
        for sock in sockets:
            number, express = next(self._ids), sock is sockets[-1]
            ended = self._expect(number)
            stream = _Stream(lib.nx_tcp_adopt(self._engine, sock.detach(), number, express), ended)
            ended.add_done_callback(partial(self._ended, known))
            if express:
                known.express = stream
            else:
                known.streams.append(stream)
        host.loop.add_reader(known.express_fd, self._pump, known)

    async def disconnect(self, peer: str) -> None:
        """Close the connections with a peer, those it opened included; afterwards none of its requests is served."""
        known = self._peers.pop(peer, None)
        if known is None:
            return
        known.lost = known.lost or "we parted from it"
        streams = [*known.streams, *([known.express] if known.express else [])]
        for stream in streams:
            lib.nx_tcp_drop(stream.pointer)
        number = next(self._ids)
        dropped = self._expect(number)
        lib.nx_tcp_drop_accepted(self._engine, known.identity, len(known.identity), number)
        try:
            await quiesce(asyncio.gather(dropped, *(stream.ended for stream in streams)))
        finally:
            self._unwatch(known)
            for stream in streams:
                lib.nx_tcp_forget(stream.pointer)

    async def register(self, region: MemoryRegion) -> bytes:
        """Let peers that know the key read the region, and write to it unless it is read-only."""
        self._opened()
        key = secrets.randbits(64)
        status = lib.nx_tcp_register(self._engine, key, region.address, region.nbytes, region.readonly)
        if status:
            raise BackendError(f"cannot register: {os.strerror(-status)}", backend=self.name)
        return _KEY.pack(key)

    async def unregister(self, region: MemoryRegion) -> None:
        """Refuse the key, and wait until no request touches the region; a peer that holds one for long is cut off."""
        self._opened()
        (key,) = _KEY.unpack(region.keys[self.name])
        number = next(self._ids)
        quiet = self._expect(number)
        lib.nx_tcp_unregister(self._engine, key, number)
        cut = self._opened().loop.call_later(GRACE_SECONDS, lib.nx_tcp_cut_region, self._engine, key)
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
        if peer is None or peer.lost or peer.express is None:
            return False
        spin = SPIN_NS if peer.misses < SPIN_MISSES or peer.misses % SPIN_AGAIN == 0 else 0
        number = next(self._ids)
        stream = peer.express
        status = lib.nx_tcp_now(stream.pointer, number, *self._request(op), spin)
        if status == 0:
            peer.misses = 0
            return True
        if status == -errno.EBUSY:
            return False
        if status != -errno.EINPROGRESS:
            raise self._error(status, op)
        peer.misses += 1
        ended = self._expect(number)
        future: asyncio.Future[None] = ended.get_loop().create_future()
        cut: list[asyncio.TimerHandle] = []

        def resolve(ended: asyncio.Future[int]) -> None:
            for timer in cut:
                timer.cancel()
            if ended.result():
                future.set_exception(self._error(ended.result(), op))
            else:
                future.set_result(None)

        def stop() -> None:
            if not cut:
                cut.append(ended.get_loop().call_later(GRACE_SECONDS, self._cut, peer, stream))

        ended.add_done_callback(resolve)
        self._pump(peer)
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
        stream = min(peer.streams, key=_load)
        number = next(self._ids)
        done = self._expect(number)
        if lib.nx_tcp_submit(stream.pointer, number, *request):
            del self._waiting[number]
            raise BackendError("out of memory", backend=self.name, peer=op.peer, retryable=True)
        stream.nbytes += op.plan.nbytes
        cut: asyncio.TimerHandle | None = None

        def stop() -> None:
            nonlocal cut
            lib.nx_tcp_cancel(stream.pointer, number)
            cut = host.loop.call_later(GRACE_SECONDS, self._cut, peer, stream)

        try:
            status = await quiesce(done, stop)
        finally:
            stream.nbytes -= op.plan.nbytes
            if cut is not None:
                cut.cancel()
        if status:
            raise self._error(status, op)

    def _request(self, op: Op) -> tuple[Any, ...]:
        """Return an op as the arguments that the engine takes."""
        ours, theirs = (op.plan.src, op.plan.dst) if op.put else (op.plan.dst, op.plan.src)
        keys = b"".join([region.keys.get(self.name, b"") for region in theirs.regions if isinstance(region, RemoteRegion)])
        if len(keys) != _KEY.size * len(theirs.regions):
            raise BackendError(f"peer {op.peer!r} has not registered that memory with tcp", backend=self.name, peer=op.peer)
        index = ffi.NULL if theirs.index is None else int64(theirs.index)
        lengths = op.plan.lengths
        arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
        return op.put, len(lengths), *arrays, index, len(theirs.regions), keys, op.plan.nbytes

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
            peer.lost = f"it did not finish a cancelled request within {GRACE_SECONDS:g} s"
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

    def _ended(self, peer: _Peer, future: asyncio.Future[int]) -> None:
        if peer.express is not None and future is peer.express.ended:
            self._unwatch(peer)
        if peer.lost or self._host is None:
            return
        # One connection that breaks means that the others are about to: no op is given to any of them from here on.
        peer.lost = f"a connection ended: {os.strerror(-future.result())}"
        self._host.peer_lost(peer.name, peer.lost)

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
