"""An enqueue that was committed and not flushed before its connection was lost: found, and flushed before it is answered."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from fastq.task import Task
from tests.support.faults.network import Proxy, _Link
from tests.support.producing import producing, stored, value
from tests.support.waiting import until_the_next_notification


class _HalfLost(Proxy):
    """Of requests that come together, the first arrives and its answer is lost; those behind it don't arrive."""

    def _lose_one(self, link: _Link, request: bytes) -> bool:
        at = 0
        while at < len(request) and request[at : at + 1] != b"S":
            at += 1 + int.from_bytes(request[at + 1 : at + 5])
        return super()._lose_one(link, request[: at + 5])


@pytest.fixture
def proxy(dsn: str) -> Iterator[_HalfLost]:
    with _HalfLost(dsn) as made:
        yield made


def test_what_is_found_is_flushed_before_it_is_answered(
    proxy: _HalfLost, migrated: str, db: psycopg.Connection
) -> None:
    """The commit that wakes consumers does not wait for the disk; the request after it would. By itself the server flushes each
    200 ms, so of many in a row some would be answered before that."""
    with producing(proxy.dsn, migrated, connect_timeout=3.0, statement_timeout=8.0) as core:
        for n in range(15):
            core.enqueue(Task("a", "warm"))
            # The next one is to be its process's first for some time.
            until_the_next_notification()
            lost = proxy.lost
            before = value(db, "SELECT pg_current_wal_insert_lsn()")
            proxy.lose_answer_to(b"\0")
            id_, is_new = core.enqueue(Task("a", n))
            flushed = value(db, "SELECT pg_current_wal_flush_lsn()")
            assert (is_new, proxy.lost) == (True, lost + 1)
            assert db.execute("SELECT pg_wal_lsn_diff(%s, %s) > 0", (flushed, before)).fetchone() == (True,)
            assert id_ in stored(db)
