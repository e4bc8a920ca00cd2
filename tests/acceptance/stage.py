"""What the cases are played on: a task in a place, between two others that are alike, and who does what to it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

import psycopg

from fastq import AsyncClient, InvalidTransition, TaskNotFound
from fastq.client import Client
from tests.acceptance.table import CLIENT_ACTIONS, SHOWN, Action, Place
from tests.support.storage import Leader, Session, Worker, add_lane, enqueue

T = TypeVar("T")

#: By action: the client's method, and what it is given beside the id.
_CALLS: Final[dict[Action, tuple[str, dict[str, Any]]]] = {
    "cancel": ("cancel_task", {}),
    "retry": ("retry_task", {}),
    "delete": ("delete_task", {}),
    "edit payload": ("edit_task", {"payload": {"n": 2}}),
    "edit time": ("edit_task", {"delay": 60}),
}
#: The number of the claim that a worker gives to one task alone: below those of its others, as the engine's are.
_OWN_NO: Final = -1


class Actor(Protocol):
    """A client of some kind. A new kind is one more entry of `ACTORS`."""

    pid: int
    """The server process of its connection."""
    user_pid: int
    """And of the connection that its user has, with a transaction of their own."""

    def act(self, action: Action, id_: int) -> object:
        """Does it; raises what the client raises."""

    def act_within(self, action: Action, id_: int) -> object:
        """Does it in the user's transaction, which is then open until `end`."""

    def end(self, *, commit: bool) -> None:
        """Ends that transaction."""

    def close(self) -> None: ...


class SyncActor:
    """`fastq.Client`."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.client = Client(dsn, schema=schema)
        self.client.counts()
        assert self.client._link._db is not None
        self.pid = self.client._link._db._connection.info.backend_pid
        self._user = psycopg.connect(dsn)
        self.user_pid = self._user.info.backend_pid

    def act(self, action: Action, id_: int) -> object:
        name, options = _CALLS[action]
        return getattr(self.client, name)(id_, **options)

    def act_within(self, action: Action, id_: int) -> object:
        name, options = _CALLS[action]
        return getattr(self.client, f"{name}_tx")(self._user, id_, **options)

    def end(self, *, commit: bool) -> None:
        self._user.commit() if commit else self._user.rollback()

    def close(self) -> None:
        self.client.close()
        self._user.close()


class AsyncActor:
    """`fastq.AsyncClient`, on an event loop of its own."""

    def __init__(self, dsn: str, schema: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.client = AsyncClient(dsn, schema=schema)
        self._wait(self.client.counts())
        assert self.client._link._db is not None
        self.pid = self.client._link._db._connection.info.backend_pid
        self._user = self._wait(psycopg.AsyncConnection.connect(dsn))
        self.user_pid = self._user.info.backend_pid

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def act(self, action: Action, id_: int) -> object:
        name, options = _CALLS[action]
        return self._wait(getattr(self.client, name)(id_, **options))

    def act_within(self, action: Action, id_: int) -> object:
        name, options = _CALLS[action]
        return self._wait(getattr(self.client, f"{name}_tx")(self._user, id_, **options))

    def end(self, *, commit: bool) -> None:
        self._wait(self._user.commit() if commit else self._user.rollback())

    def close(self) -> None:
        self._wait(self.client.close())
        self._wait(self._user.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


Kind: TypeAlias = Literal["sync", "async"]
ACTORS: Final[dict[Kind, Callable[[str, str], Actor]]] = {"sync": SyncActor, "async": AsyncActor}


class Stage:
    """A schema that many cases share, each with tasks of a type of its own, and the connections of those who act."""

    def __init__(self, dsn: str, schema: str, kind: Kind) -> None:
        self.dsn, self.schema, self.kind = dsn, schema, kind
        self.observer, self.first, self.second = (Session(dsn, schema) for _ in range(3))
        self.actor = ACTORS[kind](dsn, schema)
        self.looker = Client(dsn, schema=schema)
        self.leader = Leader(self.observer)
        self.leader.tick()
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Ends all connections."""
        self.actor.close()
        self.looker.close()
        for session in (self.observer, self.first, self.second):
            session.close()

    def number(self) -> int:
        """One that no other case has."""
        return next(self._numbers)

    def case(self, place: Place) -> Case:
        """A new task in this place."""
        return Case(self, place)


