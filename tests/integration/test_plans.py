"""Plans of the hot statements with 0, 1,000 and 1,000,000 rows, under statistics that are right, missing or long out of date.

The plans are the generic ones that the engine's connections keep. What was read is counted in pages, not in milliseconds.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fastq.migrations import migrate
from tests.support.storage import TEXTS, TRACKS, Session, add_lane

Plan = dict[str, Any]

MILLION = 1_000_000

#: What runs for every task, each second, or for a task that a client changes, and finds what it needs by an index whatever there is.
HOT = (
    "beat_consumer",
    "cancel_claimed",
    "cancel_dead",
    "cancel_delayed",
    "cancel_ready",
    "claim_task",
    "claim_tasks",
    "complete_task",
    "complete_tasks",
    "complete_with_results",
    "delete_dead",
    "delete_delayed",
    "delete_done",
    "delete_ready",
    "edit_delayed",
    "edit_ready",
    "enqueue_expiring",
    "enqueue_tasks",
    "expire_claimed",
    "expire_delayed",
    "expire_ready",
    "fail_tasks",
    "find_ended_tasks",
    "find_enqueued",
    "find_results",
    "find_tokens",
    "forget_tasks",
    "give_back_tasks",
    "insert_chunks",
    "insert_tokens",
    "lock_tokens",
    "part_claims",
    "promote_tasks",
    "read_claims",
    "read_own_claims",
    "read_tasks",
    "rescue_claims",
    "retry_dead",
    "set_aside_task",
    "settle_tx",
    "snooze_tasks",
    "tick",
)
STAGES = (
    "0 rows",
    "1,000 rows, statistics of 0",
    "1,000,000 rows, statistics of 1,000",
    "1,000,000 rows",
    "0 rows, statistics of 1,000,000",
)
#: A value of each type of parameter. Plans are generic, so any will do that prunes no leaf but one.
SAMPLES = {
    "bigint": "1",
    "integer": "1",
    "smallint": "0",
    "double precision": "1",
    "boolean": "true",
    "text": "'t'",
    "int8multirange": "'{[1,2)}'",
    "bigint[]": "'{1}'",
    "integer[]": "'{1}'",
    "smallint[]": "'{1}'",
    "double precision[]": "'{1}'",
    "text[]": "'{t}'",
    '"char"': "'j'",
    "bytea": "'x'",
    "timestamp with time zone": "now()",
    "timestamp with time zone[]": "'{now}'",
    '"char"[]': "'{j}'",
    "bytea[]": "'{x}'",
    "int8multirange[]": """'{"{[1,2)}"}'""",
}
#: Tasks $1 to $2 of lane 2 in every state, their content in two leaves. As they are, g waits, in a chunk of one (the most chunks that
#: there can be); g plus ten million is delayed; plus twenty million is completed, by itself; plus thirty million runs, if g is
#: a whole thousand: claims and consumers are few at any size.
FILL = (
    (
        "INSERT INTO fastq.task (id, lane, leaf, max_attempts, format, payload) "
        "SELECT g, 2, g % 2, 3, 'j', '{}' FROM generate_series($1::bigint, $2::bigint) g"
    ),
    (
        "INSERT INTO fastq.ready (lo, hi, lane, leaf, max_attempts, task_bytes) "
        "SELECT g, g, 2, g % 2, 3, 2 FROM generate_series($1::bigint, $2::bigint) g"
    ),
    (
        "INSERT INTO fastq.delayed (id, run_at, lane, leaf, max_attempts, task_bytes, kind) "
        "SELECT 10000000 + g, now() + g * interval '1 minute', 2, g % 2, 3, 2, 'retrying' FROM generate_series($1::bigint, $2::bigint) g"
    ),
    (
        "INSERT INTO fastq.done (lo, consumer, no, lane, leaf, attempts, took_us, ids) "
        "SELECT 20000000 + g, 1, 1, 2, g % 2, 1, 1, int8multirange(int8range(20000000 + g, 20000001 + g)) "
        "FROM generate_series($1::bigint, $2::bigint) g"
    ),
    "INSERT INTO fastq.result SELECT 20000000 + g, now() + interval '1 hour', 'j', '1' FROM generate_series($1::bigint, $2::bigint) g",
    "INSERT INTO fastq.token SELECT 't', 'token ' || g, g FROM generate_series($1::bigint, $2::bigint) g",
    (
        "INSERT INTO fastq.claim (consumer, no, lane, leaf, track, attempts, max_attempts, task_bytes, ids) "
        "SELECT g % 20, g, 2, 0, 0, 0, 3, 2, int8multirange(int8range(30000000 + g, 30000001 + g)) "
        "FROM generate_series($1::bigint, $2::bigint) g WHERE g % 1000 = 0"
    ),
)
DELETE_ALL = (
    "DELETE FROM fastq.task",
    "DELETE FROM fastq.ready",
    "DELETE FROM fastq.delayed",
    "DELETE FROM fastq.done",
    "DELETE FROM fastq.result",
    "DELETE FROM fastq.token",
    "DELETE FROM fastq.claim",
)
GROWS = re.compile(r"ready|claim|delayed|dead|task_\d\d|done_\d\d|token|attempt_error|result")
LEAVES = re.compile(r"(task|done)_\d\d")


@dataclass
class Measured:
    """What was found in each stage."""

    plans: dict[tuple[str, str], Plan] = field(default_factory=dict)
    """By stage and statement."""
    session: Session | None = None
    """On the schema as the last stage left it but for the deletions: 1,000,000 rows."""


@pytest.fixture(scope="module")
def measured(dsn: str) -> Iterator[Measured]:
    """Takes a schema through all stages, planning every hot statement anew in each."""
    schema = f"test_{secrets.token_hex(6)}"
    migrate(dsn, schema=schema)
    session = Session(dsn, schema)
    try:
        yield go_through_stages(session)
    finally:
        session.close()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))


def go_through_stages(session: Session) -> Measured:
    found = Measured(session=session)
    tables = [
        name
        for (name,) in session.sql(
            "SELECT relname FROM pg_class WHERE relnamespace = $1::regnamespace AND relkind = 'r'",
            f'"{session.schema}"',
        )
    ]
    for table in tables:
        # Statistics change when this test says so.
        session.sql(f"ALTER TABLE fastq.{table} SET (autovacuum_enabled = off)")
    session.sql("SET synchronous_commit = off")
    session.run("tick", 7, 3600.0, 1800.0, 9.0, True)
    assert add_lane(session) == 1
    assert add_lane(session, "other") == 2

    def plan_all(stage: str) -> None:
        for name in HOT:
            found.plans[stage, name] = plan_of(session, name)

    analyze(session, tables)
    plan_all(STAGES[0])
    fill(session, 1, 1000)
    plan_all(STAGES[1])
    analyze(session, tables)
    fill(session, 1001, MILLION)
    plan_all(STAGES[2])
    analyze(session, tables)
    plan_all(STAGES[3])
    session.begin()
    for statement in DELETE_ALL:
        session.sql(statement)
    plan_all(STAGES[4])
    session.rollback()
    return found


def analyze(session: Session, tables: list[str]) -> None:
    for table in tables:
        session.sql(f"ANALYZE fastq.{table}")


def fill(session: Session, first: int, last: int) -> None:
    for statement in FILL:
        session.sql(statement, first, last)


def plan_of(session: Session, name: str) -> Plan:
    """The generic plan of a statement, made now."""
    session.sql(f"PREPARE planned AS {TEXTS[name]}")
    types = session.value("SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'planned'")
    values = ", ".join(SAMPLES[type_] for type_ in types)
    [[[plan]]] = session.sql(f"EXPLAIN (FORMAT JSON) EXECUTE planned{f' ({values})' if types else ''}")
    session.sql("DEALLOCATE planned")
    found: Plan = plan["Plan"]
    return found


def nodes(plan: Plan, above: tuple[Plan, ...] = ()) -> Iterator[tuple[Plan, tuple[Plan, ...]]]:
    """Each node, with those above it. A CTE stands for itself, wherever EXPLAIN hangs it."""
    yield plan, above
    for child in plan.get("Plans", []):
        is_cte = str(child.get("Subplan Name", "")).startswith("CTE ")
        yield from nodes(child, () if is_cte else (*above, plan))


def relation(plan: Plan) -> str:
    return str(plan.get("Relation Name", ""))


in_each_stage = pytest.mark.parametrize("stage", STAGES)
# Loading takes as long as it takes; the tests themselves look at what was found.
pytestmark = pytest.mark.timeout(400)


@in_each_stage
@pytest.mark.parametrize("name", HOT)
def test_no_hot_statement_scans_a_table_that_grows(measured: Measured, stage: str, name: str) -> None:
    for node, _ in nodes(measured.plans[stage, name]):
        if GROWS.fullmatch(relation(node)) and (name, relation(node)) != ("find_results", "claim"):
            # Who waits reads the claims whole, once a look: they are few, and in no order that would help.
            assert node["Node Type"] != "Seq Scan", (relation(node), name)


@in_each_stage
@pytest.mark.parametrize("name", HOT)
def test_leaves_are_looked_into_one_task_at_a_time(measured: Measured, stage: str, name: str) -> None:
    """No hash or merge join over the leaves: it took 36 to 100 ms a claim at 200,000 tasks, the nested loop 0.15 ms."""
    for node, above in nodes(measured.plans[stage, name]):
        if LEAVES.fullmatch(relation(node)) and node["Node Type"] != "ModifyTable":
            assert node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Heap Scan"), name
            joins = {parent["Node Type"] for parent in above}
            assert not joins & {"Hash Join", "Merge Join", "Hash"}, (name, relation(node))


@in_each_stage
def test_the_claim_walks_the_lanes_in_order_and_locks_as_it_goes(measured: Measured, stage: str) -> None:
    plan = measured.plans[stage, "claim_tasks"]
    [(_, above)] = [(node, up) for node, up in nodes(plan) if node["Node Type"] == "LockRows"]
    locked = next(node for node, up in nodes(plan) if up and up[-1]["Node Type"] == "LockRows")
    assert (locked["Node Type"], locked["Index Name"]) == ("Index Scan", "ready_lane")
    assert locked["Scan Direction"] == "Forward"
    for column in ("lane", "track", "rid"):
        assert column in locked["Index Cond"]
    # From the lock upwards: the lane's limit, the loop over the lanes as they were sent, the limit of all. No sort, no
    # gather, nothing that would lock more than is taken or in another order.
    path = [node["Node Type"] for node in above if node["Node Type"] != "Subquery Scan"]
    assert path[-3:] == ["Limit", "Nested Loop", "Limit"]
    loop = [node for node in above if node["Node Type"] == "Nested Loop"][-1]
    assert (loop["Plans"][0]["Node Type"], loop["Plans"][0]["Alias"]) == ("Function Scan", "a")


@in_each_stage
def test_what_was_claimed_is_removed_by_hi(measured: Measured, stage: str) -> None:
    """By ctid a row that was shrunk since the snapshot is missed: taken, not removed, run twice."""
    removed = [
        child
        for node, _ in nodes(measured.plans[stage, "claim_tasks"])
        if node["Node Type"] == "ModifyTable" and relation(node) == "ready"
        for child in node["Plans"]
        if child.get("Parent Relationship") == "Outer"
    ]
    assert len(removed) == 2
    for node in removed:
        [scan] = [inner for inner, _ in nodes(node) if relation(inner) == "ready"]
        index = {scan.get("Index Name")} | {inner.get("Index Name") for inner, up in nodes(scan) if up}
        assert "ready_hi" in index, scan


@in_each_stage
@pytest.mark.parametrize(
    "name",
    [
        "complete_tasks",
        "complete_with_results",
        "expire_claimed",
        "fail_tasks",
        "give_back_tasks",
        "part_claims",
        "snooze_tasks",
    ],
)
def test_a_claim_is_looked_up_by_its_whole_key(measured: Measured, stage: str, name: str) -> None:
    """By its consumer alone each dead claim is read, too: beside a held snapshot there are more every second."""
    looked_up = [
        " ".join(str(inner.get("Index Cond", "")) for inner, _ in nodes(node))
        for node, _ in nodes(measured.plans[stage, name])
        if relation(node) == "claim" and node["Node Type"] not in ("ModifyTable", "LockRows")
    ]
    # The lock, the deletion and the update; and a claim of an earlier try.
    assert len(looked_up) == (4 if name == "part_claims" else 3)
    for condition in looked_up:
        assert re.search(r"\bconsumer = ", condition), condition
        assert re.search(r"\bno = ", condition), condition


@in_each_stage
def test_due_tasks_are_found_by_their_time(measured: Measured, stage: str) -> None:
    for name in ("promote_tasks", "tick"):
        indexes = {node.get("Index Name") for node, _ in nodes(measured.plans[stage, name])}
        assert "delayed_run_at" in indexes, name


# --- what is read with a million rows ------------------------------------------------------------


def pages(session: Session, text: str, *values: str) -> int:
    """How many pages a statement reads, planned as the engine's are. What it changes is rolled back."""
    session.sql(f"PREPARE measured AS {text}")
    read = 0
    arguments = f" ({', '.join(values)})" if values else ""
    # The first run fills caches of the session's own.
    for _ in range(2):
        session.begin()
        [[[plan]]] = session.sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE measured{arguments}")
        session.rollback()
        read = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    session.sql("DEALLOCATE measured")
    return read


