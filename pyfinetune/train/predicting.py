"""Examples to predictions: what each way of answering has in common, and the way of a causal language model.

    Example -> Predictor.predict -> Answer -> metrics.score

A model with a head of its own brings its own `Predictor`; what is evaluated and compared knows only this.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pyfinetune.errors import UserError
from pyfinetune.train import tasks
from pyfinetune.train.formats import Example
from pyfinetune.train.generating import document_losses, generate_answers
from pyfinetune.train.tokenizing import Document, tokenize

_NO_LIMIT = 1 << 30

OnAnswers = Callable[[list[int], list["Answer"]], None]


@dataclass(frozen=True)
class Answer:
    """What a model made of one example.

    Args:
        prediction: in the form that `metrics.score` takes: a text, a label's name or a list of tags.
        text: what the model said, to be read.
        tokens_in, tokens_out: tokens read and written.
        seconds: it took, as a share of its batch.
        fits: False where the example was too long for the model, and nothing was asked.
    """

    prediction: Any
    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    fits: bool = True


class Predictor(Protocol):
    """A way of answering examples."""

    def predict(self, examples: Sequence[Example], on_answers: OnAnswers | None = None) -> list[Answer]:
        """Answer each example.

        Args:
            examples: what to answer; their own answers are not looked at.
            on_answers: called with the indices of a few examples and their answers as soon as they are there.

        Returns:
            An answer an example, in order.
        """


@dataclass
class CausalPredictor:
    """A causal language model that says its answer, or that is asked which of a few labels it holds most likely.

    Args:
        model: it.
        tokenizer: its tokenizer, as `tokenizing.load_tokenizer` gives it.
        task: of the examples.
        labels: where given, the answer is the most likely of them: log p of the label's tokens and of the token that
            ends the answer, summed. Else it is generated.
        max_new_tokens: where an answer ends that does not end by itself.
        batch_size: examples at a time.
        positions: tokens that the model can hold; an example that leaves no room for an answer gets an empty one.
    """

    model: Any
    tokenizer: Any
    task: str
    labels: Sequence[str] | None = None
    max_new_tokens: int = 64
    batch_size: int = 8
    positions: int | None = None

    def predict(self, examples: Sequence[Example], on_answers: OnAnswers | None = None) -> list[Answer]:
        """Answer each example; see `Predictor`."""
        found: list[Any] = [None] * len(examples)

        def keep(indices: list[int], answers: list[Answer]) -> None:
            for at, answer in zip(indices, answers, strict=True):
                found[at] = answer
            if on_answers is not None:
                on_answers(indices, answers)

        prompts, stops = prompts_of(examples, self.tokenizer)
        room = self.room(examples)
        fitting = [at for at, prompt in enumerate(prompts) if self.fits(prompt, room)]
        unfit = sorted({*range(len(examples))} - {*fitting})
        keep(unfit, [Answer(self._read(examples[at], ""), "", len(prompts[at]), fits=False) for at in unfit])
        if self.labels is not None:
            self._choose(examples, prompts, fitting, keep)
            return found

        def on_batch(batch: list[int], said: list[Any]) -> None:
            at = [fitting[index] for index in batch]
            keep(at, [self._answer(examples[i], prompts[i], s) for i, s in zip(at, said, strict=True)])

        generate_answers(
            self.model,
            self.tokenizer,
            [prompts[at] for at in fitting],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            stop_ids=stops,
            on_batch=on_batch,
        )
        return found

    def room(self, examples: Sequence[Example]) -> int:
        """Tokens that an answer may take.

        Args:
            examples: what is answered.

        Returns:
            `max_new_tokens`, or the length of the longest label.
        """
        if self.labels is None or not examples:
            return self.max_new_tokens
        documents = [document_of(with_answer(examples[0], label), self.tokenizer) for label in self.labels]
        return max(len(document) - last_answer(document) for document in documents)

    def fits(self, prompt: Sequence[int], room: int) -> bool:
        """Whether a prompt leaves room for an answer.

        Args:
            prompt: token ids.
            room: tokens that an answer may take.

        Returns:
            False where the model has too few positions.
        """
        return self.positions is None or len(prompt) + room <= self.positions

    def _answer(self, example: Example, prompt: Sequence[int], said: Any) -> Answer:
        return Answer(self._read(example, said.text), said.text, len(prompt), said.tokens, said.seconds)

    def _read(self, example: Example, text: str) -> Any:
        if self.task == "token_classification":
            return tasks.tags_of_answer(example.fields["tokens"], text)
        return text

    def _choose(
        self, examples: Sequence[Example], prompts: list[list[int]], fitting: list[int], keep: OnAnswers
    ) -> None:
        """The most likely label of each example; a few examples at a time, so that what is done can be kept."""
        pad, labels = self.tokenizer.pad_token_id or 0, list(self.labels or ())
        at_once = max(1, self.batch_size // len(labels))
        for start in range(0, len(fitting), at_once):
            indices, begin = fitting[start : start + at_once], time.perf_counter()
            documents = [
                _only_last(document_of(with_answer(examples[at], label), self.tokenizer))
                for at in indices
                for label in labels
            ]
            losses, targets = document_losses(self.model, documents, pad_token_id=pad, batch_size=self.batch_size)
            best = losses.reshape(len(indices), len(labels)).argmin(axis=1)
            seconds = (time.perf_counter() - begin) / len(indices)
            written = targets.reshape(len(indices), len(labels))
            keep(
                indices,
                [
                    Answer(labels[choice], labels[choice], len(prompts[at]), int(written[row, choice]), seconds)
                    for row, (at, choice) in enumerate(zip(indices, best, strict=True))
                ],
            )


def prompts_of(examples: Sequence[Example], tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The tokens that a causal model is given before its answer, exactly as in training, and those that end one.

    Args:
        examples: conversations; of several answers the last one is asked for.
        tokenizer: as `tokenizing.load_tokenizer` gives it.

    Returns:
        Token ids of each example's prompt; and the tokens by which answers end in this tokenizer's template.

    Raises:
        UserError: an example is raw text, which asks nothing.

    Example:
        >>> prompts, stops = prompts_of(examples, tokenizer)  # doctest: +SKIP
    """
    prompts, stops = [], set()
    for example in examples:
        if example.format == "text":
            raise UserError(
                f"{example.place}: is raw text, which asks nothing and has no answer to score",
                fix="give rows with questions and answers; of raw text there is the loss alone",
            )
        document = document_of(example, tokenizer)
        ids = document.input_ids.tolist()
        prompts.append(ids[: last_answer(document)])
        stops.add(ids[-1])
    return prompts, sorted(stops)


