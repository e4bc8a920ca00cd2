"""The ring of leaves by hand: what a leader's round of retention does, and a worker that works off all there is."""

from __future__ import annotations

from tests.support.storage import Leader, Session, Worker


def close_leaf(leader: Leader) -> int:
    """Closes the open leaf; gives the one that is open now."""
    [[no]] = leader.run("open_leaf", 0.0)
    return int(no)


def leaf_states(store: Session) -> dict[int, str]:
    """The leaves that are not empty."""
    return dict(store.sql("SELECT no, state FROM fastq.leaf WHERE state <> 'empty'"))


def clear(leader: Leader, leaf: int, retention: float = 0.0) -> bool:
    """A round of retention on one leaf, as the leader makes it."""
    while leader.one("move_chunks", leaf, 10)[0]:
        pass
    while leader.one("carry_delayed", leaf, 10)[0]:
        pass
    return leader.empty_leaf(leaf, retention)


def run_all(store: Session, worker_id: int) -> list[int]:
    """A new worker claims all and completes it; gives the ids in the order of the claims."""
    worker = Worker(store, worker_id)
    ran: list[int] = []
    while chunks := worker.claim(1000):
        for chunk in chunks:
            assert chunk.ids == list(range(chunk.lo, chunk.upto + 1)), "a claim without its content"
            assert worker.complete({chunk.no: chunk.ids}) == {}
            ran += chunk.ids
    return ran
