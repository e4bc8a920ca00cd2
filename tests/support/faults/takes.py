"""Repeats of a fault of a whole server: each take has a server, workers and producers of its own, several at a time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.faults.scene import Scene, pass_time
from tests.support.faults.server import PrivateServer
from tests.support.faults.trials import DEFAULTS, Rows, repeat

#: Servers at a time: each has two or three workers and six threads that enqueue.
_AT_ONCE: Final = 3
#: Two that begin at once would both make the cluster that others are copied from.
_STARTING: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Take:
    """One repeat."""

    folder: Path
    number: int
    """From 0."""

    @contextmanager
    def scene(self, **settings: Any) -> Iterator[Scene]:
        """A scene on a server of its own, with these arguments of `PrivateServer`."""
        with _STARTING:
            server = PrivateServer(**settings)
        with server, Scene(server, self.folder) as scene:
            yield scene

    def wait_for_any_moment(self) -> None:
        """Waits for a part of the time between two heartbeats, another in each take: what is under way then is no one thing."""
        pass_time(random.Random(self.number).uniform(0, DEFAULTS.heartbeat))


class Takes:
    """Runs repeats of a fault.

    Args:
        folder: for their files.
        repeats: how many.
        rows: gets a line for each fault that is repeated.
    """

    def __init__(self, folder: Path, repeats: int, rows: Rows) -> None:
        self._folder = folder
        self._repeats = repeats
        self._rows = rows

    def run(self, what: str, body: Callable[[Take], float | None], *, unit: str = "s", share: int = 4) -> None:
        """Calls ``body`` with a take, again and again. It gives the take's figure, or None where there is none.

        Args:
            what: the fault's name in the table.
            body: fails where it finds something wrong.
            unit: of its figure.
            share: a fault of twenty seconds whose kinds go through the same code shares the repeats among so many of them.

        Raises:
            AssertionError: a take failed; the others that were under way are waited for, no more are begun.
        """
        takes = -(-self._repeats // share)
        results = repeat(what, lambda number: body(Take(self._folder / f"take-{number}", number)), takes, _AT_ONCE)
        figures = [figure for figure in results if figure is not None]
        self._rows.add(what, takes, f"{max(figures):.2f} {unit}" if figures else "")
