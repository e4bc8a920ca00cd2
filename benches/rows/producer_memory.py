"""Memory of a producer that streams 5,000,000 tasks from a generator, at most, over the same process before."""

from __future__ import annotations

import json
import sys

from benches.support import MIB, answer, worker
from fastq.bench._session import Session

_TASKS = 5_000_000


def main() -> None:
    with Session() as session, worker("streaming", session, str(_TASKS)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if process.wait(60) != 0:
            sys.exit("the producer failed")
    found = json.loads(line)
    answer(over_idle_mib=(found["peak"] - found["idle"]) / MIB, idle_mib=found["idle"] / MIB)


if __name__ == "__main__":
    main()