def claim_of(lanes: list[int], n: int) -> list[str]:
    """The claim's parameters as literals: all tracks of these lanes."""
    asked = [(lane, track) for lane in lanes for track in TRACKS]
    arrays = (
        [lane for lane, _ in asked],
        [track for _, track in asked],
        [0] * len(asked),
        [0] * len(asked),
        [n] * len(asked),
        [n] * len(asked),
    )
    texts = ["'{" + ",".join(map(str, array)) + "}'" for array in arrays]
    return ["7", "0", str(n), "1000000000", *texts, str(n)]


@pytest.fixture
def big(measured: Measured) -> Session:
    """A million waiting, a million delayed, a million completed, all of lane 2; consumer 7 leads, term 1. Leave it as it is."""
    assert measured.session is not None
    assert measured.session.value("SELECT count(*) FROM fastq.ready") == MILLION
    return measured.session


def test_a_million_waiting_tasks_of_other_lanes_do_not_slow_a_claim(big: Session) -> None:
    assert pages(big, TEXTS["claim_tasks"], *claim_of([1], 100)) < 60


def test_a_claim_reads_as_much_as_it_takes(big: Session) -> None:
    one, hundred = (pages(big, TEXTS["claim_tasks"], *claim_of([2], n)) for n in (1, 100))
    assert one < 100
    # Chunks of one: each is found, locked, deleted from two indexes, and its task looked up.
    assert hundred < one + 100 * 25


