"""What a standby with ``hot_standby_feedback`` is to its primary: it receives the log, and says which rows its queries need."""

from __future__ import annotations

import struct
import time
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

#: PostgreSQL counts microseconds from 2000-01-01.
_EPOCH: Final = 946_684_800


class Standby:
    """Receives the log over `dsn`, which is a superuser's, and needs all rows that are there now.

    Args:
        dsn: of the primary.
        slot: the physical replication slot that remembers it; None: the primary does so as long as it is connected.
    """

    def __init__(self, dsn: str, slot: str | None = None) -> None:
        with psycopg.connect(dsn, autocommit=True) as db:
            row = db.execute(
                "SELECT pg_current_wal_flush_lsn()::text, pg_snapshot_xmin(pg_current_snapshot())::text"
            ).fetchone()
        assert row is not None
        lsn, xmin = row
        self._connection = pq.PGconn.connect(make_conninfo(dsn, replication="database").encode())
        try:
            name = f"SLOT {slot} " if slot is not None else ""
            begun = self._connection.exec_(f"START_REPLICATION {name}PHYSICAL {lsn}".encode())
            assert begun.status == pq.ExecStatus.COPY_BOTH, begun.get_error_message()
            epoch, number = divmod(int(xmin), 2**32)
            now = int((time.time() - _EPOCH) * 1_000_000)
            # Hot standby feedback: the oldest transaction that its queries see, with its epoch; none for the catalogs.
            self._connection.put_copy_data(struct.pack("!cqIIII", b"h", now, number, epoch, 0, 0))
            self._connection.flush()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Goes away, as one does that is switched off."""
        self._connection.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


__all__ = ["Standby"]
