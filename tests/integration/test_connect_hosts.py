"""Several hosts, the kind of session that is wanted, passwords in files, sockets: both halves make the same of it."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import fastq
from fastq._db import Database
from fastq.errors import ConnectionLost, DatabaseError
from tests.support.connecting import engine_place, engine_refusal, psycopg_refusal, refusals
from tests.support.faults.network import free_port
from tests.support.faults.server import PrivateServer
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def first() -> Iterator[PrivateServer]:
    with PrivateServer() as server:
        yield server


@pytest.fixture(scope="module")
def second(first: PrivateServer) -> Iterator[PrivateServer]:
    """With the same password as the first."""
    with PrivateServer() as server:
        password = str(conninfo_to_dict(first.dsn)["password"])
        with server.superuser() as db:
            db.execute(psycopg.sql.SQL("ALTER ROLE fastq PASSWORD {}").format(password))
        yield server


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def hosts(server: PrivateServer, *ports: int, **words: str | int | None) -> str:
    """The server's string with these ports of loopback for hosts."""
    return make_conninfo(server.dsn, host=",".join(["127.0.0.1"] * len(ports)), port=",".join(map(str, ports)), **words)


def test_the_first_that_answers_is_taken(first: PrivateServer, silent: int) -> None:
    assert refusals(hosts(first, free_port(), first.port)) == (None, None)
    # One that never answers leaves time for the others.
    started = time.monotonic()
    assert engine_refusal(hosts(first, silent, silent, first.port), connect_timeout=8) is None
    assert time.monotonic() - started < 8
    assert psycopg_refusal(hosts(first, silent, first.port), connect_timeout=6) is None


def test_an_error_names_each_host_and_what_it_said(first: PrivateServer, silent: int) -> None:
    closed = free_port()
    dsn = hosts(first, closed, silent)
    for error in (engine_refusal(dsn, connect_timeout=2), psycopg_refusal(dsn, connect_timeout=4)):
        assert isinstance(error, DatabaseError)
        assert error.is_transient
        assert f"127.0.0.1:{closed}: " in str(error)
        assert f"127.0.0.1:{silent}: " in str(error)
        assert "refused" in str(error)


def test_a_host_that_never_answers_is_given_up_in_time(first: PrivateServer, silent: int) -> None:
    for dsn in (hosts(first, silent), hosts(first, silent, sslmode="prefer")):
        started = time.monotonic()
        error = engine_refusal(dsn, connect_timeout=1)
        assert isinstance(error, ConnectionLost)
        assert f"127.0.0.1:{silent}/fastq: no answer" in str(error)
        assert 0.9 < time.monotonic() - started < 6
    started = time.monotonic()
    error = psycopg_refusal(hosts(first, silent), connect_timeout=2)
    assert isinstance(error, DatabaseError)
    assert error.is_transient
    assert time.monotonic() - started < 8


def test_the_strings_own_limit_holds_for_each_host(first: PrivateServer, silent: int) -> None:
    started = time.monotonic()
    assert refusals(hosts(first, silent, first.port, connect_timeout=2)) == (None, None)
    assert 4 <= time.monotonic() - started < 8
    # And ours for all of them.
    started = time.monotonic()
    assert engine_refusal(hosts(first, silent, connect_timeout=60), connect_timeout=1) is not None
    assert psycopg_refusal(hosts(first, silent, connect_timeout=60), connect_timeout=1) is not None
    assert time.monotonic() - started < 6


def test_what_answers_but_is_no_postgresql() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(20)

        def answer() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(8)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        error = engine_refusal(f"host=127.0.0.1 port={port} user=u", connect_timeout=10)
        assert "is no PostgreSQL" in str(error)


def test_a_refused_login_ends_the_attempt(first: PrivateServer) -> None:
    dsn = hosts(first, first.port, free_port(), password="wrong")
    for error in refusals(dsn):
        assert isinstance(error, DatabaseError)
        assert not error.is_transient
        assert "password authentication failed" in str(error)
        assert "refused" not in str(error)


