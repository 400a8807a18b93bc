"""What a comparison says in the end: one sentence, from the interval of a difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyfinetune.train.evaluation.metrics import Score

FEWEST = 20  # rows below which a bootstrap interval is too narrow to be believed


@dataclass(frozen=True)
class Verdict:
    """A judgement over two systems.

    Args:
        decision: `worth it`, `not worth it` or `cannot tell`.
        sentence: for a person.
        difference: the one's metric minus the other's, over the same rows.
    """

    decision: str
    sentence: str
    difference: Score


def judge(difference: Score, worth: float = 0.0) -> str:
    """Whether a difference is large enough, going by its interval.

    Args:
        difference: with its 95 % interval.
        worth: the smallest gain that pays.

    Returns:
        `worth it` where the whole interval lies above `worth`, `not worth it` where none of it does, else
        `cannot tell`; and that always of fewer than 20 rows.

    Example:
        >>> judge(Score(0.2, 0.1, 0.3, 100)), judge(Score(0.2, 0.1, 0.3, 100), worth=0.15)
        ('worth it', 'cannot tell')
    """
    if difference.rows < FEWEST:
        return "cannot tell"
    if difference.low > worth:
        return "worth it"
    return "not worth it" if difference.high <= worth else "cannot tell"


def verdict_on_tuning(
    metric: str, tuned: Score, prompted: Score, prompt: str, difference: Score, worth: float = 0.0
) -> Verdict:
    """Whether fine-tuning was worth it against the best prompt.

    Args:
        metric: its name.
        tuned: of the fine-tuned model.
        prompted: of the base model with its best prompt.
        prompt: that prompt's name.
        difference: of the two, from a paired bootstrap.
        worth: the smallest gain that pays.

    Returns:
        The verdict.

    Example:
        >>> scores = [Score(0.8, 0.7, 0.9, 100), Score(0.5, 0.4, 0.6, 100)]
        >>> verdict_on_tuning("accuracy", *scores, "plain", Score(0.3, 0.2, 0.4, 100)).decision
        'worth it'
    """
    decision = judge(difference, worth)
    head = {
        "worth it": "fine-tuning was worth it",
        "not worth it": "fine-tuning was not worth it",
        "cannot tell": f"cannot tell with {difference.rows:,} rows whether fine-tuning was worth it",
    }[decision]
    gain = f" (a gain of {_plain(worth)} was asked for)" if worth else ""
    more = ""
    if difference.rows < FEWEST:
        more = f"; give {FEWEST} rows or more"
    elif decision == "cannot tell":
        wanted = rows_to_tell(difference, worth)
        if wanted is not None:
            more = f"; about {wanted:,} rows would tell, if the difference stays what it is"
    sentence = f"{head}: {metric} {tuned} against {prompted} for the best prompt ({prompt}); difference {difference}"
    return Verdict(decision, sentence + gain + more, difference)


def verdict_on_other(metric: str, name: str, other: Score, difference: Score) -> Verdict:
    """How the fine-tuned model stands against another model.

    Args:
        metric: its name.
        name: the other system's.
        other: its score.
        difference: the tuned model's minus the other's, from a paired bootstrap.

    Returns:
        The verdict; `worth it` where the tuned model is the better one.

    Example:
        >>> verdict_on_other("f1", "large", Score(0.8, 0.7, 0.9, 100), Score(-0.3, -0.4, -0.2, 100)).decision
        'not worth it'
    """
    decision = judge(difference)
    if decision == "not worth it" and difference.low == difference.high == 0:
        words = "says the same as"
    else:
        words = {
            "worth it": "is better than",
            "not worth it": "is worse than",
            "cannot tell": f"cannot be told from ({difference.rows:,} rows)",
        }[decision]
    sentence = f"the tuned model {words} {name} ({metric} {other}): difference {difference}"
    return Verdict(decision, sentence, difference)


def rows_to_tell(difference: Score, worth: float = 0.0) -> int | None:
    """How many rows would narrow an interval until it leaves `worth` out; its width falls with their root.

    Args:
        difference: with an interval that does not tell.
        worth: the smallest gain that pays.

    Returns:
        Rows, to two digits; None where the difference is about `worth` and no number would do.

    Example:
        >>> rows_to_tell(Score(0.05, -0.05, 0.15, 100))
        400
    """
    distance, half = abs(difference.value - worth), (difference.high - difference.low) / 2
    if half == 0 or distance < half / 20:
        return None
    wanted = max(difference.rows * (half / distance) ** 2, difference.rows + 1, FEWEST)
    unit = 10 ** max(0, math.floor(math.log10(wanted)) - 1)
    return math.ceil(round(wanted / unit, 6)) * unit


def _plain(number: float) -> str:
    return f"{number:.3g}"
