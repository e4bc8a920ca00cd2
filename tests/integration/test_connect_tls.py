"""TLS, against a real server with certificates made for it: both halves of fastq take and refuse the same connection strings."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from psycopg import sql

import fastq
from fastq._db import Database
from fastq.errors import DatabaseError, SettingsError
from tests.support.connecting import refusals
from tests.support.tls import Issuer, Pair, TlsServer, Workshop
from tests.support.waiting import wait_until

KEY_PASSWORD: Final = "open sesame"  # noqa: S105 it is the test's


@dataclasses.dataclass(frozen=True, slots=True)
class Lab:
    """A server, and the certificates around it."""

    server: TlsServer
    shop: Workshop
    ca: Issuer
    other_ca: Issuer
    middle: Issuer
    shows: dict[str, Pair]
    clients: dict[str, Pair]
    files: dict[str, Path]

    def words(self, **words: str) -> dict[str, str]:
        """Words whose values may name files of the lab: `{ca}`, `{good_key}`."""
        return {word: value.format_map(self.files) for word, value in words.items()}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory() as folder, TlsServer() as server:
        shop = Workshop(Path(folder))
        ca, other_ca = shop.authority("ca"), shop.authority("other_ca")
        middle = shop.authority("middle", issuer=ca)
        both = ["localhost", "127.0.0.1"]
        shows = {
            "good": shop.pair("good", "localhost", ca, names=both),
            "wrong_name": shop.pair("wrong_name", "localhost", ca, names=["db.example.com"]),
            "bare_name": shop.pair("bare_name", "LOCALHOST", ca),
            "expired": shop.pair("expired", "localhost", ca, names=both, is_expired=True),
            "revoked": shop.pair("revoked", "localhost", ca, names=both),
            "foreign": shop.pair("foreign", "localhost", other_ca, names=both),
            "own": shop.pair("own", "localhost", None, names=both, is_authority=True),
            "own_expired": shop.pair("own_expired", "localhost", None, is_authority=True, is_expired=True),
            "below": shop.pair("below", "localhost", middle, names=both, chain=[middle]),
            "alone": shop.pair("alone", "localhost", middle, names=both),
        }
        clients = {
            "client": shop.pair("client", "by_cert", ca, is_client=True),
            "stranger": shop.pair("stranger", "somebody", ca, is_client=True),
            "outsider": shop.pair("outsider", "by_cert", other_ca, is_client=True),
            "late": shop.pair("late", "by_cert", ca, is_client=True, is_expired=True),
            "sealed": shop.pair("sealed", "by_cert", ca, is_client=True, password=KEY_PASSWORD),
        }
        open_key = Path(folder) / "open.key"
        open_key.write_bytes(clients["client"].key.read_bytes())
        open_key.chmod(0o644)
        bundle = Path(folder) / "bundle.crt"
        bundle.write_bytes(ca.path.read_bytes() + other_ca.path.read_bytes())
        junk = Path(folder) / "junk.pem"
        junk.write_text("nothing of use\n")
        junk.chmod(0o600)
        files = {"ca": ca.path, "other_ca": other_ca.path, "middle": middle.path, "bundle": bundle, "junk": junk}
        files |= {"open_key": open_key, "missing": Path(folder) / "missing.pem"}
        files |= {"crl": shop.revocations(ca, shows["revoked"]), "other_crl": shop.revocations(other_ca)}
        for name, pair in (shows | clients).items():
            files |= {name: pair.cert, f"{name}_key": pair.key}
        yield Lab(server, shop, ca, other_ca, middle, shows, clients, files)


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No certificates of this machine's user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A connection string, what the server shows, and what both halves make of it."""

    words: dict[str, str]
    shows: str = "good"
    role: str = "tls_only"
    refused: str | None = None
    """What the engine's error says; None: both connect."""

    def __str__(self) -> str:
        words = " ".join(f"{word}={value}" for word, value in self.words.items())
        return f"{self.shows} {self.role} {words}"


FULL: Final = {"sslmode": "verify-full", "sslrootcert": "{ca}"}
CERT: Final = {**FULL, "sslcert": "{client}", "sslkey": "{client_key}", "password": ""}

