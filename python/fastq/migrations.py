"""Bring a fastq schema to this version, or back, one step at a time.

A step is one transaction with a lock timeout: it happens whole or not at all, and never makes running workers wait for long. Indexes of
large tables are built behind it, while all go on; where that was cut short, the next call goes on with it. A step
records the oldest fastq that may still work on the new schema, so that workers of that version go on during a rolling upgrade.
Any number of processes may migrate at once: they take turns by a lock that lives as long as a transaction.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, Final, TypeVar, Unpack

from fastq import _engine, _indexes, rights
from fastq._db import STATEMENT_TIMEOUT, Database
from fastq._options import MigrationOptions, read_migration_options
from fastq._work import Statement, Work
from fastq.errors import DatabaseError, SchemaError, SettingsError
from fastq.rights import Kind, grants
from fastq.settings import resolve_dsn, resolve_schema

T = TypeVar("T")

# A step that has to wait longer for a table than this steps aside: whoever comes after it in that table's queue waits as well.
_LOCK_TIMEOUT: Final = "100ms"
# For the turn among migrating processes there is no such queue.
_TURN_TIMEOUT: Final = "60s"
# Seconds for which a step that finds its tables busy tries again.
_PATIENCE: Final = 60.0
# No lock within the limit; a deadlock.
_BUSY: Final = frozenset({"55P03", "40P01"})
_OLDEST: Final = re.compile(r"^-- oldest fastq: (\d+\.\d+\.\d+)$", re.MULTILINE)
_DROPPED: Final = re.compile(r"^DROP TABLE ([^;]+);", re.MULTILINE)
_UNDEFINED_TABLE: Final = "42P01"


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema."""

    version: int
    name: str
    oldest: str
    """The oldest fastq that may work on the schema after this step."""
    applied_at: datetime | None
    """When it was applied, by the database's clock (UTC); None: it is not."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a schema stands."""

    schema: str
    version: int
    """Its last step; 0: not migrated."""
    latest: int
    """The last step that this fastq knows."""
    migrations: list[Migration]
    """All steps, applied or known, in order."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What ``down`` would delete."""

    migrations: list[Migration]
    """The steps that it would undo, in that order."""
    tables: list[tuple[str, int]]
    """The tables that would go, each with its number of rows now."""


@dataclass(frozen=True, slots=True)
class _Step:
    version: int
    name: str
    up: str
    down: str
    oldest: str
    indexes: tuple[_indexes.Index, ...] = ()


@cache
def _steps() -> dict[int, _Step]:
    steps = {}
    for version, name, up, down, indexes in _engine.migrations():
        oldest = _OLDEST.search(up)
        if oldest is None:
            raise AssertionError(f"schema step {version} does not say `-- oldest fastq: x.y.z`")
        steps[version] = _Step(version, name, up, down, oldest[1], tuple(_indexes.read(indexes)))
    return steps


def migrate(
    dsn: str | None = None,
    *,
    schema: str | None = None,
    target: int | None = None,
    **options: Unpack[MigrationOptions],
) -> list[Migration]:
    """Apply the steps that are missing, each in a transaction of its own, and create the schema if it is not there.

    Safe to run from any number of processes at once, and while workers run. An index of a large table waits for the transactions that are
    open in the database when it is built; nobody waits for it but this call.

    Args:
        dsn: the database; None: FASTQ_DSN.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.
        target: the last step wanted; None: the newest.
        **options: ``connect_timeout`` (seconds or timedelta, 10 s), and ``statement_timeout`` (None: no limit, since a step may
            rightly take as long as its tables are large): a statement whose answer takes longer counts as a lost connection.

    Returns:
        The steps that this call applied; none where others were faster or nothing was missing.

    Raises:
        SettingsError: no dsn, a dsn, schema name or option that can't be used, a target that is no step.
        SchemaError: the schema is newer than this fastq and shut to it.
        DatabaseError: the server refused a step (``sqlstate`` 42501: rights are missing; the message names the role that has them)
            or stayed too busy.
    """
    steps = _steps()
    last = max(steps) if target is None else target
    if last not in steps:
        raise SettingsError(f"target is {target!r}, but must be one of the schema's steps: {_numbers(steps)}")
    applied = []
    with _open(dsn, schema, options) as db:
        # Looked up first, so that where nothing is missing no right to create is needed.
        there = {migration.version for migration in db.perform(_open_to_us(db.schema))}
        for step in (steps[version] for version in sorted(steps) if version <= last and version not in there):
            done = _patiently(db, partial(_apply, db, step))
            if done is not None:
                applied.append(done)
        for step in (steps[version] for version in sorted(steps) if version <= last):
            for index in step.indexes:
                _patiently(db, partial(_indexes.build, db, index))
    return applied


