"""Measure the README's whole table: ``python -m benches.table``, or ``make bench``.

Each measurement runs several times, each time in a process of its own, all on one embedded PostgreSQL. What they print is added
to a file, so that the table can be had in pieces:

    python -m benches.table --only steady --only latency --out results.json
    python -m benches.table --none --out results.json --markdown
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benches.figures import FIGURES, MEASUREMENTS, Figure, Measurement, Run
from fastq import embedded

#: Seconds of one run: the longest takes five minutes.
_TIMEOUT = 900

Results = dict[str, list[Run]]


def main() -> int:
    """Measure what is asked for and print what is known. The exit status is 1 if a measurement fails or a target is missed."""
    options = _options()
    results: Results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    chosen = [each for each in MEASUREMENTS if not options.none and each.name in (options.only or [each.name])]
    failed = []
    # Started once for all: each measurement joins it.
    with embedded.start() as server:
        print(f"embedded PostgreSQL in {server.data_dir}", file=sys.stderr)
        for measurement in chosen:
            for number in range(1, (options.runs or measurement.runs) + 1):
                run = _measure(measurement, number, options.runs or measurement.runs)
                if run is None:
                    failed.append(measurement.name)
                    continue
                results.setdefault(measurement.name, []).append(run)
                if options.out:
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
    lines = [line for figure in FIGURES if (line := _line(figure, results, options.runs)) is not None]
    _print(lines, markdown=options.markdown)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed or any(not line[-1] for line in lines) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.table", description="Measure the README's table.")
    names = [each.name for each in MEASUREMENTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--none", action="store_true", help="measure nothing, print what --out holds")
    parser.add_argument("--runs", type=int, help="runs of each; default: 5, of snapshot 3")
    parser.add_argument("--out", type=Path, help="a JSON file that results are added to")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    return parser.parse_args()


def _measure(measurement: Measurement, number: int, runs: int) -> Run | None:
    began = time.monotonic()
    print(f"{measurement.name} {number}/{runs} ", end="", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, *measurement.command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        stdout, stderr = process.communicate(timeout=_TIMEOUT)
    except BaseException as error:
        # It drops its schema before it ends.
        process.terminate()
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        print(f"did not end within {_TIMEOUT} s", file=sys.stderr)
        return None
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.stderr.write(stderr)
    if process.returncode != 0:
        return None
    run: Run = json.loads(stdout.splitlines()[-1])
    values = [
        f"{figure.what}: {figure.form.format(figure.value(run))}{figure.unit}"
        for figure in FIGURES
        if figure.of == (measurement.name,)
    ]
    print("  " + "; ".join(values), file=sys.stderr, flush=True)
    return run


def _line(figure: Figure, results: Results, runs: int | None) -> tuple[str, str, str, str, int, bool] | None:
    """What, target, median, spread, number of runs, whether it holds; None where a measurement is missing."""
    wanted = {each.name: runs or each.runs for each in MEASUREMENTS}
    parts = [results.get(name, [])[-wanted[name] :] for name in figure.of]
    number = min(len(part) for part in parts)
    if not number:
        return None
    values = [figure.value(*run) for run in zip(*(part[-number:] for part in parts), strict=True)]
    median = statistics.median(values)

    def show(value: float) -> str:
        return figure.form.format(value)

    return (
        figure.what,
        f"{'≤' if figure.at_most else '≥'} {figure.target:,}{figure.unit}" if figure.target is not None else "",
        f"{show(median)}{figure.unit}",
        f"{show(min(values))} to {show(max(values))}",
        number,
        figure.holds(median),
    )


def _print(lines: list[tuple[str, str, str, str, int, bool]], *, markdown: bool) -> None:
    rows = [(*line[:4], str(line[4]), ("yes" if line[5] else "no") if line[1] else "") for line in lines]
    if markdown:
        print("| what | target | median | spread | runs | met |\n|---|---|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    head = ("what", "target", "median", "spread", "runs", "met")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
