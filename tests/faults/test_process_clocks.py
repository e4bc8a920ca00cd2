"""Workers and producers on hosts whose clocks are ten minutes fast and slow: all goes by the database's."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Final

import pytest

from tests.support.faults.clock import Clocks, find_compiler
from tests.support.faults.needs import miss
from tests.support.faults.processes import ProducerProcess
from tests.support.faults.trials import Trial, Trials
from tests.support.lab import Lab
from tests.support.waiting import wait_until

_OFF: Final = 600
_RETRY: Final = 1.5
_TOKEN_AGE: Final = 3_600
_RETENTION: Final = 3.0
_DELAYS: Final = (0.3, 1.0, 1.7, 2.5) * 10
_FAILING: Final = 10

#: Leaves are emptied while the test runs: what their rows said is kept for the account.
_KEEP: Final = """
CREATE TABLE kept_done (id bigint NOT NULL, leaf smallint, attempts smallint NOT NULL, done_at timestamptz NOT NULL);
CREATE FUNCTION keep_done() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO kept_done
    SELECT i, NEW.leaf, NEW.attempts, NEW.done_at FROM unnest(NEW.ids) r, generate_series(lower(r), upper(r) - 1) i;
    RETURN NULL;
END $$;
CREATE TRIGGER keep AFTER INSERT ON done FOR EACH ROW EXECUTE FUNCTION keep_done();

CREATE TABLE kept_delayed (id bigint NOT NULL, kind text NOT NULL, run_at timestamptz NOT NULL, at timestamptz NOT NULL);
CREATE FUNCTION keep_delayed() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO kept_delayed VALUES (NEW.id, NEW.kind, NEW.run_at, clock_timestamp());
    RETURN NULL;
END $$;
CREATE TRIGGER keep AFTER INSERT ON delayed FOR EACH ROW EXECUTE FUNCTION keep_delayed();

CREATE TABLE emptied (emptied_at timestamptz NOT NULL, newest timestamptz NOT NULL);
CREATE FUNCTION keep_emptied() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO emptied
    SELECT clock_timestamp(), max(done_at) FROM kept_done WHERE leaf = NEW.no HAVING max(done_at) IS NOT NULL;
    UPDATE kept_done SET leaf = NULL WHERE leaf = NEW.no;
    RETURN NULL;
