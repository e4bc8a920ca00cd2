"""The client: one task, pages of tasks, counts; in every state, filtered, in both orders, and after a lost connection."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from fastq.client import KINDS, STATES, Client, Kind, Order, State, TaskRecord
from fastq.errors import ConnectionLost, DatabaseError, SchemaError, SettingsError, TaskNotFound
from tests.support import clients
from tests.support.storage import Leader, Session, Worker, add_lane, delay, enqueue, reserve
from tests.support.waiting import wait_until


@pytest.fixture(params=clients.KINDS)
def client(request: pytest.FixtureRequest, dsn: str, migrated: str) -> Iterator[Client]:
    with clients.open_client(request.param, dsn, schema=migrated) as found:
        yield found


class Shop:
    """Tasks in every state, of two types in two queues."""

    def __init__(self, store: Session) -> None:
        mail = add_lane(store, "mail", "slow")
        self.completed = list(enqueue(store, 30, chunk=10))
        worker = Worker(store, 1)
        for chunk in worker.claim(30):
            worker.complete({chunk.no: chunk.ids or []})
        self.failed = list(enqueue(store, 3, lane=mail))
        [chunk] = worker.claim(3, (mail,))
        worker.fail(chunk.no, self.failed)
        self.retrying = list(enqueue(store, 2, lane=mail))
        [chunk] = worker.claim(2, (mail,))
        worker.fail(chunk.no, self.retrying, 60.0)
        self.running = list(enqueue(store, 4))
        worker.claim(4)
        self.ready = list(enqueue(store, 25, chunk=10)) + list(enqueue(store, 3, lane=mail))
        first = reserve(store, 5)
        self.scheduled = list(range(first, first + 5))
        delay(store, self.scheduled, 60.0)
        self.mail = {*self.failed, *self.retrying, *self.ready[-3:]}
        self.everything = sorted(
            self.completed + self.failed + self.retrying + self.running + self.ready + self.scheduled
        )

    def of(self, state: State | Kind) -> list[int]:
        """The ids that are in a state, in order."""
        by_state = {
            "pending": self.ready + self.scheduled + self.retrying,
            "running": self.running,
            "completed": self.completed,
            "failed": self.failed,
            "scheduled": self.scheduled,
            "retrying": self.retrying,
        }
        return sorted(by_state.get(state, []))


@pytest.fixture
def shop(store: Session) -> Shop:
    return Shop(store)


# --- one task ------------------------------------------------------------------------------------


def test_a_waiting_task(client: Client, store: Session) -> None:
    before = datetime.now(UTC)
    lane = add_lane(store, "email:send", "mail", 7)
    [id_] = enqueue(store, lane=lane, max_attempts=5, payload='{"to": "ü"}'.encode())
    record = client.get_task(id_)
    assert before - timedelta(minutes=1) < record.created_at < datetime.now(UTC) + timedelta(minutes=1)
    assert record == TaskRecord(
        id=id_,
        type="email:send",
        queue="mail",
        priority=7,
        payload={"to": "ü"},
        state="pending",
        kind=None,
        attempts=0,
        max_attempts=5,
        created_at=record.created_at,
        run_at=None,
        ended_at=None,
        errors=(),
    )
    assert record.created_at.tzinfo is UTC


def test_every_state_is_found(client: Client, shop: Shop) -> None:
    for state in STATES[:4]:
        for id_ in shop.of(state):
            assert client.get_task(id_).state == state
    for kind in KINDS:
        record = client.get_task(shop.of(kind)[0])
        assert (record.state, record.kind) == ("pending", kind)
        assert record.run_at is not None
        assert 30 < (record.run_at - datetime.now(UTC)).total_seconds() < 90
    running = client.get_task(shop.running[0])
    assert (running.attempts, running.ended_at) == (1, None)
    completed = client.get_task(shop.completed[0])
    assert (completed.attempts, completed.max_attempts, completed.errors) == (1, 3, ())
    assert completed.ended_at is not None
    assert completed.created_at <= completed.ended_at


def test_a_failed_task_has_its_attempts(client: Client, store: Session) -> None:
    [id_] = enqueue(store)
    worker, leader = Worker(store, 1), Leader(store)
    leader.tick()
    for _ in range(2):
        [chunk] = worker.claim(1)
        worker.fail(chunk.no, [id_], 0.0)
        leader.run("promote_tasks", 10, 0)
    worker.claim(1)
    worker.beat([id_])
    leader.declare_dead(worker)
    leader.rescue()
    record = client.get_task(id_)
    assert (record.state, record.attempts, record.max_attempts) == ("failed", 3, 3)
    assert record.errors is not None
    assert [(error.attempt, error.took, error.error.split(":")[0]) for error in record.errors] == [
        (1, 5e-6, "ValueError"),
        (2, 5e-6, "ValueError"),
        (3, None, "the worker was lost while the task ran (process 1 on host)"),
    ]
    assert [error.failed_at for error in record.errors] == sorted(error.failed_at for error in record.errors)


@pytest.mark.parametrize("id_", [0, -1, 999_999_999, 2**63 - 1, 2**63, 10**30])
def test_a_task_that_is_not_there(client: Client, shop: Shop, id_: int) -> None:
    assert id_ not in shop.everything
    with pytest.raises(TaskNotFound, match=f"no task {id_} in schema"):
        client.get_task(id_)


def test_ids_between_tasks_are_not_found(client: Client, store: Session) -> None:
    """The chunk that ends behind an id need not hold it, nor the row of completions that begins before it."""
    ids = enqueue(store, 20, chunk=10)
    worker = Worker(store, 1)
    worker.claim(10)
    worker.complete({1: [ids[0], ids[9]]})
    store.sql("DELETE FROM fastq.claim")
    for id_ in ids[1:9]:
        with pytest.raises(TaskNotFound):
            client.get_task(id_)
    assert client.get_task(ids[9]).state == "completed"
    assert client.get_task(ids[10]).state == "pending"


@pytest.mark.parametrize("id_", ["7", 7.0, None, True])
def test_an_id_is_a_whole_number(client: Client, id_: Any) -> None:
    with pytest.raises(SettingsError, match="id is"):
        client.get_task(id_)


def test_payloads_of_bytes(client: Client, store: Session) -> None:
    store.run("enqueue_tasks", 0, [7], [1], [3], ["b"], [b"\x00\xff"], [1], [3], [2], [7], [7], None, None)
    assert client.get_task(7).payload == b"\x00\xff"


def test_a_moving_task_is_always_in_one_state(dsn: str, store: Session, open_session: Callable[[], Session]) -> None:
    """One statement is one snapshot. Three found a task in no state half of the time."""
    ids = list(enqueue(store, 3, chunk=1, max_attempts=30_000))
    mover, leading = Worker(open_session(), 1), Leader(open_session())
    leading.tick()
    stopped = threading.Event()

    def move() -> int:
        moves = 0
        while not stopped.is_set():
            for chunk in mover.claim(3):
                taken = list(range(chunk.lo, chunk.upto + 1))
                if moves % 2:
                    assert mover.give_back({chunk.no: taken}) == {}
                else:
                    assert mover.fail(chunk.no, taken, 0.0) == []
                moves += 1
            leading.run("promote_tasks", 10, 0)
        return moves

    seen: list[str] = []
    with ThreadPoolExecutor(1) as pool, Client(dsn, schema=store.schema) as client:
        moving = pool.submit(move)
        try:
            for turn in range(100):
                seen.append(client.get_task(ids[turn % 3]).state)
                by_id, by_time = client.list_tasks(), client.list_tasks(order_by="created_at")
                assert sorted(task.id for task in by_id) == sorted(task.id for task in by_time) == ids
                assert sum(client.counts().values()) == 3
        finally:
            stopped.set()
        assert moving.result(30) > 20
    assert {"pending", "running"} == set(seen)


# --- pages ---------------------------------------------------------------------------------------


def all_ids(client: Client, **filters: Any) -> list[int]:
    """Page by page; fails on a page that is longer than its limit, or empty where more was promised."""
    ids: list[int] = []
    after: str | None = None
    while True:
        page = client.list_tasks(after=after, **filters)
        assert len(page) <= filters.get("limit", 50)
        assert len(page) > 0 or page.next is None
        ids += [task.id for task in page]
        if page.next is None:
            return ids
        after = page.next


@pytest.mark.parametrize("limit", [1, 7, 1000])
@pytest.mark.parametrize("order_by", ["id", "created_at"])
@pytest.mark.parametrize("descending", [True, False])
def test_pages_hold_every_task_once_in_order(
    client: Client, shop: Shop, *, limit: int, order_by: Order, descending: bool
) -> None:
    found = all_ids(client, limit=limit, order_by=order_by, descending=descending)
    # Here tasks were enqueued in the order of their ids.
    assert found == sorted(shop.everything, reverse=descending)


@pytest.mark.parametrize("state", [*STATES, *KINDS])
@pytest.mark.parametrize("order_by", ["id", "created_at"])
def test_a_list_of_one_state(client: Client, shop: Shop, state: State | Kind, order_by: Order) -> None:
    page = client.list_tasks(states=[state], order_by=order_by, descending=False)
    assert [task.id for task in page] == shop.of(state)
    assert {task.state for task in page} <= {"pending" if state in KINDS else state}


def test_a_list_of_several_states(client: Client, shop: Shop) -> None:
    found = all_ids(client, states=["running", "failed", "scheduled"], limit=5)
    assert sorted(found) == sorted(shop.running + shop.failed + shop.scheduled)
    assert all_ids(client, states=[]) == []


@pytest.mark.parametrize("order_by", ["id", "created_at"])
def test_filters_by_type_and_queue(client: Client, shop: Shop, order_by: Order) -> None:
    assert set(all_ids(client, types=["mail"], order_by=order_by, limit=3)) == shop.mail
    assert set(all_ids(client, queues=["slow"], order_by=order_by)) == shop.mail
    others = set(shop.everything) - shop.mail
    assert set(all_ids(client, types=["t", "nobody"], queues=["default"], order_by=order_by)) == others
    assert all_ids(client, types=["t"], queues=["slow"], order_by=order_by) == []
    assert all_ids(client, types=[], order_by=order_by) == []
    assert all_ids(client, types=["mail"], states=["completed"], order_by=order_by) == []


@pytest.mark.usefixtures("shop")
def test_a_list_shows_what_get_task_shows_but_the_errors(client: Client) -> None:
    for order_by in ("id", "created_at"):
        for record in client.list_tasks(limit=1000, order_by=order_by):
            one = client.get_task(record.id)
            assert record.errors is None
            assert one.errors is not None
            for name in TaskRecord.__dataclass_fields__:
                assert name == "errors" or getattr(record, name) == getattr(one, name)


def test_created_at_is_not_the_order_of_ids(client: Client, store: Session) -> None:
    """A producer that enqueues now and then takes its ids from a block that it reserved long ago."""
    slow = reserve(store, 1)
    quick = list(enqueue(store, 3))
    store.sql("UPDATE fastq.task SET created_at = created_at - interval '1 hour'")
    enqueue(store, 1, first=slow)
    assert all_ids(client, order_by="created_at") == [slow, *reversed(quick)]
    assert all_ids(client, order_by="created_at", descending=False, limit=2) == [*quick, slow]
    assert all_ids(client) == [*reversed(quick), slow]


def test_tasks_of_one_moment_are_ordered_by_id(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 20))
    assert len({task.created_at for task in client.list_tasks()}) == 1
    assert all_ids(client, order_by="created_at", limit=3) == ids[::-1]
    assert all_ids(client, order_by="created_at", limit=3, descending=False) == ids


@pytest.mark.parametrize("descending", [True, False])
def test_scattered_completions_are_listed_in_order(client: Client, store: Session, *, descending: bool) -> None:
    """A row of completions holds ids far apart, and others lie between them."""
    ids = list(enqueue(store, 2500))
    worker = Worker(store, 1)
    worker.claim(2500)
    for part in range(7):
        worker.complete({1: ids[part::14]})
        worker.complete({1: ids[part + 7 :: 14][::-1]})
    for limit in (50, 333):
        assert all_ids(client, order_by="id", limit=limit, descending=descending) == sorted(ids, reverse=descending)


def test_a_page_ends_inside_a_chunk_a_claim_and_a_row_of_completions(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 30, chunk=30))
    worker = Worker(store, 1)
    worker.claim(20)
    worker.complete({1: ids[:10]})
    for limit in (1, 4, 9, 10, 11):
        for descending in (True, False):
            found = all_ids(client, order_by="id", limit=limit, descending=descending)
            assert found == sorted(ids, reverse=descending)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": ["done"]}, "states is"),
        ({"states": "pending"}, "states is"),
        ({"types": "mail"}, "types is"),
        ({"queues": [7]}, "queues is"),
        ({"queues": ["a\0b"]}, "queues is"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 10_001}, "limit is 10001"),
        ({"limit": 2.5}, "limit is"),
        ({"order_by": "priority"}, "order_by is"),
        ({"after": "somewhere"}, "after is"),
        ({"after": "id-up-0-5"}, "after is"),
        ({"after": "created_at-down-0-5"}, "after is"),
        ({"after": "id-down-0-5", "order_by": "created_at"}, "after is"),
        ({"after": 5}, "after is"),
    ],
)
def test_arguments_that_make_no_sense(client: Client, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        client.list_tasks(**arguments)


# --- counts --------------------------------------------------------------------------------------


def test_counts(client: Client, shop: Shop) -> None:
    expected: dict[str, int] = {state: len(shop.of(state)) for state in STATES}
    assert client.counts() == expected
    assert list(client.counts()) == list(STATES)
    assert sum(client.counts().values()) == len(shop.everything)


def test_counts_of_some_states(client: Client, shop: Shop) -> None:
    wanted: Sequence[State | Kind] = ["scheduled", "retrying", "pending"]
    assert client.counts(states=wanted) == {"scheduled": 5, "retrying": 2, "pending": len(shop.of("pending"))}


def test_counts_by_type_and_queue(client: Client, shop: Shop) -> None:
    by_type, by_queue = client.counts("type"), client.counts(by="queue")
    assert set(by_type) == {"t", "mail"}
    assert by_type["mail"] == {"pending": 5, "running": 0, "completed": 0, "failed": 3, "cancelled": 0, "expired": 0}
    assert by_queue == {"default": by_type["t"], "slow": by_type["mail"]}
    assert sum(sum(numbers.values()) for numbers in by_type.values()) == len(shop.everything)


def test_counts_of_nothing(client: Client) -> None:
    assert client.counts() == dict.fromkeys(STATES, 0)
    assert client.counts("queue") == {}


def test_counts_split_by_something_else(client: Client) -> None:
    with pytest.raises(SettingsError, match="by is"):
        client.counts("priority")  # type: ignore[call-overload]
    with pytest.raises(SettingsError, match="states is"):
        client.counts(states=["gone"])  # type: ignore[list-item]


# --- connections ---------------------------------------------------------------------------------


def kill(store: Session, application: str) -> None:
    """Ends the sessions of that name, and waits until they are gone."""
    store.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", application)
    wait_until(lambda: store.sql("SELECT FROM pg_stat_activity WHERE application_name = $1", application) == [])


def wait_gone(store: Session, pid: int) -> None:
    wait_until(lambda: store.sql("SELECT FROM pg_stat_activity WHERE pid = $1", pid) == [])


def test_a_lost_connection_is_made_again(dsn: str, store: Session) -> None:
    name = f"client of {store.schema}"
    with Client(psycopg.conninfo.make_conninfo(dsn, application_name=name), schema=store.schema) as client:
        client.counts()
        kill(store, name)
        assert client.counts()["pending"] == 0


def test_a_connection_that_is_lost_again_and_again(
    dsn: str, store: Session, open_session: Callable[[], Session]
) -> None:
    name = f"client of {store.schema}"
    gate = open_session()
    with Client(psycopg.conninfo.make_conninfo(dsn, application_name=name), schema=store.schema) as client:
        client.counts()
        gate.begin()
        gate.sql("LOCK TABLE fastq.dead IN ACCESS EXCLUSIVE MODE")
        blocked = "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'"
        with ThreadPoolExecutor(1) as pool:
            counting = pool.submit(client.counts)
            for _ in range(2):
                [[pid]] = wait_until(lambda: store.sql(blocked, name))
                store.sql("SELECT pg_terminate_backend($1::integer)", pid)
                wait_gone(store, pid)
            with pytest.raises(ConnectionLost) as caught:
                counting.result(30)
        assert (caught.value.sqlstate, caught.value.is_transient) == ("57P01", True)
        gate.rollback()
        assert client.counts()["pending"] == 0


def test_a_closed_client_can_be_used_again(client: Client) -> None:
    client.counts()
    client.close()
    client.close()
    assert client.counts()["pending"] == 0


def test_threads_share_a_client(client: Client, shop: Shop) -> None:
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(client.get_task, shop.everything))
    assert [record.id for record in records] == shop.everything


def test_a_forked_child_makes_a_connection_of_its_own(dsn: str, migrated: str) -> None:
    with Client(dsn, schema=migrated) as client:
        client.counts()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if client.counts()["pending"] == 0 else 2
                client.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # The parent's connection is untouched.
        assert client._link._db is not None
        assert client._link._db.run("SELECT 1") == [(1,)]


def test_a_database_that_is_not_migrated(dsn: str, schema: str) -> None:
    with Client(dsn, schema=schema) as client, pytest.raises(SchemaError, match="not migrated"):
        client.counts()


def test_a_database_that_is_not_there(dsn: str) -> None:
    missing = psycopg.conninfo.make_conninfo(dsn, dbname="no_such_database")
    with Client(missing) as client, pytest.raises(DatabaseError, match="no_such_database") as caught:
        client.counts()
    assert caught.value.is_transient is False


def test_a_client_without_a_dsn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTQ_DSN", raising=False)
    with pytest.raises(SettingsError, match="FASTQ_DSN"):
        Client()
