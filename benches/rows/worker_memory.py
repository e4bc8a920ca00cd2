"""Memory of a worker at rest after 1,000,000 tasks, of that after 100,000."""

from __future__ import annotations

from benches.support import MIB, answer, load, memory, read_ready, wait_completed, worker
from fastq import Client
from fastq.bench._session import Session
from fastq.bench._tasks import TaskMaker

_FEW = 100_000
_MANY = 1_000_000


def main() -> None:
    maker = TaskMaker()
    with Session() as session, Client(session.dsn, schema=session.name) as client, worker("noop", session) as process:
        read_ready(process)
        load(session, maker.stream(_FEW))
        wait_completed(client, _FEW, 120)
        few = memory(process.pid)
        load(session, maker.stream(_MANY - _FEW))
        wait_completed(client, _MANY, 300)
        many = memory(process.pid)
    answer(growth=many / few, few_mib=few / MIB, many_mib=many / MIB)


if __name__ == "__main__":
    main()
