"""The claim and the completion of one task: the same rules and races as those of many."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fastq import TaskInfo
from tests.support.consuming import new_consumer
from tests.support.storage import (
    TEXTS,
    Chunk,
    Session,
    Worker,
    add_lane,
    chunks_of,
    claims_of,
    done_ids,
    enqueue,
    in_background,
    states,
    wait_blocked,
)
from tests.support.waiting import wait_until

OpenSession = Callable[[], Session]


def claim_one(
    worker: Worker, lanes: tuple[int, ...] = (1,), tracks: tuple[int, ...] = (1, 0), *, hint: int = 0, leaf: int = 0
) -> Chunk | None:
    """The claim of one task, its number the worker's next."""
    asked = [(lane, track) for lane in lanes for track in tracks]
    columns = [lane for lane, _ in asked], [track for _, track in asked], [hint] * len(asked)
    worker.no += 1
    rows = worker.session.run("claim_task", worker.id, worker.no, *columns, leaf)
    return Chunk(*rows[0]) if rows else None


def claimed(worker: Worker) -> int:
    """The id of a task that is there to be claimed."""
    chunk = claim_one(worker)
    assert chunk is not None
    return chunk.lo


def complete_one(session: Session, consumer: int, no: int, id_: int) -> int:
    """How many claims held that and nothing else."""
    before = len(done_ids(session))
    session.run("complete_task", consumer, no, id_, 5)
    return len(done_ids(session)) - before


# --- claim ---------------------------------------------------------------------------------------


def test_one_by_one_a_chunk_is_taken_from_its_low_end(store: Session) -> None:
    ids = enqueue(store, 3, payload=b"[1]")
    worker = Worker(store, 1)
    found = [claim_one(worker) for _ in ids]
    assert claim_one(worker) is None
    for chunk, id_ in zip(found, ids, strict=True):
        assert chunk is not None
        assert (chunk.lo, chunk.upto, chunk.shrunk) == (id_, id_, id_ != ids[-1])
        assert (chunk.ids, chunk.payloads, chunk.formats, chunk.expires) == ([id_], [b"[1]"], ["j"], False)
    assert claims_of(store) == {(1, no): [id_] for no, id_ in enumerate(ids, 1)}
    assert chunks_of(store) == []


def test_it_answers_as_a_claim_of_many_does(store: Session) -> None:
    enqueue(store, 2, max_attempts=7)
    store.sql("UPDATE fastq.ready SET expires_at = now() + interval '1 hour', attempts = 2, track = 1")
    worker = Worker(store, 1)
    store.begin()
    one = claim_one(worker)
    stored = store.sql("SELECT * FROM fastq.claim")
    store.rollback()
    worker.no = 0
    store.begin()
    [many] = worker.claim(1, tracks=(1, 0), chunks=1)
    assert one == many
    assert [row[3:] for row in stored] == [row[3:] for row in store.sql("SELECT * FROM fastq.claim")]
    store.rollback()


def test_lanes_and_tracks_are_asked_in_their_order_and_behind_their_hints(store: Session) -> None:
    urgent = add_lane(store, priority=9)
    ids = list(enqueue(store, 3, chunk=1)) + list(enqueue(store, 1, lane=urgent))
    store.sql("UPDATE fastq.ready SET track = 1 WHERE lo = $1", ids[1])
    worker = Worker(store, 1)
    found = [claim_one(worker, (urgent, 1)) for _ in ids]
    assert [chunk and chunk.lo for chunk in found] == [ids[3], ids[1], ids[0], ids[2]]
    enqueue(store, 1)
    assert claim_one(worker, hint=10**9) is None


def test_content_is_read_in_the_leaf_that_is_named(store: Session) -> None:
    enqueue(store, 1, leaf=3)
    worker = Worker(store, 1)
    store.begin()
    chunk = claim_one(worker, leaf=0)
    assert chunk is not None
    assert (chunk.leaf, chunk.ids) == (3, None)
    store.rollback()
    chunk = claim_one(worker, leaf=3)
    assert chunk is not None
    assert chunk.payloads == [b'{"n":1}']


def test_a_chunk_that_another_holds_is_passed_over(store: Session, open_session: OpenSession) -> None:
    ids = enqueue(store, 4, chunk=2)
    one, other = Worker(store, 1), Worker(open_session(), 2)
    store.begin()
    assert claimed(one) == ids[0]
    assert claimed(other) == ids[2]
    store.commit()
    assert claimed(other) == ids[1]


