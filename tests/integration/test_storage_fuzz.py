"""The statements under faults: killed connections, zombies, lost answers, two leaders, leaves that move. Each task ends exactly once."""

from __future__ import annotations

import collections
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import psycopg
import pytest

from tests.support.storage import Leader, Session, Worker, add_lane, delay, enqueue, ids_of
from tests.support.waiting import wait_until

TASKS = 10_000
#: What waits may not grow beyond this, so that enqueue and consumption overlap.
BACKLOG = 1500
MAX_ATTEMPTS = 4

#: Notes each end in the transaction that brings it about: leaves are emptied while the test runs, and rows of `done` go with them.
NOTE_ENDS = """
CREATE TABLE fastq.ended (id bigint NOT NULL, how text NOT NULL);
CREATE FUNCTION fastq.note_done() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO fastq.ended SELECT i, 'completed' FROM unnest(NEW.ids) r, generate_series(lower(r), upper(r) - 1) i;
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT ON fastq.done FOR EACH ROW EXECUTE FUNCTION fastq.note_done();
CREATE FUNCTION fastq.note_dead() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO fastq.ended VALUES (NEW.id, NEW.state);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT ON fastq.dead FOR EACH ROW EXECUTE FUNCTION fastq.note_dead();
"""


class World:
    """What the threads share."""

    def __init__(self, dsn: str, schema: str, seed: int) -> None:
        self.dsn = dsn
        self.schema = schema
        self.seed = seed
        self.over = threading.Event()
        self.pids: dict[str, int] = {}
        self.seen: collections.Counter[str] = collections.Counter()

    def rnd(self, who: str) -> random.Random:
        return random.Random(f"{self.seed} {who}")

    def connect(self, who: str) -> Session:
        """A new session under that name, for the killer to find."""
        session = Session(self.dsn, self.schema)
        self.pids[who] = session.pid
        return session


