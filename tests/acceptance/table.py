"""The state machine of a task, as data: what each action does to a task in each place, and what its caller is told."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

Place: TypeAlias = Literal[
    "ready", "scheduled", "retrying", "running", "completed", "failed", "expired", "cancelled", "gone"
]
_ClientAction: TypeAlias = Literal["cancel", "retry", "delete", "edit payload", "edit time"]
#: A worker's. "complete in a transaction": by its handler (`complete_tx`), under a claim that is made for this task alone.
_Result: TypeAlias = Literal[
    "complete",
    "complete in a transaction",
    "fail, to be retried",
    "fail for good",
    "snooze",
    "expire",
    "give back",
]
#: What waits for nobody: what is locked is left for its next time.
_Skipper: TypeAlias = Literal["claim", "rescue"]
Action: TypeAlias = _ClientAction | _Result | _Skipper
#: What its caller is told of an action that changed nothing.
Told: TypeAlias = Literal["refused", "missing", "passed"]

CLIENT_ACTIONS: Final[tuple[Action, ...]] = get_args(_ClientAction)
RESULTS: Final[tuple[Action, ...]] = get_args(_Result)
SKIPPERS: Final[tuple[Action, ...]] = get_args(_Skipper)
ACTIONS: Final[tuple[Action, ...]] = (*CLIENT_ACTIONS, *RESULTS, *SKIPPERS)

# What belongs to a worker, where nothing is ready and no claim holds the task: its results come from a claim that once did.
_LATE: Final[dict[Action, Place | Told]] = {
    **dict.fromkeys(RESULTS, "refused"),
    "claim": "passed",
    "rescue": "passed",
}
_WAITS: Final[dict[Action, Place | Told]] = {**_LATE, "cancel": "cancelled", "retry": "refused", "delete": "gone"}
_ENDED_BADLY: Final[dict[Action, Place | Told]] = {
    **_LATE,
    "cancel": "cancelled",
    "retry": "retrying",
    "delete": "gone",
    "edit payload": "refused",
    "edit time": "refused",
}

#: By place and action: where the task is then; or what the caller is told, and nothing is changed. As the table of docs/managing.md.
TABLE: Final[dict[Place, dict[Action, Place | Told]]] = {
    "ready": {**_WAITS, "edit payload": "ready", "edit time": "scheduled", "claim": "running"},
    "scheduled": {**_WAITS, "edit payload": "scheduled", "edit time": "scheduled"},
    "retrying": {**_WAITS, "edit payload": "retrying", "edit time": "scheduled"},
    "running": {
        "cancel": "cancelled",
        "retry": "refused",
        "delete": "refused",
        "edit payload": "refused",
        "edit time": "refused",
        "claim": "passed",
        "complete": "completed",
        "complete in a transaction": "completed",
        "fail, to be retried": "retrying",
        "fail for good": "failed",
        "snooze": "scheduled",
        "expire": "expired",
        "give back": "ready",
        "rescue": "ready",
    },
    "completed": {
        **_LATE,
        "cancel": "refused",
        "retry": "refused",
        "delete": "gone",
        "edit payload": "refused",
        "edit time": "refused",
    },
    "failed": _ENDED_BADLY,
    "expired": _ENDED_BADLY,
    "cancelled": _ENDED_BADLY,
    "gone": {**_LATE, **dict.fromkeys(CLIENT_ACTIONS, "missing")},
}
PLACES: Final[tuple[Place, ...]] = tuple(place for place in TABLE if place != "gone")

#: How a client shows a place: state and kind.
SHOWN: Final[dict[Place, tuple[str, str | None]]] = {
    "ready": ("pending", None),
    "scheduled": ("pending", "scheduled"),
    "retrying": ("pending", "retrying"),
    "running": ("running", None),
    "completed": ("completed", None),
    "failed": ("failed", None),
    "expired": ("expired", None),
    "cancelled": ("cancelled", None),
}

#: How a task comes to a place while a handler is at work on it; the handler's run holds it only where nobody did anything.
WAYS: Final[tuple[tuple[Place, tuple[Action, ...]], ...]] = (
    ("running", ()),
    ("ready", ("rescue",)),
    ("scheduled", ("rescue", "edit time")),
    ("retrying", ("rescue", "claim", "fail, to be retried")),
    ("running", ("rescue", "claim")),
    ("completed", ("rescue", "claim", "complete")),
    ("failed", ("rescue", "claim", "fail for good")),
    ("expired", ("rescue", "claim", "expire")),
    ("cancelled", ("cancel",)),
    ("gone", ("cancel", "delete")),
)

TransactionEnd: TypeAlias = Literal["committed", "rolled back", "lost"]
HandlerEnd: TypeAlias = Literal["returns", "raises", "snoozes"]
#: What becomes of a task that its handler completed in a transaction, by the ends of both, whichever comes first. As the table of
#: docs/transactions.md.
ENDS: Final[dict[tuple[TransactionEnd, HandlerEnd], Place]] = {
    ("committed", "returns"): "completed",
    ("committed", "raises"): "completed",
    ("committed", "snoozes"): "completed",
    ("rolled back", "returns"): "retrying",
    ("rolled back", "raises"): "retrying",
    ("rolled back", "snoozes"): "scheduled",
    ("lost", "returns"): "retrying",
    ("lost", "raises"): "retrying",
    ("lost", "snoozes"): "scheduled",
}


def changes(place: Place, action: Action) -> bool:
    """Whether it does something to a task in this place, and so takes its row's lock."""
    return TABLE[place][action] in TABLE and (place, action) != ("cancelled", "cancel")


def after(place: Place, action: Action) -> Place:
    """Where the task is after it."""
    found = TABLE[place][action]
    return found if found in TABLE else place


def told(place: Place, action: Action) -> str:
    """What its caller is told: ``done``, or why not."""
    found = TABLE[place][action]
    return "done" if found in TABLE else found
