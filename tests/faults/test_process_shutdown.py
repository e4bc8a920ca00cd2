"""Workers that are told to end amid everything: once, twice, and killed while they do. Nothing is lost, and nothing is charged that did
not start."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any, Final

import pytest

from tests.support.faults.load import Arrivals, check_charges
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.scene import pass_time
from tests.support.faults.trials import Trial, Trials
from tests.support.waiting import wait_until

#: Workers that are ended, one after the other; two work at a time.
_ENDS: Final = 3
_ENDED: Final = (
    "SELECT (SELECT count(*) FROM dead) + (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM done, unnest(ids) r)"
)


def _payload(rnd: random.Random) -> dict[str, Any]:
    """Mostly short ones; some take longer than anybody waits who was told twice."""
    return {"seconds": rnd.choice((0.0, 0.0, 0.001, 0.01, 0.05, 0.5, 3.0))}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("how", ["told once", "told twice", "killed while it ends"])
@pytest.mark.faults
def test_workers_that_end_amid_everything_lose_nothing(trials: Trials, how: str, is_async: bool) -> None:
    what = f"SIGTERM amid load, {how}, {'async' if is_async else 'sync'}: runs charged"
    trials.run(what, partial(_shut_down, how=how, is_async=is_async), unit="runs", share=2)


def test_workers_that_end_amid_load_lose_nothing(trials: Trials) -> None:
    trials.run("SIGTERM amid load, in short: runs charged", partial(_each_way, is_async=False), unit="runs")


def _each_way(trial: Trial, *, is_async: bool) -> float:
    return _shut_down(trial, how="each way", is_async=is_async)


def _shut_down(trial: Trial, *, how: str, is_async: bool) -> float:
    lab, rnd = trial.lab, trial.rnd
    ways = ["told once", "told twice", "killed while it ends"]
    workers = [lab.worker(is_async=is_async) for _ in range(2)]
    with Arrivals(lab, _payload, seed=trial.number) as arrivals:
        arrivals.wait_for(50)
        for number in range(_ENDS):
            worker = workers[number]
            wait_until(lambda worker=worker: lab.journal.started(pid=worker.pid), timeout=30)  # type: ignore[misc]
            arrivals.wait_for(rnd.randrange(1, 100))
            _end(worker, ways[number % len(ways)] if how == "each way" else how, rnd)
            workers.append(lab.worker(is_async=is_async))
        ids = arrivals.stop()
    wait_until(
        lambda: lab.value(_ENDED) == len(ids), timeout=4 * trial.pace.dead_after + 60, message="the end of all tasks"
    )

    attempts = lab.completions()
    assert attempts.keys() == set(ids)
    losses = check_charges(lab)
    assert lab.value("SELECT count(*) FROM attempt_error") == losses.total()
    assert {id_: count - 1 for id_, count in attempts.items() if count > 1} == losses
    if how == "told once":
        assert losses == {}
        assert all(count == 1 for count in Counter(lab.journal.started()).values())
    return float(losses.total())


def _end(worker: WorkerProcess, how: str, rnd: random.Random) -> None:
    worker.terminate()
    wait_until(lambda: "stopping: up to" in worker.log, message="the worker to hear that it is to stop")
    if how == "told once":
        assert worker.wait() == 0
        assert worker.stats["refused"] == 0
    elif how == "told twice":
        worker.terminate()
        # Handlers that were given up may take the interpreter down with them as it ends: what counts here is their tasks.
        worker.wait()
    else:
        # At some moment of its end.
        pass_time(rnd.uniform(0.0, 0.3))
        worker.kill()
