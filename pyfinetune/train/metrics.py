"""How good predictions are: each task's metrics, with intervals, by slice, and one system against another.

    task, predictions, references -> row_statistics.statistics_of -> score -> {metric: Score}

Intervals are percentile bootstraps over rows: the same number of rows is drawn with replacement, again and again, and
the metric of each draw is computed from the rows' counts. One seed and number of rows give the same draws for every
system, so that two systems can be compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfinetune.errors import InvalidInput
from pyfinetune.train.row_statistics import METRICS, Statistic, ratio, statistics_of

_CELLS = 1 << 22  # of the table of draws that is held at once
_MOST_SLICES = 50
_LEVEL = (2.5, 97.5)  # percentiles that enclose 95 %


@dataclass(frozen=True)
class Score:
    """A metric's value with its 95 % interval.

    Args:
        value: of the rows as they are. BLEU and chrF go from 0 to 100, the others from 0 to 1.
        low, high: ends of the percentile bootstrap interval over rows.
        rows: how many rows were scored.
    """

    value: float
    low: float
    high: float
    rows: int

    @property
    def digits(self) -> int:
        """Digits after the point that are worth showing."""
        return 1 if max(abs(self.value), abs(self.low), abs(self.high)) >= 20 else 3

    def __str__(self) -> str:
        return f"{self.value:.{self.digits}f} ({self.low:.{self.digits}f} to {self.high:.{self.digits}f})"


def score(
    task: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Score]:
    """Score a task's predictions.

    classification: accuracy, macro and micro F1 (scikit-learn), and the share of answers that are labels at all; one
    that is none is wrong. token_classification: F1, precision and recall of spans by the CoNLL rules (an I- that
    follows no span of its kind begins one), and accuracy of tags. question_answering: SQuAD's F1 and exact match.
    summarization: ROUGE-L, 1 and 2 (rouge-score). translation: BLEU and chrF (sacrebleu). sft: exact match but for
    white space, ROUGE-L, chrF.

    Args:
        task: one of those.
        predictions: one a row: a text, or for token_classification a list of tags.
        references: one a row: a text or a list of texts any of which is right, or a list of tags.
        labels: of classification, the labels there are beside those of `references`.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        Metric to score; the first is the one that a comparison goes by.

    Raises:
        InvalidInput: the task is unknown, there are no rows, the lengths differ, or a row holds something else.
        UserError: a package that a metric needs is not installed.

    Example:
        >>> score("question_answering", ["Paris"], [["Paris", "in Paris"]])["exact_match"].value
        1.0
    """
    statistics = statistics_of(task, predictions, references, labels)
    return _scored(statistics, np.arange(len(references)), seed, resamples)


def score_slices(
    task: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    slices: Sequence[Any],
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Score]]:
    """Score a task's predictions, each group of rows by itself.

    Args:
        task, predictions, references, labels, seed, resamples: as of `score`.
        slices: the value by which rows are grouped, one a row; None is a group too.

    Returns:
        Value (as text) to the scores of its rows, the largest group first.

    Raises:
        InvalidInput: as of `score`; or there is another number of values, or more than 50 different ones.
        UserError: a package that a metric needs is not installed.

    Example:
        >>> found = score_slices("question_answering", ["a b", "c"], ["b a", "c"], ["x", "y"])
        >>> found["x"]["exact_match"].value, found["y"]["exact_match"].value
        (0.0, 1.0)
    """
    if len(slices) != len(references):
        raise InvalidInput(f"score_slices: {len(slices)} values to slice by, but {len(references)} rows")
    members: dict[str, list[int]] = {}
    for row, value in enumerate(slices):
        members.setdefault("(none)" if value is None else str(value), []).append(row)
    if len(members) > _MOST_SLICES:
        raise InvalidInput(
            f"score_slices: {len(members)} different values make slices too small to tell anything; take a column with"
            f" {_MOST_SLICES} or fewer"
        )
    statistics = statistics_of(task, predictions, references, labels)
    ordered = sorted(members.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return {name: _scored(statistics, np.array(rows), seed, resamples) for name, rows in ordered}


def score_difference(
    task: str,
    metric: str,
    predictions: Sequence[Any],
    others: Sequence[Any],
    references: Sequence[Any],
    *,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Score:
    """How much better one system's predictions are than another's on the same rows, by a paired bootstrap.

    Args:
        task, references, labels, seed, resamples: as of `score`.
        metric: one of the task's.
        predictions: of the one system.
        others: of the other.

    Returns:
        The difference, with the interval of the differences over the same draws of rows.

    Raises:
        InvalidInput: as of `score`; or the task has no such metric.
        UserError: a package that a metric needs is not installed.

    Example:
        >>> score_difference("question_answering", "f1", ["a", "b"], ["x", "y"], ["a", "b"]).value
        0.0
        >>> score_difference("question_answering", "f1", ["b", "c"], ["x", "y"], ["b", "c"]).value
        1.0
    """
    if metric not in METRICS.get(task, (metric,)):
        raise InvalidInput(f"score_difference: {task} has no {metric!r}, but {', '.join(METRICS[task])}")
    # Both sides know the same labels, or an answer of the one would be a label to the one alone.
    ours = statistics_of(task, predictions, references, labels)[metric]
    theirs = statistics_of(task, others, references, labels)[metric]
    return _difference(ours, theirs, len(references), seed, resamples)


def perplexity(
    losses: Sequence[float], targets: Sequence[int], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Score]:
    """Mean loss per token, and its exponential.

    Args:
        losses: of each row, the sum of its tokens' losses, in nats.
        targets: of each row, how many tokens those are.
        seed: of the bootstrap over rows.
        resamples: of the bootstrap.

    Returns:
        `loss` and `perplexity`.

    Raises:
        InvalidInput: there are no rows or no targets, the lengths differ, or a loss is no number.

    Example:
        >>> perplexity([2.0, 0.0], [1, 3])["loss"].value
        0.5
    """
    statistics = _loss_statistics("perplexity", losses, targets)
    return _scored(statistics, np.arange(len(losses)), seed, resamples)


def loss_difference(
    losses: Sequence[float],
    others: Sequence[float],
    targets: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Score:
    """How much higher one model's loss per token is than another's on the same rows, by a paired bootstrap.

    Args:
        losses: of each row, the sum of its tokens' losses under the one model, in nats.
        others: the same under the other.
        targets: of each row, how many tokens those are.
        seed: of the bootstrap over rows.
        resamples: of the bootstrap.

    Returns:
        The difference of the mean losses, with its interval.

    Raises:
        InvalidInput: as of `perplexity`.

    Example:
        >>> loss_difference([3.0, 3.0], [1.0, 1.0], [2, 2]).low
        1.0
    """
    ours = _loss_statistics("loss_difference", losses, targets)["loss"]
    theirs = _loss_statistics("loss_difference", others, targets)["loss"]
    return _difference(ours, theirs, len(losses), seed, resamples)


def _loss_statistics(where: str, losses: Sequence[float], targets: Sequence[int]) -> dict[str, Statistic]:
    if len(losses) != len(targets):
        raise InvalidInput(f"{where}: {len(losses)} losses, but {len(targets)} numbers of targets; give one a row")
    rows = np.stack([np.asarray(losses, dtype=np.float64), np.asarray(targets, dtype=np.float64)], axis=1)
    bad = np.flatnonzero(~np.isfinite(rows[:, 0]) | (rows[:, 1] < 0))
    if bad.size:
        loss, count = rows[bad[0]]
        raise InvalidInput(f"{where}: row {bad[0] + 1}: loss {loss} over {count:.0f} targets is no mean of tokens")
    if not rows[:, 1].sum():
        raise InvalidInput(f"{where}: no row has a target, so there is no loss; give at least one")

    def mean(sums: np.ndarray) -> np.ndarray:
        return ratio(sums[:, 0], sums[:, 1])

    return {
        "loss": Statistic(rows, mean),
        "perplexity": Statistic(rows, lambda sums: np.exp(np.minimum(mean(sums), 700.0))),
    }


def _scored(statistics: Mapping[str, Statistic], chosen: np.ndarray, seed: int, resamples: int) -> dict[str, Score]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    rows = {name: statistic.rows[chosen] for name, statistic in statistics.items()}
    for draws in _draws(len(chosen), seed, resamples):
        for name, statistic in statistics.items():
            found[name].append(statistic.finish(draws @ rows[name]))
    return {
        name: Score(statistic.value(chosen), *_interval(np.concatenate(found[name])), len(chosen))
        for name, statistic in statistics.items()
    }


def _difference(ours: Statistic, theirs: Statistic, rows: int, seed: int, resamples: int) -> Score:
    found = [ours.finish(d @ ours.rows) - theirs.finish(d @ theirs.rows) for d in _draws(rows, seed, resamples)]
    every = np.arange(rows)
    return Score(ours.value(every) - theirs.value(every), *_interval(np.concatenate(found)), rows)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, _LEVEL)
    return float(low), float(high)


def _draws(rows: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, float64 [draws, rows], a few draws at a time."""
    if resamples < 1:
        raise InvalidInput(f"score: resamples is {resamples}; an interval needs at least 1, and 1,000 are usual")
    generator = np.random.default_rng(seed)
    at_once = max(1, _CELLS // rows)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.integers(rows, size=(count, rows))
        drawn += np.arange(count)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)
