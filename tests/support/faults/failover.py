"""A standby that takes over: it receives a primary's log as it is written, holds each commit up until it has it, and is promoted."""

from __future__ import annotations

import shutil
import weakref

import psycopg
from psycopg.conninfo import make_conninfo

from tests.support.faults.network import free_port
from tests.support.faults.server import PrivateServer, new_folder
from tests.support.waiting import wait_until


class StreamingStandby(PrivateServer):
    """A synchronous one, running and in step once it is made. Roles and passwords are the primary's.

    Args:
        primary: as it is now; from here on its commits wait for this standby.
    """

    def __init__(self, primary: PrivateServer) -> None:
        self._programs = primary._programs
        self._disk = None
        self._folder = new_folder(self._programs.account)
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._process = None
        self._settings = {}
        self.log_path = self._folder / "server.log"
        self.data_dir = self._data_seen = self._folder / "data"
        self.port = free_port()
        port = str(self.port)
        self.dsn = make_conninfo(primary.dsn, port=port)
        self.socket_dsn = make_conninfo(primary.dsn, host=str(self._folder), port=port)
        self.superuser_dsn = make_conninfo(primary.superuser_dsn, port=port)
        self.dsn_of_both = make_conninfo(
            primary.dsn,
            host="127.0.0.1,127.0.0.1",
            port=f"{primary.port},{port}",
            target_session_attrs="read-write",
        )
        """Leads to whichever of the two writes."""
        try:
            self._programs.run(
                self._programs.bin / "pg_basebackup",
                f"--pgdata={self.data_dir}",
                f"--dbname={primary.superuser_dsn}",
                "--wal-method=stream",
                "--checkpoint=fast",
                "--write-recovery-conf",
            )
            self._write_conf({})
            self.start()
            primary.conf(synchronous_standby_names="*")
            wait_until(lambda: _is_in_step(primary), timeout=60, message="the standby to be in step")
        except BaseException:
            self.close()
            raise


def _is_in_step(primary: PrivateServer) -> bool:
    with psycopg.connect(primary.superuser_dsn, autocommit=True) as db:
        return db.execute("SELECT sync_state FROM pg_stat_replication").fetchall() == [("sync",)]


__all__ = ["StreamingStandby"]
