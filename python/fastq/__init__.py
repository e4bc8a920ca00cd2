"""fastq: a task queue for Python on PostgreSQL.

The shortest way is `App` and its decorator; under it are three parts: `Producer` enqueues, `Consumer` runs handlers,
`Client` looks, waits, cancels, retries, edits and deletes. What is imported here is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastq.errors import (
    CompletionError,
    ConnectionLost,
    ConsumerError,
    DatabaseError,
    DuplicateTask,
    EnqueueError,
    FastqError,
    InvalidTransition,
    PayloadError,
    ResultError,
    ResultNotKept,
    SchemaError,
    SettingsError,
    TaskError,
    TaskFailed,
    TaskLost,
    TaskNotFound,
)
from fastq.task import Enqueued, Task

if TYPE_CHECKING:
    from fastq._engine import TaskInfo
    from fastq._engine import version as __version__
    from fastq._function import TaskFunction
    from fastq.app import App
    from fastq.async_client import AsyncClient
    from fastq.client import Client, ConsumerRecord, FailedAttempt, Page, TaskRecord
    from fastq.consumer import Consumer
    from fastq.context import current_task
    from fastq.control import SkipRetry, Snooze, SnoozeWithError, TaskCancelled
    from fastq.lifespan import Depends
    from fastq.middleware import Middleware
    from fastq.migrations import migrate
    from fastq.outcome import ErrorHook
    from fastq.producer import Producer
    from fastq.retention import Retention
    from fastq.retry import ConstantBackoff, ExponentialBackoff, RetryPolicy

_LAZY = {
    "App": "fastq.app",
    "AsyncClient": "fastq.async_client",
    "Client": "fastq.client",
    "ConstantBackoff": "fastq.retry",
    "Consumer": "fastq.consumer",
    "ConsumerRecord": "fastq.client",
    "Depends": "fastq.lifespan",
    "ErrorHook": "fastq.outcome",
    "ExponentialBackoff": "fastq.retry",
    "FailedAttempt": "fastq.client",
    "Middleware": "fastq.middleware",
    "Page": "fastq.client",
    "Producer": "fastq.producer",
    "Retention": "fastq.retention",
    "RetryPolicy": "fastq.retry",
    "SkipRetry": "fastq.control",
    "Snooze": "fastq.control",
    "SnoozeWithError": "fastq.control",
    "TaskCancelled": "fastq.control",
    "TaskFunction": "fastq._function",
    "TaskInfo": "fastq._engine",
    "TaskRecord": "fastq.client",
    "current_task": "fastq.context",
    "migrate": "fastq.migrations",
}

__all__ = [
    "App",
    "AsyncClient",
    "Client",
    "CompletionError",
    "ConnectionLost",
    "ConstantBackoff",
    "Consumer",
    "ConsumerError",
    "ConsumerRecord",
    "DatabaseError",
    "Depends",
    "DuplicateTask",
    "EnqueueError",
    "Enqueued",
    "ErrorHook",
    "ExponentialBackoff",
    "FailedAttempt",
    "FastqError",
    "InvalidTransition",
    "Middleware",
    "Page",
    "PayloadError",
    "Producer",
    "ResultError",
    "ResultNotKept",
    "Retention",
    "RetryPolicy",
    "SchemaError",
    "SettingsError",
    "SkipRetry",
    "Snooze",
    "SnoozeWithError",
    "Task",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "TaskFunction",
    "TaskInfo",
    "TaskLost",
    "TaskNotFound",
    "TaskRecord",
    "__version__",
    "current_task",
    "migrate",
]


if not TYPE_CHECKING:
    # Hidden from type checkers, to which any name would be there.

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value = importlib.import_module("fastq._engine").version
        elif name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
        else:
            raise AttributeError(f"module 'fastq' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
