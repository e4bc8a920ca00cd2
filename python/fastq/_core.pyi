"""The compiled half of fastq. `_engine.py` is its only importer; the public names are re-exported from there."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Self, TypeAlias, TypeVar, final

from fastq._backoff import Backoff
from fastq.settings import ConsumerSettings, ProducerSettings
from fastq.task import Task

_M = TypeVar("_M")
_Class: TypeAlias = type[_M]

__all__ = [
    "Engine",
    "EnqueuedIds",
    "ProducerCore",
    "TaskInfo",
    "TxCompletion",
    "TxTasks",
    "cancel_made",
    "complete_dsn",
    "encode_json",
    "grants",
    "make_task",
    "migrations",
    "parse_dsn",
    "queries",
    "render",
    "rights_of",
    "running_task",
    "version",
]

version: str

def queries() -> dict[str, str]:
    """The statements of sql/queries by name, as written: their objects carry the prefix ``fastq.``."""

def migrations() -> list[tuple[int, str, str, str, str]]:
    """Schema steps in order: version, name, up, down, indexes."""

def grants() -> list[tuple[str, str]]:
    """The text of sql/grants by kind of role: objects carry the prefix ``fastq.``, the role is ``fastq_<kind>``."""

def rights_of(role: str) -> list[tuple[str, str, str, str]]:
    """The rights that a kind of role is granted: on what (schema, table, sequence), its name, which, of which column (empty: all)."""

def running_task() -> TaskInfo | None:
    """The task whose sync handler runs on the calling thread."""

def make_task(
    number: int,
    name: str,
    queue: str,
    payload: bytes,
    is_json: bool,
    attempt: int,
    max_attempts: int,
    created_at: int,
) -> TaskInfo:
    """A task with no engine behind it, of this id and type. ``created_at``: microseconds since 2000-01-01 UTC."""

def cancel_made(task: TaskInfo) -> None:
    """From here on ``is_cancelled()`` of a task of ``make_task``. Raises TypeError: it is an engine's."""

def render(text: str, schema: str) -> str:
    """``text`` with ``fastq.`` replaced by the quoted ``schema``. Raises SettingsError for a name PostgreSQL would refuse or cut."""

def parse_dsn(dsn: str) -> tuple[dict[str, str], bool]:
    """A connection string's words, and whether messages may quote them (a password may have been taken for something else).

    Raises SettingsError: not a connection string, or one with an unknown word.
    """

def complete_dsn(words: dict[str, str]) -> dict[str, str]:
    """``words`` with what the service file and the environment add, as libpq adds it.

    Raises SettingsError: a word whose value is wrong or can't be followed, or a file that is missing or can't be used.
    """

def encode_json(value: object) -> bytes:
    """``value`` as compact JSON in UTF-8. Raises PayloadError: what can't be encoded and where (NaN and infinities are refused)."""

@final
class TaskInfo:
    """A claimed task, as its handler sees it."""

    @property
    def id(self) -> int:
        """The task's id."""
    @property
    def type(self) -> str:
        """The type that ties it to its handler."""
    @property
    def queue(self) -> str:
        """The queue it was enqueued to."""
    @property
    def payload(self) -> Any:
        """What was enqueued: decoded from JSON at the first look, or the raw ``bytes``."""
    def payload_as(self, model: _Class[_M]) -> _M:
        """The payload as an instance of ``model``, a dataclass, pydantic or msgspec class; decoded anew each time.

        Raises SkipRetry: it does not fit, which the handler had better not catch: the task fails at once, with the reason as its error.
        SettingsError: the class is no such model.
        """
    @property
    def raw_payload(self) -> bytes:
        """The payload's bytes, encoded as they were enqueued."""
    @property
    def attempt(self) -> int:
        """Which run this is, from 1."""
    @property
    def max_attempts(self) -> int:
        """Runs in all before it fails for good."""
    @property
    def timeout(self) -> float | None:
        """Seconds that an attempt may take, if the task has a timeout of its own; None: as its type has it."""
    @property
    def retry(self) -> Backoff | None:
        """The retry policy that the task has of its own; None: as its type has it."""
    @property
    def created_at(self) -> datetime:
        """When it was enqueued, by the database's clock (aware, UTC)."""
    def is_cancelled(self) -> bool:
        """Whether its result counts no longer: it was cancelled, its time is up, or the worker lost its claim to others.

        Costs no look at the database: the worker is told, or looks by itself, within two seconds. For any thread.
        """
    def raise_if_cancelled(self) -> None:
        """Do nothing, or, where ``is_cancelled()``, raise TaskCancelled: let it pass, and the run ends, which is no failure."""
    def complete_tx(self, conn: object) -> None:
        """Complete the task in the transaction that is open on ``conn``: with what the handler wrote in it, or not at all.

        Commit, and the task is completed, whatever the handler does from there on. Roll back, or lose the connection, and it is not: the
        attempt fails, also where the handler returns as if nothing were wrong. While the transaction is open nobody decides. For any
        thread, as long as the handler runs; once a transaction.

        ``conn``: a psycopg 3 ``Connection``, a SQLAlchemy 2 ``Connection`` or ``Session`` over psycopg 3, or a Django connection, to the
        consumer's database, of a role with a worker's or a handler's rights.

        Raises TaskLost: the run has lost its task (it was cancelled, or others have it); let it pass, so that you roll back.
        CompletionError: no transaction is open (autocommit), another database, called twice, the handler has ended, its type keeps results
        (``result_ttl``), or, under REPEATABLE READ and SERIALIZABLE, it is not the transaction's first statement; also on an event loop,
        where ``acomplete_tx`` is to be awaited, and for tasks of ``fastq.testing``. TypeError: no such connection.
        ConsumerError, ConnectionLost, DatabaseError: the consumer has stopped, or does not reach the database. What the driver raises.
        """
    async def acomplete_tx(self, conn: object) -> None:
        """As ``complete_tx``, on a psycopg 3 ``AsyncConnection``, an asyncpg connection, or SQLAlchemy's async ones over one of them."""
    @property
    def handler(self) -> int:
        """Index of its handler in ConsumerSettings.types."""

