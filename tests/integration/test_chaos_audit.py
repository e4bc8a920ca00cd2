"""The audit of a chaos run finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from fastq.migrations import migrate
from tests.chaos.audit import Account, audit, prepare
from tests.chaos.faults import Fault
from tests.support.faults.server import PrivateServer


@pytest.fixture(scope="module")
def private_server() -> Iterator[PrivateServer]:
    """The schema's name is the default one, so the server is these tests' own."""
    with PrivateServer() as server:
        yield server


@pytest.fixture
def server(private_server: PrivateServer) -> PrivateServer:
    """Prepared as for a run."""
    with psycopg.connect(private_server.dsn) as db:
        db.execute("DROP SCHEMA IF EXISTS fastq, chaos CASCADE")
    migrate(private_server.dsn, schema="fastq")
    prepare(private_server.dsn)
    return private_server


class Run:
    """A run that never was: what its tables, journal and promises say."""

    def __init__(self, server: PrivateServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._journal: list[str] = []
        self._promises: list[str] = []
        self.faults: list[Fault] = []
        self.logs = ""

    def complete(self, id_: int, attempts: int = 1) -> None:
        with psycopg.connect(self._server.dsn) as db:
            db.execute(
                "INSERT INTO fastq.done (lo, consumer, no, took_us, lane, leaf, attempts, ids) "
                "VALUES (%s, 1, 1, 1, 1, 0, %s, int8multirange(int8range(%s, %s, '[]')))",
                [id_, attempts, id_, id_],
            )

    def write_effect(self, id_: int, pid: int = 10, attempt: int = 1) -> None:
        with psycopg.connect(self._server.dsn) as db:
            db.execute("INSERT INTO chaos.effect (id, attempt, pid) VALUES (%s, %s, %s)", [id_, attempt, pid])

    def record_failure(self, id_: int, attempt: int = 1) -> None:
        with psycopg.connect(self._server.dsn) as db:
            db.execute(
                "INSERT INTO fastq.attempt_error (id, consumer, no, attempt, error, took_us) VALUES (%s, 1, 1, %s, 'so', 1)",
                [id_, attempt],
            )

    def promise(self, word: str, *rest: object) -> None:
        self._promises.append(" ".join(map(str, (word, *rest))))

    def start(
        self, id_: int, pid: int, at: float, *, until: float | None = None, attempt: int = 1, how: str = "end"
    ) -> None:
        self._journal.append(f"start {id_} {attempt} {pid} {at}")
        if until is not None:
            self._journal.append(f"{how} {id_} {attempt} {pid} {until}")

    def audit(self) -> Account:
        journal, promises = self._folder / "journal", self._folder / "promises-1"
        journal.write_text("".join(f"{line}\n" for line in self._journal))
        promises.write_text("".join(f"{line}\n" for line in self._promises))
        return audit(self._server.dsn, journal, [promises], self.faults, self.logs)


@pytest.fixture
def run(server: PrivateServer, tmp_path: Path) -> Run:
    """In which task 1 went well, and task 9, which its handler's transaction completed."""
    run = Run(server, tmp_path)
    run.promise("ack", 1, 9)
    run.promise("effect", 9)
    for id_ in (1, 9):
        run.start(id_, 10, 1.0, until=1.1)
        run.complete(id_)
    run.write_effect(9)
    return run


def test_a_run_without_a_fault(run: Run) -> None:
    assert run.audit() == Account(
        acknowledged=2,
        completed=2,
        starts=2,
        failures=0,
        reruns=0,
        effects=1,
        breaks=0,
        options=0,
        option_failures=0,
        option_reruns=0,
        findings=[],
    )


def test_what_must_not_be(run: Run) -> None:
    run.promise("ack", 2)
    run.promise("never", 3)
    run.start(3, 10, 2.0)
    run.complete(1)
    run.complete(4)
    run.promise("token", "a", 1)
    run.promise("token", "a", 4)
    # Twice, and nothing struck; and as a second attempt, though no first one failed.
    run.start(5, 10, 3.0, until=3.1)
    run.start(5, 10, 4.0, until=4.1, attempt=2)
    run.complete(5, attempts=2)
    assert _found(run) == {
        "acknowledged tasks lost": [2],
        "tasks completed twice": [1],
        "tasks rolled back and there": [3],
        "started and never enqueued": [3],
        "completed without a start": [4],
        "attempts without their record": [5],
        "starts without an attempt or a rescue": [5],
        "re-runs that no fault explains": [5],
        "tokens that answered with several tasks": [1, 4],
    }


