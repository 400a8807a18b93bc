"""Pictures of a result: ratios with the losses in view, time against size under the roofline, a step taken apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyfinetune.bench.breakdown import GROUPS
from pyfinetune.bench.ceilings import COPY, GEMM_BF16, GEMM_FP32
from pyfinetune.bench.harness import OURS
from pyfinetune.bench.results import BEST_ISA, EVEN, Line, lines_of
from pyfinetune.bench.steps import LIMIT, STEP, breakdowns, step_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _LOSS, _GAIN, _EVEN, _INK = "#0b6e4f", "#c1272d", "#2a7fb8", "#8a8a8a", "#333333"
_PEERS = ("#d9822b", "#7d5ba6", "#2a7fb8", "#b5485d", "#6b7a8f", "#94812b")
_MARKERS = "sD^vPX"
_PARTS = ("#2a7fb8", "#7d5ba6", "#d9822b", "#b5485d", "#58a55c", "#c9b037", "#b9bec6")
_RATES = {
    COPY: ("read and written, MB", "-", "copy rate", "GB/s"),
    GEMM_BF16: ("in matrix products, GFLOP", "-", "bf16 GEMM rate", "GFLOP/s"),
    GEMM_FP32: ("in matrix products, GFLOP", "--", "fp32 GEMM rate", "GFLOP/s"),
}
_UNITS = {COPY: 1e3, GEMM_BF16: 1.0, GEMM_FP32: 1.0}  # of the axis in one of the rate's
_STYLE = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.fonttype": "none",
    "svg.hashsalt": "pyfinetune",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained", facecolor="white")


def _times(value: float, _position: int | None = None) -> str:
    return f"{value:g}x"


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def ratio_figure(lines: list[Line]) -> Figure:
    """A bar for each case and peer: peer's time / ours, on a logarithmic scale from 1, losses in red.

    Args:
        lines: those with a ratio; the bar is the smaller one, a tick the other allocator setting's.
    """
    figure = _figure(9.5, 0.9 + 0.25 * len(lines))
    axes = figure.subplots()
    for i, line in enumerate(lines):
        value = line.headline
        color = _EVEN if line.peer == BEST_ISA or abs(value - 1) < EVEN else _GAIN if value > 1 else _LOSS
        axes.barh(i, value - 1, left=1, height=0.62, color=color, zorder=2)
        others = [ratio for ratio in line.ratio.values() if ratio != value]
        axes.plot(others, [i] * len(others), "|", color=_INK, markersize=9, zorder=3)
        axes.annotate(
            f"{value:.2f}x",
            (max([value, 1.0, *others]), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if color == _LOSS else "normal",
            color=color if color != _EVEN else _INK,
        )
    axes.axvline(1, color=_INK, linewidth=1, zorder=4)
    axes.set_xscale("log", base=2)
    ratios = [ratio for line in lines for ratio in line.ratio.values()]
    axes.set_xlim(min([0.7, *ratios]) * 0.9, max([1.5, *ratios]) * 1.35)
    axes.xaxis.set_major_formatter(_times)
    axes.set_yticks(range(len(lines)), [f"{line.case}  |  {line.peer}" for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.tick_params(top=True, labeltop=len(lines) > 20)
    axes.set_xlabel(
        "peer's time / ours: right of 1 ours is faster; red: ours is slower\n"
        "bar: the smaller of the allocator settings' ratios, tick: the other one"
    )
    return figure


def _points(result: dict[str, Any], op: str) -> list[dict[str, Any]]:
    """The op's cases under the first allocator setting: what bounds them, how much work, and everyone's time."""
    points, numbers = [], {}
    for run in list(result["runs"].values())[:1]:
        for row in run["rows"]:
            if (
                row["op"] != op
                or row.get("isa")
                or "bound" not in row
                or "ms" not in row.get("results", {}).get(OURS, {})
            ):
                continue
            # The rates are in GB/s and GFLOP/s; results of an older format do not say how much work there is.
            amount = row.get("bytes" if row["bound"] == COPY else "flops")
            amount = amount / 1e9 if amount else row["floor_ms"] / 1e3 * run["ceilings"][row["bound"]]
            amount *= _UNITS[row["bound"]]
            times = {name: found["ms"] for name, found in row["results"].items() if "ms" in found}
            number = numbers.setdefault(row["case"], len(numbers) + 1)
            points.append(
                {"case": row["case"], "bound": row["bound"], "work": amount, "times": times, "number": number}
            )
    return points


def size_figure(result: dict[str, Any], op: str) -> Figure | None:
    """Time against the work that has to be done, on logarithmic scales, over the machine's roofline.

    Args:
        result: what `runner.run` returned.
        op: which.

    Returns:
        The picture, or None where nothing was timed.
    """
    points = _points(result, op)
    if not points:
        return None
    ceilings = next(iter(result["runs"].values()))["ceilings"]
    panels = [[COPY], [GEMM_BF16, GEMM_FP32]]
    panels = [bounds for bounds in panels if any(point["bound"] in bounds for point in points)]
    names = list(dict.fromkeys(name for point in points for name in point["times"] if name != OURS))
    figure = _figure(9.5, 4.2 + 0.16 * len(points))
    for axes, bounds in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        chosen = [point for point in points if point["bound"] in bounds]
        _draw_points(axes, chosen, names)
        _draw_rooflines(axes, chosen, bounds, ceilings)
        axes.set(xscale="log", yscale="log", xlabel=_RATES[bounds[0]][0], ylabel="time, ms")
        axes.margins(0.12)
        _label_ticks(axes)
        axes.grid(color="#e4e4e4", zorder=0)
        axes.legend(fontsize=7.5, loc="best", framealpha=0.85)
    figure.supxlabel(
        "\n".join(f"{point['number']}  {point['case']}" for point in points), fontsize=7.5, x=0.02, ha="left"
    )
    return figure


def _draw_points(axes: Axes, points: list[dict[str, Any]], names: list[str]) -> None:
    """Ours and the peers' times, a thin line between those of one case."""
    for point in points:
        values = list(point["times"].values())
        axes.plot([point["work"]] * 2, [min(values), max(values)], color="#bbbbbb", linewidth=1, zorder=1)
    for x, y, numbers in _clusters(points):
        text = ", ".join(map(str, numbers))
        axes.annotate(text, (x, y), xytext=(7, -9), textcoords="offset points", fontsize=7.5, zorder=5)
    for name, color, marker in [(OURS, _OURS, "o"), *zip(names, _PEERS, _MARKERS, strict=False)]:
        own = [(point["work"], point["times"][name]) for point in points if name in point["times"]]
        if own:
            size = 7 if name == OURS else 5.5
            axes.plot(*zip(*own, strict=True), marker, color=color, markersize=size, label=name, zorder=3, alpha=0.9)


