"""A worker that starts tasks and ends them when it is told to: DSN SCHEMA CONCURRENCY. Until SIGTERM.

Prints the id of each task that it starts, and when by the monotonic clock, which all processes share. A line on standard input
lets all handlers end, those to come too.
"""

from __future__ import annotations

import asyncio
import sys
import time

from fastq import Consumer, TaskInfo
from fastq.bench._session import TYPE


async def main() -> None:
    dsn, schema, concurrency = sys.argv[1:]
    consumer = Consumer(dsn, schema=schema, concurrency=int(concurrency))
    released = asyncio.Event()

    async def hold(task: TaskInfo) -> None:
        print(task.id, time.monotonic(), flush=True)
        await released.wait()

    async def read() -> None:
        await asyncio.to_thread(sys.stdin.readline)
        released.set()

    consumer.add_handler(TYPE, hold)
    reading = asyncio.create_task(read())
    print("ready", flush=True)
    await consumer.arun()
    reading.cancel()


if __name__ == "__main__":
    asyncio.run(main())
