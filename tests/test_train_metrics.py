"""Metrics against the libraries that define them and against counts by hand; intervals against known truths."""

from __future__ import annotations

import importlib
import math
import socket

import numpy as np
import pytest

from pyfinetune.errors import InvalidInput, UserError
from pyfinetune.train.evaluation import row_statistics
from pyfinetune.train.evaluation.metrics import (
    METRICS,
    Score,
    loss_difference,
    perplexity,
    score,
    score_difference,
    score_slices,
)
from pyfinetune.train.evaluation.row_statistics import as_label, normalized_answer, spans_of

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "house",
    "red",
    "blue",
    "it",
    "was",
    "and",
    "then",
]


def sentences(count: int, seed: int, shortest: int = 0) -> list[str]:
    """Random sentences, some of them empty where `shortest` is 0."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(shortest, 14))) for _ in range(count)]


def values(scores: dict[str, Score]) -> dict[str, float]:
    return {name: found.value for name, found in scores.items()}


# classification


def test_classification_by_hand():
    right = ["pos", "pos", "neg", "neg", "neg"]
    said = ["pos", "neg", "neg", "dunno", "neg"]
    found = values(score("classification", said, right))
    # pos: 1 hit, 1 said, 2 there; neg: 2 hits, 3 said, 3 there
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 6) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 5))
    assert found["answered"] == pytest.approx(4 / 5)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_the_formula_of_resamples_is_sklearns(classes):
    """Value and interval come from two places; they agree on every choice of rows."""
    generator = np.random.default_rng(classes)
    names = [f"class {number}" for number in range(classes)]
    right = [names[number] for number in generator.integers(classes, size=60)]
    said = [[*names, "no label"][number] for number in generator.integers(classes + 1, size=60)]
    found = row_statistics.statistics_of("classification", said, right, labels=["never there"])
    for size in (1, 3, 60):
        chosen = generator.integers(60, size=size)
        for name in ("accuracy", "macro_f1", "micro_f1"):
            sums = np.asarray(found[name].rows[chosen].sum(axis=0)).reshape(1, -1)
            assert found[name].finish(sums)[0] == pytest.approx(found[name].value(chosen)), (name, size)


def test_an_answer_names_a_label_whatever_its_case_and_punctuation():
    labels = ["positive", "negative", "42", "US", "us"]
    assert as_label("Positive.\nBecause it is.", labels) == "positive"
    assert as_label(' "negative" ', labels) == "negative"
    assert as_label("42", labels) == "42"
    assert as_label("US", labels) == "US"  # two labels that differ by case
    assert as_label("Us", labels) is None
    assert as_label("It is positive", labels) is None
    assert as_label("", labels) is None
    assert values(score("classification", [1, 0], [1, 1]))["accuracy"] == 0.5


def test_a_label_of_the_training_set_is_an_answer():
    found = values(score("classification", ["c", "zzz"], ["a", "b"], labels=["a", "b", "c"]))
    assert found["answered"] == 0.5
    assert found["accuracy"] == 0.0


# token_classification


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        (["O", "O"], []),
        ([], []),
        (["B-x", "I-x", "B-x"], [("x", 0, 2), ("x", 2, 3)]),
        (["O", "I-x", "I-x"], [("x", 1, 3)]),  # an I- without its B- begins a span
        (["B-x", "I-y"], [("x", 0, 1), ("y", 1, 2)]),
        (["I-x", "O", "I-x"], [("x", 0, 1), ("x", 2, 3)]),
        (["S-x", "I-x"], [("x", 0, 1), ("x", 1, 2)]),
        (["B-x", "E-x", "I-x"], [("x", 0, 2), ("x", 2, 3)]),
        (["PER", "PER", "LOC"], [("PER", 0, 2), ("LOC", 2, 3)]),
        (["B-creative-work", "I-creative-work"], [("creative-work", 0, 2)]),
    ],
)
def test_spans(tags, spans):
    assert spans_of(tags) == spans


def test_span_f1_by_hand():
    right = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    said = [["B-a", "O", "O", "B-b"], ["B-a", "I-a"]]  # one whole hit of three said and three there
    found = values(score("token_classification", said, right))
    assert found["span_f1"] == pytest.approx(1 / 3)
    assert found["span_precision"] == pytest.approx(1 / 3)
    assert found["span_recall"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(3 / 6)
    nothing = values(score("token_classification", [["O"]], [["O"]]))
    assert nothing == {"span_f1": 0.0, "span_precision": 0.0, "span_recall": 0.0, "accuracy": 1.0}


# question_answering


def test_squad_by_hand():
    assert normalized_answer("The  cat, an  A-team!") == "cat ateam"
    right = [["the Cat", "a dog"], "Eiffel Tower", []]
    found = values(score("question_answering", ["cat!", "Tower of Eiffel in Paris", ""], right))
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx((1 + 2 * 2 / (5 + 2) + 1) / 3)
    assert values(score("question_answering", ["something"], [[]]))["f1"] == 0.0


# texts


def test_rouge_is_rouge_scores():
    from rouge_score.rouge_scorer import RougeScorer

    said, right = sentences(40, 1), sentences(40, 2)
    said[0] = "Don't STOP, it's 3.5 o'clock!"
    right[0] = "don't stop; its 3 o'clock"
    found = values(score("summarization", said, right))
    names = METRICS["summarization"]
    rows = [RougeScorer(list(names)).score(b, a) for a, b in zip(said, right, strict=True)]
    for name in names:
        assert found[name] == pytest.approx(np.mean([row[name].fmeasure for row in rows])), name


def test_rouge_reads_other_scripts_than_ascii():
    assert values(score("summarization", ["кот сидит"], ["кот спит"]))["rouge1"] == pytest.approx(0.5)
    assert values(score("summarization", ["Käse"], ["Kuse"]))["rouge1"] == 0.0
    assert values(score("summarization", ["我爱你"], ["我爱他"]))["rouge1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("several", [False, True])
def test_bleu_and_chrf_are_sacrebleus(several):
    from sacrebleu.metrics import BLEU, CHRF

    said, first, second = (sentences(50, seed) for seed in (1, 2, 3))
    first = [a if number % 2 else b for number, (a, b) in enumerate(zip(said, first, strict=True))]
    # A row may have a second right answer or not.
    seconds = [text if number % 3 else None for number, text in enumerate(second)]
    right = [[a, b] if b is not None else [a] for a, b in zip(first, seconds, strict=True)] if several else first
    streams = [first, seconds] if several else [first]
    found = values(score("translation", said, right))
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(said, streams).score)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(said, streams).score)
    assert found["bleu"] > 1


def test_sft_counts_equal_texts_but_for_white_space():
    found = values(score("sft", ["a  b\n", "A b", "c"], ["a b", "a b", ["d", "c"]]))
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert set(found) == set(METRICS["sft"])


@pytest.mark.parametrize("task", ["summarization", "translation", "sft", "question_answering"])
def test_empty_answers_are_scored(task):
    found = score(task, ["", ""], ["a cat sat on the mat", "it was then"])
    assert all(each.value == each.low == each.high == 0.0 for each in found.values())


def test_nothing_reaches_for_the_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    for task in METRICS:
        said = [["O"]] if task == "token_classification" else ["a b. c d."]
        assert score(task, said, said, resamples=5)


# intervals


def test_corpus_metrics_are_resampled_by_their_counts():
    """The interval of BLEU is that of sacrebleu scoring the drawn rows' texts anew."""
    from sacrebleu.metrics import BLEU

    said, right = sentences(30, 1, shortest=5), sentences(30, 2, shortest=5)
    right[::2] = said[::2]
    found = score("translation", said, right, seed=3, resamples=40)["bleu"]
    draws = np.random.default_rng(3).integers(30, size=(40, 30))
    scores = [BLEU().corpus_score([said[i] for i in draw], [[right[i] for i in draw]]).score for draw in draws]
    assert [found.low, found.high] == pytest.approx(list(np.percentile(scores, (2.5, 97.5))))