def document_of(example: Example, tokenizer: Any) -> Document:
    """A whole example as tokens, uncut.

    Args:
        example: a conversation.
        tokenizer: as `tokenizing.load_tokenizer` gives it.

    Returns:
        The document; of a template that writes earlier answers differently, the one that ends with the last answer.

    Raises:
        UserError: the template does not write the answer.

    Example:
        >>> len(document_of(example, tokenizer))  # doctest: +SKIP
        42
    """
    return tokenize([example], tokenizer, _NO_LIMIT).documents[-1]


def last_answer(document: Document) -> int:
    """Where the last stretch of learned tokens starts.

    Args:
        document: with at least one learned token.

    Returns:
        Index of its first token.

    Example:
        >>> last_answer(Document(np.arange(5), np.array([0, 1, 0, 1, 1], dtype=bool)))
        3
    """
    start = int(np.flatnonzero(document.learned)[-1])
    while start > 0 and document.learned[start - 1]:
        start -= 1
    return start


def with_answer(example: Example, answer: str) -> Example:
    """An example with another last answer.

    Args:
        example: a conversation that ends with an answer.
        answer: in its place.

    Returns:
        A copy.

    Example:
        >>> example = Example("f, row 1", "alpaca", [{"role": "user", "content": "?"}])
        >>> with_answer(example, "!").messages[-1]
        {'role': 'assistant', 'content': '!'}
    """
    asked = asked_messages(example)
    return dataclasses.replace(example, messages=[*asked, {"role": "assistant", "content": answer}])


def asked_messages(example: Example) -> list[dict[str, Any]]:
    """The messages before an example's last answer.

    Args:
        example: a conversation.

    Returns:
        All of them where nothing is answered.

    Example:
        >>> asked_messages(Example("f, row 1", "alpaca", [{"role": "user", "content": "?"}]))
        [{'role': 'user', 'content': '?'}]
    """
    answers = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    return example.messages[: answers[-1]] if answers else list(example.messages)


def reference_of(example: Example, task: str) -> Any:
    """What would be right to answer.

    Args:
        example: with its answer.
        task: as `metrics.score` names it.

    Returns:
        In the form that `metrics.score` takes.

    Raises:
        UserError: the last answer is no text, such as the call of a tool.

    Example:
        >>> messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        >>> reference_of(Example("f, row 1", "alpaca", messages), "sft")
        '!'
    """
    asked = len(asked_messages(example))
    content = example.messages[asked].get("content") if asked < len(example.messages) else None
    if not isinstance(content, str):
        raise UserError(
            f"{example.place}: its last answer is not text, so nothing can be held against it",
            fix="leave the row out of what is evaluated",
        )
    return tasks.right_answers(task, example.fields, content)


def _only_last(document: Document) -> Document:
    """The same document, of which only the last answer is learned: in a conversation the others are given."""
    learned = document.learned.copy()
    learned[: last_answer(document)] = False
    return dataclasses.replace(document, learned=learned)
