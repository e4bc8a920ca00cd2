"""What must be true of every task after a chaos run: asked of the tables, of the handlers' journal and of the producers' files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, LiteralString, NamedTuple

import psycopg

from tests.chaos.faults import Fault
from tests.support.report import Row

#: Seconds after its end within which a run's outcome is stored, while the server is there. A busy machine takes its time.
_FLUSH: Final = 5.0
#: Seconds after an outage by which all are connected again and have stored what had come together.
_RETURN: Final = 12.0
_AWAY: Final = ("restart", "crash", "killed backends")
#: What breaks a handler's own transaction.
_BREAKS: Final = (*_AWAY, "broken transaction")
#: A process that stands still for less is not taken for dead: `dead_after` less what may be missing since the last heartbeat.
_SILENCE: Final = 5.0
#: Seconds that a task with a retry policy of its own waits at least, more than others do.
_OWN_RETRY: Final = 0.9
#: Seconds by which all connections that a fault ended have ended: a backend that is told to end takes its time.
_OPEN: Final = 1.0

_PREPARED: Final = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.ledger (id bigint);
CREATE TABLE chaos.effect (id bigint, attempt int, pid int);
"""
_TABLES: Final = """
CREATE TABLE chaos.ack (id bigint);
CREATE TABLE chaos.never (id bigint);
CREATE TABLE chaos.with_effect (id bigint);
CREATE TABLE chaos.with_options (id bigint);
CREATE TABLE chaos.run (n bigint, id bigint, attempt int, pid int, began float, ended float, how text);
CREATE TABLE chaos.fault (kind text, pid int, began float, ended float);
CREATE TABLE chaos.buried (pid int);
CREATE TABLE chaos.completed AS
    SELECT i AS id, d.attempts FROM fastq.done d, unnest(d.ids) r, generate_series(lower(r), upper(r) - 1) i;
"""
_INDEXES: Final = """
CREATE INDEX ON chaos.run (id, n);
CREATE INDEX ON chaos.completed (id);
CREATE INDEX ON chaos.effect (id);
CREATE INDEX ON chaos.with_options (id);
ANALYZE chaos.ack; ANALYZE chaos.never; ANALYZE chaos.run; ANALYZE chaos.completed;
ANALYZE chaos.with_effect; ANALYZE chaos.effect; ANALYZE chaos.with_options;
"""
# A run that was not the last of its task. Failed it as ordered, and an attempt says so: matched. Else it was begun again because it was
# lost: by a fault that struck its process while it ran or its outcome was under way, or by a crash of the server, which takes the last
# fraction of a second of claims and outcomes with it: what was claimed then may be begun by two, also a little later. One that failed
# since its own transaction broke has its attempt, too, and must have been struck while it ran.
_AGAIN: Final = """
CREATE TABLE chaos.again AS
WITH ordered AS (
    SELECT r.*, row_number() OVER (PARTITION BY id ORDER BY n DESC) AS from_last,
           row_number() OVER (PARTITION BY id, attempt ORDER BY n DESC) AS of_attempt FROM chaos.run r
), settled AS (
    SELECT o.*, coalesce(greatest(o.ended + %(flush)s, (SELECT max(f.ended) + %(back)s FROM chaos.fault f
               WHERE f.kind = ANY (%(away)s) AND f.began <= o.ended + %(flush)s AND f.ended >= o.began)), 'infinity') AS settled
      FROM ordered o WHERE from_last > 1
)
SELECT s.*,
       of_attempt = 1 AND how IN ('fail', 'broke') AND EXISTS (
           SELECT FROM fastq.attempt_error e WHERE e.id = s.id AND e.attempt = s.attempt AND e.took_us IS NOT NULL) AS is_failure,
       EXISTS (SELECT FROM chaos.fault f WHERE f.kind = 'crash' AND f.began <= s.settled AND f.ended + %(back)s >= s.began) AS is_crash,
       EXISTS (SELECT FROM chaos.fault f WHERE f.pid = s.pid AND f.began <= s.settled AND f.ended >= s.began
                  AND (f.kind = 'kill worker' OR f.kind = 'long stop' OR f.ended - f.began > %(silence)s)) AS is_struck,
       how = 'broke' AND NOT EXISTS (SELECT FROM chaos.fault f WHERE f.kind = ANY (%(breaks)s)
                                AND f.began <= s.ended AND f.ended + %(open)s >= s.began) AS is_riddle,
       EXISTS (SELECT FROM chaos.buried b WHERE b.pid = s.pid) AS is_buried
  FROM settled s
"""
# What must answer no row, and what a row of it would mean.
_WRONG: Final[dict[str, LiteralString]] = {
    "acknowledged tasks lost": "SELECT DISTINCT id FROM chaos.ack a WHERE NOT EXISTS (SELECT FROM chaos.completed c WHERE c.id = a.id)",
    "tasks completed twice": "SELECT id FROM chaos.completed GROUP BY id HAVING count(*) > 1",
    "tasks neither completed nor anywhere else": (
        "SELECT DISTINCT t.id FROM fastq.task t WHERE NOT EXISTS (SELECT FROM chaos.completed c WHERE c.id = t.id)"
    ),
    "tasks failed for good": "SELECT id FROM fastq.dead",
    "tasks rolled back and there": (
        "SELECT n.id FROM chaos.never n WHERE EXISTS (SELECT FROM chaos.completed c WHERE c.id = n.id) "
        "OR EXISTS (SELECT FROM chaos.run r WHERE r.id = n.id)"
    ),
    "rows of a user's transaction without their task": (
        "SELECT l.id FROM chaos.ledger l WHERE NOT EXISTS (SELECT FROM chaos.completed c WHERE c.id = l.id)"
    ),
    "effects there twice": "SELECT id FROM chaos.effect GROUP BY id HAVING count(*) > 1",
    "completed without their effect": (
        "SELECT w.id FROM chaos.with_effect w WHERE EXISTS (SELECT FROM chaos.completed c WHERE c.id = w.id) "
        "AND NOT EXISTS (SELECT FROM chaos.effect e WHERE e.id = w.id)"
    ),
    "effects of tasks that are not completed": (
        "SELECT e.id FROM chaos.effect e WHERE NOT EXISTS (SELECT FROM chaos.completed c WHERE c.id = e.id)"
    ),
    "effects of another attempt than was completed": (
        "SELECT e.id FROM chaos.effect e JOIN chaos.completed c ON c.id = e.id WHERE c.attempts <> e.attempt"
    ),
    "without the timeout and the retry policy that they were enqueued with": (
        "SELECT DISTINCT id FROM chaos.run WHERE how = 'strange'"
    ),
    "failed, and run again sooner than their own retry policy has it": (
        "SELECT a.id FROM chaos.again a JOIN chaos.with_options USING (id) JOIN chaos.run r ON r.id = a.id AND r.attempt = a.attempt + 1 "
        "WHERE a.is_failure AND NOT a.is_crash AND r.began < a.ended + %(own_retry)s"
    ),
    # Of one whose transaction has committed the process may be gone before it says so.
    "completed without a start": (
        "SELECT c.id FROM chaos.completed c WHERE NOT EXISTS (SELECT FROM chaos.run r WHERE r.id = c.id AND (r.ended IS NOT NULL "
        "OR EXISTS (SELECT FROM chaos.effect e WHERE e.id = r.id AND e.attempt = r.attempt AND e.pid = r.pid)))"
    ),
    "started and never enqueued": (
        "SELECT DISTINCT r.id FROM chaos.run r WHERE NOT EXISTS (SELECT FROM chaos.completed c WHERE c.id = r.id)"
    ),
    "completed in an attempt that is not their last start's": (
        "SELECT c.id FROM chaos.completed c WHERE c.attempts <> "
        "(SELECT r.attempt FROM chaos.run r WHERE r.id = c.id ORDER BY r.n DESC LIMIT 1)"
    ),
    "attempts without their record": (
        "SELECT c.id FROM chaos.completed c WHERE c.attempts <> 1 + "
        "(SELECT count(DISTINCT e.attempt) FROM fastq.attempt_error e WHERE e.id = c.id)"
    ),
    "starts without an attempt or a rescue": (
        "SELECT id FROM chaos.again WHERE NOT is_failure AND NOT is_crash AND NOT is_buried"
    ),
    "re-runs that no fault explains": (
        "SELECT id FROM chaos.again WHERE (NOT is_failure OR is_riddle) AND NOT is_crash AND NOT is_struck"
    ),
}


