"""Run the comparisons, print the table, keep the figures in ``benchmarks/results``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import chat, embed, plot, transport, waiting
from benchmarks.measure import Row

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "transport": transport.run,
    "liveness": waiting.liveness,
    "idle": waiting.idle,
    "spinning": waiting.spinning,
    "embed": embed.run,
    "chat": chat.run,
}


def readable(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.3g} {unit}"
    for name, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1e-6:.3g} µs"


def table(rows: list[Row]) -> Table:
    result = Table("comparison", "contender", "p50", "p99", "ratio of medians", "samples")
    for row in rows:
        figures = (
            readable(row.p50, row.unit),
            readable(row.p99, row.unit),
            f"{row.ratio:.2f}",
            str(row.samples),
        )
        result.add_row(row.comparison, row.contender, *figures)
    return result


def _draw(rows: list[Row]) -> None:
    round_trips = [row for row in rows if "round trip" in row.comparison]
    if not round_trips:
        return
    try:
        plot.draw(round_trips, RESULTS / "transport.svg")
    except ImportError as error:
        print(f"not drawn: {error}", file=sys.stderr)


def _latest() -> list[Row]:
    """What is on file; comparisons that are not measured anew stay."""
    try:
        figures = json.loads((RESULTS / "latest.json").read_text())
    except FileNotFoundError:
        return []
    return [Row(**row) for row in figures["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.parts or PARTS:
        print(f"measuring {name} ...", file=sys.stderr)
        rows += PARTS[name](quick=arguments.quick)
    Console(width=120).print(table(rows))
    if not arguments.quick:
        machine = {"cpus": os.cpu_count(), "system": platform.system(), "cpu": platform.machine()}
        RESULTS.mkdir(exist_ok=True)
        measured = {row.comparison for row in rows}
        kept = [row for row in _latest() if row.comparison not in measured]
        figures = {"machine": machine, "rows": [dataclasses.asdict(row) for row in rows + kept]}
        _draw(rows)
        (RESULTS / "latest.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
