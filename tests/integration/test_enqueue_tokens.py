"""Idempotency tokens: unique per type, answered in input order, never a reason for a load to fail."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from functools import partial

import psycopg
import pytest

from fastq._engine import ProducerCore
from fastq.errors import DatabaseError, EnqueueError
from fastq.task import Task
from tests.support.producing import Background, answers, check_chunks, count, gather, producing, value
from tests.support.waiting import wait_until


@pytest.fixture
def core(dsn: str, migrated: str) -> Iterator[ProducerCore]:
    with producing(dsn, migrated) as made:
        yield made


def task(token: str | None, n: int = 0, *, type: str = "a", delay: float | None = None) -> Task:  # noqa: A002 the task's word
    return Task(type, {"n": n}, idempotency_token=token, delay=delay)


def check_tokens(db: psycopg.Connection) -> None:
    """Each token's task is there, and has the type that the token is for."""
    orphans = value(
        db,
        """SELECT count(*) FROM token k WHERE NOT EXISTS (SELECT FROM tasks t WHERE t.id = k.id AND t.type = k.type)""",
    )
    assert orphans == 0
    check_chunks(db)


def blocked_backends(db: psycopg.Connection) -> int:
    """Backends that wait for a transaction which holds a token of this schema."""
    found = value(
        db,
        """SELECT count(*) FROM pg_stat_activity a
            WHERE wait_event = 'transactionid' AND query ILIKE '%' || current_schema() || '%token%'""",
    )
    assert isinstance(found, int)
    return found


# --- one by one ------------------------------------------------------------------------------------


def test_a_duplicate_answers_the_first_ones_id(core: ProducerCore, db: psycopg.Connection) -> None:
    first = core.enqueue(task("x"))
    assert first[1]
    assert core.enqueue(task("x")) == (first[0], False)
    assert core.enqueue(task("x", type="b"))[1]
    assert core.enqueue(task("y"))[1]
    assert core.enqueue(task("y", delay=60))[1] is False
    later = core.enqueue(task("z", delay=60))
    assert core.enqueue(task("z")) == (later[0], False)
    assert count(db) == 4
    check_tokens(db)