CASES: Final = [
    # How far each mode checks.
    Case(FULL),
    Case({**FULL, "host": "127.0.0.1"}),
    Case({**FULL, "sslrootcert": "{bundle}"}),
    Case(FULL, "wrong_name", refused='is for "db.example.com", not for "localhost"'),
    Case({**FULL, "host": "db.example.com"}, "wrong_name"),
    Case({**FULL, "host": "DB.EXAMPLE.COM"}, "wrong_name"),
    Case({**FULL, "host": "127.0.0.1"}, "wrong_name", refused="not for"),
    Case(FULL, "bare_name"),
    Case(FULL, "foreign", refused="is not trusted"),
    Case({**FULL, "host": "db.example.com"}, "foreign", refused="is not trusted"),
    Case(FULL, "expired", refused="has expired"),
    Case({**FULL, "sslmode": "verify-ca"}, "wrong_name"),
    Case({**FULL, "sslmode": "verify-ca"}, "foreign", refused="is not trusted"),
    Case({**FULL, "sslmode": "verify-ca"}, "expired", refused="has expired"),
    Case({"sslmode": "require"}, "foreign"),
    Case({"sslmode": "require"}, "expired"),
    Case({"sslmode": "require"}, "own"),
    # Roots that are there are used in every mode, as libpq does.
    Case({"sslmode": "require", "sslrootcert": "{ca}"}, "foreign", refused="is not trusted"),
    Case({"sslmode": "require", "sslrootcert": "{ca}"}, "wrong_name"),
    Case({"sslmode": "prefer", "sslrootcert": "{ca}"}, "foreign", refused="is not trusted"),
    Case({"sslmode": "prefer", "sslrootcert": "{ca}"}, "foreign", role="fastq"),
    Case({"sslmode": "verify-ca"}, refused="root.crt does not exist"),
    # Chains, and certificates that are their own root.
    Case(FULL, "below"),
    Case(FULL, "alone", refused="is not trusted"),
    Case({**FULL, "sslrootcert": "{middle}"}, "below", refused="is not trusted|can't be used"),
    Case({**FULL, "sslrootcert": "{own}"}, "own"),
    Case({**FULL, "sslrootcert": "{own}", "host": "db.example.com"}, "own", refused="not for"),
    Case({**FULL, "sslrootcert": "{own_expired}"}, "own_expired", refused="has expired"),
    # Revocation.
    Case({**FULL, "sslcrl": "{crl}"}),
    Case({**FULL, "sslcrl": "{crl}"}, "revoked", refused="is revoked"),
    Case(FULL, "revoked"),
    Case({**FULL, "sslcrl": "{other_crl}"}, refused="no revocation list"),
    # With TLS and without.
    Case({"sslmode": "disable"}, refused="no encryption"),
    Case({"sslmode": "allow"}),
    Case({"sslmode": "prefer"}),
    Case({}),
    Case({"sslmode": "prefer"}, role="plain_only"),
    Case({"sslmode": "allow"}, role="plain_only"),
    Case({"sslmode": "require"}, role="plain_only", refused="pg_hba.conf"),
    Case({"sslmode": "require", "sslnegotiation": "direct"}, refused="localhost"),
    Case({"ssl_min_protocol_version": "TLSv1.3", "sslmode": "require"}),
    Case({"ssl_max_protocol_version": "TLSv1.2", "sslmode": "require"}),
    Case({"sslmode": "require", "sslsni": "0"}),
    # The client's certificate.
    Case(CERT, role="by_cert"),
    Case({"sslmode": "require"}, role="by_cert", refused="valid client certificate"),
    Case({**CERT, "sslcertmode": "disable"}, role="by_cert", refused="valid client certificate"),
    Case({**CERT, "sslcertmode": "require"}, role="by_cert"),
    Case({**FULL, "sslcertmode": "require"}, refused="sslcertmode"),
    Case({"sslmode": "disable", "sslcertmode": "require"}, role="fastq", refused="sslcertmode"),
    Case(
        {**CERT, "sslcert": "{stranger}", "sslkey": "{stranger_key}"}, role="by_cert", refused="authentication failed"
    ),
    Case(
        {**CERT, "sslcert": "{outsider}", "sslkey": "{outsider_key}"}, role="by_cert", refused="not accept the client"
    ),
    Case({**CERT, "sslcert": "{late}", "sslkey": "{late_key}"}, role="by_cert", refused="not accept the client"),
    Case({**CERT, "sslkey": "{stranger_key}"}, role="by_cert", refused="does not belong"),
    Case({**CERT, "sslkey": "{open_key}"}, role="by_cert", refused="may be read by others"),
    Case({**CERT, "sslkey": "{missing}"}, role="by_cert", refused="missing.pem does not exist"),
    Case({**CERT, "sslkey": "{junk}"}, role="by_cert", refused="no private key"),
    Case({**CERT, "sslcert": "{missing}"}, role="by_cert", refused="missing.pem does not exist"),
    Case({**CERT, "sslcert": "{junk}"}, role="by_cert", refused="sslcert .*junk.pem"),
    Case({**FULL, "sslrootcert": "{junk}"}, refused="sslrootcert .*junk.pem"),
    Case({**FULL, "sslrootcert": "{missing}"}, refused="missing.pem does not exist"),
    Case({**FULL, "sslcrl": "{missing}"}, refused="missing.pem does not exist"),
    Case(
        {**CERT, "sslcert": "{sealed}", "sslkey": "{sealed_key}", "sslpassword": KEY_PASSWORD},
        role="by_cert",
    ),
    Case(
        {**CERT, "sslcert": "{sealed}", "sslkey": "{sealed_key}", "sslpassword": "hunter2"},
        role="by_cert",
        refused="sslpassword does not open it",
    ),
    Case({**CERT, "sslcert": "{sealed}", "sslkey": "{sealed_key}"}, role="by_cert", refused="sslpassword is missing"),
    # How to log in.
    Case({**FULL, "channel_binding": "require"}),
    Case({**FULL, "channel_binding": "disable"}),
    Case({"sslmode": "disable", "channel_binding": "require"}, role="fastq", refused="channel_binding"),
    Case({**FULL, "channel_binding": "require"}, role="by_text", refused="channel_binding"),
    Case({**FULL, "channel_binding": "require"}, role="by_trust", refused="channel_binding"),
    Case({**FULL, "require_auth": "scram-sha-256"}),
    Case({**FULL, "require_auth": "scram-sha-256"}, role="by_text", refused='"password".*require_auth'),
    Case({**FULL, "require_auth": "!password,!md5"}, role="by_md5", refused='"md5".*require_auth'),
    Case({**FULL, "require_auth": "md5,password"}, role="by_md5"),
    Case({**FULL, "require_auth": "password"}, role="by_text"),
    Case({**FULL, "require_auth": "!none"}, role="by_trust", refused='"none".*require_auth'),
    Case({**FULL, "require_auth": "none"}, role="by_trust"),
    Case({**FULL, "password": "hunter2"}, refused="password authentication failed"),
    Case({**FULL, "password": ""}, refused="asks for a password, and there is none"),
]


