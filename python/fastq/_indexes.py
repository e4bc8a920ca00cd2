"""Indexes that a schema step brings to tables that are there: built so that nobody waits for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fastq._db import Database

#: Bytes of a table whose index is built in the step's own transaction: that takes milliseconds, where building it beside others waits
#: for every transaction that is open in the database.
_SMALL: Final = 8 * 1024 * 1024
_INDEX: Final = re.compile(r"^CREATE INDEX CONCURRENTLY (\w+) ON fastq\.(\w+) ([^;]+);", re.MULTILINE)

_log = logging.getLogger("fastq.migrations")


@dataclass(frozen=True, slots=True)
class Index:
    """One of them."""

    name: str
    table: str
    rest: str
    """Its statement from the columns on."""

    def text(self, how: str) -> str:
        """Its statement."""
        return f"CREATE INDEX {how}{self.name} ON fastq.{self.table} {self.rest}"


def read(text: str) -> list[Index]:
    """The indexes in a step's file of them."""
    return [Index(*found) for found in _INDEX.findall(text)]


def build_small(db: Database, indexes: Iterable[Index]) -> None:
    """In the step's transaction: those of small tables."""
    for index in indexes:
        is_whole, size = find(db, index)
        if is_whole is None and size <= _SMALL:
            db.script(index.text(""))


def build(db: Database, index: Index) -> None:
    """Outside of a transaction: build it if it is missing, or was left behind in the middle. Others go on meanwhile.

    Waits for the transactions that are open in the database. Safe from several processes at once, where it may end as a deadlock: then
    it is to be called again.
    """
    is_whole, size = find(db, index)
    # Again where another builder was waited for, and was killed.
    while not is_whole:
        if is_whole is False:
            # Somebody builds it now, or died over it: whoever builds holds this lock.
            with db.transaction():
                db.script(f"LOCK TABLE fastq.{index.table} IN SHARE UPDATE EXCLUSIVE MODE")
                is_whole, size = find(db, index)
            if is_whole is False:
                db.script(f"DROP INDEX CONCURRENTLY IF EXISTS fastq.{index.name}")
        if not is_whole:
            _log.info(
                "building index %s of table %s (%d MiB); all go on meanwhile", index.name, index.table, size >> 20
            )
            db.script(index.text("CONCURRENTLY IF NOT EXISTS "))
            is_whole, size = find(db, index)


def find(db: Database, index: Index) -> tuple[bool | None, int]:
    """Whether it is whole (None: not there), and the bytes of its table."""
    [(is_whole, size)] = db.query("find_index", index.name, index.table)
    return is_whole, size


__all__ = ["Index", "build", "build_small", "find", "read"]
