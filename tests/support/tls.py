"""Certificates made for a test, and a PostgreSQL of its own that speaks TLS: the embedded build has none."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import secrets
import shutil
import subprocess
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from psycopg import sql
from psycopg.conninfo import make_conninfo

from fastq.embedded import _home
from fastq.embedded._files import Account, clean_env
from tests.support.faults.server import PrivateServer, new_folder
from tests.support.waiting import wait_until

_NOW: Final = dt.datetime.now(dt.UTC)
_DAY: Final = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as PEM files; the key is for its owner alone."""

    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Issuer:
    """A certificate that signs others."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    path: Path


class Workshop:
    """Makes certificates in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def authority(self, name: str, *, issuer: Issuer | None = None) -> Issuer:
        """A certificate authority: its own root, or under `issuer`."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = (
            _builder(name, key, issuer)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=True,
                    key_cert_sign=True,
                    crl_sign=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .sign(issuer.key if issuer else key, hashes.SHA256())
        )
        path = self.folder / f"{name}.crt"
        path.write_bytes(_pem(cert))
        return Issuer(cert, key, path)

    def pair(
        self,
        file: str,
        name: str,
        issuer: Issuer | None,
        *,
        names: Sequence[str] = (),
        is_client: bool = False,
        is_expired: bool = False,
        is_authority: bool = False,
        password: str | None = None,
        chain: Sequence[Issuer] = (),
    ) -> Pair:
        """A certificate for the subject `name` and the alternative `names` (those that are addresses, as addresses).

        Without an `issuer` it is signed by itself. `chain`: certificates of authorities to put after it.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key, issuer, is_expired=is_expired)
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        if not is_authority:
            usage = ExtendedKeyUsageOID.CLIENT_AUTH if is_client else ExtendedKeyUsageOID.SERVER_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general(each) for each in names]), critical=False
            )
        cert = builder.sign(issuer.key if issuer else key, hashes.SHA256())
        made = Pair(self.folder / f"{file}.crt", self.folder / f"{file}.key")
        made.cert.write_bytes(b"".join([_pem(cert), *(_pem(each.cert) for each in chain)]))
        made.key.touch(mode=0o600)
        sealed = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        made.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed))
        return made

    def revocations(self, issuer: Issuer, *revoked: Pair) -> Path:
        """A revocation list of `issuer` with these certificates on it."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.cert.subject)
        builder = builder.last_update(_NOW - _DAY).next_update(_NOW + _DAY)
        builder = builder.add_extension(x509.CRLNumber(1), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        for pair in revoked:
            serial = x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_NOW - _DAY)
            builder = builder.add_revoked_certificate(entry.build())
        path = self.folder / f"{secrets.token_hex(4)}.crl"
        path.write_bytes(builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path


def _builder(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: Issuer | None, *, is_expired: bool = False
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = issuer.key if issuer else key
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.cert.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOW - 3 * _DAY)
        .not_valid_after(_NOW - _DAY if is_expired else _NOW + 3 * _DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _general(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def find_binaries() -> Path:
    """The folder with a PostgreSQL that was built with TLS: that of ``FASTQ_TEST_PG_BIN``, else one of Debian's.

    Skips the test where there is none; fails it where ``FASTQ_TEST_PG_BIN`` names none.
    """
    named = os.environ.get("FASTQ_TEST_PG_BIN")
    if named:
        assert _has_tls(Path(named)), f"FASTQ_TEST_PG_BIN={named} has no PostgreSQL with TLS"
        return Path(named)
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if _has_tls(folder):
            return folder
    pytest.skip("needs a PostgreSQL with TLS: FASTQ_TEST_PG_BIN, or Debian's in /usr/lib/postgresql")


def _has_tls(folder: Path) -> bool:
    """Whether the programs are there, and the server is linked with OpenSSL."""
    if not all((folder / name).exists() for name in ("postgres", "initdb")):
        return False
    done = subprocess.run(
        ["ldd", str(folder / "postgres")], check=False, capture_output=True, text=True, env=clean_env()
    )
    return "libssl" in done.stdout


# One role a way to log in. Sockets and superusers are the fixture's own.
_ACCESS: Final = """
local all all scram-sha-256
host all postgres 127.0.0.1/32 scram-sha-256
hostssl all tls_only 127.0.0.1/32 scram-sha-256
hostnossl all plain_only 127.0.0.1/32 scram-sha-256
hostssl all by_cert 127.0.0.1/32 cert
host all by_text 127.0.0.1/32 password
host all by_md5 127.0.0.1/32 md5
host all by_trust 127.0.0.1/32 trust
host all fastq 127.0.0.1/32 scram-sha-256
"""
ROLES: Final = ("tls_only", "plain_only", "by_cert", "by_text", "by_md5", "by_trust")


class TlsServer:
    """A `PrivateServer` that speaks TLS, with a role for each way to log in. It shows the certificate that it was last told to."""

    def __init__(self) -> None:
        account = _home._plain_user() if os.geteuid() == 0 else Account(os.geteuid(), os.getegid())
        self._account = account
        self._files = new_folder(account)
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._files, ignore_errors=True)
        with _environment(FASTQ_TEST_PG_BIN=str(find_binaries())):
            self.server = PrivateServer()
        self.password = secrets.token_hex(16)
        with self.server.superuser() as db:
            for role in ROLES:
                name = sql.Identifier(role)
                db.execute(
                    sql.SQL("SET password_encryption = {}").format("md5" if role == "by_md5" else "scram-sha-256")
                )
                db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE fastq").format(name, self.password))
        hba = self.server.data_dir / "pg_hba.conf"
        hba.write_text(_ACCESS)
        self._shown: Pair | None = None
        self._is_on = False

    def show(self, pair: Pair, *, authority: Path) -> None:
        """From now on it shows this certificate, and takes clients' of this authority."""
        if self._shown == pair:
            return
        files = {"ssl_cert_file": pair.cert, "ssl_key_file": pair.key, "ssl_ca_file": authority}
        settings: dict[str, str | float | bool] = {"ssl": True}
        for name, path in files.items():
            made = self._files / f"{secrets.token_hex(4)}-{path.name}"
            made.touch(mode=0o600)
            made.write_bytes(path.read_bytes())
            os.chown(made, self._account.uid, self._account.gid)
            settings[name] = str(made)
        with self.server.superuser() as db:
            before = _loaded(db)
        self.server.conf(**settings)
        wait_until(lambda: self._loaded_now() != before, message="the server's look at its new certificate")
        self._shown = pair

    def _loaded_now(self) -> object:
        with self.server.superuser() as db:
            return _loaded(db)

    def dsn(self, role: str, **words: str | int | None) -> str:
        """Of a role, over TCP, with its password; `words` come last."""
        parts: dict[str, str | int | None] = {
            "host": "localhost",
            "hostaddr": "127.0.0.1",
            "port": self.server.port,
            "user": role,
            "dbname": "fastq",
        }
        return make_conninfo("", **(parts | {"password": self.password} | words))

    def session(self, name: str) -> tuple[str, str] | None:
        """Version of TLS and the client's subject of the session with that application name; empty without TLS."""
        with self.server.superuser() as db:
            row = db.execute(
                "SELECT coalesce(version, ''), coalesce(client_dn, '') FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE application_name = %s",
                [name],
            ).fetchone()
        return None if row is None else (row[0], row[1])

    def close(self) -> None:
        """Ends it, and deletes its data."""
        self.server.close()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _loaded(db: psycopg.Connection) -> object:
    row = db.execute("SELECT pg_conf_load_time()").fetchone()
    assert row is not None
    return row[0]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
