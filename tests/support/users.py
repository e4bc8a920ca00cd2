"""Users with transactions of their own: one class a driver, all with the same words, so that a test says once what must hold for all.

Each has a thread to itself (an event loop in it where the driver is async), since drivers bind connections to threads and loops; what
waits for somebody's lock can so be started and looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import asyncpg
import django
import psycopg
import sqlalchemy as sa
from django.conf import settings as django_settings
from django.db import connections, transaction
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from fastq import Enqueued, Producer, Task, TaskInfo

T = TypeVar("T")

#: Seconds that a call may take. A lock that nobody gives up shows as an error, not as a hang.
LIMIT = 30.0


class User(ABC):
    """A connection of this driver, in a transaction from the start and again after each end."""

    name: ClassVar[str]
    is_async: ClassVar[bool] = False

    def __init__(self, producer: Producer, dsn: str) -> None:
        self.producer = producer
        self.dsn = dsn
        self._pool = ThreadPoolExecutor(1)
        self._runner: asyncio.Runner | None = None
        try:
            self.do(self._open)
            self.pid: int = self.value("SELECT pg_backend_pid()")
        except BaseException:
            self._pool.shutdown()
            raise

    # --- what a test says ----------------------------------------------------------------------

    def start(self, call: Callable[[], T]) -> Future[T]:
        """Runs a call in the user's thread."""
        return self._pool.submit(call)

    def do(self, call: Callable[[], T]) -> T:
        return self.start(call).result(LIMIT)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """In the user's thread: runs a coroutine on its loop."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def enqueue(self, task: Task, **options: bool) -> Enqueued:
        return self.do(lambda: self.call_enqueue(task, **options))

    def enqueue_many(self, tasks: Iterable[Task], **options: bool) -> Sequence[Enqueued]:
        return self.do(lambda: self.call_enqueue_many(tasks, **options))

    def complete(self, task: TaskInfo) -> None:
        self.do(lambda: self.call_complete(task))

    def execute(self, statement: str) -> None:
        self.do(lambda: self._value(statement))

    def value(self, statement: str) -> Any:
        return self.do(lambda: self._value(statement))

    def commit(self) -> None:
        self.do(lambda: self._end(is_commit=True))

    def rollback(self) -> None:
        self.do(lambda: self._end(is_commit=False))

    def close(self) -> None:
        try:
            self.do(self._close)
            if self._runner is not None:
                self.do(self._runner.close)
        finally:
            self._pool.shutdown()

    # --- what a driver does, in the user's thread ----------------------------------------------

    def call_enqueue(self, task: Task, **options: bool) -> Enqueued:
        if self.is_async:
            return self.wait(self.producer.aenqueue_tx(self.target(), task, **options))
        return self.producer.enqueue_tx(self.target(), task, **options)

    def call_enqueue_many(self, tasks: Iterable[Task], **options: bool) -> Sequence[Enqueued]:
        if self.is_async:
            return self.wait(self.producer.aenqueue_many_tx(self.target(), tasks, **options))
        return self.producer.enqueue_many_tx(self.target(), tasks, **options)

    def call_complete(self, task: TaskInfo) -> None:
        if self.is_async:
            self.wait(task.acomplete_tx(self.target()))
        else:
            task.complete_tx(self.target())

    @abstractmethod
    def target(self) -> object:
        """What is handed to `enqueue_tx` and `complete_tx`."""

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _value(self, statement: str) -> Any: ...

    @abstractmethod
    def _end(self, *, is_commit: bool) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class PsycopgUser(User):
    name = "psycopg"

    def _open(self) -> None:
        self.connection = psycopg.connect(self.dsn)

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        cursor = self.connection.execute(statement.encode())
        return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]

    def _end(self, *, is_commit: bool) -> None:
        self.connection.commit() if is_commit else self.connection.rollback()

    def _close(self) -> None:
        self.connection.close()


class AsyncPsycopgUser(User):
    name = "psycopg-async"
    is_async = True

    def _open(self) -> None:
        self.connection = self.wait(psycopg.AsyncConnection.connect(self.dsn))

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        async def run() -> Any:
            cursor = await self.connection.execute(statement.encode())
            return (await cursor.fetchone())[0] if cursor.description else None  # type: ignore[index]

        return self.wait(run())

    def _end(self, *, is_commit: bool) -> None:
        self.wait(self.connection.commit() if is_commit else self.connection.rollback())

    def _close(self) -> None:
        self.wait(self.connection.close())


def asyncpg_words(dsn: str) -> dict[str, Any]:
    """A libpq string in asyncpg's words."""
    words = conninfo_to_dict(dsn)
    names = {"host": "host", "port": "port", "user": "user", "password": "password", "dbname": "database"}
    return {names[word]: value for word, value in words.items() if word in names}