@pytest.fixture(scope="module")
def standby(second: PrivateServer) -> PrivateServer:
    """The second server in recovery."""
    second.stop()
    second.become_standby()
    second.start()
    return second


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        ("any", "standby"),
        ("primary", "first"),
        ("read-write", "first"),
        ("standby", "standby"),
        ("read-only", "standby"),
        ("prefer-standby", "standby"),
    ],
)
def test_the_kind_of_session_that_is_wanted(
    first: PrivateServer, standby: PrivateServer, wanted: str, takes: str
) -> None:
    ports = (standby.port, first.port) if takes == "first" or wanted == "any" else (first.port, standby.port)
    dsn = hosts(first, *ports, target_session_attrs=wanted)
    assert refusals(dsn) == (None, None)
    with Database(dsn, "x") as db:
        port = {"first": first.port, "standby": standby.port}[takes]
        assert db.run("SELECT current_setting('port')::bigint") == [(port,)]
    assert f"127.0.0.1:{port}/" in engine_place(dsn)
    if wanted in ("any", "prefer-standby"):
        return
    # The other one alone is refused, by what it is.
    [other] = [each for each in ports if each != port]
    for error in refusals(hosts(first, other, target_session_attrs=wanted), connect_timeout=2):
        assert isinstance(error, DatabaseError)
        assert error.is_transient


def test_a_standby_is_made_do_without_where_there_is_none(first: PrivateServer) -> None:
    assert refusals(hosts(first, first.port, target_session_attrs="prefer-standby")) == (None, None)


def test_a_role_that_only_reads_is_no_read_write_session(first: PrivateServer) -> None:
    dsn = hosts(first, first.port, target_session_attrs="read-write", options="-c default_transaction_read_only=on")
    engine, cold = refusals(dsn, connect_timeout=2)
    assert "the session is read-only" in str(engine)
    assert cold is not None
    read_only = hosts(
        first, first.port, target_session_attrs="read-only", options="-c default_transaction_read_only=on"
    )
    assert refusals(read_only) == (None, None)


class Pooler:
    """Passes all on to a server, and says as little of its parameters as poolers do: two of them have other names."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                hidden = data.replace(b"in_hot_standby", b"in_hot_nothing").replace(
                    b"default_transaction_read_only\0o", b"default_transaction_read_nope\0o"
                )
                sink.sendall(hidden)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()


@pytest.mark.parametrize(
    ("wanted", "taken"), [("read-write", True), ("primary", True), ("read-only", False), ("standby", False)]
)
def test_a_server_that_does_not_say_what_it_is_is_asked(first: PrivateServer, wanted: str, *, taken: bool) -> None:
    with Pooler(first.port) as pooler:
        found = refusals(hosts(first, pooler.port, target_session_attrs=wanted), connect_timeout=10 if taken else 2)
        assert [each is None for each in found] == [taken, taken], found


def _is_socket(entry: Path) -> bool:
    try:
        return str(entry.readlink()).startswith("socket:")
    except FileNotFoundError:
        return False


def _peer(handle: socket.socket) -> object:
    try:
        return handle.getpeername()
    except OSError:
        return None


def sockets_to(port: int) -> list[socket.socket]:
    """This process's connections to that port of loopback, as further handles to them."""
    # Looked at before any is made: the listing's own handle is among them, and its number is free again.
    entries = [entry for entry in list(Path("/proc/self/fd").iterdir()) if _is_socket(entry)]
    found = []
    for entry in entries:
        with contextlib.suppress(OSError):
            handle = socket.socket(fileno=os.dup(int(entry.name)))
            if handle.family == socket.AF_INET and _peer(handle) == ("127.0.0.1", port):
                found.append(handle)
            else:
                handle.close()
    return found


def count_to(port: int) -> int:
    """How many connections to that port this process has."""
    handles = sockets_to(port)
    for handle in handles:
        handle.close()
    return len(handles)


def watch_of(port: int) -> tuple[int, ...]:
    """How the one connection to that port is watched: on, idle, interval, count, user timeout in ms."""
    [handle] = sockets_to(port)
    with handle:
        tcp = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        alive = handle.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return (alive, *(handle.getsockopt(socket.IPPROTO_TCP, option) for option in tcp))


