"""A server that is there and says no: full, crowded, without rights, or read-only. Workers say so once, and go on by themselves."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import psycopg
import pytest

from fastq import Producer, Task
from tests.support.faults.needs import miss
from tests.support.faults.network import Proxy
from tests.support.faults.scene import SCHEMA, Load, Promises, Scene, pass_time
from tests.support.faults.server import ROLE, PrivateServer, SmallDisk
from tests.support.faults.takes import Take, Takes
from tests.support.faults.tries import SAYS_WHO, Tries, most_tries
from tests.support.waiting import wait_until

#: Seconds that a fault lasts and how many such tests share the repeats: once shorter than the time after which a silent worker is dead,
#: and again and again longer.
_LONG: Final = [
    pytest.param(3, 1000, id="3 s"),
    pytest.param(20, 4, id="20 s", marks=[pytest.mark.faults, pytest.mark.timeout(600)]),
]

_CONNECTIONS: Final = 30
_WORKERS: Final = 2
#: Of a load, which call.
_THREADS: Final = 6
#: Of one worker: what tries again by itself.
_LOOPS: Final = {"claim": 1, "complete": 1, "control": 2}
#: Seconds after which a call that can't connect, or is refused, is given up; the next one begins anew.
_CALL: Final = 10.0
#: Of a figure.
_UNIT: Final = "of the tries that the pauses allow"

#: Makes a disk of so many MiB.
NewDisk: TypeAlias = Callable[[int], SmallDisk]


@pytest.fixture
def small_disk() -> NewDisk:
    """Misses where this system lets us make none."""
    try:
        SmallDisk(1).close()
    except OSError as error:
        miss(f"a full disk needs a file system of a test's own: {error}")
    return SmallDisk


def _check_complaints(scene: Scene, pattern: str, *, at_most: int = 6) -> None:
    """Each worker said what is wrong, each of its parts once, however often it was tried meanwhile; and that it is over."""
    for worker in scene.workers:
        complaints = scene.complaints(worker)
        assert any(re.search(pattern, line) for line in complaints), complaints
        assert len(complaints) <= at_most, complaints
        # At the latest when the longest pause between two tries is over.
        wait_until(lambda worker=worker: re.search("again$|INFO fastq.leader: over", worker.log, re.MULTILINE))  # type: ignore[misc]


def _check_pauses(tries: Counter[str], seconds: float) -> float:
    """The parts of the workers asked, and with pauses. Gives the greatest share of the tries that the law of these allows."""
    # Heartbeats have their pauses, and upkeep its own. Whoever stores results asks only where there are some.
    allowed = {part: _WORKERS * loops * most_tries(seconds) for part, loops in _LOOPS.items()}
    assert all(tries[part] <= most for part, most in allowed.items()), (tries, allowed, seconds)
    assert tries["claim"] > 0, tries
    assert tries["control"] > 0, tries
    return max(tries[part] / most for part, most in allowed.items())


@pytest.mark.parametrize(("seconds", "share"), _LONG)
def test_rights_that_are_revoked_and_granted_again(takes: Takes, seconds: float, share: int) -> None:
    takes.run(f"rights revoked for {seconds} s", lambda take: _rights(take, seconds), unit=_UNIT, share=share)


def _rights(take: Take, seconds: float) -> float:
    with take.scene(**SAYS_WHO) as scene:
        for _ in range(_WORKERS):
            scene.worker()
        with Load(scene.server.dsn) as load:
            load.wait_for_calls(50)
            take.wait_for_any_moment()
            with scene.server.superuser() as db:
                tries = Tries(scene.server)
                db.execute("REVOKE ALL ON ALL TABLES IN SCHEMA fastq FROM fastq")
                db.execute("REVOKE ALL ON ALL SEQUENCES IN SCHEMA fastq FROM fastq")
                scene.wait_for_complaint("42501")
                pass_time(seconds)
                refused, lasted = tries.refusals("permission denied"), tries.seconds
                db.execute("GRANT ALL ON ALL TABLES IN SCHEMA fastq TO fastq")
                db.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA fastq TO fastq")
            load.wait_for_calls(50)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises)
        _check_complaints(scene, "42501")
        assert {error for error in promises.errors if "42501" not in error} == set()
        return _check_pauses(refused, lasted)


@pytest.mark.parametrize(("seconds", "share"), _LONG)
def test_a_server_in_recovery_that_is_promoted_later(
    takes: Takes, seconds: float, share: int, caplog: pytest.LogCaptureFixture
) -> None:
    all_promises: list[Promises] = []
    takes.run(
        f"a server that only reads for {seconds} s",
        lambda take: _recovery(take, seconds, all_promises),
        unit=_UNIT,
        share=share,
    )
    # A refusal is no doubt.
    errors = [error for promises in all_promises for error in promises.errors]
    assert all("read-only" not in error or "could not be found out" not in error for error in errors)
    said = [record.getMessage() for record in caplog.records if record.name == "fastq.producer"]
    assert sum("read-only" in line for line in said) >= len(all_promises), said
    assert len(said) <= 6 * len(all_promises), said


def _recovery(take: Take, seconds: float, all_promises: list[Promises]) -> float:
    with take.scene(**SAYS_WHO) as scene:
        for _ in range(_WORKERS):
            scene.worker()
        with Load(scene.server.dsn) as load:
            load.wait_for_calls(50)
            take.wait_for_any_moment()
            scene.server.stop("fast")
            scene.server.become_standby()
            tries = Tries(scene.server)
            scene.server.start()
            scene.wait_for_complaint("read-only|recovery")
            pass_time(seconds)
            # It lets everybody in and refuses them all: it is asked with pauses.
            let_in, lasted = tries.connections(), tries.seconds
            scene.server.promote()
            load.wait_for_calls(50)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises)
        _check_complaints(scene, "read-only|recovery")
        all_promises.append(promises)
        # Each call that was under way is a loop, and so is the one at a time that asks for ids, which all later ones wait for.
        calls = 1 + int(lasted / _CALL)
        most = (_THREADS + 1) * most_tries(lasted) + _THREADS * calls
        assert let_in["producer"] <= most, (let_in, lasted, most)
        return max(let_in["producer"] / most, _check_pauses(let_in, lasted))


def test_a_default_of_read_only_transactions_stops_nobody(tmp_path: Path) -> None:
    """Of a role or database that people only look at: a session that is there to write says so."""
    with PrivateServer() as server, Scene(server, tmp_path) as scene:
        with scene.server.superuser() as db:
            db.execute("ALTER DATABASE fastq SET default_transaction_read_only = on")
            db.execute("ALTER ROLE fastq SET default_transaction_read_only = on")
        scene.worker()
        with Load(scene.server.dsn) as load:
            load.wait_for_calls(50)
            promises = load.stop()
        assert promises.errors == []
        scene.wait_until_drained()
        scene.check_worked(promises)


@pytest.mark.parametrize(("seconds", "share"), _LONG)
def test_a_server_whose_connections_are_all_taken(takes: Takes, seconds: float, share: int) -> None:
    takes.run(f"all connections taken for {seconds} s", lambda take: _crowd(take, seconds), unit=_UNIT, share=share)


def _crowd(take: Take, seconds: float) -> float:
    # The server does not say whom it turns away so early: the proxies count.
    with (
        take.scene(max_connections=_CONNECTIONS) as scene,
        Proxy(scene.server.dsn) as to_workers,
        Proxy(scene.server.dsn) as to_load,
    ):
        for _ in range(_WORKERS):
            scene.worker(to_workers.dsn)
        with Load(to_load.dsn) as load:
            load.wait_for_calls(50)
            take.wait_for_any_moment()
            began = time.monotonic()
            before = to_workers.connections, to_load.connections
            with _taken(scene.server):
                scene.wait_for_complaint("too many clients|connection slots")
                pass_time(seconds)
                tries = to_workers.connections - before[0], to_load.connections - before[1]
                lasted = time.monotonic() - began
            load.wait_for_calls(50)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises)
        # What was lost first, and then that no connection could be made.
        _check_complaints(scene, "too many clients|connection slots")
        by_workers, by_load = tries
        most = 3 * _WORKERS * most_tries(lasted)
        assert _WORKERS <= by_workers <= most, (tries, lasted)
        # A call gives up where the next pause, of 5 s at most, would be too long for it.
        calls = 1 + int(lasted / (_CALL - 5))
        assert by_load <= _THREADS * calls * most_tries(min(lasted, _CALL)), (tries, lasted)
        return by_workers / most


@contextlib.contextmanager
def _taken(server: PrivateServer) -> Iterator[None]:
    """Others have all connections, fastq has none."""
    over = threading.Event()
    taken: list[psycopg.Connection] = []

    def take() -> None:
        # Each asks without a pause, so that they are there first when one comes free.
        with contextlib.ExitStack() as connections:
            while not over.is_set():
                with contextlib.suppress(psycopg.OperationalError):
                    connection = psycopg.connect(server.dsn, autocommit=True, application_name="another")
                    connections.enter_context(contextlib.closing(connection))
                    taken.append(connection)

    with server.superuser() as superuser:

        def have_all() -> bool:
            ended = superuser.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND application_name <> 'another'",
                [ROLE],
            )
            # All but those kept for superusers, and the one that this superuser has.
            return ended.rowcount == 0 and len(taken) >= _CONNECTIONS - 4

        others = [threading.Thread(target=take, daemon=True) for _ in range(4)]
        for other in others:
            other.start()
        try:
            wait_until(have_all, timeout=60, message="all connections")
            yield
        finally:
            over.set()
            for other in others:
                other.join(30)


@pytest.mark.parametrize(("seconds", "share"), _LONG)
def test_a_disk_that_is_full_and_gets_room_again(takes: Takes, small_disk: NewDisk, seconds: float, share: int) -> None:
    """Tables can't grow: statements fail, one by one."""
    takes.run(
        f"tables can't grow for {seconds} s",
        lambda take: _full_tables(take, small_disk, seconds),
        unit=_UNIT,
        share=share,
    )


