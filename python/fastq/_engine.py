"""The door to the compiled half: the only module that imports `fastq._core`."""

from fastq._core import (
    Engine,
    EnqueuedIds,
    ProducerCore,
    TaskInfo,
    TxCompletion,
    TxTasks,
    complete_dsn,
    encode_json,
    grants,
    migrations,
    parse_dsn,
    queries,
    render,
    rights_of,
    running_task,
    version,
)

__all__ = [
    "Engine",
    "EnqueuedIds",
    "ProducerCore",
    "TaskInfo",
    "TxCompletion",
    "TxTasks",
    "complete_dsn",
    "encode_json",
    "grants",
    "migrations",
    "parse_dsn",
    "queries",
    "render",
    "rights_of",
    "running_task",
    "version",
]
