"""A task's own timeout and retry policy: in by every way, and along through every place that a task can be in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
import pytest

from fastq import Client, ConstantBackoff, Enqueued, ExponentialBackoff, PayloadError, Producer, Task
from fastq.settings import PAYLOAD_LIMIT
from tests.support import clients
from tests.support.leaves import close_leaf
from tests.support.producing import check_chunks, value
from tests.support.storage import Leader, Session, Worker
from tests.support.users import USERS, User, user_of

#: What a task may say of its own runs.
OPTIONS: Sequence[dict[str, Any]] = (
    {},
    {"timeout": 30},
    {"retry": ConstantBackoff(0.25)},
    {"timeout": 0.5, "retry": ExponentialBackoff(exponent=2, jitter=0, maximum=600)},
)


@pytest.fixture
def producer(dsn: str, migrated: str) -> Iterator[Producer]:
    with Producer(dsn, schema=migrated) as producer:
        yield producer


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


def mixed(count: int) -> list[Task]:
    """Tasks of all kinds, alike ones far apart. Every payload begins as no line of options does."""
    at = datetime.now(UTC) + timedelta(days=1)
    return [
        Task(
            "ab"[n % 2],
            [b"\n{}\n", {"n": n}, "line\nline", b"", None][n % 5],
            delay=60 if n % 7 == 0 else None,
            expires_at=at if n % 3 == 0 else None,
            idempotency_token=str(n) if n % 11 == 0 else None,
            **OPTIONS[n % 4],
        )
        for n in range(count)
    ]


def check(client: Client, db: psycopg.Connection, tasks: Sequence[Task], answers: Sequence[Enqueued]) -> None:
    """They are there as they were given, and those without options byte for byte as ever."""
    found = {task.id: task for task in client.list_tasks(order_by="id", limit=10_000)}
    shown: dict[int, str] = dict(db.execute("SELECT id, payload FROM tasks").fetchall())
    query = "SELECT id, format::text, payload FROM task UNION ALL SELECT id, format::text, payload FROM delayed WHERE leaf IS NULL"
    stored = {id_: (format_, payload) for id_, format_, payload in db.execute(query)}
    for task, (id_, is_new) in zip(tasks, answers, strict=True):
        assert is_new
        record = found[id_]
        assert (record.payload, record.timeout, record.retry) == (task.payload, task.timeout, task.retry)
        assert record == client.get_task(id_) or record.errors is None
        is_raw = isinstance(task.payload, bytes)
        format_, content = stored[id_]
        assert (
            format_ == ("B" if is_raw else "J")
            if task._extras and (task.timeout or task.retry)
            else "b"
            if is_raw
            else "j"
        )
        proper = content.partition(b"\n")[2] if format_.isupper() else content
        assert shown[id_] == (proper.hex() if is_raw else proper.decode())
    check_chunks(db)


@pytest.mark.parametrize("count", [12, 700])
def test_they_come_along_however_many_are_enqueued(
    producer: Producer, client: Client, db: psycopg.Connection, count: int
) -> None:
    tasks = mixed(count)
    check(client, db, tasks, producer.enqueue_many(tasks))


def test_one_by_one(producer: Producer, client: Client, db: psycopg.Connection) -> None:
    tasks = mixed(24)

    async def enqueue(tasks: Sequence[Task]) -> list[Enqueued]:
        return list(await asyncio.gather(*(producer.aenqueue(task) for task in tasks)))

    check(client, db, tasks, [producer.enqueue(task) for task in tasks[:12]] + asyncio.run(enqueue(tasks[12:])))


@pytest.mark.parametrize("kind", USERS, ids=lambda kind: kind.name)
def test_in_the_users_transaction(
    kind: type[User], producer: Producer, client: Client, db: psycopg.Connection, dsn: str
) -> None:
    tasks = mixed(1 + 12 + 300)
    with user_of(kind, producer, dsn) as user:
        answers = [user.enqueue(tasks[0]), *user.enqueue_many(tasks[1:13]), *user.enqueue_many(tasks[13:])]
        user.commit()
    check(client, db, tasks, answers)


def test_their_line_has_no_share_in_the_payloads_limit(producer: Producer, client: Client) -> None:
    for payload in (b"x" * PAYLOAD_LIMIT, "x" * (PAYLOAD_LIMIT - 2)):
        task = Task("t", payload, timeout=5, retry=ExponentialBackoff())
        [few], many = producer.enqueue_many([task]), producer.enqueue_many([Task("t", n) for n in range(100)] + [task])
        for id_ in (producer.enqueue(task).id, few.id, many[-1].id):
            assert client.get_task(id_).payload == payload
        for over in (b"x" * (PAYLOAD_LIMIT + 1), "x" * (PAYLOAD_LIMIT - 1)):
            with pytest.raises(PayloadError):
                producer.enqueue(Task("t", over, timeout=5))


def test_a_search_looks_at_the_payload_alone(producer: Producer, client: Client) -> None:
    tasks = [Task("t", {"n": n}, delay=60 if n % 3 == 0 else None, **OPTIONS[n % 4]) for n in range(12)]
    tasks.append(Task("t", b'"timeout":raw', **OPTIONS[3]))
    ids = [answer.id for answer in producer.enqueue_many(tasks)]
    for descending in (False, True):

        def found(text: str | bytes, *, descending: bool = descending) -> list[int]:
            page = client.list_tasks(payload_contains=text, order_by="id", descending=descending)
            return sorted(task.id for task in page)

        assert found('{"n":7}') == ids[7:8]
        assert found('"n"') == sorted(ids[:12])
        assert found('"timeout":') == found(b"raw") == ids[12:]
        assert found("constant") == found(b"}\n") == []


# --- edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", clients.KINDS)
@pytest.mark.parametrize("delay", [None, 60])
def test_an_edited_payload_keeps_them(
    dsn: str, migrated: str, producer: Producer, db: psycopg.Connection, kind: clients.Kind, delay: float | None
) -> None:
    """In a leaf and in `delayed`; of either format, into either."""
    tasks = [Task("t", payload, delay=delay, **options) for options in OPTIONS for payload in ({"n": 1}, b"\nraw")]
    ids = [answer.id for answer in producer.enqueue_many(tasks)]
    with clients.open_client(kind, dsn, schema=migrated) as client:
        for payload in (["new"], b"{}\nnew", "again"):
            for task, id_ in zip(tasks, ids, strict=True):
                record = client.edit_task(id_, payload=payload)
                assert (record.payload, record.timeout, record.retry) == (payload, task.timeout, task.retry)
            codes = {
                format_
                for (format_,) in db.execute("SELECT format::text FROM task UNION SELECT format::text FROM delayed")
            }
            assert codes == ({"b", "B"} if isinstance(payload, bytes) else {"j", "J"})
        for id_, task in zip(ids, tasks, strict=True):
            record = client.edit_task(id_, delay=90, priority=7)
            assert (record.payload, record.timeout, record.retry) == ("again", task.timeout, task.retry)
        client.edit_tasks(payload="all", ids=ids)
        for id_, task in zip(ids, tasks, strict=True):
            record = client.get_task(id_)
            assert (record.payload, record.timeout, record.retry) == ("all", task.timeout, task.retry)


@pytest.mark.parametrize("old", OPTIONS)
@pytest.mark.parametrize("new", OPTIONS)
def test_a_replaced_payload_brings_its_own(
    producer: Producer, client: Client, dsn: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    """They belong to the payload that they were enqueued with. A replaced time leaves both alone."""

    def task(payload: str, options: dict[str, Any], on_conflict: Any) -> Task:
        return Task("t", payload, idempotency_token="x", on_conflict=on_conflict, delay=60, **options)

    for leave, replace in (("existing", "replace"), ("replace_time", "replace_payload")):
        with psycopg.connect(dsn) as connection:
            id_ = producer.enqueue_tx(connection, task("old", old, "replace")).id
        record = client.get_task(id_)
        assert (record.payload, record.timeout, record.retry) == ("old", old.get("timeout"), old.get("retry"))
        producer.enqueue(task("new", new, leave))
        assert client.get_task(id_).payload == "old"
        assert (record.timeout, record.retry) == (client.get_task(id_).timeout, client.get_task(id_).retry)
        producer.enqueue_many([task("new", new, replace), Task("other")])
        record = client.get_task(id_)
        assert (record.payload, record.timeout, record.retry) == ("new", new.get("timeout"), new.get("retry"))


# --- places ----------------------------------------------------------------------------------------


class Walk:
    """One task with both on its way through the tables. After each step a client is asked what it is."""

    def __init__(self, store: Session, producer: Producer, client: Client, payload: object) -> None:
        self.store, self.client, self.payload = store, client, payload
        self.worker, self.leader = Worker(store, 1), Leader(store)
        self.leader.tick()
        task = Task("t", payload, delay=3600, max_attempts=9, timeout=30, retry=ConstantBackoff(5))
        self.id = producer.enqueue(task).id
        self.steps = 0
        self.check("pending", "scheduled")

    def check(self, state: str, kind: str | None = None) -> None:
        self.steps += 1
        record = self.client.get_task(self.id)
        assert (record.state, record.kind) == (state, kind), self.steps
        assert (record.payload, record.timeout, record.retry) == (self.payload, 30, ConstantBackoff(5)), self.steps
        order: Literal["id", "created_at"] = "id" if self.steps % 2 else "created_at"
        [listed] = self.client.list_tasks(order_by=order, descending=self.steps % 3 == 0)
        assert (listed.payload, listed.timeout, listed.retry) == (self.payload, 30, ConstantBackoff(5)), self.steps

    @property
    def leaf(self) -> int:
        """The one that is open."""
        return int(self.store.value("SELECT no FROM fastq.leaf WHERE state = 'open'"))

    def promote(self) -> None:
        self.store.sql("UPDATE fastq.delayed SET run_at = clock_timestamp()")
        assert self.leader.one("promote_tasks", 10, self.leaf)[0] == 1
        self.check("pending")

    def claim(self) -> int:
        [chunk] = self.worker.claim(10)
        assert chunk.ids == [self.id]
        self.check("running")
        return chunk.no

    def retry(self) -> None:
        self.client.retry_task(self.id)
        self.check("pending", "retrying")
        self.promote()


@pytest.fixture(params=[{"n": 1}, b"\nraw"], ids=["json", "bytes"])
def walk(request: pytest.FixtureRequest, store: Session, producer: Producer, client: Client) -> Walk:
    return Walk(store, producer, client, request.param)


def test_they_survive_what_comes_back(walk: Walk) -> None:
    walk.promote()
    walk.client.edit_task(walk.id, delay=60)
    walk.check("pending", "scheduled")
    walk.promote()
    walk.client.edit_task(walk.id, priority=3)
    walk.check("pending")
    walk.client.edit_task(walk.id, priority=0)
    walk.worker.give_back({walk.claim(): [walk.id]})
    walk.check("pending")
    walk.worker.snooze(walk.claim(), [walk.id], 60.0)
    walk.check("pending", "scheduled")
    walk.promote()
    walk.worker.fail(walk.claim(), [walk.id], 60.0)
    walk.check("pending", "retrying")
    # The leaf is left: what waits for a time carries its content, what is ready goes to the open one.
    old = walk.leaf
    close_leaf(walk.leader)
    walk.leader.run("carry_delayed", old, 100)
    assert walk.store.value("SELECT leaf FROM fastq.delayed") is None
    walk.check("pending", "retrying")
    walk.promote()
    old = walk.leaf
    close_leaf(walk.leader)
    walk.leader.run("move_chunks", old, 100)
    assert walk.store.value("SELECT leaf FROM fastq.ready") == walk.leaf != old
    walk.check("pending")
    walk.claim()
    walk.leader.declare_dead(walk.worker)
    walk.leader.rescue()
    walk.check("pending")


def test_they_survive_every_end(walk: Walk) -> None:
    walk.client.cancel_task(walk.id)
    walk.check("cancelled")
    walk.retry()
    walk.worker.fail(walk.claim(), [walk.id])
    walk.check("failed")
    walk.client.cancel_task(walk.id)
    walk.check("cancelled")
    walk.retry()
    walk.client.cancel_task(walk.id)
    walk.check("cancelled")
    walk.retry()
    walk.claim()
    walk.client.cancel_task(walk.id)
    walk.check("cancelled")
    walk.retry()
    walk.worker.expire(walk.claim(), [walk.id])
    walk.check("expired")
    walk.retry()
    walk.worker.complete({walk.claim(): [walk.id]})
    walk.check("completed")


def test_a_damaged_line_harms_no_look_and_no_edit(producer: Producer, client: Client, db: psycopg.Connection) -> None:
    ids = [answer.id for answer in producer.enqueue_many(Task("t", n, timeout=5) for n in range(3))]
    for id_, payload in zip(ids, (b'{"timeout":5', b'{"timeout":"no"}\n1', b"\xff\n2"), strict=True):
        db.execute("UPDATE task SET payload = %s WHERE id = %s", (payload, id_))
    page = {task.id: task for task in client.list_tasks()}
    assert [(page[id_].payload, page[id_].timeout) for id_ in ids] == [(b'{"timeout":5', None), (1, None), (2, None)]
    assert value(db, "SELECT count(payload) FROM tasks") == 3
    # Where a payload can't be told from its options, they go with it.
    assert client.edit_task(ids[0], payload="new") == client.get_task(ids[0])
    row = db.execute("SELECT format::text, payload FROM task WHERE id = %s", (ids[0],)).fetchone()
    assert row == ("j", b'"new"')
