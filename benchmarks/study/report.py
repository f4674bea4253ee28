"""Tables and pictures of what was found, and their places in a document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edge_safe.errors import UsageError

Row = dict[str, str]

SIZE = (9.0, 5.0)
DPI = 80


def markdown(rows: Sequence[Row]) -> str:
    """A table; every row has the columns of the first."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def new_figure() -> Figure:
    """An empty picture of the size that all have."""
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def bars(
    axis: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Mapping[str, float]]],
    bottom: float | None = None,
) -> None:
    """Bars of the means side by side in each group, with the range over seeds.

    Args:
        axis: Where to draw.
        groups: Names along the axis.
        series: By name, a mean with its range for each group.
        bottom: Where the axis begins; by default a little below the lowest value.
    """
    places, width = np.arange(len(groups)), 0.8 / len(series)
    lowest = 1.0
    for number, (name, values) in enumerate(series.items()):
        means, lows, highs = (np.array([v[k] for v in values]) for k in ("mean", "low", "high"))
        lowest = min(lowest, float(lows.min()))
        axis.bar(
            places + (number - (len(series) - 1) / 2) * width,
            means,
            width,
            yerr=np.maximum([means - lows, highs - means], 0.0),
            label=name,
            capsize=2,
        )
    axis.set_xticks(places, groups)
    axis.set_ylim(bottom=max(0.0, lowest - 0.05) if bottom is None else bottom)
    axis.grid(axis="y", alpha=0.3)


def dots(
    axis: Any, names: Sequence[str], series: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Marks of the means on a line each, the first on top, with the range over seeds.

    Args:
        axis: Where to draw.
        names: Of the lines.
        series: By name, a mean with its range for each line.
    """
    places = np.arange(len(names))
    for number, (name, values) in enumerate(series.items()):
        means, lows, highs = (np.array([v[k] for v in values]) for k in ("mean", "low", "high"))
        axis.errorbar(
            means,
            places + (number - (len(series) - 1) / 2) * 0.12,
            xerr=np.maximum([means - lows, highs - means], 0.0),
            fmt="o",
            markersize=4,
            label=name,
            capsize=2,
        )
    axis.set_yticks(places, names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(alpha=0.3)


def insert(document: Path, name: str, body: str) -> None:
    """Replaces what stands between a question's two markers.

    Raises:
        UsageError: The document has no such markers.
    """
    text = document.read_text(encoding="utf-8")
    opening, closing = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
    pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
    if not pattern.search(text):
        raise UsageError(f"{document} has no place for {name}: {opening} ... {closing} is needed.")
    filled = f"{opening}\n{body}\n{closing}"
    document.write_text(pattern.sub(lambda _: filled, text), encoding="utf-8")
