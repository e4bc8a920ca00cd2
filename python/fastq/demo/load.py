"""The demo's file: a task a line, as ``fastq enqueue --file`` reads it, and what should become of each line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastq.demo.tasks import fingerprint

#: Of a hundred lines so many are delivered mails, and so many wait for an echo; the others are digested.
_MAILS: Final = 5
_ECHOES: Final = 25
#: Of a hundred mails so many find the service busy once or twice, and so many each time they are tried.
_DELAYED_MAILS: Final = 15
_LOST_MAILS: Final = 1
_ALWAYS: Final = 1_000_000
#: A mail that is delivered at last has an attempt to spare: the killed worker may cost it one.
_MAIL_ATTEMPTS: Final = 4
_TEXT: Final = (
    "a queue is a promise that what was handed in will be done once the hands are free and that nothing falls under the table "
    "even when a worker dies in the middle of its work the letters are sorted the invoices written the pictures made small"
)
_WORDS: Final = _TEXT.split()


class Planned(NamedTuple):
    """What should become of a line."""

    type: str
    completes: bool
    """Else it fails for good."""
    runs: int
    """Runs in all, if no worker is killed during one."""
    result: int
    """What the run that returns has to find."""


def write_file(path: Path, tasks: int, on_progress: Callable[[int], None]) -> None:
    """Write ``tasks`` lines, calling ``on_progress`` with the number of lines now and then."""
    pick = random.Random()  # noqa: S311 - nobody has to guess them
    with path.open("x", encoding="utf-8") as file:
        for line in range(1, tasks + 1):
            file.write(json.dumps(_make(line, pick)) + "\n")
            if line % 5000 == 0 or line == tasks:
                on_progress(line)


def _make(line: int, pick: random.Random) -> dict[str, Any]:
    # Spread evenly, so that also a short file has its share of each kind.
    kind = line * 37 % 100
    if kind < _MAILS:
        to = f"{pick.choice(_WORDS)}.{line}@example.com"
        payload = {"line": line, "to": to, "failures": _failures(line // 20)}
        return {"type": "mail:deliver", "max_attempts": _MAIL_ATTEMPTS, "payload": payload}
    text = " ".join(pick.choices(_WORDS, k=9))
    return {"type": "net:echo" if kind < _MAILS + _ECHOES else "text:digest", "payload": {"line": line, "text": text}}


def _failures(mail: int) -> int:
    kind = mail * 37 % 100
    if kind < _LOST_MAILS:
        return _ALWAYS
    return 1 + mail % 2 if kind < _LOST_MAILS + _DELAYED_MAILS else 0


def read_plan(path: Path) -> list[Planned]:
    """What should become of each line; line n is at index n - 1."""
    plan = []
    with path.open(encoding="utf-8") as file:
        for text in file:
            task = json.loads(text)
            payload = task["payload"]
            failures = payload.get("failures", 0)
            completes = failures == 0 or failures < task["max_attempts"]
            runs = failures + 1 if completes else task["max_attempts"]
            plan.append(Planned(task["type"], completes, runs, fingerprint(payload.get("text") or payload["to"])))
    return plan


__all__ = ["Planned", "read_plan", "write_file"]
