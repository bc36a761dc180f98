"""Plots that the figures of the claims share."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.runs import Line, curve

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def panels(rows: int, columns: int, titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure, and its axes with titles."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.3 * columns, 3.5 * rows), dpi=110, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10, loc="left")
    return figure, axes


def band(
    axis: Axes, results: Sequence[list[Line]], metric: str, color: str, label: str | None,
    line: str = "-", shift: int = 0,
) -> None:  # fmt: skip
    """Plot a metric's mean over the seeds and its range by step; shift is added to the steps."""
    steps = [step + shift for step in curve(results[0], metric)[0]]
    columns = list(zip(*(curve(lines, metric)[1] for lines in results), strict=True))
    axis.plot(steps, [fmean(x) for x in columns], line, color=color, label=label)
    axis.fill_between(
        steps, [min(x) for x in columns], [max(x) for x in columns], color=color, alpha=0.15, lw=0
    )


def points(
    axis: Axes, positions: Sequence[float], values: Sequence[Sequence[float]], color: str,
    label: str,
) -> None:  # fmt: skip
    """Plot the mean over the seeds and its range at each position, joined by lines."""
    means = [fmean(x) for x in values]
    below = [mean - min(x) for mean, x in zip(means, values, strict=True)]
    above = [max(x) - mean for mean, x in zip(means, values, strict=True)]
    axis.errorbar(positions, means, [below, above], fmt="o-", color=color, label=label, ms=4,
                  lw=1.3)  # fmt: skip


def level(
    axis: Axes, value: float, text: str, color: str = "0.4", *, left: bool = False,
    below: bool = False,
) -> None:  # fmt: skip
    """Draw a horizontal line with a label at its left or right end, above or below it."""
    if math.isfinite(value):
        axis.axhline(value, color=color, lw=0.9, ls=":")
        axis.annotate(
            text, (0.01 if left else 1, value), xycoords=("axes fraction", "data"),
            ha="left" if left else "right", va="top" if below else "bottom",
            fontsize=8, color=color,
        )  # fmt: skip


def save(figure: Figure, path: Path, legends: Sequence[Axes]) -> Path:
    """Add legends to some of the axes and write the figure; returns its path."""
    for axis in legends:
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path)
    return path
