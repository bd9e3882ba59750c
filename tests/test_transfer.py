from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from nixl_async.descriptors import Plan, Region, Side
from nixl_async.errors import InvalidTransition
from nixl_async.transfer import (
    TRANSITIONS,
    TransferEvent,
    TransferRecord,
    TransferState,
    mermaid,
)

FINAL = {TransferState.DONE, TransferState.FAILED, TransferState.CANCELLED}
ARROWS = [(state, event, target) for state, arrows in TRANSITIONS.items() for event, target in arrows.items()]


def record(state: TransferState = TransferState.QUEUED) -> TransferRecord:
    side = Side((Region(),), np.zeros(1, np.int64))
    plan = Plan(side, side, np.full(1, 5, np.int64), 5, (5,))
    made = TransferRecord(1, plan, [plan], ("memory",), None, False)
    made.state = state
    return made


def test_the_table_is_total() -> None:
    assert set(TRANSITIONS) == set(TransferState)
    assert {event for _, event, _ in ARROWS} == set(TransferEvent)


def test_every_state_is_reached_and_every_state_ends() -> None:
    reached, ends = {TransferState.QUEUED}, set(FINAL)
    for _ in TransferState:
        reached |= {target for state, _, target in ARROWS if state in reached}
        ends |= {state for state, _, target in ARROWS if target in ends}
    assert reached == ends == set(TransferState)


def test_final_is_final() -> None:
    assert {state for state in TransferState if state.final} == FINAL
    assert all(state not in FINAL for state, _, _ in ARROWS)


def test_bytes_may_move_only_between_admission_and_quiet() -> None:
    # What decides an outcome while ops may be in flight leads through DRAINING.
    assert [t for s, e, t in ARROWS if s is TransferState.ACTIVE and e is not TransferEvent.COMPLETE] == [
        TransferState.DRAINING
    ] * 2


@pytest.mark.parametrize(("state", "event", "target"), ARROWS)
def test_each_arrow(state: TransferState, event: TransferEvent, target: TransferState) -> None:
    moved = record(state)
    assert moved.move(event, 2.5) is target
    assert moved.state is target
    assert list(moved.history) == [(2.5, state.name, event.value, target.name)]


NO_ARROWS = [(s, e) for s, e in itertools.product(TransferState, TransferEvent) if e not in TRANSITIONS[s]]


@pytest.mark.parametrize(("state", "event"), NO_ARROWS)
def test_an_illegal_event_raises_and_changes_nothing(state: TransferState, event: TransferEvent) -> None:
    moved = record(state)
    moved.history = ((0.0, "x", "y", "z"),)
    with pytest.raises(InvalidTransition, match=f"{state.name}.*{event.value}.*'y'"):
        moved.move(event, 1.0)
    assert moved.state is state
    assert len(moved.history) == 1


def test_no_life_is_longer_than_three_moves() -> None:
    def longest(state: TransferState) -> int:
        return max((1 + longest(target) for target in TRANSITIONS[state].values()), default=0)

    assert longest(TransferState.QUEUED) == 3


def test_moves_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nixl_async.transfer"):
        record().move(TransferEvent.ADMIT, 0.0)
    assert caplog.messages == ["transfer 1: QUEUED -> ACTIVE (admit)"]


def test_the_result_counts_seconds_from_submission() -> None:
    done = record()
    done.submitted, done.started, done.finished, done.attempts = 10.0, 10.5, 12.0, 3
    assert done.result() == (5, 2.0, 0.5, 3, "memory")


def test_the_diagram_has_every_arrow() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    for state, event, target in ARROWS:
        assert f"    {state.name} --> {target.name}: {event.value}" in lines
    assert {f"    {state.name} --> [*]" for state in FINAL} <= set(lines)
