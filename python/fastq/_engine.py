"""The door to the compiled half: the only module that imports `fastq._core`."""

from fastq._core import (
    Engine,
    EnqueuedIds,
    ProducerCore,
    TaskInfo,
    encode_json,
    migrations,
    queries,
    render,
    version,
)

__all__ = [
    "Engine",
    "EnqueuedIds",
    "ProducerCore",
    "TaskInfo",
    "encode_json",
    "migrations",
    "queries",
    "render",
    "version",
]