@final
class Engine:
    """A consumer's claimer, completer, heartbeat and upkeep on one native thread that never waits for Python."""

    def __new__(
        cls,
        settings: ConsumerSettings,
        handlers: list[Callable[[TaskInfo], object] | None],
        on_error: Callable[[TaskInfo, BaseException], tuple[bool, float | None, str, str]],
    ) -> Self:
        """Make one that is not started.

        ``handlers``: one for each of settings.types, None where it is async. ``on_error`` says whether the
        attempt is a snooze, gives the delay in seconds (None: failed for good), the error's text and its traceback.
        """
    def start(self) -> None:
        """Connect, check the schema, register, and start. Raises DatabaseError, SchemaError or SettingsError."""
    def work(self) -> None:
        """A handler thread's life: runs sync handlers until the engine stops or the thread is no longer needed."""
    def watch(self, seconds: float) -> tuple[list[tuple[int, str, str]], int, bool]:
        """Wait, detached, for something to do, at most ``seconds``.

        Log records (level, logger, message), handler threads to start, and whether the engine has ended.
        """
    def attach_loop(self, fd: int) -> None:
        """Async tasks wake the event loop by a byte written to socket ``fd`` (the caller keeps it open until the engine ended)."""
    def receive(self, limit: int) -> list[tuple[int, int, TaskInfo]]:
        """On the loop: messages in order, each with the number of its run.

        0: start this task, by ``begin``. 1: cancel it, its attempt has ended (timed out). 2: cancel it, since the task was
        cancelled; its end is told as any other's.
        """
    def begin(self, task: TaskInfo) -> int | None:
        """An async task's handler is called now: the index of its type. None: it must not be, and whose it is has been seen to."""
    def complete(self, task: TaskInfo, value: object) -> None:
        """An async task's handler returned ``value``: where its type keeps results, what can't be encoded goes to ``on_error``."""
    def fail(self, task: TaskInfo, verdict: tuple[bool, float | None, str, str]) -> None:
        """An async task's handler raised; the verdict is what ``on_error`` gives."""
    def dismiss(self, task: TaskInfo, error: BaseException) -> bool:
        """Whether what an async handler raised is no failure, since its run counts no longer. Then it has been seen to."""
    def stop(self) -> None:
        """Claim no more and give back what has not started. Returns at once; running handlers go on."""
    def abandon(self, seconds: float = 1.0) -> None:
        """Give the rest up, and end within ``seconds``. What still runs is left to the rescuer of another worker."""
    def join(self, seconds: float) -> bool:
        """Wait until all outcomes are flushed and the thread has ended. False: not within ``seconds``."""
    def stats(self) -> Mapping[str, float]:
        """Counters since the start.

        Of tasks: claimed, started, completed, retried, failed, snoozed, expired, given_back, refused, timed_out, cancelled. Of work:
        claims, flushes, statements, beats, reconnects.
        """
    @property
    def failure(self) -> str | None:
        """What ended the engine's thread, if it was no stop."""
    @property
    def stuck(self) -> int:
        """Sync handlers that go on although their time is up."""
    @property
    def running(self) -> int:
        """Handlers that run now."""

@final
class EnqueuedIds:
    """A compact sequence of (id, is_new): at most 16 bytes a task."""

    def __len__(self) -> int: ...
    def get(self, index: int) -> tuple[int, bool]:
        """One result by its non-negative index in input order. Raises IndexError."""

