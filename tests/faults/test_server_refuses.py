"""A server that is there and says no: full, crowded, without rights, or read-only. Workers say so once, and go on by themselves."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.support.faults.scene import Load, Scene, pass_time
from tests.support.faults.server import ROLE, PrivateServer, SmallDisk
from tests.support.waiting import wait_until

#: Seconds that a fault lasts: shorter and longer than the time after which a silent worker is dead.
_LONG: Final = [3, pytest.param(20, marks=[pytest.mark.faults, pytest.mark.timeout(240)])]

_CONNECTIONS: Final = 30


@pytest.fixture
def server() -> Iterator[PrivateServer]:
    with PrivateServer() as server:
        yield server


@pytest.fixture
def scene(server: PrivateServer, tmp_path: Path) -> Iterator[Scene]:
    with Scene(server, tmp_path) as scene:
        yield scene


def _check_complaints(scene: Scene, pattern: str, *, at_most: int = 6) -> None:
    """Each worker said what is wrong, each of its parts once, however often it was tried meanwhile; and that it is over."""
    for worker in scene.workers:
        complaints = scene.complaints(worker)
        assert any(re.search(pattern, line) for line in complaints), complaints
        assert len(complaints) <= at_most, complaints
        # At the latest when the longest pause between two tries is over.
        wait_until(lambda worker=worker: re.search("again$|INFO fastq.leader: over", worker.log, re.MULTILINE))  # type: ignore[misc]


@pytest.mark.parametrize("seconds", _LONG)
def test_rights_that_are_revoked_and_granted_again(scene: Scene, seconds: float) -> None:
    for _ in range(2):
        scene.worker()
    with Load(scene.server.dsn) as load:
        load.wait_for_calls(50)
        with scene.server.superuser() as db:
            db.execute("REVOKE ALL ON ALL TABLES IN SCHEMA fastq FROM fastq")
            db.execute("REVOKE ALL ON ALL SEQUENCES IN SCHEMA fastq FROM fastq")
            scene.wait_for_complaint("42501")
            pass_time(seconds)
            db.execute("GRANT ALL ON ALL TABLES IN SCHEMA fastq TO fastq")
            db.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA fastq TO fastq")
        load.wait_for_calls(50)
        promises = load.stop()
    scene.wait_until_drained()
    scene.check_worked(promises)
    _check_complaints(scene, "42501")
    assert {error for error in promises.errors if "42501" not in error} == set()


@pytest.mark.parametrize("seconds", _LONG)
def test_a_server_in_recovery_that_is_promoted_later(
    scene: Scene, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        scene.worker()
    with Load(scene.server.dsn) as load:
        load.wait_for_calls(50)
        scene.server.stop("fast")
        scene.server.become_standby()
        scene.server.start()
        scene.wait_for_complaint("read-only|recovery")
        lost = load.reconnects
        pass_time(seconds)
        # It lets everybody in and refuses them all: it is asked with pauses.
        # Six threads; without pauses it is hundreds a second.
        assert load.reconnects - lost <= 40 + 40 * seconds
        scene.server.promote()
        load.wait_for_calls(50)
        promises = load.stop()
    scene.wait_until_drained()
    scene.check_worked(promises)
    _check_complaints(scene, "read-only|recovery")
    # A refusal is no doubt.
    assert all("read-only" not in error or "could not be found out" not in error for error in promises.errors)
    said = [record.getMessage() for record in caplog.records if record.name == "fastq.producer"]
    assert any("read-only" in line for line in said), said
    assert len(said) <= 6, said


def test_a_default_of_read_only_transactions_stops_nobody(scene: Scene) -> None:
    """Of a role or database that people only look at: a session that is there to write says so."""
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


@pytest.mark.parametrize("seconds", _LONG)
def test_a_server_whose_connections_are_all_taken(tmp_path: Path, seconds: float) -> None:
    with PrivateServer(max_connections=_CONNECTIONS) as server, Scene(server, tmp_path) as scene:
        for _ in range(2):
            scene.worker()
        with Load(server.dsn) as load:
            load.wait_for_calls(50)
            with _taken(server):
                scene.wait_for_complaint("too many clients|connection slots")
                pass_time(seconds)
            load.wait_for_calls(50)
            promises = load.stop()
        scene.wait_until_drained()
        scene.check_worked(promises)
        # What was lost first, and then that no connection could be made.
        _check_complaints(scene, "too many clients|connection slots")


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


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(256)
    except OSError as error:
        pytest.skip(f"a full disk needs a file system of a test's own: {error}")
    with disk:
        yield disk


@pytest.mark.parametrize("seconds", _LONG)
def test_a_disk_that_is_full_and_gets_room_again(disk: SmallDisk, tmp_path: Path, seconds: float) -> None:
    """Tables can't grow: statements fail, one by one."""
    with PrivateServer(disk=disk, is_log_apart=True) as server, Scene(server, tmp_path) as scene:
        for _ in range(2):
            scene.worker()
        with Load(server.dsn, bulk_tasks=1_000, payload={"text": "x" * 2_000}) as load:
            load.wait_for_calls(50)
            disk.fill()
            wait_until(lambda: any("53100" in error for error in load.promises.errors), timeout=30)
            pass_time(seconds)
            disk.relieve()
            load.wait_for_calls(50)
            promises = load.stop()
        assert server.is_running
        scene.wait_until_drained(timeout=90)
        scene.check_worked(promises)
        for worker in scene.workers:
            # Three parts and the leader's duties.
            assert len(scene.complaints(worker)) <= 6, scene.complaints(worker)


@pytest.mark.parametrize("seconds", _LONG)
def test_a_disk_that_is_too_full_for_the_log(disk: SmallDisk, tmp_path: Path, seconds: float) -> None:
    """The server can't go on at all, nor recover before there is room, and is started by hand."""
    # A small log is soon met again: no segment is left over from before.
    with PrivateServer(disk=disk, max_wal_size="32MB", min_wal_size="32MB") as server, Scene(server, tmp_path) as scene:
        for _ in range(2):
            scene.worker()
        with Load(server.dsn, bulk_tasks=1_000, payload={"text": "x" * 2_000}) as load:
            load.wait_for_calls(50)
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