def test_a_completion_reads_its_claim_alone(big: Session) -> None:
    claimed = "'{1000}'", """'{"{[30001000,30001001)}"}'"""
    assert pages(big, TEXTS["complete_tasks"], "0", *claimed, *claimed, "'{5}'") < 60
    values = "'{30001000}'", "'{1000}'", "'{60}'", "'{j}'", "'{x}'"
    assert pages(big, TEXTS["complete_with_results"], "0", *claimed, *claimed, "'{5}'", *values) < 80
    assert pages(big, TEXTS["give_back_tasks"], "0", *claimed) < 60


def test_a_failure_reads_its_claim_and_its_task_alone(big: Session) -> None:
    for delay in ("'{5}'", "'{NULL}'"):
        values = ["0", "'{1000}'", "'{30001000}'", delay, "'{e}'", "'{t}'", "'{5}'"]
        assert pages(big, TEXTS["fail_tasks"], *values) < 80
    assert pages(big, TEXTS["snooze_tasks"], "0", "'{1000}'", "'{30001000}'", "'{5}'") < 80


def test_a_tick_and_a_promotion_with_nothing_due_read_next_to_nothing(big: Session) -> None:
    tick = pages(big, TEXTS["tick"], "7", "6", "3", "9", "true")
    # The claims are read; there are a thousand of them.
    assert tick < 1200
    assert pages(big, TEXTS["promote_tasks"], "7", "1", "500", "0") < 20


