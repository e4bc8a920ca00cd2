"""SIGKILL of one of two workers, each with 1,000 tasks claimed, the leader at that: how soon all of them run again.

The other worker has slots for them: what is measured is how soon they are found, not how long they would wait for their turn.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

from benches.support import answer, load, read_ready, wait_completed, wait_until, worker
from fastq import Client
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker

_TASKS = 1_000
_RUNNING = "SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM fastq.consumer c, unnest(c.running) r"


def main() -> None:
    maker = TaskMaker()
    with Session() as session, Client(session.dsn, schema=session.name) as client:
        load(session, maker.stream(_TASKS))
        with worker("holding", session, str(_TASKS)) as first:
            read_ready(first)
            lost = _read_starts(first, _TASKS)
            # The first leads, and has all that it can hold: what comes now is for the second.
            again, killed = _kill(session, client, maker, first, lost)
    answer(again_s=max(again.values()) - killed, first_again_s=min(again.values()) - killed)


def _kill(
    session: Session, client: Client, maker: TaskMaker, first: subprocess.Popen[str], lost: dict[int, float]
) -> tuple[dict[int, float], float]:
    """When each of the lost tasks ran again, and when the first worker was killed."""
    load(session, maker.stream(_TASKS))
    with worker("holding", session, str(2 * _TASKS)) as second:
        read_ready(second)
        kept = _read_starts(second, _TASKS)
        # The heartbeat too has named them: what is rescued is charged and handled with care.
        wait_until("a heartbeat of each", lambda: session.db.run(_RUNNING) == [(2 * _TASKS,)], 10)
        if lost.keys() & kept.keys():
            sys.exit("a task started twice before the kill")
        killed = time.monotonic()
        first.kill()
        again = _read_starts(second, _TASKS)
        if again.keys() != lost.keys():
            sys.exit(f"{len(lost.keys() - again.keys())} tasks of the killed worker did not run again")
        assert second.stdin is not None
        second.stdin.write("\n")
        second.stdin.flush()
        wait_completed(client, 2 * _TASKS, 60)
    return again, killed


def _read_starts(process: subprocess.Popen[str], tasks: int) -> dict[int, float]:
    """When each of the next ``tasks`` tasks started, by its id."""
    assert process.stdout is not None
    lines = (line.split() for line in itertools.islice(process.stdout, tasks))
    return {int(id_): float(at) for id_, at in lines}


if __name__ == "__main__":
    main()
