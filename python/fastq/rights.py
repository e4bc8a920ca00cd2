"""Rights for roles that own nothing: a worker's, a producer's, a handler's, a viewer's.

The owner of a schema migrates it, and grants the others what `grants` prints. What each kind needs stands in ``sql/grants``; workers,
producers and clients ask for it when they connect, so that a right that is missing is named before anything is tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, TypeAlias

from fastq import _engine
from fastq._db import Database
from fastq._work import Statement, Work
from fastq.errors import DatabaseError, SettingsError
from fastq.settings import resolve_schema

Kind: TypeAlias = Literal["worker", "producer", "handler", "viewer"]

Right: TypeAlias = tuple[str, str, str, str]
"""On what (schema, table, sequence), its name, which, of which column (empty: all)."""

#: What each kind of role may do; the first may do all that the others may.
KINDS: Final[Mapping[Kind, str]] = {
    "worker": "work",
    "producer": "enqueue",
    "handler": "complete tasks in transactions",
    "viewer": "look",
}
MISSING: Final = "42501"
"""SQLSTATE of a right that is missing."""

_NAME_BYTES: Final = 63
_HEADER: Final = """\
-- Rights on fastq's tables in schema {schema}, for roles that do not own them and are there already (CREATE ROLE … LOGIN).
-- To be run by the owner, now and after each `fastq migrate` that applied a step: it may have brought a table. Granted again, a right
-- stays as it is.
"""
# What stands for the schema and for the role in sql/grants.
_WORDS: Final = re.compile(r"\bfastq\.|\bON SCHEMA fastq\b|\bTO fastq_[a-z]+;$", re.MULTILINE)
_PLACEHOLDERS: Final = (
    "-- The roles' names are examples: --worker NAME, --producer NAME, --handler NAME and --viewer NAME put yours in their "
    "place.\n"
)


@dataclass(frozen=True, slots=True)
class Held:
    """What the role of a connection may do in a schema."""

    role: str
    is_owner: bool
    """May migrate: owns the schema, or is a member of the role that does, or a superuser."""
    lacking: Mapping[Kind, str | None]
    """By kind: the rights that it lacks, as text; None: it has all."""
    meant: Kind | None
    """A kind whose rights it has in part, with rights to write beyond those of the kinds that it fulfils; None: there is none."""

    @property
    def kinds(self) -> list[Kind]:
        """The kinds whose rights it has, without those that another one includes."""
        whole = [kind for kind, lacking in self.lacking.items() if lacking is None]
        return ["worker"] if "worker" in whole else whole


def grants(
    *,
    worker: str | None = None,
    producer: str | None = None,
    handler: str | None = None,
    viewer: str | None = None,
    schema: str | None = None,
) -> str:
    """The SQL by which the schema's owner grants roles what they need; nothing is run, and no database is asked.

    Args:
        worker: a role that may enqueue and work (and look).
        producer: a role that may only enqueue.
        handler: a role of handlers' own connections, that may only complete tasks in its transactions (``task.complete_tx``).
        viewer: a role that may only look.
        schema: None: FASTQ_SCHEMA, else ``"fastq"``.

    Returns:
        One transaction. With no role at all, all kinds for roles named ``fastq_worker``, ``fastq_producer``, and so on.

    Raises:
        SettingsError: a name that no role can have, or the schema's can't be used.
    """
    schema = resolve_schema(schema)
    given: dict[Kind, str | None] = {"worker": worker, "producer": producer, "handler": handler, "viewer": viewer}
    roles = {kind: _quoted(kind, name) for kind, name in given.items() if name is not None}
    texts = dict(_engine.grants())
    _engine.render("", schema)  # refuses a name that could not be written in quotes as it is
    parts = [_HEADER.format(schema=f'"{schema}"')]
    if not roles:
        parts[0] += _PLACEHOLDERS
        roles = {kind: _quoted(kind, f"fastq_{kind}") for kind in given}
    parts.append("BEGIN;\n")
    parts.extend(_rendered(texts[kind], schema, role) for kind, role in roles.items())
    parts.append("COMMIT;\n")
    return "\n".join(parts)


def checking(schema: str, kind: Kind) -> Work[None]:
    """That the role of the connection has all rights of this kind. Where nothing is migrated, nothing is missing.

    Raises:
        DatabaseError: it has not; the message names the role and the rights (``sqlstate`` 42501).
    """
    role, lacking = yield from _lacking(schema, kind)
    if lacking is not None:
        raise DatabaseError(
            f"permission denied: role {role!r} may not {KINDS[kind]} in schema {schema!r}: it lacks {lacking}. "
            f"The schema's owner can grant what `fastq migrate --grants --{kind} {role}` prints (SQLSTATE {MISSING})",
            sqlstate=MISSING,
        )


def held(db: Database) -> Held:
    """What the role of ``db`` may do.

    Raises:
        DatabaseError: the server refused to tell.
    """
    found = {kind: db.perform(_lacking(db.schema, kind)) for kind in KINDS}
    role = found["worker"][0]
    [(_, owner, is_owner)] = db.query("find_owner", db.schema)
    lacking = {kind: text for kind, (_, text) in found.items()}
    covered = {right for kind, text in lacking.items() if text is None for right in _rights_of(kind)}
    # To look at a table may be anybody's right; one to write is given on purpose.
    writing = [right for right in _rights_of("worker") if right[2] not in ("SELECT", "USAGE")]
    answers = db.query("doctor_rights", db.schema, *_columns(writing))
    more = {right for right, (has,) in zip(writing, answers, strict=False) if has} - covered
    meant: Kind | None = None
    if more:
        meant = next((kind for kind in ("producer", "handler") if more <= set(_rights_of(kind))), "worker")
    return Held(role, owner is not None and is_owner, lacking, meant)


def may_not_migrate(db: Database, error: DatabaseError) -> DatabaseError:
    """The refusal of a step, with the role that it was refused and the one to migrate as."""
    [(role, owner, _)] = db.query("find_owner", db.schema)
    if owner is None:
        how = f"have an administrator create the schema with AUTHORIZATION {role}, or grant CREATE on the database"
    else:
        how = f"migrate as its owner, {owner!r}"
    return DatabaseError(f"role {role!r} may not migrate schema {db.schema!r}: {error}; {how}", sqlstate=error.sqlstate)


@cache
def _rights_of(kind: Kind) -> tuple[Right, ...]:
    return tuple(_engine.rights_of(kind))


def _columns(rights: Sequence[Right]) -> list[list[str]]:
    return [list(column) for column in zip(*rights, strict=True)]


def _lacking(schema: str, kind: Kind) -> Work[tuple[str, str | None]]:
    [(role, lacking)] = yield Statement("check_rights", schema, *_columns(_rights_of(kind)))
    return role, lacking


def _rendered(text: str, schema: str, role: str) -> str:
    # In one go: a name may hold what stands for the other one.
    words = {"fastq.": f'"{schema}".', "ON SCHEMA fastq": f'ON SCHEMA "{schema}"'}
    return _WORDS.sub(lambda found: words.get(found[0], f"TO {role};"), text)


def _quoted(what: str, name: str) -> str:
    # PostgreSQL reads these two as words even in quotes, the first as "everybody".
    wrong = name in ("", "public", "none") or len(name.encode()) > _NAME_BYTES or not name.isprintable()
    if wrong:
        raise SettingsError(
            f"{what} is {name!r}, but must be a role's name: up to {_NAME_BYTES} bytes, no control characters, not public or none"
        )
    return '"' + name.replace('"', '""') + '"'


__all__ = ["KINDS", "MISSING", "Held", "Kind", "checking", "grants", "held", "may_not_migrate"]