class Finding(NamedTuple):
    """One thing that must not be."""

    what: str
    tasks: int
    examples: list[int]


class Account(NamedTuple):
    """What the run came to."""

    acknowledged: int
    completed: int
    starts: int
    failures: int
    """Runs that failed as ordered."""
    reruns: int
    """Runs that were begun again because they were lost."""
    effects: int
    """Tasks that were completed in a transaction of their handlers'."""
    breaks: int
    """Such transactions that broke, and were begun again."""
    options: int
    """Tasks acknowledged with a timeout and a retry policy of their own."""
    option_failures: int
    """Runs of these that failed."""
    option_reruns: int
    """And those that were begun again because they were lost."""
    findings: list[Finding]

    @property
    def wrong(self) -> list[Row]:
        """What must not be, as lines of the report."""
        return [(f"WRONG: {what}", f"{tasks}, such as {examples}", False) for what, tasks, examples in self.findings]


def prepare(dsn: str) -> None:
    """Makes the tables that producers and handlers write to in transactions of their own."""
    with psycopg.connect(dsn) as db:
        db.execute(_PREPARED)


def audit(dsn: str, journal: Path, promises: Iterable[Path], faults: Iterable[Fault], logs: str) -> Account:
    """Brings everything into the database, and asks there.

    Args:
        dsn: of the drained database, as the owner of the schemas ``fastq`` and ``chaos``.
        journal: what the handlers wrote down.
        promises: what the producers did.
        faults: what struck.
        logs: of all workers.
    """
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("SET jit = off")
        db.execute(_TABLES)
        tokens = _load_promises(db, promises)
        _copy(db, "COPY chaos.run FROM STDIN", _runs(journal))
        _copy(db, "COPY chaos.fault FROM STDIN", faults)
        _copy(db, "COPY chaos.buried FROM STDIN", ((pid,) for pid in _buried(logs)))
        db.execute(_INDEXES)
        words = {
            "flush": _FLUSH,
            "back": _RETURN,
            "away": list(_AWAY),
            "silence": _SILENCE,
            "breaks": list(_BREAKS),
            "open": _OPEN,
            "own_retry": _OWN_RETRY,
        }
        db.execute(_AGAIN, words)

        def ask(query: LiteralString) -> int:
            row = db.execute(query, words).fetchone()
            return int(row[0]) if row else 0

        findings = []
        for what, query in _WRONG.items():
            ids = [id_ for (id_,) in db.execute(query, words)]
            if ids:
                findings.append(Finding(what, len(ids), ids[:5]))
        twice = [token for token, ids in tokens.items() if len(ids) > 1]
        if twice:
            findings.append(Finding("tokens that answered with several tasks", len(twice), sorted(tokens[twice[0]])))
        return Account(
            acknowledged=ask("SELECT count(DISTINCT id) FROM chaos.ack"),
            completed=ask("SELECT count(*) FROM chaos.completed"),
            starts=ask("SELECT count(*) FROM chaos.run"),
            failures=ask("SELECT count(*) FROM chaos.again WHERE is_failure AND how = 'fail'"),
            reruns=ask("SELECT count(*) FROM chaos.again WHERE NOT is_failure"),
            effects=ask("SELECT count(*) FROM chaos.effect"),
            breaks=ask("SELECT count(*) FROM chaos.again WHERE is_failure AND how = 'broke'"),
            options=ask("SELECT count(*) FROM chaos.with_options"),
            option_failures=ask("SELECT count(*) FROM chaos.again JOIN chaos.with_options USING (id) WHERE is_failure"),
            option_reruns=ask(
                "SELECT count(*) FROM chaos.again JOIN chaos.with_options USING (id) WHERE NOT is_failure"
            ),
            findings=findings,
        )


