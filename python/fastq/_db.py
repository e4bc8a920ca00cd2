"""The door to psycopg, for the cold path: migrations, the client, the command line.

The only module that imports psycopg. Statements come by name from ``sql/queries`` or as text in the same style (objects carry the
prefix ``fastq.``, parameters are ``$1``); the schema's name is put in once and the result kept. Errors leave as fastq's own, with
the server's code and without passwords.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Final, LiteralString, Self, TypeAlias, TypeVar

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_attempts
from psycopg.rows import tuple_row
from psycopg.types.numeric import Int8BinaryDumper, Int8Dumper

from fastq import _engine
from fastq.errors import ConnectionLost, DatabaseError, SettingsError

Row = tuple[Any, ...]
_T = TypeVar("_T")
UserConnection: TypeAlias = psycopg.Connection[Any]
"""A connection of the user's own."""

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
        limited = gen if self.limit is None else self._limited(gen, self.limit)
        return super().wait(limited, *args, **options)

    def _limited(self, gen: PQGen[_T], limit: float) -> PQGen[_T]:
        until = time.monotonic() + limit
        try:
            wanted = next(gen)
            while True:
                # psycopg comes back ten times a second with nothing.
                wanted = gen.send((yield wanted))
                if time.monotonic() >= until:
                    self.pgconn.finish()
                    raise _TooLate(f"no answer from {self.place} within {limit:g} s")
        except StopIteration as end:
            answer: _T = end.value
            return answer


@cache
def _queries() -> dict[str, str]:
    return _engine.queries()


@lru_cache(maxsize=512)
def _render(text: str, schema: str) -> str:
    return _engine.render(text, schema)


class Database:
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

    __slots__ = ("_connection", "schema")

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
        self._connection: psycopg.Connection[Row] = connection

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
        committing = False
        try:
            with self._connection.transaction():
                yield
                committing = True
        except psycopg.Error as error:
            translated = _translate(error, lost=self._connection.closed)
            if isinstance(translated, ConnectionLost):
                translated.in_doubt = committing
            raise translated from error

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

    @property
    def is_closed(self) -> bool:
        """Closed, or found broken by its last statement."""
        return self._connection.closed

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _cursor(self) -> psycopg.Cursor[Row]:
        return self._connection.cursor(binary=True)

    def _render(self, text: str) -> str:
        # psycopg wants a literal, and it is one but for the schema's name, which `render` checks and quotes.
        return _render(text, self.schema)

    def _compose(self, text: LiteralString, *name: str) -> list[Row]:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(sql.SQL(text).format(sql.Identifier(*name)))
            return cursor.fetchall() if cursor.description is not None else []

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise _translate(error, lost=self._connection.closed) from error


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
        if not isinstance(connection, psycopg.Connection):
            raise TypeError(f"a psycopg.Connection is wanted, not {type(connection).__name__}")
        if connection.autocommit and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            raise SettingsError(
                "the connection is in autocommit and in no transaction: call this within `with connection.transaction():`"
            )
        _render("", schema)
        self.schema = schema
        self._connection = connection

    def _cursor(self) -> psycopg.Cursor[Row]:
        cursor = psycopg.RawCursor(self._connection, row_factory=tuple_row)
        cursor.format = psycopg.pq.Format.BINARY
        cursor.adapters.register_dumper(int, Int8Dumper)
        cursor.adapters.register_dumper(int, Int8BinaryDumper)
        return cursor


def _connect(dsn: str, timeout: float) -> _Connection:
    # The engine reads the string for both halves, so that they mean the same by it and refuse the same, in the same words.
    given, is_quotable = _engine.parse_dsn(dsn)
    words = _DEFAULTS | _engine.complete_dsn(given) | _FIXED | _service(given)
    place = _describe(words) if is_quotable else "the database"
    try:
        connection = _try_in_turn(words, time.monotonic() + timeout)
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
    if not is_quotable:
        connection.place = "the database"
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    # By default a number's type is the smallest that holds it, so that `$1` means another type with another value.
    connection.adapters.register_dumper(int, Int8Dumper)
    connection.adapters.register_dumper(int, Int8BinaryDumper)
    return connection


def _service(given: Mapping[str, str]) -> dict[str, str]:
    """The service that the string names, which is in the words already: without it libpq adds what PGSERVICE names."""
    return {"service": given["service"]} if "service" in given else {}


def _find_addresses(words: Mapping[str, str], deadline: float) -> list[dict[str, Any]]:
    """All addresses to try. Names are looked up on a thread, since nothing ends the system's look-up before its own time.

    Raises:
        psycopg.Error: no name has an address, or the time is over.
    """
    found: queue.SimpleQueue[list[dict[str, Any]] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(conninfo_attempts(dict(words)))
        except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            found.put(error)

    limit = max(0.0, deadline - time.monotonic())
    threading.Thread(target=look_up, name="fastq-look-up", daemon=True).start()
    try:
        answer = found.get(timeout=min(limit, threading.TIMEOUT_MAX))
    except queue.Empty:
        names = words.get("host", "")
        what = f"the names of {names} were" if "," in names else "the host's name was"
        raise psycopg.OperationalError(f"{what} not resolved within {limit:.3g} s") from None
    if isinstance(answer, UnicodeError):
        raise psycopg.OperationalError(f"the host's name can't be resolved: {answer}")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _try_in_turn(words: Mapping[str, str], deadline: float) -> _Connection:
    """Try each host and address as the engine does: each has a fair part of what is left, and a refused login ends it all.

    Raises:
        psycopg.Error: with what became of each.
    """
    attempts = _find_addresses(words, deadline)
    limit = float(words.get("connect_timeout", 0))
    failures: list[str] = []
    for number, attempt in enumerate(attempts):
        left = deadline - time.monotonic()
        if left <= 0 and failures:
            break
        share = min(limit, left) if limit > 0 else left / (len(attempts) - number)
        parameters: dict[str, Any] = attempt | {"connect_timeout": int(min(max(_SHORTEST, share), _LONGEST))}
        try:
            connection = _Connection.connect(
                "",
                autocommit=True,
                # In transaction mode a pooler keeps no named statements.
                prepare_threshold=None,
                cursor_factory=psycopg.RawCursor,
                **parameters,
            )
        except psycopg.Error as error:
            text = " ".join(str(error).split())
            failures.append(text if len(attempts) == 1 else f"{_label(attempt)}: {text}")
            if _NEVER.search(text):
                break
            continue
        connection.place = f"{_label(attempt)}/{connection.info.dbname}"
        return connection
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


__all__ = ["CONNECT_TIMEOUT", "STATEMENT_TIMEOUT", "Borrowed", "Database", "Row", "UserConnection", "was_too_late"]
