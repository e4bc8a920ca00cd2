"""The door to psycopg, for the cold path: migrations, the client, the command line.

The only module that imports psycopg. Statements come by name from ``sql/queries`` or as text in the same style (objects carry the
prefix ``fastq.``, parameters are ``$1``); the schema's name is put in once and the result kept. Errors leave as fastq's own, with
the server's code and without passwords.
"""

from __future__ import annotations

import asyncio
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, LiteralString, Self, TypeAlias, TypeVar

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_attempts
from psycopg.rows import tuple_row
from psycopg.types.numeric import Int8BinaryDumper, Int8Dumper

from fastq import _engine
from fastq._work import Row, Work, aperform, perform
from fastq.errors import ConnectionLost, DatabaseError, SettingsError

_T = TypeVar("_T")
UserConnection: TypeAlias = psycopg.Connection[Any]
"""A connection of the user's own."""
AsyncUserConnection: TypeAlias = psycopg.AsyncConnection[Any]
"""A connection of the user's own, async."""

#: Seconds to wait for a connection, where nothing else is said.
CONNECT_TIMEOUT: Final = 10.0
#: Seconds to wait for a statement's answer, where nothing else is said. As the engine has it.
STATEMENT_TIMEOUT: Final = 30.0

# The same call may succeed when tried again: by SQLSTATE class, and single codes.
_TRANSIENT_CLASSES: Final = frozenset({"08", "40", "53"})
_TRANSIENT_CODES: Final = frozenset({"55P03", "57P01", "57P02", "57P03"})
# The server ends the connection with one of these.
_LOST_CODES: Final = frozenset({"57P01", "57P02", "57P03", "57P05"})
# What a server, or libpq's own checks, say to a client that will not be let in as it is. There is no code: libpq passes on the text alone.
_NEVER: Final = re.compile(
    r"authentication failed|does not exist|pg_hba\.conf|no password supplied|permission denied|certificate|SSL error|"
    r"not support SSL|channel binding|requirement .* failed|requirepeer|connection option"
)
# A silent link is given up by the kernel after about 25 s (where it has no tcp_user_timeout, by the keepalives): before a statement's
# time is over, so that a `Client` still has the time to ask again on a new one.
_DEFAULTS: Final = {
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
    "fallback_application_name": "fastq",
}
# As the engine has it, whatever the environment says.
_FIXED: Final = {"client_encoding": "UTF8", "gssencmode": "disable"}
_AS_WE_WANT: Final[Mapping[str, Any]] = {
    "autocommit": True,
    # In transaction mode a pooler keeps no named statements.
    "prepare_threshold": None,
}
# psycopg waits no shorter than this for one address, and libpq counts in 32 bits.
_SHORTEST: Final = 2.0
_LONGEST: Final = 2.0**31 - 1


class _TooLate(psycopg.OperationalError):
    """A statement's answer did not come in time; the connection is closed."""


class _Connection(psycopg.Connection[Row]):
    """Waits for each answer within a limit, whether the server, the link or something in between is silent."""

    limit: float | None = None
    """Seconds; None: no limit."""
    place: str
    """For messages."""

    def wait(self, gen: PQGen[_T], *args: Any, **options: Any) -> _T:
        """All that goes to the server and back goes through here."""
        return super().wait(_limited(self, gen), *args, **options)


class _AsyncConnection(psycopg.AsyncConnection[Row]):
    """As `_Connection`."""

    limit: float | None = None
    place: str

    async def wait(self, gen: PQGen[_T], *args: Any, **options: Any) -> _T:
        """As that of `_Connection`."""
        return await super().wait(_limited(self, gen), *args, **options)


def _limited(connection: _Connection | _AsyncConnection, gen: PQGen[_T]) -> PQGen[_T]:
    """``gen``, no longer than the connection's limit."""
    limit = connection.limit
    return gen if limit is None else _until(gen, limit, connection)


def _until(gen: PQGen[_T], limit: float, connection: _Connection | _AsyncConnection) -> PQGen[_T]:
    until = time.monotonic() + limit
    try:
        wanted = next(gen)
        while True:
            # psycopg comes back ten times a second with nothing.
            wanted = gen.send((yield wanted))
            if time.monotonic() >= until:
                connection.pgconn.finish()
                raise _TooLate(f"no answer from {connection.place} within {limit:g} s")
    except StopIteration as end:
        answer: _T = end.value
        return answer


