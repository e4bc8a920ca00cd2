"""What workers and clients do to tasks, in random order, beside a plain model of each task."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from fastq import InvalidTransition, TaskNotFound
from fastq._actions import ALLOWED, Action
from fastq.client import Client
from tests.support import clients
from tests.support.producing import value
from tests.support.storage import Leader, Session, Worker, enqueue, states

STEPS = 300


@dataclass
class Known:
    """What is known of a task that is there."""

    place: str = "ready"
    payload: int = 1
    attempts: int = 0
    claim: tuple[int, int] | None = None


class Model:
    """Does each step to the database and to itself."""

    def __init__(self, store: Session, client: Client, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = store
        self.client = client
        self.workers = [Worker(store, 1), Worker(store, 2)]
        self.leader = Leader(store)
        self.leader.tick()
        self.tasks: dict[int, Known] = {}
        self.gone: list[int] = []

    def enqueue(self) -> None:
        for id_ in enqueue(self.store, self.random.randint(1, 12), chunk=self.random.randint(1, 8)):
            self.tasks[id_] = Known()

    def claim(self) -> None:
        worker = self.random.choice(self.workers)
        for chunk in worker.claim(self.random.randint(1, 15)):
            found = list(zip(chunk.ids or [], chunk.payloads or [], strict=True))
            assert len(found) == chunk.upto - chunk.lo + 1, "ids without content"
            for id_, payload in found:
                task = self.tasks[id_]
                assert (task.place, b'{"n":%d}' % task.payload, task.attempts) == ("ready", payload, chunk.attempts)
                task.place, task.claim = "running", (worker.id, chunk.no)

    def end(self) -> None:
        """A result of tasks that a claim held once: what was taken from it since is refused."""
        held = [task.claim for task in self.tasks.values() if task.claim is not None]
        if not held:
            return
        consumer, no = self.random.choice(held)
        worker = self.workers[consumer - 1]
        ids = [id_ for id_, task in self.tasks.items() if task.claim == (consumer, no)]
        ids = self.random.sample(ids, self.random.randint(1, len(ids)))
        running = {id_ for id_ in ids if self.tasks[id_].place == "running"}
        how = self.random.choice(["completed", "retrying", "failed", "ready"])
        if how == "completed":
            refused = worker.complete({no: ids}).get(no, [])
        elif how == "ready":
            refused = worker.give_back({no: ids}).get(no, [])
        else:
            refused = worker.fail(no, ids, 0.0 if how == "retrying" else None)
        assert sorted(refused) == sorted(set(ids) - running)
        for id_ in ids:
            task = self.tasks[id_]
            task.claim = None
            if id_ in running:
                task.place = how
                task.attempts += how != "ready"

    def promote(self) -> None:
        self.leader.one("promote_tasks", 1000, 0)
        for id_, task in self.tasks.items():
            if task.place in ("retrying", "scheduled") and id_ not in self.later:
                task.place = "ready"

    @property
    def later(self) -> set[int]:
        """The tasks whose time has not come."""
        return {id_ for (id_,) in self.store.sql("SELECT id FROM fastq.delayed")}

    def act(self) -> None:
        action: Action = self.random.choice(list(ALLOWED))
        ids = self.random.sample([*self.tasks, *self.gone], min(self.random.randint(1, 9), len(self.tasks)))
        payload = self.random.randint(2, 9)
        change: dict[str, Any] = {}
        if action == "edit":
            change = self.random.choice([{"payload": {"n": payload}}, {"delay": 0}, {"delay": 3600}])
        may = {i for i in ids if i in self.tasks and self.tasks[i].place in ALLOWED[action]}
        if len(ids) == 1 or self.random.random() < 0.5:
            for id_ in ids:
                self.act_on_one(action, id_, change, may=id_ in may)
        else:
            assert self.client.count_tasks(action, ids=ids) == len(may)
            many = getattr(self.client, f"{action}_tasks")
            assert many(ids=ids, **change) == len(may)
        for id_ in may:
            self.change(id_, action, change)

    def act_on_one(self, action: Action, id_: int, change: dict[str, Any], *, may: bool) -> None:
        one = getattr(self.client, f"{action}_task")
        if may or (action == "cancel" and id_ in self.tasks and self.tasks[id_].place == "cancelled"):
            one(id_, **change)
        else:
            with pytest.raises(InvalidTransition if id_ in self.tasks else TaskNotFound):
                one(id_, **change)

    def change(self, id_: int, action: Action, change: dict[str, Any]) -> None:
        task = self.tasks[id_]
        match action:
            case "cancel":
                task.attempts += task.place == "running"
                task.place = "cancelled"
            case "retry":
                task.place = "retrying"
            case "delete":
                # Its claim, if it was cancelled while it ran, is of no more interest.
                del self.tasks[id_]
                self.gone.append(id_)
            case "edit" if "payload" in change:
                task.payload = change["payload"]["n"]
            case "edit" if change["delay"] or task.place != "ready":
                task.place = "scheduled"

    def check(self) -> None:
        names = {"ready": "pending", "scheduled": "pending", "retrying": "pending"}
        assert states(self.store) == {id_: names.get(task.place, task.place) for id_, task in self.tasks.items()}
        for id_ in self.random.sample(list(self.tasks), min(5, len(self.tasks))):
            task, record = self.tasks[id_], self.client.get_task(id_)
            assert (record.kind or record.state) == ("pending" if task.place == "ready" else task.place)
            assert (record.payload, record.attempts) == ({"n": task.payload}, task.attempts + (task.place == "running"))
        overlapping = value(
            self.store.connection,
            f'SELECT count(*) FROM "{self.store.schema}".ready a JOIN "{self.store.schema}".ready b '  # noqa: S608 its own
            "ON a.lo <= b.hi AND b.lo <= a.hi AND a.hi < b.hi",
        )
        assert overlapping == 0


@pytest.fixture(params=clients.KINDS)
def client(request: pytest.FixtureRequest, dsn: str, migrated: str) -> Iterator[Client]:
    with clients.open_client(request.param, dsn, schema=migrated) as found:
        yield found


@pytest.mark.parametrize("seed", range(3))
def test_random_moves_agree_with_a_model(store: Session, client: Client, seed: int) -> None:
    model = Model(store, client, seed)
    model.enqueue()
    steps = [
        model.enqueue,
        model.claim,
        model.claim,
        model.end,
        model.end,
        model.promote,
        model.act,
        model.act,
        model.act,
    ]
    for number in range(STEPS):
        step = model.random.choice(steps)
        step()
        if number % 10 == 0:
            model.check()
    model.check()