def dsn_of(lab: Lab, case: Case) -> str:
    words: dict[str, Any] = lab.words(**case.words)
    if case.role == "fastq":
        words = {"password": _password_of_owner(lab)} | words
    return lab.server.dsn(case.role, **words)


def _password_of_owner(lab: Lab) -> str:
    found = re.search(r"password=(\S+)", lab.server.server.dsn)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_halves_take_and_refuse_the_same(lab: Lab, case: Case) -> None:
    lab.server.show(lab.shows[case.shows], authority=lab.ca.path)
    dsn = dsn_of(lab, case)
    engine, cold = refusals(dsn)
    if case.refused is None:
        assert (engine, cold) == (None, None)
        return
    assert engine is not None, "the engine let it pass"
    assert cold is not None, "psycopg let it pass"
    assert re.search(case.refused, str(engine)), engine
    for error in (engine, cold):
        assert isinstance(error, SettingsError | DatabaseError)
        assert not (isinstance(error, DatabaseError) and error.is_transient), error
        for secret in (lab.server.password, "hunter2", KEY_PASSWORD):
            assert secret not in str(error)


@pytest.fixture
def schema(lab: Lab) -> Iterator[str]:
    name = "of_this_test"
    fastq.migrate(lab.server.server.dsn, schema=name)
    with lab.server.server.superuser() as db:
        for what in ("USAGE ON SCHEMA {0}", "ALL ON ALL TABLES IN SCHEMA {0}", "ALL ON ALL SEQUENCES IN SCHEMA {0}"):
            db.execute(sql.SQL("GRANT " + what + " TO {1}").format(sql.Identifier(name), sql.Identifier("by_cert")))
    yield name
    with Database(lab.server.server.dsn, name) as db:
        db.drop_schema()


