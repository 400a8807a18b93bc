"""A run's beginning and end in a few lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyfinetune.train.run import TrainResult


def rows_lines(counts: dict[str, dict[str, int]], max_length: int, is_causal: bool = True) -> list[str]:
    """What will be trained and evaluated on.

    Args:
        counts: `run.Rows.counts`.
        max_length: the longest document, in tokens.
        is_causal: whether tokens are learned, or labels beside them.

    Returns:
        Lines of text.

    Example:
        >>> rows_lines({}, 1024)
        []
    """
    lines = []
    for name, count in counts.items():
        if not count["examples"]:
            continue
        learned = f"of which {count['learned_tokens']:,} are learned"
        if not is_causal:
            learned = f"{count['learned_tokens']:,} labels to learn"
        what = f"{name.replace('_', ' ')}: {count['examples']:,} examples, {count['tokens']:,} tokens"
        lines.append(f"{what}, {learned}, in {count['rows']:,} rows of up to {max_length:,}")
    return lines


def listed_rows(places: Sequence[str], most: int = 5) -> str:
    """The first few rows, each file named once.

    Args:
        places: file and row of each, as `data.Row.place` has them.
        most: how many are shown.

    Returns:
        Words for a sentence.

    Example:
        >>> listed_rows(["a.csv, row 1", "a.csv, row 2", "b.csv, row 1"], most=2)
        'a.csv, rows 1, 2 and 1 more'
    """
    shown: dict[str, list[str]] = {}
    for place in places[:most]:
        file, _, number = place.rpartition(", row ")
        shown.setdefault(file, []).append(number)
    text = "; ".join(f"{file}, row{'s' * (len(n) > 1)} {', '.join(n)}" for file, n in shown.items())
    rest = len(places) - most
    return f"{text} and {rest:,} more" if rest > 0 else text


def metric_lines(metrics: dict[str, Any] | None, floor: dict[str, Any] | None) -> list[str]:
    """A run's metrics, each beside what the least clever guess reaches.

    Args:
        metrics: `run.TrainResult.metrics`.
        floor: `run.TrainResult.floor`.

    Returns:
        Lines of text.

    Example:
        >>> scored = {"accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "rows": 100}}
        >>> metric_lines(scored, {"what": "the most frequent label, 'a'", "accuracy": 0.5})
        ["accuracy 0.750 (0.700 to 0.800), floor 0.500: the most frequent label, 'a'"]
    """
    lines = []
    for name, score in (metrics or {}).items():
        line = f"{name} {score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        if floor and name in floor:
            line += f", floor {floor[name]:.3f}: {floor['what']}"
        lines.append(line)
    if floor and not metrics and "loss" in floor:
        lines.append(f"floor: loss {floor['loss']:.4f}, {floor['what']}")
    return lines


def result_lines(result: TrainResult, command: str) -> list[str]:
    """What a person wants to know at the end of a run.

    Args:
        result: what `run.train` returned.
        command: the command that goes on.

    Returns:
        Lines of text.

    Example:
        >>> result_lines(result, "pyfinetune train run.yaml")[-1]  # doctest: +SKIP
        'saved: out'
    """
    if result.interrupted:
        return [
            f"stopped at step {result.steps}; a checkpoint is in {result.output_dir}",
            f"go on with: {command}",
        ]
    lines = [
        f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.1f} s"
        f" ({result.tokens_per_second:,.0f} tokens/s), peak memory {result.peak_memory_gb:.2f} GB"
    ]
    if result.eval_loss is not None:
        before = "" if result.eval_loss_before is None else f"{result.eval_loss_before:.4f} -> "
        line = f"held-out loss {before}{result.eval_loss:.4f}"
        if result.perplexity is not None:
            first = "" if result.perplexity_before is None else f"{result.perplexity_before:.2f} -> "
            line += f", perplexity {first}{result.perplexity:.2f}"
        lines.append(line)
    lines += metric_lines(result.metrics, result.floor)
    lines.append(f"saved: {result.output_dir}")
    return lines