END $$;
CREATE TRIGGER keep AFTER UPDATE ON leaf FOR EACH ROW WHEN (NEW.state = 'empty') EXECUTE FUNCTION keep_emptied();
"""


@pytest.fixture(scope="module")
def clocks(tmp_path_factory: pytest.TempPathFactory) -> Clocks:
    if find_compiler() is None:
        miss("no C compiler (cc, gcc) to build the clock's shim with")
    return Clocks(tmp_path_factory.mktemp("clocks"))


@pytest.mark.parametrize(
    "leader",
    [pytest.param(_OFF, id="fast leads"), pytest.param(-_OFF, id="slow leads", marks=pytest.mark.faults)],
)
def test_clocks_that_are_ten_minutes_off_change_nothing_in_what_runs_when(
    trials: Trials, clocks: Clocks, leader: int
) -> None:
    what = f"clocks 10 minutes off, the {'fast' if leader > 0 else 'slow'} one leads: latest start"
    trials.run(what, partial(_run, clocks=clocks, leader=leader))


def _run(trial: Trial, *, clocks: Clocks, leader: int) -> float:
    lab, pace = trial.lab, trial.pace
    workers = []
    for off in (leader, -leader):
        workers.append(lab.worker(retry=_RETRY, completed_retention=_RETENTION, env=clocks.off_by(off)))
        assert abs(workers[-1].wall_clock - time.time() - off) < 60, "the clock is not off"
        lab.consumer_id(pid=workers[-1].pid)
    lab.wait_until_leads(pid=workers[0].pid)
    registered = lab.all("SELECT id FROM consumer ORDER BY id")
    _set_old_tokens(lab)
    lab.db.execute(_KEEP)
    ids: list[int] = []
    for off in (_OFF, -_OFF):
        with ProducerProcess(lab.dsn, lab.schema, env=clocks.off_by(off)) as producer:
            assert abs(producer.wall_clock - time.time() - off) < 60, "the clock is not off"
            ids += _enqueue(lab, producer)
    wait_until(
        lambda: lab.value("SELECT count(*) FROM kept_done") == len(ids), timeout=30, message="the end of all tasks"
    )
    # As long as it would take to find a consumer dead, and to forget what is older than its retention.
    wait_until(
        lambda: lab.value(
            "SELECT min(started_at) < clock_timestamp() - %s * interval '1 second' FROM consumer", 1.5 * pace.dead_after
        ),
        timeout=2 * pace.dead_after,
    )
    wait_until(lambda: lab.value("SELECT count(*) FROM done") == 0, timeout=30, message="the leaves emptied")
    wait_until(lambda: lab.value("SELECT count(*) FROM token") == 1, timeout=30, message="the old token forgotten")

    assert lab.value("SELECT token FROM token") == "younger"
    kept = lab.all("SELECT extract(epoch FROM emptied_at - newest)::float8 FROM emptied")
    assert kept
    assert all(_RETENTION <= seconds <= 4 * _RETENTION for (seconds,) in kept), kept
    # Nobody was taken for dead.
    assert lab.all("SELECT id FROM consumer ORDER BY id") == registered
    for worker in workers:
        assert "dead" not in worker.log
        assert "rescued" not in worker.log
    latest = _check_starts(lab, ids)
    assert latest <= pace.late
    return latest


def _set_old_tokens(lab: Lab) -> None:
    """Tokens whose tasks are gone, five minutes younger and older than the age at which they may go: a clock ten minutes off would
    decide otherwise."""
    lab.db.execute(
        "INSERT INTO token (type, token, id, created_at) VALUES "
        "('t', 'younger', 1, clock_timestamp() - %(age)s * interval '1 second' + interval '5 minutes'), "
        "('t', 'older', 2, clock_timestamp() - %(age)s * interval '1 second' - interval '5 minutes')",
        {"age": _TOKEN_AGE},
    )


def _enqueue(lab: Lab, producer: ProducerProcess) -> list[int]:
    """Delayed tasks, which are to be due by the database's clock, and tasks that fail at first."""
    before = lab.value("SELECT clock_timestamp()")
    ids = producer.enqueue(*({"type": "t", "delay": delay} for delay in _DELAYS))
    after = lab.value("SELECT clock_timestamp()")
    run_ats = dict(lab.all("SELECT id, run_at FROM kept_delayed WHERE kind = 'scheduled'"))
    for id_, delay in zip(ids, _DELAYS, strict=True):
        assert before <= run_ats[id_] - timedelta(seconds=delay) <= after
    return ids + producer.enqueue(*({"type": "t", "payload": {"fail": 1}} for _ in range(_FAILING)))


def _check_starts(lab: Lab, ids: list[int]) -> float:
    """All ran as often as they should, and none before its time. Gives by how much the latest came after it, in seconds."""
    attempts = {entry.id: entry.attempt for entry in lab.journal.entries("start")}
    assert attempts.keys() == set(ids)
    assert dict(lab.all("SELECT id, attempts FROM kept_done")) == attempts
    assert sum(attempts.values()) == len(lab.journal.entries("start")) == len(ids) + 2 * _FAILING
    # The database runs on this machine: its clock against the one that the journal goes by, which is nobody's but the machine's.
    offset, blur = min((_compare_clocks(lab) for _ in range(50)), key=lambda pair: pair[1])
    late: list[float] = []
    for id_, kind, run_at, at in lab.all("SELECT id, kind, run_at, at FROM kept_delayed"):
        attempt = 1 if kind == "scheduled" else 2
        [start] = [e for e in lab.journal.entries("start") if (e.id, e.attempt) == (id_, attempt)]
        late.append(offset + start.at - run_at.timestamp())
        if kind == "retrying":
            # The time of the row is read a little after that of the retry.
            assert -2 < (run_at - at).total_seconds() - _RETRY < 0.1
    assert len(late) == 2 * (len(_DELAYS) + _FAILING)
    assert min(late) >= -blur
    return max(late)


def _compare_clocks(lab: Lab) -> tuple[float, float]:
    """By how much the database's clock is ahead of the monotonic one, at most, and how much less it may be; in seconds."""
    before = time.monotonic()
    now: float = lab.value("SELECT extract(epoch FROM clock_timestamp())::float8")
    return now - before, time.monotonic() - before
