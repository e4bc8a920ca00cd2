"""The client's arguments, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final, TypedDict

from fastq import _engine
from fastq._actions import ALLOWED, Action, Change
from fastq._records import LAST_ID, Kind, Places, State, places_of
from fastq.errors import PayloadError, SettingsError
from fastq.settings import PAYLOAD_LIMIT
from fastq.task import check_aware, check_priority, to_seconds


class _As(Enum):
    """A default that no payload is."""

    IT_IS = "as it is"


AS_IT_IS: Final = _As.IT_IS


@dataclass(frozen=True, slots=True)
class Within:
    """Which tasks are meant, whatever they are."""

    first_id: int
    last_id: int
    since: datetime | None
    before: datetime | None
    text: bytes | None

    @property
    def looks(self) -> bool:
        """Whether a task's content decides."""
        return self.since is not None or self.before is not None or self.text is not None


class Filters(TypedDict, total=False):
    """Which tasks a call for many means: those that match all that is given. At least one must be."""

    states: Sequence[State | Kind] | None
    """Any of the six states, ``"scheduled"`` and ``"retrying"``; None: in any."""
    types: Sequence[str] | None
    """Exact types; None: of any."""
    queues: Sequence[str] | None
    """Exact names; None: of any."""
    priorities: Sequence[int] | None
    """0 to 9; None: of any."""
    ids: Iterable[int] | None
    """These tasks alone; None: all. Not together with what follows."""
    first_id: int | None
    """No lower ids."""
    last_id: int | None
    """No higher ids."""
    created_since: datetime | None
    """Enqueued then (aware) or later. This and what follows is found by looking at one task after the other."""
    created_before: datetime | None
    """Enqueued before then (aware)."""
    payload_contains: str | bytes | None
    """This text, or these bytes, are in the payload as it is stored."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tasks are meant."""

    places: Places
    types: list[str] | None
    """None: of any."""
    queues: list[str] | None
    priorities: list[int] | None
    ids: list[int] | None
    """In order, each once."""
    within: Within | None
    """None: whatever their ids and contents."""


#: The filters by ids and contents.
_WITHIN: Final = ("first_id", "last_id", "created_since", "created_before", "payload_contains")


def read_filter(action: Action | None, given: Filters) -> Filter:
    """The tasks that match, and that allow the action, if there is one.

    Raises:
        SettingsError: no filter is given, or one is wrong; there is no such action.
    """
    if unknown := given.keys() - Filters.__annotations__.keys():
        raise SettingsError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(Filters.__annotations__)}")
    if action is not None and action not in ALLOWED:
        raise SettingsError(f"action is {action!r}, but must be None or one of {', '.join(ALLOWED)}")
    if all(value is None for value in given.values()):
        raise SettingsError(
            f"{', '.join(Filters.__annotations__)} are all None, but all tasks are never meant by saying nothing: "
            "give a filter, if need be states=fastq.client.STATES"
        )
    places, ids = places_of(given.get("states")), given.get("ids")
    contents = [given.get(name) for name in _WITHIN]
    within = None if all(value is None for value in contents) else read_within(*contents)
    if ids is not None and within is not None:
        raise SettingsError(f"ids can't be given together with {', '.join(_WITHIN)}")
    return Filter(
        places & ALLOWED[action] if action is not None else places,
        read_texts("types", given.get("types")),
        read_texts("queues", given.get("queues")),
        read_priorities(given.get("priorities")),
        None if ids is None else _read_ids(ids),
        within,
    )


def read_texts(name: str, values: Sequence[object] | None) -> list[str] | None:
    """The texts as a list. Raises SettingsError."""
    if values is None:
        return None
    if isinstance(values, str) or not all(isinstance(value, str) and "\0" not in value for value in values):
        raise SettingsError(f"{name} is {values!r}, but must be a sequence of texts without NUL")
    return [str(value) for value in values]


def read_priorities(values: object) -> list[int] | None:
    """The priorities as a list. Raises SettingsError."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise SettingsError(f"priorities is {values!r}, but must be a sequence of priorities")
    for value in values:
        check_priority(value)
    return list(values)


def check_id(id_: object) -> None:
    """That it is a whole number. Raises SettingsError."""
    if id_.__class__ is not int:
        raise SettingsError(f"id is {id_!r}, but must be a whole number")


def read_within(first_id: Any, last_id: Any, since: Any, before: Any, text: Any) -> Within:
    """Ids from and to, created since and before, and what a payload contains. Raises SettingsError, TypeError."""
    for name, id_ in (("first_id", first_id), ("last_id", last_id)):
        if id_ is not None and id_.__class__ is not int:
            raise SettingsError(f"{name} is {id_!r}, but must be a whole number")
    for name, at in (("created_since", since), ("created_before", before)):
        if at is not None:
            check_aware(name, at)
    if text is not None and (not isinstance(text, str | bytes) or not text):
        raise SettingsError(f"payload_contains is {text!r}, but must be a text or bytes, and not empty")
    try:
        wanted = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise SettingsError(f"payload_contains is {text!r}, which is no text: {error}") from None
    return Within(
        max(0, 0 if first_id is None else min(first_id, LAST_ID)),
        LAST_ID - 1 if last_id is None else min(max(last_id, 0), LAST_ID - 1),
        since,
        before,
        wanted,
    )


def _read_ids(values: object) -> list[int]:
    """In order, each once, without those that no task can have."""
    # A text is iterable, too.
    given = list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else None
    if given is None or any(value.__class__ is not int for value in given):
        raise SettingsError(f"ids is {values!r}, but must be whole numbers")
    return sorted({id_ for id_ in given if 0 < id_ < LAST_ID})


def read_change(
    payload: object, delay: float | timedelta | None, run_at: datetime | None, priority: int | None
) -> Change:
    """What an edit changes.

    Raises:
        SettingsError: nothing, or a time, delay or priority that no task can have.
        PayloadError: the payload can't be encoded, or is over the limit.
    """
    if payload is AS_IT_IS and delay is None and run_at is None and priority is None:
        raise SettingsError("neither payload nor delay nor run_at nor priority is given: there is nothing to change")
    if run_at is not None:
        check_aware("run_at", run_at)
    if priority is not None:
        check_priority(priority)
    seconds = None if delay is None else to_seconds("delay", delay)
    if payload is AS_IT_IS:
        return Change(delay=seconds, run_at=run_at, priority=priority)
    format_, encoded = ("b", payload) if isinstance(payload, bytes) else ("j", _engine.encode_json(payload))
    if len(encoded) > PAYLOAD_LIMIT:
        raise PayloadError(f"the payload has {len(encoded):,} bytes, but may have {PAYLOAD_LIMIT:,}")
    return Change(format_, encoded, seconds, run_at, priority)


__all__ = [
    "AS_IT_IS",
    "Filter",
    "Filters",
    "Within",
    "check_id",
    "read_change",
    "read_filter",
    "read_priorities",
    "read_texts",
]