class Mortal:
    """A consumer whose connection breaks and which dies without noticing; it goes on under a new id then, as an engine does."""

    def __init__(self, world: World, who: str, lanes: list[int]) -> None:
        self.world = world
        self.who = who
        self.lanes = lanes
        self.rnd = world.rnd(who)
        self.worker: Worker | None = None
        self.held: dict[int, set[int]] = {}
        self.ghosts: list[tuple[Worker, dict[int, set[int]]]] = []
        """Ids under which it was declared dead, and what it held then."""

    def run(self) -> None:
        session: Session | None = None
        while not self.world.over.is_set():
            try:
                if session is None:
                    session = self.world.connect(self.who)
                    if self.worker is not None:
                        self.worker.session = session
                if self.worker is None:
                    # Known only once it is registered: registered under an answer that was lost, it would hold nothing.
                    self.worker = Worker(session, self.rnd.getrandbits(62))
                self.step(self.worker)
            except psycopg.OperationalError as error:
                if session is not None and not session.connection.closed:
                    raise AssertionError("only a lost connection may fail a statement") from error
                self.world.seen["connections lost"] += session is not None
                session = None
        if session is not None:
            session.close()

    def step(self, worker: Worker) -> None:
        for action, weight in (
            (self.beat, 0.3),
            (self.claim, 0.6),
            (self.flush, 0.9),
            (self.haunt, 0.3),
            (self.freeze, 0.02),
        ):
            if self.rnd.random() < weight:
                action(worker)

    def beat(self, worker: Worker) -> None:
        every = sorted(itertools.chain(*self.held.values()))
        alive, held = worker.beat(self.rnd.sample(every, min(len(every), 3)), stopping=self.rnd.random() < 0.1)
        if not alive:
            self.world.seen["declared dead"] += 1
            self.ghosts.append((worker, self.held))
            self.held, self.worker = {}, Worker(worker.session, self.rnd.getrandbits(62))
        elif lost := [no for no in held if no not in self.held]:
            self.world.seen["claims whose answer was lost"] += len(lost)
            rows = worker.session.run("read_claims", worker.id, lost)
            worker.give_back({no: ids_of(ids) for no, ids in rows})

    def claim(self, worker: Worker) -> None:
        if sum(map(len, self.held.values())) > 300 or worker is not self.worker:
            return
        n = self.rnd.choice([1, 3, 20, 100, 700])
        chunks = worker.claim(n, self.rnd.sample(self.lanes, len(self.lanes)), chunks=self.rnd.choice([1, 2, 50]))
        if self.rnd.random() < 0.03:
            return  # Its answer was lost on the way: a beat finds what it took.
        for chunk in chunks:
            assert chunk.ids == list(range(chunk.lo, chunk.upto + 1)), "a claim without its content"
            assert chunk.attempts < MAX_ATTEMPTS
            self.held.setdefault(chunk.no, set()).update(chunk.ids)

    def flush(self, worker: Worker) -> None:
        if worker is not self.worker or not self.held:
            return
        nos = self.rnd.sample(sorted(self.held), min(len(self.held), 3))
        part = {no: set(self.rnd.sample(sorted(self.held[no]), self.rnd.randint(1, len(self.held[no])))) for no in nos}
        what = self.rnd.random()
        if what < 0.75:
            worker.complete(part)
        elif what < 0.85:
            worker.give_back(part)
        else:
            no = nos[0]
            part = {no: part[no]}
            # A task fails for good after its last attempt, as the handler's side decides it.
            attempts: dict[int, int] = dict(
                worker.session.sql("SELECT no, attempts FROM fastq.claim WHERE consumer = $1", worker.id)
            )
            final = attempts.get(no, 0) + 1 >= MAX_ATTEMPTS or what > 0.98
            worker.fail(no, sorted(part[no]), None if final else 0.0)
        # Sent and answered: whatever was refused is not ours either. (A lost answer leaves all as it was; it is sent again.)
        for no, ids in part.items():
            self.held[no] -= ids
            if not self.held[no]:
                del self.held[no]

    def haunt(self, worker: Worker) -> None:
        """Results of a run that was taken away: refused, or the claim is still there and nobody else runs it."""
        if self.ghosts:
            ghost, held = self.ghosts[-1]
            ghost.session = worker.session
            if held:
                refused = ghost.complete(held)
                self.world.seen["refused to ghosts"] += sum(map(len, refused.values()))
            self.ghosts.pop()

    def freeze(self, worker: Worker) -> None:
        """It stood still for a minute, which it does not know."""
        worker.session.sql("UPDATE fastq.consumer SET beat_at = beat_at - interval '1 minute' WHERE id = $1", worker.id)


def produce(world: World, lanes: list[int]) -> list[int]:
    """Tasks in runs of many sizes, some of them for later, into the leaf that is open."""
    session, rnd = world.connect("producer"), world.rnd("producer")
    ids: list[int] = []

    def has_room() -> bool:
        waiting = session.value("SELECT coalesce(sum(hi - lo + 1), 0) FROM fastq.ready")
        return world.over.is_set() or bool(waiting < BACKLOG)

    while len(ids) < TASKS:
        [(lo, _, leaf)] = session.run("reserve_ids", 1)
        count, lane = rnd.choice([1, 1, 5, 50, 400]), rnd.choice(lanes)
        if rnd.random() < 0.2:
            delay(session, range(lo, lo + count), 0.0, lane=lane, max_attempts=MAX_ATTEMPTS)
        else:
            enqueue(
                session, count, first=lo, leaf=leaf, lane=lane, chunk=rnd.choice([1, 7, 500]), max_attempts=MAX_ATTEMPTS
            )
        ids += range(lo, lo + count)
        wait_until(has_room, timeout=60)
    del world.pids["producer"]
    session.close()
    return ids


