"""The errors that fastq raises: one tree; ``except FastqError`` catches them all, a branch catches its kind.

Each message says what was tried, with what, and what to do. None holds a password.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from fastq._records import TaskRecord


class FastqError(Exception):
    """The base of all errors that fastq raises."""


class SettingsError(FastqError, ValueError):
    """A setting or an argument is wrong: the message says which, what it was and what it must be."""


class DatabaseError(FastqError):
    """The database refused a statement, or could not be reached.

    Attributes:
        sqlstate: the server's five-character code, None where the error did not come from the server.
        is_transient: the same call may succeed when tried again (lost connection, deadlock, full server).
    """

    def __init__(self, message: str, *, sqlstate: str | None = None, is_transient: bool = False) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.is_transient = is_transient


class ConnectionLost(DatabaseError):  # noqa: N818 - it says what happened
    """The connection broke, or its answer did not come within the time limit.

    Attributes:
        in_doubt: the commit was sent and its answer never came, so what was written may be there or not.
    """

    def __init__(
        self, message: str, *, in_doubt: bool = False, sqlstate: str | None = None, is_transient: bool = True
    ) -> None:
        super().__init__(message, sqlstate=sqlstate, is_transient=is_transient)
        self.in_doubt = in_doubt


class SchemaError(DatabaseError):
    """The database is not migrated, its schema is too old, or newer and shut to this version of fastq."""


class EnqueueError(FastqError):
    """Tasks could not be enqueued.

    Attributes:
        index: position of the task to blame in the call's input, from 0; None where none of many is to blame.
        committed: how many tasks of the call are in the database and stay there (``commit_every``); None: the
            call had one transaction, and nothing of it was written.
    """

    def __init__(self, message: str, *, index: int | None = None, committed: int | None = None) -> None:
        super().__init__(message if index is None else f"task {index}: {message}")
        self.index = index
        self.committed = committed


class PayloadError(EnqueueError):
    """A payload can't be encoded, or is over the limit."""


class DuplicateTask(EnqueueError):  # noqa: N818 - it says what happened
    """A task's idempotency token is held, and its ``on_conflict`` is ``"raise"``. Of a call of many, nothing was written.

    Attributes:
        existing_id: the task that has the token; None: an earlier one of the same call, which is not written either.
        index, committed: as for any `EnqueueError`.
    """

    def __init__(
        self,
        message: str,
        *,
        existing_id: int | None = None,
        index: int | None = None,
        committed: int | None = None,
    ) -> None:
        super().__init__(message, index=index, committed=committed)
        self.existing_id = existing_id


class TaskError(FastqError):
    """A task is not what the call needs it to be."""


class TaskNotFound(TaskError):  # noqa: N818 - it says what happened
    """There is no such task, or it was removed at the end of its retention."""


class _TaskFound(TaskError):  # noqa: N818 - a base alone
    def __init__(self, message: str, task: TaskRecord) -> None:
        super().__init__(message)
        self.task = task

    def __reduce__(self) -> tuple[type[Self], tuple[str, TaskRecord]]:
        return type(self), (str(self), self.task)


class InvalidTransition(_TaskFound):
    """A task is in a state in which this can't be done to it. Nothing was changed.

    Attributes:
        task: the task as it was found (`TaskRecord`).
    """


class TaskFailed(_TaskFound):
    """A task that was waited for ended without a result: it failed for good, was cancelled, or expired.

    Attributes:
        task: the task as it was found (`TaskRecord`): its ``state`` says which, its ``errors`` why.
    """


class ResultNotKept(_TaskFound):
    """A task that was waited for has completed, and its result is not there: its handler keeps none, or the time is over (``result_ttl``).

    Attributes:
        task: the task as it was found (`TaskRecord`).
    """


class ResultError(TaskError):
    """What a handler returned can't be kept as its result: it can't be encoded, or is over the limit. The task fails for good."""


class CompletionError(TaskError):
    """A task can't be completed in this transaction (``task.complete_tx``), or was to be, and the transaction was rolled back."""


class TaskLost(CompletionError):  # noqa: N818 - it says what happened
    """The run that was to complete its task no longer holds it: it was cancelled, ran out of time, or others have it. Roll back."""


class ConsumerError(FastqError):
    """A consumer was started twice, used after its stop, has no handlers, or a part died (with its cause)."""


__all__ = [
    "CompletionError",
    "ConnectionLost",
    "ConsumerError",
    "DatabaseError",
    "DuplicateTask",
    "EnqueueError",
    "FastqError",
    "InvalidTransition",
    "PayloadError",
    "ResultError",
    "ResultNotKept",
    "SchemaError",
    "SettingsError",
    "TaskError",
    "TaskFailed",
    "TaskLost",
    "TaskNotFound",
]
