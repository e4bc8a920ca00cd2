"""The statements of ``sql/queries`` by hand: what an engine would send, one step at a time, so that tests decide what happens when."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg.types.numeric import Int8BinaryDumper, Int8Dumper

from fastq import _engine
from tests.support.waiting import wait_until

T = TypeVar("T")
Row = tuple[Any, ...]

#: What the engine sets on each of its connections.
SETTINGS = ("SET enable_seqscan = off", "SET plan_cache_mode = force_generic_plan", "SET jit = off")
TEXTS = _engine.queries()
#: All tracks of a lane, in the order in which they are claimed.
TRACKS = (4, 3, 2, 1, 0)


class Session:
    """A connection that runs statements by name as the engine does: prepared, with a generic plan. It commits each one
    unless a transaction was begun."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.schema = schema
        self.connection = psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.RawCursor)
        self.connection.adapters.register_dumper(int, Int8Dumper)
        self.connection.adapters.register_dumper(int, Int8BinaryDumper)
        self.pid = self.connection.info.backend_pid
        for setting in SETTINGS:
            self.connection.execute(setting)

    def run(self, name: str, *params: object, leaf: int | None = None) -> list[Row]:
        """The statement of that name."""
        text = TEXTS[name] if leaf is None else TEXTS[name].replace("{leaf}", f"{leaf:02}")
        return self.sql(text, *params, prepare=leaf is None)

    def one(self, name: str, *params: object, leaf: int | None = None) -> Row:
        """The only row of the statement of that name."""
        [row] = self.run(name, *params, leaf=leaf)
        return row

    def sql(self, text: str, *params: object, prepare: bool = False) -> list[Row]:
        """Any statement, in the same style."""
        cursor = self.connection.execute(
            _engine.render(text, self.schema), params or None, prepare=prepare and bool(params)
        )
        return cursor.fetchall() if cursor.description is not None else []

    def value(self, text: str, *params: object) -> Any:
        """The only value of a statement."""
        [[value]] = self.sql(text, *params)
        return value

    def begin(self) -> None:
        self.connection.execute("BEGIN")

    def commit(self) -> None:
        self.connection.execute("COMMIT")

    def rollback(self) -> None:
        self.connection.execute("ROLLBACK")

    def close(self) -> None:
        self.connection.close()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a claim took of one chunk."""

    no: int
    lane: int
    track: int
    rid: int
    leaf: int
    attempts: int
    max_attempts: int
    lo: int
    upto: int
    shrunk: bool
    ids: list[int] | None
    created_ats: list[Any] | None
    formats: list[Any] | None
    payloads: list[bytes] | None
    expires: bool


class Worker:
    """A consumer as the database knows it: an id, and claims numbered by itself."""

    def __init__(self, session: Session, id_: int, *, register: bool = True) -> None:
        self.session = session
        self.id = id_
        self.no = 0
        if register:
            session.run("register_consumer", id_, 1, "host", "0", ["t"], None)

    def claim(
        self,
        n: int = 1000,
        lanes: Sequence[int] = (1,),
        *,
        tracks: Sequence[int] = TRACKS,
        hint: int = 0,
        chunks: int = 100,
        byte_limit: int = 1 << 30,
    ) -> list[Chunk]:
        """Up to `n` tasks of the lanes, in their order."""
        asked = [(lane, track) for lane in lanes for track in tracks]
        columns = (
            [lane for lane, _ in asked],
            [track for _, track in asked],
            [hint] * len(asked),
            [0] * len(asked),
            [n] * len(asked),
            [chunks] * len(asked),
        )
        rows = self.session.run("claim_tasks", self.id, self.no, n, byte_limit, *columns, chunks)
        self.no += chunks  # no claim has more groups than it has chunks
        return [Chunk(*row) for row in rows]

    def complete(self, held: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        """Says that these ids of these claims are done; gives what was refused."""
        wanted = {no: sorted(ids) for no, ids in held.items()}
        pieces = [(no, piece) for no, ids in wanted.items() for piece in _pieces(ids)]
        rows = self.session.run(
            "complete_tasks",
            self.id,
            list(wanted),
            [multirange(ids) for ids in wanted.values()],
            [no for no, _ in pieces],
            [multirange(piece) for _, piece in pieces],
            [len(piece) for _, piece in pieces],
        )
        return {no: ids_of(refused) for no, refused in rows}

    def give_back(self, held: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        """Gives these ids back unstarted; gives what was refused."""
        rows = self.session.run("give_back_tasks", self.id, list(held), [multirange(ids) for ids in held.values()])
        return {no: ids_of(refused) for no, refused in rows}

    def fail(self, no: int, ids: Sequence[int], delay: float | None = None) -> list[int]:
        """Says that these ids of a claim failed; gives what was refused."""
        count = len(ids)
        rows = self.session.run(
            "fail_tasks",
            self.id,
            [no] * count,
            list(ids),
            [delay] * count,
            ["ValueError: no"] * count,
            [""] * count,
            [5] * count,
        )
        return [id_ for _, id_ in rows]

    def snooze(self, no: int, ids: Sequence[int], delay: float = 0.0) -> list[int]:
        """Puts these ids of a claim off; gives what was refused."""
        count = len(ids)
        rows = self.session.run("snooze_tasks", self.id, [no] * count, list(ids), [delay] * count)
        return [id_ for _, id_ in rows]

    def expire(self, no: int, ids: Sequence[int]) -> list[int]:
        """Says that these ids of a claim were not started in time; gives what was refused."""
        rows = self.session.run("expire_claimed", self.id, [no] * len(ids), list(ids))
        return [id_ for _, id_ in rows]

    def beat(self, running: Iterable[int] = (), *, stopping: bool = False, refused: int = 0) -> tuple[bool, list[int]]:
        """Alive, and the claims that it holds."""
        alive, held = self.session.one("beat_consumer", self.id, multirange(running), stopping, refused, self.no)
        return alive, held


class Leader:
    """Holds the lease, and does upkeep with it."""

    def __init__(self, session: Session, id_: int = 900, lease: float = 600.0) -> None:
        self.session = session
        self.id = id_
        self.lease = lease
        self.term = -1

    def tick(self, silent_after: float = 9.0) -> dict[str, Any]:
        """Takes or keeps the lease; what there is to do."""
        cursor = self.session.connection.execute(
            _engine.render(TEXTS["tick"], self.session.schema),
            (self.id, self.lease, self.lease / 2, silent_after, True),
            prepare=True,
        )
        assert cursor.description is not None
        [row] = cursor.fetchall()
        found = dict(zip((column.name for column in cursor.description), row, strict=True))
        self.term = -1 if found["term"] is None else found["term"]
        return found

    def run(self, name: str, *params: object) -> list[Row]:
        """A statement that only the leader may run."""
        return self.session.run(name, self.id, self.term, *params)

    def one(self, name: str, *params: object) -> Row:
        """Its only row."""
        [row] = self.run(name, *params)
        return row

    def declare_dead(self, *workers: Worker) -> None:
        """These workers fell silent a minute ago, and are found out."""
        for worker in workers:
            self.session.sql(
                "UPDATE fastq.consumer SET beat_at = beat_at - interval '1 minute' WHERE id = $1", worker.id
            )
        found = {row[0] for row in self.run("declare_dead", 9.0, [worker.id for worker in workers])}
        assert found >= {worker.id for worker in workers}

    def rescue(self, limit: int = 100) -> list[Row]:
        """Consumer, host, pid, claims, tasks, charged, failed."""
        return [row[:7] for row in self.run("rescue_claims", limit, None, "{}")]

    def empty_leaf(self, leaf: int, retention: float = 0.0) -> bool:
        """The whole transaction by which a leaf is emptied. False: something names it, or it is too young."""
        session = self.session
        session.begin()
        try:
            session.sql("SET LOCAL lock_timeout = '50ms'")
            session.run("lock_leaf", leaf=leaf)
            [[may_go]] = self.run("check_leaf_empty", leaf, retention)
            if may_go:
                session.run("free_leaf", leaf)
                session.run("truncate_leaf", leaf=leaf)
        except BaseException:
            session.rollback()
            raise
        session.commit()
        return bool(may_go)


def add_lane(session: Session, type_: str = "t", queue: str = "default", priority: int = 0) -> int:
    """The number of a lane, which is made if it is not there."""
    session.run("create_lane", queue, type_, priority)
    [[lane]] = session.run("find_lane", queue, type_, priority)
    return int(lane)


def reserve(session: Session, count: int) -> int:
    """The first of `count` ids that no one else has."""
    blocks = session.run("reserve_ids", -(-count // 1000))
    return int(blocks[0][0])


def enqueue(
    session: Session,
    count: int = 1,
    *,
    lane: int = 1,
    leaf: int = 0,
    chunk: int = 500,
    max_attempts: int = 3,
    first: int | None = None,
    payload: bytes = b'{"n":1}',
) -> range:
    """`count` alike tasks in chunks, as a producer's single statement writes them. Gives their ids."""
    lo = reserve(session, count) if first is None else first
    ids = range(lo, lo + count)
    parts = [ids[i : i + chunk] for i in range(0, count, chunk)]
    session.run(
        "enqueue_tasks",
        leaf,
        list(ids),
        [lane] * count,
        [max_attempts] * count,
        ["j"] * count,
        [payload] * count,
        [lane] * len(parts),
        [max_attempts] * len(parts),
        [len(payload)] * len(parts),
        [part[0] for part in parts],
        [part[-1] for part in parts],
        None,
        None,
    )
    return ids


