"""The door to the compiled half: the only module that imports `fastq._core`."""

from fastq._core import (
    Engine,
    EnqueuedIds,
    ProducerCore,
    TaskInfo,
    encode_json,
    grants,
    migrations,
    queries,
    render,
    rights_of,
    version,
)

__all__ = [
    "Engine",
    "EnqueuedIds",
    "ProducerCore",
    "TaskInfo",
    "encode_json",
    "grants",
    "migrations",
    "queries",
    "render",
    "rights_of",
    "version",
]
