"""When to send a request again, and how long to wait before: exponential back-off with full jitter."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from nixl_async.http.messages import HTTPError, Response

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
MAX_RETRY_AFTER_SECONDS = 30.0


@dataclass(slots=True)
class Retry:
    """Sends a request up to `attempts` times; waits 0 to `base_seconds` · 2ⁿ in between, `cap_seconds` at most.

    `counts` are the requests sent, those sent again, and those that failed for good.
    """

    attempts: int = 5
    base_seconds: float = 0.1
    cap_seconds: float = 5.0
    counts: dict[str, int] = field(default_factory=lambda: {"requests": 0, "retries": 0, "failed": 0})

    async def send(
        self, send: Callable[[], Awaitable[Response]], again: Callable[[Response], bool] = lambda response: False
    ) -> Response:
        """Call `send` until it returns a response that is not to be retried, or attempts run out; return the last one.

        `again` names responses beyond the usual ones (408, 429, 5xx) that are worth another attempt.

        Raises:
            HTTPError: the last attempt got no response.
        """
        for attempt in range(1, self.attempts + 1):
            self.counts["requests"] += 1
            wait = 0.0
            try:
                response = await send()
            except HTTPError as error:
                if not error.retryable or attempt == self.attempts:
                    self.counts["failed"] += 1
                    raise
            else:
                if response.status not in RETRYABLE and not again(response):
                    return response
                if attempt == self.attempts:
                    self.counts["failed"] += 1
                    return response
                wait = _retry_after(response)
            self.counts["retries"] += 1
            # Whoever was told the same number of seconds does not come back at the same moment.
            await asyncio.sleep(wait + random.uniform(0, min(self.cap_seconds, self.base_seconds * 2 ** (attempt - 1))))
        raise AssertionError("attempts is less than one")


def _retry_after(response: Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), MAX_RETRY_AFTER_SECONDS) if value.isdecimal() else 0.0
