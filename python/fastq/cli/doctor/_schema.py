"""What the doctor finds in a fastq schema: its version, rights, consumers, claims, failures, leader and leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fastq import _engine, migrations, rights
from fastq._db import Database, Row
from fastq.cli.doctor._checks import Check, count, process, some, span
from fastq.errors import DatabaseError, SchemaError

#: Seconds of silence after which no default lets a consumer count as alive, and within which its tasks run again.
_ALIVE: Final = 15.0
#: A rescue that has not come by then does not come by itself.
_LATE: Final = 60.0
# What a living consumer runs for longer than both is worth a look: seconds, and times what is usual, by so many flushes.
_LONG: Final = (600.0, 20.0, 1_000)
_FAILURES: Final = (3_600.0, 10_000)
_REFUSED: Final = 3_600.0
_CHUNKS: Final = 1_000
_LEAVES: Final = 16


def examine_schema(db: Database) -> Iterator[Check]:
    """The checks of the schema, as far as the role may look."""
    held = rights.held(db)
    try:
        migrations.check(db)
    except SchemaError as error:
        yield Check("schema", "problem", str(error))
        return
    except DatabaseError as error:
        if error.sqlstate != rights.MISSING:
            raise
        # It can't even be looked at.
        yield from _examine_rights(held)
        return
    if missing := migrations.missing_indexes(db):
        yield Check(
            "schema",
            "warning",
            f"{db.schema!r} lacks indexes that its steps bring: {some(missing)}",
            "`fastq migrate` builds them; where it runs now, it waits for the transactions that were open when it began",
        )
    else:
        yield Check("schema", "ok", f"{db.schema!r}, fit for fastq {_engine.version}")
    yield from _examine_rights(held)
    if held.lacking["viewer"] is not None:
        yield Check(
            "tasks",
            "info",
            f"consumers, claims and failures were not looked at: role {held.role!r} may not",
            "run the doctor as the owner, a worker or a viewer to see them",
        )
        return
    consumers = _look(db, "doctor_consumers")
    [(term, lasts, pid, host, overdue)] = _look(db, "doctor_leader")
    leader = _Leader(term, lasts, process(pid, host), overdue)
    alive = sum(dead is None and silent < _ALIVE for _, _, _, _, silent, dead, *_ in consumers)
    yield from _examine_consumers(consumers, leader)
    yield from _examine_leader(leader, alive)
    yield from _examine_claims(db, leader)
    yield from _examine_refused(consumers)
    yield from _examine_waiting(db)
    yield from _examine_failures(db)
    yield from _examine_leaves(db)


def _look(db: Database, query: str, *params: object) -> list[Row]:
    """Planned by the indexes that are there: a table's statistics may be as old as its last quiet hour."""
    with db.transaction():
        db.query("set_plan", "off")
        return db.query(query, *params)


def _examine_rights(held: rights.Held) -> Iterator[Check]:
    role, lacking = held.role, held.lacking
    if held.is_owner and lacking["worker"] is None:
        yield Check(
            "rights", "ok", f"role {role!r} may migrate, work, enqueue and look: it can do all that the owner can"
        )
    elif lacking["worker"] is None:
        yield Check("rights", "ok", f"role {role!r} may work, enqueue and look, and not migrate: a worker's rights")
    elif (kind := held.meant) is not None:
        yield Check(
            "rights",
            "problem",
            f"role {role!r} has some of a {kind}'s rights, but may not {rights.KINDS[kind]}; missing: {lacking[kind]}",
            f"the owner can grant what `fastq migrate --grants --{kind} {role}` prints",
        )
    elif not held.kinds:
        yield Check(
            "rights",
            "problem",
            f"role {role!r} may not even look; missing: {lacking['viewer']}",
            "the owner can grant what `fastq migrate --grants` prints for a worker, a producer, a handler or a viewer",
        )
    else:
        verbs = " and ".join(rights.KINDS[kind] for kind in held.kinds)
        whose = " and ".join(f"a {kind}'s" for kind in held.kinds)
        yield Check("rights", "ok", f"role {role!r} may {verbs}, and nothing else: {whose} rights")


@dataclass(frozen=True, slots=True)
class _Leader:
    """The lease as it is found."""

    term: int | None
    """None: nobody ever led."""
    lasts: float | None
    """Seconds that the lease goes on; negative: since when it is over."""
    who: str
    overdue: float | None
    """Seconds since which the first delayed task has been due; None: there is none."""

    @property
    def advice(self) -> str:
        """What brings about a rescue that is late."""
        if self.lasts is None or self.lasts <= 0:
            return "start a worker, of any type: it leads, and rescues their tasks within 15 s"
        return f"the leader, {self.who}, rescues within seconds; if it does not, its log says why"


def _examine_leader(leader: _Leader, alive: int) -> Iterator[Check]:
    lasts = leader.lasts
    if lasts is not None and lasts > _LATE:
        yield Check(
            "leader",
            "problem",
            f"the lease of {leader.who} goes on for {span(lasts)}, and without that one nobody does the upkeep: the clock was set back",
            "if it is not alive: DELETE FROM the table leader of this schema, and another one leads at once",
        )
    elif lasts is not None and lasts > 0:
        yield Check("leader", "ok", f"{leader.who} leads (term {leader.term})")
    elif alive and (lasts is None or lasts < -_ALIVE):
        yield Check(
            "leader",
            "problem",
            f"nobody {'leads' if lasts is None else f'has led for {span(-lasts)}'}, but there are {count(alive, 'consumer')}: "
            "no rescue, no delayed task, no retention",
            "read the log of one of them: its ticks fail",
        )
    else:
        yield Check("leader", "info", "nobody leads: delayed tasks, rescue and retention wait for a worker")
    if alive and leader.overdue is not None and leader.overdue > _ALIVE:
        yield Check(
            "delayed",
            "problem",
            f"the first delayed task has been due for {span(leader.overdue)}",
            "the leader makes due tasks ready: its log says why it does not",
        )


