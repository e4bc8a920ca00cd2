"""Tasks on their way from an event loop to the thread that writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from fastq._feed import Cancelled, Feed, Switch
from fastq.errors import EnqueueError
from fastq.task import Task

pytestmark = pytest.mark.asyncio


async def _numbers(count: int, *, pause_each: int = 0) -> AsyncIterator[Task]:
    for number in range(count):
        if pause_each and number % pause_each == 0:
            await asyncio.sleep(0)
        yield Task("t", number)


async def _drain(feed: Feed) -> list[object]:
    pump = asyncio.create_task(feed.pump())
    try:
        return await asyncio.to_thread(lambda: [task.payload for task in feed])
    finally:
        pump.cancel()
        await asyncio.wait([pump])


@pytest.mark.parametrize("pause_each", [0, 1, 7])
async def test_all_arrive_in_order(pause_each: int) -> None:
    assert await _drain(Feed(_numbers(10_000, pause_each=pause_each), None, 10)) == list(range(10_000))


async def test_nothing_is_nothing() -> None:
    assert await _drain(Feed(_numbers(0), None, 10)) == []


async def test_what_it_raises_is_raised_after_what_it_gave() -> None:
    async def broken() -> AsyncIterator[Task]:
        yield Task("t", 1)
        raise ValueError("broken")

    feed, seen = Feed(broken(), None, 10), list[object]()

    def read() -> None:
        seen.extend(task.payload for task in feed)

    pump = asyncio.create_task(feed.pump())
    with pytest.raises(ValueError, match="broken"):
        await asyncio.to_thread(read)
    await pump


async def test_a_slow_task_does_not_wait_for_its_neighbours() -> None:
    release = asyncio.Event()

    async def slow() -> AsyncIterator[Task]:
        yield Task("t", 1)
        await release.wait()
        yield Task("t", 2)

    feed = Feed(slow(), None, 10)
    pump = asyncio.create_task(feed.pump())
    items: Iterator[Task] = iter(feed)
    assert (await asyncio.to_thread(next, items)).payload == 1
    release.set()
    assert (await asyncio.to_thread(next, items)).payload == 2
    await pump


async def test_it_holds_no_more_than_it_has_room_for() -> None:
    given = 0

    async def endless() -> AsyncIterator[Task]:
        nonlocal given
        while True:
            given += 1
            yield Task("t", given)

    pump = asyncio.create_task(Feed(endless(), None, 10).pump())
    while True:
        before = given
        for _ in range(10):
            await asyncio.sleep(0)
        if given == before:
            break
    assert 2048 < given <= 2048 + 256
    pump.cancel()
    await asyncio.wait([pump])


@pytest.mark.parametrize(("commit_every", "given"), [(None, 1), (2, 3)])
async def test_silence_in_an_open_transaction_is_an_error(commit_every: int | None, given: int) -> None:
    async def silent() -> AsyncIterator[Task]:
        for number in range(given):
            yield Task("t", number)
        await asyncio.Event().wait()

    with pytest.raises(EnqueueError, match=r"gave nothing for 0\.05 s"):
        await _drain(Feed(silent(), commit_every, 0.05))


async def test_silence_between_transactions_is_none() -> None:
    release = asyncio.Event()

    async def paused() -> AsyncIterator[Task]:
        yield Task("t", 1)
        await release.wait()
        yield Task("t", 2)

    feed = Feed(paused(), 1, 0.05)
    asyncio.get_running_loop().call_later(0.2, release.set)
    assert await _drain(feed) == [1, 2]


async def test_a_cancelled_pump_ends_the_thread() -> None:
    feed = Feed(_numbers(10**9, pause_each=1), None, 10)
    pump = asyncio.create_task(feed.pump())
    reading = asyncio.get_running_loop().run_in_executor(None, lambda: sum(1 for _ in feed))
    await asyncio.sleep(0)
    pump.cancel()
    with pytest.raises(Cancelled):
        await reading


async def test_a_switch_ends_an_iteration() -> None:
    def endless() -> Iterator[Task]:
        while True:
            yield Task("t")

    switch = Switch(endless())
    items = iter(switch)
    next(items)
    switch.switch_off()
    with pytest.raises(Cancelled):
        next(items)
    # Also one that has given all it had: its transaction is not yet committed.
    switch = Switch([Task("t")])
    items = iter(switch)
    next(items)
    switch.switch_off()
    with pytest.raises(Cancelled):
        next(items)
