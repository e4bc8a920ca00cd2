"""Fixtures for the suites that follow regressions: ``python -m pytest benches``.

They time the paths that the table measures, in small, over rounds: what counts is how they compare with an earlier run
(``--benchmark-autosave``, ``--benchmark-compare``), not the figures themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastq import Producer
from fastq.bench._session import Session


@pytest.fixture
def session() -> Iterator[Session]:
    """A schema for one benchmark: on the server of FASTQ_DSN, else on the embedded one."""
    with Session() as session:
        yield session


@pytest.fixture
def producer(session: Session) -> Producer:
    """A producer that has connected."""
    producer = session.producer()
    producer.enqueue_many([])
    return producer