def _clusters(points: list[dict[str, Any]]) -> list[tuple[float, float, list[int]]]:
    """Where the points' numbers go; those of points that lie on one another go together."""
    everything = [time for point in points for time in point["times"].values()]
    works = [point["work"] for point in points]
    near = [0.04 * max(1.0, math.log(max(values) / min(values))) for values in (works, everything)]
    found: list[tuple[float, float, list[int]]] = []
    for point in points:
        here = (point["work"], point["times"][OURS])
        for x, y, numbers in found:
            if abs(math.log(here[0] / x)) < near[0] and abs(math.log(here[1] / y)) < near[1]:
                numbers.append(point["number"])
                break
        else:
            found.append((*here, [point["number"]]))
    return found


def _label_ticks(axes: Axes) -> None:
    """Plain numbers, also between the powers of ten where there are few of those."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if ends[1] / ends[0] < 100:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(NullFormatter())


def _draw_rooflines(axes: Axes, points: list[dict[str, Any]], bounds: list[str], ceilings: dict[str, float]) -> None:
    """The least time for the work at each of the rates, over the width of the points."""
    ends = [min(p["work"] for p in points) / 1.6, max(p["work"] for p in points) * 1.6]
    for rate in bounds:
        if any(point["bound"] == rate for point in points):
            _label, dashes, name, unit = _RATES[rate]
            times = [1e3 * end / _UNITS[rate] / ceilings[rate] for end in ends]
            label = f"limit: {name}, {ceilings[rate]:.3g} {unit}"
            axes.plot(ends, times, dashes, color=_INK, linewidth=1.2, label=label, zorder=2)


def step_figure(row: dict[str, Any], page: str) -> Figure:
    """A bar for each way to run a training step, in parts where the profiler took it apart, and the machine's limit.

    Args:
        row: of a step.
        page: the allocator setting it was measured with.
    """
    parts = breakdowns(row)
    whole = {name: found["ms"] for name, found in row["results"].items() if "ms" in found}
    whole[LIMIT] = row["floor_ms"]
    figure = _figure(9.5, 1.8 + 0.5 * len(whole))
    axes = figure.subplots()
    groups = list(next(iter(parts.values()))) if parts else []
    colors = {OURS: _OURS, LIMIT: "#d6dade"}
    for i, (name, total) in enumerate(whole.items()):
        left = 0.0
        for group in groups:
            width = parts.get(name, {}).get(group, 0.0)
            axes.barh(
                i,
                width,
                left=left,
                color=_PARTS[GROUPS.index(group)],
                height=0.62,
                label=group if i == 0 else None,
                zorder=2,
            )
            left += width
        if name not in parts:
            axes.barh(i, total, color=colors.get(name, _EVEN), height=0.62, zorder=2)
        text = f"{1e3 * row['tokens'] / total:.0f} tokens/s" if row.get("tokens") else f"{total:.0f} ms"
        axes.annotate(text, (total, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(whole)), list(whole))
    axes.set_ylim(len(whole) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(whole.values()))
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.set_xlabel("time of a step, ms")
    axes.set_title(f"{row['case']}, {page} pages", fontsize=9, loc="left")
    if groups:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def time_name(op: str) -> str:
    """The file name, without its ending, of an op's times against size."""
    return f"time-{op.replace('_', '-')}"


def figures(result: dict[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """(file name without ending, what it shows, picture) of everything in a result that can be drawn.

    Example:
        >>> [name for name, _what, _figure in figures(result)]  # doctest: +SKIP
        ['ratios', 'time-glu', 'time-nf4', 'step-1']
    """
    compared = [line for line in lines_of(result) if line.headline is not None]
    if compared:
        yield "ratios", "Every case against every peer", ratio_figure(compared)
    ops = dict.fromkeys(row["op"] for run in result["runs"].values() for row in run["rows"])
    for op in ops:
        figure = None if op == STEP else size_figure(result, op)
        if figure is not None:
            yield time_name(op), f"{op}: time against size", figure
    first = next(iter(result["runs"]), None)
    for i, (page, row) in enumerate(((page, row) for page, row in step_rows(result) if page == first), 1):
        yield f"step-{i}", f"{row['case']}: where the time goes", step_figure(row, page)


def write_figures(result: dict[str, Any], folder: Path, png: bool = True) -> list[tuple[str, str, Path]]:
    """Write every picture as SVG and PNG.

    Args:
        result: what `runner.run` returned.
        folder: where; made where it is missing.
        png: False for SVG only.

    Returns:
        (file name without ending, what it shows, the SVG file) of each.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, what, figure in figures(result):
            path = folder / f"{name}.svg"
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
            if png:
                figure.savefig(path.with_suffix(".png"), dpi=144)
            written.append((name, what, path))
    return written
