"""What the README's table promises, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Run = dict[str, Any]
"""What one run of a measurement printed."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A command that prints one JSON object."""

    name: str
    command: tuple[str, ...]
    """Arguments of the Python interpreter."""
    runs: int = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """One promise: the median of what the runs say, against a target."""

    what: str
    of: tuple[str, ...]
    """The measurements that it is made from, run by run."""
    value: Callable[..., float]
    """Of one run of each of them."""
    target: float | None
    """None: there is none, it is only told."""
    at_most: bool
    form: str = "{:,.0f}"
    unit: str = ""

    def holds(self, median: float) -> bool:
        """Whether the target is met; also where there is none."""
        if self.target is None:
            return True
        return median <= self.target if self.at_most else median >= self.target


def _bench(name: str, *options: str, runs: int = 5) -> Measurement:
    return Measurement(name, ("-m", "fastq", "bench", *options, "--json"), runs)


def _row(name: str) -> Measurement:
    return Measurement(name, ("-m", f"benches.rows.{name.replace('-', '_')}"))


MEASUREMENTS: tuple[Measurement, ...] = (
    _bench("drain-sync", "drain", "--tasks", "1000000"),
    _bench("drain-async", "drain", "--tasks", "1000000", "--handler", "async"),
    _bench("steady", "steady", "--seconds", "30"),
    _bench("enqueue", "enqueue", "--tasks", "1000000"),
    _bench("enqueue-tokens", "enqueue", "--tasks", "1000000", "--tokens"),
    _bench("single-coroutines", "single", "--coroutines", "64"),
    _bench("single-threads", "single", "--threads", "16"),
    _bench("latency", "latency"),
    _bench("snapshot", "snapshot", "--seconds", "120", runs=3),
    _bench("work-sync", "drain", "--work-ms", "1", "--concurrency", "16"),
    _bench("work-async", "drain", "--work-ms", "1", "--concurrency", "16", "--handler", "async"),
    _bench("lists", "lists", runs=3),
    _bench("lists-one-by-one", "lists", "--one-by-one", runs=3),
    _bench("foreign", "foreign", runs=1),
    _bench("foreign-one-by-one", "foreign", "--one-by-one", runs=1),
    _bench("foreign-same-queue", "foreign", "--same-queue", runs=1),
    _bench("foreign-same-queue-one-by-one", "foreign", "--same-queue", "--one-by-one", runs=1),
    _bench("batch1", "batch1", runs=3),
    _row("slow-beside-fast"),
    _row("delayed"),
    _row("kill"),
    _row("worker-memory"),
    _row("producer-memory"),
    _row("payload-memory"),
)


def _of(key: str) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        return float(run[key])

    return value


def _sum(key: str) -> Callable[[Run, Run], float]:
    def value(one: Run, other: Run) -> float:
        return float(one[key]) + float(other[key])

    return value


def _at_least(what: str, of: str, key: str, target: float, *, unit: str = " tasks/s", form: str = "{:,.0f}") -> Figure:
    return Figure(what, (of,), _of(key), target, at_most=False, form=form, unit=unit)


def _at_most(what: str, of: str, key: str, target: float | None, *, unit: str, form: str = "{:,.2f}") -> Figure:
    return Figure(what, (of,), _of(key), target, at_most=True, form=form, unit=unit)


