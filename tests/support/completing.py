"""Handlers that complete their tasks in transactions of their own, led by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastq import Consumer
from tests.support.consuming import new_consumer
from tests.support.lab import QUICK, Lab
from tests.support.puppets import Puppet
from tests.support.users import User
from tests.support.waiting import wait_until

Play = Callable[..., Puppet]
"""Starts a consumer whose handler does what the test says: ``options`` are the handler's, the rest the consumer's."""


@contextmanager
def playing(lab: Lab) -> Iterator[Play]:
    """Ends with all that it started."""
    with ExitStack() as stack:

        def played(*, dsn: str = lab.dsn, options: dict[str, Any] | None = None, **settings: Any) -> Puppet:
            consumer = new_consumer(dsn, lab.schema, **(QUICK | {"dead_after": 30} | settings))
            puppet = Puppet(consumer, **(options or {}))
            consumer.start()
            stack.callback(puppet.stop, 3)
            return puppet

        yield played


def effects(lab: Lab) -> int:
    """What handlers wrote into the table of their own."""
    return int(lab.value("SELECT count(*) FROM effect"))


def counted(consumer: Consumer, **wanted: int) -> bool:
    """Whether the counters of ends are these, and the others zero."""
    stats = consumer.stats()
    names = ("completed", "retried", "failed", "snoozed", "refused")
    return {name: stats[name] for name in names if stats[name]} == wanted


def wait_counted(consumer: Consumer, **wanted: int) -> None:
    """Waits until they are."""
    wait_until(lambda: counted(consumer, **wanted), message=f"{wanted} counted, not {consumer.stats()}")


def wait_until_idle(consumer: Consumer) -> None:
    """Waits until no handler runs."""
    wait_until(lambda: consumer._started().engine.running == 0)


def complete_one(lab: Lab, puppet: Puppet, user: User) -> None:
    """From here on the statements are prepared, on the worker's connection too."""
    lab.enqueue("first")
    run = puppet.next()
    user.complete(run.task)
    user.commit()
    run.end()
    wait_counted(puppet.consumer, completed=1)
