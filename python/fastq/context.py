"""Which task a handler runs, for code that isn't handed its `TaskInfo`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from fastq.errors import TaskError

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

#: Set by the engine for each sync handler, by the dispatcher for each async one. What a handler starts in a copy of its context
#: (`asyncio.to_thread`, a task of its own) sees it too.
CURRENT: Final[ContextVar[TaskInfo | None]] = ContextVar("fastq_current_task")


def current_task() -> TaskInfo:
    """The task whose handler, or middleware around it, is running here.

    Raises:
        TaskError: none is.
    """
    task = CURRENT.get(None)
    if task is None:
        raise TaskError("no task is running here: current_task() is for handlers, middleware and what they call")
    return task


__all__ = ["CURRENT", "current_task"]