@cache
def _queries() -> dict[str, str]:
    return _engine.queries()


@lru_cache(maxsize=512)
def _render(text: str, schema: str) -> str:
    return _engine.render(text, schema)


class _Common:
    """What sync and async connections share."""

    __slots__ = ("_connection", "schema")

    schema: str
    _connection: Any

    @property
    def is_closed(self) -> bool:
        """Closed, or found broken by its last statement."""
        return bool(self._connection.closed)

    def _render(self, text: str) -> str:
        # psycopg wants a literal, and it is one but for the schema's name, which `render` checks and quotes.
        return _render(text, self.schema)

    @contextmanager
    def _errors(self) -> Iterator[_Progress]:
        """What psycopg raises leaves as fastq's own."""
        progress = _Progress()
        try:
            yield progress
        except psycopg.Error as error:
            translated = _translate(error, lost=self._connection.closed)
            if isinstance(translated, ConnectionLost):
                translated.in_doubt = progress.is_committing
            raise translated from error


@dataclass(slots=True)
class _Progress:
    """Of a transaction."""

    is_committing: bool = False


class Database(_Common):
    """One connection to one fastq schema. In autocommit except inside ``transaction``; not for several threads at once.

    Args:
        dsn: a connection string as libpq reads it (URI, or key=value pairs).
        schema: the schema that ``fastq.`` in statements stands for.
        connect_timeout: seconds for all names, hosts and addresses of the connection string together (for each address 2 at least).
        statement_timeout: seconds for a statement's answer; beyond them the connection counts as lost. None: no limit.

    Raises:
        SettingsError: the connection string can't be read or followed, a file that it names is missing, or PostgreSQL would
            refuse or cut the schema's name.
        DatabaseError: no connection; ``is_transient`` unless the server said that it will never let this user in.
    """

    __slots__ = ()

    _connection: psycopg.Connection[Row]

    def __init__(
        self,
        dsn: str,
        schema: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        statement_timeout: float | None = STATEMENT_TIMEOUT,
    ) -> None:
        _render("", schema)
        self.schema = schema
        connection = _connect(dsn, connect_timeout)
        connection.limit = statement_timeout
        self._connection = connection

    def keep_statements(self) -> None:
        """Have the server keep each statement from its first use on. Not through a pooler."""
        self._connection.prepare_threshold = 0

    def perform(self, work: Work[_T]) -> _T:
        """Run the statements of ``work``. Raises as ``query``, and what the work raises."""
        return perform(work, self.query)

    def query(self, name: str, *params: object) -> list[Row]:
        """Run the statement of that name with parameters ``$1``, ``$2``, ... and return its rows.

        Raises:
            ConnectionLost: the connection broke, or no answer came within the statement timeout.
            DatabaseError: the server refused it.
        """
        return self.run(_queries()[name], *params)

    def run(self, text: str, *params: object) -> list[Row]:
        """Run one statement given as text: names as ``fastq.<object>``, parameters as ``$1``. Raises as ``query``."""
        with self._errors(), self._cursor() as cursor:
            cursor.execute(self._render(text), params)
            return cursor.fetchall() if cursor.description is not None else []

    def script(self, text: str) -> None:
        """Run several statements, separated by semicolons, without parameters. Raises as ``query``."""
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(self._render(text))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What runs inside is one transaction, READ COMMITTED whatever the role's default is. Raises as ``query``."""
        with self._errors() as progress, self._connection.transaction():
            yield
            progress.is_committing = True

    def has_schema(self) -> bool:
        """Whether the schema is there. Raises as ``query``."""
        return bool(self.query("find_schema", self.schema)[0][0])

    def create_schema(self) -> None:
        """Create the schema. Raises as ``query``."""
        self._compose("CREATE SCHEMA {}", self.schema)

    def drop_schema(self) -> None:
        """Drop the schema with all that is in it. Raises as ``query``."""
        self._compose("DROP SCHEMA {} CASCADE", self.schema)

    def drop_table(self, name: str) -> None:
        """Drop one table of the schema. Raises as ``query``."""
        self._compose("DROP TABLE {}", self.schema, name)

    def count_rows(self, name: str) -> int:
        """How many rows a table of the schema holds. Reads all of it. Raises as ``query``."""
        return int(self._compose("SELECT count(*) FROM {}", self.schema, name)[0][0])

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cursor(self) -> psycopg.Cursor[Row]:
        return self._connection.cursor(binary=True)

    def _compose(self, text: LiteralString, *name: str) -> list[Row]:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(sql.SQL(text).format(sql.Identifier(*name)))
            return cursor.fetchall() if cursor.description is not None else []


