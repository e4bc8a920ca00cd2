"""A task that its handler completes in a transaction: in each place that it may have come to meanwhile, however both end, and against
each action in flight, both ways round; with real consumers, sync and async."""

from __future__ import annotations

from typing import Final, Literal, get_args

import psycopg
import pytest

from tests.acceptance.handlers import Handled, handled
from tests.acceptance.stage import Stage
from tests.acceptance.table import (
    CLIENT_ACTIONS,
    ENDS,
    SHOWN,
    SKIPPERS,
    WAYS,
    Action,
    HandlerEnd,
    Place,
    TransactionEnd,
    after,
    changes,
    told,
)
from tests.support.producing import Background
from tests.support.waiting import wait_until

_COMPLETE: Final[Action] = "complete in a transaction"
#: What others do to a task that a handler runs.
_OTHERS: Final[tuple[Action, ...]] = (*CLIENT_ACTIONS, *SKIPPERS)
#: By place: attempts and the last error, of what the run that held the task has come to.
_LEFT: Final[dict[tuple[Place, HandlerEnd], tuple[int, str | None]]] = {
    ("completed", "returns"): (1, None),
    ("completed", "raises"): (1, None),
    ("completed", "snoozes"): (1, None),
    ("retrying", "returns"): (1, "CompletionError"),
    ("retrying", "raises"): (1, "ValueError"),
    ("scheduled", "snoozes"): (0, None),
}


def check(case: Handled, place: Place) -> None:
    """The task is there, in no other place."""
    assert case.shown() == SHOWN.get(place)


def check_left(case: Handled, place: Place, ends: HandlerEnd) -> None:
    """And its run has left what it should."""
    check(case, place)
    record = case.stage.looker.get_task(case.id)
    errors = [error.error.partition(":")[0] for error in record.errors or ()]
    attempts, error = _LEFT[place, ends]
    assert (record.attempts, errors) == (attempts, [] if error is None else [error])


def wait_for(case: Handled, late: Background[str], holder: int) -> bool:
    """Until a call waits for what this server process holds, or has its answer. Whether it waits."""
    query = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE $1::integer = ANY (pg_blocking_pids(pid)))"
    wait_until(lambda: late.is_done or case.stage.observer.value(query, holder), message="a call to wait, or to end")
    return not late.is_done


def test_the_table_of_ends_is_whole() -> None:
    ends = {(end, ends) for end in get_args(TransactionEnd) for ends in get_args(HandlerEnd)}
    assert set(ENDS) == ends
    assert set(_LEFT) == {(place, ends) for (_, ends), place in ENDS.items()}
    assert {place for place, _ in WAYS} == {*SHOWN, "gone"}


@pytest.mark.parametrize("first", ["transaction", "handler"])
@pytest.mark.parametrize(("end", "ends"), list(ENDS))
def test_idle(stage: Stage, end: TransactionEnd, ends: HandlerEnd, first: Literal["transaction", "handler"]) -> None:
    place = ENDS[end, ends]
    with handled(stage) as case:
        assert case.complete() == told("running", _COMPLETE)
        assert case.effects() == 0
        if first == "transaction":
            case.end_transaction(end)
            check(case, after("running", _COMPLETE) if end == "committed" else "running")
            case.run.end(ends)
        else:
            case.run.end(ends)
            case.wait_until_handlers_ended(len(case.ids) - 1)
            check(case, "running")
            case.end_transaction(end)
        case.close()
        check_left(case, place, ends)
        assert case.effects() == (end == "committed")


@pytest.mark.parametrize(
    ("has_own_claim", "end", "ends"),
    [(False, "rolled back", "raises"), (True, "committed", "returns")],
    ids=["found out by the engine", "found out by the statement"],
)
@pytest.mark.parametrize(("place", "way"), WAYS[1:], ids=[", ".join(way) for _, way in WAYS[1:]])
def test_idle_of_a_run_that_has_lost_its_task(
    stage: Stage, place: Place, way: tuple[Action, ...], end: TransactionEnd, ends: HandlerEnd, *, has_own_claim: bool
) -> None:
    """Refused, whatever the handler makes of that: even if it commits, nothing of the task does."""
    with handled(stage) as case:
        if has_own_claim:
            case.run.do("part")
        for action in way:
            case.prepare(action)
            assert case.do(action) == "done"
        check(case, place)
        assert case.complete() == "refused"
        assert case.run.task.is_cancelled()
        case.end_transaction(end)
        case.run.end(ends)
        case.close()
        check(case, place)
        assert case.effects() == (end == "committed")


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("has_own_claim", [False, True], ids=["the engine waits", "the statement waits"])
@pytest.mark.parametrize("first", [action for action in _OTHERS if changes("running", action)])
def test_racing_what_others_have_begun(stage: Stage, first: Action, *, has_own_claim: bool, commit: bool) -> None:
    """The other has done its statement and not committed: the handler's call waits for that."""
    with handled(stage) as case:
        if has_own_claim:
            case.run.do("part")
        case.prepare(first)
        try:
            assert case.do_within(first) == "done"
            late = Background(case.complete)
            assert wait_for(case, late, case.pid_within(first)), f"the handler did not wait for the {first}"
        finally:
            case.end(first, commit=commit)
        answer = late.result()
        found: Place = after("running", first) if commit else "running"
        assert answer == told(found, _COMPLETE)
        done = answer == "done"
        case.end_transaction("committed" if done else "rolled back")
        check(case, after(found, _COMPLETE))
        case.close()
        check(case, after(found, _COMPLETE))
        assert case.effects() == done


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("held", ["transaction", "commit"])
@pytest.mark.parametrize("second", _OTHERS)
def test_racing_what_the_handler_has_begun(
    stage: Stage, second: Action, held: Literal["transaction", "commit"], *, commit: bool
) -> None:
    """The handler's transaction is open, or its COMMIT is under way. The other waits for its end, or passes by, or is refused at once."""
    with handled(stage) as case:
        case.prepare(second)
        assert case.complete() == "done"
        committing = None
        try:
            if held == "commit":
                case.hold_commit(stage.second, may=commit)
                committing = case.run.start("commit")
                blocked = "SELECT cardinality(pg_blocking_pids($1::integer)) > 0"
                wait_until(lambda: stage.observer.value(blocked, case.run.pid), message="the COMMIT to wait")
            late = Background(lambda: case.do(second, stage.first))
            waited = wait_for(case, late, case.run.pid)
        finally:
            if committing is not None:
                case.release_commit(stage.second)
        if committing is None:
            case.end_transaction("committed" if commit else "rolled back")
        elif commit:
            committing.result(30)
        else:
            with pytest.raises(psycopg.errors.RaiseException):
                committing.result(30)
            case.end_transaction("rolled back")
        answer = late.result()
        found: Place = "completed" if commit else "running"
        if waited:
            assert answer == told(found, second)
            found = after(found, second)
        elif second in SKIPPERS:
            assert answer == "passed"
        else:
            assert not changes("running", second), f"{second} did not wait for the handler's transaction"
            assert answer == told("running", second)
        check(case, found)
        case.close()
        check(case, ENDS["rolled back", "returns"] if found == "running" else found)
        assert case.effects() == commit
