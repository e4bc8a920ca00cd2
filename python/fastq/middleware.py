"""Middleware: what surrounds handlers, as context managers do."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq._engine import TaskInfo

SyncSurround = Callable[["TaskInfo"], contextlib.AbstractContextManager[Any, bool | None]]
AsyncSurround = Callable[["TaskInfo"], contextlib.AbstractAsyncContextManager[Any, bool | None]]

Middleware = (
    Callable[["TaskInfo"], Iterator[Any]] | Callable[["TaskInfo"], AsyncIterator[Any]] | SyncSurround | AsyncSurround
)
"""A generator function of the task that yields once, where the handler runs: what the handler raises is raised there, and what is
raised there is what became of the task. A sync one goes around sync and async handlers, an async one around async handlers. Or any
function of the task that gives a context manager."""


def read_middleware(given: object) -> Middleware:
    """Check one. Raises SettingsError."""
    if not callable(given):
        raise SettingsError(f"middleware is {given!r}, but must be a function of the task that yields once")
    if inspect.iscoroutinefunction(given):
        raise SettingsError(
            f"middleware is {given!r}, a coroutine function, but must yield once, where the handler runs"
        )
    return given


def surround(
    handler: Callable[[TaskInfo], Any], middleware: Sequence[Middleware], *, is_async: bool
) -> Callable[[TaskInfo], Any]:
    """The handler with all of it around, the first outermost.

    Raises:
        SettingsError: an async one is to go around a sync handler.
    """
    for one in reversed(middleware):
        if inspect.isasyncgenfunction(one):
            if not is_async:
                raise SettingsError(
                    f"middleware {one!r} is async and can't go around the sync handler {handler!r}: make it a sync generator"
                )
            handler = _await_within(contextlib.asynccontextmanager(one), handler)
        else:
            manage: Any = contextlib.contextmanager(one) if inspect.isgeneratorfunction(one) else one
            handler = _await_within(manage, handler) if is_async else _call_within(manage, handler)
    return handler


def _call_within(manage: Callable[[TaskInfo], Any], handler: Callable[[TaskInfo], Any]) -> Callable[[TaskInfo], Any]:
    def call(task: TaskInfo) -> Any:
        with manage(task):
            return handler(task)

    return call


def _await_within(
    manage: Callable[[TaskInfo], Any], handler: Callable[[TaskInfo], Awaitable[Any]]
) -> Callable[[TaskInfo], Awaitable[Any]]:
    async def call(task: TaskInfo) -> Any:
        surrounding = manage(task)
        # A function that gives one or the other.
        if hasattr(surrounding, "__aenter__"):
            async with surrounding:
                return await handler(task)
        with surrounding:
            return await handler(task)

    return call


__all__ = ["Middleware", "read_middleware", "surround"]