def delay(session: Session, ids: Sequence[int], seconds: float, *, lane: int = 1, max_attempts: int = 3) -> None:
    """Tasks for later, with their payload."""
    count = len(ids)
    session.run(
        "delay_tasks",
        list(ids),
        [lane] * count,
        [max_attempts] * count,
        ["j"] * count,
        [b'{"n":1}'] * count,
        [seconds] * count,
        [None] * count,
        [],
    )


def multirange(ids: Iterable[int]) -> str:
    """Ids as the text of an int8multirange."""
    return "{" + ",".join(f"[{run[0]},{run[-1] + 1})" for run in _runs(sorted(ids))) + "}"


def ids_of(ranges: Any) -> list[int]:
    """The ids that a multirange holds."""
    return [id_ for found in ranges for id_ in range(found.lower, found.upper)]


def states(session: Session) -> dict[int, str]:
    """Each task's state as the view shows it; fails if it shows one twice."""
    rows = session.sql("SELECT id, state FROM fastq.tasks ORDER BY id")
    assert len({id_ for id_, _ in rows}) == len(rows), "the view shows a task twice"
    return dict(rows)


def chunks_of(session: Session) -> list[Row]:
    """What waits, as (track, leaf, attempts, lo, hi) in the order of claims."""
    return session.sql("SELECT track, leaf, attempts, lo, hi FROM fastq.ready ORDER BY track DESC, rid")


