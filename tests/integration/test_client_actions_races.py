"""What the client does to tasks that are being moved: by a claim, a result, a promotion, an upkeep, or another client.

Each race is forced by row locks: the one side has done its statement and not committed it, the other waits for its lock, then the first
commits or rolls back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest

from fastq import InvalidTransition, TaskNotFound, TaskRecord
from fastq.client import Client
from fastq.errors import ConnectionLost, DatabaseError, SettingsError
from tests.support import clients
from tests.support.producing import Background
from tests.support.storage import (
    Leader,
    Session,
    Worker,
    chunks_of,
    claims_of,
    delay,
    done_ids,
    enqueue,
    reserve,
    states,
)
from tests.support.waiting import wait_until

OpenSession = Callable[[], Session]
OpenClient = Callable[[], Client]


@pytest.fixture(params=clients.KINDS)
def open_client(request: pytest.FixtureRequest, dsn: str, migrated: str) -> Iterator[OpenClient]:
    with ExitStack() as stack:

        def opened() -> Client:
            client = stack.enter_context(clients.open_client(request.param, dsn, schema=migrated))
            client.counts()
            return client

        yield opened


@pytest.fixture
def client(open_client: OpenClient) -> Client:
    return open_client()


@pytest.fixture
def sync_client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture
def other(open_session: OpenSession) -> Session:
    """The session of whoever was first."""
    return open_session()


def pid_of(client: Client) -> int:
    assert client._link._db is not None
    return client._link._db._connection.info.backend_pid


def wait_for(client: Client, store: Session) -> None:
    """Until the client waits for a lock."""
    wait_until(
        lambda: store.value("SELECT cardinality(pg_blocking_pids($1::integer))", pid_of(client)) > 0,
        message="the client waits for a lock",
    )


@contextmanager
def waiting(client: Client, store: Session, call: Callable[[], Any]) -> Iterator[Background[Any]]:
    """The call in a thread of its own, once it waits for a lock."""
    background = Background(call)
    wait_for(client, store)
    yield background


def refused(call: Background[Any]) -> TaskRecord:
    with pytest.raises(InvalidTransition) as error:
        call.result()
    return error.value.task


# --- a claim in flight ---------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [10, 4], ids=["whole", "part"])
@pytest.mark.parametrize("action", ["cancel", "delete", "edit"])
def test_a_claim_in_flight_that_is_committed_comes_first(
    client: Client, store: Session, other: Session, action: str, taken: int
) -> None:
    ids = list(enqueue(store, 10))
    target, worker = ids[3], Worker(other, 1)
    other.begin()
    [chunk] = worker.claim(taken)
    calls: dict[str, Callable[[], object]] = {
        "cancel": lambda: client.cancel_task(target),
        "delete": lambda: client.delete_task(target),
        "edit": lambda: client.edit_task(target, payload="new"),
    }
    with waiting(client, store, calls[action]) as call:
        other.commit()
        if action == "cancel":
            assert call.result().state == "cancelled"
            assert worker.complete({chunk.no: ids[:taken]}) == {chunk.no: [target]}
        else:
            assert refused(call).state == "running"
            assert worker.complete({chunk.no: ids[:taken]}) == {}
    assert states(store) == dict.fromkeys(ids, "pending") | dict.fromkeys(ids[:taken], "completed") | (
        {target: "cancelled"} if action == "cancel" else {}
    )


@pytest.mark.parametrize("action", ["cancel", "delete", "edit"])
def test_a_claim_in_flight_that_is_rolled_back_never_was(
    client: Client, store: Session, other: Session, action: str
) -> None:
    ids = list(enqueue(store, 10))
    worker = Worker(other, 1)
    other.begin()
    worker.claim(4)
    calls: dict[str, Callable[[], object]] = {
        "cancel": lambda: client.cancel_task(ids[3]),
        "delete": lambda: client.delete_task(ids[3]),
        "edit": lambda: client.edit_task(ids[3], payload="new"),
    }
    with waiting(client, store, calls[action]) as call:
        other.rollback()
        call.result()
    chunks = worker.claim(20)
    claimed = {id_: payload for c in chunks for id_, payload in zip(c.ids or [], c.payloads or [], strict=True)}
    expected = dict.fromkeys(ids, b'{"n":1}') | {ids[3]: b'"new"'}
    if action != "edit":
        del expected[ids[3]]
    assert claimed == expected


@pytest.mark.parametrize("action", ["cancel", "delete", "edit"])
def test_a_claim_with_an_older_snapshot_takes_nothing_of_what_was_changed(
    client: Client, store: Session, request: pytest.FixtureRequest, action: str
) -> None:
    """It took the old payload after the edit was acknowledged, where the chunk was changed in place."""
    ids = list(enqueue(store, 10))
    let_go = request.getfixturevalue("late_claim")
    if action == "edit":
        client.edit_task(ids[0], payload="new")
    elif action == "cancel":
        client.cancel_task(ids[0])
    else:
        client.delete_task(ids[0])
    assert let_go() == []
    found = {i: p for c in Worker(store, 3).claim(20) for i, p in zip(c.ids or [], c.payloads or [], strict=True)}
    assert found == dict.fromkeys(ids[1:], b'{"n":1}') | ({ids[0]: b'"new"'} if action == "edit" else {})


def test_a_claim_passes_by_a_chunk_that_is_being_changed(
    store: Session, dsn: str, migrated: str, client: Client
) -> None:
    first, second = list(enqueue(store, 3)), list(enqueue(store, 3))
    with psycopg.connect(dsn) as connection:
        client.edit_task_tx(connection, first[1], payload="new")
        [chunk] = Worker(store, 1).claim(10)
        assert chunk.ids == second
        connection.commit()
    found = [(c.ids, c.payloads) for c in Worker(store, 2).claim(10)]
    assert sorted(i for ids, _ in found for i in ids or []) == first
    assert ([first[1]], [b'"new"']) in found


# --- a result in flight --------------------------------------------------------------------------


def test_a_completion_in_flight_comes_first(client: Client, store: Session, other: Session) -> None:
    ids = list(enqueue(store, 4))
    worker = Worker(other, 1)
    [chunk] = worker.claim(4)
    other.begin()
    worker.complete({chunk.no: ids[:2]})
    with waiting(client, store, lambda: client.cancel_task(ids[1])) as call:
        other.commit()
        assert refused(call).state == "completed"
    assert done_ids(store) == ids[:2]
    assert claims_of(store) == {(1, chunk.no): ids[2:]}


@pytest.mark.parametrize("flushed", [2, 4], ids=["part", "whole"])
def test_a_completion_that_is_rolled_back_comes_too_late(
    client: Client, store: Session, other: Session, flushed: int
) -> None:
    ids = list(enqueue(store, 4))
    worker = Worker(other, 1)
    [chunk] = worker.claim(4)
    other.begin()
    worker.complete({chunk.no: ids[:flushed]})
    with waiting(client, store, lambda: client.cancel_task(ids[1])) as call:
        other.rollback()
        assert call.result().state == "cancelled"
    assert worker.complete({chunk.no: ids}) == {chunk.no: [ids[1]]}
    assert done_ids(store) == [ids[0], *ids[2:]]


def test_a_completion_that_waits_for_a_cancel_is_refused_its_part(
    client: Client, store: Session, other: Session, dsn: str
) -> None:
    """Between claim and completion: the cancel holds the claim, the flush waits and decides on what is left."""
    ids = list(enqueue(store, 4))
    worker = Worker(other, 1)
    [chunk] = worker.claim(4)
    with psycopg.connect(dsn) as connection:
        client.cancel_task_tx(connection, ids[2])
        flush = Background(lambda: worker.complete({chunk.no: ids}))
        wait_until(lambda: store.value("SELECT cardinality(pg_blocking_pids($1::integer))", other.pid) > 0)
        connection.commit()
        assert flush.result() == {chunk.no: [ids[2]]}
    assert done_ids(store) == [ids[0], ids[1], ids[3]]
    assert states(store)[ids[2]] == "cancelled"


def test_a_failure_in_flight_that_is_to_be_retried_is_cancelled_where_it_waits(
    client: Client, store: Session, other: Session
) -> None:
    """It moved backwards, behind what was looked at first: it is looked for again."""
    ids = list(enqueue(store, 4))
    worker = Worker(other, 1)
    [chunk] = worker.claim(4)
    other.begin()
    worker.fail(chunk.no, ids[:2], 60.0)
    with waiting(client, store, lambda: client.cancel_task(ids[1])) as call:
        other.commit()
        record = call.result()
    assert (record.state, record.attempts, len(record.errors)) == ("cancelled", 1, 1)
    assert states(store) == {ids[0]: "pending", ids[1]: "cancelled", ids[2]: "running", ids[3]: "running"}


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_tasks_given_back_in_flight_are_cancelled_where_they_wait(
    client: Client, store: Session, other: Session, *, many: bool
) -> None:
    ids = list(enqueue(store, 4))
    worker = Worker(other, 1)
    [chunk] = worker.claim(4)
    other.begin()
    worker.give_back({chunk.no: ids})
    with waiting(
        client, store, lambda: client.cancel_tasks(ids=ids[1:3]) if many else client.cancel_task(ids[1])
    ) as call:
        other.commit()
        call.result()
    left = [ids[0], ids[3]] if many else [ids[0], *ids[2:]]
    assert [i for c in worker.claim(10) for i in c.ids or []] == left


def test_a_rescue_in_flight(client: Client, store: Session, other: Session) -> None:
    ids = list(enqueue(store, 4))
    worker, leader = Worker(store, 1), Leader(other)
    worker.claim(4)
    leader.tick()
    leader.declare_dead(worker)
    other.begin()
    leader.rescue()
    with waiting(client, store, lambda: client.cancel_task(ids[1])) as call:
        other.commit()
        assert call.result().state == "cancelled"
    assert [(lo, hi) for *_, lo, hi in sorted(chunks_of(store), key=lambda c: c[3])] == [
        (ids[0], ids[0]),
        (ids[2], ids[3]),
    ]


# --- a promotion in flight, and upkeep -----------------------------------------------------------


def due_task(store: Session) -> int:
    id_ = reserve(store, 1)
    delay(store, [id_], 0.0)
    return id_


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("action", ["cancel", "delete", "edit"])
def test_a_promotion_in_flight(client: Client, store: Session, other: Session, action: str, *, committed: bool) -> None:
    """Delayed or ready, it is found and changed; and no second copy of it is there."""
    id_ = due_task(store)
    leader = Leader(other)
    leader.tick()
    other.begin()
    assert leader.one("promote_tasks", 10, 0)[0] == 1
    calls: dict[str, Callable[[], object]] = {
        "cancel": lambda: client.cancel_task(id_),
        "delete": lambda: client.delete_task(id_),
        "edit": lambda: client.edit_task(id_, payload="new"),
    }
    with waiting(client, store, calls[action]) as call:
        other.commit() if committed else other.rollback()
        call.result()
    leader.one("promote_tasks", 10, 0)
    claimed = [(c.ids, c.payloads) for c in Worker(store, 1).claim(10)]
    assert claimed == ([([id_], [b'"new"'])] if action == "edit" else [])
    assert states(store) == {"cancel": {id_: "cancelled"}, "delete": {}, "edit": {id_: "running"}}[action]


def test_a_promotion_passes_by_a_task_that_is_being_cancelled(client: Client, store: Session, dsn: str) -> None:
    id_ = due_task(store)
    leader = Leader(store)
    leader.tick()
    with psycopg.connect(dsn) as connection:
        assert client.cancel_task_tx(connection, id_).state == "cancelled"
        assert leader.one("promote_tasks", 10, 0)[0] == 0
        connection.rollback()
    assert leader.one("promote_tasks", 10, 0)[0] == 1
    assert client.get_task(id_).state == "pending"


@pytest.mark.parametrize("action", ["cancel", "edit"])
def test_a_leaf_that_is_emptied_meanwhile_takes_no_content_along(
    client: Client, store: Session, other: Session, action: str
) -> None:
    """The row that waits for its lock names the old leaf; what the lock finds has its content with it."""
    ids = list(enqueue(store, 2))
    worker, leader = Worker(store, 1), Leader(other)
    leader.tick()
    [chunk] = worker.claim(2)
    worker.fail(chunk.no, ids, 60.0)
    assert leader.one("open_leaf", 0.0) == (1,)
    other.begin()
    assert leader.one("carry_delayed", 0, 10) == (2, 0)
    call = (lambda: client.cancel_task(ids[0])) if action == "cancel" else (lambda: client.edit_task(ids[0], delay=5))
    with waiting(client, store, call) as call_:
        other.commit()
        assert call_.result().payload == {"n": 1}
    assert leader.empty_leaf(0)
    assert [client.get_task(id_).payload for id_ in ids] == [{"n": 1}, {"n": 1}]


def test_chunks_that_move_to_another_leaf_in_flight(client: Client, store: Session, other: Session) -> None:
    ids = list(enqueue(store, 3))
    leader = Leader(other)
    leader.tick()
    assert leader.one("open_leaf", 0.0) == (1,)
    other.begin()
    assert leader.one("move_chunks", 0, 10) == (1, 3)
    with waiting(client, store, lambda: client.edit_task(ids[1], payload="new")) as call:
        other.commit()
        assert call.result().payload == "new"
    assert leader.empty_leaf(0)
    found = {i: p for c in Worker(store, 1).claim(9) for i, p in zip(c.ids or [], c.payloads or [], strict=True)}
    assert found == dict.fromkeys(ids, b'{"n":1}') | {ids[1]: b'"new"'}


# --- two clients ---------------------------------------------------------------------------------


def make(store: Session, place: str) -> int:
    if place == "scheduled":
        id_ = reserve(store, 1)
        delay(store, [id_], 60.0)
        return id_
    ids = list(enqueue(store, 3))
    if place != "ready":
        worker = Worker(store, 1)
        [chunk] = worker.claim(3)
        if place == "failed":
            worker.fail(chunk.no, ids)
        elif place == "completed":
            worker.complete({chunk.no: ids})
    return ids[1]


@pytest.mark.parametrize("place", ["ready", "scheduled", "running", "failed"])
def test_two_cancels_at_once(client: Client, store: Session, dsn: str, place: str) -> None:
    id_ = make(store, place)
    with psycopg.connect(dsn) as connection:
        first = client.cancel_task_tx(connection, id_)
        with waiting(client, store, lambda: client.cancel_task(id_)) as call:
            connection.commit()
            assert call.result() == first
    assert first.state == "cancelled"
    assert store.value("SELECT count(*) FROM fastq.dead WHERE id = $1", id_) == 1


@pytest.mark.parametrize("place", ["ready", "scheduled", "running", "failed"])
def test_a_cancel_beside_one_that_is_rolled_back(client: Client, store: Session, dsn: str, place: str) -> None:
    id_ = make(store, place)
    with psycopg.connect(dsn) as connection:
        client.cancel_task_tx(connection, id_)
        with waiting(client, store, lambda: client.cancel_task(id_)) as call:
            connection.rollback()
            assert call.result().state == "cancelled"
    assert states(store)[id_] == "cancelled"


@pytest.mark.parametrize("place", ["ready", "scheduled", "completed", "failed"])
def test_a_cancel_an_edit_or_a_retry_of_what_is_deleted_meanwhile(
    client: Client, store: Session, dsn: str, place: str
) -> None:
    id_ = make(store, place)
    call_of: dict[str, Callable[[], object]] = {
        "ready": lambda: client.edit_task(id_, payload=1),
        "scheduled": lambda: client.cancel_task(id_),
        "completed": lambda: client.delete_task(id_),
        "failed": lambda: client.retry_task(id_),
    }
    with psycopg.connect(dsn) as connection:
        client.delete_task_tx(connection, id_)
        with waiting(client, store, call_of[place]) as call:
            connection.commit()
            with pytest.raises(TaskNotFound):
                call.result()


def test_two_tasks_of_one_flush_deleted_at_once(client: Client, store: Session, dsn: str) -> None:
    """Also where the first one's deletion moves the row to another `lo`: it is looked for again."""
    ids = list(enqueue(store, 3))
    worker = Worker(store, 1)
    [chunk] = worker.claim(3)
    worker.complete({chunk.no: ids})
    with psycopg.connect(dsn) as connection:
        client.delete_task_tx(connection, ids[0])
        with waiting(client, store, lambda: client.delete_task(ids[1])) as call:
            connection.commit()
            call.result()
    assert store.sql("SELECT lo FROM fastq.done") == [(ids[2],)]
    assert done_ids(store) == [ids[2]]


