"""What strikes during a chaos run, when, whom, and for how long: all of it is written down, since each re-run must be due to one."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import psycopg

from fastq import DatabaseError, Producer, Task
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from tests.chaos.run import Stage

#: Seconds between two faults.
_PAUSE: Final = (1.0, 4.0)
#: Seconds that a process stands still: well below the dead time, and well above.
_SHORT: Final = (0.5, 2.5)
_LONG: Final = (11.0, 14.0)
#: Seconds that a transaction stays open.
_OPEN: Final = (4.0, 12.0)
_OPEN_EFFECTS: Final = "SELECT pid FROM pg_stat_activity WHERE application_name = 'handler' AND xact_start IS NOT NULL"


class Fault(NamedTuple):
    """One that struck. Times by the monotonic clock, which all processes of a machine share."""

    kind: str
    pid: int
    """Of the process; 0: everybody's."""
    began: float
    ended: float


class Faults:
    """Strikes in an order that the seed gives, each kind once before any strikes again."""

    def __init__(self, stage: Stage, seed: str) -> None:
        self._stage = stage
        self._rnd = random.Random(seed)
        self._kinds: dict[str, Callable[[], None]] = {
            "kill worker": self._kill_worker,
            "kill producer": self._kill_producer,
            "short stop": lambda: self._stop_worker("short stop", self._rnd.uniform(*_SHORT)),
            "long stop": lambda: self._stop_worker("long stop", self._rnd.uniform(*_LONG)),
            "restart": lambda: self._restart("restart"),
            "crash": lambda: self._restart("crash"),
            "killed backends": self._kill_backends,
            "broken transaction": self._break_transactions,
            "held snapshot": self._hold_snapshot,
            "long transaction": self._write_long,
        }
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._struck: list[Fault] = []
        self._lasting: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def struck(self) -> list[Fault]:
        """All that struck so far."""
        with self._lock:
            return list(self._struck)

    @property
    def counts(self) -> dict[str, int]:
        """By kind how often it struck: also those that never did."""
        found = Counter(fault.kind for fault in self.struck)
        return {kind: found[kind] for kind in self._kinds}

    def check(self) -> None:
        """Raises what ended the strikes before their time."""
        if self._errors:
            raise self._errors[0]

    @contextmanager
    def striking(self) -> Iterator[None]:
        """They strike meanwhile; afterwards all goes on."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(120)
            for thread in self._lasting:
                thread.join(60)

    # --- inside ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                deck = list(self._kinds)
                self._rnd.shuffle(deck)
                for kind in deck:
                    if self._over.wait(self._rnd.uniform(*_PAUSE)):
                        return
                    self._kinds[kind]()
        except BaseException as error:  # noqa: BLE001 - raised by `check`
            self._errors.append(error)

    def _note(self, kind: str, began: float, *, pid: int = 0) -> None:
        with self._lock:
            self._struck.append(Fault(kind, pid, began, time.monotonic()))

    def _last(self, work: Callable[[], None]) -> None:
        """Lets it go on beside the others."""
        thread = threading.Thread(target=work, daemon=True)
        self._lasting.append(thread)
        thread.start()

    def _kill_worker(self) -> None:
        began, pid = self._stage.workers.kill_one(self._rnd)
        self._note("kill worker", began, pid=pid)

    def _kill_producer(self) -> None:
        began, pid = self._stage.producers.kill_one(self._rnd)
        self._note("kill producer", began, pid=pid)

    def _stop_worker(self, kind: str, seconds: float) -> None:
        worker = self._stage.workers.take_one(self._rnd)

        def stand() -> None:
            began = worker.freeze()
            self._over.wait(seconds)
            worker.thaw()
            self._note(kind, began, pid=worker.pid)
            self._stage.workers.put_back(worker)

        self._last(stand)

    def _restart(self, kind: str) -> None:
        began = time.monotonic()
        self._stage.server.restart("fast" if kind == "restart" else "immediate")
        self._note(kind, began)

    def _kill_backends(self) -> None:
        began = time.monotonic()
        with self._stage.server.superuser() as db:
            rows = db.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'fastq %'").fetchall()
            pids = self._rnd.sample(sorted(pid for (pid,) in rows), k=min(len(rows), self._rnd.randint(1, 4)))
            ended = db.execute("SELECT count(*) FROM unnest(%s::int[]) pid WHERE pg_terminate_backend(pid)", [pids])
            row = ended.fetchone()
        if row and row[0]:
            self._note("killed backends", began)

    def _break_transactions(self) -> None:
        """Those of handlers, in the middle."""

        def broke() -> bool:
            began = time.monotonic()
            with self._stage.server.superuser() as db:
                rows = db.execute(_OPEN_EFFECTS).fetchall()
                pids = self._rnd.sample(sorted(pid for (pid,) in rows), k=min(len(rows), self._rnd.randint(1, 4)))
                ended = db.execute("SELECT count(*) FROM unnest(%s::int[]) pid WHERE pg_terminate_backend(pid)", [pids])
                row = ended.fetchone()
            if row and row[0]:
                self._note("broken transaction", began)
            return bool(row and row[0])

        wait_until(broke, timeout=60, message="a handler's transaction to break")

    def _hold_snapshot(self) -> None:
        seconds = self._rnd.uniform(*_OPEN)

        def hold() -> None:
            began = time.monotonic()
            # A restart of the server ends it sooner.
            with suppress(psycopg.Error), psycopg.connect(self._stage.server.dsn) as reader:
                reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                reader.execute("SELECT count(*) FROM fastq.ready, fastq.claim")
                self._over.wait(seconds)
                self._note("held snapshot", began)

        self._last(hold)

    def _write_long(self) -> None:
        seconds, is_kept = self._rnd.uniform(*_OPEN), self._rnd.random() < 0.7

        def write() -> None:
            began = time.monotonic()
            dsn = self._stage.server.dsn
            ids: list[int] = []
            with suppress(psycopg.Error, DatabaseError):
                with Producer(dsn, schema=self._stage.schema) as producer, psycopg.connect(dsn) as user:
                    tasks = [Task("t", {}, max_attempts=100) for _ in range(50)]
                    ids = [one.id for one in producer.enqueue_many_tx(user, tasks)]
                    user.execute("INSERT INTO chaos.ledger SELECT unnest(%s::bigint[])", [ids])
                    self._over.wait(seconds)
                    # Also one that a restart of the server ended meanwhile, which the next line finds out.
                    self._note("long transaction", began)
                    if is_kept:
                        user.commit()
                    else:
                        user.rollback()
                self._stage.producers.note("ack" if is_kept else "never", ids)

        self._last(write)


__all__ = ["Fault", "Faults"]
