"""Tasks in the user's own transaction, on the user's own connection: psycopg, asyncpg, SQLAlchemy, Django.

None of these is imported here: a connection is known by its class, and used by what it offers. What is written is said once, by
`steps`; `sessions` finds what carries the steps out on a given connection, sync or async.
"""

from fastq._tx.run import Write, arun, run
from fastq._tx.sessions import find_async_session, find_session

__all__ = ["Write", "arun", "find_async_session", "find_session", "run"]
