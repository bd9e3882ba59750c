from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nixl_async.http import HTTPError, Response
from nixl_async.http import retry as module
from nixl_async.http.retry import MAX_RETRY_AFTER_SECONDS, Retry


class Script:
    """Answers with one after another: statuses, responses, or errors."""

    def __init__(self, *answers: int | Response | Exception) -> None:
        self.answers = list(answers)

    async def __call__(self) -> Response:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Response(answer, {}) if isinstance(answer, int) else answer


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record what is waited for instead of waiting, at the top of the range of chance."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    def uniform(low: float, high: float) -> float:
        assert low == 0
        return high

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    monkeypatch.setattr(module.random, "uniform", uniform)
    return found


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_some_statuses_are_sent_again(waits: list[float], status: int) -> None:
    retry = Retry()
    assert (await retry.send(Script(status, status, 200))).status == 200
    assert retry.counts == {"requests": 3, "retries": 2, "failed": 0}


@pytest.mark.parametrize("status", [200, 206, 301, 400, 403, 404, 412, 501])
async def test_others_are_not(waits: list[float], status: int) -> None:
    assert (await Retry().send(Script(status))).status == status
    assert waits == []


async def test_the_caller_may_name_more(waits: list[float]) -> None:
    again: Callable[[Response], bool] = lambda response: response.status == 409  # noqa: E731
    assert (await Retry().send(Script(409, 200), again)).status == 200


async def test_the_last_answer_comes_back_when_attempts_run_out(waits: list[float]) -> None:
    retry = Retry(attempts=3)
    assert (await retry.send(Script(500, 502, 503))).status == 503
    assert retry.counts == {"requests": 3, "retries": 2, "failed": 1}


async def test_errors_are_retried_if_they_say_so(waits: list[float]) -> None:
    assert (await Retry().send(Script(HTTPError("a"), HTTPError("b"), 200))).status == 200
    with pytest.raises(HTTPError, match="c"):
        await Retry(attempts=2).send(Script(HTTPError("b"), HTTPError("c")))
    with pytest.raises(HTTPError, match="hopeless"):
        await Retry().send(Script(HTTPError("hopeless", retryable=False)))
    with pytest.raises(ZeroDivisionError):
        await Retry().send(Script(ZeroDivisionError()))


async def test_waits_grow_to_a_cap(waits: list[float]) -> None:
    await Retry(attempts=9, base_seconds=0.1, cap_seconds=2.0).send(Script(*[500] * 8, 200))
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
    ("told", "seconds"), [("3", 3.0), ("0", 0.0), ("900", MAX_RETRY_AFTER_SECONDS), ("soon", 0.0), ("-1", 0.0)]
)
async def test_the_server_may_say_how_long(waits: list[float], told: str, seconds: float) -> None:
    await Retry(base_seconds=0.1).send(Script(Response(503, {"retry-after": told}), 200))
    assert waits == pytest.approx([seconds + 0.1])


async def test_chance_spreads_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        found.add(seconds)
        await sleep(0)

    monkeypatch.setattr(module.asyncio, "sleep", recorded)
    for _ in range(20):
        await Retry(base_seconds=0.1).send(Script(503, 200))
    assert len(found) == 20
    assert all(0 <= seconds <= 0.1 for seconds in found)
