"""Connection strings: the engine reads them as libpq does, which psycopg lets us ask."""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from fastq import _engine
from fastq.errors import SettingsError

WORDS: Final = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
VARIABLES: Final = {
    option.envvar.decode(): option.keyword.decode() for option in pq.Conninfo.get_defaults() if option.envvar
}
#: libpq takes what is outside of UTF-8 as it comes, psycopg and we do not; neither takes a NUL.
TEXT: Final = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
PIECES: Final = [
    *("postgresql://", "postgres://", "postgresql:/", "://", "ssl=true", "requiressl=1", "requiressl=0"),
    *(
        "=",
        "=",
        "=",
        "'",
        "\\",
        " ",
        " ",
        "\t",
        "\n",
        "\x0b",
        "\xa0",
        "&",
        "&",
        "?",
        "/",
        ":",
        ",",
        "@",
        "[",
        "]",
        "#",
        "+",
    ),
    *("%20", "%41", "%2F", "%c3%a9", "%", "%0", "%zz", "%00", "%ff", "localhost", "::1", "5432", "db", "a b"),
]


def libpq(text: str) -> dict[str, str] | None:
    """What libpq reads; None: it refuses."""
    try:
        return {word: str(value) for word, value in conninfo_to_dict(text).items()}
    except (psycopg.ProgrammingError, UnicodeDecodeError):
        return None


def engine(text: str) -> dict[str, str] | None:
    """What the engine reads; None: it refuses."""
    try:
        return _engine.parse_dsn(text)[0]
    except SettingsError:
        return None


def quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def escaped(value: str) -> str:
    return "".join(f"\\{char}" if char in "\\'" or char.isspace() else char for char in value)


#: Pieces of strings put together at random: most are no connection string.
NOISE: Final = st.lists(st.sampled_from([*PIECES, *WORDS]) | TEXT, max_size=16).map("".join)
SPACES: Final = st.text(" \t\n", max_size=2)
PAIR: Final = st.builds(
    lambda word, left, right, value: f"{word}{left}={right}{value}",
    st.sampled_from([*WORDS, "nonsense", "requiressl"]),
    SPACES,
    SPACES,
    TEXT | TEXT.map(quoted) | TEXT.map(escaped),
)
PAIRS: Final = st.lists(PAIR, max_size=4).map(" ".join)
#: With some characters percent-encoded, and some that should have been not.
PART: Final = st.lists(
    st.sampled_from(string.ascii_letters + string.digits + "-._ ,[") | st.integers(0, 255).map("%{:02x}".format),
    max_size=6,
).map("".join)
NETLOC: Final = st.builds(
    lambda host, port: host + port,
    PART | st.sampled_from(["[::1]", "[]", "[a", "[a]b"]),
    st.sampled_from(["", ":", ":1", ":a%20"]),
)
URI: Final = st.builds(
    lambda scheme, user, hosts, path, query: scheme + user + ",".join(hosts) + path + query,
    st.sampled_from(["postgresql://", "postgres://"]),
    st.just("") | PART.map("{}@".format) | st.tuples(PART, PART).map(lambda both: f"{both[0]}:{both[1]}@"),
    st.lists(NETLOC, max_size=3),
    st.just("") | PART.map("/{}".format),
    st.just("")
    | st.lists(st.tuples(st.sampled_from([*WORDS, "ssl", "nonsense"]), PART | st.just("true")), max_size=3).map(
        lambda pairs: "?" + "&".join(f"{word}={value}" for word, value in pairs)
    ),
)


@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NOISE | PAIRS | URI)
@example("host='a\\'b' port = 5432")
@example("password= host=h")
@example("host=a\\")
@example("host='a\\")
@example("postgresql://a:b:c@[::1]:1,[fe80::1%25eth0],:3/d/e?ssl=true&sslmode=%20prefer%20")
@example("postgresql://a@b@c/d")
@example("postgresql://h?user=a b")
@example("postgresql://h?user=a=b")
@example("postgresql://h/?&user=a")
@example("")
def test_reads_as_libpq(text: str) -> None:
    assert engine(text) == libpq(text)


