"""How long a queue keeps its ended tasks, where it is not as long as the others do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal, TypeAlias, get_args

from fastq.errors import SettingsError
from fastq.task import to_seconds

Ended: TypeAlias = Literal["completed", "failed", "cancelled", "expired"]
"""How a task may have ended."""

Archived: TypeAlias = bool | Sequence[Ended] | AbstractSet[Ended]
"""Whether what is over is archived: all of it, or what ended so."""

#: All of them, in the order in which the engine is told.
ENDED: Final[tuple[Ended, ...]] = get_args(Ended)


def read_archive(name: str, value: object) -> tuple[bool, bool, bool, bool]:
    """Whether each of `ENDED` is archived, from True, False or a collection of their names. Raises SettingsError."""
    if isinstance(value, bool):
        return value, value, value, value
    names = ", ".join(map(repr, ENDED))
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise SettingsError(f"{name} is {value!r}, but must be True, False, or a collection of {names}")
    for one in value:
        if one not in ENDED:
            raise SettingsError(f"{name} names {one!r}, but there are only {names}")
    completed, failed, cancelled, expired = (one in value for one in ENDED)
    return completed, failed, cancelled, expired


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a queue's ended tasks are kept; 0 is at once, as soon as the leader comes by (a second or two).

    Args:
        completed: seconds, or a timedelta; None: as the consumer's ``completed_retention`` has it. Tasks lie in tables that are emptied
            whole once all in them is due, so a queue that keeps them for less time than another costs the deletion of single rows.
        failed: likewise, for those that failed for good.
        cancelled: likewise.
        expired: likewise, for those that were not begun in time.
        archive: whether they go into the table ``archive`` then: True, False, or for which of ``"completed"``, ``"failed"``,
            ``"cancelled"`` and ``"expired"`` it is so; None: as the consumer's ``archive`` has it.

    Raises:
        SettingsError: a time is negative, or none at all; ``archive`` names something else.
    """

    completed: float | timedelta | None = None
    failed: float | timedelta | None = None
    cancelled: float | timedelta | None = None
    expired: float | timedelta | None = None
    archive: Archived | None = None

    def __post_init__(self) -> None:
        for name in ENDED:
            value = getattr(self, name)
            if value is not None:
                try:
                    object.__setattr__(self, name, to_seconds(name, value))
                except TypeError as error:
                    raise SettingsError(str(error)) from None
        if self.archive is not None:
            read_archive("archive", self.archive)
            if not isinstance(self.archive, bool):
                object.__setattr__(self, "archive", frozenset(self.archive))


__all__ = ["ENDED", "Archived", "Ended", "Retention", "read_archive"]