def _full_tables(take: Take, small_disk: NewDisk, seconds: float) -> float:
    with small_disk(256) as disk, take.scene(disk=disk, is_log_apart=True, **SAYS_WHO) as scene:
        for _ in range(_WORKERS):
            scene.worker()
        with Load(scene.server.dsn, bulk_tasks=1_000, payload={"text": "x" * 2_000}) as load:
            load.wait_for_calls(50)
            # Results to store when nothing more gets in: each of them is a row, as they end one by one.
            before = _enqueue_backlog(scene, take)
            take.wait_for_any_moment()
            tries = Tries(scene.server)
            disk.fill()
            wait_until(lambda: any("53100" in error for error in load.promises.errors), timeout=30)
            scene.wait_for_complaint("53100")
            pass_time(seconds)
            refused, lasted = tries.refusals("could not extend file"), tries.seconds
            disk.relieve()
            load.wait_for_calls(50)
            promises = load.stop()
        assert scene.server.is_running
        scene.wait_until_drained(timeout=90)
        scene.check_worked(promises, before)
        # Three parts and the leader's duties.
        _check_complaints(scene, "53100")
        assert sum(refused[part] for part in _LOOPS) >= _WORKERS, refused
        # A row that fits in somewhere begins the pauses anew: seldom.
        most = 2 * _WORKERS * most_tries(lasted)
        assert all(refused[part] <= most for part in _LOOPS), (refused, most)
        return max(refused[part] for part in _LOOPS) / most