def test_of_many_at_once_one_is_new(core: ProducerCore, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with producing(dsn, migrated) as other:
        calls = [partial(c.enqueue, task(f"t{n % 5}", n)) for n in range(60) for c in (core, other)]
        got = gather(calls)
    assert len({id_ for id_, _ in got}) == 5
    assert sum(is_new for _, is_new in got) == 5
    assert count(db) == 5
    check_tokens(db)


# --- many ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [30, 12_000])
@pytest.mark.parametrize("every", [None, 5_000])
def test_answers_keep_the_input_order(core: ProducerCore, db: psycopg.Connection, n: int, every: int | None) -> None:
    rng = random.Random(n)
    known = {f"k{i}": core.enqueue(task(f"k{i}"))[0] for i in range(5)}
    tokens: list[str | None] = [f"t{i}" for i in range(n // 2)] + [None] * (n // 4) + [f"t{i}" for i in range(n // 4)]
    tokens += [*known, "ü", "Z", "z"]
    rng.shuffle(tokens)
    got = answers(core.enqueue_many((task(token, i) for i, token in enumerate(tokens)), every))
    assert len(got) == len(tokens)
    holders: dict[str, int] = dict(known)
    payloads: dict[int, str] = dict(db.execute("SELECT id, payload FROM tasks").fetchall())
    for i, (token, (id_, is_new)) in enumerate(zip(tokens, got, strict=True)):
        assert is_new == (token is None or token not in holders), i
        if token is not None:
            assert holders.setdefault(token, id_) == id_
        if is_new:
            assert payloads[id_] == f'{{"n":{i}}}'
    assert count(db) == 5 + n // 2 + n // 4 + 3
    check_tokens(db)


def test_the_same_load_again_writes_nothing(core: ProducerCore, db: psycopg.Connection) -> None:
    def load(step: int = 1) -> Iterator[Task]:
        return (task(f"t{i}", i) for i in range(0, 30_000, step))

    ids = [id_ for id_, _ in answers(core.enqueue_many(load(), 10_000))]
    assert answers(core.enqueue_many(load(), 10_000)) == [(id_, False) for id_ in ids]
    assert answers(core.enqueue_many(load(), None)) == [(id_, False) for id_ in ids]
    assert count(db) == 30_000
    check_tokens(db)


def test_gaps_of_known_duplicates_dont_cut_chunks(core: ProducerCore, db: psycopg.Connection) -> None:
    core.enqueue_many((task(f"t{i}", i) for i in range(0, 40_000, 2)), None)
    before = value(db, "SELECT count(*) FROM ready")
    got = answers(core.enqueue_many((task(f"t{i}", i) for i in range(40_000)), 10_000))
    assert [is_new for _, is_new in got] == [bool(i % 2) for i in range(40_000)]
    # The first batch learns of it the hard way.
    assert value(db, "SELECT count(*) FROM ready") - before < 5_000 + 40
    check_tokens(db)


def test_types_and_delays_mixed(core: ProducerCore, db: psycopg.Connection) -> None:
    tasks = [task(f"t{i % 700}", i, type=f"type {i % 3}", delay=60 if i % 5 == 0 else None) for i in range(6_300)]
    got = answers(core.enqueue_many(tasks, None))
    firsts: dict[tuple[str, str | None], int] = {}
    for one, (id_, is_new) in zip(tasks, got, strict=True):
        key = (one.type, one.idempotency_token)
        assert is_new == (key not in firsts)
        assert firsts.setdefault(key, id_) == id_
    assert count(db) == len(firsts)
    check_tokens(db)


def test_a_rollback_frees_the_tokens(core: ProducerCore, db: psycopg.Connection) -> None:
    def failing(n: int) -> Iterator[Task]:
        yield from (task(f"t{i}", i) for i in range(n))
        raise RuntimeError

    for n in (20, 20_000):
        with pytest.raises(EnqueueError):
            core.enqueue_many(failing(n), None)
    assert value(db, "SELECT count(*) FROM token") == 0
    assert core.enqueue(task("t3"))[1]


# --- against others --------------------------------------------------------------------------------


def hold(db: psycopg.Connection, dsn: str, *tokens: str) -> psycopg.Connection:
    """A transaction of somebody's that has taken these tokens of type a, and is left open."""
    other = psycopg.connect(dsn)
    other.execute("SELECT set_config('search_path', %s, false)", [value(db, "SHOW search_path")])
    other.cursor().executemany("INSERT INTO token (type, token, id) VALUES ('a', %s, 999999)", [[t] for t in tokens])
    return other


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_token_in_an_open_transaction_holds_up_only_its_own_task(
    core: ProducerCore, dsn: str, db: psycopg.Connection, end: str
) -> None:
    core.enqueue(task(None))
    with hold(db, dsn, "x") as other:
        blocked = Background(lambda: core.enqueue(task("x", 7)))
        wait_until(lambda: blocked_backends(db) > 0)
        started = time.monotonic()
        others = [Background(partial(core.enqueue, task(None if n % 2 else f"free{n}", n))) for n in range(40)]
        assert all(call.result(timeout=15)[1] for call in others)
        # And from now on nobody waits any more, whoever else asks for the token.
        started = time.monotonic()
        more = []
        for n in range(20):
            more.append(Background(partial(core.enqueue, task("x", n))))
            assert core.enqueue(task(f"more{n}", n))[1]
        assert time.monotonic() - started < 2.0
        assert not blocked.is_done
        getattr(other, end)()
    id_, is_new = blocked.result()
    got = [call.result() for call in more]
    assert len({id_, *(each for each, _ in got)}) == 1
    assert is_new + sum(new for _, new in got) == (end == "rollback")
    is_new = end == "rollback"
    assert (id_ == 999_999, is_new) == ((True, False) if end == "commit" else (False, True))


def test_several_blocked_tokens(core: ProducerCore, dsn: str, db: psycopg.Connection) -> None:
    core.enqueue(task(None))
    with hold(db, dsn, "x") as first, hold(db, dsn, "y") as second:
        calls = {token: Background(partial(core.enqueue, task(token))) for token in "xyxyzw"}
        plain = [Background(partial(core.enqueue, task(f"f{n}", n))) for n in range(100)]
        assert all(call.result(timeout=15)[1] for call in plain)
        assert calls["z"].result(timeout=15)[1]
        assert calls["w"].result(timeout=15)[1]
        second.rollback()
        assert calls["y"].result()[0] != 999_999
        assert not calls["x"].is_done
        first.commit()
        assert calls["x"].result() == (999_999, False)


def test_a_token_that_stays_blocked_is_an_error_in_the_end(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    with producing(dsn, migrated, statement_timeout=3.0) as core, hold(db, dsn, "x"):
        with pytest.raises(DatabaseError, match="holds the idempotency token") as refused:
            core.enqueue(task("x"))
        assert refused.value.sqlstate == "55P03"
        assert refused.value.is_transient
        with pytest.raises(
            DatabaseError, match=r"holds an idempotency token of the call.*nothing of the call is written"
        ):
            core.enqueue_many([task(f"many{i}") for i in range(100)] + [task("x")], None)
        assert value(db, "SELECT count(*) FROM token") == 0
        assert core.enqueue(task("y"))[1]


def test_a_load_waits_for_a_token_and_goes_on(core: ProducerCore, dsn: str, db: psycopg.Connection) -> None:
    with hold(db, dsn, "t77") as other:
        call = Background(lambda: answers(core.enqueue_many((task(f"t{i}", i) for i in range(20_000)), None)))
        wait_until(lambda: blocked_backends(db) > 0)
        assert core.enqueue(task(None))[1]
        other.commit()
    got = call.result()
    assert got[77] == (999_999, False)
    assert sum(is_new for _, is_new in got) == 19_999


@pytest.mark.parametrize("every", [None, 10_000])
def test_loads_that_take_the_same_tokens_crosswise_all_succeed(
    core: ProducerCore, dsn: str, migrated: str, db: psycopg.Connection, every: int | None
) -> None:
    """In one transaction each, batch after batch, they deadlock; one is sent again from its start."""
    tokens = [f"t{i}" for i in range(20_000)]
    with producing(dsn, migrated) as other:
        calls = [
            Background(partial(c.enqueue_many, [task(t) for t in order], every))
            for c, order in ((core, tokens), (other, tokens[10_000:] + tokens[:10_000]))
        ]
        one, two = (answers(call.result(90.0)) for call in calls)
    assert [id_ for id_, _ in one] == [id_ for id_, _ in two[10_000:] + two[:10_000]]
    assert sum(is_new for _, is_new in one + two) == 20_000 == count(db)
    check_tokens(db)


def test_large_loads_that_take_the_same_tokens_crosswise_all_succeed(
    core: ProducerCore, dsn: str, migrated: str, db: psycopg.Connection
) -> None:
    """Too large to be kept in memory: the one that lost reads its first batches back from a file."""
    tokens = [f"t{i}" for i in range(160)]
    started = threading.Barrier(2)

    def load(order: list[str]) -> Iterator[Task]:
        for n, token in enumerate(order):
            if n == len(order) // 2:
                # Both hold what the other will want.
                started.wait(30)
            yield Task("a", token.encode() * 100_000, idempotency_token=token)

    with producing(dsn, migrated) as other:
        calls = [
            Background(partial(c.enqueue_many, load(order), None))
            for c, order in ((core, tokens), (other, tokens[80:] + tokens[:80]))
        ]
        one, two = (answers(call.result(90.0)) for call in calls)
    assert [id_ for id_, _ in one] == [id_ for id_, _ in two[80:] + two[:80]]
    assert sum(is_new for _, is_new in one + two) == 160 == count(db)
    rows = db.execute("SELECT token, payload FROM token JOIN task USING (id)").fetchall()
    assert {token: token.encode() * 100_000 for token in tokens} == dict(rows)
    check_tokens(db)


def test_chaos_of_tokens(dsn: str, migrated: str, db: psycopg.Connection) -> None:
    """Loads and single enqueues of the same tokens, in any order, from several producers: every token has one task."""

    def work(seed: int) -> dict[str, set[int]]:
        rng = random.Random(seed)
        seen: dict[str, set[int]] = {}
        with producing(dsn, migrated) as core:
            for _ in range(6):
                tokens = [f"t{rng.randrange(3_000)}" for _ in range(rng.choice([1, 30, 2_000]))]
                got = answers(core.enqueue_many([task(t) for t in tokens], rng.choice([None, 500])))
                for token, (id_, _) in zip(tokens, got, strict=True):
                    seen.setdefault(token, set()).add(id_)
        return seen

    merged: dict[str, set[int]] = {}
    for seen in gather([partial(work, seed) for seed in range(5)], 100.0):
        for token, ids in seen.items():
            merged.setdefault(token, set()).update(ids)
    assert all(len(ids) == 1 for ids in merged.values())
    assert len(merged) == count(db)
    check_tokens(db)