def preview_down(
    dsn: str | None = None,
    *,
    schema: str | None = None,
    target: int | None = None,
    **options: Unpack[MigrationOptions],
) -> Loss:
    """What ``down`` with the same arguments would delete. Nothing is changed; the rows are counted.

    Raises:
        SettingsError, SchemaError, DatabaseError: as ``down``.
    """
    with _open(dsn, schema, options) as db:
        return _loss(db, target)


def down(
    dsn: str | None = None,
    *,
    schema: str | None = None,
    target: int | None = None,
    yes: bool = False,
    **options: Unpack[MigrationOptions],
) -> list[Migration]:
    """Undo steps, the last one first, each in a transaction of its own. What their tables hold is deleted.

    The schema itself stays, empty after step 1 is undone.

    Args:
        dsn: the database; None: FASTQ_DSN.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.
        target: the last step to keep, 0 for none; None: all but the last one.
        yes: that it is meant. Without it nothing is done.
        **options: as for ``migrate``.

    Returns:
        The steps that were undone.

    Raises:
        SettingsError: ``yes`` is not given (the message says what would be deleted); or as ``migrate``.
        SchemaError: not migrated, or a step is applied that this fastq does not know how to undo.
        DatabaseError: as ``migrate``.
    """
    with _open(dsn, schema, options) as db:
        loss = _loss(db, target)
        if not yes:
            rows = ", ".join(f"{name} ({count:,} rows)" for name, count in loss.tables) or "no table"
            raise SettingsError(
                f"down would undo step {_numbers(m.version for m in loss.migrations) or 'none'} of schema {db.schema!r} and "
                f"delete {rows}: pass yes=True (on the command line --yes) if that is meant"
            )
        steps = _steps()
        return [
            migration for migration in loss.migrations if _patiently(db, partial(_undo, db, steps[migration.version]))
        ]


def status(dsn: str | None = None, *, schema: str | None = None, **options: Unpack[MigrationOptions]) -> Status:
    """Which steps a schema has, and which are known.

    Args:
        dsn: the database; None: FASTQ_DSN.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.
        **options: as for ``migrate``, but ``statement_timeout`` is 30 s where nothing is said.

    Raises:
        SettingsError: as ``migrate``.
        DatabaseError: no connection, or no right to look.
    """
    with _open(dsn, schema, {"statement_timeout": STATEMENT_TIMEOUT} | options) as db:
        applied = {migration.version: migration for migration in db.perform(_applied())}
    known = {step.version: Migration(step.version, step.name, step.oldest, None) for step in _steps().values()}
    merged = known | applied
    return Status(db.schema, max(applied, default=0), max(known), [merged[version] for version in sorted(merged)])


def _open(dsn: str | None, schema: str | None, options: Mapping[str, Any]) -> Database:
    return Database(resolve_dsn(dsn), resolve_schema(schema), **read_migration_options(options))


def check(db: Database) -> None:
    """That this fastq may work on the schema of ``db``.

    Raises:
        SchemaError: it is not migrated, too old, or newer and shut to this version. The message says what to do.
        DatabaseError: the server refused to tell.
    """
    db.perform(checking(db.schema))


def checking(schema: str, *, kind: Kind | None = None) -> Work[None]:
    """What `check` does, and, with ``kind``, that the connection's role has that kind's rights.

    Raises:
        SchemaError: as `check`.
        DatabaseError: rights are missing (``sqlstate`` 42501: the message names the role and each of them), or the server refused to tell.
    """
    if kind is not None:
        yield from rights.checking(schema, kind)
    applied = yield from _open_to_us(schema)
    latest = max(_steps())
    if not applied:
        raise SchemaError(f"schema {schema!r} is not migrated: run `fastq migrate`, or call fastq.migrate(dsn)")
    if applied[-1].version < latest:
        raise SchemaError(
            f"schema {schema!r} is at step {applied[-1].version}, too old for fastq {_engine.version}, "
            f"which needs step {latest}: run `fastq migrate`"
        )


