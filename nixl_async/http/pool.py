"""The connections to one server: as many as the work needs, up to a limit; requests wait for one in order."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nixl_async.http.connection import Connection, connect
from nixl_async.http.engine import Engine
from nixl_async.http.messages import HTTPError, Request, Response

BUDGET_SECONDS = 0.0006
"""How long one loop iteration may spend on sending and receiving; what is left is taken up in the next."""
TURNS = 8
"""How many of those that wait for a turn get it in one iteration: a request takes a twentieth of a millisecond to make and send."""
SCRATCH_NBYTES = 72 << 10
COOL_SECONDS = 1.0
"""How long no connection is tried after one was refused while others are open."""
AT_LEAST_REQUESTS, AT_LEAST_NBYTES = 8, 16 << 20
"""So many requests and bytes are under way to the nearest server; bytes alone hold back no request below `FEW_REQUESTS`."""
FEW_REQUESTS = 4
REQUESTS_PER_SECOND, NBYTES_PER_SECOND = 10_000, 10_000_000_000
"""What is under way follows from how long a server takes to begin an answer, at this pace: more would only grow cold in buffers."""
MAX_NBYTES = 512 << 20
"""Requests wait while those on their way move this many bytes."""
DISTANCE_SECONDS = 10.0
"""How long the soonest answer counts."""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Where the server is and how patient we are. `connect_timeout`, `read_timeout` (silence) and `idle_timeout` are in seconds."""

    host: str
    port: int
    context: ssl.SSLContext | None = None
    server_name: str = ""
    max_connections: int = 64
    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    idle_timeout: float = 30.0


