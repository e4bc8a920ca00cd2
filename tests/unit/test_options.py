"""Settings as callers give them."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from fastq._options import (
    ConsumerOptions,
    ProducerOptions,
    read_consumer_options,
    read_count,
    read_duration,
    read_name,
    read_producer_options,
)
from fastq.errors import SettingsError
from fastq.settings import ConsumerSettings, ProducerSettings, resolve_dsn, resolve_schema


def test_every_setting_of_the_engine_can_be_given() -> None:
    own = {"dsn", "schema", "types", "queues", "concurrency"}
    assert {field.name for field in dataclasses.fields(ConsumerSettings)} - own == set(ConsumerOptions.__annotations__)
    assert {field.name for field in dataclasses.fields(ProducerSettings)} - own == set(ProducerOptions.__annotations__)


def test_durations_become_seconds() -> None:
    assert read_consumer_options({"poll_interval": timedelta(seconds=2), "lease": 7}) == {
        "poll_interval": 2.0,
        "lease": 7.0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefetch": 0}, "prefetch is 0, but must be a whole number"),
        ({"prefetch": 1.5}, "prefetch is 1.5"),
        ({"prefetch": True}, "prefetch is True"),
        ({"prefetch_bytes": 2**31}, "prefetch_bytes is"),
        ({"poll_interval": 0}, "poll_interval is 0, but must be more than 0"),
        ({"poll_interval": -1}, "poll_interval is -1"),
        ({"poll_interval": "1"}, "poll_interval is '1'"),
        ({"poll_interval": float("nan")}, "poll_interval is nan"),
        ({"listen": 1}, "listen is 1, but must be True or False"),
        ({"polling": 1}, "unknown setting polling .*did you mean poll_interval"),
        ({"zzz": 1}, "unknown setting zzz .*there are: prefetch"),
        ({"heartbeat_interval": 5}, "dead_after is 9 s, but must be at least twice heartbeat_interval"),
        ({"dead_after": 4}, "dead_after is 4 s"),
        ({"lease": 1}, "lease is 1 s"),
    ],
)
def test_what_a_consumer_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_consumer_options(given)


@pytest.mark.parametrize("given", [{"payload_limit": 0}, {"notify": None}, {"iterable_timeout": 0}, {"listen": True}])
def test_what_a_producer_refuses(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        read_producer_options(given)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b", None, 5, b"x"])
def test_names_that_are_refused(name: Any) -> None:
    with pytest.raises(SettingsError, match="queue"):
        read_name("queue", name)


@pytest.mark.parametrize("name", ["x", "x" * 255, "ü" * 255, "email:send", " "])
def test_names_that_are_taken(name: str) -> None:
    assert read_name("queue", name) == name


def test_counts_and_durations() -> None:
    assert read_count("n", 1) == 1
    assert read_duration("d", 0.5) == 0.5


def test_the_dsn_is_the_argument_else_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_DSN", "host=env")
    assert resolve_dsn("host=arg") == "host=arg"
    assert resolve_dsn(None) == "host=env"
    monkeypatch.delenv("FASTQ_DSN")
    with pytest.raises(SettingsError, match="FASTQ_DSN"):
        resolve_dsn(None)


def test_the_schema_is_the_argument_else_the_variable_else_fastq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTQ_SCHEMA", "env")
    assert resolve_schema("arg") == "arg"
    assert resolve_schema(None) == "env"
    monkeypatch.delenv("FASTQ_SCHEMA")
    assert resolve_schema(None) == "fastq"