def missing_indexes(db: Database) -> list[str]:
    """The indexes of the schema's steps that are not there, or not whole: being built, or left behind by who built them."""
    applied = {migration.version for migration in db.perform(_applied())}
    steps = (step for step in _steps().values() if step.version in applied)
    return [index.name for step in steps for index in step.indexes if not _indexes.find(db, index)[0]]


def _open_to_us(schema: str) -> Work[list[Migration]]:
    """The steps applied. Raises SchemaError if the last one is unknown here and shuts this version out."""
    applied = yield from _applied()
    if applied and applied[-1].version > max(_steps()) and _parts(_engine.version) < _parts(applied[-1].oldest):
        raise SchemaError(
            f"schema {schema!r} is at step {applied[-1].version}, which shuts out fastq {_engine.version}: "
            f"it needs {applied[-1].oldest} or newer. Upgrade fastq"
        )
    return applied


def _parts(version: str) -> tuple[int, ...]:
    # The leading numbers decide: 1.2.0rc1 counts as 1.2.0.
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _numbers(versions: Iterable[int]) -> str:
    return ", ".join(str(version) for version in versions)


def _applied() -> Work[list[Migration]]:
    try:
        rows = yield Statement("list_migrations")
    except DatabaseError as error:
        if error.sqlstate == _UNDEFINED_TABLE:
            return []
        raise
    return [Migration(version, name, oldest, at.astimezone(UTC)) for version, name, oldest, at in rows]


def _apply(db: Database, step: _Step) -> Migration | None:
    with db.transaction():
        _take_turn(db)
        if not db.has_schema():
            db.create_schema()
        db.query("create_migration_table")
        if any(migration.version == step.version for migration in db.perform(_open_to_us(db.schema))):
            return None
        db.script(step.up)
        _indexes.build_small(db, step.indexes)
        [(applied_at,)] = db.query("record_migration", step.version, step.name, step.oldest)
    return Migration(step.version, step.name, step.oldest, applied_at.astimezone(UTC))


def _undo(db: Database, step: _Step) -> bool:
    with db.transaction():
        _take_turn(db)
        applied = db.perform(_applied())
        if not applied or applied[-1].version != step.version:
            return False
        db.script(step.down)
        if len(applied) == 1:
            db.drop_table("migration")
        else:
            db.query("forget_migration", step.version)
    return True


def _take_turn(db: Database) -> None:
    db.query("set_lock_timeout", _TURN_TIMEOUT)
    db.query("lock_migrations", db.schema)
    db.query("set_lock_timeout", _LOCK_TIMEOUT)


def _patiently(db: Database, step: Callable[[], T]) -> T:
    """Run ``step``, again after a pause while a lock that it needs is held: up to a minute in all."""
    started = time.monotonic()
    pause = 0.05
    while True:
        try:
            return step()
        except DatabaseError as error:
            if error.sqlstate == rights.MISSING:
                raise rights.may_not_migrate(db, error) from error
            if error.sqlstate not in _BUSY or time.monotonic() - started > _PATIENCE:
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
        pause = min(pause * 2, 1.0)


def _loss(db: Database, target: int | None) -> Loss:
    steps = _steps()
    applied = db.perform(_applied())
    if not applied:
        raise SchemaError(f"schema {db.schema!r} is not migrated: there is nothing to undo")
    versions = [0, *(migration.version for migration in applied)]
    keep = versions[-2] if target is None else target
    if keep not in versions:
        raise SettingsError(
            f"target is {target!r}, but must be 0 or one of the applied steps: {_numbers(versions[1:])}"
        )
    undone = [migration for migration in reversed(applied) if migration.version > keep]
    for migration in undone:
        if migration.version not in steps:
            raise SchemaError(
                f"schema {db.schema!r} is at step {migration.version} ({migration.name}), which fastq {_engine.version} "
                f"does not know how to undo: run `down` with the fastq that applied it"
            )
    names = [
        name.strip().removeprefix("fastq.")
        for migration in undone
        for dropped in _DROPPED.findall(steps[migration.version].down)
        for name in dropped.split(",")
    ]
    return Loss(undone, [(name, db.count_rows(name)) for name in sorted(names)])


__all__ = [
    "Loss",
    "Migration",
    "Status",
    "check",
    "down",
    "grants",
    "migrate",
    "missing_indexes",
    "preview_down",
    "status",
]