@pytest.mark.parametrize("kind", ["kill worker", "crash", "long stop", "short stop"])
def test_a_re_run_is_explained_by_what_struck_it(run: Run, kind: str) -> None:
    run.start(2, 10, 5.0)
    run.start(2, 11, 15.0, until=15.1)
    run.complete(2)
    run.faults = [Fault(kind, 0 if kind == "crash" else 10, 5.05, 5.1)]
    run.logs = "process 10 on here (consumer 7) is dead: silent for 9.2 s"
    account = run.audit()
    # A stop that is over at once makes nobody dead.
    wrong = ["re-runs that no fault explains"] if kind == "short stop" else []
    assert ([finding.what for finding in account.findings], account.reruns) == (wrong, 1)


def test_another_process_or_time_explains_nothing(run: Run) -> None:
    run.start(2, 10, 50.0, until=50.1)
    run.start(2, 11, 65.0, until=65.1)
    run.complete(2)
    run.faults = [
        Fault("kill worker", 11, 50.05, 50.1),
        Fault("kill worker", 10, 70.0, 70.0),
        Fault("crash", 0, 1.0, 2.0),
    ]
    run.logs = "process 10 on here (consumer 7) is dead: silent for 9.2 s"
    assert [finding.what for finding in run.audit().findings] == ["re-runs that no fault explains"]


def test_an_effect_that_is_there_twice(run: Run) -> None:
    run.write_effect(9)
    assert _found(run) == {"effects there twice": [9]}


def test_an_effect_that_is_missing(run: Run) -> None:
    run.promise("ack", 2)
    run.promise("effect", 2)
    run.start(2, 10, 2.0, until=2.1)
    run.complete(2)
    assert _found(run) == {"completed without their effect": [2]}


def test_an_effect_without_completion(run: Run) -> None:
    # Nobody knows of its task: acknowledged or not, nothing but a completion may write it.
    run.write_effect(2)
    assert _found(run) == {"effects of tasks that are not completed": [2]}


def test_an_effect_of_a_run_that_had_lost_its_task(run: Run) -> None:
    run.start(2, 10, 5.0)
    run.start(2, 11, 15.0, until=15.1, attempt=2)
    run.record_failure(2)
    run.complete(2, attempts=2)
    run.write_effect(2, pid=10)
    run.faults = [Fault("long stop", 10, 5.05, 16.0)]
    run.logs = "process 10 on here (consumer 7) is dead: silent for 9.2 s"
    assert _found(run) == {"effects of another attempt than was completed": [2]}


def test_one_without_an_effect_has_to_have_ended(run: Run) -> None:
    run.start(2, 10, 5.0)
    run.complete(2)
    assert _found(run) == {"completed without a start": [2]}


def test_a_commit_speaks_for_a_process_that_died_after_it(run: Run) -> None:
    run.start(2, 10, 5.0)
    run.complete(2)
    run.write_effect(2)
    assert _found(run) == {}


@pytest.mark.parametrize(
    ("kind", "at", "breaks"),
    [
        ("broken transaction", 5.05, True),
        ("restart", 5.05, True),
        ("broken transaction", 60.0, False),
        ("held snapshot", 5.05, False),
    ],
)
def test_a_transaction_breaks_by_a_fault_alone(run: Run, kind: str, at: float, breaks: bool) -> None:
    run.start(2, 10, 5.0, until=5.1, how="broke")
    run.record_failure(2)
    run.start(2, 10, 6.0, until=6.1, attempt=2)
    run.complete(2, attempts=2)
    run.write_effect(2, attempt=2)
    run.faults = [Fault(kind, 0, at, at + 0.01)]
    account = run.audit()
    assert [finding.what for finding in account.findings] == ([] if breaks else ["re-runs that no fault explains"])
    assert (account.breaks, account.failures) == (1, 0)


@pytest.mark.parametrize("how", ["fail", "end"])
def test_a_failure_is_one_that_the_handler_knows_of(run: Run, how: str) -> None:
    run.start(2, 10, 5.0, until=5.1, how=how)
    run.record_failure(2)
    run.start(2, 10, 6.0, until=6.1, attempt=2)
    run.complete(2, attempts=2)
    wrong = ["starts without an attempt or a rescue", "re-runs that no fault explains"]
    assert list(_found(run)) == ([] if how == "fail" else wrong)


@pytest.mark.parametrize("again", [5.6, 6.6])
def test_a_retry_sooner_than_the_tasks_own_policy(run: Run, again: float) -> None:
    run.promise("options", 2)
    run.start(2, 10, 5.0, until=5.1, how="fail")
    run.record_failure(2)
    run.start(2, 10, again, until=again + 0.1, attempt=2)
    run.complete(2, attempts=2)
    is_early = again < 6
    assert list(_found(run)) == (
        ["failed, and run again sooner than their own retry policy has it"] if is_early else []
    )


def test_options_that_are_not_the_tasks_own(run: Run) -> None:
    run.start(2, 10, 5.0, until=5.1, how="strange")
    run.complete(2)
    assert _found(run) == {"without the timeout and the retry policy that they were enqueued with": [2]}


def _found(run: Run) -> dict[str, list[int]]:
    return {finding.what: finding.examples for finding in run.audit().findings}
