"""Prompts of a comparison: a row's question in a template's words, with examples from the training set before it.

    Style, Example -> PromptMaker.ask -> Asked (the messages to answer, and how many examples had room)

Examples are chosen once for all rows, or for each row by similarity (TF-IDF over words, cosine). One that asks what
the row asks is passed over: it would give the answer away.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyfinetune.errors import UserError
from pyfinetune.train.checked_yaml import nearest
from pyfinetune.train.comparing.config import QUESTION
from pyfinetune.train.data.cleaning import WORD
from pyfinetune.train.data.formats import Example
from pyfinetune.train.evaluation.predicting import asked_messages, prompts_of
from pyfinetune.train.evaluation.row_statistics import library

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Style:
    """A way to ask.

    Args:
        name: of it, for the table.
        template: the question's words; `{question}` is the one the task asks, `{labels}` lists the labels, and any
            other name is a column of the row.
        examples: how many examples stand before the question.
        choice: `fixed`, the same ones before every question, or `similar`, those most like the row.
    """

    name: str
    template: str = QUESTION
    examples: int = 0
    choice: Literal["fixed", "similar"] = "fixed"


@dataclass(frozen=True)
class Asked:
    """A question as a model is asked it.

    Args:
        example: its messages are the whole prompt, with the right answer last.
        prompt: token ids before the answer.
        examples: how many examples are in it.
        dropped: how many there was no room for.
        stops: tokens that end an answer.
    """

    example: Example
    prompt: list[int]
    examples: int
    dropped: int
    stops: list[int]


class PromptMaker:
    """Makes the prompts of a comparison.

    Args:
        pool: training examples that may stand before a question.
        labels: of a classification, for `{labels}`; empty otherwise.
        seed: decides which examples are the fixed ones.
    """

    def __init__(self, pool: Sequence[Example], labels: Sequence[str] = (), seed: int = 0):
        self.pool = [e for e in pool if len(asked_messages(e)) + 1 == len(e.messages) and _is_plain(e)]
        self.labels = list(labels)
        self._keys = [_key(example) for example in self.pool]
        order = list(range(len(self.pool)))
        random.Random(seed).shuffle(order)
        self._order = _by_turns(order, [e.messages[-1]["content"] for e in self.pool]) if self.labels else order

    def ask(self, style: Style, example: Example, tokenizer: Any, positions: int | None, room: int) -> Asked:
        """Ask one row's question.

        Args:
            style: how.
            example: the row.
            tokenizer: of the model that is asked.
            positions: tokens that the model can hold; None where it does not say.
            room: tokens that the answer may take.

        Returns:
            The prompt. Examples are left out from the front until it fits; a question that is too long by itself
            stays as it is.

        Raises:
            UserError: the template names a column that is not there, or the tokenizer's template refuses the prompt.
        """
        shots = [self.pool[at] for at in self.chosen(style, example)]
        wanted = len(shots)
        while True:
            asked = self._written(style, example, shots, tokenizer)
            (prompt,), stops = prompts_of([asked], tokenizer)
            if not shots or positions is None or len(prompt) + room <= positions:
                return Asked(asked, prompt, len(shots), wanted - len(shots), stops)
            shots = shots[1:]

    def chosen(self, style: Style, example: Example) -> list[int]:
        """The examples that stand before a row's question.

        Args:
            style: how many, and how they are chosen.
            example: the row.

        Returns:
            Indices into `pool`, the most similar one last.
        """
        if not (style.examples and self.pool):
            return []
        own = _key(example)
        if style.choice == "fixed":
            return [at for at in self._order if self._keys[at] != own][: style.examples]
        same = self._keys.count(own)
        vectorizer, search = self._search
        count = min(len(self.pool), style.examples + same)
        found = search.kneighbors(vectorizer.transform([question_of(example)]), count, return_distance=False)[0]
        return [int(at) for at in found if self._keys[at] != own][: style.examples][::-1]

    @functools.cached_property
    def _search(self) -> tuple[Any, Any]:
        """TF-IDF of the pool's questions, and its nearest neighbours."""
        text, neighbors = library("sklearn.feature_extraction.text"), library("sklearn.neighbors")
        vectorizer = text.TfidfVectorizer(tokenizer=WORD.findall, token_pattern=None, sublinear_tf=True)
        matrix = vectorizer.fit_transform([question_of(example) for example in self.pool])
        return vectorizer, neighbors.NearestNeighbors(metric="cosine", algorithm="brute").fit(matrix)

    def _written(self, style: Style, example: Example, shots: Sequence[Example], tokenizer: Any) -> Example:
        *before, last = asked_messages(example)
        answer = example.messages[len(before) + 1]
        question = {**last, "content": fill(style.template, example, self.labels)}
        pairs = [(fill(style.template, shot, self.labels), shot.messages[-1]["content"]) for shot in shots]
        if tokenizer.chat_template is None:
            # Without a template questions and answers are joined as they stand, and so are these.
            between = "" if example.format == "prompt_completion" else "\n"
            text = "".join(f"{asked}{between}{said}\n\n" for asked, said in pairs) + question["content"]
            return dataclasses.replace(example, messages=[*before, {**question, "content": text}, answer])
        head = [message for message in before if message["role"] in ("system", "developer")]
        turns = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        return dataclasses.replace(example, messages=[*head, *turns, *before[len(head) :], question, answer])


