"""The demo's judgement: it must see each way in which a task can be lost, doubled or run in vain."""

from __future__ import annotations

import pytest

from fastq.demo.audit import Audit, Kill, audit
from fastq.demo.load import Planned
from fastq.demo.runlog import Run, State
from fastq.demo.tables import Found

VICTIM, SURVIVOR = 100, 200  # process ids
VICTIM_ID, SURVIVOR_ID = 1, 2  # in the database
KILLED_AT = 50.0

RETURNS = Planned("mail", completes=True, runs=1, result=7)
RETRIED = Planned("mail", completes=True, runs=2, result=7)
FAILS = Planned("mail", completes=False, runs=2, result=7)


def found(state: str = "completed", *, line: int = 1, id: int = 1, type: str = "mail", by: int = SURVIVOR_ID) -> Found:  # noqa: A002
    return Found(line, id, type, state, by if state == "completed" else None)


def run(state: State = State.RETURNED, *, line: int = 1, at: float = 10.0, result: int = 7) -> Run:
    return Run(result if state == State.RETURNED else 0, 0 if state == State.STARTED else at + 0.5, at, line, state)


def judge(
    planned: Planned,
    tasks: list[Found],
    survivor: list[Run],
    *,
    victim: list[Run] | None = None,
    held: frozenset[int] = frozenset(),
) -> Audit:
    return audit([planned], tasks, {VICTIM: victim or [], SURVIVOR: survivor}, Kill(VICTIM, VICTIM_ID, KILLED_AT, held))


def test_a_task_that_ran_once_is_well() -> None:
    result = judge(RETURNS, [found()], [run()])
    assert result.is_well
    report = result.types["mail"]
    assert (report.lines, report.completed, report.runs, report.retries, report.reruns) == (1, 1, 1, 0, 0)


def test_retries_are_told_from_reruns() -> None:
    result = judge(RETRIED, [found()], [run(State.RAISED), run(at=20)])
    assert result.is_well
    assert (result.types["mail"].retries, result.types["mail"].reruns) == (1, 0)


def test_a_failure_that_was_planned_is_well() -> None:
    result = judge(FAILS, [found("failed")], [run(State.RAISED), run(State.RAISED, at=20)])
    assert result.is_well
    assert (result.types["mail"].completed, result.types["mail"].failed) == (0, 1)


@pytest.mark.parametrize(
    ("planned", "tasks", "runs", "what"),
    [
        (RETURNS, [], [], "no task"),
        (RETURNS, [], [run()], "no task"),
        (RETURNS, [found("waiting")], [], "it is waiting"),
        (RETURNS, [found("running")], [run(State.STARTED)], "it is running"),
        (RETURNS, [found()], [], "no handler wrote down"),
        (RETURNS, [found()], [run(State.STARTED)], "no handler wrote down"),
        (RETURNS, [found()], [run(State.RAISED)], "no handler wrote down"),
        (RETURNS, [found("failed")], [run(State.RAISED)], "should have completed"),
    ],
)
def test_what_counts_as_lost(planned: Planned, tasks: list[Found], runs: list[Run], what: str) -> None:
    result = judge(planned, tasks, runs)
    assert not result.is_well
    assert result.lost == 1
    [(problem, lines)] = result.problems.items()
    assert what in problem
    assert lines == [1]


@pytest.mark.parametrize(
    ("planned", "tasks", "runs", "what"),
    [
        (RETURNS, [found(), found(id=2)], [run(), run()], "several tasks"),
        (RETURNS, [found(type="other")], [run()], "another type"),
        (FAILS, [found()], [run(State.RAISED), run()], "should have failed"),
        (FAILS, [found("failed")], [run(State.RAISED), run()], "a run on record returned"),
        (RETURNS, [found()], [run(result=8)], "something else"),
        (RETURNS, [found()], [run(), run()], "more often"),
        (RETRIED, [found()], [run()], "less often"),
        (FAILS, [found("failed")], [run(State.RAISED)], "less often"),
    ],
)
def test_what_is_otherwise_wrong(planned: Planned, tasks: list[Found], runs: list[Run], what: str) -> None:
    result = judge(planned, tasks, runs)
    assert not result.is_well
    assert (result.lost, result.types["mail"].wrong) == (0, 1)
    [problem] = result.problems
    assert what in problem


def test_a_task_of_no_line_is_seen() -> None:
    result = judge(RETURNS, [found(), found(line=2, id=2)], [run()])
    assert not result.is_well
    assert list(result.problems.values()) == [[2]]


def test_the_kill_explains_one_run_more_and_no_two() -> None:
    cut_off = [run(State.STARTED)]
    once = judge(RETURNS, [found()], [run(at=60)], victim=cut_off, held=frozenset({1}))
    assert once.is_well
    assert once.types["mail"].reruns == 1
    twice = judge(RETURNS, [found()], [run(at=60), run(at=70)], victim=cut_off, held=frozenset({1}))
    assert not twice.is_well
    not_held = judge(RETURNS, [found()], [run(at=60)], victim=cut_off)
    assert not not_held.is_well


def test_what_the_killed_worker_held() -> None:
    plan = [RETURNS] * 5
    tasks = [found(line=line, id=line) for line in range(1, 5)] + [found(line=5, id=5, by=VICTIM_ID)]
    victim = [run(State.STARTED, line=1), run(line=2), run(line=5)]
    survivor = [run(line=1, at=61), run(line=2, at=62), run(line=3, at=63), run(line=4, at=64)]
    result = audit(
        plan, tasks, {VICTIM: victim, SURVIVOR: survivor}, Kill(VICTIM, VICTIM_ID, KILLED_AT, frozenset(range(1, 6)))
    )
    assert result.is_well
    kill = result.kill
    # Line 5 was completed by what the worker had sent before its death.
    assert (kill.held, kill.cut_off, kill.untold, kill.ahead, kill.run_again) == (4, 1, 1, 2, 4)
    assert kill.within == pytest.approx(14)


def test_rates_are_those_of_ended_runs() -> None:
    plan = [RETURNS] * 4
    tasks = [found(line=line, id=line) for line in range(1, 5)]
    runs = {
        VICTIM: [run(line=1, at=40), run(line=2, at=45)],
        SURVIVOR: [run(line=3, at=51.5), run(line=4, at=53.5)],
    }
    rates = audit(plan, tasks, runs, Kill(VICTIM, VICTIM_ID, KILLED_AT, frozenset())).rates
    assert rates.both == pytest.approx(2 / 10)
    assert rates.one == pytest.approx(2 / 4)
