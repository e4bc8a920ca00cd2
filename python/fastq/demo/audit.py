"""What became of each line: the file against the tables against what the handlers wrote down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from fastq.demo.load import Planned
from fastq.demo.runlog import Run, State
from fastq.demo.tables import Found


@dataclass(slots=True)
class TypeReport:
    """What became of the lines of one type."""

    lines: int = 0
    completed: int = 0
    """Completed in the tables, as they should, and a run on record that returned what it had to find."""
    failed: int = 0
    """Failed for good, as they should."""
    lost: int = 0
    """With no task in the tables, one that has not ended, or one that is completed though no run on record returned."""
    wrong: int = 0
    """Any other way in which a line did not become what it should."""
    runs: int = 0
    """On record."""
    retries: int = 0
    """Runs after one that raised."""
    reruns: int = 0
    """Runs after one that did not raise: its worker was killed during it, or before its outcome was in the tables."""


@dataclass(slots=True)
class KillReport:
    """The worker that was killed, and what became of the tasks it had claimed."""

    killed_at: float
    """Seconds since the epoch."""
    held: int
    """Tasks that it held, by the tables, after its death."""
    cut_off: int = 0
    """Of these, runs on record that never ended."""
    untold: int = 0
    """Of these, tasks whose handler had returned, but the worker could not tell the database any more."""
    ahead: int = 0
    """Of these, the others: claimed ahead, and not started."""
    run_again: int = 0
    """Of these, tasks with a run after its death."""
    within: float | None = None
    """Seconds from its death until the last of them had started again; None: none did."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Ended runs a second, from what the handlers wrote down; None where there was nothing to measure."""

    both: float | None
    """Both workers, from the first run to the kill."""
    one: float | None
    """The other worker alone, from the kill until what was waiting then had run."""


