"""A producer process of the chaos run: ``producer_main.py SPEC``, a JSON object that `load.Producers` writes. Enqueues until SIGTERM.

What it was told of its tasks goes into a file of its own, a write a call: what a killed process wrote stays. ``ack``: these are in;
``never``: these were rolled back; ``token``: the id that answers to a token; ``effect``: these are to be completed with a row of their own;
``options``: these have a timeout and a retry policy of their own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final

import psycopg

from fastq import ConstantBackoff, DatabaseError, Enqueued, ExponentialBackoff, Producer, Task

_SPEC: Final[dict[str, Any]] = json.loads(sys.argv[1])
_FILE: Final = os.open(_SPEC["file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_RND: Final = random.Random(_SPEC["seed"])
#: More than the run takes workers away from one task.
_MAX_ATTEMPTS: Final = 100
_BULK: Final = 100
#: Tokens in use: few, so that most enqueues meet one.
_TOKENS: Final = 2_000
#: In a transaction: how often it is rolled back.
_REGRETS: Final = 0.2
#: Of all tasks: how many are completed in a transaction of their handlers'; of these, how often it is rolled back first.
_EFFECTS: Final = 0.1
_HANDLER_REGRETS: Final = 0.2
#: Of all tasks: how many have a timeout and a retry policy of their own, and how many a payload of bytes.
_OPTIONS: Final = 0.2
_BYTES: Final = 0.3
#: Seconds: more than a run takes, whatever strikes.
_TIMEOUT: Final = 300.0
#: None waits less than `audit` has as the least, nor much longer: retries are to be many. Floats, as they come back.
_RETRIES: Final = (ConstantBackoff(1.5), ExponentialBackoff(exponent=1.0, jitter=0.0, maximum=2.0))
_OVER: Final = threading.Event()


def _note(word: str, ids: list[int]) -> None:
    if ids:
        os.write(_FILE, f"{word} {' '.join(map(str, ids))}\n".encode())


def _promise(tasks: Iterable[Task], found: Iterable[Enqueued]) -> None:
    """These are in. What answered a token may have another's payload."""
    pairs = list(zip(tasks, found, strict=True))
    _note("ack", [one.id for _, one in pairs])
    for word in ("effect", "options"):
        _note(word, [one.id for task, one in pairs if one.is_new and word in _orders(task)])


def _orders(task: Task) -> dict[str, Any]:
    orders: dict[str, Any] = json.loads(task.payload) if isinstance(task.payload, bytes) else task.payload
    return orders


def _task(token: str | None = None) -> Task:
    chance = _RND.random()
    payload: dict[str, Any] = {}
    if chance < 0.25:
        # Long enough that some run whenever a worker is killed.
        payload["seconds"] = _RND.uniform(0.02, 0.3)
    elif chance < 0.28:
        payload["fail"] = _RND.choice([1, 1, 2])
    options: dict[str, Any] = {}
    if _SPEC["is_varied"]:
        if _RND.random() < _EFFECTS:
            payload["effect"] = "rollback" if _RND.random() < _HANDLER_REGRETS else "commit"
            if payload["effect"] == "rollback" and _RND.random() < 0.5:
                payload["fail"] = 1
        if _RND.random() < _OPTIONS:
            options = {"timeout": _TIMEOUT, "retry": _RND.choice(_RETRIES)}
            payload["options"] = [_TIMEOUT, repr(options["retry"])]
    delay = _RND.uniform(0, 3) if _RND.random() < 0.05 else None
    data = json.dumps(payload).encode() if _RND.random() < _BYTES else payload
    return Task("t", data, max_attempts=_MAX_ATTEMPTS, delay=delay, idempotency_token=token, **options)


def _single(producer: Producer) -> None:
    task = _task()
    _promise([task], [producer.enqueue(task)])


def _bulk(producer: Producer) -> None:
    every = _RND.choice([None, None, 40])
    tasks = [_task() for _ in range(_RND.randint(2, 4 * _BULK))]
    _promise(tasks, producer.enqueue_many(iter(tasks), commit_every=every))


def _token(producer: Producer) -> None:
    tokens = [f"{_SPEC['seed']} {_RND.randrange(_TOKENS)}" for _ in range(_RND.choice([1, 1, 1, 20]))]
    tasks = [_task(token) for token in tokens]
    found = [producer.enqueue(tasks[0])] if len(tasks) == 1 else list(producer.enqueue_many(tasks))
    _promise(tasks, found)
    for token, one in zip(tokens, found, strict=True):
        os.write(_FILE, f"token {token.replace(' ', '-')} {one.id}\n".encode())


def _transaction(producer: Producer) -> None:
    """The user's own row and the tasks, together or not at all."""
    with psycopg.connect(_SPEC["dsn"], connect_timeout=5) as user:
        if _RND.random() < 0.5:
            tasks = [_task()]
            found = [producer.enqueue_tx(user, tasks[0])]
        else:
            tasks = [_task() for _ in range(_RND.randint(2, _BULK))]
            found = list(producer.enqueue_many_tx(user, tasks))
        ids = [one.id for one in found]
        user.execute("INSERT INTO chaos.ledger SELECT unnest(%s::bigint[])", [ids])
        if _RND.random() < _REGRETS:
            user.rollback()
            _note("never", ids)
        else:
            user.commit()
            _promise(tasks, found)


_KINDS: Final[dict[str, tuple[Callable[[Producer], None], float]]] = {
    "single": (_single, 0.01),
    "bulk": (_bulk, 0.4),
    "token": (_token, 0.02),
    "transaction": (_transaction, 0.2),
}
"""What a call is, and seconds between two."""


def _stop(_number: int, _frame: object) -> None:
    _OVER.set()


def main() -> None:
    """Enqueues until SIGTERM; a call that fails is no promise, and the next one is made."""
    signal.signal(signal.SIGTERM, _stop)
    call, pause = _KINDS[_SPEC["kind"]]
    with Producer(_SPEC["dsn"], schema=_SPEC["schema"]) as producer:
        while not _OVER.is_set():
            with suppress(DatabaseError, psycopg.Error):
                call(producer)
            time.sleep(pause)


if __name__ == "__main__":
    main()