class AsyncDatabase(_Common):
    """As `Database`, for coroutines: one at a time. Made by ``connect``."""

    __slots__ = ()

    _connection: psycopg.AsyncConnection[Row]

    def __init__(self, connection: psycopg.AsyncConnection[Row], schema: str) -> None:
        _render("", schema)
        self.schema = schema
        self._connection = connection

    @classmethod
    async def connect(
        cls,
        dsn: str,
        schema: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        statement_timeout: float | None = STATEMENT_TIMEOUT,
    ) -> AsyncDatabase:
        """Connect. Arguments and errors are those of `Database`."""
        _render("", schema)
        connection = await _connect_async(dsn, connect_timeout)
        connection.limit = statement_timeout
        return AsyncDatabase(connection, schema)

    async def perform(self, work: Work[_T]) -> _T:
        """Run the statements of ``work``. Raises as ``query``, and what the work raises."""
        return await aperform(work, self.query)

    async def query(self, name: str, *params: object) -> list[Row]:
        """As that of `Database`."""
        return await self.run(_queries()[name], *params)

    async def run(self, text: str, *params: object) -> list[Row]:
        """As that of `Database`."""
        with self._errors():
            async with self._cursor() as cursor:
                await cursor.execute(self._render(text), params)
                return await cursor.fetchall() if cursor.description is not None else []

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """As that of `Database`."""
        with self._errors() as progress:
            async with self._connection.transaction():
                yield
                progress.is_committing = True

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._connection.close()

    def drop(self) -> None:
        """Close the connection at once, also where its event loop is closed."""
        self._connection.pgconn.finish()

    def _cursor(self) -> psycopg.AsyncCursor[Row]:
        return self._connection.cursor(binary=True)


def was_too_late(error: ConnectionLost) -> bool:
    """Whether a statement's time was over, in which case the next attempt may well take as long."""
    return isinstance(error.__cause__, _TooLate)


class Borrowed(Database):
    """A connection of the user's own, whatever its settings. Never committed, rolled back or closed here.

    Statements run in the transaction that is open there, which a connection without autocommit begins by itself.

    Raises:
        TypeError: it is no connection of psycopg 3 that blocks.
        SettingsError: it is in autocommit and in no transaction, or the schema's name can't be used.
    """

    __slots__ = ()

    def __init__(self, connection: UserConnection, schema: str) -> None:
        _check_borrowed(connection, psycopg.Connection, "with")
        _render("", schema)
        self.schema = schema
        self._connection = connection

    def _cursor(self) -> psycopg.Cursor[Row]:
        return _set_up_cursor(psycopg.RawCursor(self._connection, row_factory=tuple_row))


class AsyncBorrowed(AsyncDatabase):
    """As `Borrowed`, of psycopg's ``AsyncConnection``."""

    __slots__ = ()

    def __init__(self, connection: AsyncUserConnection, schema: str) -> None:
        _check_borrowed(connection, psycopg.AsyncConnection, "async with")
        super().__init__(connection, schema)

    def _cursor(self) -> psycopg.AsyncCursor[Row]:
        return _set_up_cursor(psycopg.AsyncRawCursor(self._connection, row_factory=tuple_row))


_Cursor = TypeVar("_Cursor", psycopg.Cursor[Row], psycopg.AsyncCursor[Row])


def _set_up_cursor(cursor: _Cursor) -> _Cursor:
    cursor.format = psycopg.pq.Format.BINARY
    cursor.adapters.register_dumper(int, Int8Dumper)
    cursor.adapters.register_dumper(int, Int8BinaryDumper)
    return cursor