@dataclass(slots=True)
class Audit:
    """The whole comparison."""

    types: dict[str, TypeReport]
    kill: KillReport
    rates: Rates
    problems: dict[str, list[int]] = field(default_factory=dict)
    """What is not as it should be → the lines."""

    @property
    def lost(self) -> int:
        """Lines lost."""
        return sum(report.lost for report in self.types.values())

    @property
    def is_well(self) -> bool:
        """Whether each line became what it should."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Kill:
    """The death of a worker."""

    pid: int
    consumer: int
    """Its id in the database."""
    killed_at: float
    held: AbstractSet[int]
    """Ids of all tasks that it was seen to hold, by the tables, after its death."""


def audit(plan: Sequence[Planned], found: Sequence[Found], runs: Mapping[int, Sequence[Run]], kill: Kill) -> Audit:
    """Compare.

    Args:
        plan: what should become of each line, from the file.
        found: the tasks in the tables.
        runs: what the handlers wrote down, by their worker's process id.
        kill: the worker that was killed.
    """
    tasks = _by_line(found)
    on_record = _by_line(run for of_one in runs.values() for run in of_one)
    # What it had sent before its death may have come in after it: what it completed so, it does not hold.
    held = {task.line for task in found if task.id in kill.held and task.consumer != kill.consumer}
    types: defaultdict[str, TypeReport] = defaultdict(TypeReport)
    problems: defaultdict[str, list[int]] = defaultdict(list)
    for line, planned in enumerate(plan, 1):
        own_tasks, own_runs = tasks.pop(line, []), on_record.get(line, [])
        report = types[planned.type]
        report.lines += 1
        _count_runs(report, own_runs)
        if problem := _find_loss(planned, own_tasks, own_runs):
            report.lost += 1
        elif problem := _find_fault(planned, own_tasks, own_runs, was_held=line in held):
            report.wrong += 1
        elif planned.completes:
            report.completed += 1
        else:
            report.failed += 1
        if problem:
            problems[problem].append(line)
    if tasks:
        problems["there is a task for a line that the file does not have"] += tasks
    return Audit(
        dict(types), _examine_kill(kill, held, runs, on_record), _measure(plan, held, runs, kill), dict(problems)
    )


L = TypeVar("L", Found, Run)


def _by_line(things: Iterable[L]) -> dict[int, list[L]]:
    lines: defaultdict[int, list[L]] = defaultdict(list)
    for thing in things:
        lines[thing.line].append(thing)
    return lines


def _count_runs(report: TypeReport, runs: Sequence[Run]) -> None:
    report.runs += len(runs)
    for run in sorted(runs, key=attrgetter("started_at"))[:-1]:
        if run.state == State.RAISED:
            report.retries += 1
        else:
            report.reruns += 1


def _find_loss(planned: Planned, tasks: Sequence[Found], runs: Sequence[Run]) -> str | None:
    if not tasks:
        return "there is no task in the tables"
    state = tasks[0].state
    if state not in ("completed", "failed"):
        return f"it has not ended: it is {state}"
    if state == "completed" and not any(run.state == State.RETURNED for run in runs):
        return "it is completed, but no handler wrote down that it had done the work"
    if state == "failed" and planned.completes:
        return "it failed for good, and should have completed"
    return None


def _find_fault(planned: Planned, tasks: Sequence[Found], runs: Sequence[Run], *, was_held: bool) -> str | None:
    returned = [run for run in runs if run.state == State.RETURNED]
    # Of what the killed worker held, one run may have come on top; or, charged to the task, have been cut off before its record.
    spare = 1 if was_held else 0
    faults = (
        (len(tasks) > 1, "there are several tasks in the tables"),
        (tasks[0].type != planned.type, "its task is of another type"),
        (tasks[0].state == "completed" and not planned.completes, "it completed, and should have failed for good"),
        (tasks[0].state == "failed" and returned, "it failed for good, but a run on record returned"),
        (any(run.result != planned.result for run in returned), "a run found something else than it should"),
        (len(runs) > planned.runs + spare, "it ran more often than it should, and the kill does not explain it"),
        (len(runs) < planned.runs - spare, "it ran less often than it should"),
    )
    return next((what for is_so, what in faults if is_so), None)


def _examine_kill(
    kill: Kill, held: AbstractSet[int], runs: Mapping[int, Sequence[Run]], on_record: Mapping[int, Sequence[Run]]
) -> KillReport:
    report = KillReport(kill.killed_at, len(held))
    own: defaultdict[int, list[Run]] = defaultdict(list)
    for run in runs.get(kill.pid, ()):
        own[run.line].append(run)
    last = None
    for line in held:
        states = {run.state for run in own.get(line, ())}
        if State.STARTED in states:
            report.cut_off += 1
        elif State.RETURNED in states:
            report.untold += 1
        else:
            report.ahead += 1
        after = [run.started_at for run in on_record.get(line, ()) if run.started_at > kill.killed_at]
        if after:
            report.run_again += 1
            last = max(min(after), last or 0)
    report.within = None if last is None else last - kill.killed_at
    return report


def _measure(plan: Sequence[Planned], held: AbstractSet[int], runs: Mapping[int, Sequence[Run]], kill: Kill) -> Rates:
    every = [run for of_one in runs.values() for run in of_one if run.state != State.STARTED]
    if not every:
        return Rates(None, None)
    started_at = min(run.started_at for run in every)
    before = sum(run.ended_at <= kill.killed_at for run in every)
    # Neither what the dead worker held nor what waits for its next attempt was there to be run at once.
    after = [
        run.ended_at
        for run in every
        if run.ended_at > kill.killed_at
        and run.line not in held
        and 1 <= run.line <= len(plan)
        and plan[run.line - 1].runs == 1
    ]
    return Rates(
        before / (kill.killed_at - started_at) if before else None,
        len(after) / (max(after) - kill.killed_at) if after else None,
    )


__all__ = ["Audit", "Kill", "KillReport", "Rates", "TypeReport", "audit"]
