"""Workers that lost what they hold: they start none of it, and what becomes of what runs is refused, however it ends."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Snooze, TaskInfo
from tests.support.consuming import states
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


# --- starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut off", "declared dead", "deleted"])
def test_rule_3_what_an_event_loop_has_fetched_is_not_started_once_it_is_lost(lab: Lab, how: str) -> None:
    """Many messages are fetched together, and the first one's first step takes its time: each start asks for itself."""
    links = lab.links()
    started: list[int] = []
    begun, release = threading.Event(), threading.Event()

    async def handle(task: TaskInfo) -> None:
        started.append(task.id)
        if task.payload == "hold" and not begun.is_set():
            begun.set()
            # As code does that should not be async: the loop stands still, the heartbeat goes on.
            assert release.wait(60)

    first = lab.consumer(handle, dsn=links.dsn, concurrency=50)
    me = lab.consumer_id()
    try:
        [held, *rest] = lab.enqueue("hold", *(None for _ in range(30)))
        assert begun.wait(20)
        assert lab.claimed(me) == {held, *rest}
        # Only what has begun is named as running, and so charged.
        lab.wait_for_beat(me, running=[held])
        assert lab.value("SELECT running FROM consumer WHERE id = %s", me)[0].upper == held + 1
        runs = Runs()
        runs.release.set()
        lab.consumer(runs, concurrency=50)
        second = lab.consumer_id(other_than=[me])
        if how == "cut off":
            links.hold_requests("control")
            wait_until(lambda: {*rest} <= set(runs.ids), message="the end of those it lost, elsewhere")
        else:
            if how == "deleted":
                lab.db.execute("DELETE FROM consumer WHERE id = %s", [me])
            else:
                lab.declare_dead(me)
            # It has registered anew, and may start what it claims from now on.
            lab.wait_for_beat(lab.consumer_id(other_than=[me, second]))
            wait_until(lambda: not lab.claimed(me), message="the rescue")
    finally:
        release.set()
    wait_until(lambda: first.stats()["refused"] == 1)
    links.flow()
    lab.wait_for(completed=31)
    assert Counter(started + runs.ids) == Counter([held, held, *rest])
    assert lab.completions().keys() == {held, *rest}
    # It is as good as new.
    lab.consumer_id(other_than=[me, second])
    lab.enqueue(count=50)
    lab.wait_for(completed=81)
    assert first.stats()["refused"] == 1


def test_rule_3_what_a_thread_has_taken_is_not_started_once_its_time_is_over(lab: Lab) -> None:
    """It takes many fast tasks at once. Nobody tells it that they are lost: its own clock does."""
    links = lab.links()
    stale, fresh = Runs(), Runs()
    fresh.release.set()
    first = lab.consumer(stale, dsn=links.dsn, concurrency=1)
    warm_up = lab.enqueue(count=200)
    lab.wait_for(completed=200)
    [held, *rest] = lab.enqueue("hold", *(None for _ in range(50)))
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=[held])
    assert lab.claimed(me) > {held}
    links.hold_requests("control")
    lab.consumer(fresh)
    lab.wait_for(completed=251)
    stale.release.set()
    wait_until(lambda: first.stats()["refused"] == 1)
    # Also what it claimed beside: the thread looks for more.
    wait_until(lambda: first.stats()["given_back"] or first._running is None or first._running.engine.running == 0)
    assert stale.ids == [*warm_up, held]
    assert sorted(fresh.ids) == [held, *rest]
    links.flow()


def test_rule_3_a_worker_whose_registration_was_deleted_registers_anew_and_starts_nothing_it_held(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    stale, fresh = Runs(), Runs()
    fresh.release.set()
    first = lab.consumer(stale, concurrency=1)
    warm_up = lab.enqueue(count=200)
    lab.wait_for(completed=200)
    [held, *waiting] = lab.enqueue("hold", *(None for _ in range(5)))
    me = lab.consumer_id()
    lab.wait_for_beat(me, running=[held])
    wait_until(lambda: lab.claimed(me) == {held, *waiting})
    lab.db.execute("DELETE FROM consumer WHERE id = %s", [me])
    again = lab.consumer_id(other_than=[me])
    second = lab.consumer(fresh)
    lab.wait_for(completed=206)
    second.stop()
    stale.release.set()
    wait_until(lambda: first.stats()["refused"] == 1)
    wait_until(lambda: f"(ids {held})" in caplog.text)
    assert caplog.text.count("its registration was deleted") == 1
    [last] = lab.enqueue(None)
    lab.wait_for(completed=207)
    assert stale.ids == [*warm_up, held, last]
    assert lab.value("SELECT consumer FROM done WHERE ids @> %s::bigint", last) == again
    # Nobody knows any more what ran: no run is charged.
    assert lab.completions() == dict.fromkeys([*warm_up, held, *waiting, last], 1)
    assert lab.value("SELECT count(*) FROM attempt_error") == 0


# --- late results ----------------------------------------------------------------------------------


class _Ends(Runs):
    """What it holds raises in the end."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def __call__(self, task: TaskInfo) -> None:
        super().__call__(task)
        raise self._error


@pytest.mark.parametrize("track", [0, 2, 3, 4])
@pytest.mark.parametrize("end", ["completed", "retried", "failed for good", "snoozed"])
def test_rule_1_a_late_result_of_any_kind_is_refused_on_every_track(lab: Lab, end: str, track: int) -> None:
    error = Snooze(3600) if end == "snoozed" else ValueError("too late")
    stale, fresh = Runs() if end == "completed" else _Ends(error), Runs()
    fresh.release.set()
    [held] = lab.enqueue("hold", max_attempts=2 if end == "retried" else 1)
    lab.db.execute("UPDATE ready SET track = %s", [track])
    # It says nothing of what it runs for a long time, so that its loss is not charged where that is what counts.
    first = lab.consumer(stale, concurrency=1, heartbeat_interval=20, dead_after=60, lease=60)
    me = lab.consumer_id()
    wait_until(lambda: stale.ids == [held])
    if track >= 3:
        # Else the loss itself would be the end: claimed alone is started.
        lab.db.execute("UPDATE claim SET max_attempts = 4")
    lab.declare_dead(me)
    second = lab.consumer(fresh)
    lab.wait_for(completed=1)
    second.stop()
    stale.release.set()
    wait_until(lambda: first.stats()["refused"] == 1)
    assert states(lab.db) == {"completed": 1}
    assert fresh.ids == [held]
    assert lab.value("SELECT count(*) FROM delayed") == 0
    assert lab.value("SELECT count(*) FROM attempt_error WHERE took_us IS NOT NULL") == 0
    assert [first.stats()[name] for name in ("completed", "retried", "failed", "snoozed")] == [0, 0, 0, 0]
