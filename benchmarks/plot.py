"""Draws the round trips of ``results/latest.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Row

__all__ = ["draw"]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the medians with ticks at the 99th percentiles, one panel a comparison."""
    import matplotlib

    matplotlib.use("svg")
    # Two runs with the same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "inferpool"
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.comparison for row in rows))
    figure, panels = pyplot.subplots(
        len(names),
        1,
        figsize=(9, sum(_height(rows, name) for name in names)),
        height_ratios=[_height(rows, name) for name in names],
        squeeze=False,
    )
    for panel, name in zip(panels[:, 0], names, strict=True):
        group = [row for row in rows if row.comparison == name][::-1]
        labels = [row.contender for row in group]
        colours = ["tab:orange" if "inferpool" in label else "tab:blue" for label in labels]
        panel.barh(labels, [row.p50 * 1e6 for row in group], color=colours)
        panel.plot([row.p99 * 1e6 for row in group], labels, "k|")
        panel.set(xscale="log", title=name, xlabel="µs: bar median, tick 99th percentile")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _height(rows: Sequence[Row], name: str) -> float:
    return 1.1 + 0.25 * sum(row.comparison == name for row in rows)
