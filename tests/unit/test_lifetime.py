"""Waiting for the end of a consumer: the same steps, driven by a thread and by an event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from fastq._lifetime import Bell, News, Steps, drive, drive_async, has_running_loop, refuse_running_loop
from fastq.errors import ConsumerError

Driver = Callable[[Bell, Steps], None]


def _sync(bell: Bell, steps: Steps) -> None:
    drive(bell, steps, signals=True)


def _async(bell: Bell, steps: Steps) -> None:
    asyncio.run(drive_async(bell, steps, signals=True))


both = pytest.mark.parametrize("driver", [_sync, _async])


def _record(*waits: float | None, into: list[News | None]) -> Steps:
    for wait in waits:
        came = yield wait
        into.append(came)


@both
def test_time_runs_out(driver: Driver) -> None:
    seen: list[News | None] = []
    driver(Bell(), _record(0.01, 0, into=seen))
    assert seen == [None, None]


@both
def test_an_end_from_another_thread(driver: Driver) -> None:
    bell, seen = Bell(), list[News | None]()
    timer = threading.Timer(0.05, bell.ring)
    timer.start()
    driver(bell, _record(None, into=seen))
    timer.join()
    assert seen == [News.ENDED]


@both
def test_an_end_that_came_before(driver: Driver) -> None:
    bell, seen = Bell(), list[News | None]()
    bell.ring()
    driver(bell, _record(None, 0.01, into=seen))
    assert seen == [News.ENDED, None]


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_news_and_handlers_are_put_back(driver: Driver, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    seen: list[News | None] = []

    def steps() -> Steps:
        # Two of them, of which the second interrupts the wait itself.
        os.kill(os.getpid(), number)
        seen.append((yield 10.0))
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
        timer.start()
        seen.append((yield 10.0))
        timer.join()

    driver(Bell(), steps())
    assert seen == [News.SIGNAL, News.SIGNAL]
    assert signal.getsignal(number) is before


@both
def test_a_signal_that_does_not_interrupt_the_wait_is_seen(driver: Driver) -> None:
    # Python's part of its handler then has to wait until the main thread wakes up by itself.
    seen: list[News | None] = []
    go = threading.Event()

    def send() -> None:
        go.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()

    def steps() -> Steps:
        go.set()
        started = time.monotonic()
        seen.append((yield 10.0))
        assert time.monotonic() - started < 5

    # So that it goes to the other thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        driver(Bell(), steps())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    sender.join()
    assert seen == [News.SIGNAL]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        seen: list[News | None] = []

        def steps() -> Steps:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append((yield 0.05))

        drive(Bell(), steps(), signals=True)
        assert seen == [None]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_signals_stay_where_they_are() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def steps() -> Steps:
        seen.append(signal.getsignal(signal.SIGTERM))
        yield 0.0

    thread = threading.Thread(target=lambda: drive(Bell(), steps(), signals=True))
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_running_loop_is_seen_in_its_own_thread_alone() -> None:
    assert not has_running_loop()
    refuse_running_loop("x()", "y", ConsumerError)

    async def main() -> None:
        with pytest.raises(ConsumerError, match=r"x\(\) was called where an event loop runs.*use y"):
            refuse_running_loop("x()", "y", ConsumerError)
        assert not await asyncio.to_thread(has_running_loop)

    asyncio.run(main())