class Case:
    """One task, in a place that it came to by way of a claim: that claim's worker is the one whose results come."""

    def __init__(self, stage: Stage, place: Place) -> None:
        self.stage = stage
        self._number = stage.number()
        self._other_ids = itertools.count(10 * self._number + 1)
        store = stage.observer
        self.type = f"t{self._number}-{secrets.token_hex(3)}"
        self.lane = add_lane(store, self.type)
        self.ids = list(enqueue(store, 3, lane=self.lane))
        self.id = self.ids[1]
        self.held: dict[int, list[int]] = {}
        """What `worker` holds, or once did: claims and their ids."""
        self.worker = self._bring(place)
        assert self.shown() == SHOWN[place]

    def _bring(self, place: Place) -> Worker:
        """Has the task claimed, and brought to this place. Gives the worker."""
        ids = self.ids
        worker = Worker(self.stage.observer, 10 * self._number)
        [chunk] = worker.claim(3, [self.lane])
        no = chunk.no
        self.held = {no: ids}
        match place:
            case "ready":
                worker.give_back({no: ids})
            case "scheduled":
                worker.snooze(no, ids, 60.0)
            case "retrying":
                worker.fail(no, ids, 60.0)
            case "completed":
                worker.complete({no: ids})
            case "failed":
                worker.fail(no, ids)
            case "expired":
                worker.expire(no, ids)
            case "cancelled":
                self.stage.looker.cancel_tasks(ids=ids)
            case "running" | "gone":
                pass
        return worker

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
            return self._ask(lambda: self.stage.actor.act_within(action, self.id))
        first = self.stage.first
        if action == "complete in a transaction" and not self._part(first):
            return "refused"
        first.begin()
        return self._work(action, first)

    def end(self, action: Action, *, commit: bool) -> None:
        """Ends that transaction."""
        if action in CLIENT_ACTIONS:
            self.stage.actor.end(commit=commit)
        elif commit:
            self.stage.first.commit()
        else:
            self.stage.first.rollback()

    def pid_within(self, action: Action) -> int:
        """The server process that holds that transaction."""
        return self.stage.actor.user_pid if action in CLIENT_ACTIONS else self.stage.first.pid

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
        if action == "claim":
            found = self._claim(Worker(session, next(self._other_ids), register=False))
            return "done" if self.id in found else "passed"
        if action == "rescue":
            leader = Leader(session, self.stage.leader.id)
            leader.term = self.stage.leader.term
            rescued = {row[0] for row in leader.rescue()}
            return "done" if self.worker.id in rescued and not self._is_claimed(session) else "passed"
        return self._result(action, Worker(session, self.worker.id, register=False))

    def _claim(self, other: Worker) -> list[int]:
        """Another worker claims what is ready. Gives the ids."""
        return [id_ for chunk in other.claim(3, [self.lane]) for id_ in chunk.ids or []]

    def _is_claimed(self, session: Session) -> bool:
        """Whether a claim of its worker holds the task, as this session sees it."""
        query = "SELECT EXISTS (SELECT FROM fastq.claim WHERE consumer = $1 AND ids @> $2::bigint)"
        return bool(session.value(query, self.worker.id, self.id))

    def _part(self, session: Session) -> bool:
        """The worker gives the task a claim of its own, in a transaction by itself. Whether it could."""
        [no] = [no for no, ids in self.held.items() if self.id in ids]
        if no != _OWN_NO:
            rows = session.run("part_claims", self.worker.id, [no], [self.id], [_OWN_NO])
            if [row[0] for row in rows] != [_OWN_NO]:
                return False
            self.held = {no: [id_ for id_ in self.ids if id_ != self.id], _OWN_NO: [self.id]}
        return True

    def _result(self, action: Action, worker: Worker) -> str:
        held = self.held
        if action == "complete in a transaction":
            if not self._part(worker.session):
                return "refused"
            [(ended, _)] = worker.session.run("complete_tx", f"{{{worker.id},{_OWN_NO},5}}")
            return "done" if ended == f"{{{_OWN_NO}}}" else "refused"

        def each(send: Callable[[int, list[int]], list[int]]) -> list[int]:
            return [id_ for no, ids in held.items() for id_ in send(no, ids)]

        def of(refused: dict[int, list[int]]) -> list[int]:
            return [id_ for ids in refused.values() for id_ in ids]

        refused: dict[str, Callable[[], list[int]]] = {
            "complete": lambda: of(worker.complete(held)),
            "give back": lambda: of(worker.give_back(held)),
            "fail, to be retried": lambda: each(lambda no, ids: worker.fail(no, ids, 60.0)),
            "fail for good": lambda: each(worker.fail),
            "snooze": lambda: each(lambda no, ids: worker.snooze(no, ids, 60.0)),
            "expire": lambda: each(worker.expire),
        }
        return "refused" if self.id in refused[action]() else "done"
