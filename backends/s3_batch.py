"""Many objects of a bucket, or ranges of them, got in one op, without a task and a future for each.

The batch makes the first attempt at each. One that does not bring exactly what was asked for goes on as a single get, which has
the retries, redirects and errors; the batch's attempt counts as its first.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from nixl_async.backend import Op
from nixl_async.backends.s3_data import EMPTY_SHA256, Attempt, BucketData, Credentials, Endpoint
from nixl_async.errors import TransferError
from nixl_async.http import HTTPError, Request, Response
from nixl_async.native import int64
from nixl_async.objects import Run

HEADS_AT_ONCE = 16
"""How many requests one iteration of the loop makes: a hundredth of a millisecond each."""


class GetHeads:
    """The heads of GETs of ranges that differ in nothing but key and range: those that `BucketData.head` makes, in less time."""

    def __init__(self, data: BucketData, endpoint: Endpoint, credentials: Credentials | None) -> None:
        self.endpoint = endpoint
        self.credentials = credentials
        self.amz_date = data.amz_date()
        self._base_path = endpoint.base_path
        headers = [("host", endpoint.host), *data.options.of_get, ("range", "\0")]
        if credentials is not None:
            headers += [("x-amz-content-sha256", EMPTY_SHA256), ("x-amz-date", self.amz_date)]
            if credentials.token:
                headers.append(("x-amz-security-token", credentials.token))
            headers.sort()
            names = ";".join(name for name, _ in headers)
            lines = "".join(f"{name}:{value}\n" for name, value in headers)
            self._signed = f"\n\n{lines}\n{names}\n{EMPTY_SHA256}".split("\0")
            day = self.amz_date[:8]
            scope = endpoint.signer.scope(day)
            self._text = f"AWS4-HMAC-SHA256\n{self.amz_date}\n{scope}\n"
            self._key = endpoint.signer.key_of(credentials, day)
            headers.append(
                (
                    "authorization",
                    f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, SignedHeaders={names}, Signature=\0",
                )
            )
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in headers).split("\0")

    def make(self, key: str, first: int, nbytes: int) -> bytes:
        """Return the head of a GET of `nbytes` bytes from `first` on."""
        path = f"{self._base_path}/{quote(key, safe='/~')}"
        span = f"bytes={first}-{first + nbytes - 1}"
        lines = self._lines
        if self.credentials is None:
            return f"GET {path} HTTP/1.1\r\n{lines[0]}{span}{lines[1]}\r\n".encode()
        before, after = self._signed
        digest = hashlib.sha256(f"GET\n{path}{before}{span}{after}".encode()).hexdigest()
        signature = hmac.digest(self._key, f"{self._text}{digest}".encode(), "sha256").hex()
        return f"GET {path} HTTP/1.1\r\n{lines[0]}{span}{lines[1]}{signature}{lines[2]}\r\n".encode()


@dataclass(slots=True, eq=False)
class _RunRequest(Request):
    run: Run | None = None
    heads: GetHeads | None = None


class Batch:
    """Gets `runs` of an op, `at_once` at the same time.

    `may_start` tells which of them are for the batch; `go_on(run, attempt)` gets the others, and those whose first attempt came
    to something else.
    """

    def __init__(
        self,
        op: Op,
        runs: Iterator[Run],
        data: BucketData,
        at_once: int,
        may_start: Callable[[Run], bool],
        go_on: Callable[[Run, Attempt | None], Awaitable[None]],
    ) -> None:
        self._op = op
        self._runs = runs
        self._data = data
        self._at_once = at_once
        self._may_start = may_start
        self._go_on = go_on
        self._addresses = np.ascontiguousarray(op.plan.dst.addresses, np.int64)
        self._lengths = np.ascontiguousarray(op.plan.lengths, np.int64)
        self._place = int64(self._addresses), int64(self._lengths)
        self._heads: GetHeads | None = None
        self._sent: set[Request] = set()
        self._singles: set[asyncio.Task[None]] = set()
        self._arrived: list[tuple[int, int]] = []
        self._ended: list[tuple[Run, Attempt]] = []
        self._exhausted = False
        self._waiter: asyncio.Future[None] | None = None
        self.failed: list[tuple[int, TransferError]] = []
        """What failed: its first byte within the op, and why."""

    async def run(self) -> None:
        """Get them all; when cancelled, nothing moves any more on their account."""
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    self._settle(group)
                    if not self._exhausted and len(self._sent) + len(self._singles) < self._at_once:
                        await self._start_some(group)
                    elif self._sent or self._singles:
                        self._waiter = asyncio.get_running_loop().create_future()
                        await self._waiter
                        self._waiter = None
                    else:
                        break
            finally:
                # Those without a connection first: a connection that is given up makes room for whoever waits.
                for request in sorted(self._sent, key=lambda request: request.connection is not None):
                    assert isinstance(request, _RunRequest)
                    assert request.heads is not None
                    request.heads.endpoint.pool.abandon(request)

    # What the pool tells.

    def arrived(self, request: Request, status: int, span: tuple[int, int, int]) -> None:
        """Take note of a body that is in its place."""
        assert isinstance(request, _RunRequest)
        run = request.run
        assert run is not None
        first, last, total = span
        if status == 206 and first == run.offset and last == first + run.nbytes - 1:
            self._sent.discard(request)
            self._arrived.append((run.first, run.nbytes))
            self._rouse()
        else:
            headers = {"content-range": f"bytes {first}-{last}/{total}"} if first >= 0 else {}
            self.ended(request, Response(status, headers, sunk=True))

    def ended(self, request: Request, outcome: Response | HTTPError) -> None:
        """Take note of an attempt that came to something else."""
        assert isinstance(request, _RunRequest)
        assert request.run is not None
        assert request.heads is not None
        self._sent.discard(request)
        self._ended.append((request.run, Attempt(request.heads.endpoint, request.heads.credentials, outcome)))
        self._rouse()

    # The turns.

    def _rouse(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _settle(self, group: asyncio.TaskGroup) -> None:
        if self._arrived:
            self._data.retry.counts["requests"] += len(self._arrived)
            report = self._op.report
            self._arrived.sort()
            start, nbytes = self._arrived[0]
            # What lies together is reported together.
            for first, more in self._arrived[1:]:
                if first == start + nbytes:
                    nbytes += more
                else:
                    report(start, nbytes, None)
                    start, nbytes = first, more
            report(start, nbytes, None)
            self._arrived.clear()
        for run, attempt in self._ended:
            self._start_single(group, run, attempt)
        self._ended.clear()

    def _start_single(self, group: asyncio.TaskGroup, run: Run, attempt: Attempt | None) -> None:
        async def single() -> None:
            try:
                await self._go_on(run, attempt)
            except TransferError as error:
                self.failed.append((run.first, error))
                self._op.report(run.first, run.nbytes, error)
            else:
                self._op.report(run.first, run.nbytes, None)

        task = group.create_task(single())
        self._singles.add(task)
        task.add_done_callback(self._single_ended)

    def _single_ended(self, task: asyncio.Task[None]) -> None:
        self._singles.discard(task)
        self._rouse()

    async def _start_some(self, group: asyncio.TaskGroup) -> None:
        """Make and send requests, for as long as this iteration of the loop may work."""
        data = self._data
        try:
            credentials = await data.credentials(None)
        except TransferError:
            # Each will be told so.
            heads = None
        else:
            heads = self._heads_of(credentials)
        pool = data.endpoint.pool
        started = pool.may_work() or await pool.turn()
        made: list[Request] = []
        room = self._at_once - len(self._sent) - len(self._singles)
        addresses, lengths = self._place
        for _ in range(min(room, HEADS_AT_ONCE)):
            run = next(self._runs, None)
            if run is None:
                self._exhausted = True
                break
            if heads is None or not self._may_start(run):
                self._start_single(group, run, None)
                continue
            made.append(
                _RunRequest(
                    "GET",
                    heads.make(run.key, run.offset, run.nbytes),
                    sink_nbytes=run.nbytes,
                    place=(addresses + run.start, lengths + run.start, run.stop - run.start),
                    receiver=self,
                    run=run,
                    heads=heads,
                )
            )
            if not pool.may_go_on(started):
                break
        self._sent.update(made)
        if made and heads is not None:
            heads.endpoint.pool.submit(made)
        pool.worked(started)

    def _heads_of(self, credentials: Credentials | None) -> GetHeads:
        heads, data = self._heads, self._data
        if (
            heads is None
            or heads.endpoint is not data.endpoint
            or heads.credentials is not credentials
            or heads.amz_date != data.amz_date()
        ):
            self._heads = heads = GetHeads(data, data.endpoint, credentials)
        return heads
