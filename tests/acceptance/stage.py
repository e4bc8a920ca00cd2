"""What the cases are played on: a task in a place, between two others that are alike, and who does what to it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from typing import Any, Final, Protocol

import psycopg

from fastq import InvalidTransition, TaskNotFound
from fastq.client import Client
from tests.acceptance.table import CLIENT_ACTIONS, SHOWN, Action, Place
from tests.support.storage import Leader, Session, Worker, add_lane, enqueue

_NEW_PAYLOAD: Final = {"n": 2}


class Actor(Protocol):
    """A client of some kind. A new kind (an asynchronous one, say) is one more entry of `ACTORS`."""

    pid: int
    """The server process of its connection."""

    def act(self, action: Action, id_: int) -> object:
        """Does it; raises what the client raises."""

    def act_within(self, connection: psycopg.Connection, action: Action, id_: int) -> object:
        """Does it in the transaction that is open there."""

    def close(self) -> None: ...


class SyncActor:
    """`fastq.Client`."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.client = Client(dsn, schema=schema)
        self.client.counts()
        assert self.client._link._db is not None
        self.pid = self.client._link._db._connection.info.backend_pid

    def act(self, action: Action, id_: int) -> object:
        calls: dict[str, Callable[[], object]] = {
            "cancel": lambda: self.client.cancel_task(id_),
            "retry": lambda: self.client.retry_task(id_),
            "delete": lambda: self.client.delete_task(id_),
            "edit payload": lambda: self.client.edit_task(id_, payload=_NEW_PAYLOAD),
            "edit time": lambda: self.client.edit_task(id_, delay=60),
        }
        return calls[action]()

    def act_within(self, connection: psycopg.Connection, action: Action, id_: int) -> object:
        calls: dict[str, Callable[[], object]] = {
            "cancel": lambda: self.client.cancel_task_tx(connection, id_),
            "retry": lambda: self.client.retry_task_tx(connection, id_),
            "delete": lambda: self.client.delete_task_tx(connection, id_),
            "edit payload": lambda: self.client.edit_task_tx(connection, id_, payload=_NEW_PAYLOAD),
            "edit time": lambda: self.client.edit_task_tx(connection, id_, delay=60),
        }
        return calls[action]()

    def close(self) -> None:
        self.client.close()


ACTORS: Final[dict[str, Callable[[str, str], Actor]]] = {"sync": SyncActor}


class Stage:
    """A schema that many cases share, each with tasks of a type of its own, and the connections of those who act."""

    def __init__(self, dsn: str, schema: str, actor: Callable[[str, str], Actor]) -> None:
        self.observer, self.first, self.second = (Session(dsn, schema) for _ in range(3))
        self.user = psycopg.connect(dsn)
        self.actor = actor(dsn, schema)
        self.looker = Client(dsn, schema=schema)
        self.leader = Leader(self.observer)
        self.leader.tick()
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Ends all connections."""
        self.actor.close()
        self.looker.close()
        self.user.close()
        for session in (self.observer, self.first, self.second):
            session.close()

    def case(self, place: Place) -> Case:
        """A new task in this place."""
        return Case(self, next(self._numbers), place)


class Case:
    """One task, in a place that it came to by way of a claim: that claim's worker is the one whose results come."""

    def __init__(self, stage: Stage, number: int, place: Place) -> None:
        self.stage = stage
        self.place = place
        store = stage.observer
        self.lane = add_lane(store, f"t{number}-{secrets.token_hex(3)}")
        ids = list(enqueue(store, 3, lane=self.lane))
        self.id = ids[1]
        self.ids = ids
        self.worker = Worker(store, 10 * number)
        self._other_ids = itertools.count(10 * number + 1)
        [chunk] = self.worker.claim(3, [self.lane])
        self.no = chunk.no
        match place:
            case "ready":
                self.worker.give_back({self.no: ids})
            case "scheduled":
                self.worker.snooze(self.no, ids, 60.0)
            case "retrying":
                self.worker.fail(self.no, ids, 60.0)
            case "completed":
                self.worker.complete({self.no: ids})
            case "failed" | "expired":
                self.worker.fail(self.no, ids)
            case "cancelled":
                stage.looker.cancel_tasks(ids=ids)
            case "running" | "gone":
                pass
        if place == "expired":
            # No worker lets tasks expire yet: the row is what counts.
            store.sql("UPDATE fastq.dead SET state = 'expired' WHERE id = ANY ($1)", ids)
        assert self.shown() == SHOWN[place]

    def shown(self) -> tuple[str, str | None] | None:
        """State and kind; None: it is gone. Fails where the task is in two places."""
        rows = self.stage.observer.sql("SELECT state FROM fastq.tasks WHERE id = $1", self.id)
        assert len(rows) <= 1, f"the task is in {len(rows)} places"
        try:
            record = self.stage.looker.get_task(self.id)
        except TaskNotFound:
            assert not rows
            return None
        assert [(record.state,)] == rows
        return record.state, record.kind

    def payload(self) -> Any:
        """Its payload now."""
        return self.stage.looker.get_task(self.id).payload

    def prepare(self, action: Action) -> None:
        """What has to be so before it is done: who is rescued is dead."""
        if action == "rescue":
            self.stage.leader.declare_dead(self.worker)

    def do(self, action: Action, session: Session | None = None) -> str:
        """Does it, a worker's on this session and a client's on its own connection. What its caller is told."""
        if action in CLIENT_ACTIONS:
            return self._ask(lambda: self.stage.actor.act(action, self.id))
        return self._work(action, session or self.stage.first)

    def do_within(self, action: Action) -> str:
        """Does it in a transaction that is then open, until `end`."""
        if action in CLIENT_ACTIONS:
            return self._ask(lambda: self.stage.actor.act_within(self.stage.user, action, self.id))
        self.stage.first.begin()
        return self._work(action, self.stage.first)

    def end(self, action: Action, *, commit: bool) -> None:
        """Ends that transaction."""
        if action in CLIENT_ACTIONS:
            self.stage.user.commit() if commit else self.stage.user.rollback()
        elif commit:
            self.stage.first.commit()
        else:
            self.stage.first.rollback()

    def pid_of(self, action: Action, session: Session) -> int:
        """The server process in which `do` runs."""
        return self.stage.actor.pid if action in CLIENT_ACTIONS else session.pid

    def _ask(self, call: Callable[[], object]) -> str:
        try:
            call()
        except InvalidTransition:
            return "refused"
        except TaskNotFound:
            return "missing"
        return "done"

    def _work(self, action: Action, session: Session) -> str:
        worker = Worker(session, self.worker.id, register=False)
        worker.no = self.worker.no
        if action == "claim":
            other = Worker(session, next(self._other_ids), register=False)
            found = [id_ for chunk in other.claim(3, [self.lane]) for id_ in chunk.ids or []]
            return "done" if self.id in found else "passed"
        if action == "rescue":
            leader = Leader(session, self.stage.leader.id)
            leader.term = self.stage.leader.term
            return "done" if self.worker.id in {row[0] for row in leader.rescue()} else "passed"
        held = {self.no: self.ids}
        refused: dict[str, Callable[[], list[int]]] = {
            "complete": lambda: worker.complete(held).get(self.no, []),
            "give back": lambda: worker.give_back(held).get(self.no, []),
            "fail, to be retried": lambda: worker.fail(self.no, self.ids, 60.0),
            "fail for good": lambda: worker.fail(self.no, self.ids),
            "snooze": lambda: worker.snooze(self.no, self.ids, 60.0),
        }
        return "refused" if self.id in refused[action]() else "done"
