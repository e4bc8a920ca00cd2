"""The rules on results: a batch never fails for one member, and none is ever dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fastq import Consumer, TaskInfo
from tests.support.consuming import states
from tests.support.lab import Lab, Runs
from tests.support.links import PARTS
from tests.support.waiting import wait_until


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as lab:
        yield lab


# --- rule 6: a batch never fails for one member ----------------------------------------------------

_BAD_TEXTS = {
    "nul": "before\0after",
    "surrogate": "before\ud800after",
    "huge": "x" * 10_000_000,
    "both": "\0\udfff" * 100_000,
}


class _Batch:
    """Tasks that have run, once each, and whose results are to be stored together. Their payloads say how they ended:
    None, or the name of what the handler raised."""

    def __init__(self, lab: Lab, *payloads: str | None) -> None:
        assert len(payloads) <= 1000, "one flush holds no more"
        self.lab = lab
        self._links = lab.links()
        self._lock = threading.Lock()
        self._count = 0
        self.consumer = lab.consumer(self._handle, dsn=self._links.dsn, dead_after=60)
        self._links.hold_answers("complete")
        # A flush is under way: what ends meanwhile waits for the next one.
        lab.enqueue(None)
        self._links.wait_for_answer("complete")
        self.ids = lab.enqueue(*payloads, max_attempts=1)
        wait_until(lambda: self._count == len(payloads) + 1)
        # All have returned, too: what they did goes into one flush.
        running = self.consumer._running
        assert running is not None
        wait_until(lambda: running.engine.running == 0)
        assert self.counted("flushes") == 0

    def _handle(self, task: TaskInfo) -> None:
        with self._lock:
            self._count += 1
        if task.payload is not None:
            raise ValueError(_BAD_TEXTS.get(task.payload, task.payload))

    def fail_for(self, culprit: int, table: str, condition: sql.SQL) -> None:
        """No row that meets the condition for this id gets into the table."""
        self.lab.db.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION 'no such row here'; END$$"
        )
        self.lab.db.execute(
            sql.SQL(
                "CREATE TRIGGER refuse BEFORE INSERT ON {} FOR EACH ROW WHEN ({}) EXECUTE FUNCTION refuse()"
            ).format(sql.Identifier(table), condition.format(culprit))
        )

    def store(self) -> None:
        """The results are stored from here on."""
        self._links.flow()

    def counted(self, name: str) -> float:
        """A counter of the consumer, of the batch alone."""
        count = self.consumer.stats()[name]
        return count - 1 if name in ("completed", "started", "claimed") else count

    def wait_until_quiet(self) -> None:
        """Nothing loops: three heartbeats pass without a flush."""
        while True:
            before = self.consumer.stats()
            wait_until(lambda before=before: self.consumer.stats()["beats"] >= before["beats"] + 3)  # type: ignore[misc]
            if self.consumer.stats()["flushes"] == before["flushes"]:
                return


def test_rule_6_bad_text_in_an_error_harms_no_neighbour(lab: Lab) -> None:
    payloads: list[str | None] = [None] * 500
    payloads[100], payloads[200], payloads[300], payloads[400] = _BAD_TEXTS
    batch = _Batch(lab, *payloads)
    batch.store()
    lab.wait_for(completed=497, failed=4)
    texts = dict(lab.all("SELECT id, error FROM attempt_error"))
    assert texts.keys() == {batch.ids[n] for n in (100, 200, 300, 400)}
    assert texts[batch.ids[100]] == "ValueError: before\ufffdafter"
    assert texts[batch.ids[200]] == "ValueError: before?after"
    assert texts[batch.ids[300]].startswith("ValueError: xxx")
    assert texts[batch.ids[400]].startswith("ValueError: \ufffd?")
    assert max(len(text.encode()) for text in texts.values()) <= 8 * 1024
    assert lab.value("SELECT max(octet_length(traceback)) FROM attempt_error") <= 64 * 1024
    # All of them together: nothing had to be taken apart.
    wait_until(lambda: batch.counted("failed") == 4)
    assert batch.counted("flushes") == 2
    assert batch.counted("refused") == 0


def test_rule_6_a_completion_that_can_not_be_stored_is_found_and_named(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    batch = _Batch(lab, *([None] * 500))
    culprit = batch.ids[333]
    batch.fail_for(culprit, "done", sql.SQL("NEW.ids @> {}::bigint"))
    batch.store()
    lab.wait_for(completed=500, failed=1)
    batch.wait_until_quiet()
    assert lab.all("SELECT id FROM dead") == [(culprit,)]
    [(error,)] = lab.all("SELECT error FROM attempt_error")
    assert "could not be stored" in error
    assert f"the result of task {culprit} can't be stored" in caplog.text
    # Split until it was alone: a few statements for each halving, not one for each member.
    assert batch.counted("flushes") <= 20
    assert [batch.counted(name) for name in ("completed", "failed", "refused")] == [499, 1, 0]


def test_rule_6_a_failure_that_can_not_be_stored_is_found_and_named(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    # Completions beside it, which are another statement of the same flush.
    payloads: list[str | None] = [None, "no"] * 250
    batch = _Batch(lab, *payloads)
    culprit = batch.ids[333]
    batch.fail_for(culprit, "attempt_error", sql.SQL("NEW.id = {}::bigint"))
    batch.store()
    wait_until(lambda: states(lab.db).get("failed") == 249)
    batch.wait_until_quiet()
    assert states(lab.db) == {"completed": 251, "failed": 249, "running": 1}
    assert f"the result of task {culprit} can't be stored" in caplog.text
    assert batch.counted("flushes") <= 20
    assert [batch.counted(name) for name in ("completed", "failed", "refused")] == [250, 249, 0]
    # It is not lost: another worker runs it again once this one has gone, and that it will is said.
    batch.consumer.stop()
    [said] = [record for record in caplog.records if "gives up the result" in record.getMessage()]
    assert (said.levelname, f"of task {culprit}," in said.getMessage()) == ("ERROR", True)
    lab.db.execute("DROP TRIGGER refuse ON attempt_error")
    runs = Runs()
    lab.consumer(runs)
    lab.wait_for(completed=252, failed=249)
    assert runs.ids == [culprit]


# --- rule 7: results are never dropped -------------------------------------------------------------


def _some_that_run(lab: Lab, runs: Runs, count: int) -> list[int]:
    """Tasks that run, each in a handler of its own, until they are released."""
    ids = lab.enqueue(*["hold"] * count)
    wait_until(lambda: sorted(runs.ids) == sorted(ids))
    return ids


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_rule_7_what_ends_while_the_database_is_away_is_stored_once_when_it_is_back(
    lab: Lab, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    links = lab.links()
    runs, others = Runs(), Runs()
    first = lab.consumer(runs, dsn=links.dsn, dead_after=20, concurrency=20, statement_timeout=1, connect_timeout=1)
    ids = _some_that_run(lab, runs, 20)
    # One that would rescue them if it could.
    lab.consumer(others, dead_after=20)
    if how == "refused":
        links.refuse()
    else:
        links.hold_requests()
    runs.release.set()
    wait_until(lambda: runs.ended.total() == 20)
    wait_until(lambda: "results, and keeps trying" in caplog.text)
    assert states(lab.db) == {"running": 20}
    links.accept()
    links.cut()
    lab.wait_for(completed=20)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert others.ids == []
    wait_until(lambda: first.stats()["completed"] == 20)
    assert first.stats()["refused"] == 0
    lab.enqueue(count=20)
    lab.wait_for(completed=40)


def test_rule_7_an_outage_for_all_that_is_longer_than_the_dead_time_kills_nobody(lab: Lab) -> None:
    links = lab.links()
    runs = [Runs(), Runs()]
    consumers: list[Consumer] = []
    ids: list[int] = []
    for each in runs:
        consumers.append(lab.consumer(each, dsn=links.dsn, concurrency=5))
        ids += _some_that_run(lab, each, 5)
    before = lab.all("SELECT id FROM consumer ORDER BY id")
    links.refuse()
    wait_until(
        lambda: lab.value("SELECT bool_and(beat_at < clock_timestamp() - interval '2500 milliseconds') FROM consumer"),
        message="the dead time, twice and more",
    )
    for each in runs:
        each.release.set()
    links.accept()
    lab.wait_for(completed=10)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert sorted(runs[0].ids + runs[1].ids) == sorted(ids)
    assert [consumer.stats()["refused"] for consumer in consumers] == [0, 0]
    assert lab.all("SELECT id FROM consumer WHERE dead_at IS NULL ORDER BY id") == before


def test_rule_7_nothing_more_is_claimed_while_many_results_wait_to_be_stored(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    links.hold_answers("complete")
    ids = lab.enqueue(count=20_000)

    def is_still() -> bool:
        """Three heartbeats pass in which nothing is claimed."""
        before = consumer.stats()
        wait_until(lambda: consumer.stats()["beats"] >= before["beats"] + 3)
        return consumer.stats()["claimed"] == before["claimed"]

    wait_until(lambda: consumer.stats()["claimed"] > 5_000 and is_still())
    # The limit, what was prefetched when it was reached, and one claim under way.
    assert consumer.stats()["claimed"] <= 7_000
    links.flow()
    lab.wait_for(completed=20_000)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert sorted(runs.ids) == sorted(ids)


def test_rule_7_results_are_flushed_at_a_stop_although_connections_were_lost_meanwhile(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, concurrency=20)
    ids = _some_that_run(lab, runs, 20)
    links.refuse()
    stopping = threading.Thread(target=consumer.stop, args=(20,))
    stopping.start()
    runs.release.set()
    wait_until(lambda: runs.ended.total() == 20)
    assert states(lab.db) == {"running": 20}
    assert stopping.is_alive()
    links.accept()
    stopping.join(20)
    assert not stopping.is_alive()
    assert states(lab.db) == {"completed": 20}
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert lab.all("SELECT 1 FROM consumer") == []


def test_rule_7_a_stop_ends_in_time_although_nothing_can_be_stored_and_says_what(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    links = lab.links()
    runs = Runs()
    consumer = lab.consumer(runs, dsn=links.dsn, dead_after=60)
    ids = _some_that_run(lab, runs, 3)
    # A link on which nothing comes back any more, and nothing says so.
    links.hold_requests("complete")
    runs.release.set()
    wait_until(lambda: runs.ended.total() == 3)
    began = time.monotonic()
    consumer.stop(3)
    # Given up late, it would take 8.
    assert time.monotonic() - began < 6
    [said] = [record.getMessage() for record in caplog.records if "could not be stored in time" in record.getMessage()]
    assert said.startswith("gives up 3 results")
    assert all(str(id_) in said for id_ in ids)
    # Signed off all the same: others need not wait for the dead time.
    assert lab.value("SELECT dead_at IS NOT NULL AND stopping FROM consumer")
    links.cut()
    others = Runs()
    others.release.set()
    lab.consumer(others, dead_after=60)
    lab.wait_for(completed=3)
    assert sorted(others.ids) == sorted(ids)


def test_rule_7_connections_that_break_all_the_time_cost_no_task_its_end(lab: Lab) -> None:
    links = lab.links()
    runs = Runs()
    # They are lost before a claim is known or a result acknowledged, and found again by looking: nothing runs twice.
    consumers = [lab.consumer(runs, dsn=links.dsn, dead_after=20, concurrency=4) for _ in range(2)]
    ids = lab.enqueue(count=6_000)
    ended = 0
    for cut in range(30):
        wait_until(lambda cut=cut: len(runs.ids) >= cut * 180)  # type: ignore[misc]
        ended += links.cut(PARTS[cut % 3])
    assert ended >= 10
    lab.wait_for(completed=6_000)
    assert lab.completions() == dict.fromkeys(ids, 1)
    assert sorted(runs.ids) == sorted(ids)
    wait_until(lambda: sum(consumer.stats()["completed"] for consumer in consumers) == 6_000)
    assert [consumer.stats()["refused"] for consumer in consumers] == [0, 0]