def _check_borrowed(connection: object, kind: type[UserConnection | AsyncUserConnection], how: str) -> None:
    if not isinstance(connection, kind):
        raise TypeError(f"a psycopg.{kind.__name__} is wanted, not {type(connection).__name__}")
    if connection.autocommit and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        raise SettingsError(
            f"the connection is in autocommit and in no transaction: call this within `{how} connection.transaction():`"
        )


def _connect(dsn: str, timeout: float) -> _Connection:
    with _target(dsn) as target:
        connection = _try_in_turn(target, time.monotonic() + timeout)
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    return connection


async def _connect_async(dsn: str, timeout: float) -> _AsyncConnection:  # noqa: ASYNC109 - its deadline goes from host to host
    with _target(dsn) as target:
        connection = await _try_in_turn_async(target, time.monotonic() + timeout)
    await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
    return connection


def _try_in_turn(target: _Target, deadline: float) -> _Connection:
    tries = _in_turn(_find_addresses(target.words, deadline), target.words, deadline)
    parameters = next(tries)
    while True:
        try:
            connection = _Connection.connect("", cursor_factory=psycopg.RawCursor, **_AS_WE_WANT, **parameters)
        except psycopg.Error as error:
            parameters = tries.send(error)
        else:
            target.note(connection, parameters)
            return connection


async def _try_in_turn_async(target: _Target, deadline: float) -> _AsyncConnection:
    tries = _in_turn(await _find_addresses_async(target.words, deadline), target.words, deadline)
    parameters = next(tries)
    while True:
        try:
            connection = await _AsyncConnection.connect(
                "", cursor_factory=psycopg.AsyncRawCursor, **_AS_WE_WANT, **parameters
            )
        except psycopg.Error as error:
            parameters = tries.send(error)
        else:
            target.note(connection, parameters)
            return connection


@dataclass(frozen=True, slots=True)
class _Target:
    """What to connect to."""

    words: dict[str, str]
    is_quotable: bool

    def note(self, connection: _Connection | _AsyncConnection, parameters: Mapping[str, Any]) -> None:
        """The connection was made: say where it leads, and how it passes numbers."""
        place = f"{_label(parameters)}/{connection.info.dbname}"
        connection.place = place if self.is_quotable else "the database"
        # By default a number's type is the smallest that holds it, so that `$1` means another type with another value.
        connection.adapters.register_dumper(int, Int8Dumper)
        connection.adapters.register_dumper(int, Int8BinaryDumper)


@contextmanager
def _target(dsn: str) -> Iterator[_Target]:
    """What the string names; inside, psycopg's errors leave as fastq's.

    Raises:
        SettingsError: the string can't be read or followed.
        DatabaseError: no connection.
    """
    # The engine reads the string for both halves, so that they mean the same by it and refuse the same, in the same words.
    given, is_quotable = _engine.parse_dsn(dsn)
    words = _DEFAULTS | _engine.complete_dsn(given) | _FIXED | _service(given)
    place = _describe(words) if is_quotable else "the database"
    try:
        yield _Target(words, is_quotable)
    except psycopg.Error as error:
        text = str(error).strip()
        if not is_quotable:
            why = (
                "the connection string can be read in more than one way; "
                "write characters such as @ / ? # in a user's name or password as %40, %2F, %3F, %23"
            )
        else:
            why = _hide(text, words)
        # `from None`: the original may quote a misread password.
        raise DatabaseError(
            f"could not connect to {place}: {why}",
            sqlstate=error.sqlstate,
            is_transient=not _NEVER.search(text),
        ) from None


def _service(given: Mapping[str, str]) -> dict[str, str]:
    """The service that the string names, which is in the words already: without it libpq adds what PGSERVICE names."""
    return {"service": given["service"]} if "service" in given else {}


_Found: TypeAlias = "list[dict[str, Any]] | Exception"


def _find_addresses(words: Mapping[str, str], deadline: float) -> list[dict[str, Any]]:
    """All addresses to try.

    Raises:
        psycopg.Error: no name has an address, or the time is over.
    """
    found: queue.SimpleQueue[_Found] = queue.SimpleQueue()
    limit = max(0.0, deadline - time.monotonic())
    _look_up(words, found.put)
    try:
        answer = found.get(timeout=min(limit, threading.TIMEOUT_MAX))
    except queue.Empty:
        raise _unresolved(words, limit) from None
    return _addresses(answer)