def lead(world: World, who: str) -> None:
    """All upkeep, over and over. Two do it at once, under one name and term: neither may rely on being alone."""
    session, rnd = Session(world.dsn, world.schema), world.rnd(who)
    leader = Leader(session)
    while not world.over.is_set():
        open_leaf = leader.tick()["open_leaf"]
        leader.run("declare_dead", 9.0, leader.tick()["silent"])
        world.seen["claims rescued"] += sum(row[3] for row in leader.rescue(rnd.choice([1, 50])))
        leader.run("forget_consumers")
        world.seen["promoted"] += leader.one("promote_tasks", rnd.choice([1, 20, 500]), open_leaf)[0]
        if rnd.random() < 0.2:
            world.seen["leaves opened"] += len(leader.run("open_leaf", 0.0))
        for (leaf,) in session.run("list_leaves_to_empty", 0.0):
            world.seen["moved"] += leader.one("move_chunks", leaf, rnd.choice([1, 20]))[1]
            world.seen["carried"] += leader.one("carry_delayed", leaf, 20)[0]
            with suppress(psycopg.errors.LockNotAvailable):
                world.seen["leaves emptied"] += leader.empty_leaf(leaf)
    session.close()


def kill(world: World) -> None:
    """Ends a connection, and the next one once that has been replaced."""
    session, rnd = Session(world.dsn, world.schema), world.rnd("killer")
    while not world.over.is_set():
        who = rnd.choice([name for name in list(world.pids) if name != "producer"] or [""])
        if pid := world.pids.get(who):
            session.sql("SELECT pg_terminate_backend($1::integer)", pid)
            world.seen["kills"] += 1
            wait_until(lambda who=who, pid=pid: world.over.is_set() or world.pids.get(who) != pid)  # type: ignore[misc]
            world.over.wait(rnd.random() / 10)
    session.close()


@contextmanager
def running(world: World, *parts: Callable[[], object]) -> Iterator[list[Future[object]]]:
    """Each part in a thread of its own, until the block ends."""
    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(part) for part in parts]
        try:
            yield futures
        finally:
            world.over.set()
            wait(futures, timeout=60)
    for future in futures:
        future.result(0)


@pytest.mark.parametrize("seed", [20261122])
def test_each_task_ends_exactly_once_whatever_breaks(dsn: str, store: Session, seed: int) -> None:
    lanes = [1, add_lane(store, "t", "other"), add_lane(store, "u", priority=5)]
    store.sql(NOTE_ENDS)
    world = World(dsn, store.schema, seed)
    mortals = [Mortal(world, f"consumer {n}", lanes) for n in range(3)]
    ids: list[int] = []
    with running(
        world,
        lambda: ids.extend(produce(world, lanes)),
        *(mortal.run for mortal in mortals),
        lambda: lead(world, "leader"),
        lambda: lead(world, "twin"),
        lambda: kill(world),
    ) as parts:

        def finished() -> bool:
            failed = [part for part in wait(parts, timeout=0, return_when=FIRST_EXCEPTION).done if part.exception()]
            return bool(failed) or (parts[0].done() and store.value("SELECT count(*) FROM fastq.ended") >= len(ids))

        wait_until(finished, timeout=100, message=f"the end of all tasks; so far {dict(world.seen)}")
    ended = collections.Counter(id_ for (id_,) in store.sql("SELECT id FROM fastq.ended"))
    assert {id_: times for id_, times in ended.items() if times > 1} == {}
    assert sorted(ended) == sorted(ids)
    left = store.sql("SELECT count(*) FROM fastq.ready UNION ALL SELECT count(*) FROM fastq.delayed")
    assert left == [(0,), (0,)]
    # What is left of claims belongs to nobody and holds nothing; what never happened was not tested.
    assert [ids_of(found) for (found,) in store.sql("SELECT ids FROM fastq.claim")] == []
    for event in (
        "kills",
        "connections lost",
        "declared dead",
        "claims rescued",
        "claims whose answer was lost",
        "refused to ghosts",
        "promoted",
        "moved",
        "leaves opened",
        "leaves emptied",
    ):
        assert world.seen[event] > 0, (event, world.seen)
