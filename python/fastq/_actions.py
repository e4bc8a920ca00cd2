"""What is done to tasks from outside: cancel, retry, delete, edit. Which states allow it, and the statements that do it.

A task may move on at any time, so each action follows the flow of tasks (delayed, ready, claim, done, dead), each place in a statement
of its own that locks the task's row and decides on the row as it then is. Whatever moved between two of them is behind the first and
before the second only if it moved backwards (a retry, a rescue): then it is looked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple, TypeAlias

from fastq._records import ENDED_BADLY, WAITING, Places, TaskRecord, to_record
from fastq._work import Plan, Row, Statement, Turn, Work, take
from fastq.errors import DatabaseError, InvalidTransition, TaskNotFound

Action: TypeAlias = Literal["cancel", "retry", "delete", "edit"]

#: Where a task must be for an action; anywhere else it is refused.
ALLOWED: Final[Mapping[Action, Places]] = {
    "cancel": Places(kinds=WAITING, running=True, ends=("failed", "expired")),
    "retry": Places(ends=ENDED_BADLY),
    "delete": Places(kinds=WAITING, completed=True, ends=ENDED_BADLY),
    "edit": Places(kinds=WAITING),
}
#: What may be done again although it may have been done: it comes to the same.
_REPEATABLE: Final[frozenset[Action]] = frozenset({"cancel", "edit"})
#: How often a task that is found where the action is allowed, and gone from there when it is tried, is looked for.
PASSES: Final = 5
# A notification holds less than 8,000 bytes, a word of one at most 39 and its comma.
_WORDS: Final = 190

# By place. A retry takes nothing but what ended, a cancel nothing that completed, and so on.
_DELAYED: Final[Mapping[Action, str]] = {"cancel": "cancel_delayed", "delete": "delete_delayed", "edit": "edit_delayed"}
_READY: Final[Mapping[Action, str]] = {"cancel": "cancel_ready", "delete": "delete_ready", "edit": "edit_ready"}
_DEAD: Final[Mapping[Action, str]] = {"cancel": "cancel_dead", "retry": "retry_dead", "delete": "delete_dead"}
# What a task is to somebody who wanted this of it.
_WANTED: Final[Mapping[Action, str]] = {
    "cancel": "can't be cancelled: it has completed",
    "retry": "can't be retried: only what failed, expired or was cancelled can",
    "delete": "can't be deleted while it runs: cancel it first",
    "edit": "can't be edited: only what waits can",
}


class Change(NamedTuple):
    """What an edit changes; None: nothing."""

    format: str | None = None
    payload: bytes | None = None
    delay: float | None = None
    """Seconds from now."""
    run_at: datetime | None = None
    """Wins over ``delay``."""
    priority: int | None = None


class Whom:
    """From which claims tasks were taken: whom to tell, once it is committed, that what runs was cancelled."""

    __slots__ = ("_claims",)

    def __init__(self) -> None:
        self._claims: set[tuple[int, int]] = set()

    def note(self, name: str, rows: Iterable[Row]) -> None:
        """The statement of that name answered these rows."""
        if name == "cancel_claimed":
            self._claims.update((consumer, no) for _, consumer, no in rows)

    def messages(self) -> Iterator[str]:
        """What to notify workers of, in pieces that PostgreSQL takes. Workers of older versions make nothing of them."""
        words = [f"{consumer}:{no}" for consumer, no in sorted(self._claims)]
        for i in range(0, len(words), _WORDS):
            yield ",".join(words[i : i + _WORDS])


def move(action: Action, ids: Sequence[int], places: Places, change: Change) -> Work[list[int]]:
    """One pass: does it to those of the tasks that are in these places, and gives their ids. In one transaction."""
    left = list(ids)
    moved: list[int] = []

    def grab(name: str, *params: object) -> Work[None]:
        if left:
            found = {id_ for id_, *_ in (yield Statement(name, left, *params))}
            moved.extend(found)
            left[:] = [id_ for id_ in left if id_ not in found]

    if action == "delete":
        yield Statement("lock_tokens", left)
    waits = [kind for kind in places.kinds if kind != "ready"]
    edited = change if action == "edit" else ()
    if waits:
        yield from grab(_DELAYED[action], waits, *edited)
    if "ready" in places.kinds:
        yield from grab(_READY[action], *edited)
    if places.running:
        yield from grab("cancel_claimed")
    if places.completed:
        yield from grab("delete_done")
    if places.ends:
        yield from grab(_DEAD[action], list(places.ends))
    if action == "delete" and moved:
        yield Statement("forget_tasks", moved)
    return moved


def act_on_one(schema: str, action: Action, id_: int, change: Change) -> Plan[TaskRecord | None]:
    """Does it to one task.

    Returns:
        The task as it is then; None: it was deleted.

    Raises:
        TaskNotFound: there is no such task.
        InvalidTransition: it is in a state that does not allow it.
        DatabaseError: the server refused it, or the task moved on each time that it was looked for (``is_transient``).
    """

    def once() -> Work[tuple[bool, TaskRecord | None]]:
        moved = bool((yield from move(action, [id_], ALLOWED[action], change)))
        if moved and action == "delete":
            return True, None
        # In the same transaction: nobody else has moved on what was just moved.
        rows = yield Statement("find_task", id_)
        return moved, to_record(rows[0], with_errors=True) if rows else None

    for _ in range(PASSES):
        moved, record = yield from take(Turn(once, repeatable=action in _REPEATABLE))
        if moved:
            return record
        if record is None:
            raise not_found(schema, id_)
        if action == "cancel" and record.state == "cancelled":
            return record
        if _place_of(record) not in ALLOWED[action]:
            raise InvalidTransition(f"task {id_} is {record.state} and {_WANTED[action]}", record)
    raise DatabaseError(
        f"task {id_} moved on each of the {PASSES} times that it was found: try again", is_transient=True
    )


def act_on_batch(action: Action, ids: Sequence[int], places: Places, change: Change) -> Plan[int]:
    """Does it to those of the tasks that are in these places; gives how many. What moves to another place meanwhile is left alone."""
    left = list(ids)
    count = 0

    def once() -> Work[tuple[list[int], list[int]]]:
        moved = yield from move(action, left, places, change)
        if len(moved) == len(left):
            return moved, []
        done = set(moved)
        rest = [id_ for id_ in left if id_ not in done]
        return moved, [id_ for id_, _, place in (yield Statement("locate_tasks", rest)) if place in places]

    for _ in range(PASSES):
        moved, left = yield from take(Turn(once))
        count += len(moved)
        if not left:
            break
    return count


def not_found(schema: str, id_: int) -> TaskNotFound:
    """The error."""
    return TaskNotFound(f"there is no task {id_} in schema {schema!r}: it never was, or its retention is over")


def _place_of(record: TaskRecord) -> str:
    return record.state if record.state != "pending" else record.kind or "ready"


__all__ = ["ALLOWED", "PASSES", "Action", "Change", "Whom", "act_on_batch", "act_on_one", "move", "not_found"]
