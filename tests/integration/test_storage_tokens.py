"""Idempotency tokens: unique for a type while their task is kept, and never a reason for a bulk load to fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.storage import (
    Leader,
    Session,
    Worker,
    delay,
    enqueue,
    in_background,
    reserve,
    wait_blocked,
)

OpenSession = Callable[[], Session]


def take(session: Session, tokens: Sequence[str], first: int, type_: str = "t") -> list[int]:
    """Takes tokens, sorted, for tasks numbered from `first`; gives the ids of those that were free."""
    ordered = sorted(set(tokens))
    rows = session.run("insert_tokens", [type_] * len(ordered), ordered, list(range(first, first + len(ordered))))
    return [id_ for (id_,) in rows]


def find(session: Session, tokens: Sequence[str], type_: str = "t") -> dict[str, int]:
    """Who holds these tokens."""
    rows = session.run("find_tokens", [type_] * len(tokens), list(tokens))
    return {tokens[n - 1]: id_ for n, id_, _ in rows}


def test_a_token_belongs_to_the_first_that_takes_it(store: Session) -> None:
    assert take(store, ["a", "b"], 1) == [1, 2]
    assert take(store, ["a", "c"], 11) == [12]
    assert find(store, ["c", "a", "nobody", "b"]) == {"a": 1, "b": 2, "c": 12}


def test_a_token_is_unique_within_its_type(store: Session) -> None:
    assert take(store, ["a"], 1) == [1]
    assert take(store, ["a"], 2, "other") == [2]
    assert find(store, ["a"], "other") == {"a": 2}


def test_tokens_that_differ_in_case_or_trailing_space_differ(store: Session) -> None:
    assert len(take(store, ["a", "A", "a ", "\u00e1", "a\u0301"], 1)) == 5


def test_a_token_in_an_open_transaction_blocks_and_its_owner_is_then_found(
    store: Session, open_session: OpenSession
) -> None:
    """The insert that waited does not see what committed meanwhile; a second statement does."""
    first, second = open_session(), open_session()
    first.begin()
    assert take(first, ["a"], 1) == [1]
    second.begin()
    with in_background(second, lambda: take(second, ["a", "b"], 11)) as late:
        wait_blocked(store, second)
        assert find(store, ["a"]) == {}
        first.commit()
        assert late.result(30) == [12]
    assert find(second, ["a", "b"]) == {"a": 1, "b": 12}
    second.commit()


def test_a_token_whose_transaction_rolled_back_is_free(store: Session, open_session: OpenSession) -> None:
    first, second = open_session(), open_session()
    first.begin()
    take(first, ["a"], 1)
    with in_background(second, lambda: take(second, ["a"], 11)) as late:
        wait_blocked(store, second)
        first.rollback()
        assert late.result(30) == [11]


@pytest.mark.parametrize("seed", [1, 2])
def test_rule_8_loads_with_the_same_tokens_do_not_deadlock(
    store: Session, open_session: OpenSession, seed: int
) -> None:
    """Sorted before the insert, in whatever order they came. A deadlock would raise here."""
    names = [f"token-{n}" for n in range(300)]
    for_each = [(open_session(), random.Random(f"{seed} {n}"), n) for n in range(4)]

    def load(session: Session, rnd: random.Random, n: int) -> set[int]:
        taken: set[int] = set()
        for turn in range(10):
            session.begin()
            taken.update(take(session, rnd.sample(names, 100), 1 + 100 * (turn + 10 * n)))
            session.commit()
        return taken

    with ThreadPoolExecutor(4) as pool:
        results = [future.result(60) for future in [pool.submit(load, *args) for args in for_each]]
    holders = set(find(store, names).values())
    assert holders == set().union(*results)
    assert len(holders) == sum(len(taken) for taken in results) == store.value("SELECT count(*) FROM fastq.token")


# --- how long a token is held --------------------------------------------------------------------


@pytest.fixture
def leader(store: Session) -> Leader:
    found = Leader(store)
    found.tick()
    return found


def age(store: Session) -> None:
    """All tokens were taken a year ago."""
    store.sql("UPDATE fastq.token SET created_at = created_at - interval '1 year'")


def purge(leader: Leader, step: int = 100) -> int:
    """A round over all tokens; gives how many went."""
    gone: int = 0
    key: tuple[str | None, str | None] = ("", "")
    for _ in range(100):
        tokens, *last = leader.one("purge_tokens", 3600.0, *key, step)
        gone += tokens
        key = (last[0], last[1])
        if key == (None, None):
            return gone
    raise AssertionError("the round does not end")


def test_a_token_is_held_while_its_task_is_kept_in_any_state(store: Session, leader: Leader) -> None:
    waiting, running, completed, delayed, dead = enqueue(store, 5, chunk=1)
    worker = Worker(store, 1)
    held = {id_: chunk.no for chunk in worker.claim(5) for id_ in range(chunk.lo, chunk.upto + 1)}
    worker.complete({held[completed]: [completed]})
    worker.fail(held[delayed], [delayed], 60.0)
    worker.fail(held[dead], [dead])
    worker.give_back({held[waiting]: [waiting]})
    scheduled = reserve(store, 1)
    delay(store, [scheduled], 60.0)
    for id_ in (waiting, running, completed, delayed, dead, scheduled):
        assert take(store, [f"for-{id_}"], id_) == [id_]
    age(store)
    assert purge(leader) == 0

    # The completed one goes with its leaf, the dead one at the end of its retention; what waits goes on.
    worker.complete({held[running]: [running]})
    leader.run("open_leaf", 0.0)
    leader.run("move_chunks", 0, 10)
    leader.run("carry_delayed", 0, 10)
    assert leader.empty_leaf(0)
    assert purge(leader) == 2
    assert set(find(store, [f"for-{id_}" for id_ in (waiting, delayed, dead, scheduled)]).values()) == {
        waiting,
        delayed,
        dead,
        scheduled,
    }
    store.sql("UPDATE fastq.dead SET ended_at = ended_at - interval '1 year'")
    leader.run("purge_dead", ["failed"], [None], [3600.0], 10)
    assert purge(leader) == 1
    assert find(store, [f"for-{dead}"]) == {}


def test_a_freed_token_can_be_taken_again(store: Session, leader: Leader) -> None:
    take(store, ["a"], 1)
    age(store)
    assert purge(leader) == 1
    assert take(store, ["a"], 11) == [11]


def test_tokens_are_looked_at_in_steps(store: Session, leader: Leader) -> None:
    take(store, [f"{n:02}" for n in range(25)], 1)
    take(store, [f"{n:02}" for n in range(25)], 101, "u")
    age(store)
    assert leader.one("purge_tokens", 3600.0, "", "", 10) == (10, "t", "09")
    assert leader.one("purge_tokens", 3600.0, "t", "19", 10) == (10, "u", "04")
    assert purge(leader, 7) == 30


def test_young_tokens_are_not_touched(store: Session, leader: Leader) -> None:
    """Their tasks may lie in a transaction that is not over."""
    take(store, ["a"], 1)
    assert purge(leader) == 0
    assert find(store, ["a"]) == {"a": 1}


def test_a_token_of_a_failed_task_that_was_forgotten_goes_with_its_leaf(store: Session, leader: Leader) -> None:
    """With failed tasks kept for less than completed ones: it is not freed at once, but not held for ever either."""
    [id_] = enqueue(store)
    assert take(store, ["a"], id_) == [id_]
    worker = Worker(store, 1)
    worker.claim(1)
    worker.fail(1, [id_])
    age(store)
    assert leader.one("purge_dead", ["failed"], [None], [0.0], 10) == (1,)
    assert purge(leader) == 0
    leader.run("open_leaf", 0.0)
    assert leader.empty_leaf(0)
    assert purge(leader) == 1


def test_an_enqueue_that_meets_a_token_being_freed_takes_it(
    store: Session, leader: Leader, open_session: OpenSession
) -> None:
    take(store, ["a"], 1)
    age(store)
    store.begin()
    assert purge(leader) == 1
    other = open_session()
    with in_background(other, lambda: take(other, ["a"], 11)) as late:
        wait_blocked(open_session(), other)
        store.commit()
        assert late.result(30) == [11]
    assert find(store, ["a"]) == {"a": 11}
