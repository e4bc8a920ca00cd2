"""A handler that hangs holds up no result but its own: a thread takes many fast tasks at once, and stores what ended before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq import Consumer
from tests.support.lab import Lab, Runs
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


class _Hang:
    """20 fast tasks, one whose handler hangs, and 5 fast ones behind it, after as many others as make batches large."""

    def __init__(self, lab: Lab, *, concurrency: int = 1, timeout: float | None = None) -> None:
        self.runs = Runs()
        # Nobody is taken for dead: what others get was left to them.
        self.consumer: Consumer = lab.consumer(self.runs, concurrency=concurrency, timeout=timeout, dead_after=600)
        self.warm_up = lab.enqueue(count=500)
        lab.wait_for(completed=500)
        self.me = lab.consumer_id()
        payloads = [*(None for _ in range(20)), "hold", *(None for _ in range(5))]
        ids = lab.enqueue(*payloads, max_attempts=1 if timeout else 3)
        self.before, self.held, self.behind = ids[:20], ids[20], ids[21:]
        self.all = [*self.warm_up, *ids]
        wait_until(lambda: self.held in self.runs.ids)


def test_what_ended_before_a_handler_that_hangs_is_stored_meanwhile(lab: Lab) -> None:
    hang = _Hang(lab)
    lab.wait_for(completed=520, running=6)
    assert lab.claimed(hang.me) == {hang.held, *hang.behind}
    hang.runs.release.set()
    lab.wait_for(completed=526)
    assert hang.runs.ids == hang.all
    assert lab.completions() == dict.fromkeys(hang.all, 1)


def test_what_a_thread_that_hangs_has_not_started_runs_in_another(lab: Lab) -> None:
    hang = _Hang(lab, concurrency=2)
    lab.wait_for(completed=525, running=1)
    assert lab.claimed(hang.me) == {hang.held}
    hang.runs.release.set()
    lab.wait_for(completed=526)
    assert sorted(hang.runs.ids) == hang.all


def test_after_a_timeout_the_rest_of_the_batch_is_stored_and_runs(lab: Lab) -> None:
    hang = _Hang(lab, timeout=1.0)
    # It still hangs.
    lab.wait_for(completed=525, failed=1)
    assert hang.runs.ids == hang.all
    hang.consumer.stop()
    assert lab.claimed(hang.me) == set()
    hang.runs.release.set()
    wait_until(lambda: hang.runs.ended[hang.held])
    assert hang.consumer.stats()["timed_out"] == 1
    lab.wait_for(completed=525, failed=1)


def test_a_stop_that_waits_for_a_handler_that_hangs_has_stored_the_rest(lab: Lab) -> None:
    hang = _Hang(lab)
    stop = threading.Thread(target=hang.consumer.stop, args=(60,))
    stop.start()
    lab.wait_for(completed=520, running=1, pending=5)
    assert stop.is_alive()
    hang.runs.release.set()
    stop.join(20)
    assert not stop.is_alive()
    lab.wait_for(completed=521, pending=5)


def test_a_stop_that_gives_up_a_handler_that_hangs_leaves_nobody_what_is_done(lab: Lab) -> None:
    hang = _Hang(lab)
    hang.consumer.stop(0.1)
    others = Runs()
    others.release.set()
    lab.consumer(others)
    lab.wait_for(completed=526)
    assert set(others.ids) == {hang.held, *hang.behind}
    assert lab.losses() == {hang.held: 1}
    hang.runs.release.set()
