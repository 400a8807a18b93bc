"""What a run has to beat: what needs no model at all, measured on the rows that the run holds out.

    python docs/floors.py sentiment.yaml

It follows from the task: the most frequent class, a dictionary of the entities seen in training, the source as its own
translation, the first lines as a summary; and for a language model how often each token comes. Of several the best.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pyfinetune.errors import PyfinetuneError, UserError
from pyfinetune.train.config import RunConfig, load_config
from pyfinetune.train.data.formats import Example
from pyfinetune.train.data.reading import Data, prepare_rows, read_data
from pyfinetune.train.data.tokenizing import load_tokenizer
from pyfinetune.train.evaluation.metrics import Score, perplexity, score
from pyfinetune.train.evaluation.row_statistics import spans_of
from pyfinetune.train.heads.encoders import Part
from pyfinetune.train.heads.kinds import HEADS
from pyfinetune.train.heads.scores import floor_of as head_floor
from pyfinetune.train.heads.scores import references_of, task_of

_TASKS = {
    "classification": "sequence_classification",
    "token_classification": "token_classification",
    "question_answering": "question_answering",
    "summarization": "seq2seq_lm",
    "translation": "seq2seq_lm",
}


@dataclass(frozen=True)
class Floor:
    """What needs no model.

    Args:
        what: in words.
        scores: metric to score, the task's main one first.
    """

    what: str
    scores: dict[str, Score]

    def __str__(self) -> str:
        return f"{self.what}: " + ", ".join(f"{name} {value}" for name, value in self.scores.items())


def floor_of(config: RunConfig) -> Floor:
    """The floor of a run's task on the rows that the run holds out.

    Args:
        config: the run's configuration.

    Returns:
        The floor, with 95 % intervals.

    Raises:
        UserError: nothing is held out, or a row is at fault.

    Example:
        >>> floor_of(load_config("sentiment.yaml")).scores["accuracy"].value  # doctest: +SKIP
        0.5
    """
    data = read_data(config)
    if not data.held_out:
        raise UserError("nothing is held out, so there is nothing to measure on", fix="add test_size: 0.1")
    if data.format not in _TASKS:
        return unigram(config, data)
    found = least_clever(data.train, data.held_out)
    better = _BETTER[data.format](data.train, data.held_out) if data.format in _BETTER else found
    main = next(iter(found.scores))
    return max(found, better, key=lambda floor: floor.scores[main].value)


def least_clever(train: Sequence[Example], held_out: Sequence[Example]) -> Floor:
    """What a run of a model with a head gives beside its metrics: the most frequent class, a text copied, ..."""
    head = HEADS[_TASKS[train[0].format]]
    parts = {"train": Part(train), "held_out": Part(held_out)}
    what, guesses = head_floor(head, parts["train"], parts["held_out"])
    task = task_of(head, parts["held_out"])
    return Floor(what, score(task, guesses, references_of(head, parts["held_out"])))


def dictionary(train: Sequence[Example], held_out: Sequence[Example]) -> Floor:
    """What was an entity in training is one of the same kind again; of several that fit, the longest."""
    kinds: dict[tuple[str, ...], Counter[str]] = {}
    for example in train:
        tokens, tags = _tagged(example)
        for kind, start, end in spans_of(tags):
            kinds.setdefault(tuple(tokens[start:end]), Counter())[kind] += 1
    longest = max(map(len, kinds), default=0)
    predicted, truth = [], []
    for example in held_out:
        tokens, wanted = _tagged(example)
        tags, at = ["O"] * len(tokens), 0
        while at < len(tokens):
            ends = range(min(len(tokens), at + longest), at, -1)
            end = next((end for end in ends if tuple(tokens[at:end]) in kinds), None)
            if end is not None:
                kind = kinds[tuple(tokens[at:end])].most_common(1)[0][0]
                tags[at:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - at - 1)]
            at = end or at + 1
        predicted.append(tags)
        truth.append(wanted)
    return Floor("a dictionary of the training rows' entities", score("token_classification", predicted, truth))


def first_name(train: Sequence[Example], held_out: Sequence[Example]) -> Floor:
    """The first words that begin with a capital letter are the answer to whatever is asked."""
    answers = []
    for example in held_out:
        found = re.search(r"\b[A-Z]\w*(?: [A-Z]\w*)*", example.fields["context"])
        answers.append(found[0] if found else example.fields["context"])
    truth = [example.messages[-1]["content"] for example in held_out]
    return Floor("the first words with capital letters", score("question_answering", answers, truth))


def first_lines(train: Sequence[Example], held_out: Sequence[Example]) -> Floor:
    """The beginning of a text is its summary: as many lines, up to three, as give the best ROUGE-L."""
    truth = [example.messages[-1]["content"] for example in held_out]
    found = []
    for count in (1, 2, 3):
        leads = ["\n".join(_text(example).splitlines()[:count]) for example in held_out]
        what = "the first line" if count == 1 else f"the first {count} lines"
        found.append(Floor(what, score("summarization", leads, truth)))
    return max(found, key=lambda floor: floor.scores["rougeL"].value)


def unigram(config: RunConfig, data: Data) -> Floor:
    """Each learned token as probable as it is frequent in the training rows, whatever stands before it."""
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template, config.eos_token, data.format)
    rows = prepare_rows(data, tokenizer, config)
    counts: Counter[int] = Counter()
    for document in (document for row in rows.train for document in row):
        counts.update(document.input_ids[document.learned].tolist())
    total = sum(counts.values()) + len(tokenizer)  # every token is seen once more than it was
    losses, targets = [], []
    for document in (document for row in rows.held_out for document in row):
        learned = document.input_ids[document.learned].tolist()
        losses.append(-sum(math.log((counts[token] + 1) / total) for token in learned))
        targets.append(len(learned))
    return Floor("tokens by their frequency", perplexity(losses, targets))


# What is worth more than the run's own floor, for some tasks.
_BETTER: dict[str, Callable[[Sequence[Example], Sequence[Example]], Floor]] = {
    "token_classification": dictionary,
    "question_answering": first_name,
    "summarization": first_lines,
}


def _tagged(example: Example) -> tuple[list[str], list[str]]:
    fields = example.fields
    return list(fields["tokens"]), [str(tag) for tag in fields.get("tags") or fields["ner_tags"]]


def _text(example: Example) -> str:
    """The text that a question is about, without the instruction before it."""
    return example.messages[0]["content"].partition("\n\n")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the floor of a run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", metavar="RUN.YAML")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        floor = floor_of(load_config(args.config))
    except PyfinetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(floor)) if args.json else floor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