def test_two_retries_at_once_make_one_task(client: Client, store: Session, dsn: str) -> None:
    id_ = make(store, "failed")
    with psycopg.connect(dsn) as connection:
        client.retry_task_tx(connection, id_)
        with waiting(client, store, lambda: client.retry_task(id_)) as call:
            connection.commit()
            assert refused(call).state == "pending"
    assert store.value("SELECT count(*) FROM fastq.delayed WHERE id = $1", id_) == 1


def test_many_at_once_by_two_clients(open_client: OpenClient, store: Session) -> None:
    """Each task is cancelled by one of them, and neither waits for the other for ever."""
    ids = [*enqueue(store, 2000, chunk=7), *enqueue(store, 1000, chunk=1)]
    Worker(store, 1).claim(300)
    clients = [open_client(), open_client()]
    calls = [Background(lambda c=c: c.cancel_tasks(types=["t"])) for c in clients]  # type: ignore[misc]
    assert sum(call.result(60) for call in calls) == len(ids)
    assert set(states(store).values()) == {"cancelled"}


# --- in the user's transaction -------------------------------------------------------------------


def test_all_of_it_is_the_users_transaction(sync_client: Client, store: Session, dsn: str) -> None:
    ready = make(store, "ready")
    worker = Worker(store, 2)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("BEGIN")
        assert sync_client.edit_task_tx(connection, ready, payload="new").payload == "new"
        assert sync_client.cancel_task_tx(connection, ready).state == "cancelled"
        again = sync_client.retry_task_tx(connection, ready)
        assert (again.state, again.payload) == ("pending", "new")
        sync_client.delete_task_tx(connection, ready)
        with pytest.raises(TaskNotFound):
            sync_client.cancel_task_tx(connection, ready)
        connection.rollback()
        assert sync_client.get_task(ready).payload == {"n": 1}
        assert len([i for c in worker.claim(9) for i in c.ids or []]) == 3
        with connection.transaction():
            assert sync_client.cancel_task_tx(connection, ready).state == "cancelled"
            with pytest.raises(InvalidTransition):
                sync_client.edit_task_tx(connection, ready, delay=1)
            assert connection.execute("SELECT 1").fetchone() == (1,), "a refusal aborts nothing"
        assert sync_client.get_task(ready).state == "cancelled"


