"""Rows for extractive question answering: an answer is a span of the context.

    Example -> find_answer -> span_rows (windows with stride) -> Part;  logits of the windows -> best_spans -> texts

A context that is too long becomes several windows that overlap. Where the answer is not in a window, or a question has
none, the span is the window's first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyfinetune.errors import UserError
from pyfinetune.train.data.formats import Example
from pyfinetune.train.heads.encoders import Part, require_fast

_LONGEST_ANSWER = 30  # tokens
_BEST = 20  # starts and ends of each window that are tried with one another


def right_answers(example: Example) -> list[str]:
    """All right answers of a question.

    Args:
        example: a row of question/context/answers.

    Returns:
        Their texts; none for a question without an answer.

    Example:
        >>> right_answers(Example("f, row 1", "question_answering", fields={"answers": {"text": ["a", "b"]}}))
        ['a', 'b']
    """
    answer = example.fields.get("answer")
    if answer is not None:
        return [answer] if answer.strip() else []
    found = example.fields["answers"]
    texts = found["text"] if isinstance(found, Mapping) else found
    return [texts] if isinstance(texts, str) else [text for text in texts if text.strip()]


def find_answer(example: Example) -> tuple[int, int] | None:
    """Where the answer stands in the context.

    Args:
        example: a row of question/context/answers; of several right answers the first is learned.

    Returns:
        First character and the one after the last; None for a question without an answer.

    Raises:
        UserError: there is no context, or the answer does not stand in it.

    Example:
        >>> fields = {"question": "Who?", "context": "Then Ann ran.", "answer": "Ann"}
        >>> find_answer(Example("f, row 1", "question_answering", fields=fields))
        (5, 8)
    """
    context = example.fields.get("context")
    if not isinstance(context, str) or not context.strip():
        raise UserError(
            f"{example.place}: has no context to find the answer in",
            fix="fill in the column context, or take a model that writes its answers: head: causal_lm or seq2seq_lm",
        )
    texts = right_answers(example)
    if not texts:
        return None
    answers = example.fields.get("answers")
    starts = answers.get("answer_start") if isinstance(answers, Mapping) else None
    if example.fields.get("answer") is None and starts:
        start = starts[0] if isinstance(starts, Sequence) else starts
        if not isinstance(start, int) or context[max(start, 0) : max(start, 0) + len(texts[0])] != texts[0]:
            raise UserError(
                f"{example.place}: the answer {texts[0]!r} does not stand at answer_start {start} of its context",
                fix="correct answer_start (characters, counted from 0), or leave it out to have the answer found",
            )
        return start, start + len(texts[0])
    start = context.find(texts[0])
    if start < 0:
        raise UserError(
            f"{example.place}: the answer {texts[0]!r} does not stand in its context",
            fix="write the answer as it stands there, or take a model that writes its answers: head: causal_lm",
        )
    return start, start + len(texts[0])


def span_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, doc_stride: int) -> Part:
    """Questions with their contexts, in windows.

    Args:
        examples: rows of question/context/answers.
        tokenizer: the model's, a fast one.
        max_length: longest window, in tokens, the question included.
        doc_stride: tokens of the context that two windows share.

    Returns:
        A row for each window, `labels` being the first and the last token of the answer. Its note says which characters
        of the context each token is: int64 [tokens, 2], -1 for those that are none.

    Raises:
        UserError: an answer does not stand in its context, or a question leaves no room for the context.

    Example:
        >>> span_rows(examples, tokenizer, 384, 128).rows[0]["labels"]  # doctest: +SKIP
        [57, 59]
    """
    require_fast(tokenizer, "question/context/answers")
    part = Part(examples)
    around = tokenizer.num_special_tokens_to_add(pair=True)
    for index, example in enumerate(examples):
        answer = find_answer(example)
        question, context = example.fields["question"], example.fields["context"]
        asked = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
        room = max_length - asked - around
        whole = len(tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
        if whole > room and room <= doc_stride:
            raise UserError(
                f"{example.place}: beside the {asked} tokens of its question, max_length {max_length} leaves"
                f" {max(room, 0)} for the context, of which doc_stride {doc_stride} are shared with the next window",
                fix="raise max_length, lower doc_stride, or shorten the question",
            )
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride if whole > room else 0,  # one that is no use may be refused for its size
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        part.measure(index, asked + around + whole, 0)
        for window in range(len(encoded["input_ids"])):
            offsets = np.array(encoded["offset_mapping"][window], dtype=np.int64).reshape(-1, 2)
            is_context = np.array([which == 1 for which in encoded.sequence_ids(window)])
            offsets[~is_context] = -1
            names = [name for name in tokenizer.model_input_names if name in encoded]
            row = {name: encoded[name][window] for name in names}
            row["labels"] = _tokens_of(answer, offsets)
            part.add(index, row, targets=2, note=offsets)
    return part


def best_spans(part: Part, starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], unanswerable: bool) -> list[str]:
    """The answer to each question, the best span over all of its windows.

    Args:
        part: what `span_rows` returned.
        starts: of each row, the logits of its tokens being the first of the answer.
        ends: of each row, the logits of its tokens being the last.
        unanswerable: whether a question may have no answer, which is then the empty text.

    Returns:
        A text for each example.

    Example:
        >>> best_spans(part, starts, ends, unanswerable=False)  # doctest: +SKIP
        ['Ann']
    """
    found: list[tuple[float, str]] = [(-np.inf, "")] * len(part.examples)
    nothing = [np.inf] * len(part.examples)
    for owner, offsets, start, end in zip(part.owners, part.notes, starts, ends, strict=True):
        nothing[owner] = min(nothing[owner], float(start[0] + end[0]))
        inside = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 1] > offsets[:, 0]))
        first = inside[np.argsort(-start[inside], kind="stable")[:_BEST]]
        last = inside[np.argsort(-end[inside], kind="stable")[:_BEST]]
        scores = start[first][:, None] + end[last][None, :]
        length = last[None, :] - first[:, None] + 1
        scores = np.where((length >= 1) & (length <= _LONGEST_ANSWER), scores, -np.inf)
        if not scores.size:
            continue
        at = np.unravel_index(int(np.argmax(scores)), scores.shape)
        if scores[at] > found[owner][0]:
            context = part.examples[owner].fields["context"]
            text = context[offsets[first[at[0]], 0] : offsets[last[at[1]], 1]]
            found[owner] = (float(scores[at]), text.strip())
    return ["" if unanswerable and nothing[index] > score else text for index, (score, text) in enumerate(found)]


def _tokens_of(answer: tuple[int, int] | None, offsets: np.ndarray) -> list[int]:
    """First and last token of the answer; the window's first token where it is not wholly in it."""
    if answer is None:
        return [0, 0]
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not inside.size or offsets[inside[0], 0] > answer[0] or offsets[inside[-1], 1] < answer[1]:
        return [0, 0]
    touched = np.flatnonzero((offsets[:, 0] < answer[1]) & (offsets[:, 1] > answer[0]) & (offsets[:, 0] >= 0))
    return [int(touched[0]), int(touched[-1])] if touched.size else [0, 0]
