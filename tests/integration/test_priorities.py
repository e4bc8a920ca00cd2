"""Priorities: within a queue the higher is claimed first, strictly, and with `ageing` the lower ones are not left out."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fastq import Client, Consumer, Producer, Task, TaskInfo
from fastq.errors import InvalidTransition, SettingsError
from tests.support.consuming import new_consumer, wait_for_states
from tests.support.lab import Lab
from tests.support.waiting import wait_until


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as made:
        yield made


@pytest.fixture
def lab(dsn: str, migrated: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Lab]:
    with Lab(dsn, migrated, db, tmp_path) as made:
        yield made


class Noted:
    """A handler that notes the payloads in the order in which they start. ``"hold"`` waits until `release` is set."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.release = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, task: TaskInfo) -> None:
        with self._lock:
            self.started.append(task.payload)
        if task.payload == "hold":
            assert self.release.wait(60)


def work(lab: Lab, noted: Noted, types: tuple[str, ...] = ("t",), **settings: Any) -> Callable[[], None]:
    """One slot, and a task that holds it while others are enqueued. Gives what lets it go, and waits until all is done."""
    consumer = new_consumer(lab.dsn, lab.schema, **({"poll_interval": 0.2, "concurrency": 1} | settings))
    for type_ in types:
        consumer.handler(type_)(noted)
    lab.enqueue_type(types[0], "hold", queue="hold")
    consumer.start()
    wait_until(lambda: noted.started == ["hold"], message="the task that holds the slot runs")

    def let_go() -> None:
        total = _count(lab.db)
        noted.release.set()
        try:
            wait_for_states(lab.db, {"completed": total})
        finally:
            consumer.stop()

    return let_go


def _count(db: psycopg.Connection) -> int:
    row = db.execute("SELECT count(*) FROM tasks").fetchone()
    assert row is not None
    return int(row[0])


def one_by_one(producer: Producer, type_: str, payloads: range, **options: Any) -> None:
    for payload in payloads:
        producer.enqueue(Task(type_, payload, **options))


