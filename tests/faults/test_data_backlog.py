"""A backlog that nobody works off."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastq import Producer, Task
from tests.support.faults.needs import need_room
from tests.support.faults.scene import SCHEMA, Scene
from tests.support.faults.server import PrivateServer

_MILLION = 1_000_000
#: GiB of tables and log, with room to spare.
_NEEDED = 8


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_ten_million_tasks_wait_for_a_consumer_that_never_came(tmp_path: Path) -> None:
    with PrivateServer() as server, Scene(server, tmp_path) as scene:
        need_room(server.data_dir, _NEEDED, "a backlog of ten million tasks")
        times: list[float] = []

        def made() -> Iterator[Task]:
            for n in itertools.count():
                # At most two batches ahead of what is committed.
                if n % _MILLION == 0:
                    times.append(time.perf_counter())
                    if n == 10 * _MILLION:
                        return
                yield Task("t", {"n": n, "text": "forty bytes or so, as a payload often has"})

        with Producer(server.dsn, schema=SCHEMA) as producer:
            answers = producer.enqueue_many(made(), commit_every=10_000)
            assert len(answers) == 10 * _MILLION
            assert len({answers[0].id, answers[5 * _MILLION].id, answers[-1].id}) == 3
            # And one by one it works as ever.
            assert producer.enqueue(Task("t", {"n": -1})).is_new
        millions = [later - earlier for earlier, later in itertools.pairwise(times)]
        rates = [round(_MILLION / seconds) for seconds in millions]
        print(f"tasks/s, million by million: {rates}")  # noqa: T201
        assert millions[0] / millions[-1] >= 0.8, f"tasks/s, million by million: {rates}"
        waiting = scene.value("SELECT sum(hi - lo + 1) FROM ready")
        assert waiting == scene.value("SELECT count(*) FROM task") == 10 * _MILLION + 1
