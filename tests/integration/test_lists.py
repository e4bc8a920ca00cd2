"""Pages that are answered before all is looked at: nothing is left out, and nothing comes twice, wherever one ends.

The bounds are set so low that a page ends within every table.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fastq import _lists
from fastq.client import Client, Page
from fastq.errors import SettingsError
from tests.support import clients
from tests.support.storage import Session, Worker, add_lane, enqueue, multirange

#: Ids of the tasks in a `Jumble`, but for gaps.
IDS = range(1, 7_000)
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as found:
        yield found


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement a page, which looks at little."""
    monkeypatch.setattr(_lists, "ROWS", 1_030)
    monkeypatch.setattr(_lists, "LOOKS", (300, 300))
    monkeypatch.setattr(_lists, "LONG_ENOUGH", 0.0)


#: Rows of each table, from columns.
INSERTS = {
    "task": (
        "INSERT INTO fastq.task (id, created_at, lane, leaf, max_attempts, format, payload) "
        "SELECT i, c, l, 0, 3, 'j', p FROM unnest($1::bigint[], $2::timestamptz[], $3::integer[], $4::bytea[]) AS t (i, c, l, p)"
    ),
    "ready": (
        "INSERT INTO fastq.ready (lo, hi, lane, leaf, max_attempts, task_bytes) "
        "SELECT lo, hi, l, 0, 3, 7 FROM unnest($1::bigint[], $2::bigint[], $3::integer[]) AS t (lo, hi, l)"
    ),
    "done": (
        "INSERT INTO fastq.done (lo, consumer, no, took_us, lane, leaf, attempts, ids) "
        "SELECT lo, 1, 1, 1, l, 0, 1, ids FROM unnest($1::bigint[], $2::integer[], $3::int8multirange[]) AS t (lo, l, ids)"
    ),
    "claim": (
        "INSERT INTO fastq.claim (consumer, no, lane, track, leaf, attempts, max_attempts, task_bytes, ids) "
        "SELECT 1, no, l, 0, 0, 0, 3, 7, ids FROM unnest($1::bigint[], $2::integer[], $3::int8multirange[]) AS t (no, l, ids)"
    ),
    "delayed": (
        "INSERT INTO fastq.delayed (id, run_at, created_at, lane, max_attempts, task_bytes, kind, format, payload) "
        "SELECT i, c, c, l, 3, 7, k, 'j', p "
        "FROM unnest($1::bigint[], $2::timestamptz[], $3::integer[], $4::bytea[], $5::text[]) t (i, c, l, p, k)"
    ),
    "dead": (
        "INSERT INTO fastq.dead (id, created_at, lane, attempts, max_attempts, state, format, payload) "
        "SELECT i, c, l, 1, 3, s, 'j', p "
        "FROM unnest($1::bigint[], $2::timestamptz[], $3::integer[], $4::bytea[], $5::text[]) t (i, c, l, p, s)"
    ),
}


@dataclass(frozen=True)
class One:
    """A task, as it should be listed."""

    id: int
    state: str
    kind: str | None
    type: str
    created_at: datetime
    payload: dict[str, int]