def _load_promises(db: psycopg.Connection, files: Iterable[Path]) -> dict[str, set[int]]:
    """Fills the tables of what was told; gives the ids that each token answered with."""
    told: dict[str, list[int]] = {"ack": [], "never": [], "effect": [], "options": []}
    tokens: dict[str, set[int]] = defaultdict(set)
    for file in files:
        for line in file.read_text().splitlines():
            word, *rest = line.split()
            if word == "token":
                tokens[rest[0]].add(int(rest[1]))
            else:
                told[word] += map(int, rest)
    _copy(db, "COPY chaos.ack FROM STDIN", ((id_,) for id_ in told["ack"]))
    _copy(db, "COPY chaos.never FROM STDIN", ((id_,) for id_ in told["never"]))
    _copy(db, "COPY chaos.with_effect FROM STDIN", ((id_,) for id_ in told["effect"]))
    _copy(db, "COPY chaos.with_options FROM STDIN", ((id_,) for id_ in told["options"]))
    return tokens


def _runs(journal: Path) -> Iterator[tuple[int, int, int, int, float, float | None, str | None]]:
    """Starts with their ends, as n, id, attempt, pid, began, ended, how; n counts in the order of starts."""
    under_way: dict[tuple[int, int, int], list[tuple[int, float]]] = defaultdict(list)
    with journal.open() as lines:
        for n, line in enumerate(lines):
            word, id_, attempt, pid, at = line.split()
            key = (int(id_), int(attempt), int(pid))
            if word == "start":
                under_way[key].append((n, float(at)))
                continue
            started, began = under_way[key].pop(0)
            if not under_way[key]:
                del under_way[key]
            yield started, *key, began, float(at), word
    for key, starts in under_way.items():
        for started, began in starts:
            yield started, *key, began, None, None


def _buried(logs: str) -> set[int]:
    """Processes that somebody declared dead, or that found out themselves."""
    return {int(pid) for pid in re.findall(r"process (\d+) on \S+ \(consumer \d+\)", logs)}


def _copy(db: psycopg.Connection, statement: LiteralString, rows: Iterable[tuple[object, ...]]) -> None:
    with db.cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


__all__ = ["Account", "Finding", "audit", "prepare"]