@pytest.mark.parametrize(
    ("words", "watch"),
    [
        ({}, (1, 10, 5, 3, None)),
        (
            {"keepalives_idle": 7, "keepalives_interval": 2, "keepalives_count": 9, "tcp_user_timeout": 1234},
            (1, 7, 2, 9, 1234),
        ),
    ],
)
def test_a_connection_is_watched(first: PrivateServer, words: dict[str, int], watch: tuple[int | None, ...]) -> None:
    schema = "watched"
    fastq.migrate(first.dsn, schema=schema)
    wait_until(lambda: count_to(first.port) == 0, message="the ends of what other tests had")
    dsn = make_conninfo(first.dsn, **words)
    with fastq.Producer(dsn, schema=schema) as producer:
        producer.enqueue(fastq.Task("t"))
        assert watch_of(first.port) == tuple(30_000 if each is None else each for each in watch)
    wait_until(lambda: count_to(first.port) == 0)
    with Database(dsn, schema):
        assert watch_of(first.port) == tuple(25_000 if each is None else each for each in watch)


def test_a_connection_is_not_watched_where_that_is_asked_for(first: PrivateServer) -> None:
    schema = "watched"
    fastq.migrate(first.dsn, schema=schema)
    wait_until(lambda: count_to(first.port) == 0, message="the ends of what other tests had")
    dsn = make_conninfo(first.dsn, keepalives=0)
    with fastq.Producer(dsn, schema=schema) as producer:
        producer.enqueue(fastq.Task("t"))
        assert watch_of(first.port)[0] == 0


def test_load_is_balanced(first: PrivateServer, second: PrivateServer) -> None:
    dsn = hosts(first, first.port, second.port, load_balance_hosts="random")
    ports = {first.port, second.port}

    def port_of_engine() -> int:
        place = engine_place(dsn)
        [port] = [port for port in ports if f"127.0.0.1:{port}/" in place]
        return port

    def port_of_psycopg() -> int:
        with Database(dsn, "x") as db:
            return int(db.run("SELECT current_setting('port')::bigint")[0][0])

    # By chance alone, one of them is never taken in 1 of 500,000 runs.
    assert {port_of_engine() for _ in range(20)} == ports
    assert {port_of_psycopg() for _ in range(20)} == ports
    ordered = hosts(first, first.port, second.port)
    assert all(f":{first.port}/" in engine_place(ordered) for _ in range(5))


def test_a_name_with_several_addresses(first: PrivateServer) -> None:
    # localhost: ::1, where nobody listens, and 127.0.0.1.
    assert refusals(make_conninfo(first.dsn, host="localhost")) == (None, None)


def test_an_address_spares_the_look_up(first: PrivateServer) -> None:
    assert refusals(make_conninfo(first.dsn, host="no.such.name.invalid", hostaddr="127.0.0.1")) == (None, None)
    for error in refusals(make_conninfo(first.dsn, host="no.such.name.invalid"), connect_timeout=1):
        assert isinstance(error, DatabaseError)
        assert "resolve" in str(error)
        assert "no.such.name.invalid" in str(error)


def test_a_uri_with_all_of_it(first: PrivateServer) -> None:
    words = conninfo_to_dict(first.dsn)
    closed = free_port()
    uri = f"postgresql://fastq:{words['password']}@localhost:{closed},127.0.0.1:{first.port}/fastq?sslmode=disable"
    assert refusals(uri + "&application_name=a%20b&keepalives_idle=7&tcp_user_timeout=1000") == (None, None)


def test_a_unix_socket(first: PrivateServer) -> None:
    assert refusals(first.socket_dsn) == (None, None)
    # Without TLS, whatever is asked for: it goes through no network.
    assert refusals(make_conninfo(first.socket_dsn, sslmode="require")) == (None, None)
    owner = pwd.getpwuid(Path(str(conninfo_to_dict(first.socket_dsn)["host"])).stat().st_uid).pw_name
    assert refusals(make_conninfo(first.socket_dsn, requirepeer=owner)) == (None, None)
    for error in refusals(make_conninfo(first.socket_dsn, requirepeer="nobody-else")):
        assert "requirepeer" in str(error)
    for error in refusals(make_conninfo(first.socket_dsn, host="/nowhere"), connect_timeout=1):
        assert "/nowhere" in str(error)
        assert "No such file" in str(error)


def test_an_abstract_socket() -> None:
    name = f"fastq-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}/.s.PGSQL.5432")
        listener.listen()
        listener.settimeout(10)
        error = engine_refusal(f"host=@{name} user=u", connect_timeout=0.5)
        assert "no answer to the login" in str(error)
        listener.accept()[0].close()


# --- passwords in files ------------------------------------------------------------------------


