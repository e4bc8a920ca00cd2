"""SIGKILL of a worker that holds a thousand tasks: all of them run again, and only what ran is charged."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest

from tests.support.faults.load import check_charges
from tests.support.faults.processes import Gate
from tests.support.faults.trials import Trial, Trials
from tests.support.lab import Lab
from tests.support.waiting import wait_until

_RUNNING = 10
_HELD = 1_000
#: Tasks of another worker.
_OTHERS = 50
#: Fast ones, so that the worker prefetches as much as it may.
_WARM_UP = 5_000


@pytest.mark.parametrize(
    "leads", [pytest.param(True, id="the leader"), pytest.param(False, id="not the leader", marks=pytest.mark.faults)]
)
def test_what_a_killed_worker_held_runs_again_and_what_ran_is_charged(trials: Trials, leads: bool) -> None:
    trials.run(
        f"SIGKILL with 1,000 claimed, {'' if leads else 'not '}the leader: all run again", partial(_kill, leads=leads)
    )


def _kill(trial: Trial, *, leads: bool) -> float:
    lab, pace = trial.lab, trial.pace
    others_gate = lab.gate()
    if not leads:
        lab.wait_until_leads(pid=lab.worker(types={"something else": None}).pid)
    victim = lab.worker(types={"t": _RUNNING})
    me = lab.consumer_id(pid=victim.pid)
    if leads:
        lab.wait_until_leads(pid=victim.pid)
    gate, running, held, before = _claim_a_thousand(lab, me)
    # Another worker, with tasks of its own that run and wait.
    survivor = lab.worker(types={"t": None, "others": 5})
    others_me = lab.consumer_id(pid=survivor.pid)
    others = lab.enqueue_type("others", *[others_gate.orders] * _OTHERS)
    wait_until(lambda: len(lab.journal.started(pid=survivor.pid)) == 5)
    lab.wait_for_beat(others_me, running=lab.journal.started(pid=survivor.pid))
    # Longer than a heartbeat: two of them name what runs.
    lab.wait_for_beat(me, running=running)
    named_at = lab.value("SELECT beat_at FROM consumer WHERE id = %s", me)
    wait_until(lambda: lab.value("SELECT beat_at > %s FROM consumer WHERE id = %s", named_at, me))
    lab.wait_for_beat(me, running=running)
    assert sorted(lab.claimed(me)) == held

    killed_at = victim.kill()
    gate.open()
    wait_until(
        lambda: set(lab.journal.started(pid=survivor.pid)) >= set(held),
        timeout=2 * pace.again_within,
        message="all that the victim held",
    )
    starts = [entry for entry in lab.journal.entries("start", pid=survivor.pid) if entry.id in set(held)]
    took = max(entry.at for entry in starts) - killed_at
    others_gate.open()
    lab.wait_for(completed=before + _HELD + _OTHERS)

    assert took <= pace.again_within
    assert sorted(set(lab.journal.started(pid=victim.pid)) & set(held)) == running
    assert sorted(entry.id for entry in starts) == held
    # A record of why for each run that was lost, and one attempt more; nothing of the kind for anybody else.
    assert check_charges(lab) == dict.fromkeys(running, 1)
    assert lab.value("SELECT count(*) FROM attempt_error") == _RUNNING
    attempts = lab.completions()
    assert {id_: attempts[id_] for id_ in [*held, *others]} == (
        dict.fromkeys([*held, *others], 1) | dict.fromkeys(running, 2)
    )
    assert {entry.id: entry.attempt for entry in starts} == {id_: attempts[id_] for id_ in held}
    return took


def _claim_a_thousand(lab: Lab, me: int) -> tuple[Gate, list[int], list[int], int]:
    """Ten tasks that run and 990 that wait behind them in the worker. How far it claims ahead goes by how fast its tasks were: beside
    busy neighbours it may take less, and is tried again.

    Gives the gate at which the ten wait, them, all thousand, and how many had completed before.
    """
    before = 0
    for _ in range(5):
        gate = lab.gate()
        lab.enqueue(*["quiet"] * _WARM_UP)
        before += _WARM_UP
        lab.wait_for(completed=before)
        running = lab.enqueue(*[gate.orders] * _RUNNING)
        wait_until(lambda running=running: set(lab.journal.started()) >= set(running))  # type: ignore[misc]
        held = [*running, *lab.enqueue(count=_HELD - _RUNNING)]
        with contextlib.suppress(AssertionError):
            wait_until(lambda: len(lab.claimed(me)) == _HELD, timeout=3)
            return gate, running, held, before
        gate.open()
        before += _HELD
        lab.wait_for(completed=before)
    raise AssertionError("the worker never claimed a thousand tasks")