def test_a_task_that_a_client_changes_is_found_in_a_few_pages(big: Session) -> None:
    """Of a million that wait, as many delayed, completed, and with tokens. Each of 16 leaves is looked into for copies."""
    waiting, delayed, completed, claimed = "'{500001}'", "'{10500001}'", "'{20500001}'", "'{30500000}'"
    kinds = "'{retrying}'"
    change = ("'j'", "'x'", "5", "NULL", "NULL")
    for name, values, most in (
        ("cancel_ready", (waiting,), 60),
        ("delete_ready", (waiting,), 60),
        ("edit_ready", (waiting, *change), 150),
        ("cancel_delayed", (delayed, kinds), 60),
        ("delete_delayed", (delayed, kinds), 60),
        ("edit_delayed", (delayed, kinds, *change), 150),
        # The claims are read; there are a thousand of them.
        ("cancel_claimed", (claimed,), 1200),
        # Up to 1,023 rows of completions can hold an id: here all of them do begin within that distance.
        ("delete_done", (completed,), 250),
        ("lock_tokens", (waiting,), 20),
        ("forget_tasks", (waiting,), 150),
        ("locate_tasks", (waiting,), 1400),
    ):
        read = pages(big, TEXTS[name], *values)
        assert read < most, (name, read)


def test_a_flush_in_doubt_is_looked_up_in_a_few_pages_a_task(big: Session) -> None:
    values = ["1", "'{1,1,1}'", "'{20000005,20500000,99000000}'"]
    # Up to 1,023 rows of completions can hold an id: here all of them do begin within that distance.
    assert pages(big, TEXTS["find_ended_tasks"], *values) < 3 * 150


