"""What the client does to tasks: cancel, retry, delete, edit, in each state, one at a time and many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
import pytest

from fastq import InvalidTransition, Producer, Task, TaskNotFound
from fastq._actions import Action
from fastq.client import STATES, Client
from fastq.errors import PayloadError, SettingsError
from tests.support import clients
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.lab import Runs
from tests.support.storage import (
    Leader,
    Session,
    Worker,
    add_lane,
    chunks_of,
    claims_of,
    delay,
    done_ids,
    enqueue,
    reserve,
    states,
)
from tests.support.waiting import wait_until

#: What is done when no test says otherwise.
ACTIONS: Final[dict[Action, Callable[[Client, int], object]]] = {
    "cancel": lambda client, id_: client.cancel_task(id_),
    "retry": lambda client, id_: client.retry_task(id_),
    "delete": lambda client, id_: client.delete_task(id_),
    "edit": lambda client, id_: client.edit_task(id_, payload={"n": 2}),
}
#: The table of moves: from each place, to which state and kind each action leads; None: refused; "gone": deleted.
TABLE: Final[dict[str, dict[Action, tuple[str, str | None] | str | None]]] = {
    "ready": {"cancel": ("cancelled", None), "retry": None, "delete": "gone", "edit": ("pending", None)},
    "scheduled": {"cancel": ("cancelled", None), "retry": None, "delete": "gone", "edit": ("pending", "scheduled")},
    "retrying": {"cancel": ("cancelled", None), "retry": None, "delete": "gone", "edit": ("pending", "retrying")},
    "running": {"cancel": ("cancelled", None), "retry": None, "delete": None, "edit": None},
    "completed": {"cancel": None, "retry": None, "delete": "gone", "edit": None},
    "failed": {"cancel": ("cancelled", None), "retry": ("pending", "retrying"), "delete": "gone", "edit": None},
    "expired": {"cancel": ("cancelled", None), "retry": ("pending", "retrying"), "delete": "gone", "edit": None},
    "cancelled": {"cancel": ("cancelled", None), "retry": ("pending", "retrying"), "delete": "gone", "edit": None},
}


@pytest.fixture(params=clients.KINDS)
def client(request: pytest.FixtureRequest, dsn: str, migrated: str) -> Iterator[Client]:
    with clients.open_client(request.param, dsn, schema=migrated) as found:
        yield found


class Places:
    """Makes a task that is in a place, between two others that are alike and must stay as they are."""

    def __init__(self, store: Session) -> None:
        self.store = store
        self.worker = Worker(store, 1)

    def make(self, place: str) -> int:
        if place == "scheduled":
            first = reserve(self.store, 3)
            delay(self.store, range(first, first + 3), 60.0)
            return first + 1
        ids = list(enqueue(self.store, 3))
        if place == "ready":
            return ids[1]
        [chunk] = self.worker.claim(3)
        if place == "completed":
            self.worker.complete({chunk.no: ids})
        elif place != "running":
            self.worker.fail(chunk.no, ids, 60.0 if place == "retrying" else None)
        if place in ("cancelled", "expired"):
            # Nothing expires yet: the row is what counts.
            self.store.sql("UPDATE fastq.dead SET state = $1 WHERE id = ANY ($2)", place, ids)
        return ids[1]


@pytest.fixture
def places(store: Session) -> Places:
    return Places(store)


def tokens(store: Session) -> list[tuple[str, int]]:
    return [(token, id_) for token, id_ in store.sql("SELECT token, id FROM fastq.token ORDER BY token")]


def add_token(store: Session, id_: int, token: str) -> None:
    store.run("insert_tokens", ["t"], [token], [id_])


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("place", TABLE)
def test_each_action_in_each_state(client: Client, store: Session, places: Places, place: str, action: Action) -> None:
    id_ = places.make(place)
    before, others = client.get_task(id_), {i: client.get_task(i) for i in (id_ - 1, id_ + 1)}
    expected = TABLE[place][action]
    if expected is None:
        with pytest.raises(InvalidTransition, match=f"task {id_} is {before.state} and can't be") as error:
            ACTIONS[action](client, id_)
        assert error.value.task == client.get_task(id_) == before
    else:
        answer = ACTIONS[action](client, id_)
        if expected == "gone":
            assert answer is None
            with pytest.raises(TaskNotFound):
                client.get_task(id_)
            assert store.sql("SELECT FROM fastq.task WHERE id = $1", id_) == [], "its payload is still there"
            assert store.sql("SELECT FROM fastq.attempt_error WHERE id = $1", id_) == []
        else:
            after = client.get_task(id_)
            assert answer == after
            assert (after.state, after.kind) == expected
            assert (after.type, after.queue, after.created_at) == (before.type, before.queue, before.created_at)
            assert (after.attempts, after.errors) == (before.attempts, before.errors), "history is kept"
            assert after.payload == ({"n": 2} if action == "edit" else {"n": 1})
            if (place, action) == ("cancelled", "cancel"):
                assert after == before
    assert {i: client.get_task(i) for i in others} == others, "its neighbours are as they were"
    assert set(states(store)) == {*others} | ({id_} if expected != "gone" else set())


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("id_", [0, -1, 999_999_999, 2**63 - 1, 2**63, 10**30])
def test_a_task_that_is_not_there(client: Client, places: Places, action: Action, id_: int) -> None:
    places.make("ready")
    with pytest.raises(TaskNotFound, match=f"no task {id_} in schema"):
        ACTIONS[action](client, id_)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("id_", ["1", 1.0, None, True])
def test_an_id_is_a_whole_number(client: Client, action: Action, id_: Any) -> None:
    with pytest.raises(SettingsError, match="must be a whole number"):
        ACTIONS[action](client, id_)


# --- cancel --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 4, 9])
def test_a_chunk_is_split_around_a_cancelled_task(client: Client, store: Session, index: int) -> None:
    """Its pieces keep their place, all else of it is claimed, and the cancelled one is not."""
    first = enqueue(store, 5)
    ids = enqueue(store, 10)
    last = enqueue(store, 5)
    [[rid]] = store.sql("SELECT rid FROM fastq.ready WHERE hi = $1", ids[-1])
    client.cancel_task(ids[index])
    pieces = [(lo, hi) for r, lo, hi in store.sql("SELECT rid, lo, hi FROM fastq.ready ORDER BY lo") if r == rid]
    whole = [(ids[0], ids[index] - 1), (ids[index] + 1, ids[9])]
    assert pieces == [(lo, hi) for lo, hi in whole if lo <= hi]
    claimed = [id_ for chunk in Worker(store, 1).claim(20) for id_ in chunk.ids or []]
    assert sorted(claimed) == sorted({*first, *ids, *last} - {ids[index]})
    assert claimed[:5] == list(first)
    assert claimed[-5:] == list(last)
    assert states(store)[ids[index]] == "cancelled"


def test_a_chunk_that_was_shrunk_is_split_as_it_is(client: Client, store: Session) -> None:
    ids = enqueue(store, 10)
    worker = Worker(store, 1)
    worker.claim(4)
    client.cancel_task(ids[4])
    client.cancel_task(ids[9])
    assert [(lo, hi) for *_, lo, hi in chunks_of(store)] == [(ids[5], ids[8])]
    assert list(claims_of(store).values()) == [list(ids[:4])]


def test_a_late_result_of_a_cancelled_task_is_refused(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 4))
    worker = Worker(store, 1)
    [chunk] = worker.claim(4)
    record = client.cancel_task(ids[1])
    assert (record.state, record.attempts, record.payload) == ("cancelled", 1, {"n": 1})
    assert record.ended_at is not None
    assert claims_of(store) == {(1, chunk.no): [ids[0], ids[2], ids[3]]}
    assert worker.complete({chunk.no: ids[:2]}) == {chunk.no: [ids[1]]}
    assert worker.fail(chunk.no, [ids[1]]) == [ids[1]]
    assert worker.give_back({chunk.no: [ids[1]]}) == {chunk.no: [ids[1]]}
    for id_ in ids[2:]:
        client.cancel_task(id_)
    assert claims_of(store) == {}, "an empty claim goes"
    assert states(store) == {ids[0]: "completed", ids[1]: "cancelled", ids[2]: "cancelled", ids[3]: "cancelled"}


def test_the_result_of_a_handler_that_was_cancelled_is_refused(
    client: Client, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    runs = Runs()
    with Producer(dsn, schema=migrated) as producer:
        consumer = new_consumer(dsn, migrated, concurrency=2)
        consumer.handler("t")(runs)
        consumer.start()
        try:
            id_ = producer.enqueue(Task("t", "hold")).id
            wait_until(lambda: runs.ids == [id_])
            assert client.cancel_task(id_).state == "cancelled"
            runs.release.set()
            wait_until(lambda: consumer.stats()["refused"] == 1, message="the result is refused")
            producer.enqueue(Task("t"))
            wait_for_states(db, {"cancelled": 1, "completed": 1})
        finally:
            runs.release.set()
            consumer.stop()
    assert client.get_task(id_).state == "cancelled"


def test_a_cancelled_task_keeps_its_token(client: Client, dsn: str, migrated: str) -> None:
    with Producer(dsn, schema=migrated) as producer:
        first = producer.enqueue(Task("t", idempotency_token="a"))
        client.cancel_task(first.id)
        assert producer.enqueue(Task("t", idempotency_token="a")) == (first.id, False)


# --- retry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attempts", "most"), [(3, 3), (1, 3), (32_767, 32_767)])
def test_a_retry_grants_an_attempt_where_none_is_left(
    client: Client, store: Session, places: Places, attempts: int, most: int
) -> None:
    id_ = places.make("failed")
    store.sql("UPDATE fastq.dead SET attempts = $1, max_attempts = $2 WHERE id = $3", attempts, most, id_)
    record = client.retry_task(id_)
    assert record.attempts < record.max_attempts
    assert record.max_attempts == min(max(most, attempts + 1), 32_767)


def test_a_retried_task_runs(client: Client, store: Session, places: Places) -> None:
    """Also where the leaf that is open still holds its content."""
    id_ = places.make("failed")
    client.retry_task(id_)
    leader = Leader(store)
    leader.tick()
    assert leader.one("promote_tasks", 10, 0)[0] == 1
    [chunk] = places.worker.claim(10)
    assert (chunk.ids, chunk.payloads, chunk.attempts) == ([id_], [b'{"n":1}'], 1)
    places.worker.complete({chunk.no: [id_]})
    record = client.get_task(id_)
    assert (record.state, record.attempts) == ("completed", 2)
    assert [error.attempt for error in record.errors or ()] == [1]


def test_a_retry_of_a_task_whose_leaf_was_emptied(client: Client, store: Session, places: Places) -> None:
    id_ = places.make("failed")
    before = client.get_task(id_)
    store.sql("UPDATE fastq.leaf SET opened_at = opened_at - interval '1 day'")
    leader = Leader(store)
    leader.tick()
    leader.run("open_leaf", 1.0)
    assert leader.empty_leaf(0)
    assert store.sql("SELECT FROM fastq.task") == []
    record = client.retry_task(id_)
    assert (record.payload, record.created_at) == (before.payload, before.created_at)
    assert leader.one("promote_tasks", 10, 1)[0] == 1
    [chunk] = places.worker.claim(10)
    assert (chunk.ids, chunk.payloads, chunk.leaf) == ([id_], [b'{"n":1}'], 1)


def test_a_retried_task_does_not_expire_at_once(client: Client, store: Session, places: Places) -> None:
    id_ = places.make("expired")
    store.sql("UPDATE fastq.dead SET expires_at = clock_timestamp() - interval '1 second'")
    client.retry_task(id_)
    assert store.value("SELECT expires_at FROM fastq.delayed") is None


def test_what_was_cancelled_while_it_ran_can_be_retried_while_it_still_runs(client: Client, store: Session) -> None:
    """The old run's result is refused, the new one's counts."""
    [id_] = enqueue(store)
    old, new, leader = Worker(store, 1), Worker(store, 2), Leader(store)
    [first] = old.claim(1)
    client.cancel_task(id_)
    client.retry_task(id_)
    leader.tick()
    leader.run("promote_tasks", 10, 0)
    [second] = new.claim(1)
    assert old.complete({first.no: [id_]}) == {first.no: [id_]}
    assert new.complete({second.no: [id_]}) == {}
    assert client.get_task(id_).attempts == 2


# --- delete --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [place for place, moves in TABLE.items() if moves["delete"] == "gone"])
def test_a_deleted_task_frees_its_token_and_no_other(
    client: Client, store: Session, places: Places, place: str
) -> None:
    id_ = places.make(place)
    add_token(store, id_, "mine")
    add_token(store, id_ + 1, "another's")
    client.delete_task(id_)
    assert tokens(store) == [("another's", id_ + 1)]


def test_a_refused_deletion_frees_no_token(client: Client, store: Session, places: Places) -> None:
    id_ = places.make("running")
    add_token(store, id_, "mine")
    with pytest.raises(InvalidTransition):
        client.delete_task(id_)
    assert tokens(store) == [("mine", id_)]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])
def test_completed_tasks_of_one_flush_are_deleted_one_by_one(client: Client, store: Session, order: list[int]) -> None:
    """Look-ups and lists find what is left by the first id of its row."""
    ids = list(enqueue(store, 4))
    worker = Worker(store, 1)
    [chunk] = worker.claim(4)
    worker.complete({chunk.no: ids})
    store.sql("UPDATE fastq.done SET took_us = 400")
    left = list(ids)
    for index in order:
        client.delete_task(ids[index])
        left.remove(ids[index])
        assert done_ids(store) == left
        assert store.sql("SELECT took_us, lo FROM fastq.done") == ([(100 * len(left), left[0])] if left else [])
        assert [task.id for task in client.list_tasks(order_by="id", descending=False)] == left
        assert [client.get_task(id_).state for id_ in left] == ["completed"] * len(left)


# --- edit ----------------------------------------------------------------------------------------


def test_an_edited_task_runs_with_its_new_payload_in_its_old_place(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 5))
    later = list(enqueue(store, 2))
    record = client.edit_task(ids[2], payload=b"\0raw")
    assert (record.payload, record.state) == (b"\0raw", "pending")
    chunks = Worker(store, 1).claim(10)
    assert [id_ for chunk in chunks for id_ in chunk.ids or []][-2:] == later
    found = {
        id_: (format_, payload)
        for chunk in chunks
        for id_, format_, payload in zip(chunk.ids or [], chunk.formats or [], chunk.payloads or [], strict=True)
    }
    assert found.pop(ids[2]) in (("b", b"\0raw"), (b"b", b"\0raw"))
    assert {payload for _, payload in found.values()} == {b'{"n":1}'}


@pytest.mark.parametrize("place", ["ready", "scheduled", "retrying"])
def test_a_waiting_task_is_given_another_time(client: Client, store: Session, places: Places, place: str) -> None:
    id_ = places.make(place)
    wanted = datetime.now(UTC) + timedelta(hours=3)
    record = client.edit_task(id_, run_at=wanted)
    assert (record.state, record.kind, record.run_at, record.payload) == ("pending", "scheduled", wanted, {"n": 1})
    record = client.edit_task(id_, delay=timedelta(hours=1), payload="new")
    assert record.run_at is not None
    assert timedelta(minutes=59) < record.run_at - datetime.now(UTC) < timedelta(minutes=61)
    record = client.edit_task(id_, delay=0)
    leader = Leader(store)
    leader.tick()
    assert leader.one("promote_tasks", 10, 0)[0] == 1
    chunks = places.worker.claim(10)
    assert [chunk.payloads for chunk in chunks if chunk.ids == [id_]] == [[b'"new"']]


def test_a_time_gone_by_leaves_a_ready_task_ready(client: Client, store: Session, places: Places) -> None:
    id_ = places.make("ready")
    record = client.edit_task(id_, run_at=datetime.now(UTC) - timedelta(days=1))
    assert (record.state, record.kind) == ("pending", None)
    assert [id_ for chunk in places.worker.claim(3) for id_ in chunk.ids or []] == [id_ - 1, id_, id_ + 1]


def test_content_moves_on_as_it_was_edited(client: Client, store: Session, places: Places) -> None:
    """What waits when its leaf has to go takes the new payload along, from wherever it is."""
    retrying, ready = places.make("retrying"), places.make("ready")
    for id_ in (ready, retrying):
        client.edit_task(id_, payload="new")
    store.sql("UPDATE fastq.leaf SET opened_at = opened_at - interval '1 day'")
    leader = Leader(store)
    leader.tick()
    leader.run("open_leaf", 1.0)
    leader.run("move_chunks", 0, 100)
    leader.run("carry_delayed", 0, 100)
    assert leader.empty_leaf(0)
    assert [client.get_task(id_).payload for id_ in (ready, retrying)] == ["new", "new"]
    assert client.edit_task(retrying, payload="newer").payload == "newer"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, SettingsError, "nothing to change"),
        ({"payload": float("nan")}, PayloadError, "NaN|nan"),
        ({"payload": "x" * (1024 * 1024)}, PayloadError, "1,048,578 bytes"),
        ({"payload": object()}, PayloadError, "object"),
        ({"delay": -1}, SettingsError, "delay"),
        ({"delay": "soon"}, TypeError, "delay"),
        ({"run_at": datetime(2030, 1, 1)}, SettingsError, "naive"),  # noqa: DTZ001
        ({"run_at": 5}, TypeError, "run_at"),
    ],
)
def test_what_no_task_can_have(
    client: Client, places: Places, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    id_ = places.make("ready")
    with pytest.raises(error, match=message):
        client.edit_task(id_, **change)
    with pytest.raises(error, match=message):
        client.edit_tasks(ids=[id_], **change)
    assert client.get_task(id_).payload == {"n": 1}


# --- many ----------------------------------------------------------------------------------------


class Mixed:
    """Three tasks in each place, and others of another type and queue."""

    def __init__(self, store: Session) -> None:
        made = Places(store)
        self.by_place: dict[str, list[int]] = {}
        for place in [place for place in TABLE if place not in ("ready", "running")] + ["running", "ready"]:
            middle = made.make(place)
            self.by_place[place] = [middle - 1, middle, middle + 1]
        self.mail = list(enqueue(store, 1200, lane=add_lane(store, "mail", "slow")))

    def allow(self, action: Action) -> list[int]:
        return sorted(i for place, ids in self.by_place.items() if _moves(place, action) for i in ids)


def _moves(place: str, action: Action) -> bool:
    return TABLE[place][action] is not None and (place, action) != ("cancelled", "cancel")


def act_on_many(client: Client, action: Action, **which: Any) -> int:
    match action:
        case "cancel":
            return client.cancel_tasks(**which)
        case "retry":
            return client.retry_tasks(**which)
        case "delete":
            return client.delete_tasks(**which)
        case "edit":
            return client.edit_tasks(payload={"n": 2}, **which)


@pytest.mark.parametrize("action", ACTIONS)
def test_many_by_filter_as_the_preview_says(client: Client, store: Session, action: Action) -> None:
    mixed = Mixed(store)
    before = client.counts()
    assert client.count_tasks(types=["t"]) == 3 * len(TABLE)
    assert client.count_tasks(types=["t"], queues=["slow"]) == 0
    assert client.count_tasks(states=STATES) == 3 * len(TABLE) + 1200
    allowed = mixed.allow(action)
    assert client.count_tasks(action, types=["t"]) == len(allowed)
    assert client.count_tasks(action, ids=[*allowed, 7, 10**30, 2**63 - 1, -3, mixed.by_place["running"][0]]) == len(
        {*allowed} | ({mixed.by_place["running"][0]} if action == "cancel" else set())
    )
    assert client.counts() == before, "a preview changes nothing"
    assert act_on_many(client, action, types=["t"]) == len(allowed)
    assert client.counts(by="type")["mail"]["pending"] == 1200
    for place, ids in mixed.by_place.items():
        expected = TABLE[place][action]
        for id_ in ids:
            if expected == "gone":
                with pytest.raises(TaskNotFound):
                    client.get_task(id_)
            else:
                record = client.get_task(id_)
                assert (record.state, record.kind) == (expected or (record.state, record.kind))
    assert set(states(store)) == set(mixed.mail) | {
        id_ for place, ids in mixed.by_place.items() for id_ in ids if TABLE[place][action] != "gone"
    }


@pytest.mark.parametrize("action", ["cancel", "delete", "edit"])
def test_more_than_a_batch(client: Client, store: Session, action: Action) -> None:
    mixed = Mixed(store)
    assert client.count_tasks(action, queues=["slow"]) == 1200
    assert act_on_many(client, action, queues=["slow"]) == 1200
    assert act_on_many(client, action, queues=["slow"], states=["running", "scheduled"]) == 0
    if action == "edit":
        found = {
            payload for chunk in Worker(store, 3).claim(2000, (2,), chunks=2000) for payload in chunk.payloads or []
        }
        assert found == {b'{"n":2}'}
    else:
        assert [chunk for chunk in Worker(store, 3).claim(2000, (2,)) if chunk.ids] == []
    assert states(store).get(mixed.by_place["ready"][0]) == "pending"


def test_only_the_states_asked_for(client: Client, store: Session) -> None:
    mixed = Mixed(store)
    assert client.cancel_tasks(states=["retrying", "failed"], types=["t"]) == 6
    found = states(store)
    for place, ids in mixed.by_place.items():
        state = "cancelled" if place in ("retrying", "failed") else client.get_task(ids[0]).state
        assert {found[id_] for id_ in ids} == {state}
    assert client.delete_tasks(states=["running"]) == 0
    assert client.retry_tasks(ids=mixed.by_place["retrying"], states=["cancelled"]) == 3
    assert client.retry_tasks(ids=mixed.by_place["retrying"]) == 0


@pytest.mark.parametrize("action", ACTIONS)
def test_never_all_by_omission(client: Client, places: Places, action: Action) -> None:
    places.make("ready")
    for nothing in ({}, {"states": None, "ids": None}):
        with pytest.raises(SettingsError, match="all tasks are never meant"):
            act_on_many(client, action, **nothing)
        with pytest.raises(SettingsError, match="all tasks are never meant"):
            client.count_tasks(action, **nothing)
    for name in ("ids", "states", "types", "queues"):
        empty: dict[str, Any] = {name: []}
        assert act_on_many(client, action, **empty) == client.count_tasks(action, **empty) == 0


@pytest.mark.parametrize(
    "which",
    [
        {"states": "pending"},
        {"states": ["waiting"]},
        {"types": "t"},
        {"queues": [5]},
        {"ids": "17"},
        {"ids": 17},
        {"ids": [True]},
        {"ids": ["17"]},
    ],
)
def test_wrong_filters(client: Client, places: Places, which: dict[str, Any]) -> None:
    places.make("ready")
    with pytest.raises(SettingsError, match=f"{next(iter(which))} is"):
        client.cancel_tasks(**which)
    with pytest.raises(SettingsError, match=f"{next(iter(which))} is"):
        client.count_tasks(**which)
    with pytest.raises(SettingsError, match="action is 'kill'"):
        client.count_tasks("kill", states=["failed"])  # type: ignore[arg-type]
    assert client.counts()["pending"] == 3