def test_the_higher_priority_of_a_queue_starts_first(lab: Lab) -> None:
    """Each enqueued by itself, so that a claim sees many chunks; of one type, whose first task may have been claimed in advance."""
    noted = Noted()
    let_go = work(lab, noted)
    for priority in (0, 3, 9):
        one_by_one(lab.producer, "t", range(100 * priority, 100 * priority + 40), priority=priority)
    let_go()
    # One may have been in hand when the others came.
    order = [payload // 100 for payload in noted.started[1:] if payload != 0]
    assert order == sorted(order, reverse=True)
    assert Counter(order) == {9: 40, 3: 40, 0: 39}


def test_the_order_holds_across_types(lab: Lab) -> None:
    """Also while the handlers are so fast that their tasks are claimed in advance. One task a type may have been before."""
    noted = Noted()
    let_go = work(lab, noted, ("t", "u", "v"))
    lab.enqueue_type("u", *range(200))
    lab.enqueue_type("v", *range(500, 700), priority=5)
    lab.enqueue_type("t", *range(900, 1100), priority=9)
    let_go()
    order = [(payload >= 500) + (payload >= 900) for payload in noted.started[1:] if payload not in {0, 500}]
    assert order == sorted(order, reverse=True)


def test_queues_have_no_order_between_them(lab: Lab) -> None:
    """A queue with urgent tasks does not keep another's waiting."""
    noted = Noted()
    let_go = work(lab, noted)
    lab.enqueue(*range(300), priority=9, queue="a")
    lab.enqueue(*range(1000, 1300), queue="b")
    let_go()
    others = [n for n, payload in enumerate(noted.started[1:]) if payload >= 1000]
    assert others[0] < 290


def test_a_type_at_its_cap_holds_up_nothing_below_it(lab: Lab) -> None:
    started, release = Counter[str](), threading.Event()

    def hold(task: TaskInfo) -> None:
        started[task.type] += 1
        assert release.wait(60)

    consumer = new_consumer(lab.dsn, lab.schema, concurrency=4)
    consumer.handler("capped", workers=2)(hold)
    consumer.handler("other")(hold)
    lab.enqueue_type("capped", *range(20), priority=9)
    lab.enqueue_type("other", *range(2))
    consumer.start()
    try:
        wait_until(lambda: started == {"capped": 2, "other": 2}, message="two of each run")
    finally:
        release.set()
        wait_for_states(lab.db, {"completed": 22})
        consumer.stop()


def test_a_late_commit_of_a_higher_priority_is_not_overlooked(lab: Lab) -> None:
    """Its chunk lies behind what the claimer remembers of its lane, nobody announces it, and the next look around is far away."""
    started: list[int] = []
    at_50, go_on = threading.Event(), threading.Event()

    def note(task: TaskInfo) -> None:
        started.append(task.payload)
        if len(started) == 50:
            at_50.set()
            assert go_on.wait(60)
        if go_on.is_set() and not late <= set(started):
            # Work that takes its time: the looks have theirs by the claims', however slow the machine is.
            time.sleep(0.01)

    late = set(range(1900, 1910))
    with psycopg.connect(lab.dsn) as conn:
        lab.producer.enqueue_many_tx(conn, [Task("t", payload, priority=9) for payload in late])
        one_by_one(lab.producer, "t", range(1990, 1993), priority=9)
        lab.enqueue(*range(800))
        consumer = new_consumer(lab.dsn, lab.schema, concurrency=1, prefetch=5, poll_interval=30, listen=False)
        consumer.handler("t")(note)
        consumer.start()
        try:
            assert at_50.wait(20)
            conn.commit()
            go_on.set()
            wait_for_states(lab.db, {"completed": 813})
        finally:
            go_on.set()
            consumer.stop()
    assert started[:3] == [1990, 1991, 1992]
    # Looked for at a twentieth of the claims' time: about 20 claims of 5 later, and seconds before the low ones are done.
    assert max(started.index(payload) for payload in late) < 800


def test_without_ageing_a_lower_priority_waits_and_with_it_it_gets_its_share(lab: Lab) -> None:
    """Of the claims every second is of a lower priority alone, these in turn."""
    noted = Noted()
    let_go = work(lab, noted, ageing=2, prefetch=1)
    for priority in (0, 4, 9):
        lab.enqueue(*range(100 * priority, 100 * priority + 60), priority=priority)
    let_go()
    half = Counter(payload // 100 for payload in noted.started[1:91])
    assert half[9] >= 30
    assert half[4] >= 10
    assert half[0] >= 10


@pytest.mark.parametrize("ageing", [-1, 1.5, True, "2", None])
def test_an_ageing_that_is_no_count_is_refused(dsn: str, ageing: Any) -> None:
    with pytest.raises((SettingsError, TypeError), match="ageing"):
        Consumer(dsn, ageing=ageing)


def test_a_task_keeps_its_priority_however_it_is_enqueued(lab: Lab, client: Client) -> None:
    producer = lab.producer
    ids = [producer.enqueue(Task("t", priority=4)).id, producer.enqueue(Task("t", priority=4, delay=60)).id]
    ids += [result.id for result in producer.enqueue_many(Task("t", priority=4) for _ in range(3_000))]
    with psycopg.connect(lab.dsn) as conn:
        ids.append(producer.enqueue_tx(conn, Task("t", priority=4)).id)
        ids += [result.id for result in producer.enqueue_many_tx(conn, [Task("t", priority=4)] * 3_000)]
    lab.enqueue(count=5, priority=3)
    page = client.list_tasks(priorities=[4], order_by="id", limit=10_000)
    assert sorted(task.id for task in page) == sorted(ids)
    assert {task.priority for task in page} == {4}
    assert len(client.list_tasks(priorities=[3, 9]).tasks) == 5
    assert client.list_tasks(priorities=[]).tasks == ()


def test_a_retry_a_rescue_and_a_snooze_keep_it(lab: Lab, client: Client) -> None:
    id_ = lab.enqueue(None, priority=7, max_attempts=2)[0]

    def fail(_: TaskInfo) -> None:
        raise ValueError

    lab.consumer(fail)
    wait_for_states(lab.db, {"failed": 1})
    assert client.get_task(id_).priority == 7
    assert client.retry_task(id_).priority == 7


def test_a_waiting_task_gets_another_priority(lab: Lab, client: Client) -> None:
    ids = lab.enqueue(*range(10))
    later = lab.enqueue("later", delay=60)[0]
    assert client.edit_task(ids[6], priority=8).priority == 8
    assert client.edit_task(later, priority=2).priority == 2
    assert client.edit_task(later, delay=0).priority == 2
    assert client.edit_task(ids[6], payload="new").payload == "new"
    assert client.get_task(ids[6]).priority == 8
    assert client.edit_tasks(ids=ids[:2], priority=1) == 2
    started: list[int] = []
    lab.consumer(lambda task: started.append(task.id), concurrency=1)
    wait_for_states(lab.db, {"completed": 11})
    assert started[0] == ids[6]
    assert [id_ for id_ in started if id_ in ids[:2]] == ids[:2]
    assert started.index(ids[1]) < started.index(ids[2])
    with pytest.raises(InvalidTransition):
        client.edit_task(ids[0], priority=3)


def test_a_priority_within_the_users_transaction(lab: Lab, client: Client) -> None:
    id_ = lab.enqueue(None)[0]
    with psycopg.connect(lab.dsn) as conn:
        assert client.edit_task_tx(conn, id_, priority=6).priority == 6
        # The lane is there for all: no producer waits for the transaction's end.
        assert lab.producer.enqueue(Task("t", priority=6)).is_new
        conn.rollback()
    assert client.get_task(id_).priority == 0


@pytest.mark.parametrize("priority", [-1, 10, 1.0, True, "1"])
def test_a_priority_that_no_task_can_have_is_refused(client: Client, priority: Any) -> None:
    with pytest.raises(SettingsError, match="priority is"):
        client.edit_task(1, priority=priority)
    with pytest.raises(SettingsError, match="priorit"):
        client.list_tasks(priorities=[priority])
