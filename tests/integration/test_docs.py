"""The README's first screen and the quickstart do what they say: each Python block is run as printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import fastq
from tests.support.waiting import wait_until

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


class Document:
    """A document's blocks, its files written into a folder of their own."""

    def __init__(self, path: Path, folder: Path, dsn: str, schema: str) -> None:
        self.folder = folder
        self.env = {**os.environ, "FASTQ_DSN": dsn, "FASTQ_SCHEMA": schema}
        self.env["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        blocks = _BLOCK.findall(path.read_text(encoding="utf-8"))
        self.shell = [text for language, text in blocks if language == "sh"]
        self.script = ""
        for language, text in blocks:
            if name := _FILE.match(text):
                (folder / name[1]).write_text(text)
            elif language == "python":
                self.script += text + "\n"

    def python(self, *args: str, text: str | None = None) -> str:
        """Runs Python in the folder; gives what it printed."""
        done = subprocess.run(
            [sys.executable, *args],
            check=False,
            input=text,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.env,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class Worker:
    """``fastq worker tasks:app`` in a document's folder."""

    def __init__(self, document: Document) -> None:
        self._output = document.folder / "worker.out"
        with self._output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastq", "worker", "tasks:app"],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=document.folder,
                env=document.env,
            )

    def has_said(self, *lines: str) -> bool:
        assert self.process.poll() is None, self._output.read_text()
        return set(lines) <= set(self._output.read_text().splitlines())

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture
def document(request: pytest.FixtureRequest, tmp_path: Path, dsn: str, migrated: str) -> Document:
    return Document(_ROOT / request.param, tmp_path, dsn, migrated)


@pytest.fixture
def worker(document: Document) -> Iterator[Worker]:
    started = Worker(document)
    yield started
    assert started.stop() == 0


@pytest.mark.parametrize("document", ["README.md"], indirect=True)
def test_readme(document: Document, worker: Worker) -> None:
    document.python("send.py")
    wait_until(
        lambda: worker.has_said("to a@example.com: Hello", "to b@example.com: Hello, five seconds later"),
        timeout=30,
        message="both mails of the README",
    )


@pytest.mark.parametrize("document", ["docs/quickstart.md"], indirect=True)
def test_quickstart_first_task(document: Document, worker: Worker) -> None:
    assert document.python("first.py").startswith("task ")
    command = next(line for text in document.shell for line in text.splitlines() if "email:send '" in line)
    subprocess.run(
        ["sh", "-c", command.replace("fastq ", f"{sys.executable} -m fastq ", 1)],
        check=True,
        cwd=document.folder,
        env=document.env,
        timeout=60,
    )
    wait_until(
        lambda: worker.has_said("to a@example.com: Hello", "the report of 2030-01", "to b@example.com: From a shell"),
        timeout=30,
        message="what the quickstart enqueues first",
    )


@pytest.mark.parametrize("document", ["docs/quickstart.md"], indirect=True)
def test_quickstart_file(document: Document, dsn: str, migrated: str) -> None:
    commands = next(text for text in document.shell if "tasks.jsonl" in text)
    subprocess.run(
        ["sh", "-ec", commands.replace("fastq enqueue", f"{sys.executable} -m fastq enqueue")],
        check=True,
        cwd=document.folder,
        env=document.env,
        timeout=60,
    )
    with fastq.Client(dsn, schema=migrated) as client:
        [task] = client.list_tasks()
    assert (task.type, task.queue) == ("email:send", "mail")


@pytest.mark.parametrize("document", ["docs/quickstart.md"], indirect=True)
def test_quickstart_script(document: Document, dsn: str, migrated: str) -> None:
    # One program, from the blocks in their order; a warning would be an error of the document.
    printed = document.python("-W", "error", "-", text=document.script)
    assert "10000 tasks, the first one" in printed
    with fastq.Client(dsn, schema=migrated) as client:
        counts = client.counts(by="type", states=["pending", "completed", "scheduled"])
    # In bulk, once for the token, two delayed ones, and one from async code.
    assert sum(counts["email:send"].values()) - counts["email:send"]["scheduled"] == 10_000 + 30_000 + 1 + 2 + 1 + 1
    assert counts["email:send"]["scheduled"] == 2


@pytest.mark.parametrize("document", ["docs/results.md"], indirect=True)
def test_results(document: Document, worker: Worker) -> None:
    printed = document.python("-", text=document.script)
    assert printed.splitlines() == ["{'sum': 6, 'count': 3}", "failed ZeroDivisionError: division by zero"]
    assert worker.process.poll() is None


# The handlers' page defines; this enqueues to what it has defined, and works until all is done.
_WORK = """
import time

ship.enqueue(Order(1, Decimal("9.50"), datetime.now(), ["a"]), express=True)
render.enqueue(path="/")
with fastq.Client(app.dsn, schema=app.schema) as client, app.consumer(poll_interval=0.2):
    deadline = time.monotonic() + 20
    while client.counts()["completed"] < 2:
        assert time.monotonic() < deadline, client.counts()
        time.sleep(0.05)
"""


@pytest.mark.parametrize("document", ["docs/handlers.md"], indirect=True)
def test_handlers(document: Document, dsn: str, migrated: str) -> None:
    printed = document.python("-W", "error", "-", text=document.script + _WORK)
    assert printed.splitlines() == [
        "stopped when it was told to",
        "before the first task",
        "9.50",
        "after the last handler has ended",
    ]


# What a Django project has in its settings.
_DJANGO = """
import django
import django.conf
django.conf.settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", **__import__("json").loads(%r)}})
django.setup()
"""


@pytest.mark.parametrize("document", ["docs/tokens.md"], indirect=True)
def test_tokens(document: Document, db: psycopg.Connection) -> None:
    document.python("-", text=document.script)
    assert db.execute("SELECT type, payload FROM tasks ORDER BY id").fetchall() == [
        ("mail", '{"order":17}'),
        ("sync", '{"account":5}'),
        ("index", '{"text":"draft"}'),
    ]


#: Has the handlers of docs/transactions.md run.
_TRANSFER = """
consumer.start()
with fastq.Client(dsn) as client:
    for type_, id_, amount in (("account:credit", 1, 5), ("account:debit", 2, 7)):
        enqueued = producer.enqueue(fastq.Task(type_, {"id": id_, "amount": amount}))
        try:
            client.wait(enqueued.id, timeout=30)
        except fastq.ResultNotKept:
            pass
consumer.stop()
"""


@pytest.mark.parametrize("document", ["docs/transactions.md"], indirect=True)
def test_transactions(document: Document, dsn: str, migrated: str, db: psycopg.Connection) -> None:
    words = conninfo_to_dict(dsn)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}
    database = json.dumps({name: words.get(word) or "" for name, word in names.items()})
    # A URI, which all of the drivers understand; the page's own table is looked up in the test's schema.
    query = urlencode({"host": words["host"], "port": words.get("port") or 5432})
    login = quote(str(words["user"])) + (f":{quote(str(words['password']))}" if words.get("password") else "")
    document.env["FASTQ_DSN"] = f"postgresql://{login}@/{words['dbname']}?{query}"
    db.execute(f'CREATE TABLE "{migrated}".orders (id int)'.encode())
    db.execute(f'CREATE TABLE "{migrated}".account (id int, balance int)'.encode())
    db.execute("INSERT INTO account VALUES (1, 100), (2, 100)")
    script = document.script.replace("INTO orders", f'INTO \\"{migrated}\\".orders')
    script = script.replace("UPDATE account", f'UPDATE \\"{migrated}\\".account')
    printed = document.python("-W", "error", "-", text=f"{_DJANGO % database}{script}\nconnection.close()\n{_TRANSFER}")
    assert printed.strip() == "task 1 is new: True"
    assert [id_ for (id_,) in db.execute("SELECT id FROM orders ORDER BY id").fetchall()] == [17, 18, 19, 20, 21]
    with fastq.Client(dsn, schema=migrated) as client:
        counts = client.counts()
        assert (counts["pending"], counts["completed"]) == (2_000 + 4, 2)
    assert db.execute("SELECT balance FROM account ORDER BY id").fetchall() == [(105,), (93,)]
