"""Predictions and references into numbers a row, from whose sums each metric follows.

    task, predictions, references -> statistics_of -> {metric: Statistic}

A corpus metric such as BLEU is no mean over rows, but it is a function of a sum over rows. So any choice of rows (a
slice, a bootstrap resample) is scored from the rows' numbers, and no text is looked at twice.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.train.data.cleaning import CJK

# The first of each task is the one that a comparison goes by.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "micro_f1", "answered"),
    "token_classification": ("span_f1", "span_precision", "span_recall", "accuracy"),
    "question_answering": ("f1", "exact_match"),
    "summarization": ("rougeL", "rouge1", "rouge2"),
    "translation": ("bleu", "chrf"),
    "sft": ("exact_match", "rougeL", "chrf"),
}
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_AROUND_A_LABEL = string.whitespace + "\"'`*_.,;:!()[]"

Finish = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Statistic:
    """What a metric needs to know of each row.

    Args:
        rows: float64 [rows, k], a numpy array or a scipy sparse one.
        finish: sums over rows [n, k] to values [n].
        exact: indices of rows to the value by the library that defines the metric; None where `finish` does it.
    """

    rows: Any
    finish: Finish
    exact: Callable[[np.ndarray], float] | None = None

    def value(self, chosen: np.ndarray) -> float:
        """The metric over some rows.

        Args:
            chosen: int64, indices of the rows.
        """
        if self.exact is not None:
            return float(self.exact(chosen))
        sums = np.asarray(self.rows[chosen].sum(axis=0), dtype=np.float64).reshape(1, -1)
        return float(self.finish(sums)[0])


def statistics_of(
    task: str, predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str] | None = None
) -> dict[str, Statistic]:
    """The statistics of a task's metrics.

    Args:
        task: a key of `METRICS`.
        predictions: one a row: a text, or for token_classification a list of tags.
        references: one a row: a text or a list of texts any of which is right, or a list of tags.
        labels: of classification, the labels there are beside those of `references`.

    Returns:
        Metric to statistic, in the order of `METRICS`.

    Raises:
        InvalidInput: the task is unknown, there are no rows, the lengths differ, or a row holds something else.
        UserError: a package that a metric needs is not installed.

    Example:
        >>> statistics_of("question_answering", ["the cat"], ["cat"])["f1"].value(np.arange(1))
        1.0
    """
    if task not in METRICS:
        raise InvalidInput(f"score: task is {task!r}, and metrics are known for {', '.join(METRICS)}")
    if len(predictions) != len(references):
        raise InvalidInput(f"score: {len(predictions)} predictions, but {len(references)} references; give one a row")
    if not len(references):
        raise InvalidInput(f"score: no rows to score for {task}; give at least one prediction and its reference")
    if task == "classification":
        return _classification(predictions, references, labels)
    if task == "token_classification":
        return _spans(predictions, references)
    answers = [_text("predictions", row, value) for row, value in enumerate(predictions)]
    right = [_texts(row, value, task) for row, value in enumerate(references)]
    return _TEXT_TASKS[task](answers, right)


def as_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names.

    Args:
        answer: what a model said.
        labels: the labels there are.

    Returns:
        The label that the answer's first line equals, but for case and for the spaces, quotes and punctuation around
        it; None where it equals none, or several that differ by case alone.

    Example:
        >>> as_label(" Positive.", ["positive", "negative"]), as_label("It is positive", ["positive"])
        ('positive', None)
    """
    if answer in labels:
        return answer
    line = next(iter(answer.strip().splitlines()), "")
    plain = line.strip(_AROUND_A_LABEL).casefold()
    found = [label for label in labels if label.strip(_AROUND_A_LABEL).casefold() == plain]
    return found[0] if len(found) == 1 else None


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans that a text's tags mark, by the rules of the CoNLL evaluation script.

    A span begins at B-x and goes on through the I-x that follow. An I-x that follows no span of kind x begins one, as
    if it were B-x. S-x is a span alone, and nothing goes on after E-x. A tag without a prefix is one of its own kind.

    Args:
        tags: one a token; `O` is outside.

    Returns:
        (kind, first token, token after the last), in order.

    Example:
        >>> spans_of(["B-per", "I-per", "O", "I-loc", "B-loc"])
        [('per', 0, 2), ('loc', 3, 4), ('loc', 4, 5)]
    """
    found: list[tuple[str, int, int]] = []
    previous, before = "", ""  # kind and prefix of the span that is open; no kind, no span
    for at, tag in enumerate(tags):
        prefix, dash, kind = tag.partition("-")
        if not dash:
            prefix, kind = "I", tag
        if tag == "O":
            previous = ""
            continue
        if prefix in ("B", "S") or kind != previous or before in ("E", "S"):
            found.append((kind, at, at))
        found[-1] = (kind, found[-1][1], at + 1)
        previous, before = kind, prefix
    return found


def normalized_answer(text: str) -> str:
    """A text as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    Args:
        text: any text.

    Returns:
        The text in that form.

    Example:
        >>> normalized_answer("The  U.S. Army!")
        'us army'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def library(name: str) -> Any:
    """Import a package that only evaluation needs.

    Args:
        name: of a module.

    Returns:
        The module.

    Raises:
        UserError: the package is not installed; says how to install it.

    Example:
        >>> library("json").dumps(1)
        '1'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise UserError(f"this metric needs {package}, which is not installed", fix=_INSTALL) from error


_INSTALL = "pip install 'pyfinetune[eval]'"


def ratio(upper: np.ndarray, lower: np.ndarray, *, otherwise: float = 0.0) -> np.ndarray:
    """Elementwise quotient that is told what nothing divided by nothing is.

    Args:
        upper, lower: arrays of equal shape.
        otherwise: value where `lower` is 0.

    Returns:
        float64, of that shape.

    Example:
        >>> ratio(np.array([1, 0]), np.array([2, 0])).tolist()
        [0.5, 0.0]
    """
    upper, lower = np.asarray(upper, dtype=np.float64), np.asarray(lower, dtype=np.float64)
    return np.divide(upper, lower, out=np.full(upper.shape, otherwise), where=lower != 0)


def _mean(values: Sequence[float]) -> Statistic:
    rows = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)
    return Statistic(rows, lambda sums: ratio(sums[:, 0], sums[:, 1]))


def _text(name: str, row: int, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"score: {name}, row {row + 1}: is {type(value).__name__}, not text")
    return value


def _texts(row: int, value: Any, task: str) -> list[str]:
    """The right answers of a row; a question without one is answered by saying nothing, as SQuAD has it."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Sequence):
        raise InvalidInput(f"score: references, row {row + 1}: is {type(value).__name__}, not a text or several")
    if not value and task != "question_answering":
        raise InvalidInput(f"score: references, row {row + 1}: holds no text; give at least one")
    return [_text("references", row, text) for text in value] or [""]