@pytest.mark.parametrize(
    ("words", "version"),
    [
        ({}, "TLSv1.3"),
        ({"ssl_max_protocol_version": "TLSv1.2"}, "TLSv1.2"),
        ({"sslmode": "disable"}, ""),
    ],
)
def test_a_session_is_as_encrypted_as_was_asked_for(lab: Lab, schema: str, words: dict[str, str], version: str) -> None:
    lab.server.show(lab.shows["good"], authority=lab.ca.path)
    password = _password_of_owner(lab)
    dsn = lab.server.dsn("fastq", password=password, application_name="seen", **(lab.words(**FULL) | words))
    with fastq.Producer(dsn, schema=schema) as producer:
        producer.enqueue(fastq.Task("t"))
        assert lab.server.session("seen") == (version, "")


def test_tasks_are_enqueued_and_run_with_a_certificate_alone(lab: Lab, schema: str) -> None:
    lab.server.show(lab.shows["good"], authority=lab.ca.path)
    dsn = lab.server.dsn("by_cert", application_name="run", channel_binding="prefer", **lab.words(**CERT))
    ran: list[Any] = []
    consumer = fastq.Consumer(dsn, schema=schema)
    consumer.handler("t")(lambda task: ran.append(task.payload))
    with fastq.Producer(dsn, schema=schema) as producer, consumer:
        # By COPY too: more than one TLS record.
        producer.enqueue_many([fastq.Task("t", {"n": n, "text": "x" * 1000}) for n in range(2000)])
        wait_until(lambda: len(ran) == 2000, timeout=30)
        session = lab.server.session("run")
        assert session is not None
        assert session[1] == "/CN=by_cert"
    assert sorted(each["n"] for each in ran) == list(range(2000))


def test_certificates_at_their_usual_places(lab: Lab, no_home: Path) -> None:
    lab.server.show(lab.shows["good"], authority=lab.ca.path)
    folder = no_home / ".postgresql"
    folder.mkdir()
    pair = lab.clients["client"]
    for name, path in (("root.crt", lab.ca.path), ("postgresql.crt", pair.cert), ("postgresql.key", pair.key)):
        made = folder / name
        made.touch(mode=0o600)
        made.write_bytes(path.read_bytes())
    dsn = lab.server.dsn("by_cert", sslmode="verify-full", password="")
    assert refusals(dsn) == (None, None)
    (folder / "root.crl").write_bytes(lab.shop.revocations(lab.ca, lab.shows["good"]).read_bytes())
    engine, cold = refusals(dsn)
    assert "is revoked" in str(engine)
    assert cold is not None


def test_the_systems_roots(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.server.show(lab.shows["good"], authority=lab.ca.path)
    dsn = lab.server.dsn("tls_only", sslrootcert="system")
    monkeypatch.setenv("SSL_CERT_FILE", str(lab.ca.path))
    monkeypatch.setenv("SSL_CERT_DIR", str(lab.ca.path.parent / "nowhere"))
    assert refusals(dsn) == (None, None)
    # They ask for the name without being told to.
    lab.server.show(lab.shows["wrong_name"], authority=lab.ca.path)
    engine, cold = refusals(dsn)
    assert "not for" in str(engine)
    assert cold is not None


def test_a_folder_of_revocations(lab: Lab, tmp_path: Path) -> None:
    # libpq wants OpenSSL's names for the files; the engine takes those and any other.
    lab.server.show(lab.shows["revoked"], authority=lab.ca.path)
    (tmp_path / "a.r0").write_bytes(lab.files["crl"].read_bytes())
    dsn = lab.server.dsn("tls_only", sslcrldir=str(tmp_path), **lab.words(**FULL))
    assert "is revoked" in str(refusals(dsn)[0])


def test_renewed_files_are_read_at_the_next_connection(lab: Lab, schema: str, tmp_path: Path) -> None:
    lab.server.show(lab.shows["good"], authority=lab.ca.path)
    roots = tmp_path / "roots.crt"
    roots.write_bytes(lab.ca.path.read_bytes())
    words = {"sslmode": "verify-full", "sslrootcert": str(roots), "application_name": "renewed"}
    dsn = lab.server.dsn("fastq", password=_password_of_owner(lab), **words)
    with fastq.Producer(dsn, schema=schema) as producer:
        producer.enqueue(fastq.Task("t"))
        lab.server.show(lab.shows["foreign"], authority=lab.ca.path)
        roots.write_bytes(lab.other_ca.path.read_bytes())
        with lab.server.server.superuser() as db:
            db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'renewed'")
        wait_until(lambda: lab.server.session("renewed") is None)
        producer.enqueue(fastq.Task("t"))
        assert lab.server.session("renewed") == ("TLSv1.3", "")
