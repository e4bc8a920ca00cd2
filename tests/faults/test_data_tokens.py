"""Many loads at once that want the same tokens, in every order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from fastq import Enqueued, Producer, Task
from tests.support.faults.scene import SCHEMA, Scene, repeats
from tests.support.faults.server import PrivateServer
from tests.support.producing import gather

_LOADS = 64


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    # Each load has a connection of its own, and may need a second one while it waits for somebody's token.
    with PrivateServer(max_connections=200) as server, Scene(server, tmp_path) as scene:
        yield scene


def test_sixty_four_loads_with_overlapping_tokens_in_random_order(scene: Scene) -> None:
    _load_at_once(scene, tokens=5_000, tasks=1_500, seed=random.randrange(1_000_000))


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("run", range(repeats(20)))
def test_sixty_four_larger_loads(scene: Scene, run: int) -> None:
    _load_at_once(scene, tokens=20_000, tasks=6_000, seed=run)


def _load_at_once(scene: Scene, *, tokens: int, tasks: int, seed: int) -> None:
    rng = random.Random(seed)
    # With twins within a load, too.
    wanted = [[f"k{rng.randrange(tokens)}" for _ in range(tasks)] for _ in range(_LOADS)]
    every = [rng.choice([None, None, tasks // 7]) for _ in range(_LOADS)]

    def load(producer: Producer, n: int) -> list[Enqueued]:
        made = (Task("t", {"token": token}, idempotency_token=token) for token in wanted[n])
        return list(producer.enqueue_many(made, commit_every=every[n]))

    with ExitStack() as stack:
        producers = [stack.enter_context(Producer(scene.server.dsn, schema=SCHEMA)) for _ in range(4)]
        # Whatever a load raises fails the test: a deadlock that surfaces, or a call that gives up.
        answers = gather([partial(load, producers[n % 4], n) for n in range(_LOADS)], timeout=200.0)
    stored: dict[str, int] = dict(scene.all("SELECT token, id FROM token"))
    asked = {token for tokens_ in wanted for token in tokens_}
    assert stored.keys() == asked, f"seed {seed}"
    for n in range(_LOADS):
        assert [answer.id for answer in answers[n]] == [stored[token] for token in wanted[n]], f"seed {seed}, load {n}"
    assert sum(answer.is_new for each in answers for answer in each) == len(asked), f"seed {seed}"
    found = scene.all("SELECT id, payload::json ->> 'token' FROM tasks")
    assert sorted((token, id_) for id_, token in found) == sorted(stored.items()), f"seed {seed}"
