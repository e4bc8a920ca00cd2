"""Fixtures for tests against the tables themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.storage import Session, add_lane


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