@pytest.mark.parametrize("taken", [1, 2])
def test_a_late_claim_takes_no_task_that_another_took(store: Session, open_session: OpenSession, taken: int) -> None:
    """Between its snapshot and its lock another claim shrinks its chunk, or takes it whole."""
    ids = enqueue(store, 2)
    Worker(store, 2)
    store.sql("CREATE TABLE fastq.gate (lane integer)")
    store.sql(
        "CREATE FUNCTION fastq.lanes_behind_gate() RETURNS integer[] LANGUAGE plpgsql VOLATILE AS "
        "'BEGIN LOCK TABLE fastq.gate IN SHARE MODE; RETURN ARRAY[1]; END'"
    )
    text = TEXTS["claim_task"].replace("$3::integer[]", "fastq.lanes_behind_gate()")
    for number in range(4, 7):
        text = text.replace(f"${number}", f"${number - 1}")
    gate, session = open_session(), open_session()
    gate.begin()
    gate.sql("LOCK TABLE fastq.gate IN ACCESS EXCLUSIVE MODE")
    with in_background(session, lambda: session.sql(text, 2, 1, [0], [0], 0)) as late:
        try:
            wait_blocked(store, session)
            first = Worker(store, 1)
            for id_ in ids[:taken]:
                assert claimed(first) == id_
        finally:
            gate.rollback()
        assert [row[7] for row in late.result(30)] == list(ids[taken:])
    held = [id_ for held in claims_of(store).values() for id_ in held]
    assert sorted(held) == list(ids)
    assert chunks_of(store) == []


# --- completion ----------------------------------------------------------------------------------


def test_a_completion_counts_once(store: Session) -> None:
    [id_] = enqueue(store)
    worker = Worker(store, 1)
    claim_one(worker)
    assert complete_one(store, 1, 1, id_) == 1
    assert complete_one(store, 1, 1, id_) == 0
    assert states(store) == {id_: "completed"}
    assert store.sql("SELECT lo, consumer, no, took_us, lane, leaf, attempts FROM fastq.done") == [
        (id_, 1, 1, 5, 1, 0, 1)
    ]


def test_it_counts_only_for_the_claim_that_holds_that_task_and_no_other(store: Session) -> None:
    ids = enqueue(store, 3)
    worker = Worker(store, 1)
    worker.claim(2)
    claim_one(worker)
    for consumer, no, id_ in (
        (1, 1, ids[0]),
        (1, worker.no, ids[0]),
        (1, worker.no + 1, ids[2]),
        (2, worker.no, ids[2]),
    ):
        assert complete_one(store, consumer, no, id_) == 0
    assert complete_one(store, 1, worker.no, ids[2]) == 1
    worker.complete({1: [ids[1]]})
    assert complete_one(store, 1, 1, ids[0]) == 1
    assert set(states(store).values()) == {"completed"}


def test_a_completion_that_a_cancel_or_a_rescue_overtakes_counts_for_nothing(
    store: Session, open_session: OpenSession
) -> None:
    [id_] = enqueue(store)
    claim_one(Worker(store, 1))
    late = open_session()
    store.begin()
    store.sql("DELETE FROM fastq.claim")
    with in_background(late, lambda: late.run("complete_task", 1, 1, id_, 5)) as waiting:
        wait_blocked(store, late)
        store.commit()
        waiting.result(30)
    assert done_ids(store) == []


# --- in an engine --------------------------------------------------------------------------------


def test_tasks_of_several_leaves_run_one_at_a_time(dsn: str, store: Session) -> None:
    for number, leaf in enumerate((3, 3, 0, 5, 0)):
        enqueue(store, leaf=leaf, payload=b"%d" % number)
    payloads: list[object] = []
    started = threading.Event()

    def handle(task: TaskInfo) -> None:
        payloads.append(task.payload)
        # Until it has seen how long the first takes, a consumer takes no more than it can start.
        assert started.wait(30)

    consumer = new_consumer(dsn, store.schema, concurrency=1, prefetch=1)
    consumer.handler("t")(handle)
    with consumer:
        wait_until(lambda: len(payloads) == 1)
        started.set()
        wait_until(lambda: consumer.stats()["completed"] == 5)
    assert sorted(map(str, payloads)) == ["0", "1", "2", "3", "4"]
    assert set(states(store).values()) == {"completed"}
