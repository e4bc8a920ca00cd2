"""Fixtures for tests against the tables themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.storage import TEXTS, Session, add_lane, in_background, wait_blocked


@pytest.fixture
def open_session(dsn: str, migrated: str) -> Iterator[Callable[[], Session]]:
    """Opens further connections to this test's schema; they are closed at its end."""
    with ExitStack() as stack:

        def opened() -> Session:
            session = Session(dsn, migrated)
            stack.callback(session.close)
            return session

        yield opened


@pytest.fixture
def store(open_session: Callable[[], Session]) -> Session:
    """A connection to this test's schema, in which lane 1 is there: type t, queue default, priority 0."""
    session = open_session()
    assert add_lane(session) == 1
    return session


@pytest.fixture
def late_claim(store: Session, open_session: Callable[[], Session]) -> Iterator[Callable[[], list[tuple[int, int]]]]:
    """A claim of 100 by consumer 2 that stands still between its snapshot and its first lock, until it is let go.

    SKIP LOCKED never waits for a row. So the lanes that the claim asks for come from a function that waits for a table.
    """
    store.sql("CREATE TABLE fastq.gate (lane integer)")
    store.sql(
        "CREATE FUNCTION fastq.lanes_behind_gate() RETURNS integer[] LANGUAGE plpgsql VOLATILE AS "
        "'BEGIN LOCK TABLE fastq.gate IN SHARE MODE; RETURN ARRAY[1]; END'"
    )
    text = TEXTS["claim_tasks"].replace("$5::integer[]", "fastq.lanes_behind_gate()")
    for number in range(6, 12):
        text = text.replace(f"${number}", f"${number - 1}")
    gate, session = open_session(), open_session()
    gate.begin()
    gate.sql("LOCK TABLE fastq.gate IN ACCESS EXCLUSIVE MODE")
    with in_background(session, lambda: session.sql(text, 2, 0, 100, 1 << 20, [0], [0], [0], [100], [9], 9)) as future:
        wait_blocked(store, session)

        def let_go() -> list[tuple[int, int]]:
            gate.commit()
            return [(row[7], row[8]) for row in future.result(30)]

        try:
            yield let_go
        finally:
            gate.rollback()
