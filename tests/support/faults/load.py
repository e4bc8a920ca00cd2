"""Tasks that come all the time while something goes wrong, and what must be true of all of them in the end."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

from fastq import Producer, Task
from tests.support.lab import Lab
from tests.support.waiting import wait_until

#: Seconds between two enqueues of one thread.
_PAUSE: Final = 0.02
#: Tasks of one bulk enqueue.
_BULK: Final = 40
#: More than a test takes workers away from one task: none is to fail for that.
_MAX_ATTEMPTS: Final = 25


class Arrivals:
    """Enqueues tasks of type ``t``, one by one and in bulk, each way in a thread of its own, while its ``with`` lasts.

    Args:
        lab: whose schema they go to.
        payload: makes the payload of the next task; called with a source of random numbers of the thread's own.
        delay: seconds that each task waits at least and at most; None: none does.
        seed: of that source.
    """

    def __init__(
        self,
        lab: Lab,
        payload: Callable[[random.Random], Any],
        *,
        delay: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        self._lab = lab
        self._payload = payload
        self._delay = delay
        self._lock = threading.Lock()
        self._ids: list[int] = []
        self._errors: list[Exception] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {count}"), count)) for count in (1, _BULK)
        ]

    @property
    def ids(self) -> list[int]:
        """The tasks that were acknowledged so far."""
        with self._lock:
            return list(self._ids)

    def wait_for(self, count: int) -> None:
        """Waits until so many more were acknowledged."""
        count += len(self.ids)
        wait_until(lambda: self._errors or len(self.ids) >= count, timeout=60, message="more tasks enqueued")

    def stop(self) -> list[int]:
        """Enqueues no more; gives all that were acknowledged. Fails where an enqueue did."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        if self._errors:
            raise self._errors[0]
        return self.ids

    def _run(self, rnd: random.Random, count: int) -> None:
        try:
            with Producer(self._lab.dsn, schema=self._lab.schema) as producer:
                while not self._over.wait(_PAUSE * count / 2):
                    delays = [rnd.uniform(*self._delay) if self._delay else None for _ in range(count)]
                    tasks = [Task("t", self._payload(rnd), delay=delay, max_attempts=_MAX_ATTEMPTS) for delay in delays]
                    results = [producer.enqueue(tasks[0])] if count == 1 else list(producer.enqueue_many(tasks))
                    with self._lock:
                        self._ids += [result.id for result in results]
        except Exception as error:  # noqa: BLE001 raised by `stop`
            self._errors.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()


def check_charges(lab: Lab) -> Counter[int]:
    """Fails where a run was charged as lost with its worker and no handler wrote down that it had started: in that process, or, where
    it was left in doubt and charged later, in any.

    Gives by id how many runs were lost.
    """
    starts = lab.journal.entries("start")
    started = Counter((entry.pid, entry.id) for entry in starts)
    notes = lab.all(
        "SELECT substring(error FROM 'process (\\d+) on')::int, id, error LIKE 'the worker was lost while the task ran%' "
        "FROM attempt_error WHERE error LIKE 'the worker was lost%'"
    )
    lost = Counter((pid, id_) for pid, id_, is_certain in notes if is_certain)
    wrong = {each: count for each, count in lost.items() if count > started[each]}
    assert not wrong, f"charged for runs that did not start, as (process, task): {wrong}"
    losses = Counter(id_ for _, id_, _ in notes)
    in_all = Counter(entry.id for entry in starts)
    wrong_in_all = {id_: count for id_, count in losses.items() if count > in_all[id_]}
    assert not wrong_in_all, f"charged for more runs than were started: {wrong_in_all}"
    return losses