def _classification(
    predictions: Sequence[Any], references: Sequence[Any], labels: Sequence[str] | None
) -> dict[str, Statistic]:
    skl, sparse = library("sklearn.metrics"), library("scipy.sparse")
    right = [_label("references", row, value) for row, value in enumerate(references)]
    answers = [_label("predictions", row, value) for row, value in enumerate(predictions)]
    names = list(dict.fromkeys([*sorted({*right}), *map(str, labels or ())]))
    code = {name: number for number, name in enumerate(names)}
    none = len(names)  # the code of an answer that is no label
    true = np.array([code[name] for name in right])
    given = np.array([code.get(as_label(answer, names), none) for answer in answers])

    rows, ones, size = np.arange(len(true)), np.ones(len(true)), (len(true), none + 1)
    wanted = sparse.csr_array((ones, (rows, true)), shape=size)
    said = sparse.csr_array((ones, (rows, given)), shape=size)
    hits = wanted.multiply(said).tocsr()
    # [rows, 3 * labels]: hit, said and wanted, label by label
    counts = sparse.hstack([part[:, :none] for part in (hits, said, wanted)], format="csr")

    def macro(sums: np.ndarray) -> np.ndarray:
        hit, said, wanted = np.split(sums, 3, axis=1)
        each = ratio(2 * hit, said + wanted)
        # A label that neither occurs nor is said has no F1, and is left out.
        return ratio(each.sum(axis=1), (said + wanted > 0).sum(axis=1))

    def micro(sums: np.ndarray) -> np.ndarray:
        hit, said, wanted = (part.sum(axis=1) for part in np.split(sums, 3, axis=1))
        return ratio(2 * hit, said + wanted)

    def exact(average: str) -> Callable[[np.ndarray], float]:
        def value(chosen: np.ndarray) -> float:
            options = {"labels": np.arange(none), "average": average, "zero_division": np.nan}
            return np.nan_to_num(skl.f1_score(true[chosen], given[chosen], **options))

        return value

    accuracy = _mean(true == given)
    return {
        "accuracy": Statistic(accuracy.rows, accuracy.finish, lambda at: skl.accuracy_score(true[at], given[at])),
        "macro_f1": Statistic(counts, macro, exact("macro")),
        "micro_f1": Statistic(counts, micro, exact("micro")),
        "answered": _mean(given != none),
    }


