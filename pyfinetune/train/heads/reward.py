"""Rows for a reward model: of two answers, which one is better.

Example -> preference_rows -> Part -> reward_loop (TRL's RewardTrainer);  model, Part -> choices_of -> right or wrong
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyfinetune.errors import UserError
from pyfinetune.train.data.formats import Example
from pyfinetune.train.heads.encoders import Part

SIDES = ("chosen", "rejected")


def preference_rows(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Part:
    """Prompts with their two answers, as tokens.

    Args:
        examples: rows of chosen/rejected, texts or chats, perhaps with a prompt.
        tokenizer: the model's, with a chat template where there are chats.
        max_length: longest answer with its prompt, in tokens; a longer pair is left out, since a reward is for the end.

    Returns:
        A row for each pair that fits: `chosen_ids` and `rejected_ids`.

    Raises:
        UserError: no pair fits.

    Example:
        >>> preference_rows(examples, tokenizer, 512).rows[0].keys()  # doctest: +SKIP
        dict_keys(['chosen_ids', 'rejected_ids'])
    """
    part = Part(examples)
    for index, example in enumerate(examples):
        row = {f"{side}_ids": _encoded(example, side, tokenizer) for side in SIDES}
        longest = max(map(len, row.values()))
        fits = longest <= max_length
        part.measure(index, longest, 0 if fits else longest - max_length)
        part.dropped += not fits
        if fits:
            part.add(index, row, targets=1)
    if examples and not part.rows:
        raise UserError(
            f"max_length {max_length} is under the length of every pair (longest: {part.longest} tokens)",
            fix="raise max_length, or give shorter answers",
        )
    return part


def choices_of(part: Part, rewards: dict[str, Sequence[float]]) -> list[str]:
    """Which answer of each pair a model prefers.

    Args:
        part: what `preference_rows` returned.
        rewards: `chosen` and `rejected`, one a row.

    Returns:
        `chosen` or `rejected`, which a tie is too.

    Example:
        >>> choices_of(Part([], [{}, {}]), {"chosen": [1.0, 0.0], "rejected": [0.5, 0.0]})
        ['chosen', 'rejected']
    """
    pairs = zip(rewards["chosen"], rewards["rejected"], strict=True)
    return [SIDES[0] if chosen > rejected else SIDES[1] for chosen, rejected in pairs][: len(part.rows)]


def length_floor(train: Part, held_out: Part) -> tuple[str, list[str]]:
    """The choices of who only looks at lengths, the way round that is right more often in the training rows.

    Args:
        train: the training rows.
        held_out: the rows to choose in.

    Returns:
        What it is in words, and one choice a row.

    Example:
        >>> length_floor(train, held_out)[0]  # doctest: +SKIP
        'the longer answer'
    """

    def longer(part: Part) -> list[bool]:
        return [len(row["chosen_ids"]) > len(row["rejected_ids"]) for row in part.rows]

    def shorter(part: Part) -> list[bool]:
        return [len(row["chosen_ids"]) < len(row["rejected_ids"]) for row in part.rows]

    words, rule = ("the longer answer", longer)
    if sum(shorter(train)) > sum(longer(train)):
        words, rule = "the shorter answer", shorter
    return words, [SIDES[0] if right else SIDES[1] for right in rule(held_out)]


def _encoded(example: Example, side: str, tokenizer: Any) -> list[int]:
    """The prompt with one of its answers, closed as TRL closes it."""
    answer = example.fields[side]
    if isinstance(answer, str):
        ids = tokenizer((example.fields["prompt"] or "") + answer, verbose=False)["input_ids"]
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template(answer, tools=example.tools, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