class AsyncpgUser(User):
    name = "asyncpg"
    is_async = True

    def _open(self) -> None:
        self.connection: Any = self.wait(asyncpg.connect(**asyncpg_words(self.dsn)))
        self._begin()

    def _begin(self) -> None:
        self._transaction = self.connection.transaction()
        self.wait(self._transaction.start())

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        return self.wait(self.connection.fetchval(statement))

    def _end(self, *, is_commit: bool) -> None:
        self.wait(self._transaction.commit() if is_commit else self._transaction.rollback())
        self._begin()

    def _close(self) -> None:
        self.wait(self.connection.close())


class AsyncpgPoolUser(AsyncpgUser):
    name = "asyncpg-pool"

    def _open(self) -> None:
        self.pool = self.wait(self._new_pool())
        self.connection = self.wait(self._acquire())
        self._begin()

    async def _new_pool(self) -> Any:
        return await asyncpg.create_pool(**asyncpg_words(self.dsn), min_size=1, max_size=1)

    async def _acquire(self) -> Any:
        return await self.pool.acquire()

    def _close(self) -> None:
        async def run() -> None:
            await self.pool.release(self.connection)
            await self.pool.close()

        self.wait(run())


class SqlAlchemyUser(User):
    name = "sqlalchemy"

    def _open(self) -> None:
        self.engine = sa.create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(self.dsn), poolclass=NullPool
        )
        self.connection: Any = self._connect()

    def _connect(self) -> Any:
        return self.engine.connect()

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        result = self.connection.execute(sa.text(statement))
        return result.scalar() if result.returns_rows else None

    def _end(self, *, is_commit: bool) -> None:
        self.connection.commit() if is_commit else self.connection.rollback()

    def _close(self) -> None:
        self.connection.close()
        self.engine.dispose()


class SqlAlchemySessionUser(SqlAlchemyUser):
    name = "sqlalchemy-session"

    def _connect(self) -> Any:
        return Session(self.engine)


class AsyncSqlAlchemyUser(User):
    name = "sqlalchemy-async-asyncpg"
    is_async = True

    def _open(self) -> None:
        self.engine = self._new_engine()
        self.connection: Any = self.wait(self._connect())

    def _new_engine(self) -> AsyncEngine:
        words = asyncpg_words(self.dsn)
        return create_async_engine(
            "postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(**words), poolclass=NullPool
        )

    async def _connect(self) -> Any:
        return await self.engine.connect()

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        async def run() -> Any:
            result = await self.connection.execute(sa.text(statement))
            return result.scalar() if result.returns_rows else None

        return self.wait(run())

    def _end(self, *, is_commit: bool) -> None:
        self.wait(self.connection.commit() if is_commit else self.connection.rollback())

    def _close(self) -> None:
        self.wait(self.connection.close())
        self.wait(self.engine.dispose())


class AsyncSqlAlchemySessionUser(AsyncSqlAlchemyUser):
    name = "sqlalchemy-async-session-asyncpg"

    async def _connect(self) -> Any:
        return AsyncSession(self.engine)


class AsyncSqlAlchemyPsycopgUser(AsyncSqlAlchemyUser):
    name = "sqlalchemy-async-psycopg"

    def _new_engine(self) -> AsyncEngine:
        return create_async_engine(
            "postgresql+psycopg://",
            async_creator=lambda: psycopg.AsyncConnection.connect(self.dsn),
            poolclass=NullPool,
        )


def django_database(dsn: str) -> dict[str, Any]:
    """A libpq string in Django's words."""
    words = conninfo_to_dict(dsn)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": words.get("dbname"),
        "USER": words.get("user"),
        "PASSWORD": words.get("password", ""),
        "HOST": words.get("host"),
        "PORT": words.get("port"),
    }


class DjangoUser(User):
    name = "django"

    def _open(self) -> None:
        if not django_settings.configured:
            django_settings.configure(DATABASES={"default": django_database(self.dsn)}, USE_TZ=True)
            django.setup()
        # Of this thread, by Django's own rule.
        self.connection: Any = connections["default"]
        self._begin()

    def _begin(self) -> None:
        self._atomic = transaction.atomic()
        self._atomic.__enter__()

    def target(self) -> object:
        return self.connection

    def _value(self, statement: str) -> Any:
        with self.connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None

    def _end(self, *, is_commit: bool) -> None:
        if not is_commit:
            transaction.set_rollback(True)
        self._atomic.__exit__(None, None, None)
        self._begin()

    def _close(self) -> None:
        transaction.set_rollback(True)
        self._atomic.__exit__(None, None, None)
        self.connection.close()


USERS: list[type[User]] = [
    PsycopgUser,
    AsyncPsycopgUser,
    AsyncpgUser,
    AsyncpgPoolUser,
    SqlAlchemyUser,
    SqlAlchemySessionUser,
    AsyncSqlAlchemyUser,
    AsyncSqlAlchemySessionUser,
    AsyncSqlAlchemyPsycopgUser,
    DjangoUser,
]


@contextlib.contextmanager
def user_of(kind: type[User], producer: Producer, dsn: str) -> Iterator[User]:
    """A user who leaves at the end; what is open is rolled back."""
    user = kind(producer, dsn)
    try:
        yield user
    finally:
        user.close()
