"""The proof behind a benchmark's figure: each way in which work can be missing or done twice is seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastq._db import Database
from fastq.bench import BenchError
from fastq.bench._handlers import Starts
from fastq.bench._verify import Ranges, _minus, check_completed, check_enqueued, enqueued_ranges
from fastq.task import Enqueued

_ids = st.sets(st.integers(1, 60))


class _Tables:
    """Answers the verification's queries as a database with these ids would."""

    def __init__(self, *, completed: Iterable[int] = (), waiting: Iterable[int] = (), **counts: int) -> None:
        self._completed = list(completed)
        self._waiting = list(waiting)
        self._counts = counts

    def query(self, name: str) -> list[tuple[int, ...]]:
        match name:
            case "bench_tasks":
                names = ("tasks", "ready", "claimed", "delayed", "dead", "errors", "tokens")
                return [tuple(self._counts.get(name, 0) for name in names)]
            case "bench_completed":
                return [(len(self._completed),)]
            case "bench_completed_ids":
                return [*_ranges(self._completed)]
            case "bench_waiting_ids":
                return [*_ranges(self._waiting)]
        raise AssertionError(name)


def _ranges(ids: Iterable[int]) -> Ranges:
    found: Ranges = []
    for id_ in sorted(set(ids)):
        if found and found[-1][1] == id_:
            found[-1] = (found[-1][0], id_ + 1)
        else:
            found.append((id_, id_ + 1))
    return found


def _results(*ids: int) -> list[Enqueued]:
    return [Enqueued(id_, True) for id_ in ids]


def _started(*ids: int) -> Starts:
    starts = Starts()
    starts.ids.extend(ids)
    return starts


def _check(tables: _Tables, results: list[Enqueued], starts: Starts) -> None:
    check_completed(cast("Database", tables), [results], starts)


@given(st.lists(st.integers(1, 60), unique=True))
def test_ids_in_any_order_give_the_ranges_they_make_up(ids: list[int]) -> None:
    assert enqueued_ranges([_results(*ids[:7]), _results(*ids[7:])]) == _ranges(ids)


@given(_ids, _ids)
def test_the_difference_of_ranges_is_that_of_their_ids(left: set[int], right: set[int]) -> None:
    rest = {id_ for low, high in _minus(_ranges(left), _ranges(right)) for id_ in range(low, high)}
    assert rest == left - right


def test_an_id_answered_twice_is_seen() -> None:
    with pytest.raises(BenchError, match="task 5 was answered twice"):
        enqueued_ranges([_results(4, 5), _results(5)])


def test_a_duplicate_is_seen() -> None:
    with pytest.raises(BenchError, match="duplicate"):
        enqueued_ranges([[Enqueued(7, False)]])


def test_work_done_once_passes() -> None:
    _check(_Tables(completed=[1, 2, 3, 9], tasks=4), _results(9, 1, 2, 3), _started(2, 9, 3, 1))
    _check(_Tables(), _results(), _started())


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        (_Tables(completed=[1, 2], tasks=3), r"1 of 3 enqueued tasks are not completed \(3\)"),
        (_Tables(completed=[1, 2, 3, 4], tasks=3), r"1 are that were not enqueued \(4\)"),
        (_Tables(completed=[1, 2, 3, 3], tasks=3), "completed more than once"),
        (_Tables(completed=[1, 2, 3], tasks=3, ready=1), "1 ready instead of 0"),
        (_Tables(completed=[1, 2, 3], tasks=3, claimed=1), "1 claimed instead of 0"),
        (_Tables(completed=[1, 2, 3], tasks=3, delayed=1), "1 delayed instead of 0"),
        (_Tables(completed=[1, 2, 3], tasks=3, dead=2), "2 dead instead of 0"),
        (_Tables(completed=[1, 2, 3], tasks=3, errors=1), "1 errors instead of 0"),
        (_Tables(completed=[1, 2, 3], tasks=4), "4 tasks instead of 3"),
    ],
)
def test_what_the_tables_say_wrong_is_seen(tables: _Tables, says: str) -> None:
    with pytest.raises(BenchError, match=says):
        _check(tables, _results(1, 2, 3), _started(1, 2, 3))


@pytest.mark.parametrize(
    ("starts", "says"),
    [
        ((1, 2), "3 tasks completed, but handlers started 2 times"),
        ((1, 2, 3, 3), "handlers started 4 times"),
        ((1, 3, 3), "task 3 twice"),
        ((1, 2, 4), "task 4 twice, or it was never enqueued"),
    ],
)
def test_what_the_handlers_say_wrong_is_seen(starts: tuple[int, ...], says: str) -> None:
    with pytest.raises(BenchError, match=says):
        _check(_Tables(completed=[1, 2, 3], tasks=3), _results(1, 2, 3), _started(*starts))


def test_a_task_that_never_started_is_seen_beside_a_strange_one_between_the_others() -> None:
    with pytest.raises(BenchError, match="task 3 completed, but its handler never started"):
        _check(_Tables(completed=[1, 3], tasks=2), _results(1, 3), _started(1, 2))


def test_enqueued_tasks_must_all_wait_with_their_tokens() -> None:
    check_enqueued(cast("Database", _Tables(waiting=[4, 5], tasks=2, ready=2)), [_results(4, 5)])
    check_enqueued(cast("Database", _Tables(waiting=[4, 5], tasks=2, ready=2, tokens=2)), [_results(4, 5)], tokens=True)
    with pytest.raises(BenchError, match="0 tokens instead of 2"):
        check_enqueued(cast("Database", _Tables(waiting=[4, 5], tasks=2, ready=2)), [_results(4, 5)], tokens=True)
    with pytest.raises(BenchError, match=r"1 of 2 enqueued tasks are not waiting \(5\)"):
        check_enqueued(cast("Database", _Tables(waiting=[4, 6], tasks=2, ready=2)), [_results(4, 5)])
