"""A backlog that nobody works off."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from fastq import Enqueued, Producer, Task
from tests.support.faults.needs import need_room
from tests.support.faults.scene import SCHEMA, Scene
from tests.support.faults.server import PrivateServer

_MILLION = 1_000_000
#: GiB of tables and log, with room to spare.
_NEEDED = 9
#: Tasks between two looks at the clock.
_PIECE = 50_000


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_ten_million_tasks_wait_for_a_consumer_that_never_came(tmp_path: Path) -> None:
    """The last million comes in turn with the first million of a server without a backlog: what the machine does meanwhile, it does to
    both."""
    with PrivateServer() as server, Scene(server, tmp_path / "full") as scene, PrivateServer() as other:
        need_room(server.data_dir, _NEEDED, "a backlog of ten million tasks")
        with (
            Scene(other, tmp_path / "empty"),
            Producer(server.dsn, schema=SCHEMA) as full,
            Producer(other.dsn, schema=SCHEMA) as empty,
        ):
            ids = [answer.id for answer in _enqueue(full, 9 * _MILLION)[:: 4 * _MILLION]]
            times: list[tuple[float, float]] = []
            for _ in range(_MILLION // _PIECE):
                began = time.perf_counter()
                first = _enqueue(empty, _PIECE)
                between = time.perf_counter()
                last = _enqueue(full, _PIECE)
                times.append((between - began, time.perf_counter() - between))
                assert len(first) == len(last) == _PIECE
                ids.append(last[-1].id)
            assert len(set(ids)) == len(ids)
            # And one by one it works as ever.
            assert full.enqueue(Task("t", {"n": -1})).is_new
        ratio = sum(first for first, _ in times) / sum(last for _, last in times)
        rates = [(round(_PIECE / first), round(_PIECE / last)) for first, last in times]
        print(f"{ratio:.3f}; tasks/s without and with the backlog, piece by piece: {rates}")  # noqa: T201
        assert ratio >= 0.8, f"tasks/s without and with the backlog, piece by piece: {rates}"
        waiting = scene.value("SELECT sum(hi - lo + 1) FROM ready")
        assert waiting == scene.value("SELECT count(*) FROM task") == 10 * _MILLION + 1


def _enqueue(producer: Producer, count: int) -> Sequence[Enqueued]:
    tasks = (Task("t", {"n": n, "text": "forty bytes or so, as a payload often has"}) for n in range(count))
    return producer.enqueue_many(tasks, commit_every=10_000)