def test_a_look_for_results_reads_a_few_pages_a_task(big: Session) -> None:
    # The claims are read once; there are a thousand of them.
    claims = pages(big, TEXTS["find_results"], "'{40000000}'")
    assert claims < 1300
    for what, first in (("result", 20_400_000), ("waiting", 400_000), ("delayed", 10_400_000)):
        ids = ",".join(str(first + n * 100) for n in range(100))
        assert pages(big, TEXTS["find_results"], f"'{{{ids}}}'") < claims + 100 * 15, what


@pytest.mark.parametrize(
    ("what", "id_"),
    [
        ("waiting", 500_000),
        ("delayed", 10_500_000),
        ("completed", 20_500_000),
        ("running", 30_500_000),
        ("none", 40_000_000),
    ],
)
def test_one_task_is_found_in_a_few_pages(big: Session, what: str, id_: int) -> None:
    # The claims are read whole; there are a thousand of them.
    assert pages(big, TEXTS["find_task"], str(id_)) < 300, what


def list_of(
    after: int, way: str, *, lanes: str = "NULL", text: str = "NULL", rows: int = 20_000, looks: int = 51
) -> list[str]:
    """The parameters of a page by id as literals: tasks in any state, 50 and one more."""
    states = ["'{ready,scheduled,retrying}'", "true", "true", "'{failed}'"]
    far = "9223372036854775806" if way == "ascending" else "0"
    return ["51", str(after), lanes, *states, far, "NULL", "NULL", text, str(rows), str(looks)]


@pytest.mark.parametrize("way", ["ascending", "descending"])
@pytest.mark.parametrize("after", [0, 500_000, 10_500_000, 20_500_000, 40_000_000])
def test_a_page_by_id_is_read_in_few_pages(big: Session, way: str, after: int) -> None:
    big.sql("SET plan_cache_mode = force_custom_plan")
    try:
        assert pages(big, TEXTS[f"list_tasks_by_id_{way}"], *list_of(after, way)) < 2500
    finally:
        big.sql("SET plan_cache_mode = force_generic_plan")


