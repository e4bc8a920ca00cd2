"""Carries steps out on a session, sync or async, and words what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final
from weakref import WeakSet

from fastq._engine import ProducerCore, TxTasks
from fastq._tx import steps
from fastq._tx.parts import Answer, AsyncSession, Session, sqlstate_of, text_of
from fastq.errors import EnqueueError

_YOURS: Final = (
    "the transaction is yours, and fastq repeats nothing in it: roll it back and run it again from its start"
)
#: What an error of the server means for whoever enqueues in a transaction, by its SQLSTATE.
_NOTES: Final = {
    "40001": f"fastq: another transaction committed what this one's snapshot does not show (an idempotency token, say); {_YOURS}",
    "40P01": (
        "fastq: two transactions waited for each other, such as for idempotency tokens that each had taken in another order; "
        f"{_YOURS}"
    ),
    "55P03": f"fastq: somebody's open transaction holds an idempotency token of the call, longer than lock_timeout; {_YOURS}",
    "57014": (
        "fastq: the statement was cancelled, or took longer than statement_timeout; it may have waited for an idempotency token "
        f"that somebody's open transaction holds; {_YOURS}"
    ),
    "23505": f"fastq: ids that the database handed out were taken: it went back in time, and new ones will be reserved; {_YOURS}",
}


class Write:
    """One call: tasks for a schema, in a transaction of the user's.

    Args:
        tasks: read and checked.
        schema: the producer's.
        known: connections that were found to be in the producer's database.
        notify: wake consumers with the commit itself.
    """

    def __init__(self, tasks: TxTasks, schema: str, known: WeakSet[object], *, notify: bool) -> None:
        self.tasks = tasks
        self.schema = schema
        self._known = known
        self.notify = notify
        self.is_open = False

    def is_known(self, raw: object) -> bool:
        """Whether this connection was looked at before."""
        return raw in self._known

    def check_home(self, raw: object, found: Answer) -> None:
        """Both connections must be in one database: ids and lanes come from the producer's. Raises EnqueueError."""
        home = "{" + ",".join(map(str, found[0])) + "}"
        if home != self.tasks.home():
            raise EnqueueError(
                "the connection is to another server or database than the producer's dsn: a task must be enqueued where its "
                "producer reserves ids"
            )
        self._known.add(raw)

    def announce(self, session: Session | AsyncSession, core: ProducerCore) -> None:
        """Let consumers be woken when the transaction commits, where nothing else does it and the driver tells of it."""
        if not self.notify:
            lanes, witness = self.tasks.news()
            if lanes:
                session.after_commit(lambda *, is_committed: core.wake(lanes, None if is_committed else witness))

    def is_to_undo(self, error: BaseException) -> bool:
        """Whether what was written so far must go: after an error of the server the transaction is lost as it is."""
        return self.is_open and sqlstate_of(error) is None

    def explain(self, error: BaseException) -> None:
        """Say with the driver's error whose it is."""
        code = sqlstate_of(error)
        if code == "23505":
            self.tasks.forget_ids()
        if code in _NOTES:
            error.add_note(_NOTES[code])


def run(session: Session, call: Write) -> None:
    """Write tasks. Raises what the driver raises, and EnqueueError."""
    if not call.is_known(session.raw):
        call.check_home(session.raw, session.query(text_of("find_home", call.schema), ()))
    work = steps.write(call.tasks, notify=call.notify)
    try:
        step = next(work, None)
        while step is not None:
            answer: Answer = []
            match step:
                case steps.Command(text, is_open):
                    session.execute(text)
                    call.is_open = is_open
                case steps.Number():
                    call.tasks.number()
                case steps.Query(name, params):
                    answer = session.query(text_of(name, call.schema), params)
                case steps.Copy(leaf, blocks):
                    session.copy(call.schema, leaf, blocks)
            step = steps.after(work, answer)
    except BaseException as error:
        if call.is_to_undo(error):
            with contextlib.suppress(Exception):
                for text in steps.UNDO:
                    session.execute(text)
        call.explain(error)
        raise


async def arun(session: AsyncSession, call: Write) -> None:
    """As `run`. What may wait for the producer's own connection is done in a thread."""
    if not call.is_known(session.raw):
        found = await session.query(text_of("find_home", call.schema), ())
        await asyncio.to_thread(call.check_home, session.raw, found)
    work = steps.write(call.tasks, notify=call.notify)
    try:
        step = next(work, None)
        while step is not None:
            answer: Answer = []
            match step:
                case steps.Command(text, is_open):
                    await session.execute(text)
                    call.is_open = is_open
                case steps.Number():
                    await asyncio.to_thread(call.tasks.number)
                case steps.Query(name, params):
                    answer = await session.query(text_of(name, call.schema), params)
                case steps.Copy(leaf, blocks):
                    await session.copy(call.schema, leaf, blocks)
            step = steps.after(work, answer)
    except BaseException as error:
        if call.is_to_undo(error):
            with contextlib.suppress(Exception):
                for text in steps.UNDO:
                    await session.execute(text)
        call.explain(error)
        raise


__all__ = ["Write", "arun", "run"]