FIGURES: tuple[Figure, ...] = (
    _at_least("`bench drain --tasks 1000000`, no-op sync handler", "drain-sync", "tasks_per_s", 120_000),
    _at_least("the same, async handler", "drain-async", "tasks_per_s", 80_000),
    _at_least("`bench steady --seconds 30`", "steady", "tasks_per_s", 60_000),
    _at_least("`bench enqueue --tasks 1000000`", "enqueue", "tasks_per_s", 200_000),
    _at_least("the same, each task with a token of its own", "enqueue-tokens", "tasks_per_s", 80_000),
    _at_least("`bench single`, 64 coroutines", "single-coroutines", "tasks_per_s", 20_000),
    _at_least("`bench single`, 16 threads", "single-threads", "tasks_per_s", 15_000),
    _at_most("`bench latency`, p50", "latency", "p50_ms", 2, unit=" ms"),
    _at_most("`bench latency`, p99", "latency", "p99_ms", 8, unit=" ms"),
    _at_most("the same consumer idle: statements", "latency", "idle_statements_per_s", 4, unit=" /s"),
    _at_most("the same consumer idle: CPU", "latency", "idle_cpu_percent", 1, unit=" % of a core"),
    Figure(
        "server CPU (backends) a task, `bench enqueue` + `bench drain`",
        ("enqueue", "drain-sync"),
        _sum("server_cpu_us"),
        6,
        at_most=True,
        form="{:.2f}",
        unit=" us",
    ),
    Figure(
        "WAL a task, `bench enqueue` + `bench drain`",
        ("enqueue", "drain-sync"),
        _sum("wal_bytes"),
        260,
        at_most=True,
        unit=" B",
    ),
    _at_most("client CPU a no-op task in `bench drain`", "drain-sync", "client_cpu_us", 4, unit=" us"),
    _at_least("`bench snapshot --seconds 120`, held / free", "snapshot", "held_over_free", 0.9, unit="", form="{:.3f}"),
    _at_least("the hold's last minute / its first", "snapshot", "last_over_first", 0.95, unit="", form="{:.3f}"),
    _at_least(
        "`bench drain --work-ms 1 --concurrency 16`, sync, of a bare loop",
        "work-sync",
        "of_bare",
        0.85,
        unit="",
        form="{:.3f}",
    ),
    _at_least("the same, async", "work-async", "of_bare", 0.85, unit="", form="{:.3f}"),
    _at_least(
        "a fast type (no-op) beside a slow one at its `workers`, of its rate alone",
        "slow-beside-fast",
        "noop_of_alone",
        0.9,
        unit="",
        form="{:.3f}",
    ),
    _at_least("the same, a fast type of 1 ms", "slow-beside-fast", "work_of_alone", 0.9, unit="", form="{:.3f}"),
    _at_most("a delayed task starts after its time, the latest of 50", "delayed", "latest_s", 1, unit=" s"),
    _at_most("SIGKILL of a worker with 1,000 claimed: all run again", "kill", "again_s", 15, unit=" s"),
    _at_most(
        "memory of a worker after 1,000,000 tasks, of that after 100,000",
        "worker-memory",
        "growth",
        1.2,
        unit="",
        form="{:.3f}",
    ),
    _at_most(
        "memory of a producer streaming 5,000,000 tasks, over idle",
        "producer-memory",
        "over_idle_mib",
        120,
        unit=" MiB",
        form="{:,.0f}",
    ),
    _at_most(
        "memory of a worker through 2,000 tasks of 1 MiB, over idle",
        "payload-memory",
        "over_idle_mib",
        300,
        unit=" MiB",
        form="{:,.0f}",
    ),
    _at_most("`bench lists`: `counts()`", "lists", "counts_p50_ms", 20, unit=" ms", form="{:,.1f}"),
    _at_most(
        "a page of 50, the first and the 1,000th, slowest of 10 filters that match ≥ 1 %, both orders",
        "lists",
        "page_p50_ms",
        30,
        unit=" ms",
        form="{:,.1f}",
    ),
    _at_most("the same, p99", "lists", "page_p99_ms", None, unit=" ms", form="{:,.1f}"),
    _at_most("a page of what is rarer, p99", "lists", "rare_p99_ms", 300, unit=" ms", form="{:,.1f}"),
    _at_most("a page by `created_at`, which looks at all", "lists", "by_time_p50_ms", None, unit=" ms", form="{:,.0f}"),
    _at_most(
        "`bench lists --one-by-one`: `counts()`", "lists-one-by-one", "counts_p50_ms", None, unit=" ms", form="{:,.0f}"
    ),
    _at_most("a page of 50, as above", "lists-one-by-one", "page_p50_ms", None, unit=" ms", form="{:,.1f}"),
    _at_most("a page of what is rarer, p99", "lists-one-by-one", "rare_p99_ms", None, unit=" ms", form="{:,.1f}"),
    _at_least(
        "`bench foreign`: a drain beside 500,000 others in another queue, in runs of 500, of its rate alone",
        "foreign",
        "beside_of_alone",
        0.9,
        unit="",
        form="{:.3f}",
    ),
    _at_least("the same, the others one by one", "foreign-one-by-one", "beside_of_alone", 0.9, unit="", form="{:.3f}"),
    _at_least(
        "in the same queue, in runs of 500", "foreign-same-queue", "beside_of_alone", 0.9, unit="", form="{:.3f}"
    ),
    _at_least(
        "in the same queue, one by one", "foreign-same-queue-one-by-one", "beside_of_alone", 0.9, unit="", form="{:.3f}"
    ),
    _at_most(
        "`bench batch1`: server CPU a task claimed and completed alone, of asynqpg's",
        "batch1",
        "cpu_of_peer",
        1,
        unit="",
        form="{:.2f}",
    ),
    _at_most("its server CPU (claim and complete)", "batch1", "server_cpu_us", None, unit=" us", form="{:,.0f}"),
    _at_most("its WAL, of asynqpg's", "batch1", "wal_of_peer", None, unit="", form="{:.2f}"),
)
