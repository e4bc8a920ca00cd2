"""A task that kills its process each time it runs, among 500 innocents: it runs out of attempts, and nobody pays for it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Final

import pytest

from tests.support.faults.load import check_charges
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.trials import Trial, Trials
from tests.support.waiting import wait_until

_INNOCENTS: Final = 500
_ENDED: Final = (
    "SELECT (SELECT count(*) FROM dead) + (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM done, unnest(ids) r)"
)


@pytest.mark.parametrize("how", ["signal", "exit", "segfault"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("max_attempts", [1, 2, 3])
@pytest.mark.faults
def test_a_task_that_kills_its_process_fails_and_the_innocent_complete(
    trials: Trials, how: str, workers: int, max_attempts: int
) -> None:
    what = f"killer by {how}, max_attempts {max_attempts}, {workers} at work: starts"
    body = partial(_poison, how=how, workers=workers, max_attempts=max_attempts)
    trials.run(what, body, unit="starts", share=4)


def test_a_task_that_kills_its_process_fails_soon(trials: Trials) -> None:
    trials.run("killer, in short: starts", partial(_poison, how="signal", workers=1, max_attempts=2), unit="starts")


def _poison(trial: Trial, *, how: str, workers: int, max_attempts: int) -> float:
    lab = trial.lab
    before = trial.rnd.randrange(_INNOCENTS)
    payloads: list[dict[str, str] | None] = [None] * _INNOCENTS
    payloads.insert(before, {"kill": how})
    ids = lab.enqueue(*payloads, max_attempts=max_attempts)
    killer, innocents = ids[before], {*ids[:before], *ids[before + 1 :]}
    _work(trial, workers, killer, max_attempts)

    starts = Counter(lab.journal.started())
    assert starts[killer] <= max_attempts + 1
    assert lab.all("SELECT id, state, attempts FROM dead") == [(killer, "failed", max_attempts)]
    attempts = lab.completions()
    assert attempts.keys() == innocents
    losses = check_charges(lab)
    assert losses.pop(killer) == max_attempts
    assert {id_: count - 1 for id_, count in attempts.items() if count > 1} == losses
    assert lab.value("SELECT count(*) FROM attempt_error") == max_attempts + losses.total()
    # Nor does any of them start more often than what was lost explains: a start on track 0 and one on track 2 may leave no trace.
    assert all(starts[id_] <= losses[id_] + 3 for id_ in innocents)
    return float(starts[killer])


def _work(trial: Trial, workers: int, killer: int, max_attempts: int) -> None:
    """Keeps so many workers at work, each started again as soon as it dies, until all has ended."""
    lab = trial.lab
    at_work: list[WorkerProcess] = []

    def has_ended() -> bool:
        return bool(lab.value(_ENDED) == _INNOCENTS + 1)

    while not has_ended():
        assert lab.journal.started().count(killer) <= max_attempts + 1, "it starts again and again"
        at_work = [worker for worker in at_work if not worker.is_dead]
        # In turn with sync and async handlers.
        is_async = trial.number % 2 == 1
        at_work += [lab.worker(is_async=is_async) for _ in range(workers - len(at_work))]
        now = list(at_work)
        wait_until(
            lambda now=now: any(worker.is_dead for worker in now) or has_ended(),  # type: ignore[misc]
            timeout=6 * trial.pace.dead_after + 20,
            message="the end of a worker, or of all tasks",
        )