@pytest.mark.parametrize("truth", [0.8, 0.5])
def test_the_interval_covers_a_known_accuracy(truth):
    generator = np.random.default_rng(int(100 * truth))
    covered, trials, rows = 0, 400, 150
    for trial in range(trials):
        hit = generator.random(rows) < truth
        found = score("question_answering", ["yes" if h else "no" for h in hit], ["yes"] * rows, seed=trial)
        covered += found["exact_match"].low <= truth <= found["exact_match"].high
    # 95 % of 400, give or take three standard deviations of a binomial and the bootstrap's own small shortfall
    assert 0.905 <= covered / trials <= 0.985


def test_intervals_are_seeded_and_the_chunks_do_not_show(monkeypatch):
    said, right = sentences(60, 5), sentences(60, 6)
    first = score("summarization", said, right, seed=1, resamples=100)
    assert score("summarization", said, right, seed=1, resamples=100) == first
    assert score("summarization", said, right, seed=2, resamples=100) != first
    monkeypatch.setattr("pyfinetune.train.evaluation.metrics._CELLS", 60 * 7)
    assert score("summarization", said, right, seed=1, resamples=100) == first


def test_one_row_has_an_interval_of_no_width():
    found = score("sft", ["a"], ["a"], resamples=10)["exact_match"]
    assert (found.value, found.low, found.high, found.rows) == (1.0, 1.0, 1.0, 1)
    assert str(found) == "1.000 (1.000 to 1.000)"
    assert str(Score(27.31, 20.0, 31.26, 5)) == "27.3 (20.0 to 31.3)"


