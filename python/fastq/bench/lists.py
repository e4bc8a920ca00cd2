"""``lists``: how long counting takes, and a page of a list, where there are millions of tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from fastq._engine import TaskInfo
from fastq._records import Page
from fastq.bench._errors import BenchError
from fastq.bench._result import Measured, Result, percentile
from fastq.bench._session import TYPE, Session
from fastq.bench._tasks import PAYLOAD_BYTES, TaskMaker
from fastq.bench._waiting import Progress, no_progress, wait_for
from fastq.client import LIMIT, Client
from fastq.control import SkipRetry
from fastq.errors import SettingsError
from fastq.task import Enqueued, Task

#: Tasks that are enqueued together.
_RUN: Final = 500
#: Tasks of a page.
_PAGE: Final = 50
#: Of a hundred runs one is of this type, and one in this queue.
_HUNDREDTH: Final = "bench:hundredth"
_QUEUE: Final = "hundredth"
_FAILING: Final = "bench:failing"
#: So many tasks of a type that wait, and as many that are completed.
_RARE: Final = "bench:rare"
_RARE_TASKS: Final = 10
#: In the payload of one task of a hundred, and in none.
_TEXT: Final = '07,"text"'
_NOWHERE: Final = "nowhere"
#: Calls in order of time, which look at every task.
_TIME_CALLS: Final = 3
#: Least runs of the tasks that wait, and of those that completed.
_LEAST: Final = 100 * _RUN


@dataclass(frozen=True, slots=True)
class Lists:
    """``pending`` tasks, ``completed`` and ``failed`` ones, enqueued in runs of 500; then counts and pages.

    Pages of 50, the first and the ``page``-th, all by one `Client`, one call after the other. Of a filter that matches fewer tasks, its
    last page stands for the ``page``-th; a rare one is followed from page to page to the end, and again until there are so many calls.
    """

    pending: int = 1_000_000
    completed: int = 1_000_000
    failed: int = 10_000
    one_by_one: bool = False
    """They lie in the tables as if each had been enqueued and completed alone."""
    page: int = 1_000
    calls: int = 20
    payload_bytes: int = PAYLOAD_BYTES

    def run(self, dsn: str | None = None, progress: Progress = no_progress) -> Result:
        """Measure. Raises BenchError, and what `Session`, `Producer`, `Consumer` and `Client` raise."""
        if min(self.pending, self.completed) < _LEAST:
            raise SettingsError(f"pending and completed must be at least {_LEAST:,}: a hundred runs")
        with Session(dsn) as session, Client(session.dsn, schema=session.name) as client:
            ids = self._load(session, progress)
            expected = dict.fromkeys(("running", "cancelled", "expired"), 0) | {
                "pending": self.pending,
                "completed": self.completed,
                "failed": self.failed,
            }
            if (found := client.counts()) != expected:
                raise BenchError(f"there are {found} instead of {expected}")
            measured: list[Measured] = []
            with progress("measuring", None, lambda: len(measured)):
                measured += [
                    self._time("counts", client.counts),
                    self._time("counts by type", lambda: client.counts("type")),
                ]
                for descending in (True, False):
                    order: dict[str, Any] = {"descending": descending, "limit": _PAGE}
                    way = "falling" if descending else "rising"
                    for name, wanted in self._filters(client, ids, descending=descending).items():
                        measured += self._pages(client, f"{name}, {way}", order | wanted)
                    for name, wanted in _rare(client, ids).items():
                        measured.append(self._follow(client, f"rare: {name}, {way}", order | wanted))
                by_time = self._time(
                    "by created_at", lambda: client.list_tasks(order_by="created_at"), calls=_TIME_CALLS
                )
            kinds: dict[str, list[Measured]] = {"page": [], "rare": [], "counts": measured[:1]}
            for one in measured[2:]:
                kinds["rare" if one.what.startswith("rare") else "page"].append(one)
            figures: dict[str, float | None] = {"tasks": self.pending + self.completed + self.failed}
            for kind, those in kinds.items():
                figures[f"{kind}_p50_ms"] = max(one.p50_ms for one in those)
                figures[f"{kind}_p99_ms"] = max(one.p99_ms for one in those)
            figures["by_time_p50_ms"] = by_time.p50_ms
            settings = {
                "pending": self.pending,
                "completed": self.completed,
                "failed": self.failed,
                "one_by_one": self.one_by_one,
                "page": self.page,
                "calls": self.calls,
                "payload_bytes": self.payload_bytes,
            }
            return Result("lists", figures, settings, session.server, measured=(*measured, by_time))

    # --- loading -----------------------------------------------------------------------------------

    def _load(self, session: Session, progress: Progress) -> Sequence[Enqueued]:
        """Returns what waits, in the order in which it was enqueued."""
        maker = TaskMaker(self.payload_bytes)
        producer = session.producer()
        with progress("loading", self.completed + self.failed + self.pending, lambda: producer.stats()["enqueued"]):
            ended = self.completed + self.failed
            producer.enqueue_many(_runs(maker, self.completed, self.failed), commit_every=_RUN)
        consumer = session.consumer(_nothing)
        for type_ in (_HUNDREDTH, _RARE):
            consumer.add_handler(type_, _nothing)
        consumer.add_handler(_FAILING, _fail)
        with progress("running", ended, lambda: consumer.stats()["completed"] + consumer.stats()["failed"]), _quietly():
            consumer.start()
            wait_for("lists", lambda: consumer.stats()["completed"] + consumer.stats()["failed"], ended)
            consumer.stop()
        with progress("loading", self.pending, lambda: producer.stats()["enqueued"] - ended):
            waiting = producer.enqueue_many(_runs(maker, self.pending, 0), commit_every=_RUN)
        producer.close()
        if self.one_by_one:
            with progress("splitting", None, lambda: 0), session.db.transaction():
                session.db.query("bench_split_ready")
                session.db.query("bench_split_done")
        return waiting

    @staticmethod
    def _filters(client: Client, ids: Sequence[Enqueued], *, descending: bool) -> dict[str, dict[str, Any]]:
        """Each matches a hundredth of the tasks or more."""
        if descending:
            times = {"created_since": client.get_task(ids[len(ids) * 9 // 10].id).created_at}
        else:
            [first] = client.list_tasks(limit=1, descending=False)
            times = {
                "created_before": first.created_at + (client.get_task(ids[0].id).created_at - first.created_at) / 10
            }
        return {
            "all": {},
            "pending": {"states": ["pending"]},
            "completed": {"states": ["completed"]},
            "pending and failed": {"states": ["pending", "failed"]},
            "a type, 1 %": {"types": [_HUNDREDTH]},
            "a queue, 1 %": {"queues": [_QUEUE]},
            "ids, 10 %": {"first_id": ids[len(ids) // 2].id, "last_id": ids[len(ids) * 7 // 10].id},
            "times, at the near end": times,
            "a payload, 1 %": {"payload_contains": _TEXT},
            "a payload in a state, 1 %": {"payload_contains": _TEXT, "states": ["pending"]},
        }

    # --- measuring ---------------------------------------------------------------------------------

    def _pages(self, client: Client, what: str, wanted: dict[str, Any]) -> Iterator[Measured]:
        def ask(after: str | None) -> Callable[[], Page]:
            return lambda: client.list_tasks(after=after, **wanted)

        first = ask(None)
        # A page that took long enough is answered as it is, and says where to go on.
        page = first()
        if len(page) < _PAGE and page.next is None:
            raise BenchError(f"the first page of {what} has {len(page)} tasks")
        yield self._time(f"{what}, page 1", first)
        number, after = self._skip(client, wanted)
        yield self._time(f"{what}, page {number:,}", ask(after))

    def _skip(self, client: Client, wanted: dict[str, Any]) -> tuple[int, str | None]:
        """The number of the page to measure, and what comes before it."""
        pages, after = 1, None
        while pages < self.page:
            step = min(self.page - pages, LIMIT // _PAGE)
            page = client.list_tasks(after=after, **wanted | {"limit": step * _PAGE})
            got = len(page)
            while got < step * _PAGE and page.next is not None:
                page = client.list_tasks(after=page.next, **wanted | {"limit": step * _PAGE - got})
                got += len(page)
            if page.next is None:
                # Its last page, or the one before where that is not full.
                return self._skip_to(client, wanted, pages + max(0, got // _PAGE - 1), pages, after)
            pages, after = pages + step, page.next
        return pages, after

    @staticmethod
    def _skip_to(
        client: Client, wanted: dict[str, Any], number: int, pages: int, after: str | None
    ) -> tuple[int, str | None]:
        while pages < number:
            page = client.list_tasks(after=after, **wanted)
            pages, after = pages + 1, page.next
        return number, after

    def _follow(self, client: Client, what: str, wanted: dict[str, Any]) -> Measured:
        times: list[float] = []
        while len(times) < self.calls:
            after, found = None, 0
            while True:
                began = time.perf_counter()
                page = client.list_tasks(after=after, **wanted)
                times.append((time.perf_counter() - began) * 1000)
                found += len(page)
                after = page.next
                if after is None:
                    break
            if ("types" in wanted and found != 2 * _RARE_TASKS) or ("payload_contains" in wanted and found):
                raise BenchError(f"{what}: {found} tasks are listed")
        return _measured(what, times)

    def _time(self, what: str, call: Callable[[], object], *, calls: int | None = None) -> Measured:
        times = []
        for _ in range(calls or self.calls):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1000)
        return _measured(what, times)


def _measured(what: str, times: list[float]) -> Measured:
    times.sort()
    return Measured(what, len(times), percentile(times, 0.5), percentile(times, 0.99))


def _rare(client: Client, ids: Sequence[Enqueued]) -> dict[str, dict[str, Any]]:
    """And what is far from both ends, by a time that no index knows."""
    middle = client.get_task(ids[len(ids) // 2].id).created_at
    return {
        "a type, 0.001 %": {"types": [_RARE]},
        "a payload that none has": {"payload_contains": _NOWHERE},
        "a moment in the middle": {"created_since": middle, "created_before": middle + timedelta(milliseconds=1)},
    }


def _runs(maker: TaskMaker, tasks: int, failing: int) -> Iterator[Task]:
    """So many tasks that do nothing in runs, between them so many that fail."""
    made = failed = 0
    for number, at in enumerate(range(0, tasks, _RUN)):
        run = min(_RUN, tasks - at)
        for task in maker.stream(run):
            made += 1
            if number % 100 == 7:
                yield Task(_HUNDREDTH, task.payload)
            elif number % 100 == 57:
                yield Task(TYPE, task.payload, queue=_QUEUE)
            elif number == 50 and made % _RUN < _RARE_TASKS:
                yield Task(_RARE, task.payload)
            else:
                yield task
        while failed < failing * made // tasks // _RUN * _RUN or (made == tasks and failed < failing):
            failed += 1
            yield Task(_FAILING)


def _nothing(_task: TaskInfo) -> None:
    pass


def _fail(_task: TaskInfo) -> None:
    raise SkipRetry("as it should")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a line for each task that fails."""
    log = logging.getLogger("fastq.handler")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


__all__ = ["Lists"]
