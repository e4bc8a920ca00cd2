"""Connecting by both halves: the engine (producers, consumers) and psycopg (the client, migrations, the command line)."""

from __future__ import annotations

import fastq
from fastq._db import Database
from fastq.errors import FastqError, SchemaError

NO_SCHEMA = "nothing_here"


def engine_place(dsn: str, *, connect_timeout: float = 10.0) -> str:
    """Connects the engine; the server that it took, as its error names it: the schema that is looked for first is missing.

    Raises:
        FastqError: it can't connect.
    """
    try:
        with fastq.Producer(dsn, schema=NO_SCHEMA, connect_timeout=connect_timeout) as producer:
            producer.enqueue(fastq.Task("t"))
    except SchemaError as error:
        return str(error)
    raise AssertionError(f"the schema {NO_SCHEMA} is there")


def engine_refusal(dsn: str, *, connect_timeout: float = 10.0) -> FastqError | None:
    """Why the engine can't connect; None: it can."""
    try:
        engine_place(dsn, connect_timeout=connect_timeout)
    except FastqError as error:
        return error
    return None


def psycopg_refusal(dsn: str, *, connect_timeout: float = 10.0) -> FastqError | None:
    """Why the cold path can't connect; None: it can."""
    try:
        Database(dsn, NO_SCHEMA, connect_timeout=connect_timeout).close()
    except FastqError as error:
        return error
    return None


def refusals(dsn: str, *, connect_timeout: float = 10.0) -> tuple[FastqError | None, FastqError | None]:
    """Of both, the engine's first."""
    return (
        engine_refusal(dsn, connect_timeout=connect_timeout),
        psycopg_refusal(dsn, connect_timeout=connect_timeout),
    )