class Jumble:
    """Tasks in every place and of three types, one of them rare, in rows of one task and of many."""

    def __init__(self, store: Session, seed: int) -> None:
        self._random = random.Random(seed)
        self._types = {add_lane(store): "t", add_lane(store, "other", "slow"): "other", add_lane(store, "rare"): "rare"}
        self._lanes = list(self._types)
        self.tasks: list[One] = []
        self._rows: dict[str, list[tuple[object, ...]]] = {name: [] for name in INSERTS}
        at = IDS.start
        while at < IDS.stop:
            fill = self._random.choice((self._ready, self._done, self._delayed, self._dead, self._claim))
            # A stretch of one kind, long enough to hold more rows than a statement looks at, or a few.
            length = min(self._random.choice((3, 40, 700, 1_500)), IDS.stop - at)
            fill([id_ for id_ in range(at, at + length) if self._random.random() > 0.05])
            at += length
        self.tasks.sort(key=lambda one: one.id)
        for name, rows in self._rows.items():
            if rows:
                store.sql(INSERTS[name], *(list(column) for column in zip(*rows, strict=True)))

    def wanted(self, matches: Callable[[One], bool]) -> list[int]:
        return [one.id for one in self.tasks if matches(one)]

    def _lane(self) -> int:
        return self._random.choices(self._lanes, (80, 19.8, 0.2))[0]

    def _runs(self, ids: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Parts that are alike, each without gaps, and their lanes."""
        most = self._random.choice((1, 1, 60))
        at = 0
        while at < len(ids):
            end = at + 1
            while end < len(ids) and ids[end] == ids[end - 1] + 1 and end - at < most:
                end += 1
            yield self._lane(), ids[at:end]
            at = end

    def _note(self, table: str, lane: int, ids: list[int], state: str, kind: str | None = None) -> None:
        """These tasks' content lies in that table, with what they are where that is told."""
        for id_ in ids:
            # Times follow ids only roughly.
            created_at = START + timedelta(seconds=id_ + self._random.randrange(500))
            number = self._random.randrange(200)
            self.tasks.append(One(id_, state, kind, self._types[lane], created_at, {"n": number}))
            row = (id_, created_at, lane, b'{"n":%d}' % number)
            self._rows[table].append(row if table == "task" else (*row, kind or state))

    def _ready(self, ids: list[int]) -> None:
        for lane, run in self._runs(ids):
            self._note("task", lane, run, "pending")
            self._rows["ready"].append((run[0], run[-1], lane))

    def _done(self, ids: list[int]) -> None:
        # Rows whose ids lie among each other's, but less than 1,024 apart; or one task each.
        rows: dict[tuple[int, int], tuple[int, list[int]]] = {}
        ways = self._random.choice((0, 5))
        for id_ in ids:
            key = (id_ // 1_000, self._random.randrange(ways) if ways else id_)
            rows.setdefault(key, (self._lane(), []))[1].append(id_)
        for lane, run in rows.values():
            self._note("task", lane, run, "completed")
            self._rows["done"].append((run[0], lane, multirange(run)))

    def _claim(self, ids: list[int]) -> None:
        if ids:
            lane = self._lane()
            self._note("task", lane, ids, "running")
            self._rows["claim"].append((ids[0], lane, multirange(ids)))

    def _delayed(self, ids: list[int]) -> None:
        for lane, run in self._runs(ids):
            self._note("delayed", lane, run, "pending", self._random.choice(("scheduled", "retrying")))

    def _dead(self, ids: list[int]) -> None:
        for lane, run in self._runs(ids):
            self._note("dead", lane, run, self._random.choice(("failed", "failed", "cancelled", "expired")))


@pytest.fixture(params=[1, 2])
def jumble(request: pytest.FixtureRequest, store: Session) -> Jumble:
    return Jumble(store, request.param)


def walk(client: Client, **filters: Any) -> list[Page]:
    """Page by page to the end."""
    pages = [client.list_tasks(**filters)]
    while (after := pages[-1].next) is not None:
        pages.append(client.list_tasks(after=after, **filters))
        assert pages[-1].next != after, "it does not get on"
    return pages


def ids_of(pages: list[Page]) -> list[int]:
    return [task.id for page in pages for task in page]


FILTERS: list[tuple[dict[str, Any], Callable[[One], bool]]] = [
    ({}, lambda _: True),
    ({"states": ["pending"]}, lambda one: one.state == "pending"),
    ({"states": ["retrying", "completed"]}, lambda one: one.kind == "retrying" or one.state == "completed"),
    ({"states": ["running", "failed"]}, lambda one: one.state in ("running", "failed")),
    ({"types": ["rare"]}, lambda one: one.type == "rare"),
    (
        {"types": ["rare"], "states": ["completed", "pending"]},
        lambda one: one.type == "rare" and one.state in ("completed", "pending"),
    ),
    ({"queues": ["slow"], "states": ["expired"]}, lambda one: one.type == "other" and one.state == "expired"),
    ({"first_id": 2_000, "last_id": 4_321}, lambda one: 2_000 <= one.id <= 4_321),
    ({"first_id": 5_999, "types": ["other"]}, lambda one: one.id >= 5_999 and one.type == "other"),
    (
        {"last_id": 1_003, "states": ["completed", "pending"]},
        lambda one: one.id <= 1_003 and one.state in ("completed", "pending"),
    ),
    (
        {"created_since": START + timedelta(seconds=3_000), "created_before": START + timedelta(seconds=5_000)},
        lambda one: START + timedelta(seconds=3_000) <= one.created_at < START + timedelta(seconds=5_000),
    ),
    ({"payload_contains": '"n":7}'}, lambda one: one.payload == {"n": 7}),
    (
        {"payload_contains": b'"n":12', "types": ["t"], "created_since": START + timedelta(seconds=4_000)},
        lambda one: (
            one.payload["n"] in (12, *range(120, 130))
            and one.type == "t"
            and one.created_at >= START + timedelta(seconds=4_000)
        ),
    ),
    ({"payload_contains": "nowhere"}, lambda _: False),
]


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("descending", [True, False])
def test_short_pages_hold_every_task_once_in_order(client: Client, jumble: Jumble, *, descending: bool) -> None:
    short = 0
    for filters, matches in FILTERS:
        wanted = sorted(jumble.wanted(matches), reverse=descending)
        pages = walk(client, limit=170, descending=descending, **filters)
        assert ids_of(pages) == wanted, filters
        short += sum(len(page) < 170 for page in pages[:-1])
    assert short > 20, "no page ended before it was full"


@pytest.mark.parametrize("descending", [True, False])
def test_pages_are_full_where_there_is_time(
    client: Client, jumble: Jumble, *, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lists, "ROWS", 1_030)
    monkeypatch.setattr(_lists, "LOOKS", (300, 300))
    monkeypatch.setattr(_lists, "LONG_ENOUGH", 60.0)
    for filters, matches in FILTERS:
        wanted = sorted(jumble.wanted(matches), reverse=descending)
        pages = walk(client, limit=250, descending=descending, **filters)
        assert ids_of(pages) == wanted, filters
        assert all(len(page) == 250 for page in pages[:-1])


@pytest.mark.parametrize("descending", [True, False])
def test_the_order_of_time_within_ids_and_times(client: Client, jumble: Jumble, *, descending: bool) -> None:
    for filters, matches in FILTERS:
        if "payload_contains" in filters:
            with pytest.raises(SettingsError, match="payload_contains"):
                client.list_tasks(order_by="created_at", **filters)
            continue
        found = [one for one in jumble.tasks if matches(one)]
        found.sort(key=lambda one: (one.created_at, one.id), reverse=descending)
        pages = walk(client, limit=1_700, order_by="created_at", descending=descending, **filters)
        assert ids_of(pages) == [one.id for one in found]


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("descending", [False, True], ids=["up", "down"])
def test_rows_that_lie_in_each_other_are_listed_whole_where_a_statements_rows_end_between_them(
    client: Client, store: Session, monkeypatch: pytest.MonkeyPatch, *, descending: bool
) -> None:
    monkeypatch.setattr("fastq._lists.ROWS", 1_100)
    wanted, other = add_lane(store), add_lane(store, "other")
    # On both sides of them as many rows of others as leave room for the first of the two alone.
    rows = [([id_], other) for at in (1_000, 5_000) for id_ in range(at, at + 1_099)]
    rows += [([*range(first, 4_600, 2)], wanted) for first in (4_000, 4_001)]
    tasks = [(id_, START, lane, b"{}") for ids, lane in rows for id_ in ids]
    done = [(ids[0], lane, multirange(ids)) for ids, lane in rows]
    for name, inserted in (("task", tasks), ("done", done)):
        store.sql(INSERTS[name], *(list(column) for column in zip(*inserted, strict=True)))
    pages = walk(client, types=["t"], limit=100, descending=descending)
    assert ids_of(pages) == sorted(range(4_000, 4_600), reverse=descending)


def test_a_listed_task_is_shown_whole(client: Client, jumble: Jumble) -> None:
    by_id = {one.id: one for one in jumble.tasks}
    for page in walk(client, limit=1_000):
        for task in page:
            one = by_id[task.id]
            assert (task.state, task.kind, task.type, task.created_at, task.payload) == (
                one.state,
                one.kind,
                one.type,
                one.created_at,
                one.payload,
            )


@pytest.mark.usefixtures("bounds")
def test_an_async_client_lists_the_same(dsn: str, client: Client, store: Session, jumble: Jumble) -> None:
    with clients.open_client("async", dsn, schema=store.schema) as other:
        for filters, matches in FILTERS[4:6]:
            pages = walk(other, limit=40, **filters)
            assert pages == walk(client, limit=40, **filters)
            assert ids_of(pages) == sorted(jumble.wanted(matches), reverse=True)


@pytest.mark.usefixtures("bounds")
def test_a_task_that_moves_on_between_two_pages_comes_at_most_once(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 1_500, chunk=1))
    rare = add_lane(store, "rare")
    [last] = enqueue(store, lane=rare)
    page = client.list_tasks(types=["rare"], descending=False)
    assert (page.tasks, page.next is not None) == ((), True)
    # What was looked at ends, and what was not is looked at where it is now.
    Worker(store, 1).claim(1_000)
    store.sql("UPDATE fastq.ready SET lane = $1 WHERE hi = $2", rare, ids[-1])
    found = [page]
    while found[-1].next is not None:
        found.append(client.list_tasks(types=["rare"], descending=False, after=found[-1].next))
    assert ids_of(found) == [ids[-1], last]


@pytest.mark.usefixtures("bounds")
@pytest.mark.parametrize("descending", [True, False])
def test_payloads_are_searched_some_mebibytes_at_a_time(
    client: Client, store: Session, monkeypatch: pytest.MonkeyPatch, *, descending: bool
) -> None:
    monkeypatch.setattr(_lists, "LOOKS", (10_000, 10_000))
    # Not to be compressed away.
    payloads = [f'"{random.Random(n).randbytes(500_000).hex()} {n} "'.encode() for n in range(45)]
    ids = [enqueue(store, payload=payload)[0] for payload in payloads]
    wanted = 44 if not descending else 0
    pages = walk(client, payload_contains=f" {wanted} ", descending=descending)
    assert ids_of(pages) == [ids[wanted]]
    assert [len(page) for page in pages] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"first_id": "7"}, SettingsError, "first_id is '7'"),
        ({"last_id": True}, SettingsError, "last_id is True"),
        ({"last_id": 7.0}, SettingsError, "last_id is 7.0"),
        ({"created_since": datetime(2026, 1, 1)}, SettingsError, "created_since is"),  # noqa: DTZ001 - that is wrong with it
        ({"created_before": "yesterday"}, TypeError, "created_before is"),
        ({"payload_contains": ""}, SettingsError, "payload_contains is"),
        ({"payload_contains": 5}, SettingsError, "payload_contains is"),
        ({"payload_contains": "\ud800"}, SettingsError, "payload_contains is"),
    ],
)
def test_filters_that_make_no_sense(
    client: Client, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        client.list_tasks(**arguments)


def test_ids_that_no_task_can_have_match_none(client: Client, store: Session) -> None:
    ids = list(enqueue(store, 3))
    for descending in (True, False):
        assert not client.list_tasks(first_id=10**30, descending=descending).tasks
        assert not client.list_tasks(last_id=-5, descending=descending).tasks
        assert not client.list_tasks(first_id=ids[1], last_id=ids[0], descending=descending).tasks
        assert len(client.list_tasks(first_id=-(10**30), last_id=10**30, descending=descending)) == 3
        assert [task.id for task in client.list_tasks(first_id=ids[1], last_id=ids[1], descending=descending)] == [
            ids[1]
        ]