def claims_of(session: Session) -> dict[tuple[int, int], list[int]]:
    """What runs: (consumer, no) → ids."""
    rows = session.sql("SELECT consumer, no, ids FROM fastq.claim")
    return {(consumer, no): ids_of(ids) for consumer, no, ids in rows}


def done_ids(session: Session) -> list[int]:
    """All ids that were completed, as often as they were."""
    return sorted(id_ for (ids,) in session.sql("SELECT ids FROM fastq.done") for id_ in ids_of(ids))


@contextmanager
def in_background(session: Session, call: Callable[[], T]) -> Iterator[Future[T]]:
    """`call`, which uses `session`, in a thread of its own. If the block fails, what it still waits for is cancelled."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        try:
            yield future
        except BaseException:
            session.connection.cancel_safe()
            raise


def wait_blocked(observer: Session, session: Session) -> None:
    """Until `session` waits for a lock that another one holds."""
    wait_until(
        lambda: observer.value("SELECT cardinality(pg_blocking_pids($1::integer))", session.pid) > 0,
        message=f"the statement of server process {session.pid} waits for a lock",
    )


def _runs(ids: Sequence[int]) -> list[list[int]]:
    grouped = itertools.groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])
    return [[id_ for _, id_ in run] for _, run in grouped]


def _pieces(ids: Sequence[int]) -> list[list[int]]:
    """Cut so that each spans less than 1,024."""
    pieces: list[list[int]] = []
    for id_ in ids:
        if not pieces or id_ - pieces[-1][0] >= 1024:
            pieces.append([])
        pieces[-1].append(id_)
    return pieces


__all__ = [name for name in dir() if not name.startswith("_")]