def test_the_generated_strings_are_of_both_kinds() -> None:
    """The test above proves nothing on strings that are all refused, or all read."""
    read = []

    @settings(
        max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(PAIRS | URI)
    def look(text: str) -> None:
        read.append(libpq(text))

    look()
    assert sum(each is None for each in read) > 40
    assert sum(len(each or {}) > 1 for each in read) > 40


@pytest.mark.parametrize("word", WORDS)
def test_knows_every_word_of_libpq(word: str) -> None:
    assert engine(f"{word}=x") == {word: "x"}


def test_knows_no_other_word() -> None:
    for word in ("nonsense", "servicefile", "sslMode", "tty", "authtype", ""):
        assert engine(f"{word}=x") == libpq(f"{word}=x")


#: Values that mean something, for each word that the environment has.
VALUES: Final = {
    "PGHOST": ["h", "/run", "a,b"],
    "PGHOSTADDR": ["127.0.0.1,::1"],
    "PGPORT": ["1", "1,2"],
    "PGDATABASE": ["d", ""],
    "PGUSER": ["u"],
    "PGPASSWORD": ["p"],
    "PGPASSFILE": ["/nowhere"],
    "PGOPTIONS": ["-c geqo=off"],
    "PGAPPNAME": ["a"],
    "PGSSLMODE": ["disable"],
    "PGCONNECT_TIMEOUT": ["3"],
    "PGCHANNELBINDING": ["require"],
    "PGTARGETSESSIONATTRS": ["primary"],
    "PGLOADBALANCEHOSTS": ["random"],
    "PGREQUIREPEER": ["postgres"],
    "PGREQUIREAUTH": ["scram-sha-256"],
    "PGSSLSNI": ["0"],
}
#: Without effect for the engine, or with another one: see `sources.rs`.
IGNORED: Final = {"client_encoding", "gssdelegation", "gsslib", "krbsrvname", "sslcompression"}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No variable of PostgreSQL's, and a home without files."""
    for name in list(os.environ):
        if name.startswith("PG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGSYSCONFDIR", str(tmp_path))
    # Without it roots in the test machine's home would be read for every TCP host.
    return monkeypatch


def defaults() -> dict[str, str]:
    """What libpq would use where a string says nothing, but for what is compiled in and what we do not take over."""
    compiled = {option.keyword: option.compiled for option in pq.Conninfo.get_defaults()}
    found = {
        option.keyword.decode(): option.val.decode()
        for option in pq.Conninfo.get_defaults()
        if option.val is not None and option.val != compiled[option.keyword]
    }
    own = {"user", "service"}
    return {word: value for word, value in found.items() if word not in own | IGNORED}


@pytest.mark.parametrize(("variable", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_takes_defaults_from_the_environment(clean: pytest.MonkeyPatch, variable: str, value: str) -> None:
    clean.setenv(variable, value)
    if variable == "PGHOSTADDR" or value == "1,2":
        clean.setenv("PGHOST", "a,b")
    found = _engine.complete_dsn({})
    assert found[VARIABLES[variable]] == value
    found.pop("user", None)
    assert found == defaults()


SERVICES: Final = """
# a comment
[other]
host=no

[mine]
  host=of.service
port=7
sslmode=disable
user=u
options=-c geqo=off
[mine]
dbname=second
[mine too]
dbname=d
"""


@pytest.mark.parametrize("service", ["mine", "other", "mine too"])
@pytest.mark.parametrize("place", ["PGSERVICEFILE", "home", "system"])
def test_takes_defaults_from_a_service(clean: pytest.MonkeyPatch, tmp_path: Path, service: str, place: str) -> None:
    names = {"PGSERVICEFILE": "mine.conf", "home": ".pg_service.conf", "system": "pg_service.conf"}
    path = tmp_path / names[place]
    path.write_text(SERVICES)
    if place == "PGSERVICEFILE":
        clean.setenv("PGSERVICEFILE", str(path))
    clean.setenv("PGSERVICE", service)
    clean.setenv("PGPORT", "9")
    found = _engine.complete_dsn({})
    expected = defaults()
    assert {word: value for word, value in found.items() if word != "user"} == expected
    assert expected["host" if service != "mine too" else "dbname"]
    clean.delenv("PGSERVICE")
    assert _engine.complete_dsn({"service": service}) == found
    assert _engine.complete_dsn({"service": service, "host": "given"})["host"] == "given"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["service", "nowhere", "is defined in no service file"]),
        ("[s]\nhost", ["line 2", "services.conf"]),
        ("[s]\nhost=h\nsecret_stuff=hunter2", ["line 3"]),
        ("[s]\nldap://server/base", ["line 2", "LDAP"]),
    ],
)
def test_says_what_is_wrong_with_a_service(
    clean: pytest.MonkeyPatch, tmp_path: Path, text: str | None, words: list[str]
) -> None:
    name = "nowhere"
    if text is not None:
        name = "s"
        (tmp_path / "services.conf").write_text(text)
        clean.setenv("PGSERVICEFILE", str(tmp_path / "services.conf"))
    with pytest.raises(SettingsError) as caught:
        _engine.complete_dsn({"service": name})
    for word in words:
        assert word in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "secret_stuff" not in str(caught.value)


