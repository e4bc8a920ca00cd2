"""JSON Lines for ``fastq enqueue``: what is a task and what is a bad line."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime

import pytest

from fastq import ExponentialBackoff
from fastq.cli._lines import BadLineError, parse, read_lines
from fastq.settings import PAYLOAD_LIMIT
from fastq.task import Task


def test_all_keys() -> None:
    line = {
        "type": "email:send",
        "payload": {"to": "ä"},
        "queue": "mail",
        "delay": 1.5,
        "run_at": "2030-01-01T00:00:00Z",
        "max_attempts": 7,
        "timeout": 30,
        "retry": {"exponential": {"exponent": 2, "maximum": 600}},
        "expires_at": "2030-01-02T00:00:00Z",
        "idempotency_token": "order-17",
        "token_scope": "queue",
        "token_until": "ended",
        "token_ttl": 60,
        "on_conflict": "raise",
    }
    assert parse(json.dumps(line).encode()) == Task(
        "email:send",
        {"to": "ä"},
        queue="mail",
        delay=1.5,
        run_at=datetime(2030, 1, 1, tzinfo=UTC),
        max_attempts=7,
        timeout=30,
        retry=ExponentialBackoff(exponent=2, maximum=600),
        expires_at=datetime(2030, 1, 2, tzinfo=UTC),
        idempotency_token="order-17",
        token_scope="queue",
        token_until="ended",
        token_ttl=60.0,
        on_conflict="raise",
    )


def test_only_the_type_is_needed() -> None:
    assert parse(b'{"type": "t"}') == Task("t")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "it is not JSON: Expecting"),
        (b'"t"', "it is not a JSON object"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"type": "\xff"}', "it is not UTF-8: invalid start byte at byte 11"),
        (b"{}", "'type' is missing"),
        (b'{"type": "t", "weight": 1}', "unknown key 'weight'; there are delay"),
        (b'{"type": ""}', "type has 0 characters"),
        (b'{"type": 5}', "type is 5, but must be a str"),
        (b'{"type": "a\\u0000b"}', "NUL"),
        (b'{"type": "t", "queue": "%s"}' % (b"x" * 256), "queue has 256 characters"),
        (b'{"type": "t", "idempotency_token": ""}', "idempotency_token has 0 characters"),
        (b'{"type": "t", "token_scope": "queue"}', "token_scope without an idempotency_token"),
        (
            b'{"type": "t", "idempotency_token": "x", "token_scope": ["queue"]}',
            "token_scope is .'queue'., but must be one of type, queue",
        ),
        (b'{"type": "t", "idempotency_token": "x", "token_ttl": 0}', "token_ttl is 0"),
        (b'{"type": "t", "idempotency_token": "x", "token_options": null}', "unknown key 'token_options'"),
        (b'{"type": "t", "_extras": null}', "unknown key '_extras'"),
        (b'{"type": "t", "delay": -1}', "delay is -1"),
        (b'{"type": "t", "delay": "soon"}', "delay is 'soon'"),
        (b'{"type": "t", "delay": NaN}', "NaN is no JSON number"),
        (b'{"type": "t", "payload": [Infinity]}', "Infinity is no JSON number"),
        (b'{"type": "t", "payload": 1e999}', "payload|finite|inf"),
        (b'{"type": "t", "payload": "\\ud800"}', "payload|surrogate|UTF-8"),
        (b'{"type": "t", "run_at": "tomorrow"}', "run_at is 'tomorrow', but must be a time such as"),
        (b'{"type": "t", "run_at": "2030-01-01T00:00:00"}', "naive"),
        (b'{"type": "t", "run_at": 5}', "run_at is 5"),
        (b'{"type": "t", "max_attempts": 0}', "max_attempts is 0"),
    ],
)
def test_bad_lines(line: bytes, reason: str) -> None:
    with pytest.raises(BadLineError, match=reason):
        parse(line)


def test_a_payload_at_the_limit_and_one_over_it() -> None:
    # Two quotes are part of it.
    parse(b'{"type": "t", "payload": "%s"}' % (b"x" * (PAYLOAD_LIMIT - 2)))
    with pytest.raises(BadLineError, match="the payload has 1,048,577 bytes"):
        parse(b'{"type": "t", "payload": "%s"}' % (b"x" * (PAYLOAD_LIMIT - 1)))


def test_lines_have_numbers_and_sizes_and_blank_ones_are_passed_over() -> None:
    data = b'\xef\xbb\xbf{"type": "a"}\r\n\n  \n{bad\n{"type": "b"}'
    lines = list(read_lines(io.BytesIO(data)))
    assert [(line.number, line.task.type if line.task else None) for line in lines] == [(1, "a"), (4, None), (5, "b")]
    assert lines[0].size == 18


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_never_ends_is_a_bad_one(end: bytes) -> None:
    endless = b"x" * (20 * PAYLOAD_LIMIT) + end
    lines = list(read_lines(io.BytesIO(endless + (b'{"type": "t"}' if end else b""))))
    assert lines[0].error == "it is longer than 8,388,608 bytes"
    assert lines[0].size == len(endless)
    assert [line.task for line in lines[1:]] == ([Task("t")] if end else [])
