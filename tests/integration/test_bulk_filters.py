"""Calls for many tasks by priority, ids, times and payloads: they do what they count, and that is what the list shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from fastq import Client, Producer, SettingsError, Task, _lists

WAITS = 1_300


@pytest.fixture
def client(dsn: str, migrated: str) -> Iterator[Client]:
    with Client(dsn, schema=migrated) as client:
        yield client


@pytest.fixture
def ids(dsn: str, migrated: str, db: psycopg.Connection) -> list[int]:
    """Of tasks that wait, in order of ids and times; a third is of priority 5, a seventh has another payload and is delayed."""
    with Producer(dsn, schema=migrated) as producer:
        found = producer.enqueue_many(
            Task(
                "t",
                {"n": n, "text": "needle" if n % 7 == 0 else "hay"},
                priority=5 if n % 3 == 0 else 0,
                delay=3600 if n % 7 == 0 else None,
            )
            for n in range(WAITS)
        )
    db.execute("UPDATE task SET created_at = timestamptz '2026-01-01 00:00+00' + id * interval '1 second'")
    db.execute("UPDATE delayed SET created_at = timestamptz '2026-01-01 00:00+00' + id * interval '1 second'")
    return sorted(task.id for task in found)


def listed(client: Client, **which: Any) -> list[int]:
    ids: list[int] = []
    after = None
    while True:
        page = client.list_tasks(limit=1_000, after=after, descending=False, **which)
        ids += [task.id for task in page]
        if page.next is None:
            return ids
        after = page.next


@pytest.mark.parametrize("looks", [_lists.LOOKS, (50, 50)], ids=["as it is", "in many looks"])
@pytest.mark.parametrize("name", ["ids", "since", "before", "times", "payload", "priority", "all", "none"])
def test_what_is_counted_is_what_is_listed_and_done(
    client: Client, ids: list[int], monkeypatch: pytest.MonkeyPatch, name: str, looks: tuple[int, int]
) -> None:
    monkeypatch.setattr(_lists, "LOOKS", looks)
    at = [client.get_task(ids[n]).created_at for n in (100, 1_100)]
    filters: dict[str, dict[str, Any]] = {
        "ids": {"first_id": ids[150], "last_id": ids[-100]},
        "since": {"created_since": at[0]},
        "before": {"created_before": at[1]},
        "times": {"created_since": at[0], "created_before": at[1], "types": ["t"]},
        "payload": {"payload_contains": '"needle"'},
        "priority": {"priorities": [5]},
        "all": {"first_id": 0},
        "none": {"payload_contains": "not there", "states": ["pending"]},
    }
    which = filters[name]
    expected = listed(client, **which)
    sizes = {"ids": WAITS - 249, "since": WAITS - 100, "before": 1_100, "times": 1_000, "payload": -(-WAITS // 7)}
    assert len(expected) == (sizes | {"priority": -(-WAITS // 3), "all": WAITS, "none": 0})[name]
    assert client.count_tasks(**which) == client.count_tasks("cancel", **which) == len(expected)
    # Half of them are cancelled before: these are not edited.
    before = expected[::2]
    assert client.cancel_tasks(ids=before) == len(before)
    assert client.count_tasks("edit", **which) == client.edit_tasks(delay=60, **which) == len(expected) - len(before)
    assert client.delete_tasks(**which) == len(expected)
    assert listed(client) == sorted({*ids} - {*expected})


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({"first_id": "1"}, "first_id is"),
        ({"payload_contains": ""}, "payload_contains is"),
        ({"priorities": [10]}, "priority is 10"),
        ({"ids": [1], "first_id": 1}, "ids can't be given together with"),
        ({"created_before": None, "priorities": None}, "all tasks are never meant"),
    ],
)
def test_wrong_ones_change_nothing(client: Client, ids: list[int], which: dict[str, Any], message: str) -> None:
    for call in (client.count_tasks, client.cancel_tasks, client.delete_tasks, client.retry_tasks):
        with pytest.raises(SettingsError, match=message):
            call(**which)
    with pytest.raises(TypeError, match="aware datetime"):
        client.delete_tasks(created_before=timedelta(1))  # type: ignore[arg-type]
    assert client.counts()["pending"] == len(ids)