@final
class ProducerCore:
    """A producer's connections on one native thread of their own."""

    def __new__(cls, settings: ProducerSettings) -> Self: ...
    def enqueue(self, task: Task) -> tuple[int, bool]:
        """Durable when it returns. Coalesced with concurrent calls into one statement."""
    def enqueue_many(self, tasks: Iterable[Task], commit_every: int | None) -> EnqueuedIds:
        """Stream by COPY; one transaction, or one each ``commit_every`` tasks."""
    def attach_loop(self, fd: int) -> int:
        """A mailbox for an event loop: a byte on socket ``fd`` says that ``receive`` has answers. Returns its number."""
    def detach_loop(self, mailbox: int) -> None: ...
    def submit(self, mailbox: int, task: Task) -> int:
        """Enqueue without waiting; the answer comes through the mailbox under this number."""
    def receive(self, mailbox: int) -> list[tuple[int, tuple[int, bool] | None, BaseException | None]]:
        """Answers: number, result or error."""
    def wake(self, lanes: list[int], witness: int | None) -> None:
        """Wake consumers: a transaction of somebody's brought tasks to these lanes.

        ``witness``: None where it was committed; where it is about to be, the id of a task to look for first.
        """
    def watch(self, seconds: float) -> tuple[list[tuple[int, str, str]], int, bool]:
        """As Engine.watch: log records; the other two are 0 and whether it has ended."""
    def stats(self) -> Mapping[str, float]:
        """Counters: enqueued, flights, statements, commits, notifies, reconnects."""
    def close(self) -> None:
        """Finish what is under way, then end the thread. Idempotent."""

@final
class TxCompletion:
    """A task on its way to be completed in its handler's own transaction."""

    def __new__(cls, task: TaskInfo) -> Self: ...
    @property
    def schema(self) -> str:
        """The schema that its consumer works in."""
    @property
    def keeps_result(self) -> bool:
        """Whether what its handler returns is kept."""
    def part(self) -> str:
        """Have the task held by a claim of its own; waits for the consumer's own connection. For any thread.

        held: it is. lost: the run has lost it. open, done: an earlier transaction is to complete it, or has. ended: its handler has.
        forked, stopped: its consumer can't be asked. made: it is one of `make_task`. Raises ConnectionLost, DatabaseError.
        """
    @property
    def home(self) -> tuple[int, int] | None:
        """What find_home.sql answers on the consumer's own connection."""
    def write(self) -> tuple[int, str] | None:
        """Before complete_tx.sql: its claim's number, and the parameter; from then on the transaction decides. None: the run is over."""
    def wrote(self) -> None:
        """It found the claim."""
    @property
    def is_sent(self) -> bool:
        """Whether a transaction decides about the task."""

@final
class TxTasks:
    """Tasks on their way into a transaction on the user's own connection; parameters are arrays as text, see enqueue_tx.sql."""

    def __new__(cls, core: ProducerCore, tasks: Iterable[Task]) -> Self:
        """Read, check and encode all of them. Raises EnqueueError with the task's ``index``."""
    @staticmethod
    def one(core: ProducerCore, task: Task) -> TxTasks:
        """Read, check and encode one."""
    def __len__(self) -> int: ...
    @property
    def is_small(self) -> bool:
        """Few enough for one statement."""
    @property
    def has_open_tokens(self) -> bool:
        """A token is neither taken nor known to be another's."""
    @property
    def leaf(self) -> int:
        """The leaf that it writes to."""
    def number(self) -> None:
        """Give ids and lanes, by the producer's own connection; waits for it. For any thread."""
    def home(self) -> str:
        """What find_home.sql answers on the producer's own connection. For any thread."""
    def forget_ids(self) -> None:
        """The reserved ids turned out to be taken."""
    def find(self) -> list[tuple[int, list[str]]]:
        """find_tokens_tx.sql for the open tokens: numbers for ``found``, and parameters."""
    def found(self, number: int, places: list[int], ids: list[int], may_go: list[int]) -> None:
        """Its answer. Raises EnqueueError where a token's id is one that is still to be written."""
    def write_small(self, is_first: bool) -> list[str]:
        """enqueue_tx.sql for all; after the first time for those whose token was freed meanwhile."""
    def take(self) -> list[tuple[str, list[str]]]:
        """enqueue_tx.sql or take_tokens.sql for the open tokens alone."""
    def take_over(self) -> list[tuple[int, list[str], list[str]]]:
        """hold_tokens.sql and take_over_tokens.sql for those that were found and may be free: numbers for ``took_over``, and parameters."""
    def took_over(self, number: int, places: list[int], ids: list[int]) -> None:
        """The answer of the second: these have these tokens; 0: the task that wants it."""
    def check(self) -> None:
        """Raise DuplicateTask where a task met its token that must not."""
    def swaps(self) -> list[tuple[str, list[str]]]:
        """replace_delayed.sql and replace_ready.sql for what duplicates bring to the tasks that have their tokens."""
    def took(self, ids: list[int]) -> None:
        """Its answer: these have their tokens."""
    def write_large(self) -> tuple[list[bytes], list[list[str]]]:
        """The blocks of copy_tasks.sql (none: no COPY), and enqueue_tx.sql for what follows it."""
    def notification(self) -> list[list[str]]:
        """notify_tx.sql for the lanes that got tasks."""
    def news(self) -> tuple[list[int], int | None]:
        """What ``ProducerCore.wake`` is told."""
    def answer(self) -> EnqueuedIds:
        """Ids in input order."""