@pytest.mark.parametrize("way", ["ascending", "descending"])
@pytest.mark.parametrize("after", [0, 500_000, 10_500_000, 20_500_000, 40_000_000])
def test_a_page_of_what_is_rare_reads_what_it_is_bound_to(big: Session, way: str, after: int) -> None:
    """Of a lane with no task, and of a payload that none has, among a million that wait, as many delayed and completed."""
    big.sql("SET plan_cache_mode = force_custom_plan")
    try:
        rare = list_of(after, way, lanes="'{1}'", rows=2_000)
        # Rows of three tables, looked at once and counted once more. (The claims are read; there are a thousand of them.)
        assert pages(big, TEXTS[f"list_tasks_by_id_{way}"], *rare) < 2500 + 3 * 2 * 2_000
        search = list_of(after, way, text="'nowhere'", rows=2_000, looks=1_000)
        assert pages(big, TEXTS[f"list_tasks_by_id_{way}"], *search) < 2500 + 3 * 1_000 + 1_000 * 10
    finally:
        big.sql("SET plan_cache_mode = force_generic_plan")


def test_each_step_of_retention_reads_as_much_as_it_does(big: Session) -> None:
    """A hundred of each a step. (Only what empties a leaf reads all that waits, without an index, which would cost each enqueue.)"""
    # None is old enough to go, so each is looked at alone.
    assert pages(big, TEXTS["purge_tokens"], "7", "1", "0", "'t'", "'token 5'", "100") < 100 * 60
    assert pages(big, TEXTS["purge_dead"], "7", "1", "'{failed}'", "'{NULL}'", "'{0}'", "100") < 20
    dead = ["'{failed}'", "'{NULL}'", "'{0}'", "'{true}'"]
    assert pages(big, TEXTS["archive_dead"], "7", "1", *dead, "100") < 20
    done = ["0", "'{NULL}'", "'{0}'", "100", "20000000", "'{true}'", "true"]
    assert pages(big, TEXTS["archive_done"], "7", "1", *done) < 100 * 40
    assert pages(big, TEXTS["purge_errors"], "7", "1", "0", "0", "100") < 20
    assert pages(big, TEXTS["purge_results"], "7", "1", "100") < 20
    assert pages(big, TEXTS["carry_delayed"], "7", "1", "0", "100") < 100 * 40
    assert pages(big, TEXTS["open_leaf"], "7", "1", "0") < 30


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("doctor_consumers", []),
        ("doctor_leader", []),
        ("doctor_leaves", []),
        ("doctor_claims", ["15"]),
        ("doctor_long", ["600", "20", "1000"]),
        ("doctor_failures", ["3600", "10000"]),
        ("doctor_waiting", ["15", "1000"]),
    ],
)
def test_the_doctor_reads_no_big_table(big: Session, name: str, values: list[str]) -> None:
    # The claims are read whole; there are a thousand of them. Of what waits and what completed, the ends of indexes.
    assert pages(big, TEXTS[name], *values) < 2500


def test_counting_reads_no_tasks(measured: Measured, big: Session) -> None:
    for node, _ in nodes(plan_of(big, "count_tasks")):
        assert not relation(node).startswith("task_")


def test_every_statement_can_be_prepared(big: Session) -> None:
    """None has a slip that only shows where it is seldom used."""
    for name in TEXTS.keys() - {"create_migration_table"}:
        text = TEXTS[name].replace("{leaf}", "00")
        if re.search(r"^(COPY|LOCK|TRUNCATE) ", text, re.MULTILINE):
            assert name in {"copy_tasks", "lock_leaf", "truncate_leaf"}, "not a kind of statement that can be prepared"
            continue
        big.sql(f"PREPARE tried AS {text}")
        big.sql("DEALLOCATE tried")
