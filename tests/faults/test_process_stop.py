"""SIGSTOP of a worker for longer than it takes to be declared dead, then SIGCONT: it is a stranger to what it held."""

from __future__ import annotations

import time
from functools import partial

import pytest

from tests.support.faults.load import check_charges
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.scene import pass_time
from tests.support.faults.trials import Trial, Trials
from tests.support.waiting import wait_until

kinds = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def _name(is_async: bool) -> str:
    return "async" if is_async else "sync"


@kinds
def test_a_worker_that_is_stopped_amid_load_starts_nothing_it_lost(trials: Trials, is_async: bool) -> None:
    trials.run(
        f"SIGSTOP amid load, {_name(is_async)} handlers: late results refused",
        partial(_amid_load, is_async=is_async),
        unit="refused",
    )


@kinds
def test_a_worker_that_is_stopped_between_two_starts_of_a_batch_starts_no_more_of_it(
    trials: Trials, is_async: bool
) -> None:
    trials.run(f"SIGSTOP within a batch, {_name(is_async)} handlers", partial(_within_a_batch, is_async=is_async))


def _amid_load(trial: Trial, *, is_async: bool) -> float:
    lab = trial.lab
    # A thread that calls a handler keeps the interpreter until the handler has written that down: at most one is in between.
    stopped = lab.worker(is_async=is_async, switch_interval=10.0)
    before = lab.consumer_id(pid=stopped.pid)
    lab.enqueue(*["quiet"] * 2_000)
    lab.wait_for(completed=2_000)
    # Some that surely run when it is stopped, and thousands of short ones.
    gate = lab.gate()
    running = lab.enqueue(*[gate.orders] * 5)
    wait_until(lambda: set(lab.journal.started()) == set(running))
    ids = [*running, *lab.enqueue(*[{"seconds": trial.rnd.choice((0.001, 0.01, 0.05))} for _ in range(3_000)])]
    some = trial.rnd.randrange(200, 600)
    wait_until(lambda: len(lab.journal.entries("end")) >= some)
    frozen_at = stopped.freeze()
    gate.open()
    held = lab.claimed(before)
    assert held >= set(running)
    _let_another_do_it(trial, frozen_at, is_async=is_async, done=2_000 + len(ids))
    thawed_at = _go_on(trial, stopped, before)
    # Its handlers that ran have ended since, and nobody asked for it.
    late = {entry.id for entry in lab.journal.entries("end", pid=stopped.pid, after=frozen_at)}
    assert late >= set(running)
    starts = lab.journal.started(pid=stopped.pid, after=thawed_at)
    # No check can be one with the handler's first line: one that was being called as the process was stopped writes its line later.
    lost = set(ids) & set(starts)
    assert len(lost) <= 1, "it started what it had lost"
    assert lab.completions().keys() >= set(ids)
    check_charges(lab)
    refused = stopped.stats["refused"]
    assert refused >= len(late & held)
    assert "results were refused: the tasks are no longer ours" in stopped.log
    return refused


def _within_a_batch(trial: Trial, *, is_async: bool) -> None:
    """The first task of a batch stops the process: what comes behind it is a function call away from its start."""
    lab = trial.lab
    stopped = lab.worker(is_async=is_async, types={"t": None if is_async else 1})
    before = lab.consumer_id(pid=stopped.pid)
    lab.enqueue(*["quiet"] * 2_000)
    lab.wait_for(completed=2_000)
    flag = lab.journal.path.with_name("stopped")
    [first, *rest] = lab.enqueue({"stop_once": str(flag)}, *[None] * 255)
    frozen_at = stopped.wait_until_frozen()
    held = lab.claimed(before)
    assert first in held
    assert set(lab.journal.started()) == {first}
    _let_another_do_it(trial, frozen_at, is_async=is_async, done=2_256)
    thawed_at = _go_on(trial, stopped, before)
    starts = lab.journal.started(pid=stopped.pid, after=thawed_at)
    assert not {first, *rest} & set(starts), "it started what it had lost"
    # The one that ran when it was stopped has ended since.
    assert stopped.stats["refused"] == 1
    assert f"1 results were refused: the tasks are no longer ours (ids {first})" in stopped.log
    assert lab.completions().keys() >= {first, *rest}
    check_charges(lab)


def _let_another_do_it(trial: Trial, frozen_at: float, *, is_async: bool, done: int) -> None:
    """Another worker takes over all of it and ends it; the stopped one stands still for its time."""
    lab = trial.lab
    other = lab.worker(is_async=is_async)
    lab.wait_for(completed=done, within=60)
    pass_time(max(0.0, frozen_at + trial.pace.stop - time.monotonic()))
    other.terminate()
    assert other.wait() == 0


def _go_on(trial: Trial, stopped: WorkerProcess, before: int) -> float:
    """It goes on, finds out, registers anew, and works on what comes then. Ends it in order. Gives when it went on."""
    lab = trial.lab
    thawed_at = stopped.thaw()
    lab.consumer_id(pid=stopped.pid, other_than=[before])
    wait_until(lambda: "was declared dead" in stopped.log)
    new = lab.enqueue(count=20)
    wait_until(lambda: lab.completions().keys() >= set(new), timeout=20, message="tasks that came afterwards")
    stopped.terminate()
    assert stopped.wait() == 0
    assert set(lab.journal.started(pid=stopped.pid, after=thawed_at)) >= set(new)
    return thawed_at
