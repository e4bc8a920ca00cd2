"""What is closed when the interpreter ends: consumers, then producers, then the servers that they use."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from typing import Final, Protocol


class Closable(Protocol):
    """Ends in order, but soon."""

    def close_at_exit(self) -> None:
        """Called when the interpreter ends, in the process that registered it."""


#: Ranks: the lower one is closed first.
CONSUMER: Final = 0
PRODUCER: Final = 1

_things: tuple[weakref.WeakSet[Closable], weakref.WeakSet[Closable]] = (weakref.WeakSet(), weakref.WeakSet())


def close_at_exit(thing: Closable, rank: int) -> None:
    """Have ``thing`` closed if it is still there when the interpreter ends."""
    _things[rank].add(thing)


def forget(thing: Closable) -> None:
    """It has been closed."""
    for things in _things:
        things.discard(thing)


def close_first() -> None:
    """Close all of them before what has been registered with ``atexit`` until now."""
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    for things in _things:
        for thing in list(things):
            # The interpreter ends whatever becomes of it.
            with contextlib.suppress(Exception):
                thing.close_at_exit()


def _forget_all() -> None:
    # A forked child has none of their threads, and their connections are the parent's.
    for things in _things:
        things.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)

__all__ = ["CONSUMER", "PRODUCER", "Closable", "close_at_exit", "close_first", "forget"]
