"""A task that is completed in its handler's own transaction (``task.complete_tx``): with what the handler wrote, or not at all.

Before the transaction's first statement of ours the engine gives the task a claim of its own, on its own connection: so that nothing of
the engine's waits for the transaction, and so that the transaction's snapshot can show that claim. Then one statement
(`complete_tx.sql`) ends the task in the transaction. What becomes of the transaction the engine finds out when the handler has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from fastq._engine import TaskInfo, TxCompletion
from fastq._lifetime import refuse_running_loop
from fastq._tx.parts import COMPLETE, Answer, sqlstate_of, text_of
from fastq._tx.sessions import find_async_session, find_session
from fastq.errors import CompletionError, ConsumerError, TaskLost

_YOURS: Final = "roll the transaction back; run again from its start, it may complete the task"
#: What an error of the server means for whoever completes a task, by its SQLSTATE.
_NOTES: Final = {
    "25006": "fastq: a task is completed where it is kept, on a server that can be written to",
    "3F000": "fastq: the connection must be to the database in which the task's consumer works",
    "40001": f"fastq: another transaction decided about the task meanwhile, or about what yours wrote; {_YOURS}",
    "40P01": f"fastq: two transactions waited for each other; {_YOURS}",
    "42501": (
        "fastq: to complete tasks a role needs a worker's rights, or those that `fastq migrate --grants --handler NAME` prints"
    ),
    "42P01": "fastq: the connection must be to the database in which the task's consumer works",
    "55P03": f"fastq: somebody who cancels or rescues the task holds its claim, longer than lock_timeout; {_YOURS}",
    "57014": f"fastq: the statement was cancelled, or took longer than statement_timeout; {_YOURS}",
}

_log = logging.getLogger("fastq.handler")


def complete(task: TaskInfo, connection: object) -> None:
    """Complete a task in the transaction of a sync connection. See `TaskInfo.complete_tx`."""
    refuse_running_loop("TaskInfo.complete_tx()", "`await task.acomplete_tx(conn)`", CompletionError)
    call = _Call(task)
    call.check(call.tx.part())
    session = find_session(connection, COMPLETE)
    params = call.send()
    try:
        answer = session.query(text_of("complete_tx", call.tx.schema), params)
    except BaseException as error:
        _explain(error)
        raise
    if not call.is_written(answer):
        call.refuse(call.tx.part())


async def acomplete(task: TaskInfo, connection: object) -> None:
    """As `complete`, on an async connection. What may wait for the consumer's own connection is done in a thread."""
    call = _Call(task)
    call.check(await asyncio.to_thread(call.tx.part))
    session = await find_async_session(connection, COMPLETE)
    params = call.send()
    try:
        answer = await session.query(text_of("complete_tx", call.tx.schema), params)
    except BaseException as error:
        _explain(error)
        raise
    if not call.is_written(answer):
        call.refuse(await asyncio.to_thread(call.tx.part))


def had_completed(task: TaskInfo, error: BaseException) -> bool:
    """Whether the transaction had completed a task whose handler then raised: that is no failure, but told of here.

    Where the transaction is still open, or the database does not answer, nobody knows: the error counts if it was rolled back.
    """
    try:
        is_completed = TxCompletion(task).part() == "done"
    except Exception:  # noqa: BLE001 - it is looked at again when the outcome is stored
        return False
    if is_completed:
        with contextlib.suppress(Exception):
            _log.error(
                "task %d (%s) was completed by its transaction (complete_tx) before its handler raised: it neither failed nor runs again",
                task.id,
                task.type,
                exc_info=error,
            )
    return is_completed


async def ahad_completed(task: TaskInfo, error: BaseException) -> bool:
    """As `had_completed`, on the event loop. Never raises."""
    if isinstance(error, GeneratorExit) or not TxCompletion(task).is_sent:
        return False
    try:
        return await asyncio.to_thread(had_completed, task, error)
    except (Exception, asyncio.CancelledError):  # noqa: BLE001 - the loop is ending; the outcome is looked at when it is stored
        return False


class _Call:
    """One call of ``complete_tx``: what is asked, and what the answers mean."""

    def __init__(self, task: TaskInfo) -> None:
        self._task = task
        self._no = 0
        self._home: tuple[int, int] | None = None
        self.tx = TxCompletion(task)
        if self.tx.keeps_result:
            raise CompletionError(
                f"task {task.id} can't be completed before its handler returns: its type {task.type!r} keeps results (result_ttl), "
                "and the result is stored with the completion"
            )

    def check(self, word: str) -> None:
        """Raise, unless the task is held by a claim of its own."""
        name = f"task {self._task.id}"
        if word == "held":
            return
        if word == "lost" or (word == "ended" and self._task.is_cancelled()):
            raise TaskLost(
                f"{name} is no longer this run's: it was cancelled, its time is up, or others have it; roll the transaction back"
            )
        if word == "done":
            raise CompletionError(
                f"{name} was completed before, by an earlier transaction of this run; roll this one back"
            )
        if word == "open":
            raise CompletionError(
                f"{name} is being completed already, by a transaction of this run that has not ended: complete_tx is called once"
            )
        if word == "ended":
            raise CompletionError(
                f"{name} can't be completed any more: its handler has ended; roll the transaction back"
            )
        if word == "made":
            raise CompletionError(
                f"{name} was made for a test (fastq.testing): there is no consumer that could complete it"
            )
        if word == "forked":
            raise CompletionError(f"{name} is run by the parent of this forked process: only there can it be completed")
        raise ConsumerError(f"{name} can't be completed: its consumer has stopped; roll the transaction back")

    def send(self) -> list[str]:
        """The statement's parameters. From here on the transaction decides."""
        self._home = self.tx.home
        params = self.tx.write()
        if params is None:
            self.check("ended")
            raise AssertionError
        self._no, text = params
        return [text]

    def is_written(self, answer: Answer) -> bool:
        """Whether the statement found the task's claim."""
        ended, home = answer
        if ended == [self._no]:
            self.tx.wrote()
            return True
        if self._home is not None and home != list(self._home):
            raise CompletionError(
                f"the connection is to another server or database than the one in which the consumer of task {self._task.id} works: "
                "a task is completed where it is kept"
            )
        return False

    def refuse(self, word: str) -> None:
        """Say why the statement found no claim: what the engine sees of it is newer than what the transaction saw."""
        if word == "held":
            raise CompletionError(
                f"the transaction can't see that this run holds task {self._task.id}: its snapshot is older. Under REPEATABLE READ and "
                "SERIALIZABLE complete_tx must be the transaction's first statement; roll it back"
            )
        self.check(word)


def _explain(error: BaseException) -> None:
    code = sqlstate_of(error)
    if code in _NOTES:
        error.add_note(_NOTES[code])


__all__ = ["acomplete", "ahad_completed", "complete", "had_completed"]
