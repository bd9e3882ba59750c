"""What this agent has asked peers on their control connections, and the answers that it waits for."""

from __future__ import annotations

import asyncio

from nixl_async.link import Link
from nixl_async.wire import FrameType, encode_json


class Questions:
    """Questions that are not answered yet, by link and number.

    An answer is "", or why what was asked for failed; it is `None` when the link ends first.
    """

    def __init__(self) -> None:
        self._answers: dict[tuple[Link, int], asyncio.Future[str | None]] = {}
        self._last = 0

    def number(self) -> int:
        """Return a number that no question has had."""
        self._last += 1
        return self._last

    def expect(self, link: Link, number: int) -> asyncio.Future[str | None]:
        """Return the answer to a question that goes out on a link otherwise than by `ask`."""
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._answers[link, number] = future
        return future

    def ask(self, link: Link, kind: FrameType, **fields: str | int) -> asyncio.Future[str | None]:
        """Send a question; return its answer."""
        number = self.number()
        future = self.expect(link, number)
        link.send(encode_json(kind, {"id": number, **fields}))
        if link.closed:
            self.answer(link, number, None)
        return future

    def answer(self, link: Link, number: int, answer: str | None = "") -> None:
        """Take the answer to a question; one that nobody waits for is ignored."""
        future = self._answers.pop((link, number), None)
        if future is not None and not future.done():
            future.set_result(answer)

    def end(self, link: Link) -> None:
        """Take note that nothing is answered on a link any more."""
        for key in [key for key in self._answers if key[0] is link]:
            self.answer(*key, None)