def test_completes_no_word_that_is_none() -> None:
    with pytest.raises(SettingsError, match="unknown word"):
        _engine.complete_dsn({"nonsense": "x"})


@pytest.mark.parametrize(
    ("dsn", "word"),
    [
        ("host=h sslmode=on", "sslmode"),
        ("host=h gssencmode=require", "gssencmode"),
        ("host=h krbsrvname=x", "krbsrvname"),
        ("host=h client_encoding=LATIN1", "client_encoding"),
        ("host=h port=x", "port"),
        ("host=a,b port=1,2,3", "port has 3"),
        ("host=a hostaddr=127.0.0.1,127.0.0.2", "host has 1"),
        ("host=h connect_timeout=soon", "connect_timeout"),
        ("host=h keepalives_idle=x", "keepalives_idle"),
        ("host=h target_session_attrs=master", "target_session_attrs"),
        ("host=h require_auth=md5,!none", "require_auth"),
        ("host=h require_auth=gss", "require_auth"),
        ("host=h oauth_issuer=x", "oauth_issuer"),
        ("host=h sslkeylogfile=x", "sslkeylogfile"),
        ("host=h sslmode=verify-full sslrootcert=/no/such/root.crt", "/no/such/root.crt"),
        ("host=h sslrootcert=/no/such/root.crt", "sslrootcert"),
        ("host=h sslcert=/no/such/client.crt", "sslcert"),
        ("host=h sslcrl=/no/such.crl sslrootcert=/no/such/root.crt", "sslrootcert"),
        ("host=h sslmode=require sslrootcert=system", "sslrootcert"),
        ("hostaddr=127.0.0.1 sslmode=verify-full", "host"),
        ("host=h ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "ssl_max_protocol_version"),
        ("host=h sslmode=verify-ca", "root.crt"),
    ],
)
@pytest.mark.usefixtures("clean")
def test_names_what_cannot_be_followed(dsn: str, word: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _engine.complete_dsn(_engine.parse_dsn(dsn)[0])
    assert word in str(caught.value)


@pytest.mark.usefixtures("clean")
def test_files_are_not_looked_for_where_there_is_no_tls() -> None:
    for dsn in ("host=/tmp sslrootcert=/no/such", "host=h sslmode=disable sslrootcert=/no/such"):
        _engine.complete_dsn(_engine.parse_dsn(dsn)[0])
