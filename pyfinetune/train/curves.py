"""A run's curves, drawn by matplotlib: as SVG to stand inside the report, and as PNG files.

metrics.jsonl -> read_metrics -> series -> draw -> inline SVG, plots/*.png
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK, GRID, FIRST, SECOND = "#3b4252", "#e5e9f0", "#2563eb", "#d97706"
_MOST_POINTS = 1500  # of a line; more cannot be told apart, and each costs bytes in the report


@dataclass(frozen=True)
class Curve:
    """One picture.

    Args:
        name: of its file.
        title: above it.
        lines: label to (step, value) points.
    """

    name: str
    title: str
    lines: dict[str, list[tuple[int, float]]]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run.

    Args:
        path: its `metrics.jsonl`.

    Returns:
        The records in order; none where there is no file, and without lines that a kill cut short.

    Example:
        >>> read_metrics("no-such-file")
        []
    """
    records = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").split("\n"):  # other line ends may stand in a text
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return [record for record in records if isinstance(record, dict)]


def series(records: Sequence[dict[str, Any]]) -> list[Curve]:
    """What there is to draw.

    Args:
        records: as `read_metrics` gives them.

    Returns:
        Loss (training and held-out), learning rate, tokens/s and gradient norm, each where there are records of it.

    Example:
        >>> [curve.name for curve in series([{"step": 1, "loss": 2.0}])]
        ['loss']
    """

    def points(key: str) -> list[tuple[int, float]]:
        found = {record.get("step", 0): record[key] for record in records if _is_finite(record.get(key))}
        every = max(1, len(found) // _MOST_POINTS)
        listed = sorted(found.items())
        return listed[::every] if every == 1 else [*listed[:-1:every], listed[-1]]

    curves = [
        Curve("loss", "Loss per token", {"training": points("loss"), "held out": points("eval_loss")}),
        Curve("learning_rate", "Learning rate", {"learning rate": points("learning_rate")}),
        Curve("tokens_per_second", "Tokens per second", {"tokens/s": points("tokens_per_second")}),
        Curve("grad_norm", "Gradient norm", {"gradient norm": points("grad_norm")}),
    ]
    return [
        Curve(curve.name, curve.title, {label: line for label, line in curve.lines.items() if line})
        for curve in curves
        if any(curve.lines.values())
    ]


def draw(curve: Curve, png: Path | None = None) -> str:
    """Draw one picture.

    Args:
        curve: what to draw.
        png: where to write it as a file too, or None.

    Returns:
        An `<svg>` element, as wide as what it is put into; equal curves give equal text.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> draw(Curve("loss", "Loss", {"training": [(1, 2.0), (2, 1.0)]}))[:4]  # doctest: +SKIP
        '<svg'
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {"svg.fonttype": "none", "svg.hashsalt": curve.name, "font.family": "sans-serif", "font.size": 10.5}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for (label, line), color in zip(curve.lines.items(), (FIRST, SECOND), strict=False):
            steps, values = zip(*line, strict=True)
            mark = "o" if len(line) < 40 else None
            axes.plot(steps, values, color=color, linewidth=1.6, marker=mark, markersize=3, label=label)
        axes.set_title(curve.title, loc="left", color=INK, fontweight="bold", fontsize=11)
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        if curve.name in ("tokens_per_second", "learning_rate"):
            axes.set_ylim(bottom=0)
        if len(curve.lines) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        return written(figure, f"{curve.title} by step", png)


def written(figure: Any, label: str, png: Path | None) -> str:
    """A figure as an element to stand inside a page, and as a file.

    Args:
        figure: of matplotlib.
        label: what is to be seen, for those who do not see it.
        png: where to write it as a file too, or None.

    Returns:
        An `<svg>` element, as wide as what it is put into.

    Example:
        >>> written(figure, "Loss by step", None)[:4]  # doctest: +SKIP
        '<svg'
    """
    if png is not None:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=150, metadata={"Software": None})
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """The element alone, without the file's heading, its metadata and its fixed size."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, _, rest = element.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}">{rest}'


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
