"""What `pyfinetune eval` found, for a person."""

from __future__ import annotations

from collections.abc import Sequence

from pyfinetune.train.evaluation.evaluating import Evaluation
from pyfinetune.train.evaluation.metrics import Score


def evaluation_lines(result: Evaluation) -> list[str]:
    """An evaluation as lines of text.

    Args:
        result: what `evaluating.evaluate` returned.

    Returns:
        The lines: what was evaluated, a metric a line, a table for each column of slices, and the notes.

    Example:
        >>> evaluation_lines(Evaluation("m", "sft", 2, "greedy generation", {}))[0]
        'm on 2 rows (sft), answered by greedy generation'
    """
    lines = [f"{result.model} on {result.rows:,} rows ({result.task}), answered by {result.answered_by}"]
    if result.task == "pretrain":
        lines = [f"{result.model} on {result.rows:,} rows of raw text"]
    lines += aligned([("", "value", "95 % interval")] + [_cells(name, found) for name, found in result.scores.items()])
    for column, groups in result.slices.items():
        names = list(next(iter(groups.values())))
        table = [(column, "rows", *names)]
        table += [(value, f"{found[names[0]].rows:,}", *map(str, found.values())) for value, found in groups.items()]
        lines += ["", *aligned(table)]
    lines += [f"note: {note}" for note in result.notes]
    return [*lines, f"took {result.seconds:.1f} s"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right.

    Args:
        rows: of equal length.

    Returns:
        A line a row.

    Example:
        >>> aligned([("a", "1"), ("bb", "10")])
        ['  a    1', '  bb  10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _cells(name: str, found: Score) -> tuple[str, str, str]:
    value, _, interval = str(found).partition(" ")
    return name, value, interval
