"""A run's beginning and end in a few lines for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyfinetune.train.run import TrainResult


def rows_lines(counts: dict[str, dict[str, int]], max_length: int) -> list[str]:
    """What will be trained and evaluated on.

    Args:
        counts: `run.Rows.counts`.
        max_length: the longest document, in tokens.

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
        lines.append(
            f"{name.replace('_', ' ')}: {count['examples']:,} examples, {count['tokens']:,} tokens, of which"
            f" {count['learned_tokens']:,} are learned, in {count['rows']:,} rows of up to {max_length:,}"
        )
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
        perplexity = "" if result.perplexity_before is None else f"{result.perplexity_before:.2f} -> "
        lines.append(f"held-out loss {before}{result.eval_loss:.4f}, perplexity {perplexity}{result.perplexity:.2f}")
    lines.append(f"saved: {result.output_dir}")
    return lines