def without_password(server: PrivateServer, **words: str | int | None) -> str:
    given = conninfo_to_dict(server.dsn)
    del given["password"]
    return make_conninfo("", **{**given, **words})


@pytest.fixture
def passfile(first: PrivateServer, tmp_path: Path) -> Path:
    path = tmp_path / "passfile"
    path.touch(mode=0o600)
    password = conninfo_to_dict(first.dsn)["password"]
    path.write_text(f"# a comment\nother:*:*:*:no\n127.0.0.1:{first.port}:*:fast\\q:{password}\n*:*:*:*:no\n")
    return path


def test_a_passfile(first: PrivateServer, passfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusals(without_password(first, passfile=str(passfile))) == (None, None)
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    assert refusals(without_password(first)) == (None, None)
    monkeypatch.delenv("PGPASSFILE")
    monkeypatch.setenv("HOME", str(passfile.parent))
    passfile.rename(passfile.parent / ".pgpass")
    assert refusals(without_password(first)) == (None, None)


def test_a_passfile_that_others_may_read_is_not_used(first: PrivateServer, passfile: Path) -> None:
    passfile.chmod(0o640)
    engine, cold = refusals(without_password(first, passfile=str(passfile)))
    assert "there is none" in str(engine)
    assert f"{passfile} is not used: others may read it" in str(engine)
    assert cold is not None
    for error in (engine, cold):
        assert isinstance(error, DatabaseError)
        assert not error.is_transient
        assert str(conninfo_to_dict(first.dsn)["password"]) not in str(error)


def test_a_passfile_is_read_again_for_each_connection(first: PrivateServer, passfile: Path, tmp_path: Path) -> None:
    schema = "passfile_test"
    fastq.migrate(first.dsn, schema=schema)
    dsn = without_password(first, passfile=str(passfile), application_name="rotated")
    old = str(conninfo_to_dict(first.dsn)["password"])
    with fastq.Producer(dsn, schema=schema) as producer, first.superuser() as db:
        producer.enqueue(fastq.Task("t"))
        db.execute("ALTER ROLE fastq PASSWORD 'changed'")
        try:
            passfile.write_text("*:*:*:*:changed\n")
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'rotated'"
            assert db.execute(ended).fetchall() == [(True,)]
            wait_until(lambda: db.execute(ended).fetchall() == [])
            producer.enqueue(fastq.Task("t"))
        finally:
            db.execute(psycopg.sql.SQL("ALTER ROLE fastq PASSWORD {}").format(old))


def test_the_environment_counts_where_the_string_is_silent(
    first: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = conninfo_to_dict(first.dsn)
    for variable, word in (
        ("PGHOST", "host"),
        ("PGPORT", "port"),
        ("PGPASSWORD", "password"),
        ("PGDATABASE", "dbname"),
    ):
        monkeypatch.setenv(variable, str(words[word]))
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    assert refusals("user=fastq") == (None, None)
    with Database("user=fastq", "x") as db:
        assert db.run("SHOW client_encoding") == [("UTF8",)]


@pytest.mark.parametrize(("word", "variable"), [("host", "PGHOST"), ("port", "PGPORT"), ("password", "PGPASSWORD")])
def test_what_is_given_empty_is_not_taken_from_the_environment(
    first: PrivateServer, monkeypatch: pytest.MonkeyPatch, word: str, variable: str
) -> None:
    words = {name: str(value) for name, value in conninfo_to_dict(first.dsn).items()}
    monkeypatch.setenv(variable, words.pop(word))
    assert refusals(make_conninfo(**words)) == (None, None)
    engine, cold = refusals(make_conninfo(**words | {word: ""}))
    assert engine is not None
    assert cold is not None


def test_a_service(first: PrivateServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "services.conf"
    lines = [f"{word}={value}" for word, value in conninfo_to_dict(first.dsn).items()]
    path.write_text("\n".join(["[mine]", *lines]))
    monkeypatch.setenv("PGSERVICEFILE", str(path))
    assert refusals("service=mine") == (None, None)
    assert refusals("postgresql://?service=mine") == (None, None)
    monkeypatch.setenv("PGSERVICE", "nosuch")
    assert refusals("service=mine") == (None, None)
    monkeypatch.setenv("PGSERVICE", "mine")
    assert refusals("application_name=a") == (None, None)
