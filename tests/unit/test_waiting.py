"""Waits: how often is looked, for whom together, and what comes of it. The looks are the test's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from fastq._waiting import SOON, Ending, Wait, Waits
from tests.support.producing import Background
from tests.support.waiting import wait_until

Row = tuple[int, str, str | None, bytes | None]


class Tasks:
    """Tasks that end when the test says so, and the looks at them."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.looks: list[list[int]] = []
        self.before: Callable[[], object] = lambda: None

    def __call__(self, ids: list[int]) -> list[Row]:
        self.looks.append(ids)
        self.before()
        return [self.rows[id_] for id_ in ids if id_ in self.rows]

    def run(self, *ids: int) -> None:
        self.rows.update({id_: (id_, "running", None, None) for id_ in ids})

    def end(self, *ids: int) -> None:
        self.rows.update({id_: (id_, "result", "j", b"%d" % id_) for id_ in ids})


class Turn:
    """A lock that counts who asked for it."""

    def __init__(self) -> None:
        self.asked = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.asked += 1
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


@pytest.fixture
def waits(tasks: Tasks) -> Waits:
    return Waits(tasks)


def test_what_has_ended_takes_one_look(tasks: Tasks, waits: Waits) -> None:
    tasks.end(7)
    assert waits.wait(7, None, 1.0) == Ending("result", 7)
    assert tasks.looks == [[7]]


@pytest.mark.parametrize(
    ("row", "ending"),
    [
        ((7, "result", "j", b'{"a":[1]}'), Ending("result", {"a": [1]})),
        ((7, "result", "j", b"null"), Ending("result", None)),
        ((7, "result", "b", b"null"), Ending("result", b"null")),
        ((7, "completed", None, None), Ending("completed")),
        ((7, "failed", None, None), Ending("failed")),
        (None, Ending("nowhere")),
    ],
)
def test_endings(tasks: Tasks, waits: Waits, row: Row | None, ending: Ending) -> None:
    if row is not None:
        tasks.rows[7] = row
    assert waits.wait(7, None, 1.0) == ending


def test_pauses_grow_up_to_the_interval(tasks: Tasks, waits: Waits) -> None:
    tasks.run(7)
    wait = Wait(7, 0.5, lambda: None)
    pauses: list[tuple[float, float]] = []
    for _ in range(40):
        before = time.monotonic()
        waits.look(wait)
        pauses.append((wait.due - time.monotonic(), wait.due - before))
    # It began somewhere between these two looks at the clock.
    for (least, most), wanted in ((pauses[0], SOON), (pauses[-1], 0.5)):
        assert least <= wanted <= most
    assert max(least for least, _ in pauses) <= 0.5


def test_an_interval_below_the_first_pause_is_kept(tasks: Tasks, waits: Waits) -> None:
    tasks.run(7)
    wait = Wait(7, 0.001, lambda: None)
    waits.look(wait)
    assert wait.due - time.monotonic() <= 0.001


def test_a_look_looks_for_those_that_are_nearly_due(tasks: Tasks, waits: Waits) -> None:
    tasks.run(1, 2, 3)
    first, near, far = (Wait(id_, 100.0, lambda: None) for id_ in (1, 2, 3))
    for wait in (first, near, far):
        waits.add(wait)
        wait.pause = 100.0
    now = time.monotonic()
    near.due, far.due = now + 40, now + 60
    waits.look(first)
    assert tasks.looks == [[1, 2]]
    assert near.due > now + 90
    assert far.due == now + 60


def test_one_look_ends_the_waits_of_all(tasks: Tasks, waits: Waits) -> None:
    tasks.end(1, 2)
    woken: list[int] = []
    one, two, again = (Wait(id_, 1.0, lambda id_=id_: woken.append(id_)) for id_ in (1, 2, 2))  # type: ignore[misc]
    for wait in (one, two, again):
        waits.add(wait)
    waits.look(one)
    assert [wait.ending for wait in (one, two, again)] == [
        Ending("result", 1),
        Ending("result", 2),
        Ending("result", 2),
    ]
    assert sorted(woken) == [1, 2, 2]
    # What has ended is looked for no more.
    waits.look(two)
    assert tasks.looks == [[1, 2]]


def test_who_looked_meanwhile_has_looked_for_all(tasks: Tasks, waits: Waits) -> None:
    tasks.run(1, 2)
    inside, go_on = threading.Event(), threading.Event()
    one, two = (Wait(id_, 1.0, lambda: None) for id_ in (1, 2))
    waits.add(one)
    waits.add(two)

    def hold() -> None:
        inside.set()
        assert go_on.wait(10)

    turn = Turn()
    waits._turn = turn  # type: ignore[assignment]
    tasks.before = hold
    first = Background(lambda: waits.look(one))
    assert inside.wait(10)
    second = Background(lambda: waits.look(two))
    wait_until(lambda: turn.asked == 2)
    go_on.set()
    first.result(10)
    second.result(10)
    assert tasks.looks == [[1, 2]]


def test_a_wait_ends_at_its_deadline_with_a_last_look(tasks: Tasks, waits: Waits) -> None:
    tasks.run(7)
    began = time.monotonic()
    assert waits.wait(7, began + 0.1, 60.0) is None
    assert time.monotonic() - began >= 0.1
    assert not waits._waits
    assert waits.wait(7, began, 60.0) is None
    assert tasks.looks[-1] == [7]


def test_a_hundred_waits_share_their_looks(tasks: Tasks, waits: Waits) -> None:
    ids = range(1, 101)
    tasks.run(*ids)
    waiting = [Background(lambda id_=id_: waits.wait(id_, None, 0.2)) for id_ in ids]  # type: ignore[misc]
    wait_until(lambda: len(waits._waits) == 100 and all(wait.pause == 0.2 for wait in waits._waits))
    before = len(tasks.looks)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1.0)
    looks = len(tasks.looks) - before
    # Each by itself would take 500; all together about 7.
    assert looks < 50
    tasks.end(*ids)
    assert [one.result(10) for one in waiting] == [Ending("result", id_) for id_ in ids]


def test_a_look_that_fails_is_for_the_one_who_looked(tasks: Tasks, waits: Waits) -> None:
    tasks.end(1, 2)
    one, two = (Wait(id_, 1.0, lambda: None) for id_ in (1, 2))
    waits.add(one)
    waits.add(two)

    def fail() -> None:
        raise RuntimeError("no answer")

    tasks.before = fail
    with pytest.raises(RuntimeError, match="no answer"):
        waits.look(one)
    assert two.ending is None
    tasks.before = lambda: None
    waits.look(two)
    assert two.ending == Ending("result", 2)
