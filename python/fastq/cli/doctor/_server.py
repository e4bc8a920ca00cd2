"""What the doctor finds in the server, whatever is in the schema: settings, connections, held snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fastq._db import Database, Row
from fastq.cli.doctor._checks import Check, count, span

#: The oldest server that fastq works with.
_OLDEST_SERVER: Final = 140_000
# Those off which a commit that was answered may be gone after a crash.
_DURABILITY: Final = {
    "fsync": "a crash of the machine may destroy the whole database",
    "full_page_writes": "a crash of the machine may destroy pages that were being written",
    "synchronous_commit": "a crash of the server loses the last commits: enqueued tasks, and completions that run again",
}
# A snapshot held for less is anybody's report. Where the time is hidden, so many transactions are as much in a busy database.
_HELD_SECONDS: Final = 60.0
_HELD_TRANSACTIONS: Final = 20_000
_HOLDERS: Final = 5
# A worker has three connections, a producer two.
_FEW_CONNECTIONS: Final = 5


def examine_server(db: Database, took: float) -> Iterator[Check]:
    """The checks of the server; ``took``: seconds to connect."""
    [row] = db.query("doctor_server")
    version, version_num, database, role, is_superuser, sees_all, is_standby, is_read_only, *settings = row
    values = dict(zip(("fsync", "full_page_writes", "synchronous_commit", "autovacuum"), settings, strict=True))
    yield Check("connection", "ok", f"database {database!r} as role {role!r}, connected in {took * 1000:.0f} ms")
    if version_num < _OLDEST_SERVER:
        yield Check("server", "problem", f"PostgreSQL {version}, but fastq needs 14 or newer", "upgrade the server")
    elif is_standby:
        yield Check(
            "server",
            "problem",
            f"PostgreSQL {version}, a standby: nothing can be written",
            "name the primary in the dsn",
        )
    elif is_read_only:
        yield Check(
            "server",
            "problem",
            f"PostgreSQL {version}, and default_transaction_read_only is on for this role",
            f"ALTER ROLE … RESET default_transaction_read_only, or the same for database {database!r}",
        )
    else:
        yield Check("server", "ok", f"PostgreSQL {version}")
    if is_superuser:
        yield Check(
            "role",
            "warning",
            f"{role!r} is a superuser: fastq needs no such rights",
            "connect as a role of its own (fastq migrate --grants)",
        )
    for name, danger in _DURABILITY.items():
        if values[name] == "off":
            yield Check(name, "problem", f"off: {danger}", f"switch {name} on")
        else:
            yield Check(name, "ok", values[name])
    if values["autovacuum"] == "off":
        yield Check(
            "autovacuum",
            "problem",
            "off: fastq's tables fill with dead rows, and claims get slower and slower",
            "ALTER SYSTEM SET autovacuum = on, and reload",
        )
    yield from _examine_connections(db)
    yield from _examine_snapshots(db, role, sees_all=sees_all)


def _examine_connections(db: Database) -> Iterator[Check]:
    [(used, most, of_role, most_of_role, of_database, most_of_database)] = db.query("doctor_connections")
    limits = [
        ("the server", used, most),
        ("this role", of_role, most_of_role),
        ("this database", of_database, most_of_database),
    ]
    what, used, most = min(((w, u, m) for w, u, m in limits if m >= 0), key=lambda limit: limit[2] - limit[1])
    text = f"{used:,} of {most:,} in use, the limit of {what}"
    left = most - used
    if left >= max(_FEW_CONNECTIONS, most // 10):
        yield Check("connections", "ok", text)
        return
    yield Check(
        "connections",
        "problem" if left < _FEW_CONNECTIONS else "warning",
        f"{text}: a worker needs 3, a producer 2",
        "find who has them (SELECT usename, application_name, count(*) FROM pg_stat_activity GROUP BY 1, 2), or raise the limit",
    )


def _examine_snapshots(db: Database, role: str, *, sees_all: bool) -> Iterator[Check]:
    holders = db.query("doctor_snapshots", _HELD_SECONDS, _HELD_TRANSACTIONS)
    hidden = (
        ""
        if sees_all
        else f" (other users' are hidden from {role!r} in part: GRANT pg_read_all_stats TO it shows them)"
    )
    if not holders:
        yield Check("snapshot", "ok", f"none is held for longer than {_HELD_SECONDS:.0f} s{hidden}")
    for holder in holders[:_HOLDERS]:
        message, advice = _tell(holder)
        more = f" ({len(holders) - 1} others hold some, too)" if holder is holders[0] and len(holders) > 1 else ""
        yield Check("snapshot", "warning", message + more, advice)


def _tell(holder: Row) -> tuple[str, str]:
    kind, name, owner, application, host, state, transactions, seconds = holder
    since = f"for {span(seconds)}" if seconds is not None else f"over {count(transactions or 0, 'transaction')}"
    if kind == "slot":
        return (
            f"replication slot {name!r} ({state}) keeps dead rows {since}",
            f"its standby lags, or is gone: SELECT pg_drop_replication_slot('{name}') if it is gone",
        )
    if kind == "prepared":
        return (
            f"transaction {name!r}, prepared by {owner!r}, keeps dead rows {since}",
            f"COMMIT PREPARED or ROLLBACK PREPARED '{name}', in this database",
        )
    who = f"server process {name} of {owner!r}"
    where = ", ".join(part for part in (application, host and f"from {host}", state) if part)
    who += f" ({where})" if where else ""
    if kind == "standby":
        return (
            f"{who} keeps dead rows {since}: a query on the standby",
            "end that query there, or switch hot_standby_feedback off",
        )
    what = f"{who} keeps dead rows {since}: tables grow, and old leaves may wait to be emptied"
    if state is None or state.startswith("idle"):
        return (
            what,
            f"end it by pg_terminate_backend({name}); idle_in_transaction_session_timeout keeps it from coming back",
        )
    return what, f"let it finish (a backup, a report), or end it by pg_cancel_backend({name})"