def test_connections_that_can_not_be_used(sync_client: Client, store: Session, dsn: str, migrated: str) -> None:
    id_ = make(store, "ready")
    with psycopg.connect(dsn, autocommit=True) as connection:
        with pytest.raises(SettingsError, match="autocommit and in no transaction"):
            sync_client.cancel_task_tx(connection, id_)
        with connection.transaction(), pytest.raises(SettingsError, match="whole number"):
            sync_client.cancel_task_tx(connection, "1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a psycopg\.Connection is wanted, not str"):
        sync_client.cancel_task_tx("connection", id_)  # type: ignore[arg-type]
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        connection.row_factory = psycopg.rows.dict_row  # type: ignore[assignment]
        assert sync_client.cancel_task_tx(connection, id_).state == "cancelled"
    assert sync_client.get_task(id_).state == "cancelled"


# --- a connection that is lost -------------------------------------------------------------------


def kill(client: Client, store: Session) -> None:
    store.sql("SELECT pg_terminate_backend($1::integer)", pid_of(client))


def test_a_connection_that_was_lost_while_idle_is_made_again(client: Client, store: Session) -> None:
    id_ = make(store, "ready")
    kill(client, store)
    assert client.cancel_task(id_).state == "cancelled"
    kill(client, store)
    assert client.retry_tasks(ids=[id_]) == 1


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_a_commit_in_doubt_is_repeated_only_where_it_comes_to_the_same(
    client: Client, store: Session, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    id_ = make(store, "ready" if action == "cancel" else "failed")
    link = type(client._link)
    run = link._take_once
    lost = [True]

    def cut() -> None:
        if lost and lost.pop():
            raise ConnectionLost("cut", in_doubt=True)

    def once(self: Any, turn: Any) -> Any:
        answer = run(self, turn)
        cut()
        return answer

    async def aonce(self: Any, turn: Any) -> Any:
        answer: Any = await run(self, turn)
        cut()
        return answer

    monkeypatch.setattr(link, "_take_once", aonce if inspect.iscoroutinefunction(run) else once)
    if action == "cancel":
        assert client.cancel_task(id_).state == "cancelled"
    else:
        with pytest.raises(ConnectionLost) as error:
            client.retry_task(id_)
        assert error.value.in_doubt
    monkeypatch.undo()
    assert client.get_task(id_).state == ("cancelled" if action == "cancel" else "pending")


def test_a_server_that_refuses_is_said(client: Client, store: Session) -> None:
    id_ = make(store, "ready")
    store.sql("ALTER TABLE fastq.dead ADD CONSTRAINT none CHECK (id <> $1)".replace("$1", str(id_)))
    with pytest.raises(DatabaseError, match="none") as error:
        client.cancel_task(id_)
    assert error.value.sqlstate == "23514"
    assert client.get_task(id_).state == "pending"