async def _find_addresses_async(words: Mapping[str, str], deadline: float) -> list[dict[str, Any]]:
    """As `_find_addresses`."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_Found] = loop.create_future()

    def put(answer: _Found) -> None:
        # Closed: nobody waits any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if found.done() else found.set_result(answer))

    limit = max(0.0, deadline - time.monotonic())
    _look_up(words, put)
    try:
        async with asyncio.timeout(limit):
            answer = await found
    except TimeoutError:
        raise _unresolved(words, limit) from None
    return _addresses(answer)


def _look_up(words: Mapping[str, str], put: Callable[[_Found], None]) -> None:
    """Look names up on a thread, since nothing ends the system's look-up before its own time."""

    def look_up() -> None:
        try:
            put(conninfo_attempts(dict(words)))
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            put(error)

    threading.Thread(target=look_up, name="fastq-look-up", daemon=True).start()


def _unresolved(words: Mapping[str, str], limit: float) -> psycopg.Error:
    names = words.get("host", "")
    what = f"the names of {names} were" if "," in names else "the host's name was"
    return psycopg.OperationalError(f"{what} not resolved within {limit:.3g} s")


def _addresses(answer: _Found) -> list[dict[str, Any]]:
    if isinstance(answer, UnicodeError):
        raise psycopg.OperationalError(f"the host's name can't be resolved: {answer}")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _in_turn(
    attempts: Sequence[dict[str, Any]], words: Mapping[str, str], deadline: float
) -> Generator[dict[str, Any], psycopg.Error, None]:
    """Parameters of each host and address, tried as the engine does; is sent why one failed.

    Each has a fair part of what is left, and a refused login ends it all.

    Raises:
        psycopg.Error: with what became of each.
    """
    limit = float(words.get("connect_timeout", 0))
    failures: list[str] = []
    for number, attempt in enumerate(attempts):
        left = deadline - time.monotonic()
        if left <= 0 and failures:
            break
        share = min(limit, left) if limit > 0 else left / (len(attempts) - number)
        error = yield attempt | {"connect_timeout": int(min(max(_SHORTEST, share), _LONGEST))}
        text = " ".join(str(error).split())
        failures.append(text if len(attempts) == 1 else f"{_label(attempt)}: {text}")
        if _NEVER.search(text):
            break
    raise psycopg.OperationalError("; ".join(failures))


def _label(words: Mapping[str, Any]) -> str:
    return f"{words.get('host') or words.get('hostaddr') or 'the local socket'}:{words.get('port') or 5432}"


def _describe(words: Mapping[str, str]) -> str:
    host = words.get("host") or words.get("hostaddr") or "the local socket"
    return f"database {words.get('dbname', 'of the default name')!r} at {host}"


def _hide(message: str, words: Mapping[str, str]) -> str:
    for word in ("password", "sslpassword"):
        if secret := words.get(word):
            message = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", message)
    return message


def _translate(error: psycopg.Error, *, lost: bool) -> DatabaseError:
    code = error.sqlstate
    if isinstance(error, _TooLate):
        return ConnectionLost(str(error))
    if lost or isinstance(error, psycopg.InterfaceError) or code in _LOST_CODES:
        text = error.diag.message_primary or str(error).strip() or "no reason given"
        return ConnectionLost(f"the connection to the database broke: {text}", sqlstate=code)
    parts: Sequence[str | None] = (error.diag.message_primary or str(error).strip(), error.diag.message_hint)
    message = ". ".join(part for part in parts if part)
    transient = code is not None and (code[:2] in _TRANSIENT_CLASSES or code in _TRANSIENT_CODES)
    return DatabaseError(f"{message} (SQLSTATE {code})" if code else message, sqlstate=code, is_transient=transient)


__all__ = [
    "CONNECT_TIMEOUT",
    "STATEMENT_TIMEOUT",
    "AsyncBorrowed",
    "AsyncDatabase",
    "AsyncUserConnection",
    "Borrowed",
    "Database",
    "Row",
    "UserConnection",
    "was_too_late",
]
