"""What a type checker makes of the public surface. Never run: mypy reads it, and an ignore that is not needed is an error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import assert_type

import psycopg

import fastq
from fastq import App, AsyncClient, Client, Consumer, Enqueued, Producer, Task, TaskInfo, TaskRecord

app = App("host=nowhere")


@dataclass
class Order:
    id: int


@app.task("email:send", queue="mail", max_attempts=5, timeout=timedelta(seconds=30))
def send(to: str, subject: str = "Hello", *, copy: bool = False) -> int:
    return len(to + subject) + copy


@app.task("report:make")
async def report(day: int) -> str:
    return str(day)


@app.task("order:ship")
def ship(order: Order, *, fast: bool = False) -> None: ...


assert_type(ship.task(Order(1)), Task)
ship.enqueue({"id": 1})  # type: ignore[arg-type]
assert_type(send("a"), int)
assert_type(send.enqueue("a", subject="b", copy=True), Enqueued)
assert_type(send.task(to="a"), Task)
assert_type(send.with_options(delay=60, queue="later").enqueue("a"), Enqueued)
assert_type(report.task(7), Task)

send.enqueue()  # type: ignore[call-arg]
send.enqueue(5)  # type: ignore[arg-type]
send.enqueue("a", cc="b")  # type: ignore[call-arg]
send.task(subject="b")  # type: ignore[call-arg]
send.with_options(weight=1)  # type: ignore[call-arg]
send.with_options(delay=60).enqueue(1)  # type: ignore[arg-type]
app.task("t", retries=1)  # type: ignore[call-arg]
app.consumer(concurrency=4, poll_interval=timedelta(seconds=2))
app.consumer(concurency=4)  # type: ignore[call-arg]


def open_cache() -> Iterator[dict[str, str]]:
    yield {}


@app.task("page:render")
def render(path: str, *, cache: dict[str, str] = fastq.Depends(open_cache)) -> None: ...


@app.on_startup
async def warm_up() -> int:
    return 1


assert_type(render.enqueue("/"), Enqueued)
app.on_shutdown(warm_up)
app.lifespan(open_cache)
app.on_startup(5)  # type: ignore[type-var]
fastq.Depends("cache")  # type: ignore[arg-type]


async def from_async_code(producer: Producer) -> None:
    assert_type(await report(1), str)
    assert_type(await report.aenqueue(1), Enqueued)
    assert_type(await producer.aenqueue(Task("t")), Enqueued)
    await report.aenqueue("x")  # type: ignore[arg-type]

    async def tasks() -> AsyncIterator[Task]:
        yield Task("t")

    assert_type(await producer.aenqueue_tx(object(), Task("t")), Enqueued)
    assert_type(await producer.aenqueue_many_tx(object(), tasks(), notify=False), Sequence[Enqueued])
    assert_type(await producer.aenqueue_many(tasks(), commit_every=10), Sequence[Enqueued])
    async with producer as entered:
        assert_type(entered, Producer)


def parts(producer: Producer, client: Client) -> None:
    id_, is_new = producer.enqueue(Task("t", {"a": 1}, delay=timedelta(minutes=1)))
    assert_type(id_, int)
    assert_type(is_new, bool)
    assert_type(producer.enqueue_tx(object(), Task("t"), notify=True), Enqueued)
    assert_type(producer.enqueue_many_tx(object(), [Task("t")]), Sequence[Enqueued])
    results = producer.enqueue_many(Task("t") for _ in range(3))
    assert_type(results[0], Enqueued)
    assert_type(results[1:], Sequence[Enqueued])
    assert_type(client.get_task(1), TaskRecord)
    client.wait(1, timeout=timedelta(seconds=1), poll_interval=0.5)
    client.wait("1")  # type: ignore[arg-type]
    assert_type(client.cancel_task(1), TaskRecord)
    assert_type(client.retry_task(1), TaskRecord)
    assert_type(client.edit_task(1, payload=None, delay=timedelta(minutes=1)), TaskRecord)
    assert_type(client.cancel_tasks(states=["failed", "scheduled"], ids=range(5)), int)
    assert_type(client.count_tasks("retry", types=["t"]), int)
    client.edit_task(1, weight=2)  # type: ignore[call-arg]
    client.cancel_task("1")  # type: ignore[arg-type]
    client.cancel_tasks(states=["done"])  # type: ignore[list-item]
    client.cancel_tasks(state=["failed"])  # type: ignore[call-arg]
    client.count_tasks("kill", types=["t"])  # type: ignore[arg-type]
    with psycopg.connect() as connection:
        assert_type(client.retry_task_tx(connection, 1), TaskRecord)
        client.delete_task_tx(connection, 1)
    client.cancel_task_tx("connection", 1)  # type: ignore[arg-type]
    try:
        client.delete_task(1)
    except fastq.InvalidTransition as error:
        assert_type(error.task, TaskRecord)
    Task("t", weight=1)  # type: ignore[call-arg]
    Task("t", {}, "queue")  # type: ignore[call-arg]
    producer.enqueue("t")  # type: ignore[arg-type]
    Producer(pool=3)  # type: ignore[call-arg]


async def async_parts(client: AsyncClient) -> None:
    assert_type(await client.get_task(1), TaskRecord)
    assert_type(await client.counts(), dict[str, int])
    assert_type(await client.counts("queue"), dict[str, dict[str, int]])
    assert_type(await client.cancel_tasks(states=["failed", "scheduled"], ids=range(5)), int)
    assert_type((await client.list_tasks(limit=5)).tasks, tuple[TaskRecord, ...])
    client.delete_tasks(states=["done"])  # type: ignore[list-item, unused-coroutine]
    await client.delete_tasks(state=["failed"])  # type: ignore[call-arg]
    async with await psycopg.AsyncConnection.connect() as connection, client as entered:
        assert_type(entered, AsyncClient)
        assert_type(await client.retry_task_tx(connection, 1), TaskRecord)
    with psycopg.connect() as wrong:
        await client.retry_task_tx(wrong, 1)  # type: ignore[arg-type]


consumer = Consumer(queues=["a"], concurrency=8, retry_policy=fastq.ConstantBackoff(5), heartbeat_interval=1.0)
Consumer(queues={"a": 1})  # type: ignore[arg-type]
Consumer(retry_policy=5)  # type: ignore[arg-type]
Consumer(hearbeat_interval=1.0)  # type: ignore[call-arg]


@consumer.handler("t", workers=2, timeout=30)
def handle(task: TaskInfo) -> None:
    assert_type(task.id, int)
    assert_type(task.raw_payload, bytes)
    assert_type(task.payload_as(Order), Order)
    task.attempt = 2  # type: ignore[misc]


@consumer.handler("u")
async def ahandle(task: TaskInfo) -> None: ...


@consumer.handler("v")  # type: ignore[type-var]
def wrong(task: str) -> None: ...


assert_type(handle(task=None), None)  # type: ignore[arg-type]  # a decorated handler stays what it is

fastq.Job  # type: ignore[attr-defined]  # noqa: B018 - what is not there is not there for a checker either
