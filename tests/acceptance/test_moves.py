"""Each action in each place, with nobody else about, and against each other action in flight, both ways round."""

from __future__ import annotations

import pytest

from tests.acceptance.stage import Case, Stage
from tests.acceptance.table import (
    ACTIONS,
    CLIENT_ACTIONS,
    PLACES,
    SHOWN,
    SKIPPERS,
    TABLE,
    Action,
    Place,
    after,
    changes,
    told,
)
from tests.support.producing import Background
from tests.support.waiting import wait_until


def check(case: Case, place: Place) -> None:
    """The task is there, in no other place, and its neighbours are as they were or moved with it."""
    assert case.shown() == SHOWN.get(place)


def test_the_table_is_whole() -> None:
    for place, moves in TABLE.items():
        assert set(moves) == set(ACTIONS), place


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_idle(stage: Stage, place: Place, action: Action) -> None:
    case = stage.case(place)
    case.prepare(action)
    assert case.do(action) == told(place, action)
    check(case, after(place, action))
    if action == "edit payload" and changes(place, action):
        assert case.payload() == {"n": 2}


_RACES = [
    (place, first, second) for place in PLACES for first in ACTIONS for second in ACTIONS if changes(place, first)
]
_CLIENTS_RACES = [pair for pair in _RACES if set(pair) & set(CLIENT_ACTIONS)]


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize(("place", "first", "second"), _CLIENTS_RACES)
def test_racing_a_client(stage: Stage, place: Place, first: Action, second: Action, *, commit: bool) -> None:
    race(stage, place, first, second, commit=commit)


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize(("place", "first", "second"), [pair for pair in _RACES if pair not in _CLIENTS_RACES])
@pytest.mark.parametrize("stage", ["sync"], indirect=True)  # no client takes part: one kind says it for all
def test_racing_among_workers(stage: Stage, place: Place, first: Action, second: Action, *, commit: bool) -> None:
    race(stage, place, first, second, commit=commit)


def race(stage: Stage, place: Place, first: Action, second: Action, *, commit: bool) -> None:
    """The first has done its statement and not committed. The second waits for its lock, or comes wholly before it, or passes by."""
    case = stage.case(place)
    for action in {first, second}:
        case.prepare(action)
    pid = case.pid_of(second, stage.second)
    try:
        assert case.do_within(first) == "done"
        late = Background(lambda: case.do(second, stage.second))
        blocked = "SELECT cardinality(pg_blocking_pids($1::integer)) > 0"
        wait_until(lambda: late.is_done or stage.observer.value(blocked, pid), message=f"{second} to wait, or to end")
        waited = not late.is_done
    finally:
        case.end(first, commit=commit)
    answer = late.result()
    found: Place = after(place, first) if commit else place
    if waited:
        assert answer == told(found, second)
        check(case, after(found, second))
        return
    if second in SKIPPERS:
        assert answer == "passed"
    else:
        assert not changes(place, second), f"{second} did not wait for {first}"
        assert answer == told(place, second)
    check(case, found)
