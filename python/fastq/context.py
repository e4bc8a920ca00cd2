"""Which task a handler runs, for code that isn't handed its `TaskInfo`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

from fastq._engine import TaskInfo, running_task
from fastq.errors import TaskError

#: Set by the dispatcher for each async handler: what it starts in a copy of its context (`asyncio.to_thread`, a task of its own)
#: sees it too. Of a sync handler the engine knows, by its thread.
CURRENT: Final[ContextVar[TaskInfo]] = ContextVar("fastq_current_task")


def current_task() -> TaskInfo:
    """The task whose handler is running here, or middleware around it.

    Of an async handler all that it starts in a copy of its context sees it, too: tasks of its own, `asyncio.to_thread`. A thread that
    a sync handler starts doesn't.

    Raises:
        TaskError: none is.
    """
    task = CURRENT.get(None) or running_task()
    if task is None:
        raise TaskError("no task is running here: current_task() is for handlers, middleware and what they call")
    return task


__all__ = ["CURRENT", "current_task"]
