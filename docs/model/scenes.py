"""Scenes: how many there are of each, and how often each fault strikes."""

from __future__ import annotations

from typing import Final, NamedTuple


class Scene(NamedTuple):
    """Bounds of one search: how many there are of each, and how often each fault strikes at most."""

    name: str
    tasks: int = 1
    workers: int = 2
    leaders: int = 1
    max_attempts: int = 2
    crashes: int = 0
    losses: int = 0
    """Connections that break with a statement under way."""
    returns: int = 0
    """Claimed tasks that a worker decides not to start."""
    deaths: int = 1
    """Living workers declared dead. Silences that nobody declares are not bounded."""
    begins: int = 0
    """Transactions that handlers begin to complete their tasks in."""


SCENES: Final = (
    Scene("a worker that is declared dead", max_attempts=1),
    Scene("a crash, and a retry", crashes=1, deaths=0),
    Scene("a lost connection, and a task that is not started", losses=1, returns=1, max_attempts=1, deaths=0),
    Scene("a lost connection, and a retry", losses=1, deaths=0),
    Scene("two tasks of one chunk", tasks=2, max_attempts=1, deaths=0),
    Scene("two leaders, and one worker", workers=1, leaders=2, max_attempts=1),
    Scene("a transaction, and a retry", workers=1, deaths=0, begins=2),
    Scene("two transactions that are to complete a task, and a crash", max_attempts=1, crashes=1, deaths=0, begins=2),
    Scene("transactions, and a worker that is declared dead", workers=1, max_attempts=1, begins=2),
    Scene("transactions, and a lost connection", workers=1, losses=1, deaths=0, begins=2),
    Scene("a transaction for one task of two", tasks=2, workers=1, max_attempts=1, deaths=0, begins=1),
)
#: Faults together: minutes.
WIDE: Final = (
    Scene("a lost connection, and a worker that is declared dead", losses=1, max_attempts=1),
    Scene("a crash, a worker that is declared dead, and a retry", crashes=1),
    Scene("two tasks of one chunk, and a lost connection", tasks=2, losses=1, max_attempts=1, deaths=0),
    Scene("transactions, retries, and a worker that is declared dead", workers=1, begins=2),
    Scene("a transaction of a worker that is declared dead, and another worker", max_attempts=1, begins=1),
)