def fill(template: str, example: Example, labels: Sequence[str] = ()) -> str:
    """A template with a row's values in its places.

    Args:
        template: text with `{question}`, `{labels}` or a column's name in braces; `{{` and `}}` are braces.
        example: the row.
        labels: what `{labels}` lists.

    Returns:
        The text.

    Raises:
        UserError: a name is neither of the two nor a column of the row.

    Example:
        >>> example = Example("f, row 1", "alpaca", [{"role": "user", "content": "1+1"}], columns={"level": 3})
        >>> fill("Level {level}: {question}", example)
        'Level 3: 1+1'
    """
    known = {**example.columns, "question": question_of(example), "labels": ", ".join(labels)}

    def value(place: re.Match[str]) -> str:
        if place[0] in ("{{", "}}"):
            return place[0][0]
        if place[1] not in known:
            hint = nearest(place[1], known) or f"the names are {', '.join(known)}"
            raise UserError(f"prompts: {{{place[1]}}} is no column of {example.place}", fix=f"{hint}; braces are {{{{")
        return str(known[place[1]])

    return _PLACE.sub(value, template)


def question_of(example: Example) -> str:
    """What a row asks last.

    Args:
        example: a conversation.

    Returns:
        The text of the message before its last answer.

    Example:
        >>> question_of(Example("f, row 1", "alpaca", [{"role": "user", "content": "1+1"}]))
        '1+1'
    """
    asked = asked_messages(example)
    content = asked[-1].get("content") if asked else ""
    return content if isinstance(content, str) else ""


def repeated_questions(examples: Sequence[Example], pool: Sequence[Example]) -> int:
    """How many rows ask what a training row asks.

    Args:
        examples: held-out rows.
        pool: training rows.

    Returns:
        Their number; letter case and white space do not count.

    Example:
        >>> rows = [Example("f, row 1", "alpaca", [{"role": "user", "content": "Why?"}])]
        >>> repeated_questions(rows, rows)
        1
    """
    known = {_key(example) for example in pool}
    return sum(_key(example) in known for example in examples)


def _key(example: Example) -> str:
    return " ".join(question_of(example).casefold().split())


def _is_plain(example: Example) -> bool:
    """Whether an example is one question in text with one answer in text."""
    if sum(message["role"] == "user" for message in example.messages) != 1 or example.messages[-1].get("tool_calls"):
        return False
    return all(isinstance(message.get("content"), str) for message in example.messages)


def _by_turns(order: Sequence[int], labels: Sequence[str]) -> list[int]:
    """The same indices, so that any number of the first ones has each label about equally often."""
    groups: dict[str, list[int]] = {}
    for at in order:
        groups.setdefault(labels[at], []).append(at)
    turn = {at: (rank, number) for number, group in enumerate(groups.values()) for rank, at in enumerate(group)}
    return sorted(order, key=turn.__getitem__)
