"""Rows for an encoder-decoder: a text to read and one to write.

Example -> source_and_target -> pair_rows -> Part -> the trainer;  rows -> write_answers -> texts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyfinetune.errors import UserError
from pyfinetune.train.data.formats import Example
from pyfinetune.train.heads.encoders import Part

_SOURCES = {"summarization": ("dialogue", "document", "article", "text"), "translation": ("source",)}


def source_and_target(example: Example, prefix: str = "") -> tuple[str, str]:
    """What is read and what is to be written.

    Args:
        example: a row of summarization or translation, whose text is read as it stands; of another task, which is asked
            as a question; or a conversation of one answer.
        prefix: written before the text.

    Returns:
        The two texts.

    Raises:
        UserError: the conversation has more than one answer.

    Example:
        >>> messages = [{"role": "user", "content": "Translate."}, {"role": "assistant", "content": "dog"}]
        >>> source_and_target(Example("f, row 1", "translation", messages, fields={"source": "Hund", "target": "dog"}))
        ('Hund', 'dog')
    """
    *asked, answer = example.messages
    if answer["role"] != "assistant" or sum(message["role"] == "assistant" for message in example.messages) != 1:
        raise UserError(
            f"{example.place}: has more than one answer, and an encoder-decoder learns one of each row",
            fix="give each answer a row of its own, or take a causal language model",
        )
    source = _own_text(example)
    if source is None:
        source = "\n\n".join(message["content"] for message in asked)
    return prefix + source, answer["content"]


def pair_rows(examples: Sequence[Example], tokenizer: Any, max_length: int, prefix: str = "") -> Part:
    """Texts to read with the tokens to write.

    Args:
        examples: rows of any task but raw text.
        tokenizer: the model's.
        max_length: longest text of either kind, in tokens; what is beyond it is cut off.
        prefix: written before every text that is read.

    Returns:
        One row each; the text to write, as one of the right answers, is its note.

    Raises:
        UserError: a conversation has more than one answer.

    Example:
        >>> pair_rows(examples, tokenizer, 256).rows[0]["labels"][-1] == tokenizer.eos_token_id  # doctest: +SKIP
        True
    """
    part = Part(examples)
    for index, example in enumerate(examples):
        source, target = source_and_target(example, prefix)
        read = tokenizer(source, verbose=False)["input_ids"]
        written = tokenizer(text_target=target, verbose=False)["input_ids"]
        row = dict(tokenizer(source, truncation=True, max_length=max_length))
        labels = tokenizer(text_target=target, truncation=True, max_length=max_length)["input_ids"]
        row["labels"] = labels
        lost = len(read) - len(row["input_ids"]) + len(written) - len(labels)
        part.measure(index, max(len(read), len(written)), lost)
        part.add(index, row, targets=len(labels), note=target)
    return part


@torch.no_grad()
def write_answers(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], max_new_tokens: int, batch_size: int = 8
) -> list[str]:
    """The model's most likely answers, token by token.

    Args:
        model: an encoder-decoder, with or without adapters.
        tokenizer: its tokenizer.
        rows: what `pair_rows` made.
        max_new_tokens: longest answer, in tokens.
        batch_size: rows at once.

    Returns:
        A text for each row.

    Example:
        >>> write_answers(model, tokenizer, part.rows, 64)  # doctest: +SKIP
        ['Two men outside.']
    """
    device = next(model.parameters()).device
    was_training, answers = model.training, []
    model.eval()
    for start in range(0, len(rows), batch_size):
        read = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows[start:][:batch_size]]
        batch = tokenizer.pad(read, return_tensors="pt").to(device)
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True)
        answers += tokenizer.batch_decode(out, skip_special_tokens=True)
    model.train(was_training)
    return [answer.strip() for answer in answers]


def _own_text(example: Example) -> str | None:
    """The text itself, of tasks whose question would only say what the model is made for."""
    fields = example.fields
    pair = fields.get("translation") if example.format == "translation" else None
    if pair is not None:
        return next(iter(pair.values()))
    found = (fields.get(name) for name in _SOURCES.get(example.format, ()))
    return next((text for text in found if text is not None), None)
