"""For unit tests of handlers: a task to hand them, with no database and no worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from fastq._engine import TaskInfo, cancel_made, encode_json, make_task
from fastq._options import read_name
from fastq.context import CURRENT
from fastq.errors import SettingsError
from fastq.task import MAX_ATTEMPTS, MAX_ATTEMPTS_LIMIT, check_aware

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_ID_LIMIT: Final = 2**63 - 1


@contextmanager
def task_context(
    type: str = "test",  # noqa: A002 - the word that tasks have for it
    payload: object = None,
    *,
    id: int = 1,  # noqa: A002 - likewise
    queue: str = "default",
    attempt: int = 1,
    max_attempts: int = MAX_ATTEMPTS,
    created_at: datetime | None = None,
    cancelled: bool = False,
) -> Iterator[TaskInfo]:
    """A task that counts as running here: within the block ``fastq.current_task()`` gives it.

    It is a `TaskInfo` like any that a worker hands its handlers, for ``with`` in sync and in async code: what the block calls and awaits
    sees it, and what that starts in a copy of its context (asyncio tasks, ``asyncio.to_thread``). Middleware, retries and timeouts are
    a worker's, and not at work here; ``complete_tx`` raises `CompletionError`.

    Args:
        type: its type.
        payload: as of a `Task`. It is encoded and decoded as on its way through the database: a tuple is a list in it, a model an object.
        id: its id.
        queue: its queue.
        attempt: which run this is, 1 to ``max_attempts``.
        max_attempts: runs in all, 1 to 32,767.
        created_at: when it was enqueued (aware); None: now.
        cancelled: whether ``is_cancelled()`` from the start; later, by `cancel`.

    Raises:
        PayloadError: the payload can't be encoded.
        SettingsError: a name, a number or a time that no task can have, or ``cancelled`` is no bool.
        TypeError: ``created_at`` is no datetime.
    """
    read_name("type", type)
    read_name("queue", queue)
    _check_number("id", id, _ID_LIMIT)
    _check_number("max_attempts", max_attempts, MAX_ATTEMPTS_LIMIT)
    _check_number("attempt", attempt, max_attempts)
    if not isinstance(cancelled, bool):
        raise SettingsError(f"cancelled is {cancelled!r}, but must be True or False")
    if created_at is None:
        created_at = datetime.now(UTC)
    else:
        check_aware("created_at", created_at)
    is_json = not isinstance(payload, bytes)
    task = make_task(
        id,
        type,
        queue,
        payload if isinstance(payload, bytes) else encode_json(payload),
        is_json,
        attempt,
        max_attempts,
        (created_at - _EPOCH) // timedelta(microseconds=1),
    )
    if cancelled:
        cancel(task)
    token = CURRENT.set(task)
    try:
        yield task
    finally:
        CURRENT.reset(token)


def cancel(task: TaskInfo) -> None:
    """From here on ``task.is_cancelled()``, and ``task.raise_if_cancelled()`` raises.

    Nothing else is told: a coroutine that is to be cancelled is cancelled by the test.

    Raises:
        TypeError: the task is not one of `task_context`.
    """
    cancel_made(task)


def _check_number(name: str, value: Any, most: int) -> None:
    if value.__class__ is not int or not 1 <= value <= most:
        raise SettingsError(f"{name} is {value!r}, but must be a whole number, 1 to {most:,}")


__all__ = ["cancel", "task_context"]
