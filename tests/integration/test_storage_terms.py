"""Each statement of upkeep asks who leads: with something to do for it, one who led before does nothing, and the leader does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.support.leaves import close_leaf, leaf_states, run_all
from tests.support.storage import Leader, Session, Worker, chunks_of, claims_of, delay, enqueue


@dataclass(frozen=True, slots=True)
class _Upkeep:
    """One statement."""

    prepare: Callable[[Session, Leader], object]
    """Gives it something to do."""
    act: Callable[[Leader], object]
    look: Callable[[Session], Any]
    """What it changes."""


def _lose(store: Session, *, claim: bool) -> None:
    worker = Worker(store, 1)
    if claim:
        enqueue(store, 2)
        worker.claim(2)
    store.sql("UPDATE fastq.consumer SET dead_at = clock_timestamp()")


def _fall_silent(store: Session) -> None:
    Worker(store, 1)
    store.sql("UPDATE fastq.consumer SET beat_at = beat_at - interval '1 hour'")


def _fail(store: Session, seconds: float | None) -> None:
    ids = enqueue(store, 2)
    worker = Worker(store, 1)
    worker.claim(2)
    worker.fail(1, ids, seconds)


def _close(store: Session, leader: Leader, *, then: Callable[[Session], object]) -> None:
    then(store)
    close_leaf(leader)


def _expire(store: Session) -> None:
    enqueue(store, 2)
    store.sql("UPDATE fastq.task SET expires_at = now()")
    store.sql("UPDATE fastq.ready SET expires_at = now()")


def _expire_delayed(store: Session) -> None:
    delay(store, [5_000_001], 60.0)
    store.sql("UPDATE fastq.delayed SET expires_at = now()")


_UPKEEP: Final = {
    "declare_dead": _Upkeep(
        lambda store, _: _fall_silent(store),
        lambda leader: leader.run("declare_dead", 9.0, [1]),
        lambda store: store.sql("SELECT dead_at FROM fastq.consumer"),
    ),
    "rescue_claims": _Upkeep(lambda store, _: _lose(store, claim=True), lambda leader: leader.rescue(), claims_of),
    "forget_consumers": _Upkeep(
        lambda store, _: _lose(store, claim=False),
        lambda leader: leader.run("forget_consumers"),
        lambda store: store.sql("SELECT id FROM fastq.consumer"),
    ),
    "promote_tasks": _Upkeep(
        lambda store, _: delay(store, [5_000_001], 0.0), lambda leader: leader.run("promote_tasks", 10, 0), chunks_of
    ),
    "postpone_task": _Upkeep(
        lambda store, _: delay(store, [5_000_001], 0.0),
        lambda leader: leader.run("postpone_task"),
        lambda store: store.sql("SELECT run_at FROM fastq.delayed"),
    ),
    "open_leaf": _Upkeep(lambda *_: None, lambda leader: leader.run("open_leaf", 0.0), leaf_states),
    "move_chunks": _Upkeep(
        lambda store, leader: _close(store, leader, then=lambda store: enqueue(store, 2)),
        lambda leader: leader.run("move_chunks", 0, 10),
        lambda store: store.sql("SELECT leaf FROM fastq.ready"),
    ),
    "carry_delayed": _Upkeep(
        lambda store, leader: _close(store, leader, then=lambda store: _fail(store, 60.0)),
        lambda leader: leader.run("carry_delayed", 0, 10),
        lambda store: store.sql("SELECT leaf FROM fastq.delayed ORDER BY id"),
    ),
    "check_leaf_empty": _Upkeep(
        lambda store, leader: _close(store, leader, then=lambda store: (enqueue(store, 2), run_all(store, 1))),
        lambda leader: leader.empty_leaf(0),
        leaf_states,
    ),
    "purge_dead": _Upkeep(
        lambda store, _: _fail(store, None),
        lambda leader: leader.run("purge_dead", ["failed"], [None], [0.0], 10),
        lambda store: store.sql("SELECT id FROM fastq.dead ORDER BY id"),
    ),
    "purge_done": _Upkeep(
        lambda store, _: (enqueue(store, 2), run_all(store, 1)),
        lambda leader: leader.run("purge_done", 0, [None], [0.0], 10, 0),
        lambda store: store.sql("SELECT lo FROM fastq.done"),
    ),
    "expire_ready": _Upkeep(
        lambda store, _: _expire(store),
        lambda leader: leader.run("expire_ready", 10),
        chunks_of,
    ),
    "expire_delayed": _Upkeep(
        lambda store, _: _expire_delayed(store),
        lambda leader: leader.run("expire_delayed", 10),
        lambda store: store.sql("SELECT id FROM fastq.delayed"),
    ),
    "purge_errors": _Upkeep(
        lambda store, _: store.sql(
            "INSERT INTO fastq.attempt_error (id, consumer, no, attempt, error) VALUES (7, 1, 1, 1, 'no')"
        ),
        lambda leader: leader.run("purge_errors", 0.0, 0, 10),
        lambda store: store.sql("SELECT id FROM fastq.attempt_error"),
    ),
    "purge_tokens": _Upkeep(
        lambda store, _: store.sql("INSERT INTO fastq.token (type, token, id) VALUES ('t', 'x', 7)"),
        lambda leader: leader.run("purge_tokens", 0.0, "", "", 10),
        lambda store: store.sql("SELECT token FROM fastq.token"),
    ),
    "purge_results": _Upkeep(
        lambda store, _: store.sql("INSERT INTO fastq.result VALUES (7, now() - interval '1 s', 'j', '1')"),
        lambda leader: leader.run("purge_results", 10),
        lambda store: store.sql("SELECT id FROM fastq.result"),
    ),
    "resign_leader": _Upkeep(
        lambda *_: None,
        lambda leader: leader.run("resign_leader"),
        lambda store: store.sql("SELECT expires_at FROM fastq.leader"),
    ),
}


@pytest.mark.parametrize("statement", _UPKEEP)
def test_only_the_leader_does_upkeep(store: Session, statement: str) -> None:
    upkeep = _UPKEEP[statement]
    leader = Leader(store)
    leader.tick()
    upkeep.prepare(store, leader)
    before = upkeep.look(store)
    for id_, term in ((leader.id + 1, leader.term), (leader.id, leader.term - 1), (leader.id, leader.term + 1)):
        stale = Leader(store, id_)
        stale.term = term
        upkeep.act(stale)
        assert upkeep.look(store) == before
    upkeep.act(leader)
    assert upkeep.look(store) != before, "there was nothing to do"
