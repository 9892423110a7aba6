"""Plots as PNG files; needs the extra `bench`."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from benchmarks.report import Line, Plot

MARKERS = "osD^vP*X"
SIZE_INCHES, DOTS_PER_INCH = (8.0, 5.4), 120


def draw(plot: Plot, folder: Path, prefix: str) -> Path:
    """The file that was written: `PREFIX-NAME.png`. Raises ImportError without matplotlib."""
    # a figure by itself, without pyplot, draws with Agg: no display, no global state
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for index, line in enumerate(plot.lines):
        _draw_line(axes, line, MARKERS[index % len(MARKERS)])
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if plot.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    path = folder / f"{prefix}-{plot.name}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def _draw_line(axes: Any, line: Line, marker: str) -> None:
    """Medians, with a bar from the least to the most of the rounds."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y.median)]
    medians = [y.median for _, y in points]
    below = [y.median - y.low for _, y in points]
    above = [y.high - y.median for _, y in points]
    limit = line.name.startswith("limit")
    axes.errorbar(
        [x for x, _ in points],
        medians,
        yerr=(below, above),
        label=line.name,
        marker="" if limit else marker,
        linestyle=":" if limit else "-",
        capsize=2,
        markersize=5,
    )
