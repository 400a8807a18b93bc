"""What a model with a head predicts for the held-out rows, how good that is, and what the least clever guess reaches.

model, Part -> predictions_of -> metrics.score;  training and held-out Part -> floor_of -> metrics.score
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyfinetune.train.config import RunConfig
from pyfinetune.train.encoders import Part, collator_of
from pyfinetune.train.formats import Example
from pyfinetune.train.head_loop import outputs_of
from pyfinetune.train.heads import HEADS, Head, labels_of
from pyfinetune.train.reward import SIDES, choices_of, length_floor
from pyfinetune.train.sequences import source_and_target, write_answers
from pyfinetune.train.spans import best_spans, right_answers

if TYPE_CHECKING:
    from pyfinetune.train.reading import Rows

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def task_of(head: Head, part: Part) -> str:
    """The name under which `metrics.score` knows what is predicted.

    Args:
        head: the head.
        part: its held-out rows.

    Returns:
        A task; `sft` for answers of no other.

    Example:
        >>> task_of(HEADS["seq2seq_lm"], Part([Example("f, row 1", "translation")]))
        'translation'
    """
    if head.kind == "reward":
        return "classification"
    formats = {example.format for example in part.examples}
    named = {"classification", "token_classification", "question_answering", "summarization", "translation"}
    return formats.pop() if len(formats) == 1 and formats <= named and _scored_as_itself(head, formats) else "sft"


def predictions_of(
    head: Head,
    part: Part,
    model: Any,
    tokenizer: Any,
    batch_size: int = 8,
    longest_answer: int = 64,
    unanswerable: bool = False,
) -> list[Any]:
    """What the model says of each example.

    Args:
        head: the head.
        part: what `reading.head_part` made of the examples.
        model: the trained model.
        tokenizer: its tokenizer.
        batch_size: rows at once.
        longest_answer: of an encoder-decoder, in tokens.
        unanswerable: whether a question may have no answer in its context; the prediction is then the empty text.

    Returns:
        One an example: a label; a list of tags, where words beyond `max_length` have the tag O; or a text.

    Example:
        >>> predictions_of(head, part, model, tokenizer)[:2]  # doctest: +SKIP
        ['pos', 'neg']
    """
    if head.kind == "reward":
        return choices_of(part, rewards_of(part, model, tokenizer, batch_size))
    if head.kind == "seq2seq_lm":
        return write_answers(model, tokenizer, part.rows, longest_answer, batch_size)
    collator = collator_of(head, tokenizer)
    if head.kind == "question_answering":
        spans = outputs_of(model, part.rows, collator, batch_size)
        return best_spans(part, [logits[0] for logits in spans], [logits[1] for logits in spans], unanswerable)
    best = outputs_of(model, part.rows, collator, batch_size, lambda logits: logits.argmax(-1))
    if head.kind == "sequence_classification":
        return [part.labels[int(number)] for number in best]
    return [
        [part.labels[int(numbers[place])] if place >= 0 else "O" for place in places]
        for numbers, places in zip(best, part.notes, strict=True)
    ]


def rewards_of(part: Part, model: Any, tokenizer: Any, batch_size: int = 8) -> dict[str, list[float]]:
    """The rewards that a model gives to both answers of each pair.

    Args:
        part: what `reward.preference_rows` returned.
        model: the reward model.
        tokenizer: its tokenizer.
        batch_size: rows at once.

    Returns:
        `chosen` and `rejected`, one a row.

    Example:
        >>> rewards_of(part, model, tokenizer)["chosen"][0]  # doctest: +SKIP
        1.7
    """
    collator, found = collator_of(HEADS["reward"], tokenizer), {}
    for side in SIDES:
        rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in (row[f"{side}_ids"] for row in part.rows)
        ]
        found[side] = [float(value[0]) for value in outputs_of(model, rows, collator, batch_size)]
    return found


def references_of(head: Head, part: Part) -> list[Any]:
    """What is right for each example.

    Args:
        head: the head.
        part: its rows.

    Returns:
        One an example: a label, a list of tags, a list of right texts, or a text.

    Example:
        >>> references_of(head, part)[:2]  # doctest: +SKIP
        ['pos', 'pos']
    """
    if head.kind == "reward":
        return [SIDES[0]] * len(part.rows)
    if head.kind == "sequence_classification":
        return [labels_of(example, head)[0] for example in part.examples]
    if head.kind == "token_classification":
        return [labels_of(example, head) for example in part.examples]
    if task_of(head, part) == "question_answering":
        return [right_answers(example) for example in part.examples]
    return [source_and_target(example)[1] for example in part.examples]


def floor_of(head: Head, train: Part, held_out: Part) -> tuple[str, list[Any]]:
    """The least clever predictions that are worth beating.

    Args:
        head: the head.
        train: the training rows; nothing is learned from the others.
        held_out: the rows to predict.

    Returns:
        What they are in words, and one prediction an example.

    Example:
        >>> floor_of(head, train, held_out)[0]  # doctest: +SKIP
        "the most frequent label, 'neg'"
    """
    if head.kind == "reward":
        return length_floor(train, held_out)
    if head.kind == "sequence_classification":
        most = _most_frequent(labels_of(example, head)[0] for example in train.examples)
        return f"the most frequent label, {most!r}", [most] * len(held_out.examples)
    if head.kind == "token_classification":
        return "each word's most frequent tag in the training rows", _remembered_tags(head, train, held_out)
    task = task_of(head, held_out)
    if task == "question_answering":
        if 2 * sum(not right_answers(example) for example in train.examples) > len(train.examples):
            return "no answer to any question", [""] * len(held_out.examples)
        return "the sentence that shares most words with the question", list(map(_likest, held_out.examples))
    if task in ("summarization", "translation"):
        return "the text itself, copied", [source_and_target(example)[0] for example in held_out.examples]
    most = _most_frequent(source_and_target(example)[1] for example in train.examples)
    return "the most frequent answer", [most] * len(held_out.examples)


def score_run(head: Head, parts: dict[str, Part], predictions: Sequence[Any], seed: int) -> dict[str, Any]:
    """A run's metrics beside their floor.

    Args:
        head: the head.
        parts: `train` and `held_out`; the latter may be the first rows only.
        predictions: what `predictions_of` returned for the held-out rows.
        seed: of the intervals.

    Returns:
        `metrics`: name to `value`, `low`, `high` and `rows`; `floor`: `what` it is, and name to value.

    Raises:
        UserError: a package that the metrics need is not installed.

    Example:
        >>> score_run(head, rows.parts, predictions, 42)["floor"]["accuracy"]  # doctest: +SKIP
        0.5
    """
    from pyfinetune.train.metrics import score

    held_out = parts["held_out"]
    task, references = task_of(head, held_out), references_of(head, held_out)
    what, guesses = floor_of(head, parts["train"], held_out)
    found = score(task, predictions, references, seed=seed)
    floor = score(task, guesses, references, seed=seed, resamples=1)
    told = [name for name in found if _tells(head, name)]
    return {
        "metrics": {name: dataclasses.asdict(found[name]) for name in told},
        "floor": {"what": what, **{name: floor[name].value for name in told}},
    }


def scores_of_run(config: RunConfig, rows: Rows, model: Any, tokenizer: Any, batch_size: int) -> dict[str, Any]:
    """A run's metrics and floor, from the trained model and the held-out rows.

    Args:
        config: the run's configuration; an encoder-decoder answers `eval_generate_rows` rows at most.
        rows: what `reading.prepare_rows` returned.
        model: the trained model.
        tokenizer: its tokenizer.
        batch_size: rows at once.

    Returns:
        `metrics` and `floor`, as of `score_run`; of masked words only the floor, and nothing where nothing is asked.

    Raises:
        UserError: a package that the metrics need is not installed.

    Example:
        >>> scores_of_run(config, rows, model, tokenizer, 8)["metrics"]["accuracy"]["value"]  # doctest: +SKIP
        0.79
    """
    head, train, held_out = rows.head, rows.parts["train"], rows.parts["held_out"]
    if head.kind == "masked_lm":
        return {"floor": frequency_floor(train, held_out, len(tokenizer))}
    longest = 0
    if head.kind == "seq2seq_lm":
        held_out = held_out.first(config.eval_generate_rows)
        longest = max(len(row["labels"]) for row in train.rows)
    if not held_out.rows:
        return {}
    unanswerable = head.kind == "question_answering" and not all(map(right_answers, train.examples))
    answers = predictions_of(head, held_out, model, tokenizer, batch_size, longest, unanswerable)
    return score_run(head, {"train": train, "held_out": held_out}, answers, config.seed)


def frequency_floor(train: Part, held_out: Part, vocabulary: int) -> dict[str, Any]:
    """The loss of guessing every token by how often it stands in the training rows.

    Args:
        train: rows of `encoders.masked_rows`.
        held_out: the rows to guess.
        vocabulary: how many tokens there are; each is counted once more than it occurs.

    Returns:
        `what` it is, `loss` and `perplexity`.

    Example:
        >>> frequency_floor(train, held_out, 30522)["loss"]  # doctest: +SKIP
        6.9
    """

    def counted(part: Part) -> np.ndarray:
        free = [np.array(row["input_ids"])[np.array(row["special_tokens_mask"]) == 0] for row in part.rows]
        return np.bincount(np.concatenate([np.empty(0, dtype=np.int64), *free]), minlength=vocabulary)

    seen, wanted = counted(train) + 1.0, counted(held_out)
    loss = float(-(wanted * np.log(seen / seen.sum())).sum() / wanted.sum())
    return {"what": "each token by its frequency", "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _tells(head: Head, metric: str) -> bool:
    """Whether a metric says anything: a head always answers, and the sides of a pair are no classes."""
    return metric == "accuracy" if head.kind == "reward" else metric != "answered" or not head.has_labels


def _scored_as_itself(head: Head, formats: set[str]) -> bool:
    """An encoder-decoder writes tags as a list of spans, which is no list of tags."""
    return head.kind != "seq2seq_lm" or formats != {"token_classification"}


def _most_frequent(values: Any) -> str:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _remembered_tags(head: Head, train: Part, held_out: Part) -> list[list[str]]:
    seen: dict[str, Counter[str]] = {}
    for example in train.examples:
        for word, tag in zip(example.fields["tokens"], labels_of(example, head), strict=True):
            seen.setdefault(word, Counter())[tag] += 1
    tags = {word: min(counts, key=lambda tag: (-counts[tag], tag)) for word, counts in seen.items()}
    usual = _most_frequent(tag for example in train.examples for tag in labels_of(example, head))
    return [[tags.get(word, usual) for word in example.fields["tokens"]] for example in held_out.examples]


def _likest(example: Example) -> str:
    asked = set(example.fields["question"].lower().split())
    sentences = _SENTENCE.split(example.fields["context"].strip())
    return max(sentences, key=lambda sentence: len(asked & set(sentence.lower().split())))
