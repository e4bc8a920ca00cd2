"""The consumer: claims tasks of the types that it has handlers for, and runs them."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from fastq import _engine
from fastq._engine import TaskInfo
from fastq._lifetime import drive, drive_async, refuse_running_loop
from fastq._options import ConsumerOptions, read_consumer_options, read_count, read_duration, read_name, read_seconds
from fastq._running import Running
from fastq.errors import ConsumerError, SettingsError
from fastq.lifespan import Lifespan
from fastq.middleware import Middleware, read_middleware, surround
from fastq.outcome import TRACEBACK_LIMIT, ErrorHook, FailureHandler
from fastq.retry import RetryFunction, RetryPolicy, read_policy
from fastq.settings import ConsumerSettings, TypeSettings, resolve_dsn, resolve_schema
from fastq.task import to_seconds

H = TypeVar("H", bound=Callable[[TaskInfo], object])
M = TypeVar("M", bound=Middleware)

#: Handlers that run at once in a consumer unless it is told otherwise.
CONCURRENCY: Final = 32
#: Seconds that a stop waits for running handlers.
STOP_TIMEOUT: Final = 30.0


@dataclass(slots=True, frozen=True)
class _Registration:
    handler: Callable[[TaskInfo], Any]
    settings: TypeSettings
    retry_policy: RetryPolicy
    middleware: Sequence[Middleware]


class Consumer:
    """Runs handlers for tasks, in this process.

    It claims tasks of the types that it has a handler for, in the queues it names, and nothing else. Handlers may be sync
    (each in one of its threads) or async. It runs once: from its start to its stop.

    Args:
        dsn: a connection string, URI or keywords; None: FASTQ_DSN.
        schema: the schema that holds fastq's tables; None: FASTQ_SCHEMA, else ``"fastq"``.
        queues: names of the queues to take tasks from; None: all.
        concurrency: how many handlers run at once, sync and async together; threads are started on demand.
        retry_policy: how long a task waits after an attempt that failed: a `RetryPolicy`, or a function of the task and the
            error; None: `ExponentialBackoff()`. A type may have its own.
        error_hook: told of each attempt that failed, as `ErrorHook` says; None: nobody is.
        stop_timeout: seconds, or a timedelta, that ``run``, ``arun`` and the ends of ``with`` and ``async with`` wait for
            running handlers.
        traceback_limit: bytes that are kept of a traceback.
        result_ttl: seconds, or a timedelta, that what a handler returned is kept for `Client.wait`; None or 0: not at all. A type
            may have its own.
        **settings: see `ConsumerOptions`.

    Raises:
        SettingsError: no dsn, or a setting that is unknown or out of range.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str | None = None,
        queues: Sequence[str] | None = None,
        concurrency: int = CONCURRENCY,
        retry_policy: RetryPolicy | RetryFunction | None = None,
        error_hook: ErrorHook | None = None,
        stop_timeout: float | timedelta = STOP_TIMEOUT,
        traceback_limit: int = TRACEBACK_LIMIT,
        result_ttl: float | timedelta | None = None,
        **settings: Unpack[ConsumerOptions],
    ) -> None:
        options = read_consumer_options(settings)
        self._settings = ConsumerSettings(
            dsn=resolve_dsn(dsn),
            schema=resolve_schema(schema),
            queues=_read_queues(queues),
            concurrency=read_count("concurrency", concurrency),
            **options,
        )
        _engine.render("", self._settings.schema)
        self._retry_policy = read_policy(retry_policy)
        self._error_hook = _read_hook(error_hook)
        self._traceback_limit = read_count("traceback_limit", traceback_limit)
        self._result_ttl = 0.0 if result_ttl is None else read_seconds("result_ttl", result_ttl)
        self._stop_timeout = to_seconds("stop_timeout", stop_timeout)
        self._handlers: dict[str, _Registration] = {}
        self._middleware: list[Middleware] = []
        self._lifespan = Lifespan((), (), ())
        self._lock = threading.Lock()
        self._running: Running | None = None
        self._is_stopped = False

    # --- handlers ------------------------------------------------------------------------------

    def handler(
        self,
        type: str,  # noqa: A002 - the word that tasks use
        *,
        workers: int | None = None,
        timeout: float | timedelta | None = None,
        retry_policy: RetryPolicy | RetryFunction | None = None,
        middleware: Sequence[Middleware] = (),
        result_ttl: float | timedelta | None = None,
    ) -> Callable[[H], H]:
        """Decorate the function, sync or async, that runs tasks of ``type``: it gets a `TaskInfo`.

        What it returns is dropped, unless ``result_ttl`` keeps it. An exception ends the attempt as failed, ``SystemExit`` and
        ``KeyboardInterrupt`` too: a task that ends the worker would end one after the other.

        Args:
            type: that of the tasks; ending in ``*``: of all types that begin with what stands before it, also those that are
                enqueued for the first time later. Of several handlers, the one of the exact type runs a task, else the one with
                the longest prefix.
            workers: how many of it run at once; None: as many as ``concurrency`` lets.
            timeout: seconds, or a timedelta, after which an attempt ends as failed; None: never. A coroutine is cancelled;
                a sync handler can't be: it sees ``task.is_cancelled()``, its thread goes on beside the one that takes its place (its
                task's next run, too), and what comes of it is dropped; see ``stuck_limit``. A task's own timeout wins.
            retry_policy: how long its tasks wait after an attempt that failed; None: as the consumer has it. A task's own (``retry``)
                wins.
            middleware: what goes around it, the first outermost; all of it within what ``use`` was given.
            result_ttl: seconds, or a timedelta, that what it returns is kept for `Client.wait`; 0: not at all; None: as the consumer
                has it. It is encoded as payloads are (JSON, or raw ``bytes``), and at most ``result_limit`` bytes. What can't be
                encoded, or is larger, fails the task at once and for good, as `ResultError`: another run would do the work again.

        Raises:
            SettingsError: a bad type or value, or the type has a handler.
            ConsumerError: the consumer has been started.
        """

        def decorate(function: H) -> H:
            self.add_handler(
                type,
                function,
                workers=workers,
                timeout=timeout,
                retry_policy=retry_policy,
                middleware=middleware,
                result_ttl=result_ttl,
            )
            return function

        return decorate

    def add_handler(
        self,
        type: str,  # noqa: A002 - the word that tasks use
        function: Callable[[TaskInfo], object],
        *,
        workers: int | None = None,
        timeout: float | timedelta | None = None,
        retry_policy: RetryPolicy | RetryFunction | None = None,
        middleware: Sequence[Middleware] = (),
        result_ttl: float | timedelta | None = None,
        is_async: bool | None = None,
    ) -> None:
        """Register a handler as ``handler`` does.

        Args:
            type: as in ``handler``.
            function: called with a `TaskInfo`.
            workers: as in ``handler``.
            timeout: as in ``handler``.
            retry_policy: as in ``handler``.
            middleware: as in ``handler``.
            result_ttl: as in ``handler``.
            is_async: whether ``function`` returns an awaitable; None: find out, which works for ``async def``.

        Raises:
            SettingsError, ConsumerError: as ``handler``.
        """
        name = read_name("type", type)
        if not callable(function):
            raise SettingsError(f"the handler of {name!r} is {function!r}, but must be callable")
        call = getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        if any(
            check(f) for check in (inspect.isgeneratorfunction, inspect.isasyncgenfunction) for f in (function, call)
        ):
            raise SettingsError(f"the handler of {name!r} is a generator, and calling it would run nothing")
        if is_async is None:
            is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        ttl = self._result_ttl if result_ttl is None else read_seconds("result_ttl", result_ttl)
        settings = TypeSettings(
            type=name,
            is_async=is_async,
            workers=None if workers is None else read_count("workers", workers),
            timeout=None if timeout is None else read_duration("timeout", timeout),
            result_ttl=ttl or None,
        )
        with self._lock:
            if self._running is not None or self._is_stopped:
                raise ConsumerError(f"the handler of {name!r} came too late: register handlers before the start")
            if name in self._handlers:
                raise SettingsError(f"type {name!r} has a handler: {self._handlers[name].handler!r}")
            policy = self._retry_policy if retry_policy is None else read_policy(retry_policy)
            around = [read_middleware(one) for one in middleware]
            self._handlers[name] = _Registration(function, settings, policy, around)

    def use(self, middleware: M) -> M:
        """Have ``middleware`` go around all handlers, inside of what was given here before. Also a decorator.

        Args:
            middleware: a generator function of the task that yields once, where the handler runs; see `Middleware`.

        Raises:
            SettingsError: it is something else.
            ConsumerError: the consumer has been started.
        """
        read_middleware(middleware)
        with self._lock:
            if self._running is not None or self._is_stopped:
                raise ConsumerError(f"middleware {middleware!r} came too late: give it before the start")
            self._middleware.append(middleware)
        return middleware

    def live_within(self, lifespan: Lifespan) -> None:
        """Open ``lifespan`` at the start and close it at the end: an app's.

        Raises:
            ConsumerError: the consumer has been started.
        """
        with self._lock:
            if self._running is not None or self._is_stopped:
                raise ConsumerError("the lifespan came too late: give it before the start")
            self._lifespan = lifespan

    # --- sync ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect and start to work, in threads; returns once it does. Async handlers get a loop in a thread of its own.

        Raises:
            ConsumerError: started before, no handlers, or called where an event loop runs (use ``async with``).
            SettingsError: the dsn can't be read.
            SchemaError: the schema is not migrated, or shut to this version.
            DatabaseError: no connection.
        """
        refuse_running_loop("Consumer.start()", "`async with consumer:`", ConsumerError)
        running = self._open(own_loop=True)
        try:
            running.begin()
        except BaseException:
            self._running = None
            raise

    def stop(self, timeout: float | timedelta | None = None) -> None:
        """Claim no more, give back what has not started, wait for running handlers, and flush what they did.

        Handlers that still run after ``timeout`` are given up: their tasks run again elsewhere. A second stop does nothing.

        Args:
            timeout: seconds, or a timedelta; None: the setting ``stop_timeout``.

        Raises:
            ConsumerError: never started, called by a handler, called where an event loop runs, or a part had died.
        """
        seconds = self._stop_timeout if timeout is None else to_seconds("timeout", timeout)
        if (running := self._closing("stop")) is None:
            return
        refuse_running_loop("Consumer.stop()", "`async with consumer:`", ConsumerError)
        if not running.own_loop:
            raise ConsumerError("the consumer runs on an event loop: leave its `async with`, or cancel its `arun()`")
        drive(running.bell, running.drain(seconds), signals=False)
        self._close(running)

    def run(self) -> None:
        """Start, work until SIGTERM or SIGINT comes, stop as ``stop`` does, and return. A second signal ends at once.

        Off the main thread no signals come; there it works until ``stop`` is called.

        Raises:
            ConsumerError: as ``start``; or a part of it died.
            SettingsError, SchemaError, DatabaseError: as ``start``.
        """
        refuse_running_loop("Consumer.run()", "`await consumer.arun()`", ConsumerError)
        running = self._open(own_loop=True)
        try:
            running.begin()
        except BaseException:
            self._running = None
            raise
        drive(running.bell, running.until_stopped(self._stop_timeout), signals=True)
        self._close(running)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.stop()
        except ConsumerError:
            if error is None:
                raise

    # --- async ---------------------------------------------------------------------------------

    async def arun(self) -> None:
        """As ``run``, with async handlers on the running loop. Cancelled, it stops as after a signal.

        Raises:
            ConsumerError, SettingsError, SchemaError, DatabaseError: as ``run``.
        """
        async with self:
            running = self._started()
            await drive_async(running.bell, running.until_stopped(self._stop_timeout), signals=True)

    async def __aenter__(self) -> Self:
        running = self._open(own_loop=False)
        try:
            await running.begin_async()
        except BaseException:
            self._running = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if (running := self._closing("async with")) is None:
            return
        try:
            await drive_async(running.bell, running.drain(self._stop_timeout), signals=False)
        except asyncio.CancelledError:
            await drive_async(running.bell, running.give_up(), signals=False)
            raise
        finally:
            try:
                await running.finish_async()
            except ConsumerError:
                if error is None:
                    running.check()
                    raise
            finally:
                self._is_stopped = True
        if error is None:
            running.check()

    # --- both ----------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, float]:
        """Counters since the start: claimed, started, completed, retried, failed, snoozed and more.

        ``stuck`` is none: how many sync handlers go on now although their time is up.

        Raises:
            ConsumerError: never started.
        """
        return self._started().engine.stats()

    def _open(self, *, own_loop: bool) -> Running:
        with self._lock:
            if self._running is not None:
                self._check_process(self._running)
                raise ConsumerError("the consumer was started before: it runs once; make another for another run")
            if not self._handlers:
                raise ConsumerError("the consumer has no handlers: register one with @consumer.handler(type)")
            registrations = list(self._handlers.values())
            self._settings.types = [each.settings for each in registrations]
            policies = [each.retry_policy for each in registrations]
            handlers = [
                surround(each.handler, [*self._middleware, *each.middleware], is_async=each.settings.is_async)
                for each in registrations
            ]
            self._running = Running(
                self._settings,
                [
                    None if each.settings.is_async else handler
                    for each, handler in zip(registrations, handlers, strict=True)
                ],
                [
                    handler if each.settings.is_async else None
                    for each, handler in zip(registrations, handlers, strict=True)
                ],
                FailureHandler(policies, self._traceback_limit, self._error_hook),
                lifespan=self._lifespan,
                stop_timeout=self._stop_timeout,
                own_loop=own_loop,
            )
            return self._running

    def _started(self) -> Running:
        if self._running is None:
            raise ConsumerError("the consumer was never started")
        return self._running

    def _closing(self, what: str) -> Running | None:
        running = self._started()
        self._check_process(running)
        if self._is_stopped:
            return None
        if running.is_own_thread():
            raise ConsumerError(f"{what} was called by one of the consumer's own handlers, and would wait for it")
        return running

    def _close(self, running: Running) -> None:
        try:
            running.finish()
        except ConsumerError:
            # What ended it says more than what failed at the end.
            running.check()
            raise
        finally:
            self._is_stopped = True
        running.check()

    @staticmethod
    def _check_process(running: Running) -> None:
        if running.pid != os.getpid():
            raise ConsumerError(
                f"the consumer was started in process {running.pid}, and this is its forked child {os.getpid()}: "
                "start a consumer of its own here"
            )


def _read_hook(hook: object) -> Any:
    if hook is not None and (not callable(hook) or inspect.iscoroutinefunction(hook)):
        raise SettingsError(f"error_hook is {hook!r}, but must be a function, and not async")
    return hook


def _read_queues(queues: object) -> list[str] | None:
    if queues is None:
        return None
    if isinstance(queues, str) or not isinstance(queues, Sequence):
        raise SettingsError(f"queues is {queues!r}, but must be a list of names")
    if not queues:
        raise SettingsError("queues is empty, but must name at least one; None means all")
    return [read_name("a queue", name) for name in queues]


__all__ = ["CONCURRENCY", "STOP_TIMEOUT", "Consumer"]