def _enqueue_backlog(scene: Scene, take: Take) -> Promises:
    numbers = range(10**9, 10**9 + 4_000)
    rnd = random.Random(take.number)
    with Producer(scene.server.dsn, schema=SCHEMA) as producer:
        tasks = (Task("t", {"n": number, "seconds": rnd.uniform(0.05, 0.3)}) for number in numbers)
        results = producer.enqueue_many(tasks)
    return Promises(acknowledged={number: result.id for number, result in zip(numbers, results, strict=True)})


@pytest.mark.parametrize(("seconds", "share"), _LONG)
def test_a_disk_that_is_too_full_for_the_log(takes: Takes, small_disk: NewDisk, seconds: float, share: int) -> None:
    """The server can't go on at all, nor recover before there is room, and is started by hand."""
    takes.run(f"no room for the log for {seconds} s", lambda take: _full_log(take, small_disk, seconds), share=share)


def _full_log(take: Take, small_disk: NewDisk, seconds: float) -> None:
    # A small log is soon met again: no segment is left over from before.
    with (
        small_disk(256) as disk,
        take.scene(disk=disk, max_wal_size="32MB", min_wal_size="32MB") as scene,
    ):
        server = scene.server
        for _ in range(_WORKERS):
            scene.worker()
        with Load(server.dsn, bulk_tasks=1_000, payload={"text": "x" * 2_000}) as load:
            load.wait_for_calls(50)
            take.wait_for_any_moment()
            with server.superuser() as db:
                while not db.closed:
                    disk.fill()
                    # Fills the log alone, until there is no next segment.
                    with contextlib.suppress(psycopg.OperationalError):
                        db.execute("SELECT pg_logical_emit_message(true, '', repeat('x', 4000000))")
            # The server's words, the operating system's ("Connection reset by peer") or the engine's.
            scene.wait_for_complaint("(?i)connect")
            pass_time(seconds)
            disk.relieve()
            # Within its recovery it may yet find that it can't go on.
            wait_until(lambda: server.is_ready or not server.is_running, timeout=60)
            if not server.is_running:
                server.start()
            load.wait_for_calls(50)
            promises = load.stop()
        assert "PANIC" in server.log_path.read_text()
        scene.wait_until_drained(timeout=90)
        scene.check_worked(promises, may_repeat=True)
        _check_complaints(scene, "(?i)connect", at_most=9)