# slices and pairs


def test_slices_are_scored_as_if_they_were_alone():
    right = ["x", "x", "y", "y", "y", "x"]
    said = ["x", "y", "y", "y", "zzz", "x"]
    by = ["web", "web", "book", "book", "book", None]
    found = score_slices("classification", said, right, by, seed=4)
    assert list(found) == ["book", "web", "(none)"]
    assert found["web"]["accuracy"].value == 0.5
    # In `book` there is no x at all: it has no F1 there, rather than one of 0.
    assert found["book"]["macro_f1"] == score("classification", said[2:5], right[2:5], seed=4)["macro_f1"]
    assert found["book"]["macro_f1"].value == pytest.approx(2 * 2 / (2 + 3))
    assert found["(none)"]["accuracy"].rows == 1


def test_paired_differences_are_narrower_than_two_intervals():
    generator = np.random.default_rng(0)
    right = ["yes"] * 200
    hard = generator.random(200) < 0.4  # both systems fail on the same rows
    worse = ["no" if h or generator.random() < 0.1 else "yes" for h in hard]
    better = ["no" if h else "yes" for h in hard]
    found = score_difference("question_answering", "exact_match", better, worse, right)
    one, other = (score("question_answering", s, right)["exact_match"] for s in (better, worse))
    assert found.value == pytest.approx(one.value - other.value)
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < min(one.high - one.low, other.high - other.low)
    same = score_difference("classification", "macro_f1", worse, worse, right)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_perplexity_weighs_rows_by_their_tokens():
    found = perplexity([2.0, 0.0, 6.0], [1, 3, 4])
    assert found["loss"].value == pytest.approx(1.0)
    assert found["perplexity"].value == pytest.approx(math.e)
    assert found["loss"].low < 1.0 < found["loss"].high
    assert perplexity([1e6], [1])["perplexity"].value == pytest.approx(math.exp(700))
    difference = loss_difference([3.0, 5.0], [1.0, 1.0], [2, 2])
    assert difference.value == pytest.approx(1.5)
    assert difference.low == 1.0


# refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("poetry", ["a"], ["a"]), "task is 'poetry'"),
        (("sft", ["a", "b"], ["a"]), "2 predictions, but 1 references"),
        (("sft", [], []), "no rows"),
        (("sft", ["a", None], ["a", "b"]), "predictions, row 2: is NoneType"),
        (("sft", ["a"], [[]]), "references, row 1: holds no text"),
        (("translation", ["a"], [["a", 3]]), "references, row 1: is int"),
        (("translation", ["a"], [3]), "references, row 1: is int"),
        (("classification", [0.5], ["a"]), "predictions, row 1: is float"),
        (("token_classification", [["O"]], [["O", "O"]]), "row 1: 1 tags are predicted, but the reference has 2"),
        (("token_classification", ["O"], [["O"]]), "predictions, row 1: is 'O', not a list of tags"),
    ],
)
def test_refusals_name_the_row(arguments, said):
    with pytest.raises(InvalidInput, match=said):
        score(*arguments)


def test_more_refusals():
    with pytest.raises(InvalidInput, match="51 different values"):
        score_slices("sft", ["a"] * 51, ["a"] * 51, range(51))
    with pytest.raises(InvalidInput, match="1 values to slice by, but 2 rows"):
        score_slices("sft", ["a"] * 2, ["a"] * 2, ["x"])
    with pytest.raises(InvalidInput, match="has no 'bleu'"):
        score_difference("sft", "bleu", ["a"], ["a"], ["a"])
    with pytest.raises(InvalidInput, match="resamples is 0"):
        score("sft", ["a"], ["a"], resamples=0)
    with pytest.raises(InvalidInput, match="row 2: loss nan"):
        perplexity([1.0, math.nan], [1, 1])
    with pytest.raises(InvalidInput, match="no row has a target"):
        perplexity([0.0], [0])
    with pytest.raises(InvalidInput, match="2 losses, but 1"):
        perplexity([1.0, 1.0], [1])


@pytest.mark.parametrize(
    ("task", "module"),
    [("classification", "sklearn"), ("translation", "sacrebleu"), ("summarization", "rouge_score")],
)
def test_a_missing_package_says_what_installs_it(monkeypatch, task, module):
    original = importlib.import_module

    def absent(name, *args):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'pyfinetune\[eval\]'") as caught:
        score(task, ["a"], ["a"])
    assert module in str(caught.value)
