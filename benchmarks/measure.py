"""Interleaved timing: whatever the machine does meanwhile happens to every contender."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What one contender did in one comparison."""

    comparison: str
    contender: str
    unit: str
    p50: float
    p99: float
    ratio: float
    """Median over rounds of this contender's median divided by the first contender's."""
    samples: int


def interleaved(
    comparison: str,
    contenders: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    repeats: int,
    unit: str,
    turns: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> list[Row]:
    """Run every contender `repeats` times a round, and compare medians round by round.

    A contender returns what it measured; the first one is the measure of the others. `turns`
    are what some contenders have to run in.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        # Forwards and backwards by turns, so that nobody always follows the same one.
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            contender = contenders[name]
            with (turns or {}).get(name, nullcontext)():
                contender()  # to get warm: what ran before has left other data in the caches
                values = [contender() for _ in range(repeats)]
            samples[name] += values
            medians[name].append(statistics.median(values))
    first = next(iter(contenders))
    rows = []
    for name, values in samples.items():
        ratios = [own / base for own, base in zip(medians[name], medians[first], strict=True)]
        rows.append(summed(comparison, name, values, unit=unit, ratio=statistics.median(ratios)))
    return rows


def summed(
    comparison: str, contender: str, values: Sequence[float], *, unit: str = "s", ratio: float = 1.0
) -> Row:
    """The row of some samples. Of at most 100, the p99 is the worst one."""
    ordered = sorted(values)
    return Row(
        comparison=comparison,
        contender=contender,
        unit=unit,
        p50=statistics.median(ordered),
        p99=ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        ratio=ratio,
        samples=len(ordered),
    )


def seconds(action: Callable[[], object]) -> float:
    """How long the action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