def _label(name: str, row: int, value: Any) -> str:
    """A class is a name or a whole number."""
    return str(value) if isinstance(value, int | np.integer) else _text(name, row, value)


def _spans(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, Statistic]:
    rows = []
    for row, (said, wanted) in enumerate(zip(predictions, references, strict=True)):
        for name, tags in (("predictions", said), ("references", wanted)):
            if isinstance(tags, str) or not isinstance(tags, Sequence) or not all(isinstance(t, str) for t in tags):
                raise InvalidInput(f"score: {name}, row {row + 1}: is {tags!r:.60}, not a list of tags")
        if len(said) != len(wanted):
            raise InvalidInput(
                f"score: row {row + 1}: {len(said)} tags are predicted, but the reference has {len(wanted)}"
            )
        found, true = set(spans_of(said)), set(spans_of(wanted))
        equal = sum(a == b for a, b in zip(said, wanted, strict=True))
        rows.append((len(found & true), len(found), len(true), equal, len(wanted)))
    counts = np.array(rows, dtype=np.float64)
    return {
        "span_f1": Statistic(counts, lambda sums: ratio(2 * sums[:, 0], sums[:, 1] + sums[:, 2])),
        "span_precision": Statistic(counts, lambda sums: ratio(sums[:, 0], sums[:, 1])),
        "span_recall": Statistic(counts, lambda sums: ratio(sums[:, 0], sums[:, 2])),
        "accuracy": Statistic(counts, lambda sums: ratio(sums[:, 3], sums[:, 4])),
    }


def _token_f1(answer: str, right: str) -> float:
    said, wanted = normalized_answer(answer).split(), normalized_answer(right).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def _question_answering(answers: list[str], right: list[list[str]]) -> dict[str, Statistic]:
    pairs = list(zip(answers, right, strict=True))
    equal = [any(normalized_answer(answer) == normalized_answer(r) for r in texts) for answer, texts in pairs]
    return {
        "f1": _mean([max(_token_f1(answer, r) for r in texts) for answer, texts in pairs]),
        "exact_match": _mean(equal),
    }


class _Words:
    """Words as rouge_score takes them, of any script: its own tokenizer keeps ASCII alone, and scores others 0."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _rouge(names: Sequence[str], answers: list[str], right: list[list[str]]) -> dict[str, Statistic]:
    scorer = library("rouge_score.rouge_scorer").RougeScorer(list(names), tokenizer=_Words())
    found = [scorer.score_multi(texts, answer) for answer, texts in zip(answers, right, strict=True)]
    return {name: _mean([row[name].fmeasure for row in found]) for name in names}


def _sacrebleu(name: str, answers: list[str], right: list[list[str]]) -> Statistic:
    """BLEU or chrF: sacrebleu counts each row, and makes the score of summed counts."""
    metric = getattr(library("sacrebleu.metrics"), name)()
    most = max(map(len, right))
    streams = [[texts[at] if at < len(texts) else None for texts in right] for at in range(most)]
    rows = np.array(metric._extract_corpus_statistics(answers, streams), dtype=np.float64)

    def finish(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._compute_score_from_stats(row).score for row in sums.astype(np.int64).tolist()])

    return Statistic(rows, finish)


def _summarization(answers: list[str], right: list[list[str]]) -> dict[str, Statistic]:
    return _rouge(METRICS["summarization"], answers, right)


def _translation(answers: list[str], right: list[list[str]]) -> dict[str, Statistic]:
    return {"bleu": _sacrebleu("BLEU", answers, right), "chrf": _sacrebleu("CHRF", answers, right)}


def _sft(answers: list[str], right: list[list[str]]) -> dict[str, Statistic]:
    pairs = zip(answers, right, strict=True)
    equal = [any(" ".join(answer.split()) == " ".join(r.split()) for r in texts) for answer, texts in pairs]
    chrf = _sacrebleu("CHRF", answers, right)
    return {"exact_match": _mean(equal), **_rouge(["rougeL"], answers, right), "chrf": chrf}


_TEXT_TASKS: Mapping[str, Callable[[list[str], list[list[str]]], dict[str, Statistic]]] = {
    "question_answering": _question_answering,
    "summarization": _summarization,
    "translation": _translation,
    "sft": _sft,
}