class Pool:
    """Sends requests to one server. One loop, one thread."""

    def __init__(self, options: PoolOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.options = options
        self.scratch_bytes = bytearray(SCRATCH_NBYTES)
        self.scratch = memoryview(self.scratch_bytes)
        self.opened = 0
        """How many connections there have been."""
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: deque[Request] = deque()
        self._nbytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._spent = 0.0
        self._renewing = False
        self._turns: deque[asyncio.Future[None]] = deque()
        self._cool_until = 0.0
        self._closed = False
        self._nearest = 0.0
        self._nearest_until = 0.0
        self._at_most = min(AT_LEAST_REQUESTS, options.max_connections), AT_LEAST_NBYTES
        self._engine: Engine | None = None

    async def request(self, request: Request) -> Response:
        """Send a request and return the response; when cancelled, nothing moves on its account any more.

        Raises:
            HTTPError: there was no response, or none that could be used.
        """
        if self._closed:
            raise HTTPError("the pool is closed", retryable=False)
        future: asyncio.Future[Response] = self.loop.create_future()
        request.future = future
        self._waiting.append(request)
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self._abort(request)
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        """Send requests whose responses go to their `receiver`s; `abandon` takes one back."""
        if self._closed:
            for request in requests:
                request.answer(HTTPError("the pool is closed", retryable=False))
            return
        self._waiting.extend(requests)
        self._pump()

    def abandon(self, request: Request) -> None:
        """Forget a request: nothing moves on its account any more, and its receiver hears nothing of it."""
        request.receiver = None
        self._abort(request)

    async def aclose(self) -> None:
        """Close every connection; requests under way fail."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in [*self._idle, *self._busy]:
            request = connection.request
            connection.close()
            if request is not None:
                request.answer(HTTPError("the pool is closed", retryable=False))
        while self._waiting:
            self._waiting.popleft().answer(HTTPError("the pool is closed", retryable=False))
        self._idle.clear()
        self._busy.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    # The loop's time.

    def may_work(self) -> float:
        """Return the time, or 0.0 when this iteration of the loop has moved enough."""
        return time.perf_counter() if self._spent < BUDGET_SECONDS else 0.0

    def may_go_on(self, started: float) -> bool:
        """Tell whether there is time left for more of the work that began at `started`."""
        return self._spent + time.perf_counter() - started < BUDGET_SECONDS

    def seconds_left(self) -> float:
        """Return how much of its time this iteration of the loop has left."""
        return max(0.0, BUDGET_SECONDS - self._spent)

    async def turn(self) -> float:
        """Wait for an iteration of the loop that has time left, behind those that wait already; return the time."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._turns.append(future)
        self._renew()
        await future
        return time.perf_counter()

    def worked(self, started: float) -> None:
        """Count the time since `started` against this iteration."""
        self._spent += time.perf_counter() - started
        self._renew()

    def _renew(self) -> None:
        if not self._renewing:
            self._renewing = True
            self.loop.call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        self._renewing = False
        self._spent = 0.0
        for _ in range(min(TURNS, len(self._turns))):
            future = self._turns.popleft()
            if not future.done():
                future.set_result(None)
        if self._turns:
            self._renew()

    # What connections report.

    def finished(self, connection: Connection, request: Request, *, pump: bool = True) -> None:
        """A request is over; give the connection the next one, unless `pump` is False: then `pump` is called soon."""
        self._busy.discard(connection)
        self._nbytes -= request.nbytes
        if not connection.closed and not self._closed:
            connection.active_at = self.loop.time()
            self._idle.append(connection)
        if pump:
            self._pump()

    def pump(self) -> None:
        """Give idle connections to those that wait."""
        self._pump()

    def answered(self, seconds: float) -> None:
        """Take note of how long a server took to begin an answer: the soonest of late tells how far away it is."""
        now = self.loop.time()
        if seconds >= self._nearest and now < self._nearest_until:
            return
        self._nearest, self._nearest_until = seconds, now + DISTANCE_SECONDS
        requests = max(AT_LEAST_REQUESTS, int(seconds * REQUESTS_PER_SECOND))
        nbytes = max(AT_LEAST_NBYTES, int(seconds * NBYTES_PER_SECOND))
        self._at_most = min(requests, self.options.max_connections), min(nbytes, MAX_NBYTES)

    def useful(self, nbytes: int) -> int:
        """Return how many requests that move `nbytes` bytes each are under way at most."""
        requests, most = self._at_most
        return min(requests, max(FEW_REQUESTS, most // nbytes))

    def dropped(self, connection: Connection) -> None:
        """An idle connection is gone."""
        if connection in self._idle:
            self._idle.remove(connection)

    def resend(self, connection: Connection, request: Request) -> None:
        """A connection turned out to be closed before the request was read; send it on another."""
        self._busy.discard(connection)
        self._nbytes -= request.nbytes
        request.connection = None
        request.resent = True
        # What was idle as long may be closed as well.
        for one in self._idle:
            one.close()
        self._idle.clear()
        self._waiting.appendleft(request)
        self._pump()

    # The machine.

    def _pump(self) -> None:
        at_most, nbytes_at_most = self._at_most
        while self._waiting and self._idle and len(self._busy) < at_most:
            request = self._waiting[0]
            if request.over:
                self._waiting.popleft()
                continue
            over = self._nbytes + request.nbytes
            if self._busy and over > (MAX_NBYTES if len(self._busy) < FEW_REQUESTS else nbytes_at_most):
                break
            self._waiting.popleft()
            connection = self._idle.pop()
            self._busy.add(connection)
            self._nbytes += request.nbytes
            connection.start(request)
        if self._closed:
            return
        if not self._idle and not ((self._busy or self._connecting) and self.loop.time() < self._cool_until):
            room = at_most - len(self._busy) - len(self._connecting)
            for _ in range(min(room, len(self._waiting) - len(self._connecting))):
                task = self.loop.create_task(self._connect())
                self._connecting.add(task)
                task.add_done_callback(self._connecting.discard)
        if self._timer is None and (self._busy or self._idle):
            self._timer = self.loop.call_later(min(1.0, self.options.read_timeout / 4), self._tick)

    async def _connect(self) -> None:
        options = self.options
        try:
            async with asyncio.timeout(options.connect_timeout):
                sock = await connect(
                    self.loop, options.host, options.port, options.context, options.server_name, options.connect_timeout / 3
                )
        except (OSError, TimeoutError) as error:
            self._connecting.discard(asyncio.current_task())
            reason = f"{error}" or f"no answer within {options.connect_timeout:g} s"
            # A certificate does not become right by asking again.
            wrong = isinstance(error, ssl.SSLCertVerificationError)
            if (self._busy or self._idle) and not wrong:
                # The server takes no more connections; those that are open serve whoever waits.
                self._cool_until = self.loop.time() + COOL_SECONDS
                self._pump()
            else:
                self._fail_one(HTTPError(f"cannot connect to {options.host}:{options.port}: {reason}", retryable=not wrong))
            return
        self._connecting.discard(asyncio.current_task())
        self.opened += 1
        if options.context is None and self._engine is None:
            self._engine = Engine.open(self)
        self._idle.append(Connection(self, sock, self._engine))
        self._pump()

    def _fail_one(self, error: HTTPError) -> None:
        while self._waiting:
            request = self._waiting.popleft()
            if not request.over:
                request.answer(error)
                break
        self._pump()

    def _abort(self, request: Request) -> None:
        connection = request.connection
        if connection is None:
            if request in self._waiting:
                self._waiting.remove(request)
            return
        connection.request = request.connection = None
        connection.abort()
        self._busy.discard(connection)
        self._nbytes -= request.nbytes
        self._pump()

    def _tick(self) -> None:
        self._timer = None
        now, options = self.loop.time(), self.options
        for connection in [one for one in self._busy if one.silence(now) > options.read_timeout]:
            connection.expire(options.read_timeout)
        for connection in [one for one in self._idle if now - one.active_at > options.idle_timeout]:
            connection.close()
            self._idle.remove(connection)
        self._pump()
