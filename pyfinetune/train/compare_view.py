"""A comparison for a person: lines in the terminal, `compare.md`, `compare.html` and a picture.

Comparison -> comparison_lines, write_comparison -> compare.md, compare.html, plots/compare.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfinetune.train import curves
from pyfinetune.train.comparison import Comparison, SystemResult
from pyfinetune.train.eval_view import aligned
from pyfinetune.train.html_report import can_draw, write_page
from pyfinetune.train.metrics import Score

_TEMPLATE = "compare.html.jinja"
_HOW = (
    "Intervals hold 95 % of bootstrap resamples of the rows; differences are over the same resamples. Latency is of"
    " answers one at a time. Tokens are those of one answer, on average. Cost is of 1,000 answers."
)
_SHOWN = 5  # rows with answers in the report


def comparison_lines(result: Comparison) -> list[str]:
    """A comparison as lines of text.

    Args:
        result: what `comparison.compare` returned.

    Returns:
        The lines: a table of systems, the notes, and the verdict last.

    Example:
        >>> comparison_lines(result)[-1]  # doctest: +SKIP
        'fine-tuning was worth it: accuracy 0.812 (0.780 to 0.843) against ...'
    """
    lines = [
        f"{result.rows:,} rows ({result.task}), answered by {result.answered_by}",
        "",
        *aligned(_table(result, whole=False)),
    ]
    for column in next(iter(result.systems)).slices:
        lines += ["", *aligned(_slices(result, column))]
    lines.append("")
    if result.forgetting is not None:
        lines.append(result.forgetting.sentence)
    lines += [f"note: {note}" for note in result.notes]
    lines += [verdict.sentence for verdict in result.others]
    return [*lines, result.verdict.sentence]


def write_comparison(result: Comparison) -> list[Path]:
    """Write a comparison's pages and its picture into its folder.

    Args:
        result: what `comparison.compare` returned.

    Returns:
        The Markdown file and the HTML file.

    Example:
        >>> write_comparison(result)  # doctest: +SKIP
        [PosixPath('runs/first/compare/compare.md'), PosixPath('runs/first/compare/compare.html')]
    """
    from markupsafe import Markup

    out = Path(result.output_dir)
    picture = Markup(draw_bars(result, out / "plots" / "compare.png")) if can_draw() else None  # of escaped text
    columns = list(next(iter(result.systems)).slices)
    facts = {
        "title": f"Was fine-tuning worth it? {Path(result.run).name}",
        "subtitle": f"{result.rows:,} held-out rows ({result.task}), answered by {result.answered_by}",
        "decision": result.verdict.decision,
        "verdict": result.verdict.sentence,
        "others": [verdict.sentence for verdict in result.others],
        "picture": picture,
        "table": _table(result, whole=True),
        "how": _HOW,
        "slices": [(column, _slices(result, column)) for column in columns],
        "forgetting": result.forgetting.sentence if result.forgetting is not None else None,
        "notes": result.notes,
        "samples": _samples(result),
    }
    markdown = out / "compare.md"
    markdown.write_text(_markdown(result, facts), encoding="utf-8")
    return [markdown, write_page(out / "compare.html", _TEMPLATE, facts)]


def draw_bars(result: Comparison, png: Path | None = None) -> str:
    """Draw each system's headline metric as a bar with its interval.

    Args:
        result: the comparison.
        png: where to write the picture as a file too, or None.

    Returns:
        An `<svg>` element.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> draw_bars(result)[:4]  # doctest: +SKIP
        '<svg'
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = [system.name for system in result.systems]
    scores = [system.scores[result.metric] for system in result.systems]
    values = [score.value for score in scores]
    # A percentile interval need not hold the value itself.
    arms = [[max(0.0, s.value - s.low) for s in scores], [max(0.0, s.high - s.value) for s in scores]]
    colors = [curves.SECOND if system.kind == "tuned" else curves.FIRST for system in result.systems]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "compare", "font.family": "sans-serif", "font.size": 10.5}
    # What stands in a name came from a file: a dollar sign would be taken for the start of a formula.
    with matplotlib.rc_context({**settings, "text.parse_math": False}):
        figure = Figure(figsize=(7.6, 0.9 + 0.42 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, values, xerr=arms, color=colors, ecolor=curves.INK, capsize=3, height=0.6)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_title(f"{result.metric}, with 95 % intervals", loc="left", color=curves.INK, fontweight="bold")
        axes.grid(axis="x", color=curves.GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=curves.INK, length=0)
        axes.spines[:].set_visible(False)
        return curves.written(figure, f"{result.metric} of each system", png)


def _table(result: Comparison, whole: bool) -> list[list[str]]:
    """A row a system; the metrics beside the headline are in the whole table only."""
    more = [name for name in result.systems[0].scores if name != result.metric] if whole else []
    has_price = any(system.cost is not None for system in result.systems)
    head = ["system", result.metric, "against tuned", "latency, s", "p90, s", "tokens in", "out"]
    rows = [[*head, *(["cost of 1,000"] if has_price else []), *more]]
    for system in result.systems:
        cells = [system.name, str(system.scores[result.metric]), _signed(system.against_tuned)]
        cells += [_seconds(system.latency), _seconds(system.latency_p90)]
        cells += [f"{system.tokens_in:,.0f}", f"{system.tokens_out:,.1f}", *([_cost(system)] if has_price else [])]
        rows.append([*cells, *(str(system.scores[name]) for name in more)])
    return rows


def _slices(result: Comparison, column: str) -> list[list[str]]:
    """A row a system, a column a value, for the headline metric."""
    values = list(result.systems[0].slices[column])
    sizes = [next(iter(result.systems[0].slices[column][value].values())).rows for value in values]
    rows = [[column, *(f"{value} ({size:,} rows)" for value, size in zip(values, sizes, strict=True))]]
    for system in result.systems:
        rows.append([system.name, *(str(system.slices[column][value][result.metric]) for value in values)])
    return rows


def _signed(score: Score | None) -> str:
    if score is None:
        return ""
    value, low, high = (f"{part:+.{score.digits}f}" for part in (score.value, score.low, score.high))
    return f"{value} ({low} to {high})"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cost(system: SystemResult) -> str:
    return "" if system.cost is None else f"{system.cost:.3g}"


def _markdown(result: Comparison, facts: dict[str, Any]) -> str:
    parts = [f"# {_plain(facts['title'])}", f"**{_plain(facts['verdict'])}**", _plain(facts["subtitle"])]
    parts += [_plain(sentence) for sentence in facts["others"]]
    if facts["picture"] is not None:
        parts.append("![each system's metric with its interval](plots/compare.png)")
    parts += [_markdown_table(facts["table"]), facts["how"]]
    for column, table in facts["slices"]:
        parts += [f"## By {_plain(column)}", _markdown_table(table)]
    if facts["forgetting"] is not None:
        parts += ["## Forgetting", _plain(facts["forgetting"])]
    if facts["notes"]:
        parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in facts["notes"])]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *rows = [[_plain(cell) for cell in row] for row in table]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _plain(text: str) -> str:
    """Text on one line, in which nothing is markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def _samples(result: Comparison) -> list[dict[str, Any]]:
    """The first rows, with what each system said to them."""
    said = [(system.name, curves.read_metrics(system.answers)) for system in result.systems]
    places = list(dict.fromkeys(record.get("row") for _, records in said[-1:] for record in records))[:_SHOWN]
    samples = []
    for place in places:
        found = {name: [r for r in records if r.get("row") == place] for name, records in said}
        last = {name: records[-1] for name, records in found.items() if records}
        reference = next(iter(last.values()))["reference"]
        answers = [(name, record["text"] or "(nothing)") for name, record in last.items()]
        samples.append({"place": place, "reference": reference, "answers": answers})
    return samples