def _examine_consumers(consumers: list[Row], leader: _Leader) -> Iterator[Check]:
    alive, silent = [], []
    is_bad = False
    for pid, host, version, stopping, quiet, dead, tasks, *_ in consumers:
        who = f"{process(pid, host)} (fastq {version}{', stopping' if stopping else ''})"
        if dead is None and quiet < -_LATE:
            silent.append(f"{who}, whose last heartbeat lies {span(-quiet)} ahead: the clock was set back")
            is_bad = True
        elif dead is None and quiet < _ALIVE:
            alive.append(who)
        elif dead is None:
            silent.append(f"{who} for {span(quiet)}, holding {count(tasks, 'task')}")
            is_bad |= quiet > _LATE and tasks > 0
    yield Check("consumers", "ok", f"{len(alive)} alive: {some(alive)}" if alive else "none alive")
    if silent:
        yield Check("silent", "problem" if is_bad else "warning", f"not heard of: {some(silent)}", leader.advice)
    dying = [
        f"{process(pid, host)}, dead for {span(dead)}, holding {count(tasks, 'task')}"
        for pid, host, _, _, _, dead, tasks, *_ in consumers
        if dead is not None
    ]
    if dying:
        yield Check(
            "dead", "info", some(dying), "nothing, if they are gone soon: their tasks are being given to others"
        )


def _examine_claims(db: Database, leader: _Leader) -> Iterator[Check]:
    stuck = [
        f"{count(tasks, 'task')} in {count(claims, 'claim')} of {process(pid, host)}, the oldest for {span(oldest)}"
        for pid, host, _, claims, tasks, oldest in _look(db, "doctor_claims", _ALIVE)
    ]
    if stuck:
        yield Check("claims", "problem", f"held by the dead: {some(stuck)}", leader.advice)
    else:
        yield Check("claims", "ok", "each belongs to a consumer that lives, or died just now")
    for pid, host, type_, tasks, oldest, usual in _look(db, "doctor_long", *_LONG):
        than = f"; usually it takes {span(usual)}" if usual is not None and usual >= 1 else ""
        yield Check(
            "long",
            "info",
            f"{process(pid, host)} has run {count(tasks, 'task')} of {type_!r} for {span(oldest)}{than}",
            "if they hang: a timeout for the type ends such attempts",
        )


def _examine_refused(consumers: list[Row]) -> Iterator[Check]:
    refused = [
        f"{count(number, 'result')} of {process(pid, host)}, the last {span(ago)} ago"
        for pid, host, _, _, _, _, _, number, ago in consumers
        if number and ago is not None
    ]
    if refused:
        is_new = any(row[8] is not None and row[8] < _REFUSED for row in consumers)
        yield Check(
            "refused",
            "warning" if is_new else "info",
            f"{some(refused)}: their tasks had been given to others, and ran again, or were cancelled",
            "its log names the tasks. Where nobody cancelled them, find what kept that worker from its heartbeat: a stopped or starved "
            "process, a cut network",
        )
    else:
        yield Check("refused", "ok", "no result of a living worker was refused")


def _examine_waiting(db: Database) -> Iterator[Check]:
    waiting = [
        f"{type_!r} in queue {queue!r} ({'over ' if is_more else ''}{tasks:,} tasks)"
        for type_, queue, tasks, is_more in _look(db, "doctor_waiting", _ALIVE, _CHUNKS)
    ]
    if waiting:
        yield Check(
            "waiting",
            "problem",
            f"no live consumer takes {some(waiting)}",
            "start a worker that handles them, or look for a misspelt type or queue",
        )
    else:
        yield Check("waiting", "ok", "each type that waits has a live consumer")


def _examine_failures(db: Database) -> Iterator[Check]:
    rows = _look(db, "doctor_failures", *_FAILURES)
    if not rows:
        yield Check("failures", "ok", f"no task failed for good in the last {span(_FAILURES[0])}")
        return
    number = sum(tasks for _, tasks, _ in rows)
    over = "over " if number == _FAILURES[1] else ""
    last_id = rows[0][2]
    yield Check(
        "failures",
        "warning",
        f"{over}{count(number, 'task')} failed for good in the last {span(_FAILURES[0])}: "
        + some([f"{type_!r} {tasks:,}" for type_, tasks, _ in rows]),
        f"Client.get_task({last_id}) has the errors of one of them, Client.list_tasks(states=['failed']) lists all",
    )


def _examine_leaves(db: Database) -> Iterator[Check]:
    rows = _look(db, "doctor_leaves")
    closed = [row for row in rows if row[1] == "closed"]
    text = f"{len(rows)} of {_LEAVES} in use"
    if not closed or len(rows) < _LEAVES:
        yield Check("leaves", "ok", text)
        return
    no, _, age, claims, has_delayed = closed[0]
    reasons = [f"{count(claims, 'claim')} of tasks that run"] if claims else []
    reasons += ["delayed tasks"] if has_delayed else []
    named = (
        f"named by {' and '.join(reasons)}"
        if reasons
        else "kept for its retention, by a reader's lock, or for want of a leader"
    )
    yield Check(
        "leaves",
        "warning",
        f"{text}, so the open one grows: the oldest, {no}, was closed {span(age)} ago, and is {named}",
        "shorten completed_retention, end what runs or reads for days (see snapshot, long), or see what the leader logs",
    )
